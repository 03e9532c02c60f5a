"""A replica that follows the weights that train."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyrank.frame import ORDER, Adapter, Rule, Step, Workshop
from polyrank.parts.boundaries import Aside


class Ema(Rule):
    """slow ← λ_k slow + (1 − λ_k) live after every update k = 1, 2, … of the run.

    λ_k = min(1 − 1/(k + 1), λ) with `ramp`, which is the mean of all values so far until λ is
    reached; λ without. All tensors that may train are averaged, none of the slow ones ever trains.

    Args:
        replica: the slow one's name, which also names the memory of k.
        decay: λ in [0, 1].
        ramp: whether λ_k rises to λ.
    """

    order = ORDER["average"]
    # The mean of two factorings of one product is no factoring of it.
    expects = frozenset({"factoring"})

    def __init__(self, replica: str, decay: float, ramp: bool) -> None:
        self.replica, self.decay, self.ramp = replica, decay, ramp
        self.memory: dict[str, Any] = {}

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Pair slow and live tensors.

        Raises:
            ConfigError: if the replica is missing, or its shapes are not those of today.
        """
        if workshop is not None:
            self.memory = workshop.memory(self.replica)
        pairs = adapter.pairs(self.replica)
        self.slow = [slow for slow, _ in pairs]
        self.live: list[Tensor] = [live for _, live in pairs]

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """Move all slow tensors in one call."""
        k = self.memory["updates"] = self.memory.get("updates", 0) + 1
        decay = min(1 - 1 / (k + 1), self.decay) if self.ramp else self.decay
        torch._foreach_lerp_(self.slow, self.live, 1 - decay)

    def state(self) -> dict[str, Tensor | float | int | str]:
        """Return k; the slow tensors are the model's."""
        return {"updates": self.memory.get("updates", 0)}

    def restore(self, state: Mapping[str, Tensor | float | int | str]) -> None:
        """Take k back."""
        self.memory["updates"] = int(state["updates"])


class Follow(Aside):
    """Makes the slow replica in the first task, and lets its head grow with the live one.

    Args:
        replica: its name.
        restart: whether every later task begins from the slow weights.
        first: which of "slow" and "fast" stands for the system.
    """

    def __init__(self, replica: str, restart: bool, first: str) -> None:
        self.replica, self.restart, self.first = replica, restart, first

    @torch.no_grad()
    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Copy the live weights, or carry on with those of the last task."""
        if workshop.first:
            workshop.replica(self.replica)
            return
        workshop.extend(self.replica)
        if self.restart:
            for slow, live in workshop.adapter.pairs(self.replica):
                live.copy_(slow)

    def deploys(self, workshop: Workshop) -> dict[str, AbstractContextManager[Any]]:
        """Evaluate both, the chosen one first."""
        found: dict[str, AbstractContextManager[Any]] = {
            "slow": workshop.view(self.replica),
            "fast": nullcontext(),
        }
        return {name: found[name] for name in sorted(found, key=lambda name: name != self.first)}
