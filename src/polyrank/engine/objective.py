"""The loss of one phase: the task's own, and what strategies add, over one student forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.frame import ROLES, Flow, Loss, Method, Out, Strategy

TEACHER = "teacher."


class Objective:
    """All losses of a phase.

    L = Σ_l w_l · Σ_rows l / n_l, where n_l counts the rows (or labels) of the loss's role over the
    whole update and all processes; losses of one class are counted each for itself. A `batchwise`
    loss is averaged over all micro-batches of all processes, or added up over them if it is counted
    per "update".

    Args:
        reader: runs the model.
        method: its losses.
        strategies: theirs, and perhaps another task loss.
        chosen: names of the losses of this phase, or losses of its own; None is all of them.

    Raises:
        ConfigError: for a name that no loss has, or several, and for a loss that is chosen twice.
    """

    def __init__(
        self,
        reader: Reader,
        method: Method,
        strategies: Sequence[Strategy],
        chosen: tuple[str | Loss, ...] | None = None,
    ) -> None:
        self.reader = reader
        entries = (method, *strategies)
        tasks = [loss for e in entries if (loss := e.task_loss()) is not None]
        replays = [asked for s in strategies if (asked := s.replay()) is not None]
        self.replay = replays[0] if replays else None
        own = tasks[0] if tasks else reader.loss()
        if self.replay is not None and not self.replay.shared:
            own.role = own.role or "train"
        self.losses = [own, *(loss for e in entries for loss in e.losses())]
        if chosen is not None:
            self.losses = _chosen(self.losses, chosen)
        self.wants = frozenset(
            need for loss in self.losses for need in loss.needs if not need.startswith(TEACHER)
        ) & {"logits", "hidden", "embedding"} | {"logits"}

    def problems(self) -> list[str]:
        """Return what the losses ask for and this reader's model does not leave."""
        found = []
        for loss in self.losses:
            wanted = {need.removeprefix(TEACHER) for need in loss.needs} - {"stored", "sides"}
            if lacking := sorted(wanted - self.reader.offers):
                found.append(
                    f"loss {name_of(loss)!r}: needs {', '.join(lacking)}, which models for "
                    f"{', '.join(sorted(self.reader.kinds))} do not give; leave the "
                    "strategy or the option out that brings it"
                )
        stores = self.replay is not None and "logits" in self.replay.stores
        if stores and not self.reader.growing:
            found.append(
                "replay: stores logits, of which a text has one row a token; use replay, which "
                "stores samples alone"
            )
        return found

    def bind(self, adapter: Any, workshop: Any) -> None:
        """Let losses meet the adapter and the engine."""
        self.adapter = adapter
        for loss in self.losses:
            loss.bind(adapter, workshop)

    def beside(self) -> bool:
        """Say whether a loss reads what blocks left, which is not behind the model's output."""
        return any("sides" in loss.needs for loss in self.losses)

    def counts(self, batches: Sequence[Mapping[str, Tensor]]) -> list[int]:
        """Return n_l in the order of `losses`, over an update's micro-batches and all processes."""
        mask = self.reader.mask
        totals = [sum(_count(loss, b, mask(b)) for b in batches) for loss in self.losses]
        if _processes() > 1:
            summed = torch.tensor(totals, dtype=torch.float64)
            dist.all_reduce(summed)
            totals = [int(n) for n in summed.tolist()]
        return totals

    def __call__(
        self,
        model: nn.Module,
        inner: nn.Module,
        flow: Flow,
        batch: dict[str, Tensor],
        counts: Sequence[int],
        micro: int,
    ) -> tuple[Tensor, Out]:
        """Return (the micro-batch's part of the update's loss, what the student left).

        Args:
            model: the student, perhaps wrapped for several processes.
            inner: the same, unwrapped; teachers run on it.
            flow: its flow.
            batch: rows of all roles.
            counts: what `counts` gave for the update.
            micro: micro-batches in the update.
        """
        teachers = self._teachers(inner, flow, batch)
        out = self.reader.forward(model, batch, self.wants)
        out.stored = batch.get("stored")
        if self.beside():
            out.sides = self.adapter.sides()
        assert out.logits is not None
        total = out.logits.new_zeros((), dtype=torch.float32)
        if out.logits.dtype == torch.float64:
            total = total.double()
        for loss, count in zip(self.losses, counts, strict=True):
            index = _rows(loss, batch)
            if index is not None and not len(index):
                continue
            seen = out if index is None else _part(out, index)
            if index is not None and "sides" in loss.needs:
                seen.sides = _sides(out, index, len(batch["labels"]))
            if loss.teacher in teachers and _taught(loss):
                places, taught = teachers[loss.teacher]
                seen = replace(seen, teacher=_part(taught, _among(places, index)))
            term = loss(seen, batch if index is None else _slice(batch, index))
            total = total + loss.weight * term / _parts(loss, count, micro)
        return total, out

    def _teachers(
        self, inner: nn.Module, flow: Flow, batch: dict[str, Tensor]
    ) -> dict[str, tuple[Tensor, Out]]:
        """Run every distinct teacher once, over the rows that some loss needs it for."""
        found: dict[str, tuple[Tensor, Out]] = {}
        views = {loss.teacher for loss in self.losses if _taught(loss)}
        for view in sorted(views):
            mine = [loss for loss in self.losses if _taught(loss) and loss.teacher == view]
            total = len(batch["labels"])
            index = [_rows(loss, batch) for loss in mine]
            rows = [torch.arange(total) if i is None else i.cpu() for i in index]
            places = torch.cat(rows).unique()
            if not len(places):
                continue
            needs = {n.removeprefix(TEACHER) for loss in mine for n in loss.needs if TEACHER in n}
            training = inner.training
            inner.eval()
            try:
                with torch.no_grad(), flow.put(view=view):
                    part = _slice(batch, places.to(batch["labels"].device))
                    found[view] = (places, self.reader.forward(inner, part, frozenset(needs)))
            finally:
                inner.train(training)
        return found


