"""Replicas: frozen copies of an adapter under names that a view can show."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import torch
from torch import nn

from polyrank.errors import ConfigError
from polyrank.frame import Head
from polyrank.layers.adapter import adapter_of
from polyrank.layers.hosts import HeadHost
from polyrank.layers.structure import config_of, note


def replica(model: nn.Module, name: str, *, adapter: str | None = None) -> None:
    """Keep a frozen copy of the adapter's factors under a name that `view(model, name)` shows.

    Raises:
        ConfigError: for a name that could not be saved or shown, or an adapter with blocks.
    """
    found = adapter_of(model, adapter)
    if found.blocks:
        raise ConfigError(
            f"replica: adapter {found.name!r} holds blocks, which cannot be kept twice; "
            "use a strategy without a teacher or an average"
        )
    taken = {"", "base", *cast("Any", model).peft_config, *dir(nn.ModuleDict)}
    if not re.fullmatch(r"[A-Za-z0-9_-]*", name) or name in taken:
        raise ConfigError(
            f"replica: got name {name!r}, expected letters, digits, '_' and '-', and neither "
            "'base' nor the name of an adapter; choose another, for example 'slow'"
        )
    for view in found.layers:
        view.module.replicate(found.name, name)
        note(model, view)
    for host in (h for h in found.hosts if isinstance(h, HeadHost)):
        host.replicate(found.name, name)
        _note_heads(model, host, found.name)


def extend(model: nn.Module, name: str, *, adapter: str | None = None) -> None:
    """Give a replica's head copies of the rows that the live head has gained since.

    Raises:
        ConfigError: if the adapter keeps no such replica.
    """
    found = adapter_of(model, adapter)
    for host in (h for h in found.hosts if isinstance(h, HeadHost)):
        old, live = host.copy_of(found.name, name), cast("Head", host.owned[found.name])
        fresh = copy.deepcopy(live)
        with torch.no_grad():
            for kept, param in zip(old.parameters(), fresh.parameters(), strict=True):
                param[: len(kept)] = kept
        host.hold(found.name, name, fresh)
        _note_heads(model, host, found.name)


def _note_heads(model: nn.Module, host: HeadHost, name: str) -> None:
    held = config_of(model, name).head
    assert held is not None
    held["replicas"] = {k: list(head.names) for k, head in sorted(host.copies(name).items())}
