"""Stored samples: which rows stay and which are drawn is keyed, so a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Buffer, Replay, seed_of


class RowBuffer(Buffer):
    """Keeps rows by (task, row) and reads them again from the stream.

    `by="stream"` is reservoir sampling: offer n (from 0) is kept while there is room, later with
    probability M/(n+1) in a random slot, so that after n offers each row is here with probability
    M/n. "class" and "task" give every group an equal part of M and a reservoir of its own; when a
    group appears, the others give up random rows.

    Args:
        replay: what a strategy asked for.
        rows: training rows of the whole stream, of which a capacity below 1 is a share.
        read: returns the row of (task, row).
        collate: makes a batch of rows.
        seed: key of every draw.

    Attributes:
        drawn: rows given out so far.
    """

    def __init__(
        self,
        replay: Replay,
        rows: int,
        read: Callable[[int, int], Mapping[str, Any]],
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]],
        seed: int,
    ) -> None:
        self.replay, self.read, self.collate, self.seed = replay, read, collate, seed
        share = replay.capacity * rows if replay.capacity < 1 else replay.capacity
        self.capacity = max(1, round(share))
        # By group: [task, row, class, bytes] of each kept row.
        self.kept: dict[int, list[list[int]]] = {}
        self.offers: dict[int, int] = {}
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.seen: set[tuple[int, int]] = set()
        self.drawn = 0

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def tasks(self) -> list[int]:
        """Return the numbers of the tasks that have rows here, ascending."""
        return sorted({entry[0] for group in self.kept.values() for entry in group})

    @property
    def bytes(self) -> int:
        """What the kept rows and their logits take."""
        rows = sum(entry[3] for group in self.kept.values() for entry in group)
        return rows + sum(t.numel() * t.element_size() for t in self.logits.values())

    def offer(self, task: int, row: int, label: int, logits: Tensor | None = None) -> None:
        """Offer one row that an update has trained on; a second offer only renews its logits."""
        place = (task, row)
        if place in self.seen:
            if logits is not None and place in self.logits:
                self.logits[place] = logits.detach().float().cpu()
            return
        self.seen.add(place)
        group = {"stream": 0, "class": label, "task": task}[self.replay.by]
        if group not in self.kept:
            self.kept[group], self.offers[group] = [], 0
            self._share_out()
        members, count, part = self.kept[group], self.offers[group], self._part(group)
        self.offers[group] = count + 1
        entry = [task, row, label, size_of(self.read(task, row))]
        if len(members) < part:
            members.append(entry)
        else:
            slot = int(self._rng("reservoir", group, count).integers(count + 1))
            if slot >= part:
                return
            self._forget(members[slot])
            members[slot] = entry
        if logits is not None:
            self.logits[place] = logits.detach().float().cpu()
        self._fit(place)

    def draw(self, count: int, *key: int | str, task: int | None = None) -> dict[str, Tensor]:
        """Return min(count, kept) different rows as one batch, drawn by (seed, key).

        With stored logits the batch has "stored", (n, classes), NaN where a class was not known.

        Raises:
            ConfigError: if nothing is kept, or nothing of that task.
        """
        entries = [e for g in sorted(self.kept) for e in self.kept[g] if task in (None, e[0])]
        if not entries:
            what = "" if task is None else f" of task {task}"
            raise ConfigError(f"replay: no row{what} is kept yet; ask len(buffer) or tasks() first")
        chosen = self._rng("draw", *key).permutation(len(entries))[:count]
        picked = [entries[int(i)] for i in chosen]
        self.drawn += len(picked)
        batch = self.collate([{**self.read(e[0], e[1]), "task": e[0], "row": e[1]} for e in picked])
        if self.replay.stores:
            found = [self.logits[e[0], e[1]] for e in picked]
            stored = torch.full((len(found), max(map(len, found))), float("nan"))
            for line, logits in zip(stored, found, strict=True):
                line[: len(logits)] = logits
            batch["stored"] = stored
        return batch

    def close_task(self) -> None:
        """Forget which rows of the task were offered; they will not come again."""
        self.seen.clear()

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as tensors and plain values."""
        return {
            "kept": {str(g): [list(e) for e in entries] for g, entries in self.kept.items()},
            "offers": {str(group): count for group, count in self.offers.items()},
            "logits": {f"{t} {r}": value for (t, r), value in self.logits.items()},
            "seen": torch.tensor(sorted(self.seen), dtype=torch.int64),
            "drawn": self.drawn,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.kept = {int(g): entries for g, entries in state["kept"].items()}
        self.offers = {int(group): count for group, count in state["offers"].items()}
        places = {key: tuple(map(int, key.split())) for key in state["logits"]}
        self.logits = {
            (places[key][0], places[key][1]): value for key, value in state["logits"].items()
        }
        self.seen = {(int(t), int(r)) for t, r in state["seen"].reshape(-1, 2).tolist()}
        self.drawn = state["drawn"]

    def _part(self, group: int) -> int:
        order = list(self.kept)
        least, over = divmod(self.capacity, len(order))
        return max(1, least + (order.index(group) < over))

    def _share_out(self) -> None:
        for group, members in self.kept.items():
            excess = len(members) - self._part(group)
            for _ in range(max(0, excess)):
                rng = self._rng("share", group, len(self.kept), len(members))
                self._forget(members.pop(int(rng.integers(len(members)))))

    def _fit(self, newest: tuple[int, int]) -> None:
        while self.replay.bytes and self.bytes > self.replay.bytes and len(self) > 1:
            group = max(self.kept, key=lambda g: len(self.kept[g]))
            members = self.kept[group]
            rng = self._rng("fit", *newest, len(members))
            self._forget(members.pop(int(rng.integers(len(members)))))

    def _forget(self, entry: Sequence[int]) -> None:
        self.logits.pop((entry[0], entry[1]), None)

    def _rng(self, *key: int | str) -> np.random.Generator:
        return np.random.default_rng(seed_of(self.seed, "replay", *key))


def size_of(row: Mapping[str, Any]) -> int:
    """Return the bytes that a row's values take: arrays as they are, text in UTF-8."""
    total = 0
    for value in row.values():
        if isinstance(value, str):
            total += len(value.encode())
        else:
            total += np.asarray(value).nbytes
    return total
