"""Sizes of the kernels' tiles: (rows, depth of a step, parts of a sum, warps, stages)."""

from typing import NamedTuple

# One product with [A; rows] and not one with each.
JOIN = True


class Tile(NamedTuple):
    """What one program works on."""

    rows: int
    depth: int
    split: int
    warps: int
    stages: int


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded(r: int) -> int:
    """Columns of a tile that holds r ranks: a power of two, at least what a product takes."""
    return max(16, _power(r))


def read(tokens: int, d: int, columns: int, itemsize: int) -> Tile:
    """For a pass over (tokens, d) that makes `columns` narrow columns of it."""
    if tokens <= 256:
        # Few tiles of tokens: their sums are split, so that enough programs read the factors.
        split = max(1, min(16, d // 128, 2048 // max(tokens, 16)))
        return Tile(16, 64 if itemsize < 4 else 32, split, 4, 2)
    if itemsize == 4 or columns > 256:
        return Tile(32, 32, 1, 4, 2)
    split = max(1, min(8, 128 // -(-tokens // 64), d // 256))
    if columns > 128:
        return Tile(64, 64, split, 8, 3)
    return Tile(64, 128, split, 4, 4)


def write(tokens: int, n: int, k: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """(tokens, columns, depth, warps, stages) of a tile of a thin product's result."""
    if itemsize == 4:
        return 32, 64, 32, 4, 2
    if tokens <= 16:
        return 16, 64, min(_power(max(k, 16)), 128), 4, 2
    return 64, 128, min(_power(max(k, 16)), 128), 4, 2


def outer(tokens: int, n: int, k: int, itemsize: int) -> tuple[int, int, int, int, int, int]:
    """(n, k, tokens of a step, parts, warps, stages) of a tile of a factor's gradient."""
    bn, bk = (32, 32) if itemsize == 4 else (128, min(128, padded(k)))
    bt = 32 if itemsize == 4 else 64
    strips = -(-n // bn) * -(-k // bk)
    split = max(1, min(16, -(-tokens // bt), 128 // strips))
    return bn, bk, bt, split, 8 if itemsize < 4 else 4, 4 if itemsize < 4 else 2
