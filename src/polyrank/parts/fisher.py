"""The diagonal Fisher information of an adapter on a task: how much the answers mind each weight.

F_j = (1/n) Σ_i (∂ log p(y_i | x_i) / ∂θ_j)² over single samples; the square of a batch's mean
gradient is something else, and has a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, RunError
from polyrank.frame import Adapter, Job, Workshop
from polyrank.layers import View
from polyrank.layers.views import wide
from polyrank.parts.boundaries import Aside
from polyrank.parts.consolidate import Quadratic, effective_weight, held_parameters
from polyrank.parts.per_sample import squared_sums

ESTIMATORS = ("true", "predicted", "empirical", "batch")


class FisherStep:
    """One batch of the current task's training rows: squares of gradients are added to the state.

    "true": y drawn from p(· | x), by a key; "predicted": y = argmax p; "empirical": the row's own
    label; "batch": Σ_b |b| (∂ mean of batch b)² / number of batches, with the rows' own labels.

    Args:
        estimator: one of the four.
        rows: rows to look at, in an order drawn by key; 0 for all, in their own.
        space: "weights" or "factors".
        head: whether the head's tensors are looked at too.
    """

    def __init__(self, estimator: str, rows: int, space: str, head: bool) -> None:
        self.estimator, self.rows, self.space, self.head = estimator, rows, space, head
        # Only saves reading the batches before the cursor again.
        self.reading: tuple[int, Iterator[dict[str, Any]]] | None = None

    def __call__(self, workshop: Workshop, state: dict[str, Any]) -> bool:
        """Do the next batch; True when there is none.

        Raises:
            ConfigError: if the task has no rows.
            RunError: if a gradient is not finite.
        """
        state.update({"cursor": 0, "rows": 0, "squares": {}, **state})
        left = self.rows - state["rows"] if self.rows else None
        batch = None if left == 0 else self._next(workshop, state["cursor"])
        if batch is None:
            if not state["rows"]:
                raise ConfigError(
                    "Fisher information: the task has no training rows to estimate it from; give "
                    "every task some"
                )
            state["fisher"] = True
            return True
        count = len(batch["labels"]) if left is None else min(left, len(batch["labels"]))
        batch = {name: value[:count] for name, value in batch.items()}
        for name, square in self._squares(workshop, batch, state["cursor"]).items():
            if not bool(square.isfinite().all()):
                raise RunError(
                    f"Fisher information of {name}: a gradient is not finite; lower the learning "
                    "rate with --train lr=..., or clip harder with --train max_grad_norm=..."
                )
            held = state["squares"]
            held[name] = square if name not in held else held[name].to(square.device) + square
        state["cursor"] += 1
        state["rows"] += count
        return False

    def _next(self, workshop: Workshop, cursor: int) -> dict[str, Any] | None:
        if self.reading is None or self.reading[0] != cursor:
            seed = None
            if self.rows:
                seed = int(torch.randint(2**31, (), generator=workshop.rng("fisher-rows")))
            batches = iter(workshop.data("train", seed=seed))
            self.reading = (cursor, islice(batches, cursor, None))
        self.reading = (cursor + 1, self.reading[1])
        return next(self.reading[1], None)

    def _squares(self, workshop: Workshop, batch: dict[str, Any], cursor: int) -> dict[str, Tensor]:
        """Return sums of squared gradients of one batch, by name."""
        rows = {**batch, "labels": self._labels(workshop, batch, cursor)}
        with measured(workshop.adapter, self.space, self.head) as places:
            params = [param for param, _ in places.values()]
            sums = self._sums(workshop, rows, params)
            found = zip(places.items(), sums, strict=True)
            return {name: total.T if flipped else total for (name, (_, flipped)), total in found}

    def _sums(
        self, workshop: Workshop, rows: dict[str, Any], params: list[nn.Parameter]
    ) -> list[Tensor]:
        size, whole = len(rows["labels"]), self.estimator == "batch"
        if not whole and size > 1 and rows["labels"].dim() == 1:
            adapter = workshop.adapter
            sums = squared_sums(adapter, params, size, lambda: workshop.grads(rows, params))
            if sums is not None:
                return sums
        sums = [torch.zeros_like(p, dtype=wide(p).dtype) for p in params]
        for first in range(0, size, size if whole else 1):
            part = slice(first, size if whole else first + 1)
            grads = workshop.grads({k: v[part] for k, v in rows.items()}, params)
            grads = [wide(grad) for grad in grads]
            torch._foreach_addcmul_(sums, grads, grads, value=float(size if whole else 1))
        return sums

    def _labels(self, workshop: Workshop, batch: dict[str, Any], cursor: int) -> Tensor:
        labels = cast("Tensor", batch["labels"])
        if self.estimator in ("empirical", "batch"):
            return labels
        logits = workshop.logits(batch).float().cpu()
        if logits.dim() != 2:
            raise ConfigError(
                f"estimator: got {self.estimator!r}, which asks the model for a class, and this "
                "task is text; use estimator='empirical'"
            )
        if self.estimator == "predicted":
            return logits.argmax(-1).to(labels)
        # By row where rows have numbers, so that their order does not matter.
        numbers = batch.get("row", torch.arange(len(labels)) + 2**20 * cursor).tolist()
        drawn = [
            torch.multinomial(p, 1, generator=workshop.rng(f"fisher-{number}"))
            for p, number in zip(logits.softmax(-1), numbers, strict=True)
        ]
        return torch.cat(drawn).to(labels)


@contextmanager
def measured(adapter: Adapter, space: str, head: bool) -> Iterator[dict[str, tuple[Any, bool]]]:
    """Yield by name what to differentiate by, and whether it is stored transposed.

    In the space "weights" these are the base weights, which take gradients inside: y depends on W
    as it does on s B δ A.
    """
    factors = held_parameters(adapter, space, head)
    places: dict[str, tuple[Any, bool]] = {name: (p, False) for name, p in factors.items()}
    views = [cast("View", layer) for layer in adapter.layers] if space == "weights" else []
    bases = [view.module.dense_weight() for view in views]
    modes = [base.requires_grad for base in bases]
    for view, base in zip(views, bases, strict=True):
        places[view.site.path] = (base, view.module.transposed)
    try:
        for base in bases:
            base.requires_grad_(True)
        yield places
    finally:
        for base, mode in zip(bases, modes, strict=True):
            base.requires_grad_(mode)


def places_of(adapter: Adapter, space: str, head: bool) -> dict[str, Tensor]:
    """Return by name what is held to anchors, differentiable: the same names as `measured`."""
    found: dict[str, Tensor] = dict(held_parameters(adapter, space, head))
    if space == "weights":
        found |= {layer.site.path: effective_weight(layer) for layer in adapter.layers}
    return found


class Estimate(Aside):
    """Estimates the Fisher information when a task is trained, and keeps it with its anchor.

    Args:
        step: the estimator.
        name: the strategy, as which it remembers.
        decay: γ of the running sum, or None to keep every task's term.
        normalised: whether a task's F is brought to mean 1 over all that is held.
    """

    def __init__(
        self, step: FisherStep, name: str, decay: float | None, *, normalised: bool
    ) -> None:
        self.step, self.name, self.decay, self.normalised = step, name, decay, normalised

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Job | None:
        """Return the estimation until it is done."""
        return None if state.get("fisher") else Job(name="fisher", step=self.step)

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Keep F and θ* = what the task ended with."""
        step, memory = self.step, Quadratic(workshop.memory(self.name))
        count = state["cursor"] if step.estimator == "batch" else state["rows"]
        with torch.no_grad():
            now = places_of(workshop.adapter, step.space, step.head)
            squares = state.pop("squares")
            if self.normalised:
                total = sum(float(square.double().sum()) for square in squares.values())
                count = total / sum(square.numel() for square in squares.values()) or count
            for name, square in squares.items():
                memory.add(name, square.to(now[name].device) / count, now[name], self.decay)
