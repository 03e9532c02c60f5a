"""Rules with more than one user."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from polyrank.frame import ORDER, Adapter, Rule, Step, Workshop
from polyrank.parts.cores import RankGate

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Balance(Rule):
    """Keeps the load of ranks even without a loss: b_i += rate · sign(mean(c) − c_i) per update.

    The counts c of all layers and micro-batches are summed over processes in one all-reduce.

    Args:
        rate: the step u, >= 0.
    """

    order = ORDER["balance"]

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Collect the cores that count; what they counted before belongs to no update of ours."""
        self.cores = [layer.core for layer in adapter.layers if isinstance(layer.core, RankGate)]
        for core in self.cores:
            core.taken()

    def after(self, step: Step) -> None:
        """Sum the counts over processes, move every bias by one step, forget the counts."""
        cores = [core for core in self.cores if core.counting]
        if not cores:
            return
        device = cores[0].router.weight.device
        parts = [
            torch.zeros(core.widths[0], dtype=torch.int64, device=device)
            if (found := core.taken()) is None
            else found.to(device)
            for core in cores
        ]
        counts = torch.cat(parts)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        self._balance(cores, counts)

    @torch.no_grad()
    def _balance(self, cores: list[RankGate], counts: torch.Tensor) -> None:
        """As `RankGate.balance` for every core, by a few operations for all that are alike."""
        alike: dict[tuple[object, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for core, part in zip(cores, counts.split([c.widths[0] for c in cores]), strict=True):
            if (bias := core.balance_bias) is not None:
                alike.setdefault((bias.shape, bias.dtype, bias.device), []).append((bias, part))
        for pairs in alike.values():
            biases, parts = [bias for bias, _ in pairs], torch.stack([part for _, part in pairs])
            wide = parts.double()
            errors = (wide.mean(1, keepdim=True) - wide).sign().to(biases[0])
            torch._foreach_add_(biases, list(errors.unbind(0)), alpha=self.rate)


class SecondBeta(Rule):
    """Sets the second decay of Adam in the groups of an adapter; the first stays the run's own.

    Optimisers without betas keep what they have.

    Args:
        beta_2: in [0, 1).
    """

    def __init__(self, beta_2: float) -> None:
        self.beta_2 = beta_2

    def bind(self, adapter: Adapter, optimizer: Optimizer, workshop: Workshop | None) -> None:
        """Set it."""
        mine = {id(p) for params in adapter.roles().values() for p in params}
        for group in optimizer.param_groups:
            if "betas" in group and any(id(p) in mine for p in group["params"]):
                first, _, *rest = group["betas"]
                group["betas"] = (first, self.beta_2, *rest)
