"""How long and how fast each task is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from polyrank.errors import ConfigError, nearest

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Training of one task; the same for every system of a run, so that they can be compared.

    Args:
        epochs: passes over a task's training rows, >= 1.
        batch_size: rows per update on each device, >= 1.
        lr: peak learning rate, > 0.
        weight_decay: decoupled decay of factors and head, >= 0; gates are never decayed.
        schedule: "constant", "linear" or "cosine" over each task.
        warmup: share of a task's updates over which the rate rises, in [0, 1).
        max_grad_norm: gradients are clipped to this norm, > 0.
        accumulation: micro-batches per update, >= 1.
        eval_batch_size: rows per evaluation forward, >= 1.
    """

    epochs: int = 15
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    accumulation: int = 1
    eval_batch_size: int = 256

    def problems(self) -> Iterator[str]:
        """Yield one sentence per value out of range."""
        for name in ("epochs", "batch_size", "accumulation", "eval_batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield f"{name}: got {value!r}, expected an integer >= 1"
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("max_grad_norm", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low < value < high:
                yield f"{name}: got {value!r}, expected a finite number > 0"
        if not isinstance(self.weight_decay, (int, float)) or not 0 <= self.weight_decay < math.inf:
            yield f"weight_decay: got {self.weight_decay!r}, expected a number >= 0"
        if not isinstance(self.warmup, (int, float)) or not 0 <= self.warmup < 1:
            yield f"warmup: got {self.warmup!r}, expected a share in [0, 1)"
        if self.schedule not in SCHEDULES:
            yield (
                f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)};"
                f"{nearest(str(self.schedule), SCHEDULES) or ' choose one'}"
            )

    @classmethod
    def build(cls, values: dict[str, Any]) -> Settings:
        """Make settings from plain values.

        Raises:
            ConfigError: naming every unknown name and every value out of range.
        """
        known = {spec.name for spec in fields(cls)}
        problems = [
            f"train: unknown setting {key!r}, expected one of {', '.join(sorted(known))};"
            f"{nearest(key, known) or ' choose one'}"
            for key in values
            if key not in known
        ]
        made = cls(**{key: value for key, value in values.items() if key in known})
        problems += [f"train: {problem}" for problem in made.problems()]
        if problems:
            raise ConfigError(problems)
        return made
