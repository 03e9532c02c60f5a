"""A toy whose start is subtracted: what is trained is the difference to A0, B0, δ0."""

from dataclasses import dataclass

import torch

from polyrank.frame import Init, Method, register


class Subtracted(Init):
    """Fills A and B with numbers and subtracts the same, as a diagonal product."""

    def __init__(self, delta):
        self.delta = delta

    def fill(self, layer, stat, rng):
        layer.A.copy_(torch.randn(layer.A.shape, generator=rng))
        layer.B.copy_(torch.randn(layer.B.shape, generator=rng))
        r = layer.A.shape[0]
        delta = {"none": None, "number": torch.tensor(1.0), "diagonal": torch.ones(r)}
        delta["matrix"] = torch.eye(r)
        layer.shadow = (layer.A, layer.B, delta[self.delta])


@register
@dataclass(frozen=True, kw_only=True)
class Shadowed(Method):
    r: int = 3
    delta: str = "diagonal"

    def init(self):
        return Subtracted(self.delta)
