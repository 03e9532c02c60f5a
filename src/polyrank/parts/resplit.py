"""What happens to split weights between tasks: importance, absorption, the next split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import Boundary, Figure, Layer, Workshop, keyed
from polyrank.layers import absorb, adapter_of
from polyrank.layers.compat import get_pattern_key
from polyrank.layers.ownership import rivals
from polyrank.layers.views import View
from polyrank.parts.decompose import leading
from polyrank.parts.importance import measure, seen_by
from polyrank.parts.retention import Retention
from polyrank.parts.settle import narrow
from polyrank.parts.subspaces import Inner, Protecting, Tail, nest

UNSURE = ("refuse", "uniform")
# Directions of each update that are remembered, for the picture of what protects them.
REMEMBERED = 8


class Resplit(Boundary):
    """After a task the base takes its update, and every weight is split anew for the next one.

    A memory keeps what was retained, and how much of each update every later split protects.

    Args:
        name: of the method, and of its memory.
        retention: says how much to keep.
        rows: that importance is measured on.
        unsure: "refuse" a mean importance that is not positive, or retain trr as for the first
            task: "uniform".
        lossy: whether a base below fp32 may round a part of the update away.
        archive: whether what the base has got is kept with the adapter too.
        nested: whether what was protected once stays so, and the leading directions of the update
            join it, in place of the largest singular triplets of the weight as it is now.
    """

    persistent = False

    def __init__(
        self,
        name: str,
        retention: Retention,
        *,
        rows: int,
        unsure: str,
        lossy: bool,
        archive: bool,
        nested: bool,
    ) -> None:
        self.nested = nested
        self.name, self.retention, self.rows, self.unsure = name, retention, rows, unsure
        self.lossy, self.archive = lossy, archive

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """See that there is something to train, and that the base can take it afterwards.

        Raises:
            MergeError: if the base is stored below fp32, and no loss was allowed.
            ConfigError: if nothing is free, more tasks come than were told, or another adapter has
                split the same weights.
            RunError: if the importance of the task before has no positive mean.
        """
        layers = workshop.adapter.layers
        if problems := [*rivals(cast("Any", layers))]:
            raise ConfigError(problems)
        if narrow(workshop.adapter) and not self.lossy:
            raise MergeError(
                f"{self.name}: adds updates to base weights, and some are stored below fp32, where "
                "rounding loses a part of every update; load the base in fp32, or allow the loss "
                "by lossy=True"
            )
        memory = workshop.memory(self.name)
        if unsure := memory.get("unsure"):
            raise RunError(unsure)
        number = len(memory.setdefault("tasks", []))
        if not number:
            # What a pattern gave a layer is its own for all tasks.
            given = {layer.site.path: layer.site.r for layer in layers}
            drawn = {layer.site.path: _free(layer, self.retention, 0) for layer in layers}
            memory["own"] = {path: r for path, r in given.items() if r != drawn[path]}
        if self.retention.schedule == "progressive" and number >= self.retention.tasks:
            raise ConfigError(
                f"tasks: got {self.retention.tasks}, but another task begins, for which all "
                "directions are frozen; give the length of the whole stream"
            )
        if not any(layer.site.r for layer in layers):
            raise ConfigError(
                f"{self.name}: all {len(layers)} layers are frozen as a whole in task "
                f"{number + 1}; retain less (effective_rank, rise, or mrr and trr)"
            )

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Measure, absorb, split anew, and note what the new split protects.

        An importance without a positive mean stops the next task, and not the end of the last one.
        """
        memory = workshop.memory(self.name)
        layers: Sequence[Layer] = workshop.adapter.layers
        number = len(memory["tasks"])
        ranks = {layer.site.path: layer.site.r for layer in layers}
        importance: Mapping[str, float] = {}
        if self.retention.schedule == "adaptive":
            role = "train" if task is None or "train" in task.data else "text"
            importance = measure(workshop, role, self.rows)
            memory.setdefault("importance", []).append(importance)
        try:
            ranks = self.ranks(layers, number, importance, memory["own"])
        except RunError as unsure:
            memory["unsure"] = str(unsure)
        memory["tasks"].append(str(getattr(task, "name", f"task {number}")))
        retained = {v.site.path: min(v.site.d_in, v.site.d_out) - v.site.r for v in layers}
        memory.setdefault("retained", []).append(retained)
        memory.setdefault("directions", []).append(_directions(workshop))

        def absorbed(ranks: Mapping[str, int]) -> Sequence[Layer]:
            archive = "folded" if self.archive else False
            workshop.absorb(lossy=self.lossy, archive=archive, ranks=ranks)
            return workshop.adapter.layers

        layers = self.split(layers, ranks, absorbed, lambda path: workshop.rng(f"nested/{path}"))
        shares = [_shares(layers, held) for held in memory["directions"]]
        memory.setdefault("protected", []).append(shares)

    def ranks(
        self,
        layers: Sequence[Layer],
        number: int,
        importance: Mapping[str, float],
        own: Mapping[str, int],
    ) -> dict[str, int]:
        """Return by layer what is free behind task `number`, from 0.

        Args:
            layers: as they are.
            number: of the task that ends.
            importance: by path, of "adaptive"; empty retains trr.
            own: free ranks that a pattern gave to layers.

        Raises:
            RunError: as `Retention.ratios`, unless the method is to go on.
        """
        ratios: Mapping[str, float] = {}
        if importance:
            try:
                ratios = self.retention.ratios(importance)
            except RunError:
                if self.unsure == "refuse":
                    raise
        found = {}
        for layer in layers:
            path, r = layer.site.path, layer.site.r
            free = own.get(path, _free(layer, self.retention, number + 1, ratios.get(path)))
            found[path] = min(free, r) if self.nested else free
        return found

    def split(
        self,
        layers: Sequence[Layer],
        ranks: Mapping[str, int],
        absorbed: Callable[[Mapping[str, int]], Sequence[Layer]],
        rng: Callable[[str], torch.Generator],
    ) -> Sequence[Layer]:
        """Let the base take the update and split it anew; return the layers as they are then.

        Args:
            layers: as they are.
            ranks: by path, what is free from now on.
            absorbed: absorbs, with these ranks, and returns the layers.
            rng: draws, by path.
        """
        pairs = {
            v.site.path: _protected(v, ranks[v.site.path], rng(v.site.path))
            for v in (layers if self.nested else ())
        }
        reasons = {layer.site.path: layer.core.unabsorbed for layer in layers}
        try:
            for layer in layers:
                layer.core.unabsorbed = ""
            layers = absorbed(ranks)
            for layer in layers if self.nested else ():
                nest(layer, *pairs[layer.site.path])
        finally:
            for layer in layers:
                layer.core.unabsorbed = reasons[layer.site.path]
        return layers

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return the retained share by layer and task, and what later splits protect."""
        memory = workshop.memory(self.name)
        names = tuple(memory.get("tasks", ()))
        if not names:
            return []
        widths = {v.site.path: min(v.site.d_in, v.site.d_out) for v in workshop.adapter.layers}
        found = [
            Figure(
                name="retained-rank",
                title="Share of the singular values that a task leaves alone",
                rows=tuple(widths),
                columns=names,
                values=tuple(
                    tuple(kept[path] / m for kept in memory["retained"])
                    for path, m in widths.items()
                ),
                unit="k / m",
            )
        ]
        for side, word in enumerate(("outputs", "inputs")):
            values = [
                tuple(
                    float(shares[row][side]) if row < len(shares) else math.nan
                    for shares in memory["protected"]
                )
                for row in range(len(names))
            ]
            found.append(
                Figure(
                    name=f"protected-{word}",
                    title=f"How far what a task learnt is protected: {word}",
                    rows=names,
                    columns=tuple(f"after {name}" for name in names),
                    values=tuple(values),
                    unit="share",
                    note=f"Of the update of a task (row), in its {REMEMBERED} leading directions: "
                    "the share that the split made after a task (column) freezes; mean over "
                    "layers. What is not frozen, later tasks may overwrite.",
                )
            )
        return found


def end_task(
    model: nn.Module,
    task: int,
    batches: Iterable[dict[str, Any]] | None = None,
    *,
    adapter: str | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """End a task in one's own loop as the engine does: measure, absorb, split anew.

    Args:
        model: the adapted model, its optimiser detached.
        task: number of the task that ends, from 0.
        batches: of what the model is called with, by keyword; "adaptive" measures on the first.
        adapter: its name; None is the active one.
        seed: key of draws.

    Returns:
        What is free in each layer from now on, by path.

    Raises:
        ConfigError: if the method does not split weights, an optimiser is attached, or importance
            is wanted and no batches are given.
        RunError: as `Retention.ratios`; before anything changes.
        MergeError: as `layers.absorb`; before anything changes.
    """
    found = adapter_of(model, adapter)
    boundary, layers = found.method.boundary(), found.layers
    if not isinstance(boundary, Resplit):
        raise ConfigError(
            f"end_task: {found.method.name!r} does not split weights; use layers.absorb"
        )
    importance: Mapping[str, float] = {}
    if boundary.retention.schedule == "adaptive":
        if batches is None:
            raise ConfigError(
                "end_task: schedule 'adaptive' measures importance, and got no batches; give some "
                "of the task that ends, as {name: tensor} for the model's call"
            )
        importance = seen_by(model, layers, batches, boundary.rows)
    pattern = cast("Any", model).peft_config[found.name].rank_pattern
    keys = {v.site.path: get_pattern_key(list(pattern), v.site.path) for v in layers}
    own = {path: pattern[key] for path, key in keys.items() if key in pattern}
    ranks = boundary.ranks(layers, task, importance, own)

    def absorbed(ranks: Mapping[str, int]) -> Sequence[Layer]:
        absorb(
            model, adapter=found.name, lossy=boundary.lossy, ranks=ranks, seed=seed,
            archive="folded" if boundary.archive else False, key=f"absorb-{task}",
        )  # fmt: skip
        return adapter_of(model, found.name).layers

    boundary.split(layers, ranks, absorbed, lambda path: keyed(seed, task, "nested", path))
    return ranks


def _free(layer: Layer, retention: Retention, task: int, ratio: float | None = None) -> int:
    site = layer.site
    return min(site.d_in, site.d_out) - retention.rank(site, task, ratio)


def _protected(layer: Layer, r: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what was protected, and as many directions of the update as join it to leave r."""
    core = cast("Tail", layer.core)
    assert core.high_u is not None
    assert core.high_v is not None
    # Copies: the weight's own split is written over them first.
    U, V = core.high_u.detach().clone(), core.high_v.detach().clone()
    if more := layer.site.r - r:
        u, _, v = leading(cast("View", layer).delta(), more, rng, width=2 * more)
        U, V = torch.cat([U, u.to(U)], 1), torch.cat([V, v.to(V)])
    return U, V


