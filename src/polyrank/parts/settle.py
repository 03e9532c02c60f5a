"""The end of a task with static gates: what they left goes to rest, and fresh ranks begin."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.frame import Adapter, Boundary, Figure, Layer, Saved, Workshop
from polyrank.layers import AdaptedLinear, View, absorb, adapter_of, append
from polyrank.parts.gates import FlatGates, kept_ranks
from polyrank.parts.ramp import twin_ranks
from polyrank.parts.transforms import lora_of

INTO = ("auto", "base", "bank")
_log = logging.getLogger(__name__)


class Settle(Boundary):
    """Drops ranks whose gate is 0, puts the others away at the end of the task, draws new ones.

    New ranks have B = 0, so that the answers stay; what is left after the last task then holds no
    silent ranks either. A memory keeps how many ranks each layer kept.

    Args:
        name: of the method, and of its memory.
        into: "base" adds them to the base weights, "bank" freezes them before the live ranks,
            "auto" is the base where it is stored in fp32 or above, else the bank.
        lossy: whether "base" may round some of an update away.
        archive: whether what the base has got is kept with the adapter too.
    """

    persistent = False

    def __init__(self, name: str, into: str, *, lossy: bool, archive: bool) -> None:
        self.name, self.into, self.lossy, self.archive = name, into, lossy, archive

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """See, before a task is trained, that a base which is to change can.

        Raises:
            MergeError: if it is quantised, or stored below fp32 and no loss was allowed.
        """
        if self.into != "base":
            return
        modules = {v.site.path: cast("View", v).module for v in workshop.adapter.layers}
        words = f"{self.name}: into='base' adds updates to the base weights, but"
        if bad := [path for path, module in modules.items() if module.quantised()]:
            raise MergeError(
                f"{words} {len(bad)} are quantised ({bad[0]} is the first); use into='bank', or "
                "load a dense base"
            )
        low = {p: m.dense_weight().dtype for p, m in modules.items() if not _exact(m)}
        if low and not self.lossy:
            path, dtype = next(iter(low.items()))
            raise MergeError(
                f"{words} {len(low)} are stored below fp32 ({path} in {dtype} is the first), where "
                "rounding loses a part of every update; use into='auto' or 'bank', load the base "
                "in fp32, or allow the loss by lossy=True"
            )

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Put the ranks away.

        Raises:
            RunError: if gates are not finite, or nothing was trained since the last time.
            MergeError: if the base would lose a part of the update and may not.
        """
        adapter = workshop.adapter
        counts = self.put_away(
            adapter,
            lambda: workshop.append(self.name),
            lambda: workshop.absorb(lossy=self.lossy, archive=self.archive),
        )
        memory = workshop.memory(self.name)
        number = len(memory.setdefault("tasks", []))
        memory["tasks"].append(str(getattr(task, "name", f"task {number}")))
        for key, found in zip(("kept", "twin"), counts, strict=True):
            memory.setdefault(key, []).append(found)

    def put_away(
        self, adapter: Adapter, append: Callable[[], None], absorb: Callable[[], None]
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Freeze or absorb what the gates kept; return the ranks kept, and those of twins.

        Raises:
            RunError: if gates are not finite, or nothing was trained since the last time.
            MergeError: if the base would lose a part of the update and may not.
        """
        FlatGates(adapter).check_finite()
        if not any(bool(layer.B.any()) for layer in adapter.layers):
            raise RunError(
                f"{self.name}: the end of a task was reached, but nothing has moved since the last "
                "one; train between two boundaries"
            )
        counts = kept_ranks(adapter), twin_ranks(adapter)
        if self.into == "bank" or (self.into == "auto" and narrow(adapter)):
            append()
        else:
            absorb()
        return counts

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return each task's update alone, without a head; none if the ranks were not archived."""
        memory, layers = workshop.memory(self.name), workshop.adapter.layers
        held = {layer.site.path: settled_ranks(layer) for layer in layers}
        kept = memory.get("kept", [])
        if any(sum(k[path] for k in kept) != len(A) for path, (A, _) in held.items()):
            _log.warning(
                "%s: nothing is exported, since the ranks of %d tasks were not archived",
                self.name,
                len(kept),
            )
            return {}
        config, found = workshop.saved().config, {}
        for number, (task, counts) in enumerate(zip(memory.get("tasks", []), kept, strict=True)):
            factors = {}
            for layer in layers:
                A, B = held[path := layer.site.path]
                first = sum(k[path] for k in kept[:number])
                own = slice(first, first + counts[path])
                factors[path] = (A[own].clone(), layer.scale * B[:, own])
            word = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-")
            found[f"{number + 1:02}-{word}"] = lora_of(factors, config)
        return found

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return the ranks kept by layer and task, beside those of twins without gradients."""
        memory = workshop.memory(self.name)
        if not memory.get("tasks"):
            return []
        paths = list(memory["kept"][0])
        pairs = list(zip(memory["kept"], memory["twin"], strict=True))
        values = [tuple(float(k[p]) for pair in pairs for k in pair) for p in paths]
        mean = tuple(sum(column) / len(paths) for column in zip(*values, strict=True))
        columns = [f"{task}{word}" for task in memory["tasks"] for word in ("", ", drawn")]
        return [
            Figure(
                name="kept-ranks",
                title="Ranks that the gates kept",
                rows=(*paths, "mean"),
                columns=tuple(columns),
                values=(*values, mean),
                unit="ranks",
                note="Beside each task: what its drawn gates would have kept under the same "
                "thresholds without any gradient (drawn).",
            )
        ]


def settle(
    model: nn.Module, *, task: int, adapter: str | None = None, seed: int = 0
) -> dict[str, int]:
    """End a task in one's own loop: silent ranks go, the others are put away, new ones are drawn.

    Where to, and whether a copy is archived, are options of the method (`into`, `lossy`,
    `archive`). No optimiser may exist, nor an attachment; the next task makes its own ones.

    Args:
        model: the adapted model.
        task: number of the task that ends; each one draws other gates.
        adapter: its name; None is the active one.
        seed: key of the new starting values.

    Returns:
        How many ranks each layer kept, by site path.

    Raises:
        ConfigError: if the method ends its tasks otherwise, or the adapter is still attached.
        RunError: if gates are not finite, or nothing was trained since the last time.
        MergeError: if the base cannot take the update, or would lose some of it and may not.

    >>> attached.detach()  # doctest: +SKIP
    >>> polyrank.settle(model, task=0)  # doctest: +SKIP
    """
    found = adapter_of(model, adapter)
    boundary = found.method.boundary()
    if not isinstance(boundary, Settle):
        raise ConfigError(
            f"settle: adapter {found.name!r} is {found.method.name!r}, whose tasks do not end like "
            "this; use polyrank.prune for gates that go on, or polyrank.export"
        )
    place: dict[str, Any] = {"adapter": found.name, "seed": seed, "key": f"settle-{task}"}
    kept, _ = boundary.put_away(
        found,
        lambda: append(model, **place),
        lambda: absorb(model, lossy=boundary.lossy, archive=boundary.archive, **place),
    )
    return kept


def narrow(adapter: Adapter) -> bool:
    """Say whether some base weight is stored below fp32, or is no dense matrix."""
    return not all(_exact(cast("View", layer).module) for layer in adapter.layers)


def _exact(module: AdaptedLinear) -> bool:
    """Say whether a base weight is a dense matrix of fp32 or above."""
    return not module.quantised() and module.dense_weight().dtype in (torch.float32, torch.float64)


def settled_ranks(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return (A, B) of all ranks put away so far, in their order: archived ones, then the bank."""
    view = cast("View", layer)
    found = [part for part in (view.dormant, view.bank) if part is not None]
    found = found or [(view.A[:0], view.B[:, :0])]
    # An archive rests on the host.
    A = torch.cat([A.detach().cpu() for A, _ in found])
    return A, torch.cat([B.detach().cpu() for _, B in found], dim=1)
