"""One phase of a task: a fresh Trainer over the task's rows, that can stop and go on anywhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from polyrank.engine.data import TaskRows
from polyrank.engine.objective import Objective
from polyrank.engine.order import KeyedOrder
from polyrank.engine.phase_trainer import PhaseTrainer, Steps
from polyrank.engine.progress import Watch
from polyrank.engine.reading import Reader
from polyrank.engine.settings import Settings
from polyrank.errors import ConfigError
from polyrank.frame import Method, Phase, Strategy, seed_of
from polyrank.layers import ModelAdapter, adapter_of

# Called at the end of every update with a function that gives the phase's state.
Pause = Callable[[Callable[[], dict[str, Any]]], None]


@dataclass(kw_only=True)
class Training:
    """What a phase trains with, whatever the phase.

    Attributes:
        parts: training rows, one dataset a task.
        ends: called after the update that finished part i of `parts`, if given; then the parts
            come in their order and nothing else marks where one ends.
        shown: number of the task as rules may see it.
        hidden: whether the scenario hides which task a row belongs to.
        carried: optimiser state at the end of the task's last phase.
        names: of the phases that the task has had so far.
        check: scores the validation rows, for phases that are checked.
        stepped: called at the end of every update.
        pause: called after it, where the state may be saved.
        trained: number of weights that the phase trains, once it has begun.
    """

    model: nn.Module
    reader: Reader
    method: Method
    strategies: tuple[Strategy, ...]
    settings: Settings
    parts: Sequence[Any]
    task: int
    shown: int
    seed: int
    workshop: Any
    watch: Watch
    where: dict[str, Any]
    hidden: bool = False
    buffer: Any = None
    ends: Callable[[int], None] | None = None
    carried: dict[str, Any] | None = None
    names: tuple[str, ...] = ()
    check: Callable[[], str] | None = None
    validate: Callable[[], float] | None = None
    stepped: Callable[[], None] = field(default=lambda: None)
    pause: Pause = field(default=lambda make: None)
    trained: int = 0


def run_phase(run: Training, phase: Phase, resume: dict[str, Any] | None = None) -> float:
    """Train one phase and return the mean loss since it began, or since it was resumed.

    Args:
        run: what to train.
        phase: how long, and which roles.
        resume: what `pause` was given, to go on from there.

    Raises:
        ConfigError: if the phase names roles, losses or checks that there are none of, asks for a
            length that there is none of, or has a loss that the model cannot serve.
        RunError: if the loss is not finite.
    """
    adapter = adapter_of(run.model)
    objective = Objective(run.reader, run.method, run.strategies, phase.losses)
    problems = _problems(run, phase, adapter) + objective.problems()
    if problems:
        raise ConfigError([f"phase {phase.name!r}: {problem}" for problem in problems])
    adapter.train_only(phase.train)
    run.trained = sum(p.numel() for p in adapter.trained())
    rows = TaskRows(run.parts)
    settings = run.settings
    key = (run.seed, run.task, phase.name)
    # Without marks between tasks, each part is repeated before the next one begins.
    flowing = run.ends is not None
    sizes = [len(part) for part in run.parts] if flowing else [len(rows)]
    order = KeyedOrder(sizes, *key, repeats=settings.epochs if flowing else 1)
    steps = updates(len(order), settings, phase, repeated=flowing)
    place = dict(zip(("number", "of"), phase.place or (), strict=False))
    run.watch("phase", {**run.where, "phase": phase.name, "total": steps, **place})
    objective.bind(adapter, run.workshop)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = PhaseTrainer(
            model=run.model,
            args=_arguments(
                settings, phase, scratch, steps, seed_of(*key) % 2**31, beside=objective.beside()
            ),
            train_dataset=rows,
            data_collator=run.reader.collate,
        )
        trainer.prepare_phase(run, phase, objective, order, resume)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(Steps(trainer, run, phase, order))
        again = None
        if resume is not None:
            again = scratch
            (Path(scratch) / "trainer_state.json").write_text(resume["trainer"], encoding="utf-8")
        try:
            output = trainer.train(resume_from_checkpoint=again)
            trainer.restore_best()
            run.carried = trainer.optimizer_kept()
        finally:
            adapter.train_only(None)
            run.model.eval()
    return float(output.training_loss)


def updates(rows: int, settings: Settings, phase: Phase | None = None, *, repeated: bool) -> int:
    """Return how many updates a phase has.

    Args:
        rows: of an epoch, on all processes together.
        settings: the run's.
        phase: its own number of steps, or of epochs, takes the place of the run's.
        repeated: whether `rows` holds all epochs already.
    """
    per_epoch = -(-rows // (settings.batch_size * settings.accumulation * _processes()))
    own, epochs = (0, 0) if phase is None else (phase.steps, phase.epochs)
    return own or per_epoch * (1 if repeated else epochs or settings.epochs)


def first_rate(settings: Settings, steps: int, phase: Phase | None = None) -> float:
    """Return the rate of the first update of a phase that moves anything, 0 if none does."""
    begin, total = phase.span if phase is not None and phase.span else (0, steps)
    probe = torch.optim.SGD([torch.zeros(1)], lr=settings.lr)
    schedule = get_scheduler(
        settings.schedule, probe, num_warmup_steps=_warmup(settings, total),
        num_training_steps=total,
    )  # fmt: skip
    (shape,) = cast("Any", schedule).lr_lambdas
    factors = (float(shape(index)) for index in range(begin, begin + steps))
    return next((settings.lr * factor for factor in factors if factor), 0.0)


def _warmup(settings: Settings, total: int) -> int:
    return int(settings.warmup * total) if settings.schedule != "constant" else 0


def _problems(run: Training, phase: Phase, adapter: ModelAdapter) -> list[str]:
    found = []
    roles = set(adapter.roles())
    if phase.name in run.names:
        found.append(
            f"name: the task has had the phases {list(run.names)}, expected a new name, by which "
            "draws are keyed; number them"
        )
    if phase.train is not None and (unknown := phase.train - roles):
        found.append(f"trains {sorted(unknown)}, but the adapter has {sorted(roles)}")
    found += [*_group_problems(phase, adapter), *_length_problems(phase)]
    if phase.epochs and run.ends is not None:
        found.append("epochs: the stream shows no end of a task, so rows come once in their order")
    if phase.keep not in ("last", "best"):
        found.append(f"keep: got {phase.keep!r}, expected 'last' or 'best'")
    if phase.keep == "best" and not phase.check_every:
        found.append("keep: 'best' needs check_every > 0, or nothing is ever compared")
    if phase.check_every and run.validate is None:
        found.append("check_every: the task has no validation rows to check on; add some")
    if phase.span is not None and not 0 <= phase.span[0] < phase.span[1]:
        found.append(f"span: got {phase.span}, expected (first, total) with 0 <= first < total")
    return found


def _group_problems(phase: Phase, adapter: ModelAdapter) -> list[str]:
    """Say where the phase's own groups and what it trains differ."""
    if phase.groups is None:
        return []
    held = [id(p) for group in phase.groups for p in group.params]
    roles = adapter.roles()
    wanted = {
        id(p): role
        for role in (roles if phase.train is None else phase.train & roles.keys())
        for p in roles[role]
    }
    found = []
    if len(held) != len(set(held)):
        found.append("groups: a tensor stands in two of them; put each into one")
    if missing := sorted({role for i, role in wanted.items() if i not in held}):
        found.append(f"groups: tensors of {missing} train and stand in none; add them")
    if strange := len(set(held) - wanted.keys()):
        found.append(f"groups: hold {strange} tensors that do not train; name their roles in train")
    return found


