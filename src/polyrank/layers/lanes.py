"""Mixed batches: one adapter per sample, by PEFT's argument `adapter_names`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Flow
from polyrank.layers.compat import AuxiliaryTrainingWrapper
from polyrank.layers.hosts import BlockHost, HeadHost
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.walks import outer

BASE = "__base__"
# Arguments of a forward that tell the size of its batch.
INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "inputs")


@contextmanager
def mixed(
    model: nn.Module, flow: Flow, names: list[str], args: Any, kwargs: dict[str, Any]
) -> Iterator[None]:
    """Let every sample of the forwards inside pass its own adapter.

    Args:
        model: the tuner.
        flow: the model's flow.
        names: an adapter for each sample, "__base__" for none.
        args: positional arguments of the call, which tell the size of the batch.
        kwargs: its keywords, `num_beams` of `generate` among them.

    Raises:
        ValueError: in training, for unknown adapters, merged ones, or a wrong number of names.
        ConfigError: if heads or blocks stand in the model.
    """
    # Not through the adapters: a mixed batch has many.
    modules = [module for _, module in outer(model)]
    _check(model.training, modules, names, args, kwargs)
    beams = kwargs.get("num_beams") or 1
    spread = [name for name in names for _ in range(beams)]
    lanes = tuple(sorted(set(names) - {BASE}))
    lane = torch.tensor([lanes.index(name) if name != BASE else -1 for name in spread])
    handles = [
        module.register_forward_pre_hook(_Names(names, spread), with_kwargs=True)
        for module in modules
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    device = next(model.parameters()).device
    try:
        with flow.put(lane=lane.to(device), lanes=lanes, beams=beams):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Names:
    """Hands the adapter of each sample to PEFT's wrappers of whole modules."""

    def __init__(self, names: list[str], spread: list[str]) -> None:
        self.names, self.spread = names, spread

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # An encoder sees each sample once, whatever the number of beams.
        rows = len(args[0]) if args else len(self.spread)
        names = self.names if rows == len(self.names) else self.spread
        return args, {**kwargs, "adapter_names": names}


def _check(
    training: bool, modules: list[nn.Module], names: list[str], args: Any, kwargs: dict[str, Any]
) -> None:
    # The words of the ValueErrors are PEFT's own, which its users look for.
    given = [*args[:1], *(kwargs.get(key) for key in INPUTS)]
    sizes = {len(value) for value in given if isinstance(value, Tensor) and value.dim()}
    if sizes and len(names) not in sizes:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {min(sizes)} respectively."
        )
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(isinstance(m, (BlockHost, HeadHost)) and len(m.owned) for m in modules):
        raise ConfigError(
            "adapter_names: heads and blocks answer for a whole batch; run the samples of one "
            "adapter at a time, after model.set_adapter(name)"
        )
    known = {n for m in modules if isinstance(m, AdaptedLinear) for n in m.views}
    known |= {n for m in modules if isinstance(m, AuxiliaryTrainingWrapper) for n in m._adapters}
    if unknown := sorted(set(names) - known - {BASE}):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if any(m.merged for m in modules if isinstance(m, AdaptedLinear)):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )
