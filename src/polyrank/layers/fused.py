"""The fused road through an adapted layer: base product and update in one operator.

It is taken where the base is a plain frozen `nn.Linear` that nobody listens to and one adapter is
active. Siblings that were seen to read the same x one after the other (q, k and v; gate and up)
are then computed together, when the first of them is called: one buffer gathers the gradient of x.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polyrank.frame import Core, Flow
from polyrank.ops.rank_gate import Memo, Projection, linears, reach

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear
    from polyrank.layers.views import View

# The last input that was read by a layer for itself, and that layer; both held weakly.
_LAST: list[weakref.ref[Any]] = []
# Forwards in a row that did not ask for what was computed ahead, before it is no longer computed.
_PATIENCE = 3
# Ranks and kinds of gates.
Limits = tuple[int, tuple[str, ...]]


class Ahead(NamedTuple):
    """An output that was computed before its layer was called."""

    x: Tensor
    version: int
    learning: bool
    view: View
    y: Tensor


class Sharing:
    """What one adapted layer knows of the siblings that read the same x after it."""

    def __init__(self) -> None:
        self.followers: list[AdaptedLinear] = []
        self.ahead: Ahead | None = None
        self.missed = 0
        self.memo = Memo()

    def __deepcopy__(self, memo: dict[int, object]) -> Sharing:
        return Sharing()

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


class Served(NamedTuple):
    """The one adapter that acts in a layer, and what the operator reads of both."""

    view: View
    core: Core
    projection: Projection


def through(layer: AdaptedLinear, x: Tensor, flow: Flow) -> Tensor | None:
    """Return the layer's output by the fused road, or None where that is not to be taken."""
    sharing, learning = layer.sharing, torch.is_grad_enabled()
    if sharing.ahead is not None and (y := _taken(layer, x, learning)) is not None:
        return y
    limits = _limits(x)
    served = _served(layer, x, flow, limits)
    if served is None:
        return None
    view, core, projection = served
    dropout = view.method.dropout if core.training else 0.0
    compiling = torch.compiler.is_compiling()
    alone = bool(dropout) or compiling or (learning and _packed())
    group, given, counting = [served], [projection], projection.counts
    if not alone and sharing.followers:
        for each in _ready(layer, x, flow, served, limits):
            group.append(each)
            given.append(each.projection)
            counting = counting or each.projection.counts
    # Tokens are told apart where their choices are counted.
    mask = flow.tokens(view.site.masks, x.shape[:-1]) if counting else None
    seed = flow.key(view.seed) if dropout else 0
    memo = None if compiling else sharing.memo
    outs, counts = linears(x, given, dropout, seed, mask, memo)
    if counting:
        for each, found in zip(group, counts, strict=True):
            if found is not None:
                each.core.count(found)
    if len(group) > 1:
        version = _version(x)
        for follower, y in zip(group[1:], outs[1:], strict=True):
            ahead = Ahead(x, version, learning, follower.view, y)
            follower.view.module.sharing.ahead = ahead
    if not alone:
        _observe(layer, view, x)
    return outs[0]


def _limits(x: Tensor) -> Limits:
    """The largest number of ranks and the gates that the fused road serves for an input."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return 0, ()
    return reach(x)


def _served(layer: AdaptedLinear, x: Tensor, flow: Flow, limits: Limits) -> Served | None:
    """The one adapter that acts here, if the fused road can serve it.

    Asked anew at every call: nothing that a model may change is kept.
    """
    # Looked up where modules keep them: their own look-up costs as much as a small kernel's start.
    inside = cast("dict[str, Any]", layer._modules)
    base = inside["base_layer"]
    if type(base) is not nn.Linear or layer.merged_adapters or _heard(base):
        return None
    if (name := _active(layer)) is None:
        return None
    view = layer.views.get(name)
    if view is None or view.evaluating:
        return None
    core: Core = inside["polyrank_core"]._modules[name]
    if core.epilogue not in limits[1]:
        return None
    A = inside["polyrank_A"]._modules[name]._parameters.get("weight")
    B = inside["polyrank_B"]._modules[name]._parameters.get("weight")
    if A is None or B is None or A.shape[0] > limits[0]:
        return None
    W, b = base._parameters["weight"], base._parameters["bias"]
    if type(W) is not nn.Parameter or W.requires_grad or W.dtype != x.dtype:
        return None
    # Kernels are started by addresses.
    if not W.get_device() == A.get_device() == B.get_device() == x.get_device():
        return None
    if b is not None and b.requires_grad:
        return None
    if core.portion() is not None or core.base_gain() is not None:
        return None
    if (inside["polyrank_bank"]._modules or inside["polyrank_archive"]._modules) and (
        view.bank is not None
    ):
        return None
    if inside["polyrank_shadow"]._modules and view.shadow is not None:
        return None
    counts = core.counting and flow.live(core.training)
    rows, scale, weighed = core.rows(), view.scale, view.row_scale
    return Served(view, core, Projection(W, b, A, rows, B, core.fused(), scale, 0, weighed, counts))


def _active(layer: AdaptedLinear) -> str | None:
    """The adapter that acts, if there is one alone."""
    names = layer._active_adapter
    if isinstance(names, str):
        return names
    return names[0] if len(names) == 1 else None


def _heard(base: nn.Module) -> bool:
    """Whether somebody waits for the base layer's own call, or has put another in its place."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    )


def _packed() -> bool:
    """Whether hooks take what is saved for backward, as in a checkpointed segment.

    Its recompute must save the same tensors, and so must not share what its forward did not.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _taken(layer: AdaptedLinear, x: Tensor, learning: bool) -> Tensor | None:
    """What was computed ahead for this very call."""
    sharing = layer.sharing
    ahead, sharing.ahead = sharing.ahead, None
    if ahead is None or ahead.x is not x or ahead.learning != learning:
        return None
    view = ahead.view
    if layer.merged_adapters or _active(layer) != view.name:
        return None
    if layer.views.get(view.name) is not view or ahead.version != _version(x):
        return None
    sharing.missed = 0
    return ahead.y


def _ready(
    layer: AdaptedLinear, x: Tensor, flow: Flow, first: Served, limits: Limits
) -> list[Served]:
    """The siblings to compute along."""
    group, view = [], first.view
    for sibling in list(layer.sharing.followers):
        found, sharing = _served(sibling, x, flow, limits), sibling.sharing
        if sharing.ahead is not None:
            sharing.missed += 1
            sharing.ahead = None
        if sharing.missed >= _PATIENCE:
            layer.sharing.followers.remove(sibling)
            continue
        if found and found.view.name == view.name and found.view.site.masks == view.site.masks:
            group.append(found)
    return group


def _observe(layer: AdaptedLinear, view: View, x: Tensor) -> None:
    """Remember who reads the same x after whom; siblings stand under one parent."""
    leader: AdaptedLinear | None = _LAST[1]() if _LAST and _LAST[0]() is x else None
    if leader is None or leader.flow is not layer.flow:
        _LAST[:] = [weakref.ref(x), weakref.ref(layer)]
        return
    first = leader.views.get(view.name)
    if first is None or leader is layer or layer in leader.sharing.followers:
        return
    if first.site.path.rpartition(".")[0] == view.site.path.rpartition(".")[0]:
        leader.sharing.followers.append(layer)
