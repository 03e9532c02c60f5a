"""Which reader serves a stream and a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin

from polyrank.engine.reading.base import Reader
from polyrank.engine.reading.causal import CausalReader
from polyrank.engine.reading.clip import ImageTextReader
from polyrank.engine.reading.images import ImageReader, pixels_for
from polyrank.engine.reading.loading import first_row, load_processor, stored_images
from polyrank.engine.reading.seq2seq import Seq2SeqReader
from polyrank.engine.reading.text import RegressionReader, SequenceReader, positions
from polyrank.errors import ConfigError, nearest
from polyrank.streams import Stream
from polyrank.streams.kinds import KINDS

# Tokens of a row, unless the model or its tokenizer allow fewer.
_LENGTHS: Mapping[type[Reader], int] = {
    SequenceReader: 128,
    RegressionReader: 128,
    CausalReader: 512,
    Seq2SeqReader: 512,
    ImageTextReader: 77,
}


def reader_for(
    stream: Stream, model: nn.Module, processor: Any = None, *, max_length: int | None = None
) -> Reader:
    """Return the reader of a stream's rows for a model; whether they fit, its `problems` says.

    Args:
        stream: whose kinds of tasks choose.
        model: whose configuration says how large images are, and whether it has an encoder beside
            its decoder.
        processor: its tokenizer or image processor, something with both, or where they lie: a
            folder or a hub id.
        max_length: tokens of a row at most; None is 128 for classes and numbers, 512 for prompts,
            77 for the texts of classes, or as many as tokenizer and model allow if that is less.

    Raises:
        ConfigError: naming everything that is missing or does not go together.
    """
    problems: list[str] = []
    kind = _chosen(stream, model, problems)
    loads = isinstance(processor, (str, Path))
    if loads:
        try:
            processor = load_processor(processor, stream)
        except ConfigError as error:
            problems += error.problems
    tokenizer, images = _parts(processor)
    # What could not be loaded is not reported as missing as well.
    if kind is not None and not (loads and problems):
        problems += _missing(kind, stream, model, tokenizer, images)
    if problems or kind is None:
        raise ConfigError(problems)
    pixels = pixels_for(model, images)
    if kind is ImageReader:
        return ImageReader(pixels)
    length = max_length or _length(kind, model, tokenizer)
    if kind is ImageTextReader:
        return ImageTextReader(tokenizer, pixels, length)
    if kind is Seq2SeqReader:
        return Seq2SeqReader(tokenizer, length, start=_start(model))
    return CausalReader(tokenizer, length) if kind is CausalReader else kind(tokenizer, length)


def _chosen(stream: Stream, model: nn.Module, problems: list[str]) -> type[Any] | None:
    """Return the class of the reader; None if there is none, with the reasons in `problems`."""
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    writer: type[Reader] = Seq2SeqReader if two else CausalReader
    families: tuple[type[Reader], ...] = (
        ImageReader,
        SequenceReader,
        RegressionReader,
        writer,
        ImageTextReader,
    )
    asked: dict[type[Reader], list[str]] = {}
    for task in stream:
        kind = task.kind
        if kind is None and "pixel_values" in first_row(task):
            kind = "image-classification"
        family = next((f for f in families if kind in f.kinds), None)
        if family is not None:
            asked.setdefault(family, []).append(f"{task.name!r} ({kind})")
        elif kind in KINDS:
            problems.append(
                f"model: {type(model).__name__} has an encoder and a decoder, but task "
                f"{task.name!r} is {kind}, expected a decoder; load one by AutoModelForCausalLM"
            )
        else:
            words = f"one of {', '.join(KINDS)};{nearest(str(kind), KINDS) or ' give it one'}"
            problems.append(f"stream: task {task.name!r}: got kind {kind!r}, expected {words}")
    if len(asked) > 1:
        listed = " beside ".join(", ".join(names) for names in asked.values())
        problems.append(
            f"stream: got tasks {listed}, expected kinds that one model serves; make a stream of "
            "each"
        )
    return next(iter(asked)) if len(asked) == 1 and not problems else None


def _parts(processor: Any) -> tuple[Any, Any]:
    """Return (tokenizer, image processor) of what was given, None for each that is not there."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return processor, None
    if isinstance(processor, ImageProcessingMixin):
        return None, processor
    return getattr(processor, "tokenizer", None), getattr(processor, "image_processor", None)


def _missing(
    kind: type[Reader], stream: Stream, model: nn.Module, tokenizer: Any, images: Any
) -> list[str]:
    found = []
    if kind is not ImageReader and tokenizer is None:
        found.append(
            f"tokenizer: got none, but tasks are {', '.join(sorted(_kinds(stream)))}, expected the "
            "model's own; pass processor=AutoTokenizer.from_pretrained(...) or the model's folder"
        )
    elif issubclass(kind, (CausalReader, Seq2SeqReader)) and tokenizer.eos_token_id is None:
        found.append(
            "tokenizer: got one without an end of text, expected eos_token, which ends every "
            "answer; set tokenizer.eos_token"
        )
    sees = kind in (ImageReader, ImageTextReader) and stored_images(stream)
    if sees and pixels_for(model, images) is None:
        found.append(
            f"image processor: got none, and {type(model).__name__} does not say how large its "
            "images are, expected one of them; pass processor=AutoImageProcessor"
            ".from_pretrained(...)"
        )
    if kind is Seq2SeqReader and _start(model) is None:
        found.append(
            "model: got no decoder_start_token_id in its configuration, expected the token that "
            "its decoder begins with; set model.config.decoder_start_token_id"
        )
    return found


def _kinds(stream: Stream) -> set[str]:
    return {task.kind for task in stream if task.kind is not None}


def _start(model: nn.Module) -> Any:
    return getattr(getattr(model, "config", None), "decoder_start_token_id", None)


def _length(kind: type[Reader], model: nn.Module, tokenizer: Any) -> int:
    limits = [_LENGTHS[kind], positions(model), getattr(tokenizer, "model_max_length", None)]
    return min(limit for limit in limits if limit is not None)
