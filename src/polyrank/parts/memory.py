"""Stored samples: options that say which, and the rule that asks them before every update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyrank.errors import ConfigError
from polyrank.frame import ORDER, Adapter, Rule, Step, Workshop
from polyrank.parts.boundaries import Aside, Later

BY = ("stream", "class", "task")


@dataclass(frozen=True, kw_only=True)
class Storing(Later):
    """A strategy that keeps samples.

    Args:
        capacity: rows kept at most, or if below 1 their share of the stream's training rows; > 0.
        bytes: limit of what the rows and what is stored with them take, >= 0; 0 for none.
    """

    capacity: float = 0.05
    bytes: int = 0

    least: ClassVar = {"bytes": 0}

    def problems(self) -> Iterator[str]:
        """Check the size of the store."""
        if not self.capacity > 0:
            yield (
                f"capacity: got {self.capacity}, expected > 0: a number of rows, or a share of the "
                "stream below 1; 0.05 is common"
            )
        elif self.capacity > 1 and self.capacity != int(self.capacity):
            yield (
                f"capacity: got {self.capacity}, expected a whole number of rows, or a share of "
                "the stream below 1"
            )


class Past(Aside):
    """Remembers which tasks the store knew when a task began: those that constrain it.

    Args:
        name: the strategy, as which it remembers.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Note the past tasks.

        Raises:
            ConfigError: if one of them has no row left.
        """
        memory = workshop.memory(self.name)
        past = [] if workshop.first else workshop.replay.tasks()
        if len(past) < memory.get("finished", 0):
            raise ConfigError(
                f"{self.name}: {memory['finished']} tasks are over, but the store holds rows of "
                f"{len(past)} only, so the others would be left unprotected; raise capacity or "
                "bytes"
            )
        memory["past"] = past

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Count the task."""
        memory = workshop.memory(self.name)
        memory["finished"] = memory.get("finished", 0) + 1


class Constrain(Rule):
    """Turns the update's gradient away from what would raise the loss on stored samples.

    g ← g + Σ_k v_k g_k over all trained parameters at once, with g_k the mean gradient of stored
    rows and v from the products of g and all g_k alone. Before the second task nothing happens.

    Args:
        name: the strategy.
        size: rows per memory gradient, >= 1.
        apart: one g_k for each past task, of `size` rows each; else one for all of them, equally
            many rows of each task.
        solve: maps G (1 + K, 1 + K) in fp64, the products of (g, g_1 … g_K), to v (K,), or to None
            to leave g as it is.
    """

    order = ORDER["constrain"]
    touches = frozenset({"grad"})

    def __init__(
        self, name: str, size: int, apart: bool, solve: Callable[[Tensor], Tensor | None]
    ) -> None:
        self.label, self.size, self.apart, self.solve = name, size, apart, solve

    @property
    def name(self) -> str:
        """Return the strategy's name."""
        return self.label

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Take what trains.

        Raises:
            ConfigError: without an engine, which alone has stored samples.
        """
        if workshop is None:
            raise ConfigError(
                f"{self.label}: asks stored samples at every update, which only the engine keeps; "
                "train through polyrank.run"
            )
        self.workshop = workshop
        self.params = trained_parameters(adapter)

    @torch.no_grad()
    def grads(self, step: Step) -> None:
        """Replace the gradients if the stored samples object."""
        past = self.workshop.memory(self.label).get("past", [])
        if not past:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        memories = self._memories(step, past)
        v = self.solve(products([grads, *memories]))
        if v is None:
            return
        for index, param in enumerate(self.params):
            if param.grad is None:
                param.grad = grads[index]
            for weight, memory in zip(v.tolist(), memories, strict=True):
                param.grad.add_(memory[index].to(param.grad.dtype), alpha=weight)

    def _memories(self, step: Step, past: Sequence[int]) -> list[list[Tensor]]:
        """Return g_k by parameter."""
        key = (self.label, step.seed, step.task, step.phase, step.index)
        draw = self.workshop.replay.draw
        if self.apart:
            return [self._gradient(draw(self.size, *key, task=k)) for k in past]
        # With more tasks than rows, every update begins at another task.
        turn = step.index * self.size % len(past)
        turned = [*past[turn:], *past[:turn]]
        least, over = divmod(self.size, len(past))
        counts = [least + (place < over) for place in range(len(past))]
        batches = joined([draw(n, *key, task=k) for k, n in zip(turned, counts, strict=True) if n])
        total = sum(len(batch["labels"]) for batch in batches)
        found = [torch.zeros_like(p) for p in self.params]
        for batch in batches:
            share = len(batch["labels"]) / total
            torch._foreach_add_(found, self._gradient(batch), alpha=share)
        return [found]

    def _gradient(self, batch: dict[str, Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return self.workshop.grads(batch, self.params)


def joined(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return batches of equal columns and shapes as one; texts of other lengths stay apart."""
    found: dict[tuple[Any, ...], list[dict[str, Tensor]]] = {}
    for batch in batches:
        key = tuple(sorted((name, *value.shape[1:]) for name, value in batch.items()))
        found.setdefault(key, []).append(batch)
    return [
        {name: torch.cat([batch[name] for batch in group]) for name in group[0]}
        for group in found.values()
    ]


def products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return G_ij = ⟨g_i, g_j⟩ over all parameters, (n, n) in fp64 on the CPU."""
    total: Tensor | float = 0.0
    for parts in zip(*gradients, strict=True):
        rows = torch.stack([part.reshape(-1) for part in parts]).double()
        total = total + rows @ rows.T
    return torch.as_tensor(total).cpu()


def trained_parameters(adapter: Adapter) -> list[nn.Parameter]:
    """Return what trains now, by identity."""
    return [p for held in adapter.roles().values() for p in held if p.requires_grad]
