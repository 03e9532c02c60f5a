"""Values of a bank that can no longer matter are dropped; their keys stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from polyrank.errors import ConfigError
from polyrank.layers.adapter import adapter_of
from polyrank.layers.structure import note
from polyrank.layers.views import Frozen, View


class Compaction(NamedTuple):
    """What was found in one layer.

    Attributes:
        path: of the layer.
        ranks: in its bank.
        silent: of them, those without a value.
        unreachable: of the others, those that no input makes act in evaluation.
    """

    path: str
    ranks: int
    silent: int
    unreachable: int


@torch.no_grad()
def compact(
    model: nn.Module, *, adapter: str | None = None, evaluation: bool = False
) -> list[Compaction]:
    """Drop the columns of B of frozen ranks that can no longer matter; all keys stay.

    A rank whose column is zero adds nothing and still takes part in norm, selection and softmax.
    Such ranks move to the front of the bank, and B lacks their columns from then on. The answers
    are the same up to the order of sums, in training too.

    Args:
        model: a PEFT model with a polyrank adapter.
        adapter: its name; None is the active one.
        evaluation: also drop what the core can prove to be silent in evaluation, whatever the
            input. Training reads those values, so it is refused from then on, as growing is. The
            proof is about keys as they are: under autocast, which rounds them to 16 bits, a rank
            may be reached that is not in fp32.

    Returns:
        What was found, one entry for every layer.

    Raises:
        ConfigError: if a core's ranks do not compete, replicas still read the bank, or with
            `evaluation` the base or the adapter is stored in 16 bits; before anything changes.
    """
    found = adapter_of(model, adapter)
    for view in found.layers:
        if not view.core.competing:
            raise ConfigError(
                f"compact: the core {type(view.core).__name__} at {view.site.path} reads ranks "
                "independently of each other, so there is no key to keep; drop them with keep"
            )
        if view.name in view.module.polyrank_replica:
            raise ConfigError(
                f"compact: adapter {view.name!r} keeps replicas that show its bank as it is; "
                "delete them first"
            )
        if evaluation and (narrow := _narrow(view)) is not None:
            raise ConfigError(
                f"compact: the layer at {view.site.path} is stored in {narrow}, which rounds keys, "
                "so that nothing tells which ranks it leaves out of reach; pass evaluation=False, "
                "or load the model in fp32"
            )
    return [_compacted(model, view, evaluation) for view in found.layers]


def _narrow(view: View) -> torch.dtype | None:
    """Return the dtype below fp32 in which inputs may meet a layer's keys, or None."""
    bank = view.bank
    keys = [view.A, *([] if bank is None else bank[:1])]
    held = [*view.module.base_layer.parameters(), *keys]
    return next((t.dtype for t in held if t.is_floating_point() and t.itemsize < 4), None)


def _compacted(model: nn.Module, view: View, evaluation: bool) -> Compaction:
    bank = view.bank
    if bank is None:
        return Compaction(view.site.path, 0, 0, 0)
    A, B = (part.detach() for part in bank)
    ranks, dropped = A.shape[0], A.shape[0] - B.shape[1]
    silent = torch.ones(ranks, dtype=torch.bool, device=A.device)
    silent[dropped:] = ~B.any(0)
    mute = silent.clone()
    if evaluation:
        mute |= view.core.unreachable(torch.cat([A, view.A.detach()]))[:ranks]
    if not mute[dropped:].any():
        return Compaction(view.site.path, ranks, dropped, 0)
    order = torch.cat([mute.nonzero().squeeze(1), (~mute).nonzero().squeeze(1)])
    owners = view.owners
    view.order = [owners[n] for n in order.tolist()]
    values = (~mute).nonzero().squeeze(1) - dropped
    held = Frozen(A[order].clone(), B[:, values].clone())
    view.module.polyrank_bank[view.name] = held
    count = int(silent.sum())
    unreachable = int(mute.sum()) - count
    view.evaluating |= unreachable > 0
    note(model, view)
    return Compaction(view.site.path, ranks, count, unreachable)
