"""The contract of a reader: what the engine needs to know about rows and their model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Loss, Out
from polyrank.layers import HeadHost
from polyrank.metrics.scores import score
from polyrank.streams import OnePass, Stream, Task

# Columns that say where a row comes from; they never reach the model.
ORIGIN = ("task", "row", "role")
# Labels that stand for nothing to be predicted.
SILENT = -100
_LOGITS = frozenset({"logits"})


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one task's rows scored; NaN where a view has no meaning.

    Attributes:
        restricted: among the task's own classes.
        unrestricted: among all classes seen, or of the text as it stands.
        count: rows scored.
    """

    restricted: float
    unrestricted: float
    count: int


class CrossEntropy(Loss):
    """−log softmax(z)_y, summed over the rows, or over every token that has a label.

    Args:
        per: "sample" for one class a row, over all classes seen so far; "label" for tokens, where
            logits (n, seq, vocabulary) at t predict labels (n, seq) at t + 1.
    """

    needs = _LOGITS

    def __init__(self, per: str = "sample") -> None:
        self.per = per

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum; labels are class or token numbers, `SILENT` where nothing is asked."""
        assert out.logits is not None
        logits, labels = out.logits, batch["labels"]
        if self.per == "label":
            logits, labels = logits[:, :-1], labels[:, 1:]
            # Most tokens of a prompt have no label: only the others are widened to fp32.
            asked = labels != SILENT
            logits, labels = logits[asked], labels[asked]
        return F.cross_entropy(logits.float(), labels, reduction="sum")


class Reader:
    """How rows of a stream become batches, what the model makes of them, how that is scored.

    One reader serves all tasks of a run, and it is made before anything is trained. What it learns
    in `see` follows from the stream and the tasks begun alone, and is never changed in place, so
    that `copy.copy` of an untouched reader serves another system.

    Class facts:
        kinds: the kinds of tasks it reads.
        growing: whether the model has a classifier that grows with the classes.
        outputs: rows of a head that does not grow, such as ("value",) of a regression.
        offers: the part of {"logits", "hidden", "embedding"} that `forward` can give; "texts" as
            well if columns of logits are texts, which look for their rows.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    growing: ClassVar[bool] = True
    outputs: ClassVar[tuple[str, ...]] = ()
    offers: ClassVar[frozenset[str]] = frozenset({"logits", "hidden", "embedding"})

    def problems(self, model: nn.Module, stream: Stream) -> list[str]:
        """Return what says that this model cannot read these rows: what, got, expected, remedy.

        One row of every task is made into a batch, and the first of them goes through the model
        twice in one batch; neither random generators nor the modes of the model change.
        """
        found = [
            f"stream: task {task.name!r} is of kind {task.kind}, expected "
            f"{' or '.join(sorted(self.kinds))} for {type(self).__name__}; let reader_for choose"
            for task in stream
            if task.kind not in (None, *self.kinds)
        ]
        return found or self._tried(model, stream)

    def misfits(self, model: nn.Module) -> list[str]:
        """Return what the model's configuration says against it, before a row is tried."""
        return []

    def unfit(self, out: Out, batch: Mapping[str, Tensor]) -> list[str]:
        """Return what is wrong with the answer to a row."""
        shape = tuple(cast("Tensor", out.logits).shape)
        if len(shape) == 2:
            return []
        return [f"gives logits of shape {shape}, expected (rows, classes); pass a classifier"]

    def _tried(self, model: nn.Module, stream: Stream) -> list[str]:
        trial = None
        problems = self.misfits(model)
        for task in stream:
            rows: Any = next(iter(task.data.values()))
            # A row of an online stream may be read once, and this look is none of its readings.
            row = (rows.inner if isinstance(rows, OnePass) else rows)[0]
            try:
                batch = self.collate([row, row])
            except (ConfigError, KeyError, TypeError, ValueError) as error:
                problems += [f"stream: task {task.name!r}: {line}" for line in _lines(error)]
                continue
            if trial is None:
                trial = task, batch
        if trial is None or problems:
            return problems
        return self._forwarded(model, *trial)

    def _forwarded(self, model: nn.Module, task: Task, batch: dict[str, Tensor]) -> list[str]:
        who = f"model: {type(model).__name__}"
        try:
            with undisturbed(model):
                out = self.forward(model, moved(model, batch), _LOGITS)
                return [f"{who} {problem}" for problem in self.unfit(out, batch)]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            shapes = {k: tuple(v.shape) for k, v in batch.items() if k not in (*ORIGIN, "labels")}
            return [
                f"{who} does not take rows of task {task.name!r}, got {shapes} "
                f"({' '.join(_lines(error))}); pass a model made for {' or '.join(self.kinds)}"
            ]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return one batch: "labels", the model's inputs, and the columns of `ORIGIN` as int64.

        Every column has one entry a row, so that rows can be picked by number.
        """
        raise NotImplementedError(f"{type(self).__name__} must define collate(rows)")

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what `model(**inputs)` takes."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs(batch)")

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], wants: frozenset[str]) -> Out:
        """Run the model once; `wants` is a part of `offers`.

        Raises:
            ConfigError: for wishes that are not offered.
        """
        if unserved := sorted(wants - self.offers):
            raise ConfigError(
                f"forward: got a wish for {unserved}, but {type(self).__name__} offers "
                f"{sorted(self.offers)}; choose a loss that needs nothing else"
            )
        inputs = self.inputs(batch)
        if "hidden" in wants:
            inputs["output_hidden_states"] = cast("Any", True)
        embedding: list[Tensor] = []
        handle = None
        if "embedding" in wants:
            host = next((m for m in model.modules() if isinstance(m, HeadHost)), None)
            if host is not None:
                handle = host.register_forward_pre_hook(lambda m, args: embedding.append(args[0]))
        try:
            found = model(**inputs)
        finally:
            if handle is not None:
                handle.remove()
        return Out(
            logits=self.logits(found),
            hidden=self.hidden(found) if "hidden" in wants else [],
            embedding=self.embedding(found, embedding, batch) if "embedding" in wants else None,
            mask=self.mask(batch),
        )

    def logits(self, found: Any) -> Tensor:
        """Return the logits of a model's output."""
        return cast("Tensor", found.logits)

    def hidden(self, found: Any) -> list[Tensor]:
        """Return the states of a model's output, which `mask` speaks about."""
        return list(found.hidden_states)

    def embedding(self, found: Any, seen: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the classifier reads, (n, d); `seen` are the inputs of a growing head.

        Raises:
            ConfigError: if the model has no such head.
        """
        if not seen:
            raise ConfigError(
                "forward: an embedding was asked for, but the model has no growing head; make it "
                'with polyrank.adapt(model, method, head="classifier")'
            )
        return seen[0]

    def mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return (n, seq) bool of the real tokens of `hidden`, or None if all are."""
        found = batch.get("attention_mask")
        return None if found is None else found.bool()

    def see(self, task: Task) -> None:
        """Learn that a task has begun; every task is shown once, in order."""

    def fills(self) -> dict[str, int]:
        """Return the columns whose width depends on the batch, and what fills them up."""
        return {}

    def join(self, batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the rows of several batches with equal columns as one.

        Raises:
            ConfigError: if their columns differ, or widths of columns that cannot be filled up.
        """
        return reduce(lambda a, b: merge_batches(a, b, self.fills()), batches)

    def loss(self) -> Loss:
        """Return the loss of the tasks."""
        return CrossEntropy()

    @torch.no_grad()
    def score(self, model: nn.Module, task: Task, rows: Any, size: int) -> Score:
        """Score a model in evaluation mode on one task's rows, `size` rows a forward."""
        logits, labels = [], []
        for _, batch in self.batches(model, rows, size):
            out = self.forward(model, batch, _LOGITS)
            logits.append(cast("Tensor", out.logits).float().cpu())
            labels += batch["labels"].tolist()
        return class_score(task, torch.cat(logits), labels)

    def batches(
        self, model: nn.Module, rows: Any, size: int
    ) -> Iterator[tuple[list[Mapping[str, Any]], dict[str, Tensor]]]:
        """Yield rows in their order, and the batches they become, on the model's device."""
        for start in range(0, len(rows), size):
            part = [rows[i] for i in range(start, min(start + size, len(rows)))]
            yield part, moved(model, self.collate(part))


def class_score(task: Task, logits: Tensor, labels: Sequence[int]) -> Score:
    """Return how well logits (n, classes seen) name the class numbers, by the task's metric."""
    own = torch.tensor(task.classes)
    return Score(
        restricted=metric(task, own[logits[:, own].argmax(-1)].tolist(), labels),
        unrestricted=metric(task, logits.argmax(-1).tolist(), labels),
        count=len(labels),
    )


def metric(
    task: Task,
    predictions: Sequence[Any],
    references: Sequence[Any],
    sources: Sequence[str] | None = None,
) -> float:
    """Return the score that a task names of predictions; `sources` are the texts they answer."""
    origins = sources if task.metric == "sari" else None
    return score(task.metric, predictions, references, origins)


def moved(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch on the model's device."""
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients; leave modes and generators as they are."""
    modes = {module: module.training for module in model.modules()}
    state, legacy = random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)
        for module, mode in modes.items():
            module.training = mode


def origin(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return where rows come from, (n,) int64 by column; those that no row has are left out."""
    return {
        name: torch.tensor([int(row[name]) for row in rows], dtype=torch.int64)
        for name in ORIGIN
        if name in rows[0]
    }


def padded(
    lines: Sequence[Sequence[int]], fill: int, width: int = 0, *, left: bool = False
) -> Tensor:
    """Return lists of numbers as (n, width) int64; the longest one decides if it is wider."""
    width = max(width, *map(len, lines))
    made = torch.full((len(lines), width), fill, dtype=torch.int64)
    for target, line in zip(made, lines, strict=True):
        part = target[width - len(line) :] if left else target[: len(line)]
        part.copy_(torch.tensor(line, dtype=torch.int64))
    return made


def merge_batches(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    fills: Mapping[str, int] | None = None,
    *,
    left: bool = False,
) -> dict[str, Tensor]:
    """Return the rows of two batches of one reader as one.

    Args:
        a: the first rows.
        b: the rows that follow.
        fills: columns (n, seq) that may differ in width, each with what fills the narrower up.
        left: whether they are padded on their left.

    Raises:
        ConfigError: if their columns differ, or widths of columns that cannot be filled up.
    """
    fills = fills or {}
    if a.keys() != b.keys():
        raise ConfigError(
            f"batches: got columns {sorted(a)} beside {sorted(b)}, expected equal ones; give rows "
            "of both the same columns"
        )
    made = {}
    for name in a:
        pair = [a[name], b[name]]
        if name in fills:
            width = max(part.shape[1] for part in pair)
            pair = [_widened(part, width, fills[name], left) for part in pair]
        if pair[0].shape[1:] != pair[1].shape[1:]:
            shapes = " beside ".join(str(tuple(part.shape[1:])) for part in pair)
            raise ConfigError(
                f"batches: column {name!r}: got rows of shape {shapes}, expected equal ones; "
                "let one reader make both"
            )
        made[name] = torch.cat(pair)
    return made


def _widened(part: Tensor, width: int, fill: int, left: bool) -> Tensor:
    lack = width - part.shape[1]
    return F.pad(part, (lack, 0) if left else (0, lack), value=fill)


def _lines(error: Exception) -> list[str]:
    if isinstance(error, ConfigError):
        return error.problems
    return [f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
