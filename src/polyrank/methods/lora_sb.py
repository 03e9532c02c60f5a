"""LoRA-SB: only an r × r matrix trains, between frozen factors taken from the first full update.

Idea: the first step of full fine-tuning says where to move; let its leading singular vectors be the
    frozen factors and take that step at the start.
Maths: y = W x + b + s B R A x;  R (r, r) trains, A (r, d_in) and B (d_out, r) are frozen and saved;
    D = −η sign(Σ_i ∂L_i/∂W) ≈ U diag(S) Vᵀ,  B = U, A = Vᵀ, R = diag(S) / s.  As BᵀB = A Aᵀ = I,
    ∂L/∂R = s Bᵀ G Aᵀ is the best gradient within the subspace, whatever s.
Source: arXiv:2411.19557, theorems 3 to 5, and its released code.
Differs from the released code: factors stay in fp32 and the decomposition oversamples
    (`released=True`: rounded to bf16, and not); η is the first rate of the run, not that of the
    estimation's own loader; terms of the loss count alike, whatever the batch: rows, or the tokens
    of texts, of which long ones then count more; no decay unless the run asks.
Limits: r <= min(d_in, d_out); not neutral at start. Cost: r² weights with optimiser state,
    r (d_in + d_out) + r² operations a token, the input is not kept for backward; once a pass over
    some rows and a decomposition a layer.
Status: start, gradients, merge and mixing tested; published figures not verified; on the digits
    stream it learns each task and forgets as sequential LoRA of equal rank does (`polyrank run
    --recipe lora-sb`, seed 0). All tasks at once, each at its best rate, 3 seeds (`polyrank sweep
    sweep-starts`, and -text), tied with LoRA of rank 8: digits .89 and .90, texts .63 and .64, of
    half and an eighth of the trained weights, in fewer updates to a loss.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from polyrank.frame import Adapter, Core, Init, Method, Site, register
from polyrank.parts.square import Square
from polyrank.parts.starts import STEPS, UpdateStart


@register
@dataclass(frozen=True, kw_only=True)
class LoRASB(Method):
    """LoRA from the first update of full fine-tuning, a silver bullet.

    Args:
        scaling: the number s > 0; 1 is the paper's, and drops out of the gradient.
        rows: n >= 1, rows whose terms' gradients are summed; 0.1 % of the data is the paper's.
        eta: η > 0, the size of the first update; None is the learning rate of the first update.
        step: "sign", AdamW's first update, or "sgd".
        dropping: whether gradients are those of training mode, the model's dropout included.
        released: factors rounded to bf16, found without oversampling.
    """

    r: int = 24
    scaling: str | float = 1.0
    rows: int = 50
    eta: float | None = None
    step: str = "sign"
    dropping: bool = True
    released: bool = False

    trains = frozenset({"core", "side", "head"})
    neutral = False
    choices: ClassVar = {"step": STEPS}
    least: ClassVar = {"rows": 1}
    presets: ClassVar = {
        "math": {"r": 96, "rows": 50},
        "commonsense": {"r": 96, "rows": 170, "dropout": 0.05},
        "glue": {"r": 24, "rows": 2},
    }

    def problems(self) -> Iterator[str]:
        """Check the first step, and that s is a number."""
        real = isinstance(self.eta, numbers.Real) and not isinstance(self.eta, bool)
        if self.eta is not None and not (real and 0 < self.eta < math.inf):
            yield (
                f"eta: got {self.eta!r}, expected a finite number > 0; leave it out for the first "
                "learning rate of the run"
            )
        if isinstance(self.scaling, str):
            yield (
                f"scaling: got {self.scaling!r}, expected a number, since the start divides by it; "
                "1 is the paper's"
            )

    def core(self, site: Site) -> Core:
        """Return R."""
        return Square(site.r, remembered=True)

    def init(self) -> Init:
        """Start with the first update taken."""
        return UpdateStart(
            step=self.step,
            eta=self.eta,
            samples=self.rows,
            training=self.dropping,
            released=self.released,
        )

    def parameters_per_site(self, site: Site) -> int:
        """r²."""
        return site.r**2

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the mean norm of what R has gone from its start."""
        moved = [cast("Square", layer.core).moved().cpu() for layer in adapter.layers]
        return {"moved": float(torch.stack(moved).mean()) if moved else 0.0}

    @classmethod
    def samples(cls) -> list[Method]:
        """The default; an explicit step of SGD at another scale, as released."""
        other = cls(r=2, rows=6, step="sgd", eta=0.1, scaling=0.5, released=True)
        return [cls(r=2, rows=4), other]
