"""Structural verbs: the only functions that change shapes or base weights.

No optimiser may exist while they run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import Core, Head, Site, keyed
from polyrank.layers.adapter import ModelAdapter, adapter_of
from polyrank.layers.archive import negated, settled
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.hosts import HeadHost
from polyrank.layers.shadows import cut_shadow, shadow_problems
from polyrank.layers.views import Factor, Frozen, View


def config_of(model: nn.Module, name: str) -> PolyrankConfig:
    """Return the saved configuration of one adapter."""
    return cast("PolyrankConfig", cast("Any", model).peft_config[name])


def note(model: nn.Module, view: View) -> None:
    """Write into the config what a fresh process needs to rebuild one layer."""
    config_of(model, view.name).sites[view.site.path] = view.module.shapes(view.name)


@contextmanager
def rebuilt(view: View) -> Iterator[None]:
    """Give what is made inside the device, the mode and the trainability of what stood there."""
    layer, training = view.module, view.core.training
    device, dtype = view.A.device, view.A.dtype
    trained = any(p.requires_grad for params in view.parameters().values() for p in params)
    yield
    layer.polyrank_A[view.name].to(device, dtype)
    layer.polyrank_B[view.name].to(device, dtype)
    core = layer.polyrank_core[view.name].to(device).train(training)
    if dtype == torch.float64:
        # Below it a core knows by itself what stays in fp32.
        core.to(dtype)
    layer.set_requires_grad(view.name, trained)


def unattached(model: nn.Module, adapter: str | None, verb: str) -> ModelAdapter:
    """Return an adapter whose structure may change: no optimiser is attached to it.

    Raises:
        ConfigError: if one is; it would train tensors that are no longer in the model.
    """
    found = adapter_of(model, adapter)
    if any(found.name in view.module.flow.attached for view in found.layers[:1]):
        raise ConfigError(
            f"{verb}: an optimiser is attached to adapter {found.name!r} and would go on with the "
            "old tensors; call detach() on its attachment first, and make a new optimiser"
        )
    return found


def grow_head(
    model: nn.Module, names: Sequence[str], *, adapter: str | None = None, seed: int = 0
) -> None:
    """Append classes to an adapter's head; old rows keep their bits, the config learns the names.

    Raises:
        ConfigError: if the adapter has no head, or a class is already there.
    """
    found = unattached(model, adapter, "grow_head")
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
    model: nn.Module,
    r: int | None = None,
    *,
    adapter: str | None = None,
    seed: int = 0,
    key: str = "append",
    force: bool = False,
) -> None:
    """Freeze the live ranks into the bank and give every layer r fresh ones (None: as many).

    The new starting values are keyed by (seed, adapter, path, key, ranks in the bank). The scale of
    a layer stays as it is, so that frozen ranks keep theirs.

    Args:
        model: a PEFT model with a polyrank adapter.
        r: new ranks of every layer.
        adapter: its name; None is the active one.
        seed: key of the new starting values.
        key: word that makes these starting values differ from others of the same seed.
        force: grow although the live ranks are untrained and would compete with all others.

    Raises:
        ConfigError: if a core cannot stand behind a bank, an optimiser is attached, or no layer's
            ranks have values and frozen they would compete all the same; before anything changes.
        RunError: if ranks are not finite; before anything changes.

    Warns:
        UserWarning: if some layers are like that and others not.
    """
    found = unattached(model, adapter, "append")
    if not force:
        _check_values(found)
    _check_finite(found)
    if problems := [p for view in found.layers for p in _append_problems(view)][:1]:
        raise ConfigError(problems)
    for view in found.layers:
        A, B = _whole(view)
        view.shadow = None
        site = _resized(view, view.site.r if r is None else r)
        core = view.method.core(site)
        core.banked(A.shape[0])
        with rebuilt(view):
            layer, name = view.module, view.name
            held = 0 if view.bank is None else view.bank[0].shape[0]
            if view.order is not None:
                view.order = view.owners[:held] + [len(view.segments)] * (A.shape[0] - held)
            view.segments = [*_grown(view, held), A.shape[0] - held]
            if view.archive is not None and not view.absorbed:
                # It acted as a part of the bank, and is one now.
                layer.forget(name, ("polyrank_archive",))
                view.witness = None
            layer.polyrank_bank[name] = Frozen(A.clone(), B.clone())
            view.site = site
            layer.polyrank_A[name] = Factor(core.widths[0], site.d_in)
            layer.polyrank_B[name] = Factor(site.d_out, core.widths[1])
            layer.polyrank_core[name] = core
        layer.fill(name, seed, key, A.shape[0])
        note(model, view)


def _check_values(found: ModelAdapter) -> None:
    """Refuse to freeze ranks without values that would take weight from others.

    Raises:
        ConfigError: if no layer's have any.
    """
    competing = [view for view in found.layers if view.core.competing]
    dead = [view.site.path for view in competing if not view.B.detach().any()]
    if not dead:
        return
    names = ", ".join(dead[:3]) + (", …" if len(dead) > 3 else "")
    if len(dead) == len(competing):
        raise ConfigError(
            f"append: the live ranks of adapter {found.name!r} have no values yet ({names}), and "
            "frozen like this they would only take weight from others; train them first, or pass "
            "force=True"
        )
    warnings.warn(
        f"append: at {len(dead)} of {len(competing)} layers the live ranks have no values "
        f"({names}) and will only take weight from others; see whether data reach these layers, "
        "or leave them out of the targets",
        stacklevel=3,
    )


def _check_finite(found: ModelAdapter) -> None:
    if bad := [v.site.path for v in found.layers if not _finite(v)]:
        raise RunError(
            f"append: the ranks at {bad[0]} are not finite, and frozen they would stay so; look "
            "for a diverged training run"
        )


def _whole(view: View) -> tuple[Tensor, Tensor]:
    """Return (A, B) of a layer's next bank: what is in it, the live ranks, what is subtracted."""
    A, B = settled(view)
    faded = view.core.faded(view.scale)
    live = (A, B if faded == 1 else B * faded)
    parts = [part for part in (view.bank, live, *negated(view)) if part is not None]
    A = torch.cat([part.detach() for part, _ in parts])
    return A, torch.cat([part.detach() for _, part in parts], dim=1)


