"""From logits, or from what a sample brings along, to the weights of experts."""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Flow
from polyrank.ops.philox import Word, uniform
from polyrank.ops.rank_gate.selection import largest


@dataclass(frozen=True)
class Choice:
    """How the logits z (*, E) of a token become the weights ω (*, E) of E experts.

    "softmax": ω = softmax of the k largest logits, 0 elsewhere; k = E is the dense softmax.
    "top1": ω = softmax(z) at the largest logit, 0 elsewhere: below one, so that the router learns.
    "gumbel": ω = softmax((z + noise) / tau) with noise, else 1 for the largest logit, 0 elsewhere.
    "top_p": ω = softmax(z) / tau from the largest down to the first at which their sum exceeds
        `top_p` (all if it never does), 0 elsewhere; not renormalised.
    Of equal logits the one with the lower index is the larger.

    Attributes:
        kind: one of the four.
        k: experts that are on, for "softmax".
        tau: temperature, > 0; in "top_p" it divides probabilities, as the released code does.
        top_p: in (0, 1].
    """

    kind: str
    k: int = 1
    tau: float = 1.0
    top_p: float = 1.0

    def kept(self, z: Tensor) -> Tensor:
        """Return bool (*, E): the experts that a token is sent to when there is no noise."""
        if self.kind != "top_p":
            return largest(z, self.k if self.kind == "softmax" else 1)
        p, order = (z.detach().softmax(-1) / self.tau).sort(dim=-1, descending=True, stable=True)
        # Probabilities that sum to one may add up to a little more.
        over = p.cumsum(-1) > self.top_p + z.shape[-1] * torch.finfo(z.dtype).eps
        keep = torch.cat([torch.ones_like(over[..., :1]), ~over[..., :-1]], dim=-1)
        return torch.zeros_like(keep).scatter(-1, order, keep)

    def weights(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return ω, differentiable in z except through the choice."""
        if self.kind == "softmax":
            dense = self.k >= z.shape[-1]
            return (z if dense else z.masked_fill(~self.kept(z), -torch.inf)).softmax(-1)
        if self.kind == "gumbel":
            if noise is None:
                return self.kept(z).to(z.dtype)
            return ((z + noise) / self.tau).softmax(-1)
        p = z.softmax(-1)
        return (p / self.tau if self.kind == "top_p" else p) * self.kept(z)


def warn_of_idle_router(k: int, block: int, r: int) -> None:
    """Warn if one block of several is on, its weight normalised: its router has no gradient."""
    if isinstance(r, int) and k == block < r:
        warnings.warn(
            f"k: got {k}, one expert a token: its weight is normalised to a constant, so the "
            "router has no gradient and stays as it was drawn; let at least two serve a token",
            # Told from one place, so that Python shows it once a process.
            stacklevel=1,
        )


def gumbel(shape: torch.Size, seed: Word, device: torch.device) -> Tensor:
    """Return standard Gumbel noise in fp32, a function of seed and place alone."""
    u = uniform(seed, torch.arange(shape.numel(), device=device))
    return -(-u.clamp_min(torch.finfo(u.dtype).tiny).log()).log().view(shape)


# The condition that was checked last: all layers of a forward read the same one, and looking at
# values waits for the device.
_checked: tuple[weakref.ref[Tensor], int, int] | None = None


def ids(condition: Tensor | None, count: int, what: str) -> Tensor:
    """Return the int64 ids (batch,) that a condition (batch, 1) or (batch,) holds.

    Args:
        condition: what `Flow.condition` holds.
        count: ids must lie in [0, count).
        what: the place and the meaning of an id, for messages.

    Raises:
        ConfigError: if it is missing, has another shape or dtype, or an id is out of range.
    """
    global _checked
    remedy = (
        f"pass integers 0..{count - 1} of shape (batch, 1) as model(..., polyrank_condition=ids), "
        'or put them into the batch under "condition"'
    )
    if condition is None:
        raise ConfigError(f"{what}: got no condition; {remedy}")
    if condition.dim() not in (1, 2) or (condition.dim() == 2 and condition.shape[1] != 1):
        shape = tuple(condition.shape)
        raise ConfigError(f"{what}: got a condition of shape {shape}; {remedy}")
    if condition.is_floating_point() or condition.is_complex() or condition.dtype == torch.bool:
        raise ConfigError(f"{what}: got a condition of dtype {condition.dtype}; {remedy}")
    if torch.compiler.is_compiling() or not condition.numel():
        return condition.reshape(-1).long()
    state = (-1 if condition.is_inference() else condition._version, count)
    if _checked is None or _checked[0]() is not condition or _checked[1:] != state:
        low, high = (int(value) for value in condition.aminmax())
        if low < 0 or high >= count:
            raise ConfigError(f"{what}: got ids {low}..{high}, expected 0..{count - 1}; {remedy}")
        _checked = weakref.ref(condition), *state
    return condition.reshape(-1).long()


def per_sample(value: Tensor, batch: int, what: str) -> Tensor:
    """View (*, n) as (batch, tokens of a sample, n): beams and flattened tokens follow the sample.

    Raises:
        ConfigError: if the tokens cannot be shared out evenly.
    """
    tokens = value.shape[:-1].numel()
    if tokens and (not batch or tokens % batch):
        raise ConfigError(
            f"{what}: got {tokens} tokens for a condition of {batch} samples, expected a multiple; "
            "give every sample its condition; exclude_modules leaves out layers without a batch"
        )
    return value.reshape(batch, tokens // max(batch, 1), value.shape[-1])


def condition_of(flow: Flow, count: int, what: str, device: torch.device) -> Tensor:
    """Return the ids of the samples of this forward on a device; see `ids` for what is refused."""
    return ids(flow.condition, count, what).to(device)
