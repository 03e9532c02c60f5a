"""Adapters as values: read from disk, transformed, generated; no model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor


@dataclass(kw_only=True)
class Saved:
    """An adapter on disk.

    Tensors in PEFT's layout, the config that decides their shapes, and a plan of what was cut.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    plan: dict[str, Any] = field(default_factory=dict)


class Transform(Protocol):
    """Adapters to adapter: squeeze, truncate, prune, recover."""

    def __call__(self, *adapters: Saved, base: Mapping[str, Tensor] | None = None) -> Saved:
        """Return a new adapter and leave its inputs as they are."""


class Generator(Protocol):
    """Descriptions to adapters."""

    def fit(self, library: Sequence[Saved], conditions: Tensor, state: dict[str, Any]) -> bool:
        """Do one step of fitting; True once done (the body of a Job)."""

    def sample(self, condition: Tensor, n: int, seed: int | None) -> list[Saved]:
        """Return n adapters; seed None gives the mean."""
