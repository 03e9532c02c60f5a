"""polyrank inside transformers' Trainer and anything derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer as _Trainer

from polyrank.engine.attachment import Attachment, attach, root_of
from polyrank.errors import CheckpointError, ConfigError
from polyrank.frame import Flow, Group, Strategy
from polyrank.layers import PolyrankConfig, adapter_of, ensure_flow, parameter_groups
from polyrank.parts.optimizer import build_optimizer

if TYPE_CHECKING:
    _Base = _Trainer
else:
    _Base = object

EXTRA = {"task", "row", "role", "condition"}
# Optimisers that choose their own parameters (GaLore, LOMO, layer-wise ones) get them this way.
OWN_GROUPS = {"params", "model", "optimizer_dict"}


class TrainerMixin(_Base):
    """Adds a method's groups, rules and conditions: `class T(polyrank.TrainerMixin, SFTTrainer)`.

    A batch may carry `condition` (batch, c), `task` and `role` (batch,); they reach the method and
    not the model.
    """

    attachment: Attachment | None = None
    strategies: tuple[Strategy, ...] = ()
    task_index = 0
    phase_name = "train"
    workshop: Any = None
    # Evaluates losses in place of the model's own, in the engine's phases.
    objective: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse()

    def _refuse(self) -> None:
        method = adapter_of(self._inner()).method
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"distribution: got {self.args.n_gpu} devices in one process, whose threads would "
                "share one mask and one condition; start with torchrun or accelerate launch, or "
                "choose one device by CUDA_VISIBLE_DEVICES"
            )
        if self._sharded() and method.steered():
            raise ConfigError(
                f"distribution: {self._kind()} hides or shards what the rules of {method.name!r} "
                "must read and write; use DDP, or FSDP2 by loading the model sharded"
            )

    def _kind(self) -> str:
        return str(self.accelerator.distributed_type).rsplit(".", 1)[-1]

    def _sharded(self) -> bool:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        first = self._kind() == "FSDP" and getattr(plugin, "fsdp_version", 1) == 1
        return first or self._kind() == "DEEPSPEED"

    def _inner(self) -> nn.Module:
        return cast("nn.Module", self.accelerator.unwrap_model(self.model))

    def _flow(self) -> Flow:
        return ensure_flow(root_of(self._inner()))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimiser over the method's groups and bind its rules."""
        inherited = super().create_optimizer
        if self._sharded():
            return inherited() if model is None else inherited(model)
        inner = self._inner()
        if self.optimizer is None:
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, cast("Any", inner)
            )
            plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
            if plain and not OWN_GROUPS & options.keys():
                rate, decay = self.args.learning_rate, self.args.weight_decay
                groups = parameter_groups(inner, rate, decay, groups=self.own_groups())
                otherwise = adapter_of(inner).method.otherwise
                self.optimizer = build_optimizer(groups, kind, options, otherwise)
        # Keeps what is there; what it builds itself is looked through by attach.
        inherited()
        self._attach()
        return cast("torch.optim.Optimizer", self.optimizer)

    def own_groups(self) -> list[Group] | None:
        """Return the optimiser's groups if not those of the method, as in a phase with its own."""
        return None

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
            evaluated=self.objective is not None,
            groups=self.own_groups(),
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Tell the rules how long the phase is."""
        if self.attachment is not None:
            self.attachment.total = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and leave the model unattached even if training stops half-way."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.attachment is not None:
                self.attachment.detach()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin the update and hand the batch's condition to the cores; the rest is inherited."""
        if self.attachment is not None and model.training:
            self.attachment.accumulation = getattr(
                self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
            )
            # Here and not in the model's first forward, which may be compiled.
            self.attachment.begin()
        condition, plain = self._condition(inputs)
        with nullcontext() if condition is None else self._flow().put(ambient=condition):
            if self.objective is not None:
                return self._own_loss(model, inputs)[0]
            return super().compute_loss(model, plain, *args, **kwargs)

    def _own_loss(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        raise NotImplementedError(f"{type(self).__name__} has an objective and no _own_loss")

    def _condition(self, inputs: Any) -> tuple[Tensor | None, Any]:
        if not isinstance(inputs, Mapping):
            return None, inputs
        attached = self.attachment
        adapter = adapter_of(self._inner()) if attached is None else attached.adapter
        plain = {key: value for key, value in inputs.items() if key not in EXTRA}
        return adapter.method.condition(dict(inputs)), plain

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict under the batch's condition; without labels no `compute_loss` would see it."""
        extra = EXTRA & inputs.keys() if isinstance(inputs, Mapping) else ()
        if not extra:
            return super().prediction_step(model, inputs, *args, **kwargs)
        moved = dict(inputs)
        moved.update((key, self._prepare_input(inputs[key])) for key in extra)
        condition, plain = self._condition(moved)
        with self._flow().put(ambient=condition):
            return super().prediction_step(model, plain, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = list(cast("Any", self._signature_columns) or [])
        cast("Any", self)._signature_columns = [*columns, *sorted(EXTRA - set(columns))]

    def create_accelerator_and_postprocess(self) -> None:
        """Let rules see gradients before they are clipped or measured, as all trainers do here."""
        super().create_accelerator_and_postprocess()
        clip = self.accelerator.clip_grad_norm_

        def rules_first(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            attachment = self.attachment
            if attachment is None:
                return clip(parameters, max_norm, norm_type=norm_type)
            first = attachment.works_on_gradients()
            if first and not attachment.graded:
                self.accelerator.unscale_gradients()
            attachment.before_clip()
            # Gradients can be unscaled only once, so the accelerator's own must not run as well.
            chosen = nn.utils.clip_grad_norm_ if first else clip
            return chosen(parameters, max_norm, norm_type=norm_type)

        self.accelerator.clip_grad_norm_ = rules_first

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights; an adapter that waits for its start takes the checkpoint's structure.

        Called before there is an optimiser.

        Raises:
            CheckpointError: if the checkpoint is of another method or of other options.
        """
        inner = cast("Any", self._inner())
        adapter = adapter_of(inner)
        waits = any(view.waiting for view in adapter.layers)
        if waits and (Path(resume_from_checkpoint) / "adapter_config.json").is_file():
            # Shapes, such as those of what is subtracted, stand in the saved configuration.
            saved = cast("Any", PolyrankConfig.from_pretrained(resume_from_checkpoint))
            own = inner.peft_config[adapter.name]
            if (saved.method, saved.options) != (own.method, own.options):
                raise CheckpointError(
                    f"resume: the checkpoint holds {saved.method} {saved.options}, and this model "
                    f"{own.method} {own.options}; make the model with the method that the run "
                    "began with"
                )
            inner.delete_adapter(adapter.name)
            inner.load_adapter(resume_from_checkpoint, adapter.name, is_trainable=True)
            inner.set_adapter(adapter.name)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)

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
