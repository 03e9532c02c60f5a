"""Tasks one after another: grow the head, train, evaluate every task seen; references beside it."""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from polyrank import metrics
from polyrank.engine import base as bases
from polyrank.engine.data import TaskRows, batches
from polyrank.engine.evaluate import scores
from polyrank.engine.phase import run_phase
from polyrank.engine.plan import REFERENCES, Plan, System
from polyrank.engine.probe import frozen_probe
from polyrank.engine.progress import Bar, Watch
from polyrank.engine.result import Result
from polyrank.engine.settings import Settings
from polyrank.engine.workshop import TaskWorkshop
from polyrank.errors import ConfigError
from polyrank.frame import Job, Method, Strategy, seed_of
from polyrank.io.runs import RunFolder
from polyrank.layers import adapt, adapter_of, gate_statistics, grow_head, has_gates
from polyrank.streams import Stream


def run(
    base: nn.Module | str | None = None,
    stream: Stream | str = "digits",
    method: Method | str = "smora",
    *,
    strategies: Iterable[Strategy | str] = (),
    references: Sequence[str] = REFERENCES,
    train: Settings | dict[str, Any] | None = None,
    target_modules: list[str] | str = "all-linear",
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    command: Sequence[str] | None = None,
) -> Result:
    """Take one method through a stream of tasks and evaluate every task after every task.

    Args:
        base: the pretrained model, a folder or hub id of one, or None for a small one that the
            stream's pretraining data make on the spot.
        stream: a stream or its name.
        method: a method or its name.
        strategies: strategies or their names, combined with the method.
        references: what stands beside it in the same run: "sequential" (plain LoRA of equal rank,
            task by task), "joint" (the same LoRA on all tasks at once), "probe" (a linear
            classifier on the frozen base's features of all tasks so far).
        train: settings of each task's training, the same for all systems.
        target_modules: layers to adapt, as in PEFT.
        seed: key of every random draw.
        out: run folder; None picks a free one below ./runs.
        overwrite: replace an interrupted run in `out`, or a finished one with the same
            configuration.
        progress: show a bar; None asks whether standard error is a terminal.
        command: how to repeat the run, for the record.

    Returns:
        The result; its folder holds configuration, events, matrices and adapters.

    Raises:
        ConfigError: naming everything that is wrong, before anything is written or loaded.
        RunError: if `out` holds another run, or training diverges.
        InertError: if a method did nothing.
    """
    plan = Plan.build(stream, method, strategies, references, train, target_modules, seed)
    with _untouched(base if isinstance(base, nn.Module) else None):
        return _run(base, plan, out, overwrite, progress, command)


def _run(
    base: nn.Module | str | None,
    plan: Plan,
    out: str | Path | None,
    overwrite: bool,
    progress: bool | None,
    command: Sequence[str] | None,
) -> Result:
    model, about = _base(base, plan.stream)
    _try(copy.deepcopy(model) if model is not None else bases.small_vit(2), plan)
    folder = RunFolder.create(
        _free(f"{plan.stream.name}-{plan.method.name}") if out is None else Path(out),
        plan.record(about),
        command=command,
        overwrite=overwrite,
    )
    threads = 1 if model is None else None
    with _recorded(folder), Bar(progress) as bar, _threads(threads):
        return _Engine(folder, plan, bar).run(model)


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


def _try(model: nn.Module, plan: Plan) -> None:
    """Adapt a copy of the model, so that targets that fit nothing are refused before a folder."""
    head = bases.try_base(model, plan.stream)
    try:
        adapt(model, plan.method, plan.target_modules, head=head)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"target_modules: {error}") from error


def _base(base: nn.Module | str | None, stream: Stream) -> tuple[nn.Module | None, dict[str, Any]]:
    """Return the model, None if it is still to be made, and its description; refuse what fails."""
    if base is None:
        bases.pretraining(stream)
        return None, {"source": "embedded"}
    if isinstance(base, str):
        model, source = bases.load_base(base, stream), base
    else:
        model, source = base, "object"
        bases.try_base(model, stream)
    return model, bases.describe(model, source)


