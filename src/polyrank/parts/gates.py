"""Static gates: one trained weight per rank, shrunk towards zero until ranks fall away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import ORDER, Adapter, Core, Flow, Layer, Rule, Step, Workshop
from polyrank.layers import adapter_of, keep
from polyrank.ops.rank_gate import Epilogue

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from polyrank.layers import View

FORMS = ("soft", "released")
STARTS = ("normal", "ones")
# Updates from one look for NaN to the next: looking waits for all work of an accelerator.
LOOK_EVERY = 100


class StaticGate(Core):
    """φ(h) = g ⊙ h with one weight a rank, the same for every token; merges exactly.

    Ranks of a bank pass unweighed: theirs was folded into the bank when they were frozen.

    Args:
        r: live ranks.
        start: "normal", g ~ N(0, 1), or "ones".
    """

    # Whether silent ranks may be cut for good; not where each task begins with all of them.
    prunable: ClassVar[bool] = True
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"gate": ("rank",)}
    epilogue = "static"
    gates = frozenset({"gate"})

    def __init__(self, r: int, *, start: str = "normal") -> None:
        super().__init__()
        self.widths, self.start, self.bank = (r, r), start, 0
        self.gate = nn.Parameter(torch.empty(r))
        self.form: Epilogue | None = None

    def banked(self, ranks: int) -> None:
        """Weigh frozen ranks by one."""
        self.bank = ranks

    def settle(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return (A, B diag(g)) of the ranks whose gate is not zero."""
        kept = self.gate != 0
        return A[kept], (B * self.gate.to(B.dtype))[:, kept]

    def fill(self, rng: torch.Generator) -> None:
        """Draw the gates."""
        if self.start == "ones":
            self.gate.fill_(1.0)
        else:
            self.gate.copy_(torch.empty(self.gate.shape).normal_(generator=rng))

    def _all(self) -> Tensor:
        if not self.bank:
            return self.gate
        return torch.cat([self.gate.new_ones(self.bank), self.gate])

    def fused(self) -> Epilogue:
        """Return the operator's form; made anew only when something of it changed."""
        gate, e = self._all(), self.form
        # What others put in the place of the parameter is of one call, and may hold its graph.
        if torch.compiler.is_compiling() or type(gate) is not nn.Parameter:
            return Epilogue(kind="static", gate=gate)
        if e is None or e.gate is not gate:
            e = self.form = Epilogue(kind="static", gate=gate)
        return e

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return g ⊙ h."""
        return self._all().to(h.dtype) * h

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return diag(g), ones for the bank."""
        return torch.diag(self._all())


def shrink(v: Tensor, threshold: float, form: str = "soft") -> Tensor:
    """Return T_κ(v): each value moved towards zero by κ, and zero where it would pass it.

    "soft" is the proximal map of κ |v|: sign(v) max(|v| − κ, 0). "released" is what the code of
    SoRA and of CoDyRA does: 0 where |v| < 2 κ, except at |v| = κ, which stays; sign(v) (|v| − κ)
    from there on. Both are odd and never change a sign; only "soft" is a contraction. NaN stays.

    Args:
        v: any shape, fp32 or fp64.
        threshold: κ >= 0; 0 is the identity.
        form: "soft" or "released".
    """
    if threshold == 0:
        return v.clone()
    size = v.abs()
    if form == "soft":
        moved = (size - threshold).clamp_min(0)
        return torch.where(moved == 0, torch.zeros_like(v), moved.copysign(v))
    # As three statements in a row, since rounding decides which values meet the bounds.
    moved = torch.where(size > threshold, size - threshold, size)
    return torch.where(moved < threshold, torch.zeros_like(v), moved.copysign(v))


def static_gates(adapter: Adapter) -> list[tuple[Layer, nn.Parameter]]:
    """Return the layers that have a static gate, each with it."""
    return [(v, v.core.gate) for v in adapter.layers if isinstance(v.core, StaticGate)]


def kept_ranks(adapter: Adapter) -> dict[str, int]:
    """Return how many gates of each layer are not zero, by site path."""
    gates = static_gates(adapter)
    if not gates:
        return {}
    counts = counted([gate for _, gate in gates])
    return {layer.site.path: count for (layer, _), count in zip(gates, counts, strict=True)}


