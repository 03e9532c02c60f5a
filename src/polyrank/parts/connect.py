"""Mode connectivity: what lies between two states of one adapter, and how far apart they are.

A state is a dict of tensors by name, such as `adapter.named()` or a saved adapter gives: factors
have "A" or "B", "polyrank_A" or "polyrank_B" as one part of their dotted names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Adapter

State = Mapping[str, Tensor]
PATHS = ("factors", "product")
SIDES = {"A": "B", "polyrank_A": "polyrank_B"}


def between(first: State, second: State, t: float, *, path: str = "factors") -> dict[str, Tensor]:
    """Return the state at t on the way from the first (t = 0) to the second (t = 1).

    "factors": φ = (1 − t) θ + t θ', tensor by tensor. "product": A = [A; A'] (r + r', d_in) and
    B = [(1 − t) B, t B'] (d_out, r + r'), so that B A is (1 − t) B A + t B' A' exactly; it fits an
    adapter of r + r' ranks with the scaling of either. What is no factor is interpolated, and on
    the product path a core's own tensors must be equal.

    Raises:
        ConfigError: if names or shapes differ, or the path is none of the two.
    """
    if path not in PATHS:
        raise ConfigError(f"path: got {path!r}, expected one of {', '.join(PATHS)}; choose one")
    if problems := _differences(first, second, ranks=path == "product"):
        raise ConfigError(problems)
    found = {}
    for name, value in first.items():
        other, side = second[name].to(value), _side(name)
        if path == "factors" or not side:
            found[name] = torch.lerp(value, other, t)
        elif side == "A":
            found[name] = torch.cat([value, other])
        else:
            found[name] = torch.cat([(1 - t) * value, t * other], dim=1)
    return found


def place(adapter: Adapter, state: State) -> None:
    """Copy a state into an adapter's parameters; its names are those of `adapter.named()`.

    Raises:
        ConfigError: if a name is missing or unknown, or a shape does not fit, before any copy.
    """
    held = adapter.named()
    if problems := _differences(held, state, ranks=False):
        raise ConfigError(problems)
    with torch.no_grad():
        for name, param in held.items():
            param.copy_(state[name])


def along(
    first: State,
    second: State,
    grid: Sequence[float],
    measure: Callable[[dict[str, Tensor]], float],
    *,
    path: str = "factors",
) -> list[float]:
    """Return what `measure` finds in the states at every t of a grid."""
    return [measure(between(first, second, t, path=path)) for t in grid]


def barrier(losses: Sequence[float], grid: Sequence[float]) -> float:
    """Return max_t L(t) − ((1 − t) L(0) + t L(1)): 0 at least, as the ends count.

    Raises:
        ConfigError: if the grid does not run from 0 to 1, or has another length than the losses.
    """
    if len(grid) != len(losses) or len(grid) < 2 or grid[0] != 0 or grid[-1] != 1:
        raise ConfigError(
            f"grid: got {len(grid)} places from {list(grid)[:1]} to {list(grid)[-1:]} for "
            f"{len(losses)} losses, expected as many, from 0 to 1; use torch.linspace(0, 1, 11)"
        )
    start, end = losses[0], losses[-1]
    heights = (loss - ((1 - t) * start + t * end) for t, loss in zip(grid, losses, strict=True))
    return max(heights)


def distance(first: State, second: State) -> float:
    """Return ‖θ − θ'‖ over all tensors, in fp64.

    Raises:
        ConfigError: if names or shapes differ.
    """
    if problems := _differences(first, second, ranks=False):
        raise ConfigError(problems)
    squares = [
        (value.double() - second[name].to(value.device).double()).square().sum()
        for name, value in first.items()
    ]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def similarity(x: Tensor, y: Tensor) -> float:
    """Linear CKA of features x (n, d) and y (n, e) of the same n rows, in [0, 1], fp64.

    ‖Ỹᵀ X̃‖²_F / (‖X̃ᵀ X̃‖_F ‖Ỹᵀ Ỹ‖_F) with centred columns; 1 for y = c x Q + b with Q orthogonal.

    Source: arXiv:1905.00414, section 3.

    Raises:
        ConfigError: if the rows do not correspond, or one side is constant.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < 2:
        raise ConfigError(
            f"features: got {tuple(x.shape)} and {tuple(y.shape)}, expected (n, d) and (n, e) of "
            "the same rows, two at least; flatten tokens into rows first"
        )
    x, y = (side.double() - side.double().mean(0) for side in (x, y))
    if max(x.shape[1], y.shape[1]) > len(x):
        K, L = x @ x.T, y @ y.T
        top, norms = (K * L).sum(), K.norm() * L.norm()
    else:
        top, norms = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    if not float(norms) > 0:
        raise ConfigError(
            "features: one side is the same for all rows, so there is nothing to compare; take "
            "other rows, or another layer"
        )
    return float(top / norms)


def _side(name: str) -> str:
    """Return "A", "B", or "" for what is no factor."""
    parts = set(name.split("."))
    if parts & SIDES.keys():
        return "A"
    return "B" if parts & set(SIDES.values()) else ""


def _differences(first: State, second: State, *, ranks: bool) -> list[str]:
    """List what keeps two states from being compared; with `ranks` those may differ in number."""
    problems = [
        f"state: {name!r} is in one of the two only; take both from the same kind of adapter"
        for name in sorted(first.keys() ^ second.keys())
    ]
    for name in sorted(first.keys() & second.keys()):
        a, b, side = first[name], second[name], _side(name)
        axis = {"A": 0, "B": 1}.get(side) if ranks else None
        shapes = [[n for i, n in enumerate(t.shape) if i != axis] for t in (a, b)]
        if shapes[0] != shapes[1]:
            problems.append(
                f"state: {name!r} has the shapes {tuple(a.shape)} and {tuple(b.shape)}; adapters "
                "of different ranks are joined on the product path alone"
            )
        elif ranks and ".core." in f".{name}." and not torch.equal(a, b.to(a)):
            problems.append(
                f"state: {name!r} belongs to a core and differs, so that the products are not B A; "
                "use path='factors'"
            )
    return problems
