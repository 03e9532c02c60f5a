"""Draws by key: the same key gives the same rows on every machine and in every version of numpy."""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

import numpy as np


def permutation(count: int, *key: int | str) -> np.ndarray:
    """The numbers 0..count-1 in the order that the key draws."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    # numpy keeps the numbers of its legacy generator unchanged for good.
    seeds = np.frombuffer(digest, dtype="<u4").astype(np.uint32)
    return np.random.RandomState(seeds).permutation(count)


def fractions(
    rows: np.ndarray, shares: Mapping[str, float], *key: int | str
) -> dict[str, np.ndarray]:
    """Rows shared out by fractions of at most 1 together; no row goes to two of them.

    The bounds are rounded, so that fractions which add up to 1 use every row.
    """
    drawn = rows[permutation(len(rows), *key)]
    bounds = [round(end * len(rows)) for end in np.cumsum([0.0, *shares.values()])]
    pairs = zip(shares, pairwise(bounds), strict=True)
    return {name: np.sort(drawn[first:last]) for name, (first, last) in pairs}


def at_most(rows: np.ndarray, count: int, *key: int | str) -> np.ndarray:
    """So many of the rows, or all of them if there are fewer, in their order."""
    return np.sort(rows[permutation(len(rows), *key)[:count]])


def per_class(
    rows: np.ndarray, classes: Sequence[Hashable], count: int, *key: int | str
) -> np.ndarray:
    """So many rows of each class, or all of it if it has fewer, in their order."""
    taken: dict[Hashable, int] = {}
    kept = []
    for index in permutation(len(rows), *key):
        number = taken[classes[index]] = taken.get(classes[index], 0) + 1
        if number <= count:
            kept.append(rows[index])
    return np.sort(np.array(kept, dtype=rows.dtype))
