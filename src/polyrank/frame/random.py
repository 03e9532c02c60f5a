"""Keyed randomness: polyrank draws from named generators, never from the global one."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """Map a key such as ``(seed, task, path)`` to 63 bits, the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def keyed(*key: int | str) -> torch.Generator:
    """Return a CPU generator whose stream depends on the key alone.

    Draw on the CPU and move the result, so that a model on another device starts from the same
    values.
    """
    return torch.Generator().manual_seed(seed_of(*key))
