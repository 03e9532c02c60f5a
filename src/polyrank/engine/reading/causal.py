"""Prompts and answers, and plain text, for decoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyrank.engine.reading.base import SILENT, origin, padded
from polyrank.engine.reading.language import LanguageReader


class CausalReader(LanguageReader):
    """Rows for decoders: beginning of text, prompt, answer, end of text, in one sequence.

    Rows with "text" alone are read from their beginning, and cut where `max_length` is reached.
    Batches are padded on the right; prompts to be continued on the left, so that every row goes on
    at the same place.
    """

    kinds = frozenset({"text-to-label", "generation", "language-modelling"})

    @property
    def first(self) -> list[int]:
        """The beginning of text, if the tokenizer has one."""
        found = getattr(self.tokenizer, "bos_token_id", None)
        return [] if found is None else [int(found)]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tokenise, cut and pad."""
        return {**self._batch([self._sequence(row) for row in rows]), **origin(rows)}

    def pairs(self, pairs: Sequence[tuple[str, str]], room: int) -> dict[str, Tensor]:
        """Return the batch of (prompt, answer), as if the answers had `room` tokens."""
        return self._batch([self._joined(prompt, answer, room) for prompt, answer in pairs])

    def asked(self, prompts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Return the prompts' inputs for `generate`, with room for `limit` tokens more."""
        lines = [self._prompt(prompt, limit) for prompt in prompts]
        return {
            "input_ids": padded(lines, self.pad, left=True),
            "attention_mask": padded([[1] * len(line) for line in lines], 0, left=True),
        }

    def given(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many tokens that `generate` returns were given to it."""
        return inputs["input_ids"].shape[1]

    def fills(self) -> dict[str, int]:
        """Return what stands in the place of tokens that are not there."""
        return {"input_ids": self.pad, "attention_mask": 0, "labels": SILENT}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tokens."""
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def _prompt(self, text: str, room: int) -> list[int]:
        # Something must stand before an answer; texts that follow one another end so, too.
        first = self.first or ([] if text else [self.end])
        return [*first, *self.shortened(self.ids(text), self.max_length - len(first) - room)]

    def _joined(self, prompt: str, answer: str, room: int = 0) -> tuple[list[int], int]:
        """Return a sequence, and how many of its tokens are given."""
        end = self.answer(answer)
        start = self._prompt(prompt, max(room, len(end)))
        return [*start, *end], len(start)

    def _sequence(self, row: Mapping[str, Any]) -> tuple[list[int], int]:
        if "answer" in row:
            return self._joined(row["prompt"], row["answer"])
        # Nothing predicts the first token, whether it is the beginning of text or not.
        return [*self.first, *self.ids(row["text"]), self.end][: self.max_length], 1

    def _batch(self, pieces: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
        width = self.width()
        silent = [[SILENT] * start + ids[start:] for ids, start in pieces]
        return {
            "input_ids": padded([ids for ids, _ in pieces], self.pad, width),
            "attention_mask": padded([[1] * len(ids) for ids, _ in pieces], 0, width),
            "labels": padded(silent, SILENT, width),
        }
