"""How exactly fp32 matrices are multiplied, for algebra that must not depend on a run's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _precisions() -> list[tuple[Any, str, Any]]:
    """Return where torch keeps how exactly fp32 matrices are multiplied, and the exact value."""
    places = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    found: list[tuple[Any, str, Any]] = [
        (place, "fp32_precision", "ieee") for place in places if hasattr(place, "fp32_precision")
    ]
    # torch before 2.9 knows the older switch alone, and later ones refuse to have both used.
    return found or [(torch.backends.cuda.matmul, "allow_tf32", False)]


@contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply fp32 matrices in fp32: TF32 would cost three digits."""
    places = _precisions()
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def exact(device: str) -> Iterator[None]:
    """Multiply fp32 matrices in fp32: neither in TF32 nor, inside autocast, in bf16."""
    with without_tf32(), torch.autocast(device, enabled=False):
        yield
