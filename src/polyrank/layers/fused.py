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
from polyrank.ops.rank_gate import Projection, linears, owned

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear
    from polyrank.layers.views import View

# The last input that was read by a layer for itself, and that layer; both held weakly.
_LAST: list[weakref.ref[Any]] = []
# What holds an adapter's core and factors, and what else one may have.
_FACTORS = ("polyrank_core", "polyrank_A", "polyrank_B")
_HELD = ("polyrank_bank", "polyrank_archive", "polyrank_shadow")
# Forwards in a row that did not ask for what was computed ahead, before it is no longer computed.
_PATIENCE = 3


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
    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor


def through(layer: AdaptedLinear, x: Tensor, flow: Flow) -> Tensor | None:
    """Return the layer's output by the fused road, or None where that is not to be taken."""
    if layer.sharing.ahead is not None and (y := _taken(layer, x)) is not None:
        return y
    served = _served(layer, x)
    if served is None:
        return None
    view, core = served.view, served.core
    dropout = view.method.dropout if core.training else 0.0
    alone = bool(dropout) or torch.compiler.is_compiling() or _packed()
    group = [served]
    if not alone and layer.sharing.followers:
        group += _ready(layer, x, view)
    mask = flow.tokens(view.site.masks, x.shape[:-1])
    seed = flow.key(view.seed) if dropout else 0
    outs, counts = linears(x, [_projection(each, flow) for each in group], dropout, seed, mask)
    for each, found in zip(group, counts, strict=True):
        if found is not None:
            each.core.count(found)
    if len(group) > 1:
        version, learning = _version(x), torch.is_grad_enabled()
        for follower, y in zip(group[1:], outs[1:], strict=True):
            ahead = Ahead(x, version, learning, follower.view, y)
            follower.view.module.sharing.ahead = ahead
    if not alone:
        _observe(layer, view, x)
    return outs[0]


def _served(layer: AdaptedLinear, x: Tensor) -> Served | None:
    """The one adapter that acts here, if the fused road can serve it."""
    # Looked up where modules keep them: their own look-up costs as much as a small kernel's start.
    inside = layer._modules
    base = cast("nn.Module", inside["base_layer"])
    if type(base) is not nn.Linear or layer.merged_adapters or _heard(base):
        return None
    names = layer._active_adapter
    if not isinstance(names, str):
        if len(names) != 1:
            return None
        names = names[0]
    view = layer.views.get(names)
    if view is None or view.evaluating:
        return None
    held = {name: cast("nn.Module", inside[name])._modules for name in _FACTORS}
    core = cast("Core", held["polyrank_core"][names])
    A = cast("nn.Module", held["polyrank_A"][names])._parameters["weight"]
    B = cast("nn.Module", held["polyrank_B"][names])._parameters["weight"]
    assert A is not None
    assert B is not None
    if core.epilogue == "python" or not owned(x, A.shape[0], core.epilogue):
        return None
    W, b, device = base._parameters["weight"], base._parameters["bias"], x.device
    if type(W) is not nn.Parameter or W.requires_grad or W.dtype != x.dtype or W.device != device:
        return None
    if b is not None and b.requires_grad:
        return None
    if core.portion() is not None or core.base_gain() is not None:
        return None
    more = any(cast("nn.Module", inside[name])._modules for name in _HELD)
    if more and (view.bank is not None or view.shadow is not None):
        return None
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    return Served(view, core, W, b, A, B)


def _heard(base: nn.Module) -> bool:
    """Whether hooks wait for the base layer's own call."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
    )


def _packed() -> bool:
    """Whether hooks take what is saved for backward, as in a checkpointed segment.

    Its recompute must save the same tensors, and so must not share what its forward did not.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled() and (top is None or top(False) is not None)


def _projection(served: Served, flow: Flow) -> Projection:
    view, core, W, b, A, B = served
    return Projection(
        W, b, A, core.rows(), B, core.fused(), view.scale, 0, view.row_scale,
        core.counting and flow.live(core.training),
    )  # fmt: skip


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _taken(layer: AdaptedLinear, x: Tensor) -> Tensor | None:
    """What was computed ahead for this very call."""
    sharing = layer.sharing
    ahead, sharing.ahead = sharing.ahead, None
    if ahead is None or ahead.x is not x or layer.active_adapters != [ahead.view.name]:
        return None
    if layer.merged_adapters or layer.views.get(ahead.view.name) is not ahead.view:
        return None
    if ahead.version != _version(x) or ahead.learning != torch.is_grad_enabled():
        return None
    sharing.missed = 0
    return ahead.y


def _ready(layer: AdaptedLinear, x: Tensor, view: View) -> list[Served]:
    """The siblings to compute along."""
    group, masks = [], view.site.masks
    for sibling in list(layer.sharing.followers):
        found = _served(sibling, x)
        if sibling.sharing.ahead is not None:
            sibling.sharing.missed += 1
            sibling.sharing.ahead = None
        if sibling.sharing.missed >= _PATIENCE:
            layer.sharing.followers.remove(sibling)
            continue
        if found and found.view.name == view.name and found.view.site.masks == masks:
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
