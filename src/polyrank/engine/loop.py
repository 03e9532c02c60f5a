"""Tasks one after another: grow the head, train, evaluate every task seen, and the references beside it."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from polyrank import metrics
from polyrank.engine import base as bases
from polyrank.engine.data import TaskRows, batches
from polyrank.engine.evaluate import scores
from polyrank.engine.phase import Watch, run_phase
from polyrank.engine.probe import frozen_probe
from polyrank.engine.progress import Bar
from polyrank.engine.result import Result
from polyrank.engine.settings import Settings
from polyrank.engine.workshop import TaskWorkshop
from polyrank.errors import ConfigError, InertError, nearest
from polyrank.frame import Job, Method, Strategy, seed_of
from polyrank.frame import method as make
from polyrank.io.runs import RunFolder
from polyrank.layers import adapt, adapter_of, gate_statistics, grow_head, has_gates
from polyrank.streams import Stream
from polyrank.streams import stream as find_stream

REFERENCES = ("sequential", "joint", "probe")


@dataclass(frozen=True, kw_only=True)
class System:
    """One of the compared systems."""

    name: str
    label: str
    role: str
    method: Method
    strategies: tuple[Strategy, ...] = ()

    @property
    def pooled(self) -> bool:
        """Whether all tasks are trained on at once."""
        return any(strategy.pools for strategy in self.strategies)


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
        base: the pretrained model, a folder or hub id of one, or None for a small one that the stream's
            pretraining data make on the spot.
        stream: a stream or its name.
        method: a method or its name.
        strategies: strategies or their names, combined with the method.
        references: what stands beside it in the same run: "sequential" (plain LoRA of equal rank, task by task),
            "joint" (the same LoRA on all tasks at once), "probe" (a linear classifier on the frozen base's features
            of all tasks so far).
        train: settings of each task's training, the same for all systems.
        target_modules: layers to adapt, as in PEFT.
        seed: key of every random draw.
        out: run folder; None picks a free one below ./runs.
        overwrite: replace an interrupted run in `out`, or a finished one with the same configuration.
        progress: show a bar; None asks whether standard error is a terminal.
        command: how to repeat the run, for the record.

    Returns:
        The result; its folder holds configuration, events, matrices and adapters.

    Raises:
        ConfigError: naming everything that is wrong, before anything is written or loaded.
        RunError: if `out` holds another run, or training diverges.
        InertError: if a method did nothing.
    """
    tasks = find_stream(stream, seed=seed) if isinstance(stream, str) else find_stream(stream)
    chosen = make(method) if isinstance(method, str) else method
    combined = tuple(make(s) if isinstance(s, str) else s for s in strategies)
    settings = train if isinstance(train, Settings) else Settings.build(dict(train or {}))
    systems = _systems(chosen, combined, references)
    if problems := _problems(tasks, chosen, combined, references, settings):
        raise ConfigError(problems)
    model = bases.load_base(base, tasks) if isinstance(base, str) else base
    if model is not None:
        bases.try_base(model, tasks)
    source = "embedded" if base is None else base if isinstance(base, str) else "object"
    folder = RunFolder.create(
        _free(f"{tasks.name}-{chosen.name}") if out is None else Path(out),
        {
            "method": {"name": chosen.name, "options": chosen.options()},
            "strategies": [{"name": s.name, "options": s.options()} for s in combined],
            "references": list(references),
            "stream": tasks.describe(),
            "model": {"source": source} if model is None else bases.describe(model, source),
            "target_modules": target_modules,
            "seed": seed,
            "train": asdict(settings),
        },
        command=command,
        overwrite=overwrite,
    )
    engine = _Engine(folder, tasks, settings, seed, target_modules)
    try:
        with Bar(progress) as bar, _threads(1 if base is None else None):
            engine.bar = bar
            result = engine.run(model, systems, "probe" in references)
    except BaseException as error:
        folder.event("failed", error=f"{type(error).__name__}: {error}")
        folder.finish("failed")
        raise
    folder.finish()
    return result


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Limit torch's threads: the embedded base is too small to gain, and waiting for threads can cost it tenfold."""
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


def _systems(
    method: Method, strategies: tuple[Strategy, ...], references: Sequence[str]
) -> list[System]:
    label = f"{method.name} r={method.r}" + (f" k={k}" if (k := getattr(method, "k", None)) else "")
    label += "".join(f" + {s.name}" for s in strategies)
    found = [
        System(name=method.name, label=label, role="method", method=method, strategies=strategies)
    ]
    plain = cast("Method", make("lora", r=method.r))
    for name in ("sequential", "joint"):
        if name in references:
            strategy = cast("Strategy", make(name))
            system = System(
                name=name,
                label=f"{name} lora r={method.r}",
                role="reference",
                method=plain,
                strategies=(strategy,),
            )
            if not (method == plain and system.pooled == found[0].pooled and not strategies):
                found.append(system)
    return found


