"""What parameters owe to what they were: distances of updates and of factors, in two spaces.

"factors" are the tensors that train, A, B, the core's: their coordinates must keep their meaning
from task to task. "weights" is the dense weight that they amount to, W + s B δ A with δ the matrix
of the core: it has a meaning whatever the factors are, and needs a core that merges exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Flow, Identity, Layer, Method
from polyrank.layers import View
from polyrank.layers.views import wide

SPACES = ("weights", "factors")


def unmergeable(method: Method, space: str) -> Iterator[str]:
    """Yield why a method's update is no dense matrix, if the space "weights" asks for one."""
    if space == "weights" and method.merges != "exact":
        yield (
            f"compares dense weights, but the update of {method.name} depends on the token; use "
            "space='factors'"
        )


def held_parameters(adapter: Adapter, space: str, head: bool) -> dict[str, nn.Parameter]:
    """Return what is held as it is: all but the head in the space "factors", the head if wanted."""
    heads = {id(p) for p in adapter.roles().get("head", [])}
    factors = space == "factors"
    found = adapter.named().items()
    return {name: p for name, p in found if (head if id(p) in heads else factors)}


def product_of(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return (P, A) with P A = s B δ A, bank included: P (d_out, w), A (w, d_in), differentiable.

    Raises:
        ConfigError: if the layer scales its base output too, which no product equals.
    """
    A, B, core, _ = cast("View", layer).factors(Flow())
    if core.base_gain() is not None:
        raise ConfigError(
            f"weights of {layer.site.path}: its core scales the base output, so that its update is "
            "no product of factors; use space='factors'"
        )
    P = wide(B) if isinstance(core, Identity) else wide(B) @ core.delta().to(wide(B))
    return P * layer.scale, wide(A)


def shadow_of(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Return (s B0 δ0, A0), the product that a layer subtracts, or None."""
    if layer.shadow is None:
        return None
    A0, B0, delta = layer.shadow
    P = wide(B0)
    if delta is not None:
        P = P @ wide(delta) if delta.dim() == 2 else P * wide(delta)
    return P * layer.scale, wide(A0)


def effective_weight(layer: Layer) -> Tensor:
    """Return W + s B δ A − s B0 δ0 A0 (d_out, d_in), differentiable in the live factors."""
    P, A = product_of(layer)
    found = layer.weight().to(P) + P @ A
    if (shadow := shadow_of(layer)) is not None:
        found = found - shadow[0] @ shadow[1]
    return found


def difference(
    now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return (L, R) with L R = P A − P' A', so that equal factors give exactly zero.

    P A − P' A' = (P − P') A + P' (A − A'): L = [P − P', P'], R = [A; A − A'], without the
    cancellation of two large products. Ranks that P', A' do not have yet stand after theirs.
    """
    P, A = now
    if then is None:
        return P, A
    P0, A0 = then
    new = len(A) - len(A0)
    if new < 0:
        return torch.cat([P, -P0], dim=1), torch.cat([A, A0])
    if new:
        P0 = torch.cat([P0, P0.new_zeros(len(P0), new)], dim=1)
        A0 = torch.cat([A0, A[-new:].detach()])
    return torch.cat([P - P0, P0], dim=1), torch.cat([A, A - A0])


def squared_norms(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return Σ ‖L R‖²_F = Σ_ij (LᵀL)_ij (R Rᵀ)_ij; L R is never formed, equal shapes are batched.

    Costs O(w² (d_in + d_out)) for L (d_out, w) and R (w, d_in).
    """
    groups: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for L, R in pairs:
        groups.setdefault((L.shape, R.shape), []).append((L, R))
    terms = []
    for group in groups.values():
        L, R = (torch.stack(side) for side in zip(*group, strict=True))
        terms.append(((L.mT @ L) * (R @ R.mT)).sum())
    return torch.stack(terms).sum()


class Quadratic:
    """Σ_k F_k (θ − θ_k)² over named tensors, in the memory of one term.

    F = Σ F_k and the mean m = Σ F_k θ_k / F say it all: the sum is F (θ − m)² + a constant, which
    has no gradient and is not kept. "online" keeps F ← decay · F + F_k and m = θ_k instead.

    Rows that θ has gained since (a grown head) are free; rows that F has gained count from then on.

    Args:
        held: where F and m are kept, by name: what a workshop's memory gives.
    """

    def __init__(self, held: dict[str, dict[str, Tensor]]) -> None:
        self.weights = held.setdefault("weights", {})
        self.anchors = held.setdefault("anchors", {})

    def add(self, name: str, weight: Tensor, anchor: Tensor, decay: float | None) -> None:
        """Add a task: F_k >= 0 and θ_k, of one shape; a decay of None keeps every task."""
        anchor = wide(anchor.detach()).clone()
        if name not in self.weights:
            self.weights[name], self.anchors[name] = weight.clone(), anchor
            return
        old = _padded(self.weights[name].to(weight), weight.shape, name)
        mean = _padded(self.anchors[name].to(anchor), anchor.shape, name)
        if decay is not None:
            self.weights[name], self.anchors[name] = decay * old + weight, anchor
            return
        total = old + weight
        share = torch.where(total > 0, weight / total, torch.ones_like(total))
        self.weights[name], self.anchors[name] = total, mean + share * (anchor - mean)

    def bound(self, like: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
        """Return (name, F, m) of what is kept, on the devices of tensors of today.

        Raises:
            ConfigError: if a tensor is gone or no longer contains what is kept.
        """
        found = []
        for name, weight in self.weights.items():
            if name not in like or not _inside(name, weight.shape, like[name].shape):
                today = tuple(like[name].shape) if name in like else "nothing"
                raise ConfigError(
                    f"anchor of {name}: it has the shape {tuple(weight.shape)}, and the adapter of "
                    f"today {today}; only a head may grow: use space='weights', or a method that "
                    "keeps its ranks"
                )
            device = like[name].device
            found.append((name, weight.to(device), self.anchors[name].to(device)))
        return found


Term = tuple[str, Tensor, Tensor]


def weighted_squares(now: Mapping[str, Tensor], terms: Sequence[Term]) -> Tensor:
    """Return Σ F (θ − m)² for θ by name and (name, F, m): one pass over all of them."""
    gaps = torch.cat([(wide(now[n][: len(m)]) - m).reshape(-1) for n, _, m in terms])
    weights = torch.cat([weight.reshape(-1) for _, weight, _ in terms])
    return (weights * gaps.square()).sum()


def _inside(name: str, small: torch.Size, large: torch.Size) -> bool:
    """Say whether a tensor of today holds what was kept of it: the rows of a head grow."""
    grown = name.startswith("head-") and small[1:] == large[1:] and small[:1] <= large[:1]
    return small == large or grown


def _padded(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    if value.shape == shape:
        return value
    if not _inside(name, value.shape, shape):
        raise ConfigError(
            f"anchor of {name}: it has the shape {tuple(value.shape)}, and the one to add "
            f"{tuple(shape)}; only a head may grow"
        )
    return torch.cat([value, value.new_zeros(shape[0] - len(value), *shape[1:])])
