"""One of an adapter's nested ranks: set, shown inside a block, evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

from torch import nn

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Adapter, Boundary, Saved, Workshop
from polyrank.layers import ModelAdapter, View, adapter_of
from polyrank.layers.structure import note
from polyrank.parts.prefix import Prefix, checked_rank, prefixes
from polyrank.parts.transforms import plain_lora


def set_rank(model: nn.Module, rank: int, *, adapter: str | None = None) -> None:
    """Let an adapter with nested ranks act with its first `rank` ranks; saved with it.

    The other ranks stay where they are, and a training update still draws its own.

    Args:
        model: a PEFT model with such an adapter.
        rank: within the bounds that it was trained for.
        adapter: its name; None is the active one.

    Raises:
        ConfigError: for another number, or an adapter without nested ranks.
        MergeError: if the adapter is merged, at the rank that it has now.
    """
    found = _one(model, adapter)
    _choose(found, rank)
    _note(model, found)


@contextmanager
def at_rank(model: nn.Module, rank: int, *, adapter: str | None = None) -> Iterator[None]:
    """Let an adapter act with its first `rank` ranks inside the block; what is saved there too.

    Args:
        model: a PEFT model with nested ranks.
        rank: within the bounds that it was trained for.
        adapter: its name; None is the active one.

    Raises:
        ConfigError: for another number, or an adapter without nested ranks.
        MergeError: if the adapter is merged, or the block leaves it so; it stays at that rank then.

    >>> with polyrank.at_rank(model, 2):  # doctest: +SKIP
    ...     model.save_pretrained("small")
    """
    found = _one(model, adapter)
    with shown(found, rank):
        _note(model, found)
        yield
    _note(model, found)


def _one(model: nn.Module, name: str | None) -> ModelAdapter:
    found = adapter_of(model, name)
    active = sorted({n for view in found.layers for n in view.module.active_adapters})
    if name is None and len(active) > 1:
        raise ConfigError(
            f"adapters {active} are all active, and a rank is set for one of them; name it with "
            "adapter=..."
        )
    return found


def _note(model: nn.Module, adapter: ModelAdapter) -> None:
    for view in adapter.layers:
        note(model, view)


def _choose(adapter: Adapter, rank: int) -> None:
    name = cast("ModelAdapter", adapter).name
    first = prefixes(adapter)[0]
    views = [cast("View", layer) for layer in adapter.layers]
    if any(name in view.module.merged_adapters for view in views):
        raise MergeError(
            f"rank: adapter {name!r} is merged at rank {first.rank}, and taking it out "
            "again needs that one; call unmerge_adapter() first"
        )
    rank = checked_rank(rank, first.least, first.most)
    for view in views:
        # Views of the past act at the same rank, if they have as many.
        for core in cast("list[Prefix]", view.module.cores(view.name)):
            core.choose(min(rank, core.most))


@contextmanager
def shown(adapter: Adapter, rank: int) -> Iterator[None]:
    """Let an adapter act with its first `rank` ranks inside the block, while nothing is saved."""
    before = prefixes(adapter)[0].rank
    _choose(adapter, rank)
    try:
        yield
    finally:
        _choose(adapter, before)


class Nested(Boundary):
    """Exports an adapter with nested ranks at some of them, after the last task.

    Args:
        exported: ranks, each of which gives a plain LoRA.
    """

    def __init__(self, exported: Sequence[int] = ()) -> None:
        self.exported = exported

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return one plain LoRA a rank."""
        found = {}
        for b in self.exported:
            with shown(workshop.adapter, b):
                found[f"rank-{b}"] = plain_lora(workshop.saved())
        return found


class Several(Nested):
    """Evaluates an adapter with nested ranks at several of them.

    Args:
        evaluated: ranks, the adapter's own first.
        exported: as in `Nested`.
    """

    def __init__(self, evaluated: Sequence[int], exported: Sequence[int] = ()) -> None:
        super().__init__(exported)
        self.evaluated = evaluated

    def deploys(self, workshop: Workshop) -> dict[str, AbstractContextManager[Any]]:
        """Return one model a rank."""
        return {f"rank {b}": shown(workshop.adapter, b) for b in self.evaluated}


def nested(top: int, evaluated: Iterable[int], exported: Sequence[int]) -> Nested:
    """Return the boundary that evaluates `top` and then the others, and exports some ranks."""
    others = sorted({*evaluated} - {top})
    return Several([top, *others], exported) if others else Nested(exported)
