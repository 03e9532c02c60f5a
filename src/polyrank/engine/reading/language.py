"""Prompts and answers, and plain text, for models that write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig

from polyrank.engine.reading.base import (
    SILENT,
    CrossEntropy,
    Reader,
    Score,
    metric,
    moved,
)
from polyrank.engine.reading.text import (
    length_problems,
    padding_problems,
    padding_token,
    room_problems,
    vocabulary_problems,
)
from polyrank.errors import ConfigError
from polyrank.frame import Loss, Out
from polyrank.streams import Task

CUTS = ("middle", "left")
NAN = float("nan")
_LOGITS = frozenset({"logits"})


class LanguageReader(Reader):
    """What causal and encoder-decoder models share: the loss, and how written text is scored.

    Prompt and answer are tokenised apart, as at a test the model gets the prompt's tokens alone.
    A prompt that is too long is cut in its middle, so that the instruction before a long text and
    the question behind it both stay, or at its left. The answer stays whole unless it has more
    tokens than `answer_length`; then its end is cut, and no end of text follows, as none is there.

    Labels (n, seq) are those of the sequence that the model writes in, logits at t predict labels
    at t + 1, and everything but the answer is `SILENT`.

    Scores of prompts and answers: *unrestricted* compares what the model writes, greedily, with the
    answer. *Restricted*, for rows with labels, takes the label with the largest log p(label, end of
    text | prompt), summed over tokens and not their mean: that is the model's own distribution
    over texts, given that the text is a label of the task, while a mean favours long names. As
    greedy writing need not find the most likely text, restricted can be the lower one.

    Args:
        tokenizer: of transformers, with an end-of-text token.
        max_length: tokens of a sequence at most, >= 4.
        answer_length: tokens of an answer with its end at most; None is half of `max_length`.
        cut: where a prompt is cut, "middle" or "left".
        padding: "longest" row of a batch, or "max_length".

    Raises:
        ConfigError: naming every option out of range.
    """

    growing = False
    offers: ClassVar[frozenset[str]] = frozenset({"logits", "hidden"})
    start: int | None = None

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 512,
        *,
        answer_length: int | None = None,
        cut: str = "middle",
        padding: str = "longest",
    ) -> None:
        problems = [*length_problems(max_length, least=4), *padding_problems(padding)]
        if cut not in CUTS:
            problems.append(f"cut: got {cut!r}, expected {' or '.join(CUTS)}; use 'middle'")
        if answer_length is not None:
            problems += length_problems(answer_length, "answer_length")
            if not problems and answer_length > max_length - 2:
                problems.append(
                    f"answer_length: got {answer_length}, expected <= {max_length - 2}, since a "
                    f"prompt needs room in max_length={max_length}; leave it out for half of it"
                )
        if getattr(tokenizer, "eos_token_id", None) is None:
            problems.append(
                "tokenizer: got none with an end of text, expected eos_token, which ends every "
                "answer; set tokenizer.eos_token"
            )
        if problems:
            raise ConfigError(problems)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut, self.padding = cut, padding
        self.answer_length = answer_length or max_length // 2
        self.pad, self.end = padding_token(tokenizer), int(tokenizer.eos_token_id)

    def loss(self) -> Loss:
        """Return the cross-entropy over the answers' tokens."""
        return CrossEntropy(per="label")

    def misfits(self, model: nn.Module) -> list[str]:
        """Return what says that this is no language model for these tokens."""
        found = vocabulary_problems(model, self.tokenizer) + room_problems(model, self.max_length)
        if not hasattr(_writer(model), "generate"):
            found.append(
                f"model: {type(model).__name__} cannot generate, expected a language model; load "
                "it by AutoModelForCausalLM or AutoModelForSeq2SeqLM"
            )
        return found

    def unfit(self, out: Out, batch: Mapping[str, Tensor]) -> list[str]:
        """Return what is wrong with the answer to a row."""
        shape, rows = tuple(cast("Tensor", out.logits).shape), tuple(batch["labels"].shape)
        if len(shape) == 3 and shape[:2] == rows:
            return []
        return [
            f"gives logits of shape {shape}, expected {rows} and the vocabulary; pass a language "
            "model"
        ]

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that a tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str) -> list[int]:
        """Return an answer's tokens and the end of text, if that is reached."""
        return [*self.ids(text), self.end][: self.answer_length]

    def shortened(self, ids: list[int], room: int) -> list[int]:
        """Return the tokens of a prompt that are kept if there is room for so many, >= 1."""
        if len(ids) <= room:
            return ids
        head = room // 2 if self.cut == "middle" else 0
        return [*ids[:head], *ids[len(ids) - (room - head) :]]

    def width(self) -> int:
        """Return how wide batches are at least."""
        return self.max_length if self.padding == "max_length" else 0

    @torch.no_grad()
    def score(self, model: nn.Module, task: Task, rows: Any, size: int) -> Score:
        """Score a model in evaluation mode by what it writes, or by how likely it finds a text."""
        if "answer" not in rows[0]:
            return self.likelihood(model, rows, size)
        pairs = [(row["prompt"], row["answer"]) for row in (rows[i] for i in range(len(rows)))]
        prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
        # What is longer than all answers and labels is none of them, however it goes on.
        longest = max(len(self.answer(text)) for text in {*answers, *task.labels})
        written, chosen = [], []
        for start in range(0, len(rows), size):
            part = prompts[start : start + size]
            written += self.write(model, part, longest)
            if task.labels:
                chosen += self.choose(model, part, task.labels)
        restricted = metric(task, chosen, answers, prompts) if task.labels else NAN
        found = metric(task, written, answers, prompts)
        return Score(restricted=restricted, unrestricted=found, count=len(rows))

    def likelihood(self, model: nn.Module, rows: Any, size: int) -> Score:
        """Return the mean log-likelihood of a token of the rows' texts, in nats."""
        total, count = 0.0, 0
        for _, batch in self.batches(model, rows, size):
            total += float(self.loss()(self.forward(model, batch, _LOGITS), batch))
            count += int((batch["labels"][:, 1:] != SILENT).sum())
        return Score(restricted=NAN, unrestricted=-total / max(1, count), count=len(rows))

    def write(self, model: nn.Module, prompts: Sequence[str], limit: int) -> list[str]:
        """Return what the model writes after each prompt, greedily, at most `limit` tokens."""
        inputs = moved(model, self.asked(prompts, limit))
        writer = _writer(model)
        with _greedy(writer):
            found = writer.generate(
                **inputs,
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=limit,
                    pad_token_id=self.pad,
                    eos_token_id=self.end,
                    decoder_start_token_id=self.start,
                ),
            )
        new = found[:, self.given(inputs) :].tolist()
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]

    def asked(self, prompts: Sequence[str], limit: int) -> dict[str, Tensor]:
        """Return the prompts' inputs for `generate`, with room for `limit` tokens more."""
        raise NotImplementedError(f"{type(self).__name__} must define asked(prompts, limit)")

    def given(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many tokens that `generate` returns were given to it."""
        raise NotImplementedError(f"{type(self).__name__} must define given(inputs)")

    def choose(self, model: nn.Module, prompts: Sequence[str], labels: Sequence[str]) -> list[str]:
        """Return for each prompt the most likely of the labels; of equal ones the first."""
        # The prompt must be the same beside every label, so that the longest one decides its room.
        room = max(len(self.answer(label)) for label in labels)
        found = torch.zeros(len(prompts), len(labels), dtype=torch.float64)
        memory: dict[str, Any] = {}
        for column, label in enumerate(labels):
            batch = moved(model, self.pairs([(prompt, label) for prompt in prompts], room))
            logits, wanted = self.ranked(model, batch, memory)[:, :-1], batch["labels"][:, 1:]
            asked = wanted != SILENT
            losses = F.cross_entropy(logits[asked].float(), wanted[asked], reduction="none")
            found[:, column].index_add_(0, asked.nonzero()[:, 0].cpu(), -losses.double().cpu())
        return [labels[i] for i in found.argmax(1).tolist()]

    def pairs(self, pairs: Sequence[tuple[str, str]], room: int) -> dict[str, Tensor]:
        """Return the batch of (prompt, answer), as if the answers had `room` tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define pairs(pairs, room)")

    def ranked(
        self, model: nn.Module, batch: Mapping[str, Tensor], memory: dict[str, Any]
    ) -> Tensor:
        """Return the logits of a batch; `memory` is kept from label to label of the same rows."""
        return cast("Tensor", self.forward(model, batch, _LOGITS).logits)


def _writer(model: nn.Module) -> Any:
    """Return the model that can generate, without what PEFT puts around it."""
    bare = getattr(model, "get_base_model", None)
    return model if bare is None else bare()


@contextmanager
def _greedy(writer: Any) -> Iterator[None]:
    """Put a model's own habits of writing aside, such as sampling or penalties on repetition."""
    habits = writer.generation_config
    writer.generation_config = GenerationConfig()
    try:
        yield
    finally:
        writer.generation_config = habits