def _length_problems(phase: Phase) -> list[str]:
    """Say why a phase has no length, or two."""
    lengths = {"steps": phase.steps, "epochs": phase.epochs, "check_every": phase.check_every}
    found = [
        f"{name}: got {number}, expected at least 0; 0 is what the run says"
        for name, number in lengths.items()
        if number < 0
    ]
    if phase.steps > 0 and phase.epochs > 0:
        found.append(
            f"steps: got {phase.steps} beside epochs={phase.epochs}, expected one of them; leave "
            "the other at 0"
        )
    return found


def _processes() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _arguments(
    settings: Settings, phase: Phase, folder: str, steps: int, seed: int, *, beside: bool
) -> TrainingArguments:
    total = phase.span[1] if phase.span else steps
    # Left alone, transformers looks for no other process on a machine without an accelerator.
    alone = _processes() == 1
    plain: dict[str, Any] = {} if torch.cuda.is_available() else {"use_cpu": True}
    return TrainingArguments(
        **plain,
        ddp_backend=None if alone or torch.cuda.is_available() else "gloo",
        # What is not behind the model's output would count as unused, and yet get a gradient.
        ddp_find_unused_parameters=False if beside else None,
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=_warmup(settings, total),
        max_grad_norm=settings.max_grad_norm,
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