def counted(vectors: Sequence[Tensor]) -> list[int]:
    """Return how many entries of each vector are not zero, in one transfer from each device."""
    found = [(vector.detach() != 0).sum() for vector in vectors]
    return torch.stack(gathered(found)).tolist()


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of a model that is spread over devices where the first one is."""
    return [tensor.to(tensors[0].device) for tensor in tensors]


def by_place(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the numbers of tensors that can be one vector: of one device and one dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(number)
    return list(places.values())


def kept_parameters(adapter: Adapter) -> int:
    """Return Σ kept (d_in + d_out), the size of the LoRA that the kept ranks are."""
    kept = kept_ranks(adapter)
    sites = [layer.site for layer, _ in static_gates(adapter)]
    return sum(kept[site.path] * (site.d_in + site.d_out) for site in sites)


def prune(model: nn.Module, *, adapter: str | None = None) -> dict[str, int]:
    """Cut the ranks whose gate is zero out of every layer; answers and the scale s stay.

    s is that of the ranks from before, and not alpha over those that are left. A layer without any
    other keeps its first rank, which adds nothing. No optimiser may exist.

    Returns:
        How many ranks act, by site path.

    Raises:
        ConfigError: if the adapter has no static gate, or needs its silent ranks in the next task.
        MergeError: if it is merged.
        RunError: if gates are not finite.
    """
    found = adapter_of(model, adapter)
    FlatGates(found).check_finite()
    if not all(cast("StaticGate", layer.core).prunable for layer, _ in static_gates(found)):
        raise ConfigError(
            f"prune: a task of {found.method.name!r} ends by polyrank.settle(model, task=...), "
            "which drops silent ranks and draws new ones; cut by hand, every later task would "
            "begin with fewer. Use settle, or polyrank.export for a small copy"
        )
    if any(found.name in view.module.merged_adapters for view in found.layers):
        raise MergeError(
            f"prune: adapter {found.name!r} is merged, and could not be taken out of the base any "
            "more; call unmerge_adapter() first"
        )
    kept = kept_ranks(found)
    for layer, gate in static_gates(found):
        ranks = gate.detach().nonzero().squeeze(-1)
        ranks = ranks if len(ranks) else ranks.new_zeros(1)
        if len(ranks) < len(gate):
            keep(model, cast("View", layer), ranks)
    return kept


class FlatGates:
    """All gates of an adapter as one flat fp32 vector a device, so that one kernel serves them all.

    The parameters become views of these for a phase. Moving or copying a model cuts the views; then
    they are bound anew at the next use.

    Args:
        adapter: with static gates in all or some layers.
        name: the parameter of their cores that is gathered.

    Raises:
        ConfigError: if there are none, or they are not fp32 or fp64.
    """

    def __init__(self, adapter: Adapter, name: str = "gate") -> None:
        layers = [layer for layer, _ in static_gates(adapter)]
        self.params = [layer.core.get_parameter(name) for layer in layers]
        self.paths = [layer.site.path for layer in layers]
        if not self.params:
            raise ConfigError("gates: the adapter has no static gate to shrink; use another method")
        half = {p.dtype for p in self.params} - {torch.float32, torch.float64}
        if half:
            raise ConfigError(
                f"gates: got {', '.join(map(str, half))}, expected float32 or float64: below, a "
                "threshold of 1e-3 is lost in rounding and gates never shrink; keep adapters in "
                "fp32 (autocast_adapter_dtype=True)"
            )
        self._bind()

    def _bind(self) -> None:
        self.places = by_place(self.params)
        with torch.no_grad():
            self.flats = [
                torch.cat([self.params[i].detach().reshape(-1) for i in place])
                for place in self.places
            ]
            for param, part in self._pairs():
                param.data = part

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for place, flat in zip(self.places, self.flats, strict=True):
            params = [self.params[i] for i in place]
            yield from zip(params, flat.split([p.numel() for p in params]), strict=True)

    def vectors(self) -> list[Tensor]:
        """Return the flat vector of each device; writing into one writes the gates."""
        if any(param.data_ptr() != part.data_ptr() for param, part in self._pairs()):
            self._bind()
        return self.flats

    def shrink(self, threshold: float, form: str) -> None:
        """Let every gate take the step T_κ of `shrink`."""
        for flat in self.vectors():
            flat.copy_(shrink(flat, threshold, form))

    def check_finite(self) -> None:
        """Refuse gates that are not finite: a NaN compares false and would stay for good.

        Raises:
            RunError: naming the first layer.
        """
        if all(bool(flat.isfinite().all()) for flat in self.vectors()):
            return
        bad = [
            path
            for path, p in zip(self.paths, self.params, strict=True)
            if not p.detach().isfinite().all()
        ]
        raise RunError(
            f"gates: {len(bad)} layers hold NaN or infinity ({bad[0]} is the first); lower the "
            "learning rate, or clip gradients harder"
        )


class Shrinkage(Rule):
    """After every real update each gate takes one proximal step, g ← T_κ(g).

    Gates that are zero still receive gradients and can come back.

    Args:
        threshold: κ of an update, from its `Step`.
        form: "soft" or "released", see `shrink`.
    """

    order = ORDER["prox"]
    touches = frozenset({"param"})

    def __init__(self, threshold: Callable[[Step], float], form: str = "soft") -> None:
        self.threshold, self.form = threshold, form

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Gather the gates, and see that the optimiser owns each of them once and undecayed.

        Raises:
            ConfigError: if it does not.
            RunError: if gates are not finite.
        """
        self.gates = FlatGates(adapter)
        self.gates.check_finite()
        owned = [
            (id(p), group.get("weight_decay", 0.0))
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        for path, param in zip(self.gates.paths, self.gates.params, strict=True):
            decays = [decay for number, decay in owned if number == id(param)]
            if len(decays) != 1 or decays[0]:
                raise ConfigError(
                    f"gate of {path}: stands in {len(decays)} groups of the optimiser, with weight "
                    f"decay {max(decays, default=0)}, expected one without decay; build it from "
                    "polyrank.parameter_groups(model, lr=...)"
                )

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """Shrink all gates by the update's threshold.

        Raises:
            RunError: if gates are not finite; looked for now and then.
        """
        if step.index % LOOK_EVERY == 0:
            self.gates.check_finite()
        threshold = self.threshold(step)
        if threshold > 0:
            self.gates.shrink(threshold, self.form)

    def release(self) -> None:
        """See that what is left is finite, unless another error is on its way.

        Raises:
            RunError: if it is not.
        """
        if sys.exc_info()[0] is None:
            self.gates.check_finite()
