"""A run: one method and its references through a stream of tasks, saved on the way."""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polyrank.engine import base as bases
from polyrank.engine.folders import Places, place_of
from polyrank.engine.interrupt import Interrupts
from polyrank.engine.machine import Engine
from polyrank.engine.objective import Objective
from polyrank.engine.plan import Plan
from polyrank.engine.progress import Bar
from polyrank.engine.result import Result
from polyrank.engine.settings import Settings
from polyrank.errors import ConfigError, RunError
from polyrank.frame import Method, Strategy
from polyrank.io.checkpoints import Checkpoints
from polyrank.io.runs import RunFolder
from polyrank.layers import adapt
from polyrank.streams import Stream

_log = logging.getLogger(__name__)


def run(
    base: nn.Module | str | None = None,
    stream: Stream | str = "digits",
    method: Method | str = "smora",
    *,
    strategies: Iterable[Strategy | str] = (),
    references: Sequence[str] | None = None,
    train: Settings | dict[str, Any] | None = None,
    target_modules: list[str] | str | None = None,
    processor: Any = None,
    seed: int = 0,
    validate: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    save_every: int | None = None,
    prefix_cache: bool = True,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> Result:
    """Take one method through a stream of tasks and evaluate every task after every task.

    The same call again continues a run that was stopped, to the same bits on the same machine and
    versions; one that is finished is read back.

    Args:
        base: the pretrained model, a folder or hub id of one, or None for the small one that the
            stream is meant for.
        stream: a stream or its name.
        method: a method or its name.
        strategies: strategies or their names, combined with the method.
        references: what stands beside it in the same run: "sequential" (plain LoRA of equal rank,
            task by task), "joint" (the same LoRA on all tasks at once), "probe" (a linear
            classifier on the frozen base's features of all tasks so far). None is all of them that
            the stream has a meaning for.
        train: settings of each task's training, the same for all systems.
        target_modules: layers to adapt, as in PEFT; None is what suits the small base, else
            "all-linear".
        processor: tokenizer or image processor of a model that is passed as an object.
        seed: key of every random draw.
        validate: also score the validation rows, as a choice between runs needs it.
        out: run folder; None continues an unfinished run of this configuration below ./runs, or
            picks a free folder there.
        overwrite: replace an interrupted run in `out`, or a finished one with the same
            configuration.
        save_every: updates between two checkpoints; None saves twice a minute. Checkpoints are
            also written at the end of every task.
        prefix_cache: keep the outputs of layers below the first adapted one, where that is exact.
        progress: show a bar; None asks whether standard error is a terminal.
        command: how to repeat the run, for the record.

    Returns:
        The result; its folder holds configuration, events, matrices and adapters.

    Raises:
        ConfigError: naming everything that is wrong, before anything is written or loaded.
        RunError: if `out` holds another run, training diverges, or the disk is full.
        CheckpointError: if a stopped run cannot be continued.
        InertError: if a method did nothing.
    """
    plan = Plan.build(stream, method, strategies, references, train, target_modules, seed, validate)
    _alone()
    if save_every is not None and (type(save_every) is not int or save_every < 1):
        raise ConfigError(f"save_every: got {save_every!r}, expected updates >= 1, or None")
    with _untouched(base if isinstance(base, nn.Module) else None):
        made = bases.choose(base, plan.stream, processor)
        _try(made, plan)
        places = Places(save_every=save_every, prefix_cache=prefix_cache, overwrite=overwrite)
        identity = plan.record(made.about, made.targets_for(plan.target_modules, plan.method))
        folder, state = place_of(plan, out, identity, command, overwrite)
        if state == "done":
            return Result(path=folder.path, results=folder.results(), model=None)
        with (
            Interrupts(folder.path) as interrupts,
            _recorded(folder),
            Bar(progress) as bar,
            _threads(made.threads),
        ):
            result = Engine(folder, plan, made, bar, interrupts, places).run()
        # Only now: without them and not yet done, a killed run would begin anew.
        Checkpoints(folder.path / "checkpoints").clear()
        return result


def _alone() -> None:
    """Refuse to be one of several processes, which would all write the same folder."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ConfigError(
            f"run: started as one of {count} processes, expected one, which writes the folder; "
            "start it without torchrun, or train each task with polyrank.Trainer in all of them"
        )


@contextmanager
def _untouched(model: nn.Module | None) -> Iterator[None]:
    """Leave the caller's generators and the modes of the caller's model as they are."""
    modes = {} if model is None else {m: m.training for m in model.modules()}
    state, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)
        for module, mode in modes.items():
            module.training = mode


def _try(made: bases.Base, plan: Plan) -> None:
    """Adapt a copy of the model, so that targets that fit nothing are refused before a folder."""
    stand_in = copy.deepcopy(made.stand_in())
    reader = made.reader_for(stand_in, plan.stream)
    if problems := Objective(reader, plan.method, plan.strategies).problems():
        raise ConfigError(problems)
    try:
        targets = made.targets_for(plan.target_modules, plan.method)
        adapt(stand_in, plan.method, targets, head=made.head)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"target_modules: {error}") from error


@contextmanager
def _recorded(folder: RunFolder) -> Iterator[None]:
    """Write into the folder how the run ended."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
        status = "interrupted" if stopped else "failed"
        try:
            folder.event(status, error=f"{type(error).__name__}: {error}")
            folder.finish(status)
        except (RunError, OSError) as second:
            # A full disk takes neither; what went wrong first is what counts.
            _log.warning("the run could not be marked as %s: %s", status, second)
        raise
    else:
        folder.finish()
    finally:
        folder.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Limit torch's threads: the embedded base gains nothing, and waiting can cost it tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
