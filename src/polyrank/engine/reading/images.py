"""Images and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyrank.engine.reading.base import ORIGIN, Reader, stacked


class ImageReader(Reader):
    """Rows with "pixel_values", float32 (channels, height, width), ready for their model."""

    kinds = frozenset({"image-classification"})

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack pixels and classes."""
        found = stacked(rows, ("pixel_values", "label", *ORIGIN))
        return {"labels" if name == "label" else name: value for name, value in found.items()}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the pixels."""
        return {"pixel_values": batch["pixel_values"]}