def _directions(workshop: Workshop) -> dict[str, dict[str, Tensor]]:
    """Return by layer the leading singular vectors of what the task has added, times σ."""
    found = {}
    for layer in workshop.adapter.layers:
        delta, path = cast("View", layer).delta(), layer.site.path
        count = min(REMEMBERED, *delta.shape)
        rng = workshop.rng(f"directions/{path}")
        U, S, V = leading(delta, count, rng, width=2 * count, exact=64)
        found[path] = {"u": (U * S).cpu(), "v": (V.mT * S).cpu()}
    return found


def _shares(
    layers: Iterable[Layer], held: Mapping[str, Mapping[str, Tensor]]
) -> tuple[float, float]:
    """Return the shares of remembered directions that the layers' splits freeze, as means."""
    totals: list[tuple[float, float]] = []
    for layer in layers:
        known = held[layer.site.path]
        u, v = (known[side].to(layer.A.device) for side in ("u", "v"))
        if not bool(u.any()):
            continue
        totals.append((_share(layer, u, "u"), _share(layer, v, "v")))
    if not totals:
        return math.nan, math.nan
    left, right = zip(*totals, strict=True)
    return math.fsum(left) / len(left), math.fsum(right) / len(right)


def _share(layer: Layer, P: Tensor, side: str) -> float:
    """Return ‖P_h P‖² / ‖P‖² for columns P on one side of a layer."""
    core = layer.core
    high = getattr(core, f"high_{side}") if isinstance(core, Protecting) else None
    if high is not None:
        basis: Tensor = high.detach() if side == "u" else high.detach().mT
        return float((basis.mT.to(P) @ P).square().sum() / P.square().sum())
    # What is free, or is subtracted as it was: either way nothing else can move.
    free = layer.B if side == "u" else layer.A.mT
    if not isinstance(core, Inner) and layer.shadow is not None:
        free = layer.shadow[1] if side == "u" else layer.shadow[0].mT
    return 1.0 - float((free.detach().mT.to(P) @ P).square().sum() / P.square().sum())
