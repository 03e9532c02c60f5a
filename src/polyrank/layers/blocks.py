"""The structural verb of blocks: they change their shapes, and the config learns of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from polyrank.frame import Block
from polyrank.layers.adapter import ModelAdapter
from polyrank.layers.hosts import BlockHost
from polyrank.layers.structure import config_of, unattached


def block_shapes(found: ModelAdapter) -> dict[str, dict[str, Any]]:
    """Return what a fresh process needs to rebuild the blocks of one adapter, by add point."""
    hosts = [host for host in found.hosts if isinstance(host, BlockHost)]
    told = {h.place(found.name): cast("Block", h.owned[found.name]).settings() for h in hosts}
    return {place: {"block": settings} for place, settings in told.items() if settings}


@contextmanager
def reshaped(model: nn.Module, *, adapter: str | None = None) -> Iterator[list[Block]]:
    """Let the blocks of an adapter change inside: parts come, parts go, parts freeze.

    Afterwards new parts are where their host is, what is declared as trained is trainable if
    anything of the adapter was, and the config holds what `Block.settings` says; an error inside
    keeps what had changed before it, and the adapter can still be saved.

    Args:
        model: a PEFT model with a polyrank adapter.
        adapter: its name; None is the active one.

    Raises:
        ConfigError: if an optimiser is attached.
    """
    found = unattached(model, adapter, "reshaped")
    hosts = [host for host in found.hosts if isinstance(host, BlockHost)]
    trained = bool(found.trained())
    try:
        yield found.blocks
    finally:
        for host in hosts:
            block = host.owned[found.name]
            host._move_adapter_to_device_of_base_layer(found.name)
            block.train(block.training)
            host.set_requires_grad(found.name, trained)
        sites = config_of(model, found.name).sites
        for host in hosts:
            sites.pop(host.place(found.name), None)
        sites.update(block_shapes(found))
