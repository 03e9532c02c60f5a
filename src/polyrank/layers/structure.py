"""Structural verbs: the only functions that change shapes or base weights. No optimiser may exist while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Head, Site, keyed
from polyrank.layers.adapter import adapter_of
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.hosts import HeadHost
from polyrank.layers.linear import AdaptedLinear, Factor, Frozen, View


def config_of(model: nn.Module, name: str) -> PolyrankConfig:
    """Return the saved configuration of one adapter."""
    return cast("PolyrankConfig", cast("Any", model).peft_config[name])


def _note(model: nn.Module, name: str, view: View) -> dict[str, Any]:
    return config_of(model, name).sites.setdefault(view.site.path, {})


def grow_head(
    model: nn.Module, names: Sequence[str], *, adapter: str | None = None, seed: int = 0
) -> None:
    """Append classes to the head of an adapter; old rows stay bit-identical and the config learns the names.

    Raises:
        ConfigError: if the adapter has no head, or a class is already there.
    """
    found = adapter_of(model, adapter)
    host = next((h for h in found.hosts if isinstance(h, HeadHost)), None)
    if host is None:
        raise ConfigError(
            f"head: adapter {found.name!r} has none; "
            'make it with polyrank.adapt(model, method, head="classifier")'
        )
    head = cast("Head", host.owned[found.name])
    head.grow(names, keyed(seed, found.name, "head", len(head.names)))
    host.set_adapter(host.active_adapters)
    held = config_of(model, found.name).head
    assert held is not None
    held["names"] = list(head.names)


def append(
    model: nn.Module, r: int | None = None, *, adapter: str | None = None, seed: int = 0
) -> None:
    """Freeze the live ranks into the bank and give every layer r fresh ones (None: as many as before)."""
    found = adapter_of(model, adapter)
    for view in found.layers:
        layer = view.module
        A, B, core, _ = view.factors(layer.flow)
        ranks = view.A.shape[0] if r is None else r
        if core.widths[0] != core.widths[1]:
            raise ConfigError(
                f"append: the core {type(core).__name__} maps {core.widths[0]} to {core.widths[1]} ranks, "
                "and a bank needs as many rows of A as columns of B; use absorb instead"
            )
        layer.polyrank_bank[found.name] = Frozen(A.detach().clone(), B.detach().clone())
        site = view.site if r is None else _resized(view, ranks)
        view.site = site
        layer.polyrank_A[found.name] = Factor(ranks, site.d_in).to(A.device)
        layer.polyrank_B[found.name] = Factor(site.d_out, ranks).to(B.device)
        core.banked(A.shape[0])
        layer.fill(found.name, seed, "append", A.shape[0])
        _note(model, found.name, view).update(bank=A.shape[0], r=ranks, scale=view.scale)
        layer.set_adapter(layer.active_adapters)


def _resized(view: View, r: int) -> Site:
    return replace(view.site, r=r)


def redraw(
    model: nn.Module, *, adapter: str | None = None, seed: int = 0, key: str = "redraw"
) -> None:
    """Write fresh starting values into the live factors and cores, keyed by (seed, adapter, path, key)."""
    found = adapter_of(model, adapter)
    for view in found.layers:
        view.module.fill(found.name, seed, key)


def absorb(
    model: nn.Module, *, adapter: str | None = None, lossy: bool = False, seed: int = 0
) -> None:
    """Add the adapter's update to the base weights and redraw it.

    Args:
        model: a PEFT model with a polyrank adapter.
        adapter: its name; None is the active one.
        lossy: go on although the base is stored below fp32, where a part of every update is rounded away.
        seed: key of the new starting values.

    Raises:
        MergeError: if the update depends on the token, the base is quantised, or rounding would lose some of it
            and `lossy` is False; before anything changes.
    """
    found = adapter_of(model, adapter)
    updates: list[tuple[AdaptedLinear, Tensor]] = []
    lost = total = 0.0
    for view in found.layers:
        delta = view.delta()
        weight = view.module.dense_weight()
        delta = delta.T if view.module.transposed else delta
        merged = (weight.detach().float() + delta).to(weight.dtype)
        lost += float((merged.float() - weight.detach().float() - delta).square().sum())
        total += float(delta.square().sum())
        updates.append((view.module, merged))
    share = (lost / total) ** 0.5 if total else 0.0
    below = any(
        layer.dense_weight().dtype in (torch.bfloat16, torch.float16) for layer, _ in updates
    )
    if below and not lossy:
        raise MergeError(
            f"absorb: the base is stored below fp32, and rounding would lose {share:.1%} of the update; "
            "use a frozen bank (append), load the base in fp32, or pass lossy=True"
        )
    for layer, merged in updates:
        layer.dense_weight().data = merged
    redraw(model, adapter=found.name, seed=seed, key="absorb")


def keep(model: nn.Module, view: View, ranks: Tensor) -> None:
    """Keep some live ranks of one layer, in the given order, by the axes that its core declares.

    Args:
        model: the PEFT model, whose config learns the new rank.
        view: the layer.
        ranks: (n,) int64 indices into the live ranks, 1 <= n.
    """
    core, layer, name = view.core, view.module, view.name
    if core.widths != (view.A.shape[0], view.A.shape[0]):
        raise ConfigError(
            f"keep: the core {type(core).__name__} maps {core.widths}, and ranks can be kept one by one only "
            "where A's rows and B's columns correspond"
        )
    ranks = ranks.to(view.A.device)
    with torch.no_grad():
        A, B = view.A[ranks].clone(), view.B[:, ranks].clone()
        fresh = view.method.core(_resized(view, len(ranks))).to(A.device)
        held = dict(core.named_parameters())
        for key, param in fresh.named_parameters():
            value = held[key]
            for axis, meaning in enumerate(core.axes.get(key, ())):
                value = value.index_select(axis, ranks) if meaning == "rank" else value
            param.copy_(value)
        view.site = _resized(view, len(ranks))
        layer.polyrank_A[name] = Factor(*A.shape).to(A.device)
        layer.polyrank_B[name] = Factor(*B.shape).to(B.device)
        view.A.copy_(A)
        view.B.copy_(B)
        layer.polyrank_core[name] = fresh.train(core.training)
    _note(model, name, view).update(r=len(ranks), scale=view.scale)
    layer.set_adapter(layer.active_adapters)


def replica(model: nn.Module, name: str, *, adapter: str | None = None) -> None:
    """Keep a frozen copy of the adapter's factors under a name that `view(model, name)` shows."""
    found = adapter_of(model, adapter)
    for view in found.layers:
        view.module.replicate(found.name, name)
        note = _note(model, found.name, view)
        note["replicas"] = sorted({*note.get("replicas", ()), name})
