"""From rows of a stream to batches, forwards and scores: one reader a family of task kinds."""

from __future__ import annotations

from polyrank.engine.reading.base import CrossEntropy, Reader, Score, merge_batches
from polyrank.engine.reading.causal import CausalReader
from polyrank.engine.reading.choosing import reader_for
from polyrank.engine.reading.clip import ImageTextReader
from polyrank.engine.reading.images import ImageReader, Pixels
from polyrank.engine.reading.loading import (
    Processors,
    load_image_processor,
    load_processor,
    load_tokenizer,
)
from polyrank.engine.reading.seq2seq import Seq2SeqReader
from polyrank.engine.reading.text import RegressionReader, SequenceReader, SquaredError

__all__ = [
    "CausalReader",
    "CrossEntropy",
    "ImageReader",
    "ImageTextReader",
    "Pixels",
    "Processors",
    "Reader",
    "RegressionReader",
    "Score",
    "Seq2SeqReader",
    "SequenceReader",
    "SquaredError",
    "load_image_processor",
    "load_processor",
    "load_tokenizer",
    "merge_batches",
    "reader_for",
]
