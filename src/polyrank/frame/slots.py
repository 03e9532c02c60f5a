"""The slots a method fills, each with the moment at which it is called.

Rules and penalties see one adapter over the whole model (`Adapter`) and never the model or its
names; boundaries see a `Workshop`, the services of the engine. What a slot may assume is written at
its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from polyrank.frame.block import Block
from polyrank.frame.core import Core
from polyrank.frame.site import Site

if TYPE_CHECKING:
    from polyrank.frame.stages import Workshop

# The moments of an update at which rules run, from first to last.
ORDER = {"penalty": 10, "constrain": 20, "project": 30, "prox": 60, "balance": 70, "average": 90}

# What the rows of a batch are, as numbers in its "role" column. "replay" and "again" are two
# independent draws from the buffer.
ROLES = {"train": 0, "replay": 1, "again": 2, "forget": 3, "retain": 4, "old": 5, "text": 6}


@runtime_checkable
class Layer(Protocol):
    """One adapted linear layer as one adapter sees it.

    A is (widths[0], d_in), B is (d_out, widths[1]), both live and usually fp32; `bank` are frozen
    ranks read before the live ones, `owners` says of which growth each rank is, from 0, the live
    ones last; `shadow` is (A0, B0, δ0), subtracted, `row_scale` (d_out,) acts in backward on A and
    B only.
    """

    site: Site
    A: nn.Parameter
    B: nn.Parameter
    core: Core
    scale: float
    bank: tuple[Tensor, Tensor] | None
    owners: list[int]
    shadow: tuple[Tensor, Tensor, Tensor | None] | None
    row_scale: Tensor | None

    def weight(self) -> Tensor:
        """Return the base weight (d_out, d_in), fp32 or fp64; raises if the base is quantised."""


class Head(nn.Module):
    """A classifier that grows; saved with the adapter, as modules_to_save cannot change shape."""

    names: list[str]

    def grow(self, names: Sequence[str], rng: torch.Generator) -> None:
        """Append classes; the rows of the old ones stay bit-identical."""
        raise NotImplementedError(f"{type(self).__name__} must define grow(names, rng)")

    def forward(
        self, embedding: Tensor, encode: Callable[[Sequence[str]], Tensor] | None = None
    ) -> Tensor:
        """Return fp32 logits (batch, seen classes); `encode` is the model's text tower, if any."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(embedding, encode)")


