"""I-LoRA: a slow learner follows the fast one, and the fast one keeps to it on stored samples.

Idea: between the solutions of two tasks lies a path of low loss; its inner points know both.
Maths: slow ← λ_k slow + (1 − λ_k) fast after every update k = 1, 2, …, on A, B, the core and the
    head; λ_k = min(1 − 1/(k + 1), λ), or λ without ramp. L = CE on current and stored rows + γ ·
    mean over stored rows, real tokens, d and the J + 1 hidden states of (h − h')², h' of the slow
    learner without gradients; "max": min(h − h', 0)²; target "logits": (z − z')² over classes.
Source: arXiv:2402.18865; the ramp as in CLS-ER, arXiv:2201.12604.
Differs from the released code: there the slow learner never moves, padding is trained on, λ = 0.25;
    "max" is theirs, two-sided the paper's. Rows come to the store after the update that saw them.
Limits: factors are averaged, not their product. Cost: a second set of factors without optimiser
    state, 1 + ratio times the training, one forward of stored rows without gradients.
Status: average and losses tested; published figures not verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from polyrank.frame import Boundary, Loss, Out, Replay, Rule, Strategy, register
from polyrank.parts.average import Ema, Follow
from polyrank.parts.distil import answers, consistency
from polyrank.parts.memory import BY, Storing

SLOW = "slow"


class Consistency(Loss):
    """Distance of the fast learner to the slow one on stored rows."""

    teacher = SLOW
    role = "replay"

    def __init__(self, weight: float, target: str, shape: str) -> None:
        self.weight, self.target, self.shape = weight, target, shape
        self.needs = frozenset({target, f"teacher.{target}"})
        self.per = "token" if target == "hidden" else "label"

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over real tokens of hidden states, or over rows of logits."""
        assert out.teacher is not None
        if self.target == "hidden":
            return consistency(out.hidden, out.teacher.hidden, out.mask, self.shape)
        assert out.logits is not None
        assert out.teacher.logits is not None
        z, slow = (answers(found, batch["labels"]) for found in (out.logits, out.teacher.logits))
        return consistency([z], [slow], None, self.shape)


@register
@dataclass(frozen=True, kw_only=True)
class ILoRA(Storing):
    """Interpolation-based LoRA, for any method whose ranks keep their meaning.

    Args:
        by: "stream", one reservoir over all rows; "class" or "task", equal parts of the store.
        ratio: stored rows for every current row of a batch, >= 0; 0 replays none.
        decay: λ in [0, 1], what the slow learner keeps of itself.
        ramp: whether λ rises to that, so that a short run still moves the slow learner.
        weight: γ >= 0.
        target: "hidden" or "logits".
        shape: "two_sided" or "max".
        restart: whether the fast learner begins every task as the slow one.
        inference: "slow" or "fast", which of the two stands for the system; both are evaluated.
    """

    by: str = "stream"
    ratio: float = 1.0
    decay: float = 0.99
    ramp: bool = True
    weight: float = 1.0
    target: str = "hidden"
    shape: str = "two_sided"
    restart: bool = False
    inference: str = "slow"

    persistent: ClassVar[bool] = True
    choices: ClassVar = {
        "by": BY,
        "target": ("hidden", "logits"),
        "shape": ("two_sided", "max"),
        "inference": ("slow", "fast"),
    }
    least: ClassVar = {"bytes": 0, "ratio": 0, "decay": 0, "weight": 0}

    def problems(self) -> Iterator[str]:
        """Check the store and λ."""
        yield from super().problems()
        if self.decay > 1:
            yield f"decay: got {self.decay}, expected 0..1; 0.99 is common, 1 never moves"

    def replay(self) -> Replay:
        """Mix stored rows into the task loss."""
        return Replay(capacity=self.capacity, by=self.by, bytes=self.bytes, ratio=self.ratio)

    def rules(self) -> list[Rule]:
        """Average after every update."""
        return [Ema(SLOW, self.decay, self.ramp)]

    def losses(self) -> list[Loss]:
        """Keep to the slow learner."""
        both = self.weight and self.ratio
        return [Consistency(self.weight, self.target, self.shape)] if both else []

    def boundary(self) -> Boundary:
        """Make the slow learner, and evaluate both."""
        return Follow(SLOW, self.restart, self.inference)

    @classmethod
    def samples(cls) -> list[Strategy]:
        """As recommended; as released but for its faults."""
        return [cls(), cls(decay=0.25, target="logits", shape="max", inference="fast")]
