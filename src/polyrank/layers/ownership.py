"""Who else reads a base weight, or was made from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from polyrank.layers.adapter import ModelAdapter
from polyrank.layers.views import View


def readers(model: nn.Module, views: Sequence[View]) -> Iterator[tuple[View, list[str]]]:
    """Yield the layers whose base weight other modules read too, such as tied embeddings."""
    weights = {id(getattr(v.module.get_base_layer(), "weight", None)): v for v in views}
    found: dict[int, list[str]] = {key: [] for key in weights}
    for path, module in model.named_modules():
        for param in module._parameters.values():
            if param is not None and id(param) in found:
                found[id(param)].append(path)
    yield from ((weights[key], paths) for key, paths in found.items() if len(paths) > 1)


def rivals(views: Iterable[View]) -> Iterator[str]:
    """Say which other adapter was made from the same base weight."""
    for view in views:
        for name, other in view.module.views.items():
            if name != view.name and other.core.owns and view.core.owns:
                yield (
                    f"adapter {view.name!r}: adapter {name!r} has split the weight at "
                    f"{view.site.path} too, and what one of them adds to it moves what the other "
                    "protects; delete one with delete_adapter"
                )
                return


def untrainable(model: nn.Module, found: ModelAdapter) -> Iterator[str]:
    """Say why training an adapter would be in vain: nothing is free, or a weight is not its own."""
    if found.layers and not any(view.site.r for view in found.layers):
        yield (
            f"adapter {found.name!r}: all {len(found.layers)} layers are frozen as a whole, and "
            "nothing would train; retain less (effective_rank, rise, or mrr and trr)"
        )
    for view, paths in readers(model, [view for view in found.layers if view.core.owns]):
        yield (
            f"base weight at {view.site.path}: is shared by {len(paths)} modules "
            f"({', '.join(paths[:2])}), which cannot follow what {found.name!r} learns on its "
            "split; leave the layer out with exclude_modules, or untie the weights"
        )
        return
