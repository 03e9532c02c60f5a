"""A method: options, declared facts, and the makers of its slots."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from polyrank.errors import ConfigError, nearest
from polyrank.frame.block import Block
from polyrank.frame.core import Core
from polyrank.frame.lend import lending_problems, lent
from polyrank.frame.plain import Identity, KaimingZero
from polyrank.frame.site import Site
from polyrank.frame.slots import (
    Adapter,
    Group,
    Head,
    Init,
    Loss,
    Penalty,
    PenaltyRule,
    Rule,
    conflicts,
)
from polyrank.frame.stages import Boundary, Replay

SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha/k", "alpha")


class _Slots:
    """What methods and strategies share: facts, checks, and slots that default to nothing.

    Class facts:
        name: registered name, set by `register`.
        trains: roles whose parameters train.
        merges: "exact", "per-condition" or "never".
        neutral: the model at start equals the base bit for bit.
        needs: what the stream must give: "task_id", "condition", "class_names", "boundary",
            "replay" …
        choices: the values that an option may take, by option.
        least: the smallest value that an option may take, by option.
        presets: named sets of options, such as those of a published experiment, asked for by
            `method(name, preset=word)`; options given beside it win, and those of the result are
            complete, so that nothing saved depends on a preset.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    trains: frozenset[str] = frozenset({"A", "B", "core", "side", "head"})
    merges: str = "exact"
    neutral: bool = True
    needs: frozenset[str] = frozenset()
    choices: ClassVar[Mapping[str, Sequence[str]]] = {}
    least: ClassVar[Mapping[str, float]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def problems(self) -> Iterator[str]:
        """Yield one sentence per wrong option: what, got, expected, what to do."""
        yield from ()

    def checks(self) -> list[str]:
        """Return all problems, the method's own and those of every option's type."""
        found = [*self._types(), *self._ranges()]
        return found + self._own(bool(found))

    def _own(self, mistyped: bool) -> list[str]:
        found = []
        try:
            for problem in self.problems():
                found.append(problem)  # noqa: PERF402 - those before an exception count
        except TypeError:
            # A comparison with an option of the wrong type, which is reported already.
            if not mistyped:
                raise
        return found

    def _specs(self) -> tuple[Field[Any], ...]:
        # Only the classes derived from this one are dataclasses.
        return fields(cast("Any", self))

    def _types(self) -> Iterator[str]:
        for spec in self._specs():
            value, default, declared = getattr(self, spec.name), spec.default, str(spec.type)
            numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
            if value is None and ("None" in declared or "Optional" in declared):
                continue
            if numeric and "str" not in declared:
                whole = isinstance(default, int) and "float" not in declared
                good = isinstance(value, numbers.Integral if whole else numbers.Real)
                if not good or isinstance(value, bool) or not math.isfinite(value):
                    expected = "an integer" if whole else "a finite number"
                    yield f"{spec.name}: got {value!r}, expected {expected}"
            elif isinstance(default, bool) and not isinstance(value, bool):
                yield f"{spec.name}: got {value!r}, expected true or false"
            elif declared == "str" and not isinstance(value, str):
                yield f"{spec.name}: got {value!r}, expected a word"

    def _ranges(self) -> Iterator[str]:
        for name, words in self.choices.items():
            got = getattr(self, name)
            if got not in words:
                guess = nearest(str(got), words) or " choose one"
                yield f"{name}: got {got!r}, expected one of {', '.join(words)};{guess}"
        for name, least in self.least.items():
            got = getattr(self, name)
            if isinstance(got, numbers.Real) and got < least:
                yield f"{name}: got {got}, expected >= {least:g}"

    def options(self) -> dict[str, Any]:
        """Return all options as plain values, ready for JSON."""
        return {spec.name: _plain(getattr(self, spec.name)) for spec in self._specs()}

    def rules(self) -> list[Rule]:
        """Return fresh rules; each is bound to one phase."""
        return []

    def losses(self) -> list[Loss]:
        """Return the terms added to the task loss."""
        return []

    def penalties(self) -> list[Penalty]:
        """Return the parameter-only terms."""
        return []

    def task_loss(self) -> Loss | None:
        """Return what stands in place of the cross-entropy over all seen classes, or None."""
        return None

    def steered(self) -> bool:
        """Say whether training needs more than an optimiser over the trainable weights."""
        return bool(self.acting() or self.losses())

    def acting(self) -> list[Rule]:
        """Return all that acts at an update: rules, wrapped penalties, and what is lent."""
        return [*self.rules(), *(PenaltyRule(p) for p in self.penalties())]

    def too_short(self, updates: int) -> Iterator[str]:
        """Yield why a task of so many updates is too short; asked before anything is loaded."""
        yield from ()

    def too_few(self, rows: int, *, first: bool) -> Iterator[str]:
        """Yield why a task, the first or a later one, has too few training rows; asked likewise."""
        yield from ()

    def too_long(self, tasks: int) -> Iterator[str]:
        """Yield why a stream of so many tasks is too long; asked likewise."""
        yield from ()

    def all_rules(self) -> list[Rule]:
        """Return rules and wrapped penalties in the order in which they run.

        Raises:
            ConfigError: if two of them cannot work together.
        """
        rules = self.acting()
        if found := conflicts(rules):
            raise ConfigError(found)
        return sorted(rules, key=lambda rule: (rule.order, rule.name))


@dataclass(frozen=True, kw_only=True)
class Method(_Slots):
    """Owns the structure of an adapter. What a subclass leaves out is plain LoRA.

    Class facts:
        scalings: the conventions that `scaling` may name, each one known to `scale`.
        linear: whether linear layers are adapted; False for a method of blocks alone.
        words: whether it may act where an answer's words must not see those to come.
        lendable: a part of {"init", "optim"}, what other methods may take of this one.
        otherwise: for a method with updates of its own, how to do without: ", or …".
        sized: whether `r` says how many ranks a layer has; where it does not, `ranks` does.

    Args:
        r: number of live ranks per layer, >= 1.
        alpha: numerator of the scaling s, > 0.
        scaling: "alpha/r", "alpha/sqrt(r)", "alpha/k", "alpha", or the number s itself.
        dropout: probability in [0, 1) of zeroing an input entry of A (and of the router) in
            training.
        init_by: another method that lends its start, with options: "lora-ga:gamma=64"; "" for none.
        optim_by: another method that lends its optimiser and rules, "altlora"; "" for none.
    """

    kind: ClassVar[str] = "method"
    scalings: ClassVar[tuple[str, ...]] = SCALINGS
    linear: ClassVar[bool] = True
    words: ClassVar[bool] = True
    lendable: ClassVar[frozenset[str]] = frozenset()
    otherwise: ClassVar[str] = ""
    sized: ClassVar[bool] = True

    r: int = 8
    alpha: float = 16.0
    scaling: str | float = "alpha/r"
    dropout: float = 0.0
    init_by: str = ""
    optim_by: str = ""

    def checks(self) -> list[str]:
        """Return all problems, those of the shared options included."""
        found = [*self._types(), *self._ranges()]
        found = [*found, *self._shared(), *self._own(bool(found))]
        return [*found, *lending_problems(self, sound=not found)]

    def _shared(self) -> Iterator[str]:
        if isinstance(self.r, numbers.Integral) and self.r < 1:
            yield (
                f"r: got {self.r}, expected at least 1 rank; "
                "leave modules out of target_modules to skip them"
            )
        if isinstance(self.alpha, numbers.Real) and not self.alpha > 0:
            yield (
                f"alpha: got {self.alpha}, expected > 0; "
                "it is the numerator of the scaling, 16 is common"
            )
        if isinstance(self.dropout, numbers.Real) and not 0 <= self.dropout < 1:
            yield f"dropout: got {self.dropout}, expected 0 <= dropout < 1; use 0 to switch it off"
        if isinstance(self.scaling, str):
            good = self.scaling in self.scalings
        else:
            number = isinstance(self.scaling, numbers.Real) and not isinstance(self.scaling, bool)
            good = number and 0 < self.scaling < math.inf
        if not good:
            words = ", ".join(self.scalings)
            yield f"scaling: got {self.scaling!r}, expected one of {words} or a finite number > 0"
        elif self.scaling == "alpha/k" and not hasattr(self, "k"):
            yield "scaling: got 'alpha/k', but this method has no k (active ranks); use 'alpha/r'"

    def scale(self, site: Site) -> float:
        """Return s for one site; the convention is an option and is saved with the adapter."""
        if not isinstance(self.scaling, str):
            return float(self.scaling)
        divisor = {
            "alpha/r": site.r,
            "alpha/sqrt(r)": math.sqrt(site.r),
            "alpha/k": getattr(self, "k", 1),
            "alpha": 1,
        }[self.scaling]
        return site.alpha / divisor

    def ranks(self, site: Site) -> int:
        """Return the live ranks of a fresh layer, `site.r` those that were asked for; >= 0."""
        return site.r

    def core(self, site: Site) -> Core:
        """Return a new core for one layer; φ = identity if the method leaves it out."""
        return Identity(site.r)

    def init(self) -> Init:
        """Return the starting values; A Kaiming uniform and B zero if the method leaves it out."""
        return KaimingZero()

    def sub_block(self, site: Site) -> Block | Sequence[Block] | None:
        """Return what acts around modules of the transformer block at `site`, or None.

        Several blocks stand at different add points.
        """
        return None

    def head(self, names: list[str], d: int) -> Head | None:
        """Return the classifier for `names` over d features, or None for the plain linear one."""
        return None

    def starting(self) -> Init:
        """Return the start that is used: its own, or that of the method which lends it."""
        lender = lent(self, "init")
        return self.init() if lender is None else lender.init()

    def grouping(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Return the groups that are used: its own, or those of the method which lends them."""
        lender = lent(self, "optim")
        return self.groups(adapter, args) if lender is None else lender.groups(adapter, args)

    def acting(self) -> list[Rule]:
        """Return all that acts at an update: rules, wrapped penalties, and what is lent."""
        lender = lent(self, "optim")
        return [*super().acting(), *(() if lender is None else lender.rules())]

    def unfit(self, strategies: Sequence[Strategy]) -> Iterator[str]:
        """Yield why strategies cannot be combined with this."""
        yield from ()

    def lends(self, what: str, to: Method) -> Iterator[str]:
        """Yield why another method cannot take this one's start ("init") or optimiser ("optim")."""
        word = {"init": "start", "optim": "optimiser"}[what]
        probe = Site(path="", d_in=2 * to.r, d_out=2 * to.r, r=to.r, alpha=to.alpha)
        if what not in self.lendable:
            yield f"{self.name} has no {word} that stands alone"
        elif not isinstance(core := to.core(probe), Identity):
            yield f"it holds for factors alone; {to.name} has {type(core).__name__} between them"
        elif to.decides(what):
            yield f"{to.name} has its own {word}"

    def decides(self, what: str) -> bool:
        """Say whether this method has a start ("init") or an optimiser ("optim") of its own."""
        if what == "init":
            return type(self).init is not Method.init
        return type(self).groups is not Method.groups

    def boundary(self) -> Boundary:
        """Return the state machine of a task."""
        return Boundary()

    def groups(self, adapter: Adapter, args: Any = None) -> list[Group]:
        """Return the optimiser's groups; gates never decay."""
        gates = {
            id(p)
            for layer in adapter.layers
            for n, p in layer.core.named_parameters()
            if n in layer.core.gates
        }
        params = [p for group in adapter.roles().values() for p in group if p.requires_grad]
        plain = [p for p in params if id(p) not in gates]
        bare = [p for p in params if id(p) in gates]
        found = [Group(params=plain), Group(params=bare, weight_decay=0.0)]
        return [group for group in found if group.params]

    def condition(
        self, batch: dict[str, Any], base_forward: Callable[..., Any] | None = None
    ) -> Tensor | None:
        """Return what `Flow.condition` holds for a batch; by default the batch's "condition"."""
        given: Tensor | None = batch.get("condition")
        return given

    def parameters_per_site(self, site: Site) -> int:
        """Return how many weights train at one site, r (d_in + d_out) for plain LoRA.

        Tests hold the tensors to it.
        """
        return site.r * (site.d_in + site.d_out)

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return figures that are constant only if the method does nothing."""
        norms = []
        for layer in adapter.layers:
            B = layer.B.detach().float()
            if layer.shadow is not None and layer.shadow[1].shape == B.shape:
                # A start that is subtracted is no sign of training.
                B = B - layer.shadow[1].float()
            norms.append(torch.linalg.vector_norm(B))
        # A model may be spread over devices.
        norms = [norm.to(norms[0].device) for norm in norms]
        return {"b_norm": float(torch.stack(norms).mean()) if norms else 0.0}

    @classmethod
    def samples(cls) -> list[Method]:
        """Return small instances that the contract suite runs."""
        return [cls()]


@dataclass(frozen=True, kw_only=True)
class Strategy(_Slots):
    """Adds losses, penalties, rules, replay or work at task boundaries to any method.

    Its boundary runs jobs after the method's phases; at the end of a task all strategies close
    before the method does, those with `structural` last.

    Class facts:
        pools: whether the data of all tasks are trained on at once.
        structural: whether it changes shapes or base weights at the end of a task.
        persistent: whether it needs factors that keep their meaning from task to task.
    """

    kind: ClassVar[str] = "strategy"
    pools: ClassVar[bool] = False
    structural: ClassVar[bool] = False
    persistent: ClassVar[bool] = False

    def boundary(self) -> Boundary | None:
        """Return what happens between tasks, or None; its `next` gives jobs and no phases."""
        return None

    def replay(self) -> Replay | None:
        """Return which samples to keep, or None."""
        return None

    def unfit(self, method: Method, others: Sequence[Strategy]) -> Iterator[str]:
        """Yield why this cannot be combined with a method or with other strategies."""
        yield from ()

    @classmethod
    def samples(cls) -> list[Strategy]:
        """Return small instances that the contract suite runs."""
        return [cls()]


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(item) for item in value]
    # Numbers of other libraries, which JSON does not know.
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, (bool, int)):
        return float(value)
    return value
