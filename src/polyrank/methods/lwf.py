"""LwF: on the new task's inputs, answer about old classes as the model did before the task.

Idea: old answers to new inputs stand in for the old data (PredKD).
Maths: O = classes of earlier tasks, z' = logits at the start of the task, in evaluation mode.
    "softmax": L = CE + λ T² KL(softmax(z'_O / T) ‖ softmax(z_O / T)); T² keeps the size of the
    gradient at any T. "softmax-ce": λ times the cross-entropy of the same two without T², whose
    gradient is 1 / T² of that and whose value at z = z' is the teacher's entropy. "bce" (LwF.MC)
    replaces the task loss: Σ_c BCE(σ(z_c), t_c), t_c one-hot for classes of this task, σ(z'_c) for
    the others. Means over rows, sums over classes. Text: over the vocabulary, at labelled tokens.
Source: arXiv:1606.09282; T² arXiv:1503.02531, section 2; "bce" arXiv:1611.07725, 2203.17269.
Differs from the released code: BCE on logits, where theirs rounds σ to one from z = 17 on and loses
    the gradient; "softmax" has T², "softmax-ce" is theirs.
Limits: nothing to do in a first task. Cost: one forward without gradients for every step.
Status: forms and gradients tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.frame import ROLES, Boundary, Loss, Out, Strategy, register
from polyrank.layers.views import wide
from polyrank.parts import distil
from polyrank.parts.boundaries import Later

NEEDS = frozenset({"logits", "teacher.logits"})


class Distillation(distil.Taught):
    """T² KL, or the cross-entropy, of the softened answers about old classes."""

    needs = NEEDS
    role, per = "train", "label"

    def __init__(self, weight: float, temperature: float, form: str) -> None:
        self.weight, self.temperature, self.form = weight, temperature, form

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows, or over labelled tokens."""
        assert out.logits is not None
        teacher = self.taught(out)
        if teacher is None or teacher.logits is None:
            return wide(out.logits).new_zeros(())
        old = slice(None) if out.logits.dim() == 3 else slice(self.workshop.known)
        both = (out.logits, teacher.logits)
        z, taught = (distil.answers(found, batch["labels"])[:, old] for found in both)
        if self.form == "softmax-ce":
            return distil.soft_cross_entropy(z, taught, self.temperature)
        return self.temperature**2 * distil.divergence(z, taught, self.temperature)


class BinaryDistillation(distil.Taught):
    """Σ_c BCE(σ(z_c), t_c): labels for classes of this task, the teacher for all others."""

    needs = NEEDS

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows; one of the current task with a label of another raises."""
        assert out.logits is not None
        z, labels, teacher = wide(out.logits), batch["labels"], self.taught(out)
        own = distil.own_classes(self.workshop, z.shape[1], z.device)
        role = batch.get("role", torch.full_like(labels, ROLES["train"]))
        distil.refuse_strangers(own[labels] | (role != ROLES["train"]), "lwf")
        taught = None if teacher is None or teacher.logits is None else wide(teacher.logits)
        target = distil.sigmoid_targets(z, taught, labels, own, self.workshop.known)
        return F.binary_cross_entropy_with_logits(z, target, reduction="sum")


@register
@dataclass(frozen=True, kw_only=True)
class LwF(Later):
    """Learning without forgetting.

    Args:
        form: "softmax", "softmax-ce" or "bce".
        weight: λ >= 0; "bce" has none.
        temperature: T > 0; "bce" has none.
    """

    form: str = "softmax"
    weight: float = 1.0
    temperature: float = 2.0

    needs = frozenset({"boundary"})
    choices: ClassVar = {"form": ("softmax", "softmax-ce", "bce")}
    least: ClassVar = {"weight": 0}

    def __post_init__(self) -> None:
        asks = {"boundary", "classes"} if self.form == "bce" else {"boundary"}
        object.__setattr__(self, "needs", frozenset(asks))

    def problems(self) -> Iterator[str]:
        """Check the temperature."""
        if not self.temperature > 0:
            yield f"temperature: got {self.temperature}, expected > 0; 2 is common"

    def losses(self) -> list[Loss]:
        """Return the distillation that stands beside the task loss."""
        beside = self.form != "bce" and self.weight
        return [Distillation(self.weight, self.temperature, self.form)] if beside else []

    def task_loss(self) -> Loss | None:
        """Return LwF.MC's, which stands in place of it."""
        return BinaryDistillation() if self.form == "bce" else None

    def boundary(self) -> Boundary:
        """Keep the teacher."""
        return distil.Snapshot()

    @classmethod
    def samples(cls) -> list[Strategy]:
        """All forms."""
        return [cls(), cls(form="softmax-ce", temperature=1.0), cls(form="bce")]