@contextmanager
def _recorded(folder: RunFolder) -> Iterator[None]:
    """Write into the folder how the run ended."""
    try:
        yield
    except BaseException as error:
        folder.event("failed", error=f"{type(error).__name__}: {error}")
        folder.finish("failed")
        raise
    folder.finish()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Limit torch's threads: the embedded base gains nothing, and waiting can cost it tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _free(name: str) -> Path:
    """Return the first folder below ./runs that is not taken."""
    root = Path("runs")
    number = 1
    while (path := root / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path


class _Engine:
    """One run: a base, and every system on a fresh copy of it."""

    def __init__(self, folder: RunFolder, plan: Plan, bar: Watch) -> None:
        self.folder, self.plan, self.bar = folder, plan, bar
        self.stream, self.settings, self.seed = plan.stream, plan.settings, plan.seed

    def watch(self, event: str, fields: dict[str, Any]) -> None:
        """Pass an event on to the bar, and to the log, where a step is called "train"."""
        self.bar(event, fields)
        self.folder.event("train" if event == "step" else event, **fields)

    def run(self, base: nn.Module | None) -> Result:
        """Run all systems and write the results after each."""
        if base is None:
            base = self._pretrain()
        bases.save(base, self.folder.path / "base")
        head = bases.try_base(base, self.stream)
        results: dict[str, Any] = {
            "schema": 1,
            "tasks": [
                {
                    "name": task.name,
                    "labels": list(task.labels),
                    "n_train": task.size("train"),
                    "n_test": task.size("test"),
                }
                for task in self.stream
            ],
            "systems": [],
        }
        kept = None
        for system in self.plan.systems():
            model, entry = self._system(copy.deepcopy(base), head, system)
            kept = model if system.role == "method" else kept
            results["systems"].append(entry)
            self.folder.write_results(results)
        if "probe" in self.plan.references:
            results["systems"].append(self._probe(base, head))
            self.folder.write_results(results)
        return Result(path=self.folder.path, results=results, model=kept)

    def _pretrain(self) -> nn.Module:
        started = time.perf_counter()
        task = bases.pretraining(self.stream)
        steps = bases.steps(len(task.data["train"]))
        self.bar("phase", {"system": "base", "task": task.name, "total": steps})
        model = bases.pretrain(self.stream, self.seed, self.bar)
        self.watch(
            "pretrain",
            {
                "system": "base",
                "task": task.name,
                "accuracy": bases.accuracy(model, task.data["test"]),
                "seconds": time.perf_counter() - started,
            },
        )
        return model

    def _system(
        self, base: nn.Module, head: str, system: System
    ) -> tuple[nn.Module, dict[str, Any]]:
        started = time.perf_counter()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = adapt(
            base.to(device),
            system.method,
            self.plan.target_modules,
            head=head,
            seed=seed_of(self.seed, "adapter"),
        )
        before = system.method.vital_sign(adapter_of(model))
        restricted, unrestricted = self._matrices()
        count = len(self.stream)
        groups = [list(range(count))] if system.pooled else [[index] for index in range(count)]
        for group in groups:
            names = [label for index in group for label in self.stream[index].labels]
            where = {
                "system": system.label,
                "task": " + ".join(self.stream[index].name for index in group),
            }
            self.watch("task_start", {**where, "classes": names})
            grow_head(model, names, seed=self.seed)
            self._task(model, system, group, where)
            self._alive(model, before, where)
            row = group[-1]
            restricted[row], unrestricted[row] = self._evaluate(model, row + 1)
            self.watch(
                "evaluate",
                {
                    **where,
                    "restricted": restricted[row].tolist(),
                    "unrestricted": unrestricted[row].tolist(),
                },
            )
        entry = {
            "name": system.name,
            "label": system.label,
            "role": system.role,
            **self._figures(restricted, unrestricted),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "adapter": self._save(model, system.name),
            "routing": self._routing(model),
        }
        return model, {**entry, "seconds": time.perf_counter() - started}

    def _task(
        self, model: nn.Module, system: System, group: list[int], where: dict[str, Any]
    ) -> None:
        index = group[-1]
        parts: dict[str, list[Any]] = {}
        for number in group:
            for role, rows in self.stream[number].data.items():
                parts.setdefault(role, []).append(rows)
        workshop = TaskWorkshop(model, parts, self.seed, index, self.settings.batch_size)
        boundary = system.method.boundary()
        state: dict[str, Any] = {}
        boundary.start(self.stream[index], workshop, state)
        while (work := boundary.next(self.stream[index], workshop, state)) is not None:
            if isinstance(work, Job):
                self.watch("job", {**where, "job": work.name})
                while not work.step(workshop, state):
                    pass
                continue
            loss = run_phase(
                model,
                TaskRows(parts["train"]),
                work,
                self.settings,
                task=index,
                seed=self.seed,
                strategies=system.strategies,
                workshop=workshop,
                watch=self.watch,
                where=where,
            )
            self.watch("task_end", {**where, "phase": work.name, "loss": loss})
        boundary.finish(self.stream[index], workshop, state)

    def _alive(self, model: nn.Module, before: dict[str, float], where: dict[str, Any]) -> None:
        """Refuse to go on with a method of which some part did nothing."""
        self.watch("vital_sign", {**where, **adapter_of(model).check_alive(before)})

    def _matrices(self) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(self.stream), len(self.stream))
        return np.full(shape, np.nan), np.full(shape, np.nan)

    def _evaluate(self, model: nn.Module, seen: int) -> tuple[np.ndarray, np.ndarray]:
        device = next(model.parameters()).device

        def logits_of(batch: dict[str, Tensor]) -> Tensor:
            return cast("Tensor", model(pixel_values=batch["pixel_values"].to(device)).logits)

        model.eval()
        restricted, unrestricted = scores(
            logits_of, self.stream, seen, self.settings.eval_batch_size
        )
        return np.array(restricted), np.array(unrestricted)

    def _routing(self, model: nn.Module) -> dict[str, Any] | None:
        views = [layer for layer in adapter_of(model).layers if has_gates(layer)]
        if not views:
            return None
        device = next(model.parameters()).device
        load, entropy = [], []
        for task in self.stream:
            inputs = (
                {"pixel_values": batch["pixel_values"].to(device)}
                for batch in batches(task.data["test"], self.settings.eval_batch_size)
            )
            found = gate_statistics(model, views, inputs)
            load.append([stats.load().tolist() for stats in found])
            entropy.append([metrics.load_entropy(stats.load().tolist()) for stats in found])
        return {
            "layers": [layer.site.path for layer in views],
            "tasks": [task.name for task in self.stream],
            "load": load,
            "entropy": entropy,
        }

    def _probe(self, base: nn.Module, head: str) -> dict[str, Any]:
        started = time.perf_counter()
        self.watch("task_start", {"system": "frozen probe", "task": "all", "classes": []})
        restricted, unrestricted, trainable = frozen_probe(
            base, head, self.stream, self.settings.eval_batch_size
        )
        return {
            "name": "probe",
            "label": "frozen probe",
            "role": "reference",
            **self._figures(restricted, unrestricted),
            "trainable": trainable,
            "adapter": None,
            "routing": None,
            "seconds": time.perf_counter() - started,
        }

    def _figures(self, restricted: np.ndarray, unrestricted: np.ndarray) -> dict[str, Any]:
        counts = [task.size("test") for task in self.stream]
        return {
            "restricted": restricted.tolist(),
            "unrestricted": unrestricted.tolist(),
            "counts": counts,
            "metrics": {
                "unrestricted": metrics.summary(unrestricted, counts, missing="nan"),
                "restricted": metrics.summary(restricted, counts, missing="nan"),
            },
        }

    def _save(self, model: nn.Module, name: str) -> str:
        final = self.folder.path / "adapters" / name
        aside = final.with_name(name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        cast("Any", model).save_pretrained(str(aside))
        aside.replace(final)
        return str(final.relative_to(self.folder.path))
