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

from polyrank.frame import Flow
from polyrank.ops.rank_gate import Projection, linears, owned

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear
    from polyrank.layers.views import View

# The last input that was read by a layer for itself, and that layer; both held weakly.
_LAST: list[weakref.ref[Any]] = []
# What an adapter may hold beside its factors.
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


def through(layer: AdaptedLinear, x: Tensor, flow: Flow) -> Tensor | None:
    """Return the layer's output by the fused road, or None where that is not to be taken."""
    if layer.sharing.ahead is not None and (y := _taken(layer, x)) is not None:
        return y
    view = _view(layer, x)
    if view is None:
        return None
    core = view.core
    dropout = view.method.dropout if core.training else 0.0
    alone = bool(dropout) or torch.compiler.is_compiling() or _packed()
    followers = [] if alone else _ready(layer, x, view)
    views = [view, *followers]
    mask = flow.tokens(view.site.masks, x.shape[:-1])
    seed = flow.key(view.seed) if dropout else 0
    outs, counts = linears(x, [_projection(v, flow) for v in views], dropout, seed, mask)
    for each, found in zip(views, counts, strict=True):
        if found is not None:
            each.core.count(found)
    for follower, y in zip(followers, outs[1:], strict=True):
        ahead = Ahead(x, _version(x), torch.is_grad_enabled(), follower, y)
        follower.module.sharing.ahead = ahead
    if not alone:
        _observe(layer, view, x)
    return outs[0]


def _view(layer: AdaptedLinear, x: Tensor) -> View | None:
    """The one adapter that acts here, if the fused road can serve it."""
    # Looked up where modules keep them: their own look-up costs as much as a small kernel's start.
    inside = layer._modules
    base = cast("nn.Module", inside["base_layer"])
    if type(base) is not nn.Linear or layer.merged_adapters or _heard(base):
        return None
    names = layer.active_adapters
    view = layer.views.get(names[0]) if len(names) == 1 else None
    if view is None or view.evaluating:
        return None
    core = view.core
    if not owned(x, view.A.shape[0], core.epilogue):
        return None
    W, b, device = base._parameters["weight"], base._parameters["bias"], x.device
    if type(W) is not nn.Parameter or W.requires_grad or W.dtype != x.dtype or W.device != device:
        return None
    if b is not None and b.requires_grad:
        return None
    if core.epilogue == "python" or core.portion() is not None or core.base_gain() is not None:
        return None
    held = any(cast("nn.Module", inside[name])._modules for name in _HELD)
    if held and (view.bank is not None or view.shadow is not None):
        return None
    kind = device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return None
    return view


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


def _projection(view: View, flow: Flow) -> Projection:
    base, core = cast("nn.Linear", view.module.base_layer), view.core
    return Projection(
        base.weight, base.bias, view.A, core.rows(), view.B, core.fused(), view.scale, 0,
        view.row_scale, core.counting and flow.live(core.training),
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


def _ready(layer: AdaptedLinear, x: Tensor, view: View) -> list[View]:
    """Views of the siblings to compute along."""
    found = []
    for sibling in list(layer.sharing.followers):
        other = _view(sibling, x)
        if sibling.sharing.ahead is not None:
            sibling.sharing.missed += 1
            sibling.sharing.ahead = None
        if sibling.sharing.missed >= _PATIENCE:
            layer.sharing.followers.remove(sibling)
        elif other is not None and other.name == view.name and other.site.masks == view.site.masks:
            found.append(other)
    return found


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
