"""Mode connectivity: what lies on the straight path between two states of one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.layers import adapter_of
from polyrank.parts.connect import barrier, distance, place

State = Mapping[str, Tensor]


def adapter_state(model: nn.Module, replica: str = "") -> dict[str, Tensor]:
    """Return a copy of everything that may train, by name: live, or as a replica holds it.

    Raises:
        ConfigError: if the replica is missing, or has the shapes of an earlier task.
    """
    adapter = adapter_of(model)
    named = adapter.named()
    if not replica:
        return {name: param.detach().clone() for name, param in named.items()}
    held = {id(param): kept for kept, param in adapter.pairs(replica)}
    return {name: held[id(param)].detach().clone() for name, param in named.items()}


@torch.no_grad()
def connectivity(
    model: nn.Module,
    first: State,
    second: State,
    stream: Any,
    reader: Reader,
    *,
    steps: int = 11,
    size: int = 256,
) -> dict[str, Any]:
    """Score every task at φ(t) = (1 − t) θ + t θ' for t from 0 to 1; the model is put back.

    Args:
        model: the adapted model, whose head knows all classes of the stream.
        first: state at t = 0, as `adapter_state` gives it.
        second: state at t = 1.
        stream: its tasks' test rows are scored, among all classes.
        reader: reads them.
        steps: places on the path, both ends counted, >= 2.
        size: rows per forward.

    Returns:
        "position" (steps,), "scores" by task (steps,), "barrier" by task (of 1 − score, so that a
        drop on the way is positive), "distance" ‖θ − θ'‖.

    Raises:
        ConfigError: if the states do not fit each other or the model, or there is no way between.

    Source: arXiv:2402.18865, section 3.
    """
    if type(steps) is not int or steps < 2:
        raise ConfigError(f"steps: got {steps!r}, expected an integer >= 2, both ends counted")
    grid = [number / (steps - 1) for number in range(steps)]
    far = distance(first, second)
    adapter, own = adapter_of(model), adapter_state(model)
    scores: dict[str, list[float]] = {task.name: [] for task in stream}
    training = model.training
    model.eval()
    try:
        for t in grid:
            # Not a (1 − t) + b t at the ends, which would round.
            mixed = {
                n: v if t == 0 else second[n] if t == 1 else v + t * (second[n] - v)
                for n, v in first.items()
            }
            place(adapter, mixed)
            for task in stream:
                found = reader.score(model, task, task.data["test"], size)
                scores[task.name].append(found.unrestricted)
    finally:
        place(adapter, own)
        model.train(training)
    heights = {name: barrier([1 - s for s in found], grid) for name, found in scores.items()}
    return {"position": grid, "scores": scores, "barrier": heights, "distance": far}
