"""Sums of squared per-sample gradients from one backward over a whole batch.

For y = W x + s B A x over tokens t of sample i, with δ_t the gradient of y_t, the sample's own
gradients are dB_i = s Σ_t δ_t (A x_t)ᵀ, dA_i = s Σ_t (Bᵀ δ_t) x_tᵀ and dW_i = Σ_t δ_t x_tᵀ. Samples
do not meet in evaluation mode, so n times the δ of a batch's mean loss is that of each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.frame import Adapter, Identity
from polyrank.layers import HeadHost, LinearHead, ModelAdapter, View
from polyrank.layers.views import wide

Squares = dict[int, Tensor]


def squared_sums(
    adapter: Adapter, params: Sequence[nn.Parameter], rows: int, backward: Callable[[], Any]
) -> list[Tensor] | None:
    """Return Σ_i g_i² for each parameter, or None if one of them is no plain factor or weight.

    Args:
        adapter: where the parameters are: factors of identity cores, dense base weights of adapted
            layers, weight and bias of a linear head.
        params: what to differentiate by.
        rows: samples in the batch, n.
        backward: differentiates the mean loss over the batch by `params`.
    """
    found: Squares = {}
    wanted = {id(p) for p in params}
    with _taped(cast("ModelAdapter", adapter), wanted) as tape:
        backward()
    for owner, calls in tape:
        pairs = [(_by_sample(x, rows), _by_sample(d, rows)) for x, d in calls]
        if not calls or any(x is None or d is None for x, d in pairs):
            return None
        both = cast("list[tuple[Tensor, Tensor]]", pairs)
        add = _layer if isinstance(owner, View) else _head
        add(owner, both, rows, wanted, found)
    if wanted - found.keys():
        return None
    return [found[id(p)].to(wide(p).dtype) for p in params]


@contextmanager
def _taped(adapter: ModelAdapter, wanted: set[int]) -> Iterator[list[tuple[Any, list[Any]]]]:
    """Yield, by layer and head, the (input, gradient of the output) of every call inside."""
    tape: list[tuple[Any, list[Any]]] = []
    handles = []

    def watch(module: nn.Module, owner: Any) -> None:
        calls: list[Any] = []
        tape.append((owner, calls))

        def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda grad: calls.append((x, grad)))

        handles.append(module.register_forward_hook(seen))

    for view in adapter.layers:
        if isinstance(view.core, Identity) and view.row_scale is None and wanted & _owned(view):
            watch(view.module, view)
    for host in adapter.hosts:
        if isinstance(host, HeadHost) and isinstance(adapter.head, LinearHead):
            watch(host, adapter.head)
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _owned(view: View) -> set[int]:
    base = getattr(view.module.get_base_layer(), "weight", None)
    return {id(view.A), id(view.B), id(base)}


def _by_sample(value: Tensor, rows: int) -> Tensor | None:
    """Return (n, tokens, d), or None where a model has put the tokens of all samples in one row."""
    return wide(value).reshape(rows, -1, value.shape[-1]) if len(value) == rows else None


def _layer(
    view: View, calls: list[tuple[Tensor, Tensor]], rows: int, wanted: set[int], found: Squares
) -> None:
    A, B, s = wide(view.A.detach()), wide(view.B.detach()), view.scale * rows
    base = getattr(view.module.get_base_layer(), "weight", None)
    if id(view.B) in wanted:
        found[id(view.B)] = _squared([(d, s * (x @ A.T)) for x, d in calls])
    if id(view.A) in wanted:
        found[id(view.A)] = _squared([(s * (d @ B), x) for x, d in calls])
    if id(base) in wanted:
        pairs = [(rows * d, x) for x, d in calls]
        # One sample after the other: a batch of dense gradients would not fit.
        total = _squared([(d[:1], x[:1]) for d, x in pairs])
        for i in range(1, rows):
            total += _squared([(d[i : i + 1], x[i : i + 1]) for d, x in pairs])
        found[id(base)] = total.T if view.module.transposed else total


def _head(
    head: LinearHead,
    calls: list[tuple[Tensor, Tensor]],
    rows: int,
    wanted: set[int],
    found: Squares,
) -> None:
    found[id(head.weight)] = _squared([(rows * d, x) for x, d in calls])
    ones = [(rows * d, torch.ones_like(d[..., :1])) for _, d in calls]
    found[id(head.bias)] = _squared(ones)[:, 0]


def _squared(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ_i (Σ_calls Σ_t l_t r_tᵀ)² for l (n, t, a) and r (n, t, b): (a, b)."""
    # A head's logits may be wider or narrower than what it reads.
    total = sum(left.mT @ right.to(left.dtype) for left, right in pairs)
    return cast("Tensor", total).square().sum(0)
