"""Ranks selected by static gates: their optimiser, their penalty, and thresholds in stages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyrank.errors import ConfigError, nearest
from polyrank.frame import (
    Adapter,
    Boundary,
    Figure,
    Job,
    Penalty,
    Phase,
    Rule,
    Saved,
    Step,
    Workshop,
)
from polyrank.parts.gates import gathered, kept_ranks, static_gates
from polyrank.parts.optimizer import register_update
from polyrank.parts.transforms import of_replica, plain_lora

if TYPE_CHECKING:
    from polyrank.layers import View

SCHEDULES = ("none", "linear", "log_linear", "exp_linear")
STAGE = "stage-"
_log = logging.getLogger(__name__)


def thresholds(kind: str, first: float, last: float, stages: int) -> list[float]:
    """Return the thresholds of all stages, from first to last; the first one alone for "none".

    With points evenly spaced between f(first) and f(last), each is f⁻¹ of its point: f is the
    identity for "linear", exp for "log_linear", and log for "exp_linear", a geometric sequence.
    """
    if kind == "none" or stages == 1:
        return [first]
    shares = [index / (stages - 1) for index in range(stages)]
    if kind == "linear":
        return [first + (last - first) * share for share in shares]
    if kind == "exp_linear":
        return [first * (last / first) ** share for share in shares]
    # log(e^a + (e^b − e^a) t) without the digits that are lost beside e^0 = 1.
    return [first + math.log1p(math.expm1(last - first) * share) for share in shares]


def stage_of(step: Step) -> int:
    """Return the number in the name of the phase, stage-2; any other name is stage 0."""
    number = step.phase.removeprefix(STAGE)
    return int(number) if number.isdecimal() and step.phase != number else 0


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The threshold κ of an update, from its stage.

    Args:
        schedule: one of `SCHEDULES`, or the thresholds themselves.
        first: of the first stage, unless listed.
        last: of the last one.
        stages: how many there are.
        scale: "constant", or "rate": times the present rate over the highest.
    """

    schedule: str | Sequence[float]
    first: float
    last: float
    stages: int
    scale: str = "constant"

    def problems(self) -> Iterator[str]:
        """Say why thresholds are none, or fall."""
        kind = self.schedule
        if isinstance(kind, str) and kind not in SCHEDULES:
            guess = nearest(kind, SCHEDULES) or " or give a list of thresholds"
            yield f"schedule: got {kind!r}, expected one of {', '.join(SCHEDULES)};{guess}"
        elif not isinstance(kind, str):
            yield from self._listed(kind)
        elif kind != "none" and self.last < self.first:
            yield (
                f"xi_max: got {self.last}, expected at least xi={self.first} with schedule "
                f"{kind!r}: from stage to stage fewer ranks are kept; raise xi_max"
            )
        if kind == "exp_linear" and self.first == 0:
            yield "xi: got 0, expected > 0 with schedule 'exp_linear', which multiplies; use 1e-5"

    def _listed(self, kind: Any) -> Iterator[str]:
        numbers = isinstance(kind, (list, tuple)) and all(
            isinstance(xi, Real) and not isinstance(xi, bool) for xi in kind
        )
        if not numbers or not kind or not all(0 <= xi < math.inf for xi in kind):
            yield (
                f"schedule: got {kind!r}, expected a word or a list of finite numbers >= 0; "
                "for example [0, 1e-4, 2e-4]"
            )
        elif any(after < before for before, after in pairwise(kind)):
            yield f"schedule: got {list(kind)}, expected numbers that do not fall; sort them"

    def values(self) -> list[float]:
        """Return the thresholds of all stages."""
        if isinstance(self.schedule, str):
            return thresholds(self.schedule, self.first, self.last, self.stages)
        return list(self.schedule)

    def __call__(self, step: Step) -> float:
        """Return κ of an update; past the last stage it stays."""
        values = self.values()
        level = values[min(stage_of(step), len(values) - 1)]
        if self.scale == "constant":
            return level
        return level * step.lr / step.peak if step.peak else 0.0


