"""The engine: a base, every system on a fresh copy of it, and checkpoints on the way."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from polyrank import metrics
from polyrank.engine import base as bases
from polyrank.engine.course import Course, Services
from polyrank.engine.data import batches, train_rows
from polyrank.engine.folders import Places
from polyrank.engine.general import General
from polyrank.engine.interrupt import Interrupts
from polyrank.engine.leavings import exported, figures_of
from polyrank.engine.plan import Plan, System
from polyrank.engine.prefix import PrefixReader
from polyrank.engine.probe import frozen_probe
from polyrank.engine.progress import Watch
from polyrank.engine.reading import Reader
from polyrank.engine.result import Result
from polyrank.frame import seed_of
from polyrank.io.checkpoints import Checkpoints
from polyrank.io.runs import RunFolder
from polyrank.layers import adapt, adapter_of, gate_statistics, has_gates

# Seconds between two checkpoints inside a task, where the caller does not count updates.
SECONDS = 30.0
# Bytes of frozen layers' outputs that stay in memory; more lies in a file that later runs find.
MEMORY = 2**26


class Engine:
    """One run.

    Args:
        folder: where it is written.
        plan: what is done.
        base: the model it begins with.
        bar: shows progress.
        interrupts: says whether to stop.
        places: how it is kept.
    """

    def __init__(
        self,
        folder: RunFolder,
        plan: Plan,
        base: bases.Base,
        bar: Watch,
        interrupts: Interrupts,
        places: Places,
    ) -> None:
        self.folder, self.plan, self.base, self.bar = folder, plan, base, bar
        self.stream, self.settings, self.seed = plan.stream, plan.settings, plan.seed
        self.interrupts, self.places = interrupts, places
        self.checkpoints = Checkpoints(folder.path / "checkpoints")
        self.number, self.calls, self.saved = 0, 0, time.monotonic()

    def watch(self, event: str, fields: dict[str, Any]) -> None:
        """Pass an event on to the bar, and to the log, where a step is called "train"."""
        self.bar(event, fields)
        self.folder.event("train" if event == "step" else event, **fields)

    def run(self) -> Result:
        """Run all systems, or those that are left, and write the results after each."""
        kept = self.checkpoints.latest()
        for sentence in self.checkpoints.damaged:
            self.folder.event("checkpoint_damaged", message=sentence)
        base = self._base()
        reader = self.base.reader_for(base, self.stream)
        results = self._begun()
        if kept is not None:
            self.folder.event("resumed", system=kept["system"])
            names = [system.name for system in self.plan.systems()[: kept["system"]]]
            old = self.folder.results()["systems"] if names else []
            mine = [entry for entry in old if entry["name"].split("@")[0] in names]
            results["systems"] = [entry for entry in mine if entry["name"] != "probe"]
        general = self._general(base, reader)
        model = None
        for number, system in enumerate(self.plan.systems()):
            if kept is not None and number < kept["system"]:
                continue
            self.number = number
            course = self._course(base, reader, general, system, kept)
            kept = None
            course.run()
            results["systems"] += self._entries(course)
            model = course.model if system.role == "method" else model
            self.folder.write_results(results)
        if "probe" in self.plan.references:
            results["systems"].append(self._probe(base, reader))
            self.folder.write_results(results)
        return Result(path=self.folder.path, results=results, model=model)

    def _begun(self) -> dict[str, Any]:
        tasks = [
            {
                "name": task.name,
                "labels": list(task.labels),
                "metric": task.metric,
                "n_train": len(train_rows(task)),
                "n_test": task.size("test"),
            }
            for task in self.stream
        ]
        return {"schema": 1, "scenario": self.stream.scenario, "tasks": tasks, "systems": []}

    def _base(self) -> nn.Module:
        """Return the base, made now or read from the folder."""
        model = self.base.made(self.stream, self.seed, self.folder.path / "base", self.watch)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return model.to(device)

    def _general(self, base: nn.Module, reader: Reader) -> General | None:
        task = self.stream.general
        if task is None:
            return None
        return General(base, reader, self.base.head, task, self.settings.eval_batch_size)

    def _course(
        self,
        base: nn.Module,
        reader: Reader,
        general: General | None,
        system: System,
        kept: dict[str, Any] | None,
    ) -> Course:
        services = Services(
            plan=self.plan,
            reader=lambda model: self._reader(reader, model, system),
            watch=self.watch,
            pause=self._pause,
            general=general,
        )
        mine = self._copy(base)
        if kept is not None:
            return Course.restored(services, system, mine, kept["course"])
        model = adapt(
            mine,
            system.method,
            self.base.targets_for(self.plan.target_modules, system.method),
            head=self.base.head,
            seed=seed_of(self.seed, "adapter"),
        )
        return Course(services, system, model)

    def _copy(self, base: nn.Module) -> nn.Module:
        """Return a copy of the base for one system; adapters name the run's own if it keeps one."""
        mine: Any = copy.deepcopy(base)
        place = self.folder.path / "base"
        if place.is_dir():
            mine.name_or_path = str(place.resolve())
            mine.config._name_or_path = mine.name_or_path
        return cast("nn.Module", mine)

    def _reader(self, reader: Reader, model: nn.Module, system: System) -> Reader:
        """Return a reader of a course's own, which runs frozen layers once a row if it can."""
        own = copy.copy(reader)
        if not self.places.prefix_cache:
            return own
        roles = ("train", "text", "test", *(("validation",) if self.plan.validate else ()))
        rows = [task.data[role] for task in self.stream for role in roles if role in task.data]
        found = PrefixReader(own, model, memory=MEMORY).prefill(rows)
        if found.reason:
            return own
        self.watch("prefix", {"system": system.label, **found.kept})
        return found

    # --- checkpoints -----------------------------------------------------------------------------

    def _pause(self, make: Callable[[], dict[str, Any]], always: bool = False) -> None:
        """Save if it is time to, or if a signal has come; then the run ends here."""
        self.calls += 1
        every = self.places.save_every
        due = self.calls >= every if every else time.monotonic() - self.saved >= SECONDS
        asked = self.interrupts.asked is not None
        if not (due or asked or always):
            return
        state = make()
        self.checkpoints.save({"system": self.number, "course": state})
        self.folder.event("checkpoint", group=state["group"], stage=state["stage"])
        self.calls, self.saved = 0, time.monotonic()
        if asked:
            self.interrupts.stop()

    # --- results ---------------------------------------------------------------------------------

    def _entries(self, course: Course) -> list[dict[str, Any]]:
        """Return one entry for every model that a system deploys; the first one is its own."""
        system, model = course.system, course.model
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found: list[dict[str, Any]] = []
        for name, (restricted, unrestricted) in course.marks.matrices.items():
            own = not found
            entry = {
                "name": system.name if own else f"{system.name}@{name}",
                "label": system.label if own else f"{system.label} ({name})",
                "role": system.role,
                **self._figures(restricted.numpy(), unrestricted.numpy()),
                "trainable": max(course.trained, trainable),
                "adapter": self._save(model, system.name) if own else None,
                "routing": self._routing(model, course.reader) if own else None,
                "extra_samples": course.extra_samples(),
                "seconds": course.seconds + time.perf_counter() - course.started,
            }
            if own:
                entry |= self._leavings(course, entry["routing"])
            if name:
                entry["deploy"] = name
            if own and course.marks.general:
                entry["general"] = list(course.marks.general)
            if own and course.marks.validation is not None:
                first, second = (part.numpy() for part in course.marks.validation)
                entry["validation"] = self._figures(first, second, "validation")
            found.append(entry)
        return found

    def _leavings(self, course: Course, routing: dict[str, Any] | None) -> dict[str, Any]:
        """Return what the boundaries of a finished course leave: figures, and adapters on disk."""
        boundaries, workshop = course.closing()
        figures = figures_of(boundaries, workshop, routing)
        exports = exported(boundaries, workshop, self.folder.path, course.system.name)
        found: dict[str, Any] = {"figures": figures, "exports": exports}
        return {key: value for key, value in found.items() if value}

    def _figures(
        self, restricted: np.ndarray, unrestricted: np.ndarray, split: str = "test"
    ) -> dict[str, Any]:
        counts = [task.size(split) for task in self.stream]
        limits = self.plan.limits()
        classes = [len(task.classes) for task in self.stream]
        sizes = classes if self.plan.restricts() and all(classes) else None

        def figures(matrix: np.ndarray) -> dict[str, float]:
            return metrics.summary(
                matrix,
                counts,
                classes=sizes,
                restricted=restricted,
                missing="nan",
                limits=limits,
            )

        return {
            "restricted": restricted.tolist(),
            "unrestricted": unrestricted.tolist(),
            "counts": counts,
            "metrics": {
                "unrestricted": figures(unrestricted),
                "restricted": figures(restricted),
            },
        }

    def _routing(self, model: nn.Module, reader: Reader) -> dict[str, Any] | None:
        views = [layer for layer in adapter_of(model).layers if has_gates(layer)]
        if not views:
            return None
        device = next(model.parameters()).device
        size = self.settings.eval_batch_size
        load, gate, entropy = [], [], []
        for task in self.stream:
            inputs = (
                {key: value.to(device) for key, value in reader.inputs(batch).items()}
                for batch in batches(task.data["test"], size, reader.collate)
            )
            found = gate_statistics(model, views, inputs)
            load.append([stats.load().tolist() for stats in found])
            gate.append([stats.mean().tolist() for stats in found])
            entropy.append([metrics.load_entropy(stats.load().tolist()) for stats in found])
        return {
            "layers": [layer.site.path for layer in views],
            "tasks": [task.name for task in self.stream],
            "load": load,
            "gate": gate,
            "entropy": entropy,
        }

    def _probe(self, base: nn.Module, reader: Reader) -> dict[str, Any]:
        started = time.perf_counter()
        self.watch("task_start", {"system": "frozen probe", "task": "all", "classes": []})
        restricted, unrestricted, trainable = frozen_probe(
            base, reader, self.base.head or "", self.stream, self.settings.eval_batch_size
        )
        if not self.plan.restricts():
            restricted = np.full_like(restricted, np.nan)
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

    def _save(self, model: nn.Module, name: str) -> str:
        final = self.folder.path / "adapters" / name
        aside = final.with_name(name + ".part")
        shutil.rmtree(aside, ignore_errors=True)
        cast("Any", model).save_pretrained(str(aside))
        # A run that was stopped right here has written the same adapter before.
        shutil.rmtree(final, ignore_errors=True)
        aside.replace(final)
        return str(final.relative_to(self.folder.path))