def name_of(loss: Loss) -> str:
    """Return the name under which a phase chooses a loss."""
    return type(loss).__name__.lower()


def _chosen(losses: Sequence[Loss], chosen: Sequence[str | Loss]) -> list[Loss]:
    """Return the losses of a phase in its order, those that it calls by name from `losses`."""
    names: dict[str, list[Loss]] = {}
    for loss in losses:
        names.setdefault(name_of(loss), []).append(loss)
    called = [entry for entry in chosen if isinstance(entry, str)]
    if unknown := [name for name in called if name not in names]:
        raise ConfigError(f"phase: asks for the losses {unknown}, but there are {sorted(names)}")
    problems = [
        f"phase: asks for the loss {name!r}, of which there are {len(names[name])}, expected "
        "one; give the losses that are meant, not their name"
        for name in sorted(set(called))
        if len(names[name]) > 1
    ]
    found = [names[entry][0] if isinstance(entry, str) else entry for entry in chosen]
    times = Counter(map(id, found))
    problems += [
        f"phase: the loss {name_of(loss)!r} is given {times[id(loss)]} times, expected once; leave "
        "the others out, or raise its weight"
        for loss in {id(loss): loss for loss in found}.values()
        if times[id(loss)] > 1
    ]
    if problems:
        raise ConfigError(problems)
    return found


def _parts(loss: Loss, count: int, micro: int) -> int:
    """Return what a term is divided by, so that the parts of all processes make the update's."""
    if loss.per == "update":
        return 1
    return micro * _processes() if loss.batchwise else max(1, count)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _taught(loss: Loss) -> bool:
    return any(need.startswith(TEACHER) for need in loss.needs)


def _rows(loss: Loss, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Return the rows of a loss's role; None if it reads all of them."""
    if loss.role is None or "role" not in batch:
        return None
    return (batch["role"] == ROLES[loss.role]).nonzero().flatten()


def _count(loss: Loss, batch: Mapping[str, Tensor], mask: Tensor | None) -> int:
    index = _rows(loss, batch)
    labels = batch["labels"] if index is None else batch["labels"][index]
    if loss.per == "sample" or not len(labels):
        return len(labels)
    if loss.per == "token" and mask is not None:
        return int((mask if index is None else mask[index]).sum())
    # The first label of a causal model predicts nothing.
    return int((labels[:, 1:] != -100).sum()) if labels.dim() == 2 else len(labels)


def _among(places: Tensor, index: Tensor | None) -> Tensor:
    """Return where the rows of one loss stand among those the teacher saw."""
    if index is None:
        return torch.arange(len(places))
    return torch.searchsorted(places, index.cpu())


def _slice(batch: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    return {key: value[index] for key, value in batch.items()}


def _part(out: Out, index: Tensor) -> Out:
    def pick(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[index.to(value.device)]

    return Out(
        logits=pick(out.logits),
        hidden=[h[index.to(h.device)] for h in out.hidden],
        embedding=pick(out.embedding),
        mask=pick(out.mask),
        stored=pick(out.stored),
    )


def _sides(out: Out, index: Tensor, rows: int) -> dict[str, dict[str, Tensor]]:
    """Return some of the rows of what blocks left, each of which must have one entry a row."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, side in out.sides.items():
        for name, value in side.items():
            if value.shape[:1] != (rows,):
                raise ConfigError(
                    f"{name!r} of {path}: got shape {tuple(value.shape)}, expected ({rows}, …), "
                    "one entry a row, since a loss with a role reads it; let the block leave it "
                    "so, or give the loss no role"
                )
            found.setdefault(path, {})[name] = value[index.to(value.device)]
    return found
