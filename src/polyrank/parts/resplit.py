"""How much of each weight a task may change, and what happens to it between tasks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import Boundary, Figure, Layer, Site, Workshop
from polyrank.layers.views import View
from polyrank.parts.decompose import leading
from polyrank.parts.settle import narrow
from polyrank.parts.subspaces import Inner, Protecting, Tail, nest

SCHEDULES = ("fixed", "progressive", "rising", "adaptive")
UNSURE = ("refuse", "uniform")
# Directions of each update that are remembered, for the picture of what protects them.
REMEMBERED = 8


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The frozen rank k of a matrix with m singular values in task t, from 0; always 1 <= k <= m.

    "fixed": k itself, or ⌊share · m⌋; "progressive": ⌊t m / tasks⌋; "rising": ⌊rise (t + 1) m⌋, or
    of the larger width; "adaptive": round(ratio · m), the ratio a layer's own.

    Attributes:
        share: k as an int, or k / m.
        capped: whether at least one direction stays free.
        tasks: of the whole stream.
        mrr, trr: the least and the target ratio, 0 <= mrr <= trr <= 1.
        longer: whether "rising" counts the larger width.
    """

    schedule: str
    share: float | int = 0.5
    capped: bool = False
    tasks: int = 0
    rise: float = 0.0
    longer: bool = False
    mrr: float = 0.1
    trr: float = 0.8

    def rank(self, site: Site, task: int, ratio: float | None = None) -> int:
        """Return k; `ratio` is the layer's own, None where nothing was measured: then trr."""
        m = min(site.d_in, site.d_out)
        if self.schedule == "fixed":
            k = self.share if isinstance(self.share, int) else _floor(self.share * m)
        elif self.schedule == "progressive":
            # Behind the last task another split is made, which nobody trains.
            k = min(task, self.tasks - 1) * m // self.tasks
        elif self.schedule == "rising":
            width = max(site.d_in, site.d_out) if self.longer else m
            k = _floor(self.rise * (task + 1) * width)
        else:
            k = round((self.trr if ratio is None else ratio) * m)
        return max(1, min(k, m - self.capped))

    def ratios(self, importance: Mapping[str, float]) -> dict[str, float]:
        """Return mrr + Ĩ (trr − mrr) by layer, Ĩ = I / (mean I + 1e-8), whose mean is trr.

        Raises:
            RunError: if the mean is not positive, so that Ĩ would turn over or explode.
        """
        mean = math.fsum(importance.values()) / len(importance)
        if not (math.isfinite(mean) and mean > 0):
            raise RunError(
                f"importance: its mean over {len(importance)} layers is {mean:.3g}, expected a "
                "number > 0 to divide by; go on with unsure='uniform', which retains trr "
                "everywhere then, or with another schedule"
            )
        gain = self.trr - self.mrr
        return {path: self.mrr + I / (mean + 1e-8) * gain for path, I in importance.items()}


def share_problems(schedule: str, share: Any, free: Any) -> Iterator[str]:
    """Say what is wrong with a frozen share (or rank) and a free share, both of "fixed"."""
    whole = isinstance(share, numbers.Integral) and not isinstance(share, bool)
    if share is not None and not (whole and share >= 1) and not _part(share):
        yield (
            f"effective_rank: got {share!r}, expected an integer >= 1 or a share in (0, 1]; "
            "to freeze nothing use the method 'full'"
        )
    if free is not None and (not _part(free) or free == 1):
        yield f"unfreeze_rank_ratio: got {free!r}, expected a share in (0, 1); 0.25 is common"
    if share is not None and free is not None:
        yield "effective_rank: given beside unfreeze_rank_ratio, which says the same; drop one"
    if schedule != "fixed" and (share is not None or free is not None):
        yield f"effective_rank: got it with schedule={schedule!r}; it is read by 'fixed'"


def _part(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral))
    return real and 0 < value <= 1


def _floor(value: float) -> int:
    """Return the integer below, forgiving what rounding took away from a whole number."""
    return math.floor(value + 1e-9)


class Alike:
    """Sums cos(x, y) over tokens for layers, of the first m coordinates of input and output.

    y is what the adapted layer answers, without its bias; padding is left out.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, layer: View, x: Tensor, y: Tensor) -> None:
        """Take one pass: x (…, d_in), and y (…, d_out) of the base layer."""
        flow, bias = layer.module.flow, layer.module.base_bias()
        y = layer.add(y if bias is None else y - bias, x, flow)
        mask = flow.tokens(layer.site.masks, x.shape[:-1])
        m = min(x.shape[-1], y.shape[-1])
        found = cosines(x[..., :m], y[..., :m])
        found = found.flatten() if mask is None else found[mask.bool()]
        path = layer.site.path
        self.totals[path] = self.totals.get(path, 0.0) + found.sum(dtype=torch.float64)
        self.counts[path] = self.counts.get(path, 0) + found.numel()

    def means(self) -> dict[str, float]:
        """Return the mean over all tokens, by path."""
        return {path: float(total) / self.counts[path] for path, total in self.totals.items()}


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return x·y / ((‖x‖ + 1e-8)(‖y‖ + 1e-8)) over the last axis, in fp32 at least."""
    x, y = x.double(), y.double()
    sizes = [torch.linalg.vector_norm(v, dim=-1) + 1e-8 for v in (x, y)]
    return (x * y).sum(-1) / (sizes[0] * sizes[1])


