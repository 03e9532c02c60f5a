"""Nested ranks: of r ordered ranks a forward reads the first b, and b changes."""

from __future__ import annotations

import bisect
import itertools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from polyrank.errors import ConfigError, RunError
from polyrank.frame import (
    Adapter,
    Core,
    Flow,
    Portion,
    Rule,
    Site,
    Step,
    Workshop,
    keyed,
)
from polyrank.ops.rank_gate import Epilogue
from polyrank.parts.rows import ROWS

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Prefix(Core):
    """φ(h) = gain(b) · (h_1, …, h_b, 0, …, 0); merges exactly at the set rank.

    b is the set rank, `most` at first; in training it is the rank drawn for the update, if one was.
    Ranks of a bank are read whole, and without the gain.

    Args:
        gains: factor on the update for b = 1 … r; that of all ranks is 1.
        least: smallest b.
        most: largest b, <= r.
        newest: whether of a drawn prefix only rank b learns, not all b of them.
    """

    epilogue = "none"
    ordered = True

    def __init__(self, gains: Sequence[float], least: int, most: int, *, newest: bool) -> None:
        super().__init__()
        self.widths = (len(gains), len(gains))
        self.gains, self.least, self.most, self.newest = tuple(gains), least, most, newest
        self.bank = 0
        self.chosen, self.drawn = most, 0
        # For compiled code, which would be compiled again for every new number: (b, held, gain) in
        # evaluation and in training, where the factors are. No buffer, as DDP sends those around.
        self.now = torch.zeros(2, 3, dtype=torch.float64, device="cpu")
        self.tell()

    @property
    def rank(self) -> int:
        """The set rank."""
        return self.chosen

    def choose(self, b: int) -> None:
        """Set the rank of every forward for which none is drawn."""
        self.chosen = checked_rank(b, self.least, self.most)
        self.tell()

    def draw(self, b: int) -> None:
        """Set the rank of training forwards; 0 takes it back."""
        self.drawn = b
        self.tell()

    def tell(self) -> None:
        """Write for compiled code what was set and drawn."""
        rows = [
            [b, held, self.gains[b - 1]]
            for b, held in ((self.chosen, 0), (self.drawn or self.chosen, self._held()))
        ]
        found = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self.now.copy_(found, non_blocking=True)

    def _held(self) -> int:
        return self.drawn - 1 if self.drawn and self.newest else 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy that is in no update."""
        super().__setstate__(state)
        self.draw(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prefix:
        super()._apply(fn, recurse)
        # Along to another device, in the same precision.
        device = fn(self.now).device
        self.now = self.now if device.type == "meta" else self.now.to(device)
        return self

    def settings(self) -> dict[str, Any]:
        """Return the set rank, if it is not the largest."""
        return {} if self.rank == self.most else {"rank": self.rank}

    def configure(self, settings: dict[str, Any]) -> None:
        """Set the rank."""
        self.choose(settings.get("rank", self.most))

    def banked(self, ranks: int) -> None:
        """Read `ranks` frozen ranks before one's own."""
        self.bank, self.epilogue = ranks, "python" if ranks else "none"

    def portion(self) -> Portion:
        """Return the first b ranks; of a drawn prefix the others are held, if the newest learns."""
        if torch.compiler.is_compiling():
            return self._traced()
        b = self._b()
        held = self._held() if self.training else 0
        # The gain is not the bank's, so that there `forward` brings it in.
        return Portion(self.bank + b, self.bank + held, 1.0 if self.bank else self.gains[b - 1])

    def _b(self) -> int:
        return (self.training and self.drawn) or self.chosen

    def _traced(self) -> Portion:
        b, held, gain = self.now[int(self.training)].unbind()
        return Portion(self.bank + b, self.bank + held, 1.0 if self.bank else gain)

    def fused(self) -> Epilogue:
        """Return the operator's form: what is read passes as it is."""
        return Epilogue(kind="none")

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return h, which holds what is read; behind a bank the gain is still to come."""
        if not self.bank:
            return h
        gain: float | Tensor
        if torch.compiler.is_compiling():
            gain = self.now[int(self.training), 2].to(h)
        else:
            gain = self.gains[self._b() - 1]
        return torch.cat([h[..., : self.bank], gain * h[..., self.bank :]], dim=-1)

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return diag(gain(b) 1{i <= b}) of the set rank, ones for the bank."""
        place = torch.arange(self.widths[0])
        # In fp64, so that it is the forward's own number whatever the factors are.
        own = (place < self.rank).double() * self.gains[self.rank - 1]
        return torch.diag(torch.cat([own.new_ones(self.bank), own]))

    def settle(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of the set rank, the gain folded in."""
        return A[: self.rank], self.gains[self.rank - 1] * B[:, : self.rank]

    def shortened(self, ranks: int) -> float:
        """Return gain(ranks)."""
        return self.gains[ranks - 1]


def prefix_at(
    site: Site, scale: Callable[[Site], float], r: int, least: int, most: int, *, newest: bool
) -> Prefix:
    """Return the core of a site with up to r ranks, whose scale follows a convention.

    Raises:
        ConfigError: if the site has more ranks, or fewer than `least`.
    """
    if not least <= site.r <= r:
        raise ConfigError(
            f"r at {site.path!r}: got {site.r}, expected r_min..r = {least}..{r}, as one rank is "
            "drawn for all layers; leave rank_pattern out"
        )
    scales = [scale(replace(site, r=b)) for b in range(1, site.r + 1)]
    return Prefix([s / scales[-1] for s in scales], least, min(most, site.r), newest=newest)


def powers(least: int, most: int) -> list[int]:
    """Return the powers of two in least..most."""
    return [2**k for k in range(most.bit_length()) if least <= 2**k <= most]


def checked_rank(b: Any, least: int, most: int) -> int:
    """Return b as a plain integer.

    Raises:
        ConfigError: if it is no integer, or outside of least..most.
    """
    if not ranks_fit((b,), least, most):
        raise ConfigError(f"rank: got {b!r}, expected an integer in {least}..{most}, all included")
    return int(b)


def ranks_fit(ranks: Any, least: int, most: int) -> bool:
    """Say whether these are integers in least..most."""
    return isinstance(ranks, tuple) and all(
        isinstance(b, numbers.Integral) and not isinstance(b, bool) and least <= int(b) <= most
        for b in ranks
    )


def first_half(adapter: Adapter) -> float:
    """Return the share of the first half of the ranks in Σ |B_i| |A_i|, the mean over layers."""
    shares = []
    for layer in adapter.layers:
        A, B = layer.A.detach().float(), layer.B.detach().float()
        sizes = B.norm(dim=0) * A.norm(dim=1)
        half = sizes[: -(-len(sizes) // 2)].sum()
        shares.append(half / sizes.sum().clamp_min(1e-30))
    return float(torch.stack(shares).mean()) if shares else 0.0


def prefixes(adapter: Adapter) -> list[Prefix]:
    """Return the cores with nested ranks, all of them with the same bounds.

    Raises:
        ConfigError: if there are none, or their ranks differ.
    """
    cores = [layer.core for layer in adapter.layers if isinstance(layer.core, Prefix)]
    bounds = sorted({(core.least, core.most) for core in cores})
    if not cores:
        raise ConfigError("rank: the adapter has no nested ranks to choose from; use dylora")
    if len(bounds) > 1:
        raise ConfigError(
            f"rank: layers have ranks {', '.join(f'{a}..{b}' for a, b in bounds)}, expected the "
            "same everywhere, as one rank is chosen for all; leave rank_pattern out"
        )
    return cores


class Draw(Rule):
    """Draws one rank for every update, the same in all layers, micro-batches and processes.

    The draw is a function of (seed, task, phase, index of the update) alone.

    Args:
        weights: of least, least + 1 …; what goes beyond the ranks of an adapter is left out.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights, self.agreed = list(weights), False

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Collect the cores."""
        self.adapter, self.optimizer = adapter, optimizer
        self.cores = prefixes(adapter)
        shared: dict[Any, Tensor] = {}
        for core in self.cores:
            core.now = shared.setdefault((core.now.device, core.gains), core.now)
        first = self.cores[0]
        self.sums = list(itertools.accumulate(self.weights[: first.most - first.least + 1]))

    def rank(self, step: Step) -> int:
        """Return the rank of an update."""
        key = ("rank", step.seed, step.task, step.phase, step.index)
        u = float(torch.rand((), dtype=torch.float64, generator=keyed(*key)))
        place = bisect.bisect_right(self.sums, u * self.sums[-1], hi=len(self.sums) - 1)
        return self.cores[0].least + place

    def begin(self, step: Step) -> None:
        """Set the rank, and tell the optimiser which rows of A and columns of B may move."""
        b = self.rank(step)
        self._agree(b)
        self._draw(b)
        for group in self.optimizer.param_groups:
            if group.get("update") == ROWS:
                group["first"], group["last"] = b - 1 if self.cores[0].newest else 0, b

    def after(self, step: Step) -> None:
        """Take the draw back."""
        self.release()

    def release(self) -> None:
        """Take the draw back, of an update that was not finished too."""
        self._draw(0)

    def _draw(self, b: int) -> None:
        for core in self.cores:
            core.drawn = b
        # Cores share what compiled code reads, so that one copy to a device serves all of them.
        for core in {id(core.now): core for core in self.cores}.values():
            core.tell()

    def _agree(self, b: int) -> None:
        """Compare the ranks of all processes, once a phase, at every update if torch debugs.

        Raises:
            RunError: if they differ.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        if self.agreed and dist.get_debug_level() != dist.DebugLevel.DETAIL:
            return
        here = torch.tensor([b], device=self.adapter.layers[0].A.device)
        found = [torch.zeros_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(found, here)
        ranks = torch.cat(found).tolist()
        if len(set(ranks)) > 1:
            raise RunError(
                f"rank: the processes drew {ranks}, expected one for all; give every process the "
                "same seed, task, phase and number of updates"
            )
        self.agreed = True
