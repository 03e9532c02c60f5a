"""One run of a sweep, by the engine: the same call continues it if it was killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyrank.engine import base as bases
from polyrank.engine.loop import run
from polyrank.engine.sweep.facts import facts, fallen
from polyrank.engine.sweep.resolve import Recipe, Sweep
from polyrank.engine.sweep.schedule import Point
from polyrank.engine.vit import quiet
from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.streams import Stream


class Once:
    """Makes the runs of a sweep; a small base that must be trained is trained once for each seed.

    Args:
        sweep: what to run.
        folder: of the sweep; bases are kept below it.
    """

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.sweep, self.folder = sweep, folder
        self._streams: dict[int, Stream] = {}
        self._bases: dict[int, nn.Module | str | None] = {}

    def __call__(self, point: Point, folder: Path) -> dict[str, Any]:
        """Make or continue a run and return the end of its line.

        Raises:
            PolyrankError: if it cannot be made, for another reason than that it diverged.
        """
        sweep, spec = self.sweep, self.sweep.spec
        self._prepare(point.seed)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            with quiet(), _threads(self._plain.threads):
                _one(
                    self._bases[point.seed],
                    self._streams[point.seed].fresh(),
                    sweep.recipes[point.group.id],
                    rate=point.rate,
                    target_modules=spec.target_modules,
                    seed=point.seed,
                    out=folder,
                )
        except RunError as error:
            found = fallen(RunFolder.open(folder), error, sweep.worst) if folder.is_dir() else None
            if found is None:
                raise
            return found
        made = facts(RunFolder.open(folder), spec.score, spec.view, sweep.worst)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {**made, "peak_memory": peak}

    def _prepare(self, seed: int) -> None:
        if seed in self._bases:
            return
        stream = self._streams[seed] = self.sweep.stream_for(seed)
        base: nn.Module | str | None = self.sweep.model
        if base is None and self._plain.model is None:
            place = self.folder / "bases" / f"seed-{seed}"
            # A copy, as it keeps what it makes, and the next seed has a base of its own.
            base = replace(self._plain).made(stream, seed, place, _silent)
        self._bases[seed] = base

    @cached_property
    def _plain(self) -> bases.Base:
        return bases.choose(self.sweep.model, self.sweep.stream)


def _one(
    base: nn.Module | str | None,
    stream: Stream,
    recipe: Recipe,
    *,
    rate: float,
    target_modules: list[str] | str | None,
    seed: int,
    out: Path,
) -> None:
    run(
        base,
        stream,
        recipe.method,
        strategies=recipe.strategies,
        references=(),
        train=replace(recipe.settings, lr=rate),
        target_modules=target_modules,
        seed=seed,
        validate=True,
        out=out,
        progress=False,
    )


def _silent(event: str, fields: dict[str, Any]) -> None:
    """Take an event of training a base, which has no run's log to go to."""


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
