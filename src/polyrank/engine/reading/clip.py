"""Images that are matched with the texts of all classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from polyrank.engine.reading.base import Reader, Score, class_score, origin, padded
from polyrank.engine.reading.images import Pixels, stack
from polyrank.engine.reading.text import (
    length_problems,
    padding_token,
    room_problems,
    vocabulary_problems,
)
from polyrank.errors import ConfigError
from polyrank.frame import Out
from polyrank.streams import Stream, Task
from polyrank.streams.templates import names, render


class ImageTextReader(Reader):
    """Rows with "image", or ready "pixel_values", and "label": logits are e^τ cos(image, text_c).

    The texts are those of all classes that `see` was shown, class number by class number; the text
    of a class is the prompt of the task that showed it first, with the label's name put in. Every
    training forward runs both towers, so that gradients reach whichever is adapted; a score runs
    the text tower once. A task with classes that have not been seen is scored among its own classes
    alone, as a model that was never trained on it can be.

    Args:
        tokenizer: of transformers.
        pixels: makes pixels of stored images; None if no row has any.
        max_length: tokens of a text at most, >= 3.

    Raises:
        ConfigError: if `max_length` is out of range.
    """

    kinds = frozenset({"image-text"})
    growing = False
    offers: ClassVar[frozenset[str]] = Reader.offers | {"texts"}

    def __init__(self, tokenizer: Any, pixels: Pixels | None = None, max_length: int = 77) -> None:
        if problems := length_problems(max_length, least=3):
            raise ConfigError(problems)
        self.tokenizer, self.pixels, self.max_length = tokenizer, pixels, max_length
        # By class: (label, text).
        self.seen: dict[int, tuple[str, str]] = {}
        self.tokens: dict[str, Tensor] = {}

    def see(self, task: Task) -> None:
        """Add the texts of the classes that no task has shown before.

        Raises:
            ConfigError: if the classes seen are not 0..n-1, the columns of logits.
        """
        seen = {**class_texts(task), **self.seen}
        if sorted(seen) != list(range(len(seen))):
            raise ConfigError(
                f"classes: got {sorted(seen)} with task {task.name!r}, expected 0..{len(seen) - 1};"
                " number classes in the order in which the stream shows them first"
            )
        self.seen, self.tokens = seen, self._tokens(seen)

    def problems(self, model: nn.Module, stream: Stream) -> list[str]:
        """Return what says that this model cannot read these rows."""
        found = [
            f"stream: task {task.name!r}: got prompt {task.prompt!r}, expected {{label}} in it and "
            'no other name; give one such as "a photo of a {label}."'
            for task in stream
            if set(names(task.prompt or "")) != {"label"}
        ]
        if found:
            return found
        trial = copy.copy(self)
        trial.see(stream[0])
        return super(ImageTextReader, trial).problems(model, stream)

    def misfits(self, model: nn.Module) -> list[str]:
        """Return what says that this is no such model for these tokens."""
        found = vocabulary_problems(model, self.tokenizer) + room_problems(model, self.max_length)
        if "siglip" in str(getattr(getattr(model, "config", None), "model_type", "")):
            found.append(
                f"model: {type(model).__name__} reads a text at its last position, padding or not, "
                "expected a model that finds the end of a text; pass one such as CLIP"
            )
        return found

    def unfit(self, out: Out, batch: Mapping[str, Tensor]) -> list[str]:
        """Return what is wrong with the answer to a row."""
        shape = tuple(cast("Tensor", out.logits).shape)
        expected = (len(batch["labels"]), len(self.seen))
        if shape == expected:
            return []
        return [f"gives logits of shape {shape}, expected {expected}; pass a model such as CLIP"]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make pixels and stack them; texts belong to classes and not to rows."""
        labels = torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)
        return {"pixel_values": stack(rows, self.pixels), "labels": labels, **origin(rows)}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the pixels, and the texts of all classes seen.

        Raises:
            ConfigError: if no task was seen yet.
        """
        if not self.seen:
            raise ConfigError("classes: none has been seen yet; call see(task) when a task begins")
        pixels = batch["pixel_values"]
        tokens = {name: ids.to(pixels.device) for name, ids in self.tokens.items()}
        return {"pixel_values": pixels, **tokens}

    def _tokens(self, classes: Mapping[int, tuple[str, str]]) -> dict[str, Tensor]:
        texts = [classes[number][1] for number in sorted(classes)]
        found = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        pad = padding_token(self.tokenizer)
        return {
            "input_ids": padded(found["input_ids"], pad),
            "attention_mask": padded([[1] * len(ids) for ids in found["input_ids"]], 0),
        }

    def logits(self, found: Any) -> Tensor:
        """Return one row an image."""
        return cast("Tensor", found.logits_per_image)

    def hidden(self, found: Any) -> list[Tensor]:
        """Return the states of the image tower."""
        return list(found.vision_model_output.hidden_states)

    def embedding(self, found: Any, seen: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the images' unit vectors in the space shared with the texts."""
        return cast("Tensor", found.image_embeds)

    def mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return None: every patch is real."""
        return None

    @torch.no_grad()
    def score(self, model: nn.Module, task: Task, rows: Any, size: int) -> Score:
        """Score a model in evaluation mode; each text is encoded once."""
        own = class_texts(task)
        foreign = any(self.seen.get(c, ("",))[0] != label for c, (label, _) in own.items())
        classes = own if foreign else self.seen
        device = next(model.parameters()).device
        tokens = self._tokens(classes) if foreign else self.tokens
        tokens = {name: ids.to(device) for name, ids in tokens.items()}
        first = {name: ids[:1] for name, ids in tokens.items()}
        texts: Tensor | None = None
        logits, labels = [], []
        for _, batch in self.batches(model, rows, size):
            pixels = batch["pixel_values"]
            if texts is None:
                texts = self._encoded(model, tokens, pixels[:1], size)
            images = _ran(model, pixels, first).image_embeds
            logits.append((images.float() @ texts.T).cpu())
            labels += batch["labels"].tolist()
        numbers = sorted(classes)
        # Cosines order the classes as logits do, whose scale is positive and one for all.
        whole = torch.full((len(labels), max(numbers) + 1), -torch.inf)
        whole[:, numbers] = torch.cat(logits)
        return class_score(task, whole, labels)

    def _encoded(
        self, model: nn.Module, tokens: Mapping[str, Tensor], pixels: Tensor, size: int
    ) -> Tensor:
        """Return the unit vectors of texts, (classes, d) fp32, beside one image."""
        found = []
        for start in range(0, len(tokens["input_ids"]), size):
            part = {name: ids[start : start + size] for name, ids in tokens.items()}
            found.append(_ran(model, pixels, part).text_embeds.float())
        return torch.cat(found)


def _ran(model: nn.Module, pixels: Tensor, tokens: Mapping[str, Tensor]) -> Any:
    # Through the model's own forward: its towers alone would not tell adapters about masks.
    return model(pixel_values=pixels, **tokens)


def class_texts(task: Task) -> dict[int, tuple[str, str]]:
    """Return (label, text) of each class of a task."""
    return {
        number: (label, render(task.prompt or "{label}", {"label": label}))
        for number, label in zip(task.classes, task.labels, strict=True)
    }
