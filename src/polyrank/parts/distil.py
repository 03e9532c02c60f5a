"""What a student owes its teacher: answers, features and hidden states, summed over rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Loss, Out, Workshop
from polyrank.layers.views import wide
from polyrank.parts.boundaries import Aside

BEFORE = "before"


class Snapshot(Aside):
    """Keeps the model as the last task left it, as the replica "before"; not for a first task."""

    def start(self, task: object, workshop: Workshop, state: dict[str, object]) -> None:
        """Copy the adapter; the head's newest rows, which no task has trained, come along."""
        if not workshop.first:
            workshop.replica(BEFORE)


class Taught(Loss):
    """A loss whose teacher is the model as the last task left it; idle in a first task."""

    teacher = BEFORE

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Learn which task it is; without a teacher none is run.

        Raises:
            ConfigError: without an engine.
        """
        if workshop is None:
            raise ConfigError(
                f"{type(self).__name__}: its teacher is kept between tasks, by the engine; train "
                "through polyrank.run"
            )
        self.workshop = workshop
        if workshop.first:
            self.needs = frozenset(n for n in self.needs if not n.startswith("teacher."))

    def taught(self, out: Out) -> Out | None:
        """Return what the teacher left, or None in a first task.

        Raises:
            ConfigError: if a later task has no teacher.
        """
        if self.workshop.first:
            return None
        if out.teacher is None:
            raise ConfigError(
                f"{type(self).__name__}: this is not the first task, and its teacher left nothing; "
                "keep the strategy's boundary, which makes it, or begin anew"
            )
        return out.teacher


def answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits that are counted, (m, C) in fp32 or fp64.

    Of a classifier, logits (n, C) with labels (n,), all of them; of a language model, (n, seq, C)
    with (n, seq), those that stand before a label other than -100, which they are to predict.
    """
    if logits.dim() == 2:
        return wide(logits)
    return wide(logits[:, :-1][labels[:, 1:] != -100])


def soft_cross_entropy(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """−Σ_rows Σ_c softmax(z'/T)_c · log softmax(z/T)_c for logits z and z' of the teacher, (m, C).

    Its gradient is (softmax(z/T) − softmax(z'/T)) / T; at z = z' the teacher's entropy is left.
    """
    target = (taught / temperature).softmax(-1)
    return -(target * (logits / temperature).log_softmax(-1)).sum()


def divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Σ_rows KL(softmax(z'/T) ‖ softmax(z/T)): `soft_cross_entropy` less the teacher's entropy."""
    student, teacher = ((z / temperature).log_softmax(-1) for z in (logits, taught))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def sigmoid_targets(
    logits: Tensor, taught: Tensor | None, labels: Tensor, own: Tensor, known: int
) -> Tensor:
    """Return targets in [0, 1] for logits (n, C): one-hot for own classes, σ(z') for others.

    Args:
        logits: of the student; its shape is that of the targets.
        taught: logits of the teacher, or None in a first task.
        labels: (n,) classes.
        own: (C,) bool, the classes of the current task.
        known: number of classes of all earlier tasks; the teacher speaks of these.
    """
    target = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    if taught is not None:
        old = ~own[:known]
        target[:, :known] = torch.where(old, taught[:, :known].sigmoid(), target[:, :known])
    return target


def own_classes(workshop: Workshop | None, count: int, device: torch.device) -> Tensor:
    """Return (count,) bool: which rows of the head belong to the current task."""
    own = torch.zeros(count, dtype=torch.bool, device=device)
    own[list(classes_of(workshop))] = True
    return own


def classes_of(workshop: Workshop | None) -> tuple[int, ...]:
    """Return the classes of the current task.

    Raises:
        ConfigError: if there is no engine to tell them, or the task has none.
    """
    if workshop is None or not workshop.classes:
        raise ConfigError(
            "classes: this loss must know the classes of the current task, and there are none "
            "here; train through polyrank.run, on a stream whose tasks have classes"
        )
    return workshop.classes


def refuse_strangers(inside: Tensor, what: str) -> None:
    """Raise if a row of (n,) bool is False: its label belongs to no class of the current task.

    Raises:
        ConfigError: naming how many.
    """
    if not bool(inside.all()):
        raise ConfigError(
            f"{what}: {int((~inside).sum())} of {len(inside)} rows have labels outside the current "
            "task, which would be silent replay; give each task rows of its own classes"
        )


def row_means(value: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over the rows, or over the real tokens, of the mean over all that is left.

    value (n, …); with a mask (n, seq) value is (n, seq, …), and every real token counts as one.
    """
    if mask is not None and value.dim() > 2:
        return value.flatten(2).mean(-1)[mask].sum()
    return value.flatten(1).mean(-1).sum()


def feature_distance(now: Tensor, then: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_rows ‖h − h'‖², summed over features; of sequences, the mean over real tokens."""
    square = (wide(now) - wide(then)).square()
    if square.dim() == 2:
        return square.sum()
    each = square.flatten(2).sum(-1)
    if mask is None:
        return each.mean(-1).sum()
    real = mask.to(each.dtype)
    return ((each * real).sum(-1) / real.sum(-1).clamp_min(1)).sum()


def consistency(
    now: Sequence[Tensor], then: Sequence[Tensor], mask: Tensor | None, shape: str
) -> Tensor:
    """Mean over tensors of `row_means` of (h − h')², or of min(h − h', 0)² for shape "max".

    "max" pulls h to max(h, h'), so that only what lies below the teacher's is pulled, upward.

    Raises:
        ConfigError: if there is nothing to compare.
    """
    if not now:
        raise ConfigError(
            "consistency: the model gave no hidden states to compare; use target='logits', or a "
            "model that returns them with output_hidden_states=True"
        )
    total = wide(now[0]).new_zeros(())
    for h, taught in zip(now, then, strict=True):
        gap = wide(h) - wide(taught)
        gap = gap.clamp_max(0) if shape == "max" else gap
        total = total + row_means(gap.square(), mask)
    return total / len(now)
