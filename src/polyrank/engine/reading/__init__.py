"""From rows of a stream to batches, forwards and scores: one reader a family of task kinds."""

from __future__ import annotations

from polyrank.engine.reading.base import Reader, Score
from polyrank.engine.reading.images import ImageReader

__all__ = ["ImageReader", "Reader", "Score"]
