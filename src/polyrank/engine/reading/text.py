"""Texts, or pairs of texts, that get a class or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from polyrank.engine.reading.base import Reader, Score, metric, origin, padded
from polyrank.errors import ConfigError
from polyrank.frame import Loss, Out
from polyrank.streams import Task

PADDINGS = ("max_length", "longest")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SequenceReader(Reader):
    """Rows with "text", perhaps "text_pair", and "label".

    A text is cut at its right, of a pair the longer one, and padded on the right.

    Args:
        tokenizer: of transformers.
        max_length: tokens of a row at most, >= 1.
        padding: "max_length", or "longest" for the longest row of a batch: faster for short texts,
            but a row's last bits then depend on the rows beside it.

    Raises:
        ConfigError: naming every option out of range.
    """

    kinds = frozenset({"sequence-classification"})

    # A row's values must not depend on its batch mates: rows are replayed beside others, teachers
    # and stored logits see them in other batches, and a resumed run must repeat every bit. Sums
    # over other widths are rounded otherwise, so that the width is fixed unless asked for.
    def __init__(
        self, tokenizer: Any, max_length: int = 128, *, padding: str = "max_length"
    ) -> None:
        if problems := [*length_problems(max_length), *padding_problems(padding)]:
            raise ConfigError(problems)
        self.tokenizer, self.max_length, self.padding = tokenizer, max_length, padding
        self.pad = padding_token(tokenizer)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tokenise and pad."""
        found = [self._tokens(row) for row in rows]
        width = self.max_length if self.padding == "max_length" else 0
        batch = {
            name: padded([tokens[name] for tokens in found], self.fills()[name], width)
            for name in _INPUTS
            if name in found[0]
        }
        return {**batch, "labels": self.labels(rows), **origin(rows)}

    def _tokens(self, row: Mapping[str, Any]) -> Mapping[str, list[int]]:
        # One row at a time, as a batch may mix pairs with single texts.
        found = self.tokenizer(
            row["text"],
            row.get("text_pair"),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
        )
        return cast("Mapping[str, list[int]]", found)

    def labels(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return (n,) class numbers."""
        return torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)

    def fills(self) -> dict[str, int]:
        """Return what stands in the place of tokens that are not there."""
        types = int(getattr(self.tokenizer, "pad_token_type_id", 0) or 0)
        return dict(zip(_INPUTS, (self.pad, 0, types), strict=True))

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tokens."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def embedding(self, found: Any, seen: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the classifier reads; a decoder's classifier reads the last real token."""
        states = super().embedding(found, seen, batch)
        if states.dim() == 2:
            return states
        places = torch.arange(states.shape[1], device=states.device)
        last = (places * (batch["input_ids"] != self.pad)).argmax(-1)
        return states[torch.arange(len(states), device=states.device), last]

    def misfits(self, model: nn.Module) -> list[str]:
        """Return what says that model and tokenizer do not belong together."""
        found = vocabulary_problems(model, self.tokenizer) + room_problems(model, self.max_length)
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        # Decoders classify by the last token that is none of padding.
        if isinstance(getattr(model, "score", None), nn.Linear) and pad != self.pad:
            found.append(
                f"model: got pad_token_id {pad}, expected the tokenizer's {self.pad}; set "
                f"model.config.pad_token_id = {self.pad}"
            )
        return found


class SquaredError(Loss):
    """(z − y)², summed over the rows, for one output z."""

    needs = frozenset({"logits"})

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum; labels are numbers."""
        assert out.logits is not None
        return (out.logits[:, 0].float() - batch["labels"].float()).square().sum()


class RegressionReader(SequenceReader):
    """Rows with "text", perhaps "text_pair", and "target", a number.

    All tasks share a head of one output, which takes the classifier's place.
    """

    kinds = frozenset({"regression"})
    growing = False
    outputs = ("value",)

    def labels(self, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """Return (n,) targets, float32."""
        return torch.tensor([float(row["target"]) for row in rows], dtype=torch.float32)

    def loss(self) -> Loss:
        """Return the squared error."""
        return SquaredError()

    @torch.no_grad()
    def score(self, model: nn.Module, task: Task, rows: Any, size: int) -> Score:
        """Score the numbers by the task's metric; there are no classes to restrict them to."""
        numbers: list[float] = []
        for _, batch in self.batches(model, rows, size):
            out = self.forward(model, batch, frozenset({"logits"}))
            numbers += cast("Tensor", out.logits)[:, 0].float().tolist()
        # From the rows of the batch they would be rounded to fp32.
        targets = [float(rows[i]["target"]) for i in range(len(rows))]
        found = metric(task, numbers, targets)
        return Score(restricted=float("nan"), unrestricted=found, count=len(rows))


def padding_token(tokenizer: Any) -> int:
    """Return what fills sequences up: the mask says that it is not read, so any token does."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if found is not None:
            return int(found)
    return 0


def length_problems(max_length: Any, name: str = "max_length", least: int = 1) -> list[str]:
    """Return what is wrong with a number of tokens."""
    if isinstance(max_length, int) and not isinstance(max_length, bool) and max_length >= least:
        return []
    return [f"{name}: got {max_length!r}, expected an integer >= {least}; 128 is common"]


def padding_problems(padding: str) -> list[str]:
    """Return what is wrong with a kind of padding."""
    if padding in PADDINGS:
        return []
    return [f"padding: got {padding!r}, expected {' or '.join(PADDINGS)}; use 'max_length'"]


def vocabulary_problems(model: nn.Module, tokenizer: Any) -> list[str]:
    """Return what says that a tokenizer knows tokens that the model has no row for."""
    try:
        rows = cast("Any", model).get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):
        return []
    if len(tokenizer) <= rows:
        return []
    return [
        f"tokenizer: got {len(tokenizer)} tokens, but the model embeds {rows}, expected at most as "
        "many; pass the model's own tokenizer, or resize_token_embeddings first"
    ]


def room_problems(model: nn.Module, length: int) -> list[str]:
    """Return what says that a model has fewer positions than tokens may come."""
    places = positions(model)
    if places is None or length <= places:
        return []
    return [
        f"max_length: got {length}, but the model has {places} positions, expected at most as "
        f"many; use max_length={places}"
    ]


def positions(model: nn.Module) -> int | None:
    """Return how many tokens a model can read, None if nothing limits it."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