@register_update("adam-gate")
class AdamGate(Optimizer):
    """Adam whose ε enters before v is corrected, for gates; no decay.

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,
    p ← p − lr √(1 − β2ᵗ)/(1 − β1ᵗ) · m / (√v + ε).

    ε is then divided by √(1 − β2ᵗ), 32 times larger than in torch's Adam at t = 1: a gradient of
    1e-6 moves less. t counts the updates in which a parameter had a gradient.

    Raises:
        ConfigError: for a group with weight decay.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.999), "eps": 1e-6})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, undecayed ones."""
        if param_group.get("weight_decay"):
            raise ConfigError(
                f"adam-gate: got weight decay {param_group['weight_decay']}, expected 0, as decay "
                "would pull gates to zero whatever the data say; give gates a group of their own"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters that have a gradient, a few calls a group."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(params, group)
        return loss

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for param, state in zip(params, states, strict=True):
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
        (one, two), grads = group["betas"], [p.grad for p in params if p.grad is not None]
        m, v = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(m, grads, 1 - one)
        torch._foreach_mul_(v, two)
        torch._foreach_addcmul_(v, grads, grads, 1 - two)
        below = torch._foreach_sqrt(v)
        torch._foreach_add_(below, group["eps"])
        times = [state["step"] for state in states]
        sizes = [-float(group["lr"]) * math.sqrt(1 - two**t) / (1 - one**t) for t in times]
        torch._foreach_addcdiv_(params, m, below, sizes)


class GateNorm(Penalty):
    """weight · mean |g| over the gates of all layers together, with subgradient 0 at 0."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Collect the gates."""
        self.gates: list[Tensor] = [gate for _, gate in static_gates(adapter)]

    def __call__(self, adapter: Adapter, step: Step) -> Tensor:
        """Return the mean."""
        return torch.cat(gathered(self.gates)).abs().mean()


class Still(Rule):
    """Sets all rates of the later stages to 0, so that nothing moves but what a rule shrinks."""

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Remember the optimiser."""
        self.optimizer = optimizer

    def begin(self, step: Step) -> None:
        """Undo what the schedule has set."""
        if stage_of(step):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0


class Recorded(Boundary):
    """One phase a task, with a record of the kept ranks; exports what is kept as a plain LoRA.

    Args:
        name: of the method, under which the record is remembered.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def record(self, task: Any, workshop: Workshop, stage: str = "") -> None:
        """Remember the kept ranks of all layers under the task and the stage."""
        column = " ".join(filter(None, ("all tasks" if task is None else task.name, stage)))
        kept = kept_ranks(workshop.adapter)
        workshop.memory(self.name)[column] = torch.tensor(list(kept.values()))

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Record what the task has left."""
        self.record(task, workshop)

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return the kept ranks, and those of replicas that are stages, under their names.

        Nothing if some of the update is in the base alone.
        """
        views = [cast("View", layer) for layer in workshop.adapter.layers]
        if any(view.witness is not None and view.archive is None for view in views):
            _log.warning(
                "%s: nothing is exported, since updates were absorbed and not archived", self.name
            )
            return {}
        saved = workshop.saved()
        replicas = {name for v in saved.config["sites"].values() for name in v.get("replicas", ())}
        stages = sorted(name for name in replicas if name.startswith(STAGE))
        found = {name: plain_lora(of_replica(saved, name)) for name in stages}
        return {"pruned": plain_lora(saved), **found}

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return the kept ranks by layer, and by task and stage."""
        record = workshop.memory(self.name)
        if not record:
            return []
        counts = torch.stack(list(record.values()), dim=1).tolist()
        return [
            Figure(
                name="kept-ranks",
                title="Ranks that are kept",
                rows=tuple(kept_ranks(workshop.adapter)),
                columns=tuple(record),
                values=tuple(tuple(map(float, row)) for row in counts),
                unit="ranks",
                note="Gates that are not zero at the end of a task, or of one of its stages.",
            )
        ]


class Stages(Recorded):
    """A phase for every threshold, each with its own schedule of rates, one after the other.

    The adapter of every stage but the last stays as a replica, `stage-0` and so on, and is
    evaluated like the live one; the next task writes over it.

    Args:
        name: of the method.
        stages: how many, at least 2.
        steps: updates of a later stage, 0 for those of the run.
        check_every: updates between two looks at validation rows in the first stage, whose best
            state then goes on; 0 for its last.
        roles: what trains in later stages, None for all.
    """

    replicates = True

    def __init__(
        self, name: str, stages: int, *, steps: int, check_every: int, roles: Sequence[str] | None
    ) -> None:
        super().__init__(name)
        self.stages, self.steps, self.check_every = stages, steps, check_every
        self.roles = None if roles is None else frozenset(roles)

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Phase | Job | None:
        """Return the next stage, or the job that keeps the one before."""
        begun, kept = state.setdefault("begun", 0), state.setdefault("kept", 0)
        if kept < begun:
            return Job(name=f"keep-{kept}", step=lambda shop, held: self._keep(task, shop, held))
        if begun == self.stages:
            return None
        state["begun"] = begun + 1
        place = (begun + 1, self.stages)
        if begun:
            return Phase(name=f"{STAGE}{begun}", steps=self.steps, train=self.roles, place=place)
        keep = "best" if self.check_every else "last"
        return Phase(name=f"{STAGE}0", check_every=self.check_every, keep=keep, place=place)

    def _keep(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> bool:
        name = f"{STAGE}{state['kept']}"
        self.record(task, workshop, name)
        if state["begun"] < self.stages:
            workshop.replica(name)
        state["kept"] += 1
        return True

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Do nothing: all stages are recorded."""

    def deploys(self, workshop: Workshop) -> dict[str, AbstractContextManager[Any]]:
        """Return the live adapter, the last stage, and those before it."""
        earlier = [f"{STAGE}{number}" for number in range(self.stages - 1)]
        return {"": nullcontext(), **{name: workshop.view(name) for name in earlier}}