def _finite(view: View) -> bool:
    tensors = [view.A, view.B, *view.core.parameters()]
    return all(bool(t.detach().isfinite().all()) for t in tensors)


def _grown(view: View, held: int) -> list[int]:
    """Return the growths of a bank; an archive that acts as a part of it is the first one."""
    archived = held - sum(view.segments)
    return [archived, *view.segments] if archived else view.segments


def _append_problems(view: View) -> Iterator[str]:
    core = view.core
    if view.evaluating:
        yield (
            f"append: adapter {view.name!r} was compacted for evaluation and cannot be trained on; "
            "grow the adapter as it was before"
        )
    if view.shadow is not None and view.name in view.module.polyrank_replica:
        yield (
            f"append: replicas of adapter {view.name!r} share its shadow, which goes into the "
            "bank; drop them before, or use absorb"
        )
    elif core.widths[0] != core.widths[1]:
        yield (
            f"append: the core {type(core).__name__} maps {core.widths[0]} to {core.widths[1]} "
            f"ranks, "
            "and a bank needs as many rows of A as columns of B; use absorb instead"
        )
    elif type(core).banked is Core.banked:
        yield (
            f"append: the core {type(core).__name__} does not define banked(ranks), so it cannot "
            "read frozen ranks before its own; use absorb, or a method made for banks"
        )


def _resized(view: View, r: int) -> Site:
    return replace(view.site, r=r)


def redraw(
    model: nn.Module, *, adapter: str | None = None, seed: int = 0, key: str = "redraw"
) -> None:
    """Write fresh starting values into factors and cores, keyed by (seed, adapter, path, key).

    Raises:
        ConfigError: if cores made from their base weights have learnt something, which this would
            throw away; before anything changes.
    """
    found = adapter_of(model, adapter)
    if learnt := [v.site.path for v in found.layers if v.core.owns and bool(v.delta().any())]:
        raise ConfigError(
            f"redraw: the split at {learnt[0]} and {len(learnt) - 1} more layers has learnt "
            "something, which a new one throws away; call layers.absorb before, or delete_adapter"
        )
    refill(model, found, seed, key)


def refill(model: nn.Module, found: ModelAdapter, seed: int, key: str) -> None:
    """Do the same, whatever there was."""
    for view in found.layers:
        view.module.fill(found.name, seed, key)
        if view.shadow is not None or view.method.starting().wants:
            note(model, view)


def keep(model: nn.Module, view: View, ranks: Tensor) -> None:
    """Keep some live ranks of one layer, in the given order, by the axes that its core declares.

    The scale of the layer stays; a factor that the core has for so many ranks goes into B. What was
    set on the core stays set.

    Args:
        model: the PEFT model, whose config learns the new rank.
        view: the layer.
        ranks: (n,) int64 indices into the live ranks, 1 <= n.

    Raises:
        ConfigError: for other numbers, ranks that the core keeps in order, or a setting of the core
            that does not fit so few; before anything changes.
    """
    unattached(model, view.name, "keep")
    _cut(model, view, ranks, view.core.settings())


