"""The engine's services to a boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.engine.data import TaskRows, batches
from polyrank.errors import ConfigError
from polyrank.frame import Layer, Workshop, keyed
from polyrank.layers import (
    AdaptedLinear,
    ModelAdapter,
    View,
    absorb,
    adapter_of,
    append,
    keep,
    redraw,
    replica,
)


class TaskWorkshop(Workshop):
    """Services for one task; a boundary gets it and never the model itself.

    Args:
        model: the adapted model.
        parts: datasets of the task by role and split, {"train": {...}}.
        seed: key of random draws.
        task: number of the task.
        size: rows per batch.
    """

    def __init__(
        self, model: nn.Module, parts: Mapping[str, Sequence[Any]], seed: int, task: int, size: int
    ) -> None:
        self.model, self.parts, self.seed, self.task, self.size = model, parts, seed, task, size

    @property
    def adapter(self) -> ModelAdapter:  # type: ignore[override]
        """The adapter as it is now; views change with structure."""
        return adapter_of(self.model)

    def data(
        self, role: str, split: str = "train", *, seed: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield batches of a role; with a seed, shuffled by it.

        Raises:
            ConfigError: if the task has no such data.
        """
        key = split if role == "train" else role
        if key not in self.parts:
            raise ConfigError(f"data: the task has {', '.join(sorted(self.parts))}, and no {key!r}")
        return batches(TaskRows(self.parts[key]), self.size, seed=seed)

    @torch.no_grad()
    def observe(
        self,
        batches: Iterable[dict[str, Any]],
        at: str,
        wants: frozenset[str],
        fn: Callable[[str, dict[str, Tensor]], None],
    ) -> dict[str, Any]:
        """Call `fn(path, {"input", "output"})` per adapted linear layer and batch; no gradients.

        Raises:
            ConfigError: for places or wishes that are not served.
        """
        if at != "linear" or not wants <= {"input", "output"}:
            raise ConfigError(
                f"observe: got at={at!r}, wants={sorted(wants)}; "
                "'linear' with 'input', 'output' is served"
            )

        def hook(path: str) -> Callable[..., None]:
            def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                found = {"input": args[0], "output": output}
                fn(path, {name: found[name] for name in wants})

            return seen

        layers = {m for m in self.model.modules() if isinstance(m, AdaptedLinear)}
        handles = [
            layer.module.base_layer.register_forward_hook(hook(layer.site.path))
            for layer in self.adapter.layers
            if layer.module in layers
        ]
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                self.model(pixel_values=batch["pixel_values"])
        finally:
            for handle in handles:
                handle.remove()
            self.model.train(training)
        return {}

    def grads(self, batch: dict[str, Any], params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return gradients of the mean cross-entropy of one batch, averaged over processes.

        `.grad` stays as it is, and in evaluation mode nothing counts or drops out.
        """
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            logits = self.model(pixel_values=batch["pixel_values"]).logits
            loss = F.cross_entropy(logits.float(), batch["labels"])
            found = torch.autograd.grad(loss, list(params), allow_unused=True)
        finally:
            for module, mode in training.items():
                module.training = mode
        grads = [
            p.new_zeros(p.shape) if g is None else g for g, p in zip(found, params, strict=True)
        ]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for grad in grads:
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
        return grads

    def absorb(self) -> None:
        """Add the adapter's update to the base weights and redraw it."""
        absorb(self.model, seed=self.seed)

    def append(self, name: str, r: int) -> None:
        """Freeze the live ranks into the bank and give r new ones."""
        append(self.model, r, seed=self.seed)

    def redraw(self) -> None:
        """Write fresh starting values."""
        redraw(self.model, seed=self.seed, key=f"task-{self.task}")

    def replica(self, name: str) -> None:
        """Keep a frozen copy of the adapter.

        Raises:
            ConfigError: if the adapter holds blocks, which a replica would show as they are now.
        """
        if self.adapter.blocks:
            raise ConfigError(
                f"replica: adapter {self.adapter.name!r} holds blocks, which cannot be kept twice; "
                "use a strategy without a teacher or an average"
            )
        replica(self.model, name)

    def keep(self, layer: Layer, ranks: Tensor) -> None:
        """Keep some live ranks of one layer, in the given order."""
        keep(self.model, cast("View", layer), ranks)

    @property
    def replay(self) -> Any:
        """Raise: stored samples come with the strategies that need them.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("replay: this engine keeps no samples; use a method that needs none")

    def rng(self, name: str) -> torch.Generator:
        """Return the generator keyed by (seed, task, name)."""
        return keyed(self.seed, self.task, name)
