"""Where an adapter sits: known before any weight exists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted place of a model.

    Args:
        path: module path in the base model, ``"model.layers.0.self_attn.q_proj"``; for a block its
            own path.
        d_in: input width; of a block the width of its norms, 0 if it has none.
        d_out: output width.
        r: number of live ranks, after ``rank_pattern`` or the shapes of a saved adapter.
        alpha: numerator of the scaling, after ``alpha_pattern``.
        depth: number of the transformer block, -1 outside of any.
        depths: how many transformer blocks the model has, -1 if none was recognised.
        masks: which mask speaks about the tokens seen here: ``"mask"``, ``"decoder"`` or ``""``
            (none).
        modules: for a block, the paths of the modules in it, relative to it.
        adapted: those of them that carry the adapter.
    """

    path: str
    d_in: int
    d_out: int
    r: int
    alpha: float = 16.0
    depth: int = -1
    depths: int = -1
    masks: str = "mask"
    modules: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
