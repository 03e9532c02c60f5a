"""How much a layer matters: the mean cosine of what enters it and what it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Workshop
from polyrank.layers.views import View


class Alike:
    """Sums cos(x, y) over tokens for layers, of the first m coordinates of input and output.

    y is what the adapted layer answers, without its bias; padding is left out.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, layer: View, x: Tensor, y: Tensor) -> None:
        """Take one pass: x (…, d_in), and y (…, d_out) of the base layer."""
        flow, bias = layer.module.flow, layer.module.base_bias()
        y = layer.add(y if bias is None else y - bias, x, flow)
        mask = flow.tokens(layer.site.masks, x.shape[:-1])
        m = min(x.shape[-1], y.shape[-1])
        found = cosines(x[..., :m], y[..., :m])
        found = found.flatten() if mask is None else found[mask.bool()]
        path = layer.site.path
        self.totals[path] = self.totals.get(path, 0.0) + found.sum(dtype=torch.float64)
        self.counts[path] = self.counts.get(path, 0) + found.numel()

    def means(self) -> dict[str, float]:
        """Return the mean over all tokens, by path."""
        return {path: float(total) / self.counts[path] for path, total in self.totals.items()}

    def checked(self, paths: Iterable[str]) -> dict[str, float]:
        """Return the means of these layers.

        Raises:
            ConfigError: if no token has passed one.
        """
        means = self.means()
        if unseen := sorted(set(paths) - means.keys()):
            raise ConfigError(
                f"importance: no token passes {unseen[0]} and {len(unseen) - 1} more layers; leave "
                "them out with exclude_modules"
            )
        return means


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return x·y / ((‖x‖ + 1e-8)(‖y‖ + 1e-8)) over the last axis, in fp32 at least."""
    x, y = x.double(), y.double()
    sizes = [torch.linalg.vector_norm(v, dim=-1) + 1e-8 for v in (x, y)]
    return (x * y).sum(-1) / (sizes[0] * sizes[1])


def measure(workshop: Workshop, role: str, rows: int) -> dict[str, float]:
    """Return the importance of every adapted layer on rows of the task that has just ended."""
    alike, layers = Alike(), {v.site.path: cast("View", v) for v in workshop.adapter.layers}
    seed = int(torch.randint(2**31, (), generator=workshop.rng("importance")))

    def seen(path: str, found: dict[str, Tensor]) -> None:
        alike(layers[path], found["input"], found["output"])

    batches = _limited(workshop.data(role, seed=seed), rows)
    workshop.observe(batches, "linear", frozenset({"input", "output"}), seen)
    return alike.checked(layers)


@torch.no_grad()
def seen_by(
    model: nn.Module, layers: Sequence[View], batches: Iterable[dict[str, Any]], rows: int
) -> dict[str, float]:
    """Return the same in one's own loop, from batches of what the model is called with."""
    alike, training = Alike(), model.training
    hooks = [
        view.module.base_layer.register_forward_hook(
            lambda _, given, y, view=view: alike(view, given[0], y)
        )
        for view in layers
    ]
    try:
        model.eval()
        for batch in _limited(batches, rows):
            model(**batch)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return alike.checked(view.site.path for view in layers)


def _limited(batches: Iterable[dict[str, Any]], rows: int) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if rows <= 0:
            return
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        keep = min(size, rows)
        rows -= keep
        yield {
            k: v[:keep] if isinstance(v, Tensor) and v.dim() and len(v) == size else v
            for k, v in batch.items()
        }