def _problems(
    stream: Stream,
    method: Method,
    strategies: tuple[Strategy, ...],
    references: Sequence[str],
    settings: Settings,
) -> list[str]:
    problems = [f"{method.name}: {problem}" for problem in method.checks()]
    problems += [f"{s.name}: {problem}" for s in strategies for problem in s.checks()]
    problems += [f"train: {problem}" for problem in settings.problems()]
    problems += [
        f"references: got {name!r}, expected {', '.join(REFERENCES)};{nearest(name, REFERENCES)}"
        for name in references
        if name not in REFERENCES
    ]
    if stream.scenario != "class-incremental":
        problems.append(
            f"stream: {stream.name!r} is {stream.scenario}; class-incremental streams can be run"
        )
    offers = {"class_names"}
    offers |= {"task_id"} if stream.visible.task_id_train and stream.visible.task_id_test else set()
    for entry in (method, *strategies):
        for need in sorted(entry.needs - offers):
            problems.append(
                f"{entry.name}: needs {need.replace('_', ' ')}, which stream {stream.name!r} "
                f"({stream.scenario}) does not give; choose another method or another stream"
            )
    return problems


class _Engine:
    """One run: a base, and every system on a fresh copy of it."""

    def __init__(
        self,
        folder: RunFolder,
        stream: Stream,
        settings: Settings,
        seed: int,
        target_modules: list[str] | str,
    ) -> None:
        self.folder, self.stream, self.settings, self.seed = folder, stream, settings, seed
        self.target_modules = target_modules
        self.bar: Watch = lambda event, fields: None

    def watch(self, event: str, fields: dict[str, Any]) -> None:
        """Pass an event on to the bar, and to the log unless it is a mere step."""
        self.bar(event, fields)
        self.folder.event("train" if event == "step" else event, **fields)

    def run(self, base: nn.Module | None, systems: list[System], probe: bool) -> Result:
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
        for system in systems:
            model, entry = self._system(copy.deepcopy(base), head, system)
            kept = model if system.role == "method" else kept
            results["systems"].append(entry)
            self.folder.write_results(results)
        if probe:
            results["systems"].append(self._probe(base, head))
            self.folder.write_results(results)
        return Result(path=self.folder.path, results=results, model=kept)

    def _pretrain(self) -> nn.Module:
        started = time.perf_counter()
        task = self.stream.pretraining
        assert task is not None
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
            base.to(device), system.method, self.target_modules, head=head, seed=seed_of(self.seed, "adapter")
        )  # fmt: skip
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
            self._alive(model, system, where)
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
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        saved = self._save(model, system.name)
        routing = self._routing(model)
        seconds = time.perf_counter() - started
        return model, self._entry(
            system.name,
            system.label,
            system.role,
            restricted,
            unrestricted,
            seconds,
            trainable,
            saved,
            routing,
        )

    def _task(
        self, model: nn.Module, system: System, group: list[int], where: dict[str, Any]
    ) -> None:
        index = group[-1]
        parts: dict[str, list[Any]] = {}
        for number in group:
            for role, rows in self.stream[number].data.items():
                parts.setdefault(role, []).append(rows)
        workshop = TaskWorkshop(model, parts, self.seed, index, self.settings.batch_size)
        boundary, state = system.method.boundary(), {}
        boundary.start(self.stream[index], workshop, state)
        while (work := boundary.next(self.stream[index], workshop, state)) is not None:
            if isinstance(work, Job):
                self.watch("job", {**where, "job": work.name})
                while not work.step(workshop, state):
                    pass
                continue
            loss = run_phase(
                model, TaskRows(parts["train"]), work, self.settings, task=index, seed=self.seed,
                strategies=system.strategies, workshop=workshop, watch=self.watch, where=where,
            )  # fmt: skip
            self.watch("task_end", {**where, "phase": work.name, "loss": loss})
        boundary.finish(self.stream[index], workshop, state)

    def _alive(self, model: nn.Module, system: System, where: dict[str, Any]) -> None:
        adapter = adapter_of(model)
        signs = system.method.vital_sign(adapter)
        self.watch("vital_sign", {**where, **signs})
        if signs and all(value == 0 for value in signs.values()):
            raise InertError(
                f"{system.label}: after task {where['task']!r} its vital signs {signs} are all zero, so it did nothing; "
                "raise the learning rate, or look for frozen parameters"
            )

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
        seconds = time.perf_counter() - started
        return self._entry(
            "probe",
            "frozen probe",
            "reference",
            restricted,
            unrestricted,
            seconds,
            trainable,
            None,
            None,
        )

    def _entry(
        self,
        name: str,
        label: str,
        role: str,
        restricted: np.ndarray,
        unrestricted: np.ndarray,
        seconds: float,
        trainable: int,
        adapter: str | None,
        routing: dict[str, Any] | None,
    ) -> dict[str, Any]:
        counts = [task.size("test") for task in self.stream]
        return {
            "name": name,
            "label": label,
            "role": role,
            "restricted": restricted.tolist(),
            "unrestricted": unrestricted.tolist(),
            "counts": counts,
            "metrics": {
                "unrestricted": metrics.summary(unrestricted, counts, missing="nan"),
                "restricted": metrics.summary(restricted, counts, missing="nan"),
            },
            "seconds": seconds,
            "trainable": trainable,
            "adapter": adapter,
            "routing": routing,
        }

    def _save(self, model: nn.Module, name: str) -> str:
        final = self.folder.path / "adapters" / name
        aside = final.with_name(name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        cast("Any", model).save_pretrained(str(aside))
        aside.replace(final)
        return str(final.relative_to(self.folder.path))
