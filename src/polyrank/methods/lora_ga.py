"""LoRA-GA: a start from which the first step follows the gradient of the whole weight.

Idea: LoRA begins with B = 0 and so in a poor direction; leading singular vectors of the gradient
    make the first step of (A, B) move W along the gradient's best approximation of rank 2r.
Maths: y = W x + b + s (B A x − B0 A0 x);  G = U diag(σ) Vᵀ the mean over batches of ∂L/∂W;
    A0 = f · rows I of Vᵀ,  B0 = f · columns J of U,  I ∪ J = {0 … 2r − 1}: "ArB2r" I first, "A2rBr"
    J first, "ArBr" I odd and J even, "random";  f = d_out^¼/√γ ("stable"), 1 ("unit"), 1/s ("gd"),
    mean_{k < r} √(σ_k(W)/s) ("weightS");  s = alpha/√r. One step of SGD gives
    ΔW = −η s² f² G_2r + O(η²).
Source: arXiv:2407.05000, section 3, and the code that made its tables.
Differs from the released code: A0, B0 are subtracted as frozen factors and W stays as it is, so
    that the start is the base bit for bit, quantised and shared bases work and every export is
    exact; sums in fp32; the decomposition is drawn by key; layers without a gradient are an error.
    PEFT's version puts singular values into B, lets "random" take the same indices for A and B, and
    starts as plain LoRA where a gradient is missing.
Limits: linear layers with 2r <= min(d_in, d_out); with dropout the start is neutral in evaluation
    only. Cost: LoRA's twice in the forward, r (d_in + d_out) frozen weights, once a pass over some
    batches and a decomposition a layer.
Status: start, first step and export tested; published figures not verified; on the digits stream it
    learns each task and forgets as sequential LoRA does (`polyrank run --recipe lora-ga`, seed 0).
    All tasks at once, each at its best rate, 3 seeds (`polyrank sweep sweep-starts`, and -text), no
    gain over LoRA: digits .88 against .90, texts .62 against .64, there in fewer updates to a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from polyrank.frame import Adapter, Identity, Init, Method, Site, register
from polyrank.parts.starts import DIRECTIONS, MAGNITUDES, GradientStart


@register
@dataclass(frozen=True, kw_only=True)
class LoRAGA(Method):
    """Low-rank adaptation with gradient approximation.

    Args:
        direction: which singular vectors A and B take: "ArB2r", "A2rBr", "ArBr" or "random".
        magnitude: how large they are: "stable", "unit", "gd" or "weightS".
        gamma: γ > 0 of "stable"; 8 to 128 are common.
        norm_clip: shrink the start until no entry of s B0 A0 is above the largest of W.
        batches: how many batches the gradient is the mean of, at most; >= 1.
        dropping: whether the gradient is that of training mode, the model's dropout included.
    """

    scaling: str | float = "alpha/sqrt(r)"
    direction: str = "ArB2r"
    magnitude: str = "stable"
    gamma: float = 16.0
    norm_clip: bool = False
    batches: int = 8
    dropping: bool = True

    lendable: ClassVar[frozenset[str]] = frozenset({"init"})
    choices: ClassVar = {
        "direction": DIRECTIONS,
        "magnitude": MAGNITUDES,
    }
    least: ClassVar = {"batches": 1}
    presets: ClassVar = {
        "paper": {"r": 8, "alpha": 16.0, "gamma": 16.0, "batches": 8},
        "fork": {"r": 32, "alpha": 8.0, "scaling": "alpha/r", "gamma": 64.0, "batches": 64},
    }

    def problems(self) -> Iterator[str]:
        """Check the size."""
        if not self.gamma > 0:
            yield f"gamma: got {self.gamma}, expected > 0; 16 is the paper's"

    def lends(self, what: str, to: Method) -> Iterator[str]:
        """Say that what acts behind B would act on what is subtracted as well."""
        yield from super().lends(what, to)
        core = to.core(Site(path="", d_in=to.r, d_out=to.r, r=to.r, alpha=to.alpha))
        if isinstance(core, Identity) and core.epilogue == "python":
            yield (
                f"{to.name} has {type(core).__name__} behind B, which would see the whole of B A x "
                "and not what it has gone from its start"
            )

    def init(self) -> Init:
        """Start from the gradient."""
        return GradientStart(
            direction=self.direction,
            magnitude=self.magnitude,
            gamma=self.gamma,
            norm_clip=self.norm_clip,
            batches=self.batches,
            training=self.dropping,
        )

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return how far the product has gone from its start, relative to it."""
        moved = []
        for layer in adapter.layers:
            if layer.shadow is not None:
                A0, B0, _ = layer.shadow
                now, then = layer.B.detach() @ layer.A.detach(), B0 @ A0
                moved.append((torch.linalg.norm(now - then) / torch.linalg.norm(then)).cpu())
        return {"moved": float(torch.stack(moved).mean()) if moved else 0.0}

    @classmethod
    def samples(cls) -> list[Method]:
        """The default, and the rest of the options; of rank 1, since layers have three outputs."""
        return [
            cls(r=1),
            cls(r=1, direction="random", magnitude="weightS", norm_clip=True, dropping=False),
        ]
