"""Prompts and answers for encoder-decoder models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from polyrank.engine.reading.base import SILENT, origin, padded
from polyrank.engine.reading.language import LanguageReader


class Seq2SeqReader(LanguageReader):
    """Rows for encoder-decoder models: the encoder reads the prompt, the decoder writes the answer.

    The prompt gets the tokens that the tokenizer puts around a text. The decoder's sequence begins
    with `start`, whose label is `SILENT`, so that logits and labels stand as in causal models.
    "hidden" are the decoder's states.

    Args:
        tokenizer: of transformers, with an end-of-text token.
        max_length: tokens of a prompt at most, >= 4.
        start: what the decoder begins with, `model.config.decoder_start_token_id`.
        **options: those of `LanguageReader`.

    Raises:
        ConfigError: naming every option out of range.
    """

    kinds = frozenset({"text-to-label", "generation"})
    start: int

    def __init__(
        self, tokenizer: Any, max_length: int = 512, *, start: int, **options: Any
    ) -> None:
        super().__init__(tokenizer, max_length, **options)
        self.start = start
        found = tokenizer("a", return_special_tokens_mask=True)
        added = [bool(special) for special in found["special_tokens_mask"]]
        ids, inner = list(found["input_ids"]), added.index(False)
        tail = added[::-1].index(False)
        self.before, self.behind = ids[:inner], ids[len(ids) - tail :]

    def misfits(self, model: nn.Module) -> list[str]:
        """Return what says that this is no such model for these tokens."""
        found = super().misfits(model)
        wanted = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
        if wanted != self.start:
            found.append(
                f"start: got {self.start}, expected the model's decoder_start_token_id, {wanted}; "
                "let reader_for choose"
            )
        return found

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Tokenise, cut and pad."""
        return {**self.pairs([(r["prompt"], r["answer"]) for r in rows], 0), **origin(rows)}

    def pairs(self, pairs: Sequence[tuple[str, str]], room: int) -> dict[str, Tensor]:
        """Return the batch of (prompt, answer); an encoder's room is its own."""
        written = [[self.start, *self._target(answer)] for _, answer in pairs]
        width = self.answer_length + 1 if self.padding == "max_length" else 0
        labels = [[SILENT, *ids[1:]] for ids in written]
        return {
            **self.asked([prompt for prompt, _ in pairs], 0),
            "decoder_input_ids": padded(written, self.pad, width),
            "decoder_attention_mask": padded([[1] * len(ids) for ids in written], 0, width),
            "labels": padded(labels, SILENT, width),
        }

    def _target(self, text: str) -> list[int]:
        # Models whose texts begin with a token of their own write it as well.
        return [*self.before, *self.ids(text), self.end][: self.answer_length]

    def answer(self, text: str) -> list[int]:
        """Return what the decoder writes for an answer."""
        return self._target(text)

    def asked(self, prompts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Return the prompts' inputs; what the decoder writes takes no room from them."""
        room = self.max_length - len(self.before) - len(self.behind)
        lines = [
            [*self.before, *self.shortened(self.ids(prompt), room), *self.behind]
            for prompt in prompts
        ]
        width = self.width()
        return {
            "input_ids": padded(lines, self.pad, width),
            "attention_mask": padded([[1] * len(line) for line in lines], 0, width),
        }

    def given(self, inputs: Mapping[str, Tensor]) -> int:
        """Return 1, the token that the decoder starts with."""
        return 1

    def fills(self) -> dict[str, int]:
        """Return what stands in the place of tokens that are not there."""
        tokens = {"input_ids": self.pad, "decoder_input_ids": self.pad}
        return {**tokens, "attention_mask": 0, "decoder_attention_mask": 0, "labels": SILENT}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tokens of both sides."""
        return {name: batch[name] for name in self.fills() if name != "labels"}

    def mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return the decoder's real tokens."""
        return batch["decoder_attention_mask"].bool()

    def hidden(self, found: Any) -> list[Tensor]:
        """Return the decoder's states."""
        return list(found.decoder_hidden_states)

    def ranked(
        self, model: nn.Module, batch: Mapping[str, Tensor], memory: dict[str, Any]
    ) -> Tensor:
        """Return the logits of a batch; prompts are encoded once for all labels."""
        inputs: dict[str, Any] = self.inputs(batch)
        if "encoded" in memory:
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=memory["encoded"])
            del inputs["input_ids"]
        found = model(**inputs)
        memory["encoded"] = found.encoder_last_hidden_state
        return self.logits(found)
