"""FeatKD: on the new task's inputs, keep the features that the model had before the task.

Idea: if what a head reads stays the same, what it says stays the same.
Maths: L = CE + λ · mean over rows of ‖h(x) − h'(x)‖²; h what the classifier reads, or a hidden
    state (0 is the embedding, l the output of block l); of tokens the mean over the real ones.
Source: arXiv:2203.17269; the norm is the paper's, the reduction ours.
Differs from the released code: there is none for this loss.
Limits: says nothing about a head that leans to new classes. Cost: one forward without gradients for
    every step.
Status: loss and gradient tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Loss, Out, Strategy, register
from polyrank.parts import distil
from polyrank.parts.boundaries import Later


class FeatureDistillation(distil.Taught):
    """Σ_rows ‖h − h'‖²."""

    role = "train"

    def __init__(self, weight: float, layer: int | None) -> None:
        self.weight, self.layer = weight, layer
        place = "embedding" if layer is None else "hidden"
        self.needs = frozenset({place, f"teacher.{place}"})

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows."""
        teacher = self.taught(out)
        now = self._features(out)
        if teacher is None:
            return now.new_zeros(()).float()
        mask = out.mask if self.layer is not None else None
        return distil.feature_distance(now, self._features(teacher), mask)

    def _features(self, out: Out) -> Tensor:
        if self.layer is None:
            if out.embedding is None:
                raise ConfigError(
                    "layer: the model has no classifier whose input could be kept; name a hidden "
                    "state with layer=1"
                )
            return out.embedding
        if not -len(out.hidden) <= self.layer < len(out.hidden):
            raise ConfigError(
                f"layer: got {self.layer}, but the model has the hidden states 0.."
                f"{len(out.hidden) - 1}; -1 is the last"
            )
        return out.hidden[self.layer]


@register
@dataclass(frozen=True, kw_only=True)
class FeatKD(Later):
    """Feature distillation.

    Args:
        weight: λ >= 0, of a sum over features.
        layer: number of a hidden state, from behind if negative; None is what the classifier reads.
    """

    weight: float = 0.01
    layer: int | None = None

    needs = frozenset({"boundary"})
    least: ClassVar = {"weight": 0}

    def __post_init__(self) -> None:
        asks = {"classes"} if self.layer is None else set()
        object.__setattr__(self, "needs", frozenset({"boundary", *asks}))

    def problems(self) -> Iterator[str]:
        """Check the layer's type."""
        if self.layer is not None and type(self.layer) is not int:
            yield f"layer: got {self.layer!r}, expected a hidden state's number; -1 is the last"

    def losses(self) -> list[Loss]:
        """Return the distillation."""
        return [FeatureDistillation(self.weight, self.layer)] if self.weight else []

    def boundary(self) -> Boundary:
        """Keep the teacher."""
        return distil.Snapshot()

    @classmethod
    def samples(cls) -> list[Strategy]:
        """What the classifier reads; the last hidden state."""
        return [cls(), cls(layer=-1, weight=0.001)]
