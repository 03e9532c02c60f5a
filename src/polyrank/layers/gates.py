"""What routed cores do on data: mean gate and load of every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.views import View, wide


class GateStatistics:
    """Sums over tokens of one layer's gates.

    Attributes:
        gate: (ranks,) sum of the gates, those of the bank first, fp64.
        chosen: (ranks,) number of tokens whose gate is not zero, fp64.
        tokens: number of real tokens seen.
    """

    def __init__(self, width: int) -> None:
        self.gate = torch.zeros(width, dtype=torch.float64)
        self.chosen = torch.zeros(width, dtype=torch.float64)
        self.tokens = 0

    def mean(self) -> Tensor:
        """Return the mean gate of each rank."""
        return self.gate / max(self.tokens, 1)

    def load(self) -> Tensor:
        """Return the share of tokens on which each rank was active; sums to the active ranks."""
        return self.chosen / max(self.tokens, 1)


def has_gates(view: View) -> bool:
    """Say whether a core can show its gates."""
    return hasattr(view.core, "gates_of")


@torch.no_grad()
def gate_statistics(
    model: nn.Module, views: list[View], batches: Iterable[dict[str, Any]]
) -> list[GateStatistics]:
    """Run batches through a model and sum the gates of some of its layers; padding does not count.

    Raises:
        MergeError: if a core has no gates.
        ConfigError: if the batches reach some layer with no token.
    """
    found = [
        GateStatistics(view.core.widths[1] + (0 if view.bank is None else view.bank[0].shape[0]))
        for view in views
    ]
    for view in views:
        if not has_gates(view):
            raise MergeError(
                f"gates: the core {type(view.core).__name__} has none to average; keep the "
                f"adapter unmerged"
            )
    handles = [
        view.module.register_forward_pre_hook(_Watch(view, stats))
        for view, stats in zip(views, found, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not all(stats.tokens for stats in found):
        raise ConfigError(
            "gates: the batches gave no token to some layer; pass batches that reach all of them"
        )
    return found


class _Watch:
    def __init__(self, view: View, stats: GateStatistics) -> None:
        self.view, self.stats = view, stats

    def __call__(self, module: AdaptedLinear, args: tuple[Any, ...]) -> None:
        view, flow = self.view, module.flow
        x = args[0].reshape(-1, args[0].shape[-1])
        mask = flow.tokens(view.site.masks, args[0].shape[:-1])
        x = x if mask is None else x[mask.reshape(-1)]
        A, _, core, _ = view.factors(flow)
        rows = core.rows()
        z = None if rows is None else F.linear(x.float(), rows.float())
        # A gate may read h itself, whose sums the operator does not round either. In 16 bits it
        # rounds the keys, which keep their own precision here: close scores may order otherwise.
        h = F.linear(wide(x), A.to(wide(x).dtype))
        gates = cast("Any", core).gates_of(h, z).double().cpu()
        self.stats.gate += gates.sum(0)
        self.stats.chosen += (gates != 0).double().sum(0)
        self.stats.tokens += len(x)
