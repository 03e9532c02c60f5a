"""Starts that come from data: written once what they want was gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from polyrank.errors import ConfigError, RunError
from polyrank.frame import Init
from polyrank.layers.adapter import ModelAdapter, adapter_of
from polyrank.layers.precision import exact
from polyrank.layers.root import hook_of
from polyrank.layers.statistics import SEEN, Loss, Stats, agreed, gather, processes
from polyrank.layers.structure import config_of, note
from polyrank.layers.views import View


def initialise(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    adapter: str | None = None,
    rate: float | None = None,
    seed: int | None = None,
    key: str = "start",
) -> None:
    """Gather what the start of an adapter's method wants, and write its starting values.

    To be called before the optimiser is made, and on every process of a distributed run with its
    own batches. Modes, hooks, gradients, requires_grad and random generators are put back.

    Args:
        model: the adapted model.
        batches: what `loss` takes; by default keyword arguments of the model, labels among them.
        loss: maps (model, batch) to the mean loss of the batch, or to that and the number of terms
            it is the mean of; by default `model(**batch).loss`, whose terms are the rows, or the
            labels of a text that are not -100: those behind the first token, unless the model is
            known to label tokens at their own place. All terms count alike, so that a long text
            counts more than a short one.
        adapter: its name; None is the active one.
        rate: learning rate of the first update, for starts that take a step of that size.
        seed: key of the starting values; None is that of the adapter.
        key: word that makes these starting values differ from others of the same seed.

    Raises:
        ConfigError: if the method starts without statistics, has started already, is attached to an
            optimiser, is merged, or is not the one that acts; or if a layer got no gradient, a zero
            one, or one that is not finite.
        RunError: on all other processes, if one of them stopped.

    >>> polyrank.initialise(model, batches)  # doctest: +SKIP
    """
    found = adapter_of(model, adapter)
    start = found.method.starting()
    device = found.layers[0].A.device
    with agreed(device):
        if problems := list(_problems(model, found, start, rate)):
            raise ConfigError(problems)
    chosen = config_of(model, found.name).seed if seed is None else seed
    chosen = torch.initial_seed() if chosen is None else chosen
    stats: Stats = {view.site.path: {} for view in found.layers}
    if start.wants & SEEN:
        stats = gather(
            model, batches, loss, start, adapter=found.name, draw=(chosen, found.name, key)
        )
    _write(model, found, stats, rate, (chosen, key))
    if (hook := hook_of(model)) is not None:
        # The weights changed, and no optimiser did it.
        hook.seen.pop(found.name, None)


def _write(
    model: nn.Module, found: ModelAdapter, stats: Stats, rate: float | None, draw: tuple[int, str]
) -> None:
    """Write the starting values of all layers, the same on all processes."""
    wants = found.method.starting().wants
    device = found.layers[0].A.device
    try:
        with agreed(device), exact(device.type):
            for view in reversed(found.layers):
                # What a layer was made of goes at once. The first one is watched, and so is written
                # last: a start that fails half-way does not train.
                stat = stats.pop(view.site.path)
                if "weight" in wants:
                    stat["weight"] = view.weight()
                if rate is not None:
                    stat["rate"] = torch.tensor(rate, dtype=torch.float64)
                view.module.fill(found.name, *draw, stat=stat)
                note(model, view)
    except RunError:
        found.layers[0].waiting = True
        raise
    for view in found.layers:
        _broadcast(view)


def _problems(
    model: nn.Module, found: ModelAdapter, start: Init, rate: float | None
) -> Iterator[str]:
    if not start.wants:
        yield (
            f"initialise: {found.method.name!r} starts without statistics; leave the call out, or "
            "choose a method such as lora-ga"
        )
        return
    hook = hook_of(model)
    if not any(view.waiting for view in found.layers):
        yield (
            f"initialise: adapter {found.name!r} has started already, and its weights would be "
            "lost; call polyrank.layers.redraw(model) to begin anew"
        )
    if hook is not None and found.name in hook.flow.attached:
        yield (
            f"initialise: adapter {found.name!r} is attached to an optimiser; call this before "
            "the optimiser is made, or detach() first"
        )
    first = found.layers[0]
    if any(found.name in view.module.merged_adapters for view in found.layers):
        yield (
            f"initialise: adapter {found.name!r} is merged, so that its weights are in the base; "
            "call unmerge_adapter() first"
        )
    elif start.wants & SEEN and not first.acts():
        acting = ", ".join(first.module.active_adapters) or "none"
        yield (
            f"initialise: adapter {found.name!r} takes no part in a forward (active: {acting}), "
            "and statistics would be those of another model; call model.set_adapter("
            f"{found.name!r}) first"
        )
    if "rate" in start.wants and rate is None:
        yield (
            f"initialise: the start of {found.method.name!r} takes a step of the first learning "
            "rate; give it as rate=..., or set the step as an option of the method"
        )


def _broadcast(view: View) -> None:
    """Give all processes what the first one has: a decomposition may differ in signs."""
    if processes() < 2:
        return
    shadow = [] if view.shadow is None else [t for t in view.shadow if t is not None]
    for tensor in (view.A, view.B, *view.core.parameters(), *shadow):
        dist.broadcast(tensor.detach(), 0)
