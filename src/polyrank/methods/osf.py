"""OSF: the large singular directions of every weight are frozen, the rest is trained off them.

Idea: what a weight does strongly is what the model knows; learn where it does little, and split the
    weight anew, with more to protect, after each task.
Maths: W = U diag(S) V;  y = W x + b + U_l diag(S_l) V_l x − U_0 diag(S_0) V_0 x: the tail of m − k
    triplets, m = min(d_out, d_in), trained from its start. P ← P − Q QᵀP, Q the k frozen vectors of
    that side, for the gradients of U_l, V_lᵀ before clipping and for what U_l, V_lᵀ have moved
    after the step, so that U_hᵀ ΔW = 0 and ΔW V_hᵀ = 0 whatever the optimiser. k in task t:
    "fixed" effective_rank or m (1 − unfreeze_rank_ratio); "progressive" (t − 1) m / n of n tasks;
    "rising" ⌊rise · t m⌋; "adaptive" round(m (mrr + Ĩ (trr − mrr))), Ĩ = I / mean I, I the mean
    cosine of the first m coordinates of x and y − b on rows of the task before, for the first task
    trr; >= 1. A rank from rank_pattern stays through all tasks.
    After a task W ← W + ΔW. "core": W + U_0 R V_0, R (r, r) free and nothing to project: for a
    square W the same weights, otherwise those within its range, or all with reach="all". "block":
    W + D, G ← G − U_h U_hᵀ G V_hᵀ V_h, the printed formula, under which D mixes high with low.
Source: arXiv:2504.07097, and what PEFT ("osf") and mini_trainer run.
Differs from the released code: k is a layer's own; parameters are projected too, or 9 to 27 % of
    ‖ΔW‖ leaks in 20 steps of AdamW at rates of 1e-3 to 1e-1 on two weights of 12 × 12
    (`reproject=False`, PEFT); clipping sees what is applied; no hooks, which copies lose. In the
    research code factors get no gradient: its accuracies are no target. Its "rising" counts the
    larger width (`released=True`). The run's decay would shrink the pretrained tail, not the
    update, and leaves factors alone unless `decayed`.
Limits: nothing makes what a task learnt large enough for the next k (pictures protected-*), unless
    `nested`, which decomposes twice. Dense fp32 bases, or `lossy`; weights that no other module
    reads. W is never materialised in a forward. After merge_adapter and unmerge_adapter W is what
    it was up to rounding: keep a copy. In one's own loop `polyrank.end_task(model, task)` ends a
    task, and a new optimiser begins the next. Cost: r (d_in + d_out + 1) weights and
    as many kept; 4 r (d_in + d_out) operations a token, and in bf16 the differences of factors,
    taken in fp32 so that small updates are seen; 4 k r (d_in + d_out) for each of two projections
    an update; a decomposition a layer and task, the last one too; archived m (d_in + d_out).
Status: every property tested; published figures not verified. 3 seeds (bench/results/
    streams-digits.md, streams-stdlib-ranks.md), accuracy and forgetting among a task's own classes:
    digits at rate 1e-3 .89 and .05, "core" .89 and .09, `full` .69 and .40, LoRA of rank 8 .74 and
    .32; the base's own classes lose .05, .13, .62 and .33. stdlib at 3e-4 .84 and .03, `full` .79
    and .08. Where all classes compete it forgets as they do; "progressive" helps on stdlib (.24 and
    .44; others .17 and .83), not on digits. "adaptive" finds a mean importance near 0 on digits, so
    that layers are frozen whole or not at all, or it refuses. Of what a task learnt, the next
    splits protect 71 to 91 % on digits, but 17 to 36 % on stdlib (seed 0): less than of a random
    direction, half.
    On one H100 (torch 2.11, bf16, 112 layers of a 1.2 B Llama, bench/osf_step.py): set-up 9.3 s;
    "gesvdj" takes 19.7 s, with vectors that cross by 1.6e-3. A step of 8 × 1024 tokens takes 397 ms
    (rules and optimiser 126), with "tf32" 325 (52), "core" 203 (4), `full` 165 (9). The leak after
    15 updates at rate 1e-4 was 1.3e-5, 5.6e-3 and 2.5e-8, after 200 in fp32 5.9e-6: rounding of
    stored factors as large as the tail, and of TF32 products. "fp32" is the default for that. These
    are from before projections and bf16 forwards took what has moved alone; TF32 emulated on a CPU
    (512 × 512, 15 such updates) leaks 5.4e-3 that way and 1.0e-4 now, fp32 3.9e-6 and 4.7e-7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from polyrank.frame import Adapter, Boundary, Core, Group, Init, Method, Rule, Site, register
from polyrank.parts.projection import PRECISIONS, Project
from polyrank.parts.resplit import UNSURE, Resplit
from polyrank.parts.retention import SCHEDULES, Retention, share_problems, unread_problems
from polyrank.parts.subspaces import (
    MOVING,
    NESTED,
    REACHES,
    TRAINED,
    SpectralStart,
    core_of,
    moved,
    trained_of,
)


@register
@dataclass(frozen=True, kw_only=True)
class OSF(Method):
    """Orthogonal subspace fine-tuning; `r` and `alpha` mean nothing here.

    Args:
        schedule: "fixed", "progressive", "rising" or "adaptive".
        effective_rank: of "fixed", k as an integer >= 1 or k / m in (0, 1]; 1.0 trains only what
            rank_pattern names, and a run, which has none, refuses it; None is 0.5.
        unfreeze_rank_ratio: the same said as the free share, in (0, 1); None leaves it out.
        tasks: n of "progressive".
        rise: share that "rising" adds for each task, > 0.
        mrr: least retained ratio of "adaptive", 0 <= mrr <= trr.
        trr: target ratio, <= 1.
        rows: that importance is measured on, >= 1.
        unsure: where the mean importance is not positive, "refuse", or retain trr: "uniform".
        parametrisation: "factors", "core" or "block".
        reach: of "core", "range" or "all".
        precision: of the projections, "fp32" or "tf32".
        reproject: whether parameters are projected after each step.
        nested: whether what was protected once stays so, and directions of the update join it.
        released: "rising" counts the larger width, as released.
        decayed: whether the run's weight decay acts on factors, so that the tail itself fades.
        lossy: whether a base below fp32 may round a part of every update away.
        archive: whether a saved adapter fits the original base too.
    """

    scaling: str | float = 1.0
    schedule: str = "fixed"
    effective_rank: int | float | None = None
    unfreeze_rank_ratio: float | None = None
    tasks: int = 0
    rise: float = 0.07
    mrr: float = 0.1
    trr: float = 0.8
    rows: int = 128
    unsure: str = "refuse"
    parametrisation: str = "factors"
    reach: str = "range"
    precision: str = "fp32"
    reproject: bool = True
    nested: bool = False
    released: bool = False
    decayed: bool = False
    lossy: bool = False
    archive: bool = True

    sized: ClassVar[bool] = False
    choices: ClassVar = {
        "schedule": SCHEDULES, "unsure": UNSURE, "precision": PRECISIONS, "reach": REACHES,
        "parametrisation": tuple(TRAINED),
    }  # fmt: skip
    least: ClassVar = {"rows": 1, "mrr": 0}
    presets: ClassVar = {
        "paper": {"schedule": "adaptive", "mrr": 0.1, "trr": 0.8},
        "peft": {"effective_rank": 0.5, "reproject": False},
        "trace": {"unfreeze_rank_ratio": 0.25},
        "t5": {"schedule": "rising", "rise": 0.07, "released": True},
    }

    def __post_init__(self) -> None:
        asks = {"passes"} if self.schedule == "adaptive" else set()
        object.__setattr__(self, "needs", frozenset({"boundary", *asks}))
        roles = TRAINED.get(str(self.parametrisation), frozenset())
        object.__setattr__(self, "trains", roles | {"side", "head"})

    def problems(self) -> Iterator[str]:
        """Check shares, and what would make the start another model."""
        yield from share_problems(self.schedule, self.effective_rank, self.unfreeze_rank_ratio)
        if (self.schedule == "progressive") != (self.tasks >= 1):
            yield f"tasks: got {self.tasks}, expected >= 1 with 'progressive', 0 with the others"
        if not self.mrr <= self.trr <= 1:
            yield f"trr: got {self.trr} with mrr={self.mrr}, expected mrr <= trr <= 1"
        if not self.rise > 0:
            yield f"rise: got {self.rise}, expected > 0; 0.07 is what ran on T5"
        if self.nested and self.parametrisation != "factors":
            yield f"nested: got true with {self.parametrisation!r}, expected 'factors'; drop one"
        yield from unread_problems(self, scaling=1.0)

    def too_long(self, tasks: int) -> Iterator[str]:
        """Refuse streams some tasks of which would train nothing."""
        yield from self.retention().frozen(tasks)

    def groups(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Leave the tail out of decay, unless it is asked for."""
        found = super().groups(adapter, args)
        if self.decayed or self.parametrisation != "factors":
            return found
        own = {id(p) for role in ("A", "B") for p in adapter.roles().get(role, ())}
        kept: list[Group] = []
        for group in found:
            tail = [p for p in group.params if id(p) in own]
            rest = [p for p in group.params if id(p) not in own]
            kept += [replace(group, params=rest)] if rest else []
            kept += [replace(group, params=tail, weight_decay=0.0)] if tail else []
        return kept

    def retention(self) -> Retention:
        """Return how much is retained, and when."""
        free, share = self.unfreeze_rank_ratio, self.effective_rank
        share = 0.5 if share is None else share
        return Retention(
            schedule=self.schedule, share=share if free is None else 1 - free,
            capped=free is not None, tasks=self.tasks, rise=self.rise, longer=self.released,
            mrr=self.mrr, trr=self.trr,
        )  # fmt: skip

    def ranks(self, site: Site) -> int:
        """Return what is free in the first task."""
        return min(site.d_in, site.d_out) - self.retention().rank(site, 0)

    def core(self, site: Site) -> Core:
        """Return S_l, R or what reads D."""
        core = core_of(self.parametrisation, site, self.reach, both=self.nested)
        if self.nested or self.schedule != "fixed":
            core.unabsorbed = NESTED if self.nested else MOVING
        return core

    def init(self) -> Init:
        """Start from the weight."""
        return SpectralStart()

    def rules(self) -> list[Rule]:
        """Project; within a core nothing needs it."""
        within = self.parametrisation == "core"
        return [] if within else [Project(self.precision, after=self.reproject)]

    def boundary(self) -> Boundary:
        """Absorb and split anew."""
        return Resplit(
            self.name, self.retention(), rows=self.rows, unsure=self.unsure, lossy=self.lossy,
            archive=self.archive, nested=self.nested,
        )  # fmt: skip

    def parameters_per_site(self, site: Site) -> int:
        """r (d_in + d_out + 1), r², (d_out − k)(d_in − k), or all."""
        return trained_of(self.parametrisation, site, self.reach)

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the mean norm of what has moved: of U_l, R or D."""
        factors = self.parametrisation == "factors"
        return super().vital_sign(adapter) if factors else {"moved": moved(adapter)}

    @classmethod
    def samples(cls) -> list[Method]:
        """Trained factors; a trained core of the whole reach."""
        return [
            cls(effective_rank=0.5),
            cls(parametrisation="core", reach="all", schedule="adaptive", trr=0.5),
        ]
