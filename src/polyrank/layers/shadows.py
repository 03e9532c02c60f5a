"""What a layer subtracts of its start, where the live ranks become fewer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polyrank.layers.views import View


def shadow_problems(views: Sequence[View]) -> list[str]:
    """List why the first such shadow cannot be cut along with the live ranks of its layer."""
    for view in views:
        if view.shadow is None:
            continue
        A0, _, delta = view.shadow
        if delta is not None or len(A0) != len(view.A):
            return [
                f"keep: the start subtracted at {view.site.path} has {len(A0)} ranks"
                f"{'' if delta is None else ' behind a map of its own'}, expected one for each of "
                f"the {len(view.A)} live ranks; export the adapter as a plain LoRA, or absorb it"
            ]
        if view.name in view.module.polyrank_replica:
            return [
                f"keep: replicas of adapter {view.name!r} share the start that is subtracted at "
                f"{view.site.path}, of which they need all ranks; drop them before"
            ]
    return []


def cut_shadow(view: View, ranks: Tensor, gain: float) -> None:
    """Let each live rank that is kept take along what is subtracted of its start.

    Args:
        view: the layer, its shadow of as many ranks as are live.
        ranks: (n,) int64, which of them are kept.
        gain: multiplies their values.
    """
    if view.shadow is None:
        return
    A0, B0, _ = view.shadow
    B0 = B0.index_select(1, ranks)
    view.shadow = (A0.index_select(0, ranks), B0 if gain == 1 else B0 * gain, None)
