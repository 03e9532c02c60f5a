"""A rule that keeps what trains off the protected directions of its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from polyrank.frame import ORDER, Adapter, Layer, Rule, Step, Workshop
from polyrank.layers.precision import exact
from polyrank.layers.views import wide
from polyrank.parts.subspaces import Tail, Whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

PRECISIONS = ("fp32", "tf32")
# Matrices of fewer entries are projected together: starting a kernel costs more than its work.
SMALL = 2**16


class Side(NamedTuple):
    """A trained factor, what it started as, and the columns that it is kept off, or kept to.

    `turned` says that the factor's rows lie in the space of the columns, not its columns.
    """

    param: nn.Parameter
    start: Tensor
    basis: Tensor
    kept: bool
    turned: bool


class Project(Rule):
    """G ← G − Q Qᵀ G before clipping, and P ← P_0 + (1 − Q Qᵀ)(P − P_0) after the step.

    Q Qᵀ P_0 = 0 already, so that parameters are projected by what they have moved: no product
    rounds what a factor started as, and one that has not moved keeps its bits.
    U_l is kept off U_h and V_l off V_h; where that side of the weight is square and the tail the
    smaller basis, U_l is kept to it, which is the same. Both are needed: optimisers that scale
    entries turn a projected gradient out again, and moments fill with what the gradient has left.
    Whole weights: G ← G − U_h U_hᵀ G V_hᵀ V_h, the (high, high) block alone.

    Args:
        precision: "fp32", or "tf32", whose products are three digits coarser and faster on a GPU.
        after: whether parameters are projected too.
    """

    order = ORDER["project"]
    touches = frozenset({"grad", "param"})

    def __init__(self, precision: str = "fp32", *, after: bool = True) -> None:
        self.tf32, self.late = precision == "tf32", after

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Collect factors and bases; small ones of equal shape are projected as one."""
        self.blocks: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        groups: dict[tuple[Any, ...], list[Side]] = {}
        for layer in adapter.layers:
            core = layer.core
            if isinstance(core, Whole) and core.high_u is not None and core.high_v is not None:
                self.blocks.append((layer.A, core.high_u, core.high_v))
            for number, side in enumerate(_sides(layer) if isinstance(core, Tail) else ()):
                P, Q = side.param, side.basis
                wide_enough = P.dtype in (torch.float32, torch.float64)
                alone = P.numel() >= SMALL and wide_enough
                own = (len(groups), number) if alone else ()
                key = (P.shape, Q.shape, P.device, P.dtype, side.kept, side.turned, own)
                groups.setdefault(key, []).append(side)
        self.groups = [
            (sides, torch.stack([wide(s.basis) for s in sides]) if len(sides) > 1 else None)
            for sides in groups.values()
        ]

    def grads(self, step: Step) -> None:
        """Project the gradients."""
        self._all({id(s.param): s.param.grad for g, _ in self.groups for s in g}, moved=False)
        self._blocks({id(D): D.grad for D, _, _ in self.blocks})

    def after(self, step: Step) -> None:
        """Project the parameters."""
        if self.late:
            self._all({id(s.param): s.param.data for g, _ in self.groups for s in g}, moved=True)
            self._blocks({id(D): D.data for D, _, _ in self.blocks})

    @torch.no_grad()
    def _all(self, targets: dict[int, Tensor | None], *, moved: bool) -> None:
        for sides, stacked in self.groups:
            found = [(s, t) for s in sides if (t := targets[id(s.param)]) is not None]
            if not found:
                continue
            first, device = sides[0], found[0][1].device.type
            with exact(device, but_tf32=self.tf32):
                if stacked is not None and len(found) == len(sides):
                    P = torch.stack([wide(t) for _, t in found])
                    start = torch.stack([wide(s.start) for s, _ in found]) if moved else None
                    off = _off(P, stacked, first, start)
                    torch._foreach_copy_([t for _, t in found], list(off))
                    continue
                for side, t in found:
                    _off_in_place(t, side, side.start if moved else None)

    @torch.no_grad()
    def _blocks(self, targets: dict[int, Tensor | None]) -> None:
        for D, U, V in self.blocks:
            if (t := targets[id(D)]) is not None:
                with exact(t.device.type, but_tf32=self.tf32):
                    t.sub_((U @ ((U.mT @ wide(t)) @ V.mT) @ V).to(t.dtype))


def _off(P: Tensor, Q: Tensor, side: Side, start: Tensor | None) -> Tensor:
    """Return P with what it has moved from a start kept to the columns of Q, or off them.

    Leading axes are a batch; without a start all of P has moved.
    """
    D = P if start is None else P - start
    found = (D @ Q) @ Q.mT if side.turned else Q @ (Q.mT @ D)
    if not side.kept:
        return P - found
    return found if start is None else start + found


def _off_in_place(t: Tensor, side: Side, start: Tensor | None) -> None:
    """Do the same to one tensor, with as little memory as it takes."""
    Q = wide(side.basis)
    if t.dtype != Q.dtype or not t.is_contiguous():
        first = None if start is None else wide(start).to(wide(t).dtype)
        t.copy_(_off(wide(t), Q.to(wide(t).dtype), side, first))
        return
    D = t if start is None else t - start
    left, right = (D @ Q, Q.mT) if side.turned else (Q, Q.mT @ D)
    if not side.kept:
        t.addmm_(left, right, alpha=-1)
    elif start is None:
        torch.mm(left, right, out=t)
    else:
        torch.addmm(start.to(t.dtype), left, right, out=t)


def _sides(layer: Layer) -> Iterator[Side]:
    """Yield U_l and V_l of a layer with their bases."""
    core = cast("Tail", layer.core)
    assert layer.shadow is not None
    A0, B0, _ = layer.shadow
    if core.split.k == 0 or core.split.r == 0:
        return
    u, v = core.high_u, core.high_v
    yield Side(layer.B, B0, B0 if u is None else u, u is None, False)
    yield Side(layer.A, A0, (A0 if v is None else v).mT, v is None, True)
