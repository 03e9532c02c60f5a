"""LoRA-XS: only an r × r matrix trains, between the leading singular vectors of the weight.

Idea: the directions in which a pretrained weight is large are good enough to adapt it, so that r²
    weights a layer do.
Maths: y = W x + b + s B R A x;  W ≈ U diag(σ) Vᵀ,  B = U diag(σ), A = Vᵀ frozen and saved;
    R (r, r) ~ N(0, std²) trains, 0 for std = 0;  s = alpha / r.
Source: arXiv:2405.17604, section 3.
Differs from the released code: R may start at exactly zero (`std=0`, the default; the paper has
    1e-5), so that the start is the base bit for bit.
Limits: r <= min(d_in, d_out); a base weight that can be read, so no quantised one; results depend
    on s. Cost: r² weights with optimiser state, r (d_in + d_out) + r² operations a token, the input
    is not kept for backward; a decomposition a layer.
Status: start, gradients, merge and mixing tested; published figures not verified; on the digits
    stream it learns each task a little worse than LoRA of equal rank and forgets less among a
    task's own classes, 0.88 against 0.70 (`polyrank run --recipe lora-xs`, seed 0, a 2-core CPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from polyrank.frame import Adapter, Core, Init, Method, Site, register
from polyrank.parts.square import Square
from polyrank.parts.starts import WeightStart


@register
@dataclass(frozen=True, kw_only=True)
class LoRAXS(Method):
    """LoRA with extremely small number of parameters.

    Args:
        std: standard deviation of the start of R, >= 0.
    """

    r: int = 24
    std: float = 0.0

    trains = frozenset({"core", "side", "head"})
    least: ClassVar = {"std": 0}
    presets: ClassVar = {"paper": {"std": 1e-5}}

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether R starts at zero."""
        return self.std == 0

    def core(self, site: Site) -> Core:
        """Return R."""
        return Square(site.r, self.std)

    def init(self) -> Init:
        """Start from the weight."""
        return WeightStart()

    def parameters_per_site(self, site: Site) -> int:
        """r²."""
        return site.r**2

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the mean norm of R."""
        cores = [layer.core.get_parameter("weight").detach() for layer in adapter.layers]
        norms = [torch.linalg.norm(R).cpu() for R in cores]
        return {"r_norm": float(torch.stack(norms).mean()) if norms else 0.0}

    @classmethod
    def samples(cls) -> list[Method]:
        """Zero, and the paper's start at a larger size."""
        return [cls(r=2), cls(r=2, std=0.1, dropout=0.1)]
