"""DER: stored samples keep the logits that they had when they were stored; DER++ as an option.

Idea: an old answer says more than an old label.
Maths: L = CE(current) + alpha · mean over stored rows x of (1/C_x) Σ_{c < C_x} (z_c(x) − z'_c(x))²,
    z' the logits kept from the forward that trained on x, C_x the classes known then; DER++ adds
    beta · CE on a second, independent draw.
Source: arXiv:2004.07211, section 3.
Differs from the released code: classes that were not known when a row was stored do not enter,
    where theirs has logits of all classes of the stream from the start; the mean over classes is
    theirs, the paper's formula has the sum.
Limits: classes only, no text. Cost: one stored row more for every current one, two in DER++.
Status: loss and gradients tested; no published figures verified.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Loss, Out, Replay, Strategy, register
from polyrank.layers.views import wide
from polyrank.parts.memory import BY, Storing


class StoredLogits(Loss):
    """Σ_rows mean over the classes known then of (z − z')²."""

    needs = frozenset({"logits", "stored"})
    role = "replay"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over replayed rows."""
        if out.logits is None or out.stored is None or out.logits.dim() != 2:
            raise ConfigError(
                "der: replayed rows bring no logits of classes; train through polyrank.run, on a "
                "stream whose tasks have classes"
            )
        stored = wide(out.stored).to(out.logits.device)
        known = ~stored.isnan()
        gap = wide(out.logits)[:, : stored.shape[1]] - stored.nan_to_num()
        square = (gap * known).square().sum(-1)
        return (square / known.sum(-1).clamp_min(1)).sum()


class Rehearsal(Loss):
    """Σ_rows −log softmax(z)_y of a second draw."""

    needs = frozenset({"logits"})
    role = "again"

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over replayed rows."""
        assert out.logits is not None
        return F.cross_entropy(wide(out.logits), batch["labels"], reduction="sum")


@register
@dataclass(frozen=True, kw_only=True)
class DER(Storing):
    """Dark experience replay.

    Args:
        by: "stream", one reservoir over all rows; "class" or "task", equal parts of the store.
        ratio: stored rows for every current row of a batch, > 0.
        alpha: weight of the stored logits, > 0.
        plus: DER++, cross-entropy on a second draw.
        beta: its weight, > 0.
    """

    by: str = "stream"
    ratio: float = 1.0
    alpha: float = 0.3
    plus: bool = False
    beta: float = 0.5

    needs = frozenset({"classes"})
    choices: ClassVar = {"by": BY}

    def problems(self) -> Iterator[str]:
        """Check the store and the weights."""
        yield from super().problems()
        for name in ("ratio", "alpha", "beta"):
            if not getattr(self, name) > 0:
                yield f"{name}: got {getattr(self, name)}, expected > 0; leave it out for a default"

    def replay(self) -> Replay:
        """Keep logits; the task loss reads current rows alone."""
        return Replay(
            capacity=self.capacity, by=self.by, bytes=self.bytes, ratio=self.ratio,
            draws=2 if self.plus else 1, stores=frozenset({"logits"}), shared=False,
        )  # fmt: skip

    def losses(self) -> list[Loss]:
        """Return the stored logits' term, and DER++'s."""
        return [StoredLogits(self.alpha), *([Rehearsal(self.beta)] if self.plus else [])]

    @classmethod
    def samples(cls) -> list[Strategy]:
        """DER and DER++."""
        return [cls(), cls(plus=True, alpha=0.1)]