@runtime_checkable
class Adapter(Protocol):
    """One adapter over the whole model: what rules, penalties and boundaries work on."""

    layers: list[Layer]
    blocks: list[Block]
    head: Head | None

    def roles(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by role ("A", "B", "core", "side", "head" …), by identity."""

    def groups(self, by: str) -> list[list[nn.Parameter]]:
        """Return the trained parameters of the layers grouped by "block", "layer" or "matrix"."""

    def named(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may train, by names that stay while shapes stay."""

    def pairs(self, replica: str) -> list[tuple[Tensor, nn.Parameter]]:
        """Return (tensor of a replica, live parameter) of everything that may train."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where an update stands: `index` of `total`, from 0.

    `peak` is the highest rate so far, or the one that a schedule announced: a group's "initial_lr",
    which schedulers of torch and transformers set, or "max_lr". A warm-up by hand has to set
    "initial_lr", or its way up counts as the peak.
    """

    index: int
    total: int
    lr: float
    peak: float
    task: int = 0
    phase: str = "train"
    seed: int = 0


class Init:
    """Writes the starting values, before an optimiser exists and again after a redraw.

    A start that wants more than "weight" waits for `polyrank.initialise`, or for the engine, which
    gathers at the begin of a task; until then the adapter answers as its base and refuses to train.

    Attributes:
        wants: a part of {"weight", "weight_grad", "input", "output", "rate"}: the base weight, the
            gradient of the loss by the weight that acts, what goes in and comes out, and the
            learning rate of the first update. `stat` holds them by these names.
        reduction: "mean" of the batches' sums, or "sum", where every batch counts as often as its
            loss has terms; `stat["count"]` then is the number of terms.
        batches: how many batches to look at, at most; 0 for all that are given.
        samples: how many rows to look at, exactly; 0 for all that are given.
        training: whether the model is looked at in training mode, dropout included.
        neutral: whether the adapted model starts as the base.
    """

    wants: frozenset[str] = frozenset()
    reduction: str = "mean"
    batches: int = 0
    samples: int = 0
    training: bool = True
    neutral: bool = True

    def unfit(self, site: Site) -> Iterator[str]:
        """Yield why a layer of such a shape cannot start like this."""
        yield from ()

    def gather(
        self, site: Site, stat: dict[str, Tensor], seen: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Fold one pass through a layer into fp32 sums (so that they can be all-reduced).

        `seen` has "weight_grad" (d_out, d_in) on the CPU, "input" (T, d_in) and "output" (T, d_out)
        where they were. Left out, gradients are added up.
        """
        for name in seen.keys() & {"weight_grad"}:
            stat[name] = stat[name].add_(seen[name]) if name in stat else seen[name]
        return stat

    def fill(self, layer: Layer, stat: dict[str, Tensor] | None, rng: torch.Generator) -> None:
        """Write A, B, core and shadow under no_grad; `rng` is keyed by (seed, adapter, path)."""
        raise NotImplementedError(f"{type(self).__name__} must define fill(layer, stat, rng)")


class Rule:
    """Something that happens at fixed moments of every optimiser update.

    Rules run sorted by (order, name). A rule that `expects` what an earlier one `touches` is
    refused before loading. Whoever touches "grad" adds terms of the objective, or takes some away:
    what comes is still a gradient. "true_grad" is touched where it no longer is one, as by factors
    for some rows; who expects "grad" wants neither. "factoring" is touched where A and B are
    rescaled against each other while B A stays: who writes factors, touching "param", or weighs
    their values in a penalty cannot stand that.
    """

    order: int = ORDER["project"]
    touches: frozenset[str] = frozenset()
    expects: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Return the name under which state is saved and ties are broken."""
        return type(self).__name__.lower()

    def bind(
        self, adapter: Adapter, optimizer: torch.optim.Optimizer, workshop: Workshop | None
    ) -> None:
        """Meet the adapter and the optimiser, once per phase."""

    def begin(self, step: Step) -> None:
        """Run before the first micro-batch of an update."""

    def grads(self, step: Step) -> None:
        """Run on gradients that are complete, reduced, unscaled and not yet clipped."""

    def after(self, step: Step) -> None:
        """Run after the optimiser really stepped; one skipped by a loss scaler does not count."""

    def release(self) -> None:
        """Leave nothing behind on the adapter; called once, when the rules are detached."""

    def state(self) -> dict[str, Tensor | float | int | str]:
        """Return what a resumed run needs, keyed by site path where it belongs to a layer."""
        return {}

    def restore(self, state: Mapping[str, Tensor | float | int | str]) -> None:
        """Take back what `state` gave."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that share an update rule.

    `lr` multiplies the base rate; a `weight_decay` of None leaves it to the run.
    """

    params: list[nn.Parameter]
    update: str = "adamw"
    lr: float = 1.0
    weight_decay: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Out:
    """What a forward left for losses; only what was asked for is kept.

    Attributes:
        logits: (n, seen classes), or (n, seq, vocabulary) for language models.
        hidden: outputs of the embedding and of every block, (n, seq, d) each.
        embedding: what the classifier reads, (n, d).
        mask: (n, seq) bool, the real tokens of `hidden`; None if all are.
        sides: tensors that blocks left, by site path; with one entry a row, if a loss with a role
            reads them.
        teacher: the same of the loss's teacher, without gradients.
        stored: (n, classes) logits kept with replayed rows, NaN where a class was not known yet.
    """

    logits: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None
    mask: Tensor | None = None
    sides: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    teacher: Out | None = None
    stored: Tensor | None = None


class Loss:
    """A term that needs a batch; evaluated inside the one student forward of a micro-batch.

    `needs` is a part of {"logits", "hidden", "embedding", "sides", "teacher.logits",
    "teacher.hidden", "teacher.embedding", "stored", "texts"}, the last one for logits whose columns
    are texts; `teacher` is the view that the teacher shows, "base" or a replica; there is one
    teacher forward for all losses of a view. With a `role` the term sees the rows of that role
    only, and is left out where a micro-batch has none; None is all rows.

    `per` names what is counted ("label", "token", "sample"): the term returns the sum and the
    engine divides by the count over the whole update and all processes. A `batchwise` term is not
    linear in the batch, and no invariance under accumulation is claimed: it returns the mean of a
    micro-batch, and these are averaged; with `per` "update" it returns what the micro-batch adds,
    and the parts of all micro-batches and processes are summed.
    """

    needs: frozenset[str] = frozenset()
    teacher: str = "base"
    weight: float = 1.0
    role: str | None = None
    per: str = "sample"
    batchwise: bool = False

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Meet the adapter and the engine's services, once per phase."""

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return a 0-d fp32 tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(out, batch)")


class Penalty:
    """A term in parameters only; its gradient is added once per update, not per micro-batch."""

    weight: float = 1.0

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Meet the adapter and the engine's services, once per phase."""

    def __call__(self, adapter: Adapter, step: Step) -> Tensor:
        """Return a 0-d tensor differentiable in the adapter's parameters; a constant adds none."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(adapter, step)")


class PenaltyRule(Rule):
    """Runs a penalty as a rule: its gradient is added, once per update, to complete gradients."""

    order = ORDER["penalty"]
    touches = frozenset({"grad"})
    expects = frozenset({"factoring"})

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        # Stays on its device: turning it into a number every update would wait for all work before.
        self.value: Tensor | float = 0.0

    @property
    def name(self) -> str:
        """Return the penalty's own name."""
        return type(self.penalty).__name__.lower()

    def bind(
        self, adapter: Adapter, optimizer: torch.optim.Optimizer, workshop: Workshop | None
    ) -> None:
        """Remember the adapter."""
        self.adapter = adapter
        self.penalty.bind(adapter, workshop)

    def grads(self, step: Step) -> None:
        """Add ∂(weight · penalty)/∂p to p.grad for every trained parameter the penalty touches."""
        params = [p for group in self.adapter.roles().values() for p in group if p.requires_grad]
        with torch.enable_grad():
            loss = self.penalty(self.adapter, step) * self.penalty.weight
        self.value = loss.detach()
        if not loss.requires_grad:
            # A penalty that has nothing to hold on to yet, as in a first task.
            return
        found = torch.autograd.grad(loss, params, allow_unused=True)
        for param, grad in zip(params, found, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else param.grad.add_(grad)


def conflicts(rules: Iterable[Rule], owners: Mapping[int, str] | None = None) -> list[str]:
    """List pairs of rules that cannot work together, as problems for a ConfigError.

    Args:
        rules: fresh ones.
        owners: by id of a rule the entry that brings it, to be named with it.
    """

    def called(rule: Rule) -> str:
        owner = (owners or {}).get(id(rule), rule.name)
        return repr(rule.name) if owner == rule.name else f"{rule.name!r} of {owner}"

    problems = []
    seen: list[Rule] = []
    for rule in sorted(rules, key=lambda rule: (rule.order, rule.name)):
        for earlier in seen:
            if rule.name == earlier.name:
                problems.append(
                    f"rules: two are named {rule.name!r}, and their saved state would be mixed up; "
                    "give one of them a name of its own"
                )
            wanted = rule.expects | ({"true_grad"} if "grad" in rule.expects else frozenset())
            wanted |= {"factoring"} if "param" in rule.touches else frozenset()
            both = wanted & earlier.touches
            if both:
                problems.append(
                    f"rules: {called(rule)} expects an untouched {', '.join(sorted(both))}, but "
                    f"{called(earlier)} changes it first; drop one of the two"
                )
            if earlier.order == rule.order == ORDER["prox"] and earlier.touches & rule.touches:
                problems.append(
                    f"rules: {called(earlier)} and {called(rule)} both rewrite the parameters "
                    "after a step; drop one of the two"
                )
        seen.append(rule)
    return problems