def _cut(model: nn.Module, view: View, ranks: Tensor, settings: dict[str, Any]) -> None:
    """Keep some live ranks of one layer, and set on the core what `settings` says."""
    core, layer, name, r = view.core, view.module, view.name, view.A.shape[0]
    different = len(ranks) and len(ranks.unique()) == len(ranks)
    if not different or int(ranks.min()) < 0 or int(ranks.max()) >= r:
        raise ConfigError(
            f"keep: got ranks {ranks.tolist()} at {view.site.path}, expected different numbers out "
            f"of 0..{r - 1}, one at least"
        )
    if core.ordered and ranks.tolist() != list(range(len(ranks))):
        raise ConfigError(
            f"keep: the ranks of the core {type(core).__name__} are ordered, got {ranks.tolist()} "
            f"at {view.site.path}; keep the first ones, 0..{len(ranks) - 1}, or truncate the model"
        )
    if problems := shadow_problems([view]):
        raise ConfigError(problems)
    ranks = ranks.to(view.A.device)
    site, fresh, values, gain = _shortened(view, ranks)
    fresh.configure(settings)
    if view.bank is not None:
        fresh.banked(view.bank[0].shape[0])
    with torch.no_grad(), rebuilt(view):
        A, B = view.A.index_select(0, ranks), view.B.index_select(1, ranks)
        # Into the live ranks alone: bank, archive, shadow and replicas share the layer's scale.
        B = B if gain == 1 else B * gain
        cut_shadow(view, ranks, gain)
        for key, param in fresh.named_parameters():
            param.data = values[key]
        view.site = site
        layer.polyrank_A[name], layer.polyrank_B[name] = Factor(*A.shape), Factor(*B.shape)
        view.A.data, view.B.data = A, B
        layer.polyrank_core[name] = fresh
    note(model, view)


def truncate(model: nn.Module, r: int, *, adapter: str | None = None) -> None:
    """Keep the first r ranks of every layer for good; the rest and their room are gone.

    The scale of a layer stays; a factor that its core has for so many ranks goes into B. What was
    set on a core, as a rank to act at, is reset: all ranks that are left act. Replicas stay whole.

    Args:
        model: a PEFT model with a polyrank adapter.
        r: ranks of every layer, at most those of the smallest one.
        adapter: its name; None is the active one.

    Raises:
        ConfigError: if a layer has fewer ranks, or its core cannot be cut there; before anything
            changes.
        MergeError: if the adapter is merged.
    """
    found = unattached(model, adapter, "truncate")
    if any(found.name in view.module.merged_adapters for view in found.layers):
        raise MergeError(
            f"truncate: adapter {found.name!r} is merged; call unmerge_adapter() first"
        )
    least = min(view.site.r for view in found.layers)
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= least:
        raise ConfigError(f"truncate: got r={r!r}, expected an integer in 1..{least}")
    for view in found.layers:
        # A core that has no such form says so here, before any layer is cut.
        _shortened(view, torch.arange(r, device=view.A.device))
    if problems := shadow_problems(found.layers):
        raise ConfigError(problems)
    for view in found.layers:
        _cut(model, view, torch.arange(r), {})


def _shortened(view: View, ranks: Tensor) -> tuple[Site, Core, dict[str, Tensor], float]:
    """Return what one layer with some of its live ranks has, and changes nothing.

    These are its site, a fresh core, that core's parameters, and the factor on the update.

    Raises:
        ConfigError: if the core has no form for them.
    """
    core, site, r, n = view.core, _resized(view, len(ranks)), len(view.A), len(ranks)
    if core.widths != (r, r):
        raise ConfigError(
            f"keep: the core {type(core).__name__} maps {core.widths}, and ranks can be kept one "
            "by one only where A's rows and B's columns correspond"
        )
    fresh, gain = view.method.core(site), core.shortened(n)
    values = {key: _picked(core, key, param, ranks) for key, param in core.named_parameters()}
    shapes = {key: param.shape for key, param in fresh.named_parameters()}
    if fresh.widths != (n, n) or shapes != {key: value.shape for key, value in values.items()}:
        raise ConfigError(
            f"keep: got {n} of {r} ranks at {site.path}, but the core {type(core).__name__} has as "
            "many experts as its options say, none of which can go; train with fewer ranks or "
            "experts"
        )
    return site, fresh, values, gain


def _picked(core: Core, key: str, param: Tensor, ranks: Tensor) -> Tensor:
    """Return the part of a core's parameter that belongs to some ranks, by its axes."""
    value, r = param.detach(), core.widths[0]
    for axis, meaning in enumerate(core.axes.get(key, ())):
        if meaning == "rank":
            value = value.index_select(axis, ranks)
        elif meaning == "expert":
            block = r // value.shape[axis]
            experts = ranks[::block] // block
            whole = experts[:, None] * block + torch.arange(block, device=ranks.device)
            if not torch.equal(whole.flatten(), ranks):
                raise ConfigError(
                    f"keep: {key} of {type(core).__name__} weighs blocks of {block} ranks, but "
                    f"{ranks.tolist()} splits one; keep whole blocks"
                )
            value = value.index_select(axis, experts)
    return value.clone()
