"""DyLoRA: one training gives a LoRA of every rank.

Idea: train truncated to a randomly drawn number of ranks, so that they order themselves by use, as
    in nested dropout; whoever needs another rank cuts the adapter and does not train.
Maths: y = W x + bias + s(b) B_1:b A_1:b x with the first b rows of A and columns of B, s(b) = alpha
    / b; one b an update, uniform or ∝ p (1 − p)^(b − r_min) on r_min..r_max. "full": all b ranks
    learn; "frozen": rank b alone, with the same y and the same gradient to x.
Source: arXiv:2210.07558, and the released code, commit bb44348.
Differs from the released code: "full" and geometric draws, as in the paper; only what was drawn
    moves, moments and step counts included (`update="gradient"` is theirs: gradients of zero, and
    AdamW moves all ranks by momentum and decay); b is keyed by the update, not drawn by each
    process; a rank out of bounds, or set while merged, is refused; A starts as theirs.
Limits: linear layers; one rank for all. s(b) weakens earlier ranks as b grows: an update of rank
    k > 1 is exact at b = r only, unless `scaling` is a number. Gradients that gem, agem and ewc ask
    for are those of the set rank, not the drawn one. Cost: as LoRA, products of the first b only.
Status: properties tested; published figures not verified. Digits, tasks at once, 8 ranks, equal
    updates, 3 seeds (bench/ranks.py): .55 .79 .85 .86 at 1 2 4 8 ranks, a LoRA of 8 ranks cut .44
    .53 .74 .91, LoRAs trained at each .85 .85 .90 .91; "frozen" has learned too little by then, .57
    to .61. Task by task it forgets as sequential LoRA does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from polyrank.frame import Adapter, Boundary, Core, Group, Method, Rule, Site, register
from polyrank.parts import nested, prefix, rows


@register
@dataclass(frozen=True, kw_only=True)
class DyLoRA(Method):
    """Dynamic search-free low-rank adaptation.

    Args:
        r_min: smallest rank that is drawn, >= 1.
        r_max: largest rank that is drawn, <= r; 0 for r.
        distribution: "uniform" or "geometric", which draws small ranks more often.
        p: of the geometric distribution, in (0, 1).
        mode: "full", or "frozen": only the last rank of the drawn ones learns.
        update: "strict", where AdamW moves what learns and nothing else; "gradient", where any
            optimiser sees gradients of zero for the rest.
        evaluate: ranks that are evaluated beside r_max; none for powers of two.
        exports: ranks that a run writes as plain LoRAs.
    """

    r_min: int = 1
    r_max: int = 0
    distribution: str = "uniform"
    p: float = 0.15
    mode: str = "full"
    update: str = "strict"
    evaluate: tuple[int, ...] = ()
    exports: tuple[int, ...] = ()

    otherwise = ', or use update="gradient", which any optimiser serves'
    choices: ClassVar = {
        "distribution": ("uniform", "geometric"), "mode": ("full", "frozen"),
        "update": ("strict", "gradient"),
    }  # fmt: skip
    least: ClassVar = {"r_min": 1, "r_max": 0}
    presets: ClassVar = {
        "paper": {"r": 8, "alpha": 16.0, "mode": "full", "update": "strict"},
        "glue": {"r": 8, "alpha": 16.0, "mode": "frozen", "update": "gradient"},
    }

    def __post_init__(self) -> None:
        for name in ("evaluate", "exports"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    @property
    def top(self) -> int:
        """The largest rank."""
        return self.r_max or self.r

    def problems(self) -> Iterator[str]:
        """Check the bounds, the distribution and the lists of ranks."""
        if self.r_max > self.r:
            yield f"r_max: got {self.r_max}, expected <= r={self.r}; raise r, or use 0 for r"
        if self.top < self.r_min:
            yield f"r_min: got {self.r_min}, expected <= r_max={self.top}; 1 draws all ranks"
        if not 0 < self.p < 1:
            yield f"p: got {self.p}, expected 0 < p < 1; 0.15 is the paper's"
        for name in ("evaluate", "exports"):
            if not prefix.ranks_fit(ranks := getattr(self, name), self.r_min, self.top):
                bounds = f"{self.r_min}..{self.top}"
                yield f"{name}: got {ranks!r}, expected a list of ranks in {bounds}, or none: []"

    def core(self, site: Site) -> Core:
        """Return the prefix of one layer; one with more ranks than r, or too few, is refused."""
        newest = self.mode == "frozen"
        return prefix.prefix_at(site, self.scale, self.r, self.r_min, self.top, newest=newest)

    def rules(self) -> list[Rule]:
        """Draw a rank for every update."""
        falls = 1 - self.p if self.distribution == "geometric" else 1.0
        return [prefix.Draw([falls**k for k in range(self.top - self.r_min + 1)])]

    def groups(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Give A and B to the optimiser of rows, if updates are strict."""
        strict = self.update == "strict"
        return rows.rows_of(adapter, self.r) if strict else super().groups(adapter, args)

    def boundary(self) -> Boundary:
        """Evaluate several ranks, r_max first, and export some."""
        powers = prefix.powers(self.r_min, self.top)
        return nested.nested(self.top, self.evaluate or powers, self.exports)

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the weight of the first half of the ranks, beside the size of B."""
        return {**super().vital_sign(adapter), "first_half": prefix.first_half(adapter)}

    @classmethod
    def samples(cls) -> list[Method]:
        """Both modes and distributions; the second with bounds of its own, evaluated once."""
        cut = cls(r=5, r_min=2, r_max=4, distribution="geometric", mode="frozen", evaluate=(4,))
        return [cls(r=4), cut]
