"""One phase of a task: a fresh Trainer over the task's rows."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from polyrank.engine.data import TaskRows, collate
from polyrank.engine.progress import Watch
from polyrank.engine.settings import Settings
from polyrank.engine.trainer import Trainer
from polyrank.errors import ConfigError, RunError
from polyrank.frame import Phase, Strategy, seed_of
from polyrank.layers import adapter_of

UNSERVED = ("losses", "groups", "span", "carry", "check_every", "keep")


def class_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the cross-entropy over the seen classes: its sum over the rows of the whole update."""
    logits = outputs["logits"].float()
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits, labels, reduction="sum") / count


class _Steps(TrainerCallback):
    """Reports losses and stops a run that diverged."""

    def __init__(self, watch: Watch, where: dict[str, Any]) -> None:
        self.watch, self.where = watch, where

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"loss: got {loss} at {self.where['system']}, task {self.where['task']!r}, step "
                f"{state.global_step}; lower the learning rate with --train lr=..., or clip harder "
                "with --train max_grad_norm=..."
            )
        self.watch(
            "step",
            {**self.where, "step": state.global_step, "total": state.max_steps, "loss": loss},
        )


def run_phase(
    model: nn.Module,
    rows: TaskRows,
    phase: Phase,
    settings: Settings,
    *,
    task: int,
    seed: int,
    strategies: tuple[Strategy, ...],
    workshop: Any,
    watch: Watch,
    where: dict[str, Any],
) -> float:
    """Train one phase and return the mean loss.

    Raises:
        ConfigError: if the phase names a role that the method does not have, or asks for
            something that is not served yet.
        RunError: if the loss is not finite.
    """
    adapter = adapter_of(model)
    if phase.train is not None and (unknown := phase.train - set(adapter.roles())):
        raise ConfigError(
            f"phase {phase.name!r}: trains {sorted(unknown)}, but the adapter has "
            f"{sorted(adapter.roles())}"
        )
    # Every field that is set is served or refused.
    asks = [name for name in UNSERVED if getattr(phase, name) != getattr(Phase(), name)]
    if asks:
        raise ConfigError(
            f"phase {phase.name!r}: sets {', '.join(asks)}; the engine serves none yet"
        )
    adapter.train_only(phase.train)
    steps = phase.steps or settings.epochs * -(
        -len(rows) // (settings.batch_size * settings.accumulation)
    )
    watch("phase", {**where, "phase": phase.name, "total": steps})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=_arguments(settings, scratch, steps, seed_of(seed, task, phase.name) % 2**31),
            train_dataset=rows,
            data_collator=collate,
            compute_loss_func=class_loss,
            callbacks=[_Steps(watch, where)],
        )
        trainer.strategies, trainer.task_index, trainer.phase_name = strategies, task, phase.name
        trainer.workshop = workshop
        trainer.pop_callback(PrinterCallback)
        try:
            output = trainer.train()
        finally:
            adapter.train_only(None)
            model.eval()
    return float(output.training_loss)


def _arguments(settings: Settings, folder: str, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=int(settings.warmup * steps) if settings.schedule != "constant" else 0,
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
