"""Looks into a model: what is declared, what moved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn

from polyrank.frame import Block, Core, keyed
from polyrank.layers import adapter_of


def declared(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that the method declares as trained, by name."""
    ids = {id(p) for params in adapter_of(model).roles().values() for p in params}
    return {name: p for name, p in model.named_parameters() if id(p) in ids}


def stateful(model: PeftModel) -> set[str]:
    """Names of what a core or a block keeps beside its trained weights, and rules may move."""
    found = adapter_of(model)
    parts: list[Core | Block] = [*(layer.core for layer in found.layers), *found.blocks]
    ids = {id(p) for part in parts for n, p in part.named_parameters() if n in part.frozen}
    return {name for name, p in model.named_parameters() if id(p) in ids}


def unreached(model: PeftModel) -> set[str]:
    """Names of trained weights of blocks that the model's own loss teaches nothing."""
    ids = {
        id(p)
        for block in adapter_of(model).blocks
        for n, p in block.named_parameters()
        if n in block.unreached
    }
    return {name for name, p in model.named_parameters() if id(p) in ids}


def ids(params: Iterable[nn.Parameter]) -> set[int]:
    """Return the identities of parameters."""
    return {id(p) for p in params}


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers by name."""
    return {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have the same dtype and values."""
    return a.dtype == b.dtype and torch.equal(a, b)


def assert_unmoved(before: dict[str, Tensor], after: dict[str, Tensor], what: str) -> None:
    """Raise an AssertionError if a tensor that stands in both differs."""
    moved = [n for n in before.keys() & after.keys() if not same(before[n], after[n])]
    assert not moved, f"{what} moved {sorted(moved)[:5]}"


def difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """Say which names are too much and which are missing."""
    more, less = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    return f"{more[:3]} too much, {less[:3]} missing"


def nudge(model: PeftModel) -> None:
    """Move every trained weight a little, so that nothing of interest is zero."""
    rng = keyed("nudge")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad:
                step = torch.randn(param.shape, generator=rng) * 0.1
                # Kept away from zero: a gate of zero hides its rank.
                param.add_(step if ".polyrank_core." not in name else step.abs())
