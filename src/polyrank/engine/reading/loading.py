"""Tokenizers and image processors from a folder or the hub; none of them runs code of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from polyrank.errors import ConfigError
from polyrank.streams import OnePass, Stream

TEXT_KINDS = frozenset(
    {
        "sequence-classification",
        "regression",
        "text-to-label",
        "generation",
        "language-modelling",
        "image-text",
    }
)


class Processors:
    """A tokenizer and an image processor, for models that read both.

    Args:
        tokenizer: of transformers, or None.
        image_processor: of transformers, or None.
    """

    def __init__(self, tokenizer: Any = None, image_processor: Any = None) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor


def load_processor(path: str | Path, stream: Stream) -> Any:
    """Return what a model at `path` needs to read a stream's rows.

    A tokenizer for texts; for stored images the image processor, or None if the folder has none, so
    that the model's configuration says what it sees; for images with texts, `Processors` of both;
    None for rows that are ready for their model.

    Raises:
        ConfigError: naming everything that cannot be loaded.
    """
    kinds = {task.kind for task in stream}
    tokenizer = images = None
    problems: list[str] = []
    try:
        if kinds & TEXT_KINDS:
            tokenizer = load_tokenizer(path)
    except ConfigError as error:
        problems += error.problems
    try:
        if stored_images(stream):
            images = load_image_processor(path)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    if "image-text" in kinds:
        return Processors(tokenizer, images)
    return images if tokenizer is None else tokenizer


def stored_images(stream: Stream) -> bool:
    """Say whether rows hold images as they are stored."""
    return any("image" in first_row(task) for task in stream)


def first_row(task: Any) -> Any:
    """Return a task's first row; of one that may be read once, this is none of its readings."""
    rows = next(iter(task.data.values()))
    return (rows.inner if isinstance(rows, OnePass) else rows)[0]


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer in a folder or of a hub id.

    Raises:
        ConfigError: if there is none, or one that needs code of its own.
    """
    return _loaded(AutoTokenizer, path, "tokenizer", "tokenizer.json")


def load_image_processor(path: str | Path) -> Any:
    """Return the image processor in a folder or of a hub id, None if the folder has none.

    Raises:
        ConfigError: if it cannot be loaded, or needs code of its own.
    """
    folder = Path(path)
    names = ("preprocessor_config.json", "processor_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        return None
    return _loaded(AutoImageProcessor, path, "image processor", names[0])


def _loaded(kind: Any, path: str | Path, what: str, file: str) -> Any:
    try:
        return kind.from_pretrained(str(path), trust_remote_code=False)
    except (ImportError, KeyError, OSError, ValueError) as error:
        folder = Path(path).is_dir()
        where = "a folder" if folder else "neither a folder here nor a hub id that can be reached"
        remedy = (
            f"save it there with save_pretrained, which writes {file}"
            if folder
            else "pass a folder that save_pretrained wrote"
        )
        line = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"{what}: got {str(path)!r} ({where}), expected one that loads without code of its "
            f"own: {line}; {remedy}, or pass the {what} itself"
        ) from error
