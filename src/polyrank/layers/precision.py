"""How exactly fp32 matrices are multiplied, for algebra that must not depend on a run's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _precisions(tf32: bool) -> list[tuple[Any, str, Any]]:
    """Return where torch keeps how exactly fp32 matrices are multiplied, and the value for it."""
    places: list[Any] = [torch.backends.cuda.matmul]
    if not tf32:
        # Of a CPU only the exact value is sure to be known.
        places.append(getattr(torch.backends.mkldnn, "matmul", None))
    word = "tf32" if tf32 else "ieee"
    found: list[tuple[Any, str, Any]] = [
        (place, "fp32_precision", word) for place in places if hasattr(place, "fp32_precision")
    ]
    # torch before 2.9 knows the older switch alone, and later ones refuse to have both used.
    return found or [(torch.backends.cuda.matmul, "allow_tf32", tf32)]


@contextmanager
def without_tf32(*, but: bool = False) -> Iterator[None]:
    """Multiply fp32 matrices in fp32, since TF32 would cost three digits; `but` asks for it."""
    places = _precisions(but)
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextmanager
def exact(device: str, *, but_tf32: bool = False) -> Iterator[None]:
    """Multiply fp32 matrices in fp32: neither in TF32, unless asked for, nor in autocast's bf16."""
    with without_tf32(but=but_tf32), torch.autocast(device, enabled=False):
        yield
