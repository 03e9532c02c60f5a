"""The Trainer of a phase: our objective, replayed rows, our order, and state that can be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from polyrank.engine.objective import Objective
from polyrank.engine.order import KeyedOrder
from polyrank.engine.state import (
    MARK,
    optimizer_state,
    random_state,
    restore_optimizer,
    restore_random,
)
from polyrank.engine.trainer import Trainer
from polyrank.errors import RunError
from polyrank.frame import ROLES, Group, Out, Phase

if TYPE_CHECKING:
    from polyrank.engine.phase import Training


class PhaseTrainer(Trainer):
    """`polyrank.Trainer` for one phase of the engine."""

    loss_is_scaled_for_ga = True

    def prepare_phase(
        self,
        run: Training,
        phase: Phase,
        objective: Objective,
        order: KeyedOrder,
        resume: dict[str, Any] | None,
    ) -> None:
        """Take what the phase is made of; called once, before `train`."""
        self.run, self.phase, self.order, self.resume = run, phase, order, resume
        self.objective = objective
        # It collects the garbage of an earlier model, of which a fresh Trainer has none: 0.4 s.
        cast("Any", self.accelerator).free_memory = lambda *objects: objects
        self.strategies, self.workshop = run.strategies, run.workshop
        self.task_index, self.phase_name = run.shown, phase.name
        self.offers: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.best: dict[str, Any] = {} if resume is None else dict(resume["best"])

    def own_groups(self) -> list[Group] | None:
        """Return the phase's groups, if it has any."""
        return self.phase.groups

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Fetch an update's micro-batches, put replayed rows beside them, and count."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._beside(batch, number) for number, batch in enumerate(batches)]
        self.counts = self.objective.counts(batches)
        self.micro = len(batches)
        return batches, None

    def _beside(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """Return current rows and replayed ones as one batch, with their roles."""
        rows = len(batch["labels"])
        device = batch["labels"].device
        batch["role"] = torch.full((rows,), ROLES["train"], device=device)
        replay, buffer = self.objective.replay, self.run.buffer
        # Before the first task is over, what could be replayed is what is being trained on.
        if replay is None or not replay.ratio or self.run.workshop.first or not len(buffer):
            return batch
        parts = [batch]
        place = (self.run.task, self.phase.name, self.state.global_step, number, self._rank())
        for role in ("replay", "again")[: replay.draws]:
            drawn = buffer.draw(max(1, round(replay.ratio * rows)), *place, role)
            drawn["role"] = torch.full((len(drawn["labels"]),), ROLES[role])
            parts.append({key: value.to(device) for key, value in drawn.items()})
        stored = [part.pop("stored", None) for part in parts]
        joined = self.run.reader.join(parts)
        if any(found is not None for found in stored):
            joined["stored"] = _rectangle(stored, [len(part["labels"]) for part in parts])
        return joined

    def _rank(self) -> int:
        return int(self.args.process_index)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Hide from the method which task a row belongs to, where the scenario does."""
        self.origin = inputs["task"]
        if self.run.hidden:
            inputs = {**inputs, "task": torch.full_like(inputs["task"], -1)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _own_loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Out]:
        inner = self._inner()
        loss, out = self.objective(model, inner, self._flow(), batch, self.counts, self.micro)
        # Counts are those of all processes, and DDP averages over them.
        if self.run.buffer is not None:
            self._remember(batch, out)
        return loss * self.args.world_size, out

    def _remember(self, batch: dict[str, Tensor], out: Out) -> None:
        mine = batch["role"] == ROLES["train"]
        stores = self.objective.replay is not None and "logits" in self.objective.replay.stores
        logits = cast("Tensor", out.logits).detach()[mine] if stores else None
        labels = batch["labels"][mine]
        flat = labels if labels.dim() == 1 else labels.new_zeros(len(labels))
        self.offers.append((self.origin[mine], batch["row"][mine], flat, logits))

    def offer(self) -> None:
        """Offer the update's own rows to the buffer, in the order of processes and rows."""
        found: list[list[Any]] = []
        for tasks, rows, labels, logits in self.offers:
            kept: Sequence[Tensor | None] = [None] * len(tasks) if logits is None else list(logits)
            # Classes are of no use to a buffer of numbers or texts.
            numbers = labels.long().tolist()
            found += map(list, zip(tasks.tolist(), rows.tolist(), numbers, kept, strict=True))
        self.offers = []
        if self.args.world_size > 1:
            shared: list[Any] = [None] * self.args.world_size
            dist.all_gather_object(shared, found)
            found = [entry for part in shared for entry in part]
        for task, row, label, logits in found:
            self.run.buffer.offer(task, row, label, logits)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Build the schedule; that of a phase with a span begins inside a longer one."""
        span = self.phase.span
        made = super().create_scheduler(span[1] if span else num_training_steps, optimizer)
        if self.attachment is not None:
            self.attachment.total = num_training_steps
        # The first rate of a schedule is set when it is made, so only the steps are left.
        for _ in range(span[0] if span and self.resume is None else 0):
            made.step()
        if self.phase.carry is not None and self.resume is None and self.run.carried is not None:
            restore_optimizer(self._bare(), self.phase.carry(self.run.carried))
        return made

    def _bare(self) -> torch.optim.Optimizer:
        optimizer = cast("Any", self.optimizer)
        return cast("torch.optim.Optimizer", getattr(optimizer, "optimizer", optimizer))

    def optimizer_kept(self) -> dict[str, Any]:
        """Return the optimiser's state, for a phase that carries it on."""
        return optimizer_state(self._bare())

    # --- state that is kept ----------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """Return what this phase needs to go on from the end of this update."""
        assert self.attachment is not None
        tensors, plain = self.attachment.state()
        return {
            "phase": self.phase.name,
            "trainer": self._state_text(),
            "optimizer": self.optimizer_kept(),
            "scheduler": cast("Any", self.lr_scheduler).state_dict(),
            "rules": {"tensors": tensors, "plain": plain},
            "random": random_state(),
            "best": self.best,
        }

    def _state_text(self) -> str:
        import json
        from dataclasses import asdict

        state = {k: v for k, v in asdict(self.state).items() if not k.startswith("_")}
        return json.dumps(state, sort_keys=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the weights stand in the model already."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.resume is None:
            return
        assert self.attachment is not None
        restore_optimizer(self._bare(), self.resume["optimizer"])
        cast("Any", self.lr_scheduler).load_state_dict(self.resume["scheduler"])
        rules = self.resume["rules"]
        self.attachment.restore(rules["tensors"], rules["plain"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: the engine trains without a loss scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.resume is not None:
            restore_random(self.resume["random"])

    # --- checks inside a phase -------------------------------------------------------------------

    def check(self) -> str:
        """Score the validation rows, keep the best weights if asked for, and ask the boundary."""
        assert self.run.validate is not None
        training = self._inner().training
        score = self.run.validate()
        self._inner().train(training)
        if self.phase.keep == "best" and score > self.best.get("score", -math.inf):
            tensors = self._inner().state_dict()
            kept = {n: t.detach().clone() for n, t in tensors.items() if MARK in n}
            self.best = {"score": score, "step": self.state.global_step, "tensors": kept}
        self.run.workshop.checked = {"validation": score, "step": float(self.state.global_step)}
        return self.run.check() if self.run.check is not None else "go"

    def restore_best(self) -> None:
        """Put the best weights back, if they were kept."""
        if not self.best:
            return
        own = self._inner().state_dict()
        with torch.no_grad():
            for name, value in self.best["tensors"].items():
                own[name].copy_(value)


def _rectangle(parts: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
    """Return stored logits as (all rows, classes), NaN where nothing is stored."""
    known = [part for part in parts if part is not None]
    made = known[0].new_full((sum(rows), max(part.shape[1] for part in known)), math.nan)
    first = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            made[first : first + count, : part.shape[1]] = part
        first += count
    return made


class Steps(TrainerCallback):
    """What happens at the end of every update."""

    def __init__(
        self, trainer: PhaseTrainer, run: Training, phase: Phase, order: KeyedOrder
    ) -> None:
        self.trainer, self.run, self.phase = trainer, run, phase
        settings = run.settings
        rows = settings.batch_size * settings.accumulation * trainer.args.world_size
        self.ends = {-(-end // rows): part for part, end in enumerate(order.ends())}

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the epoch's order, also when training goes on in the middle of one."""
        loader = kwargs.get("train_dataloader")
        if loader is not None:
            per_epoch = max(1, -(-len(loader) // args.gradient_accumulation_steps))
            self.trainer.order.set_epoch(state.global_step // per_epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Offer rows, evaluate where a part ends, check, and let the engine save or stop."""
        self.run.stepped()
        if self.run.buffer is not None:
            self.trainer.offer()
        if self.run.ends is not None and state.global_step in self.ends:
            training = self.run.model.training
            self.run.ends(self.ends[state.global_step])
            self.run.model.train(training)
        every = self.phase.check_every
        if every and state.global_step % every == 0 and self.trainer.check() == "stop":
            control.should_training_stop = True
        if state.global_step < state.max_steps and not control.should_training_stop:
            self.run.pause(self.trainer.kept)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report losses and stop a run that diverged."""
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        where = self.run.where
        if not math.isfinite(loss):
            raise RunError(
                f"loss: got {loss} at {where['system']}, task {where['task']!r}, step "
                f"{state.global_step}; lower the learning rate with --train lr=..., or clip harder "
                "with --train max_grad_norm=..."
            )
        self.run.watch(
            "step", {**where, "step": state.global_step, "total": state.max_steps, "loss": loss}
        )
