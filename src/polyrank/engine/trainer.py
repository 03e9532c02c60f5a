"""polyrank inside transformers' Trainer and anything derived from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer as _Trainer

from polyrank.engine.attachment import Attachment, attach
from polyrank.errors import ConfigError
from polyrank.frame import Strategy
from polyrank.layers import adapter_of, hook_of, parameter_groups

if TYPE_CHECKING:
    _Base = _Trainer
else:
    _Base = object

EXTRA = ("task", "role", "condition")


class TrainerMixin(_Base):
    """Adds a method's groups, rules and conditions to a trainer: `class T(polyrank.TrainerMixin, SFTTrainer)`.

    A batch may carry `condition` (batch, c), `task` and `role` (batch,); they reach the method and not the model.
    """

    attachment: Attachment | None = None
    strategies: tuple[Strategy, ...] = ()
    task_index = 0
    phase_name = "train"
    workshop: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()

    def _refuse(self) -> None:
        method = adapter_of(self._inner()).method
        kind = str(self.accelerator.distributed_type).rsplit(".", 1)[-1]
        fsdp1 = (
            kind == "FSDP" and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1
        )
        if method.steered() and (kind == "DEEPSPEED" or fsdp1):
            raise ConfigError(
                f"distribution: {kind} hides or shards what the rules of {method.name!r} must read and write; "
                "use DDP, or FSDP2 by loading the model sharded"
            )

    def _inner(self) -> nn.Module:
        return cast("nn.Module", self.accelerator.unwrap_model(self.model))

    # --- optimiser -------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimiser over the method's groups and bind its rules."""
        inner = self._inner()
        if self.optimizer is None:
            adapter = adapter_of(inner)
            groups = parameter_groups(
                inner, self.args.learning_rate, self.args.weight_decay, adapter=adapter.name
            )
            held = {id(p) for group in groups for p in group["params"]}
            decayed = set(self.get_decay_parameter_names(inner))
            others = [
                (n, p) for n, p in inner.named_parameters() if p.requires_grad and id(p) not in held
            ]
            for decay in (True, False):
                params = [p for n, p in others if (n in decayed) is decay]
                if params:
                    groups.append(
                        {"params": params, "weight_decay": self.args.weight_decay if decay else 0.0}
                    )
            found = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast("Any", inner)
            )
            self.optimizer = found[0](groups, **found[1])
        self._attach()
        return cast("torch.optim.Optimizer", self.optimizer)

    def _attach(self) -> None:
        if self.attachment is not None:
            self.attachment.detach()
        self.attachment = attach(
            cast("torch.optim.Optimizer", self.optimizer),
            self._inner(),
            strategies=self.strategies,
            accumulation=self.args.gradient_accumulation_steps,
            scaler=self.accelerator.scaler,
            task=self.task_index,
            phase=self.phase_name,
            seed=self.args.seed,
            workshop=self.workshop,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tell the rules how long the phase is."""
        if self.attachment is not None:
            self.attachment.total = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    # --- the update ------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Hand the batch's condition to the cores; the rest is the trainer's own."""
        extra = {key: inputs[key] for key in EXTRA if key in inputs}
        hook = hook_of(self._inner())
        if hook is not None:
            hook.flow.ambient = (
                adapter_of(self._inner()).method.condition({**inputs, **extra}) if extra else None
            )
        if self.attachment is not None:
            self.attachment.accumulation = getattr(
                self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
            )
        return super().compute_loss(
            model, {k: v for k, v in inputs.items() if k not in extra}, *args, **kwargs
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in EXTRA if name not in columns)]

    def _rules_on_gradients(self) -> bool:
        """Run the rules on complete, unscaled gradients; True if there are any, and gradients are unscaled now."""
        attachment = self.attachment
        if attachment is None or not attachment.works_on_gradients():
            return False
        if not attachment.graded:
            self.accelerator.unscale_gradients()
        return attachment.before_clip()

    def _clip_grad_norm(self, model: Any) -> Any:
        if self._rules_on_gradients():
            # Gradients can be unscaled only once, so the accelerator's own clipping must not run.
            return nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._rules_on_gradients():
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = None
        return output

    # --- checkpoints -----------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.attachment is not None and self.args.should_save:
            self.attachment.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.attachment is not None:
            self.attachment.load(checkpoint)


class Trainer(TrainerMixin, _Trainer):
    """`transformers.Trainer` for polyrank models."""