def measure(workshop: Workshop, role: str, rows: int) -> dict[str, float]:
    """Return the importance of every adapted layer on rows of the task that has just ended."""
    alike, layers = Alike(), {v.site.path: cast("View", v) for v in workshop.adapter.layers}
    seed = int(torch.randint(2**31, (), generator=workshop.rng("importance")))

    def seen(path: str, found: dict[str, Tensor]) -> None:
        alike(layers[path], found["input"], found["output"])

    batches = _limited(workshop.data(role, seed=seed), rows)
    workshop.observe(batches, "linear", frozenset({"input", "output"}), seen)
    means = alike.means()
    if unseen := sorted(layers.keys() - means.keys()):
        raise ConfigError(
            f"importance: no token passes {unseen[0]} and {len(unseen) - 1} more layers; leave "
            "them out with exclude_modules"
        )
    return means


def _limited(batches: Iterable[dict[str, Any]], rows: int) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if rows <= 0:
            return
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        keep = min(size, rows)
        rows -= keep
        yield {
            k: v[:keep] if isinstance(v, Tensor) and v.dim() and len(v) == size else v
            for k, v in batch.items()
        }


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
        """
        layers = workshop.adapter.layers
        for view in (cast("View", layer) for layer in layers):
            for name, other in view.module.views.items():
                if name != view.name and isinstance(other.core, (Protecting, Inner)):
                    raise ConfigError(
                        f"{self.name}: adapter {name!r} has split the weight at {view.site.path} "
                        "too, and what one of them learns moves what the other protects; delete "
                        "one with delete_adapter"
                    )
        if narrow(workshop.adapter) and not self.lossy:
            raise MergeError(
                f"{self.name}: adds updates to base weights, and some are stored below fp32, where "
                "rounding loses a part of every update; load the base in fp32, or allow the loss "
                "by lossy=True"
            )
        memory = workshop.memory(self.name)
        number = len(memory.setdefault("tasks", []))
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
        """Measure, absorb, split anew, and note what the new split protects."""
        memory, layers = workshop.memory(self.name), workshop.adapter.layers
        number = len(memory["tasks"])
        ratios: Mapping[str, float] = {}
        if self.retention.schedule == "adaptive":
            role = "train" if task is None or "train" in task.data else "text"
            importance = measure(workshop, role, self.rows)
            memory.setdefault("importance", []).append(importance)
            ratios = self._ratios(importance)
        memory["tasks"].append(str(getattr(task, "name", f"task {number}")))
        retained = {v.site.path: min(v.site.d_in, v.site.d_out) - v.site.r for v in layers}
        memory.setdefault("retained", []).append(retained)
        memory.setdefault("directions", []).append(_directions(workshop))
        ranks = {}
        for site in (layer.site for layer in layers):
            k = self.retention.rank(site, number + 1, ratios.get(site.path))
            free = min(site.d_in, site.d_out) - k
            ranks[site.path] = min(free, site.r) if self.nested else free
        protected = _protected(workshop, ranks) if self.nested else {}
        archive = "folded" if self.archive else False
        workshop.absorb(lossy=self.lossy, archive=archive, ranks=ranks)
        for layer in workshop.adapter.layers if self.nested else ():
            nest(layer, *protected[layer.site.path])
        shares = [_shares(workshop.adapter.layers, held) for held in memory["directions"]]
        memory.setdefault("protected", []).append(shares)

    def _ratios(self, importance: Mapping[str, float]) -> Mapping[str, float]:
        try:
            return self.retention.ratios(importance)
        except RunError:
            if self.unsure == "refuse":
                raise
            return {}

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


def _protected(workshop: Workshop, ranks: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer what was protected, and as many directions of the update as join it."""
    found = {}
    for layer in workshop.adapter.layers:
        core, path = cast("Tail", layer.core), layer.site.path
        assert core.high_u is not None
        assert core.high_v is not None
        more = layer.site.r - ranks[path]
        # Copies: the weight's own split is written over them first.
        U, V = core.high_u.detach().clone(), core.high_v.detach().clone()
        if more:
            rng = workshop.rng(f"nested/{path}")
            delta = cast("View", layer).delta()
            u, _, v = leading(delta, more, rng, width=2 * more)
            U, V = torch.cat([U, u.to(U)], 1), torch.cat([V, v.to(V)])
        found[path] = U, V
    return found


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
