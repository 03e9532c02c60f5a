"""AdamW over a part of the ranks: what is not selected keeps its bits, and its moments too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyrank.frame import Adapter, Group
from polyrank.parts.optimizer import register_update

# What groups ask for.
ROWS = "rows"
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@register_update(ROWS)
class RowsAdamW(Optimizer):
    """AdamW of the slices `first`..`last` − 1 along `axis` of every parameter of a group.

    Each slice counts its own steps: slices that are selected always move as under AdamW, and one
    that is selected for the first time makes a first step. Slices outside stand still: values,
    moments, counts, decay. A step costs time and memory for what is selected.

    Args:
        params: groups; `axis`, `first` and `last` (None: to the end) may change from step to step.
        lr: rate.
        betas: of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        axis: along which ranks lie: 0 for A, 1 for B.
        first: first slice that moves.
        last: end of the slices that move.
    """

    shared: ClassVar[frozenset[str]] = frozenset({"betas", "eps"})

    @staticmethod
    def unfit(kind: type[Optimizer], options: dict[str, Any], groups: list[dict[str, Any]]) -> str:
        """Say why it is not the AdamW, or the Adam without decay, that the run asked for."""
        if kind not in (torch.optim.Adam, torch.optim.AdamW):
            return f"cannot stand in for {kind.__name__}, expected Adam or AdamW; use one"
        if odd := [name for name in ("amsgrad", "maximize") if options.get(name)]:
            return f"cannot stand in for {kind.__name__} with {odd[0]}=True; leave it out"
        decay = max(group.get("weight_decay", 0.0) for group in groups)
        if kind is torch.optim.Adam and decay and not options.get("decoupled_weight_decay"):
            return (
                f"cannot stand in for Adam with weight_decay={decay}, which it adds to gradients; "
                "use AdamW, or no decay"
            )
        return ""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        axis: int = 0,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        chosen = {"axis": axis, "first": first, "last": last}
        decay = {"weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, **decay, **chosen})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the selected slices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters whose slices have made equally many steps share their corrections.
            alike: dict[tuple[Any, ...], Lists] = {}
            for param in group["params"]:
                if param.grad is not None:
                    counts, parts = self._selected(param, group)
                    key = (counts, param.device, param.dtype, param.dim())
                    for held, part in zip(
                        alike.setdefault(key, ([], [], [], [])), parts, strict=True
                    ):
                        held.append(part)
            for (counts, *_), lists in alike.items():
                _adamw(lists, counts, group)
        return loss

    def _selected(
        self, param: Tensor, group: dict[str, Any]
    ) -> tuple[tuple[float, ...], tuple[Tensor, ...]]:
        """Count a step; return the counts and views of values, gradient and moments."""
        axis, first = group["axis"], group["first"]
        size = param.shape[axis]
        last = size if group["last"] is None else min(group["last"], size)
        state = self.state[param]
        if not state:
            # Under this name and on the CPU, so that torch leaves it as it is when it loads.
            state["step"] = torch.zeros(size, device="cpu")
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        count = state["step"][first:last].add_(1)
        whole = (param, cast("Tensor", param.grad), state["exp_avg"], state["exp_avg_sq"])
        parts = tuple(t.narrow(axis, first, max(last - first, 0)) for t in whole)
        return tuple(count.tolist()), parts


def rows_of(adapter: Adapter, ranks: int) -> list[Group]:
    """Return groups of all that trains: A and B by rows, `ranks` of them at first; others plain."""
    roles = {
        role: [p for p in params if p.requires_grad] for role, params in adapter.roles().items()
    }
    found = [
        Group(
            params=roles.pop(role, []),
            update=ROWS,
            options={"axis": axis, "first": 0, "last": ranks},
        )
        for axis, role in enumerate("AB")
    ]
    found.append(Group(params=[p for params in roles.values() for p in params]))
    return [group for group in found if group.params]


def _adamw(lists: Lists, counts: tuple[float, ...], group: dict[str, Any]) -> None:
    """One step of AdamW on views that have made `counts` steps, one number for each slice."""
    params, grads, means, squares = lists
    (beta1, beta2), lr, axis = group["betas"], group["lr"], group["axis"]
    if not counts:
        return
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    rates = [lr / (1 - beta1**n) for n in counts]
    roots = [(1 - beta2**n) ** 0.5 for n in counts]
    sizes = torch._foreach_sqrt(squares)
    if len(set(counts)) == 1:
        torch._foreach_div_(sizes, roots[0])
        torch._foreach_add_(sizes, group["eps"])
        torch._foreach_addcdiv_(params, means, sizes, -rates[0])
        return
    shape = [1] * params[0].dim()
    shape[axis] = len(counts)
    device, dtype = params[0].device, torch.promote_types(params[0].dtype, torch.float32)
    # Made on the CPU and sent along: made on the device, it would wait for all work before.
    both = torch.tensor([rates, roots], dtype=dtype, device="cpu").to(device, non_blocking=True)
    rate, root = (values.view(shape) for values in both)
    torch._foreach_div_(sizes, [root] * len(sizes))
    torch._foreach_add_(sizes, group["eps"])
    steps = torch._foreach_div(means, sizes)
    torch._foreach_mul_(steps, [rate] * len(steps))
    torch._foreach_sub_(params, steps)
