"""How much of each weight a task may change, and when."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyrank.errors import RunError
from polyrank.frame import Method, Site

SCHEDULES = ("fixed", "progressive", "rising", "adaptive")


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The frozen rank k of a matrix with m singular values in task t, from 0; always 1 <= k <= m.

    "fixed": k itself, or ⌊share · m⌋; "progressive": ⌊t m / tasks⌋; "rising": ⌊rise (t + 1) m⌋, or
    of the larger width; "adaptive": round(ratio · m), the ratio a layer's own.

    Attributes:
        share: k as an int, or k / m.
        capped: whether at least one direction stays free.
        tasks: of the whole stream.
        mrr, trr: the least and the target ratio, 0 <= mrr <= trr <= 1.
        longer: whether "rising" counts the larger width.
    """

    schedule: str
    share: float | int = 0.5
    capped: bool = False
    tasks: int = 0
    rise: float = 0.0
    longer: bool = False
    mrr: float = 0.1
    trr: float = 0.8

    def rank(self, site: Site, task: int, ratio: float | None = None) -> int:
        """Return k; `ratio` is the layer's own, None where nothing was measured: then trr."""
        m = min(site.d_in, site.d_out)
        if self.schedule == "fixed":
            whole = isinstance(self.share, numbers.Integral)
            k = int(self.share) if whole else _floor(self.share * m)
        elif self.schedule == "progressive":
            # Behind the last task another split is made, which nobody trains.
            k = min(task, self.tasks - 1) * m // self.tasks
        elif self.schedule == "rising":
            width = max(site.d_in, site.d_out) if self.longer else m
            k = _floor(self.rise * (task + 1) * width)
        else:
            k = round((self.trr if ratio is None else ratio) * m)
        return max(1, min(k, m - self.capped))

    def frozen(self, tasks: int) -> Iterator[str]:
        """Say which of so many tasks would find nothing free, whatever the model."""
        whole = isinstance(self.share, numbers.Integral)
        if self.schedule == "progressive" and tasks > self.tasks:
            yield (
                f"tasks: got {self.tasks}, and {tasks} tasks come, of which the last find all "
                "directions frozen; give the length of the whole stream"
            )
        elif self.schedule == "rising" and self.rise * tasks > 1 - 1e-9:
            yield (
                f"rise: got {self.rise:g}, with which task {math.ceil(1 / self.rise - 1e-9)} of "
                f"{tasks} finds all directions frozen; use less than {1 / tasks:.3g}"
            )
        elif self.schedule == "adaptive" and self.trr == 1:
            yield "trr: got 1, with which the first task finds all directions frozen; use 0.8"
        elif self.schedule == "fixed" and not whole and not self.capped and self.share == 1:
            yield "effective_rank: got 1.0, which freezes all directions; use 0.5"

    def ratios(self, importance: Mapping[str, float]) -> dict[str, float]:
        """Return mrr + Ĩ (trr − mrr) by layer, Ĩ = I / (mean I + 1e-8), whose mean is trr.

        Raises:
            RunError: if the mean is not positive, so that Ĩ would turn over or explode.
        """
        mean = math.fsum(importance.values()) / len(importance)
        if not (math.isfinite(mean) and mean > 0):
            raise RunError(
                f"importance: its mean over {len(importance)} layers is {mean:.3g}, expected a "
                "number > 0 to divide by; go on with unsure='uniform', which retains trr "
                "everywhere then, or with another schedule"
            )
        gain = self.trr - self.mrr
        return {path: self.mrr + I / (mean + 1e-8) * gain for path, I in importance.items()}


def share_problems(schedule: str, share: Any, free: Any) -> Iterator[str]:
    """Say what is wrong with a frozen share (or rank) and a free share, both of "fixed"."""
    whole = isinstance(share, numbers.Integral) and not isinstance(share, bool)
    if share is not None and not (whole and share >= 1) and not _part(share):
        yield (
            f"effective_rank: got {share!r}, expected an integer >= 1 or a share in (0, 1]; "
            "to freeze nothing use the method 'full'"
        )
    if free is not None and (not _part(free) or free == 1):
        yield f"unfreeze_rank_ratio: got {free!r}, expected a share in (0, 1); 0.25 is common"
    if share is not None and free is not None:
        yield "effective_rank: given beside unfreeze_rank_ratio, which says the same; drop one"
    if schedule != "fixed" and (share is not None or free is not None):
        yield f"effective_rank: got it with schedule={schedule!r}; it is read by 'fixed'"


def unread_problems(method: Method, **only: Any) -> Iterator[str]:
    """Refuse options that mean nothing where weights themselves train."""
    for name, value in {"r": Method.r, "alpha": Method.alpha, "dropout": 0.0, **only}.items():
        if (got := getattr(method, name)) != value:
            yield (
                f"{name}: got {got!r}, expected {value!r}, since {method.name!r} trains weights "
                "themselves and does not read it; leave it out"
            )


def _part(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral))
    return real and 0 < value <= 1


def _floor(value: float) -> int:
    """Return the integer below, forgiving what rounding took away from a whole number."""
    return math.floor(value + 1e-9)
