"""The end of a task with static gates: what they left goes to rest, and fresh ranks begin."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor

from polyrank.errors import MergeError, RunError
from polyrank.frame import Adapter, Boundary, Figure, Layer, Saved, Workshop
from polyrank.layers import View
from polyrank.parts.gates import FlatGates, kept_ranks
from polyrank.parts.ramp import twin_ranks
from polyrank.parts.transforms import lora_of

INTO = ("auto", "base", "bank")


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
            MergeError: if it is quantised.
        """
        bad = [v.site.path for v in workshop.adapter.layers if cast("View", v).module.quantised()]
        if bad and self.into == "base":
            raise MergeError(
                f"{self.name}: into='base' adds updates to the base weights, but {len(bad)} are "
                f"quantised ({bad[0]} is the first); use into='bank', or load a dense base"
            )

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Put the ranks away.

        Raises:
            RunError: if gates are not finite, or nothing was trained since the last time.
            MergeError: if the base would lose a part of the update and may not.
        """
        adapter = workshop.adapter
        FlatGates(adapter).check_finite()
        if not any(bool(layer.B.any()) for layer in adapter.layers):
            raise RunError(
                f"{self.name}: the end of a task was reached, but nothing has moved since the last "
                "one; train between two boundaries"
            )
        counts = kept_ranks(adapter), twin_ranks(adapter)
        if self.into == "bank" or (self.into == "auto" and narrow(adapter)):
            workshop.append(self.name)
        else:
            workshop.absorb(lossy=self.lossy, archive=self.archive)
        memory = workshop.memory(self.name)
        number = len(memory.setdefault("tasks", []))
        memory["tasks"].append(str(getattr(task, "name", f"task {number}")))
        for key, found in zip(("kept", "twin"), counts, strict=True):
            memory.setdefault(key, []).append(found)

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return each task's update alone, without a head; none if the ranks were not archived."""
        memory, layers = workshop.memory(self.name), workshop.adapter.layers
        held = {layer.site.path: settled_ranks(layer) for layer in layers}
        kept = memory.get("kept", [])
        if any(sum(k[path] for k in kept) != len(A) for path, (A, _) in held.items()):
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


def narrow(adapter: Adapter) -> bool:
    """Say whether some base weight is stored below fp32, or is no dense matrix."""
    modules = [cast("View", layer).module for layer in adapter.layers]
    wide = (torch.float32, torch.float64)
    return any(m.quantised() or m.dense_weight().dtype not in wide for m in modules)


def settled_ranks(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return (A, B) of all ranks put away so far, in their order: archived ones, then the bank."""
    view = cast("View", layer)
    found = [part for part in (view.dormant, view.bank) if part is not None]
    found = found or [(view.A[:0], view.B[:, :0])]
    return torch.cat([A.detach() for A, _ in found]), torch.cat([B.detach() for _, B in found], 1)
