"""A trained square matrix between two frozen factors, and what that makes exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Core, Flow, Saved


class Square(Core):
    """φ(h) = R h for R (r, r): the same for every token, so it merges exactly.

    Args:
        r: ranks of A and B.
        std: R starts as N(0, std²), as 0 for std = 0.
        remembered: whether the diagonal of a start is kept, (r,), and saved; it never trains.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "weight": ("rank", "rank"),
        "start": ("rank",),
    }
    frozen = frozenset({"start"})

    start: nn.Parameter | None

    def __init__(self, r: int, std: float = 0.0, *, remembered: bool = False) -> None:
        super().__init__()
        self.widths, self.std = (r, r), std
        self.weight = nn.Parameter(torch.empty(r, r))
        kept = nn.Parameter(torch.empty(r), requires_grad=False) if remembered else None
        self.register_parameter("start", kept)

    def fill(self, rng: torch.Generator) -> None:
        """Draw R."""
        drawn = torch.empty(self.weight.shape)
        self.weight.copy_(drawn.normal_(0, self.std, generator=rng) if self.std else drawn.zero_())
        if self.start is not None:
            self.start.zero_()

    def begin(self, diagonal: Tensor) -> None:
        """Write R = diag(s) for a start s (r,), and keep it."""
        self.weight.copy_(torch.diag(diagonal))
        if self.start is not None:
            self.start.copy_(diagonal)

    def moved(self) -> Tensor:
        """Return ‖R − diag(s)‖, with s = 0 where none was kept."""
        R = self.weight.detach()
        return torch.linalg.norm(R if self.start is None else R - torch.diag(self.start))

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return R h."""
        return F.linear(h, self.weight.to(h.dtype))

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return R."""
        return self.weight


def mixed(*adapters: Saved, weights: Sequence[float] | None = None) -> Saved:
    """Return the adapter with R = Σ_t w_t R_t, whose update is exactly Σ_t w_t s B R_t A.

    Args:
        adapters: adapters with square cores whose A and B are the same bits.
        weights: w_t; left out, the mean.

    Raises:
        ConfigError: if anything but the cores differs.
    """
    shares = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if not adapters or len(shares) != len(adapters):
        raise ConfigError(
            f"mixed: got {len(adapters)} adapters and {len(shares)} weights, expected one weight "
            "for each of at least one adapter"
        )
    first = adapters[0]
    cores = {key for key in first.tensors if key.endswith("polyrank_core.weight")}
    if not cores:
        raise ConfigError(
            f"mixed: adapter of {first.config.get('method')!r} has no square cores; give adapters "
            "of lora-sb or lora-xs"
        )
    for other in adapters[1:]:
        if differ := sorted(_differences(first, other, cores)):
            raise ConfigError(
                f"mixed: adapters differ in {', '.join(differ[:3])}, and cores add up only between "
                "the same A and B; train them from one start"
            )
    tensors = {key: value.clone() for key, value in first.tensors.items()}
    for key in cores:
        parts = [w * each.tensors[key].double() for w, each in zip(shares, adapters, strict=True)]
        tensors[key] = torch.stack(parts).sum(0).to(tensors[key].dtype)
    return Saved(tensors=tensors, config=dict(first.config), plan={"mixed": shares})


def _differences(first: Saved, other: Saved, cores: set[str]) -> set[str]:
    def plain(saved: Saved) -> dict[str, Any]:
        return {key: saved.config.get(key) for key in ("method", "sites", "head")}

    found = {key for key, value in plain(first).items() if plain(other)[key] != value}
    for key in first.tensors.keys() | other.tensors.keys():
        a, b = first.tensors.get(key), other.tensors.get(key)
        alike = a is not None and b is not None and a.shape == b.shape
        if not alike or (key not in cores and not torch.equal(a, b)):  # type: ignore[arg-type]
            found.add(key)
    return found
