"""A case of the contract: one sample of one method in one tiny model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from polyrank.engine.attachment import attach
from polyrank.errors import ConfigError
from polyrank.frame import Method, get, names
from polyrank.layers import adapt, conditioned, initialise
from polyrank.parts.optimizer import optimizer
from polyrank.testing.models import BATCH, MODELS, Tiny

Condition = Callable[[Method], Tensor]


@dataclass(frozen=True)
class Case:
    """One sample of one method in one tiny model.

    Args:
        method: the sample.
        index: its place among the method's samples.
        tiny: the model.
        condition: what a conditioned method reads, (batch, c); None asks the method itself, with
            made-up task numbers.
    """

    method: Method
    index: int
    tiny: Tiny
    condition: Condition | None = None

    def __str__(self) -> str:
        """Return the test id, smora-2-llama."""
        return f"{self.method.name}-{self.index}-{self.tiny.name}"

    def undropped(self) -> Method:
        """Return the sample without dropout."""
        return replace(self.method, dropout=0.0)

    def build(
        self,
        *,
        method: Method | None = None,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> PeftModel:
        """Return the tiny model with a fresh adapter on all linear layers, in evaluation mode."""
        made = method or self.method
        model = adapt(self.tiny.build(dtype), made, seed=1, **config)
        if (wants := made.starting().wants) - {"weight"}:
            batches = [self.tiny.inputs(seed, dtype) for seed in (7, 8)]
            rate = 1e-2 if "rate" in wants else None
            initialise(model, batches, self._value, rate=rate)
        return model.eval()

    def conditions(self) -> Tensor | None:
        """Return the condition of the batch, or None if the method reads none."""
        if self.condition is not None:
            return self.condition(self.method)
        if not self.method.needs & {"condition", "task_id"}:
            return None
        # Small numbers: every conditioned method knows two tasks, and two types of samples.
        task = torch.arange(BATCH) % 2
        return self.method.condition({"task": task, "condition": task[:, None]})

    def shown(self, model: nn.Module, condition: Tensor | None = None) -> AbstractContextManager:
        """Return a context in which forwards of the model see their condition."""
        found = self.conditions() if condition is None else condition
        return nullcontext() if found is None else conditioned(model, found)

    def answer(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.float32,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Return the model's answer to a batch, without gradients and in its present mode."""
        adapted = isinstance(model, PeftModel)
        batch = self.tiny.inputs(0, dtype)
        if self.tiny.classifies:
            batch.pop("labels")
        with torch.no_grad(), self.shown(model, condition) if adapted else nullcontext():
            return self.tiny.read(model(**batch)).clone()

    def loss(self, model: nn.Module, *, seed: int = 0) -> Tensor:
        """Return the loss of a batch."""
        with self.shown(model):
            return self._value(model, self.tiny.inputs(seed))

    def _value(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if not self.tiny.classifies:
            found: Tensor = model(**batch).loss
            return found
        # Not the model's own loss: it counts the classes of its config, not those of a head.
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.tiny.read(model(**inputs)).float()
        return F.cross_entropy(logits, labels % logits.shape[-1])

    def train(
        self, model: PeftModel, *, steps: int = 2, lr: float = 1e-2, extra: Iterable[Any] = ()
    ) -> None:
        """Train for some updates as a user's own loop does, rules included.

        Args:
            model: the adapted model.
            steps: number of updates.
            lr: rate.
            extra: further parameters, for tests that want to see whether anything else moves.
        """
        made = optimizer(model, lr, weight_decay=0.01)
        others = list(extra)
        second = torch.optim.SGD(others, lr=lr) if others else None
        # What trains here is made up for all methods alike, and stands for a loss of their own.
        attachment = attach(made, model, total=steps, evaluated=True)
        model.train()
        try:
            for step in range(steps):
                self.loss(model, seed=step).backward()
                made.step()
                if second is not None:
                    second.step()
                model.zero_grad(set_to_none=True)
        finally:
            attachment.detach()
            model.eval()

    def file(self) -> str | None:
        """Return the file that defines the method, or None if it comes with polyrank."""
        cls = type(self.method)
        return None if cls.__module__.startswith("polyrank.") else str(Path(inspect.getfile(cls)))


def samples(*methods: str | Method | type[Method]) -> Iterator[tuple[int, Method]]:
    """Yield (index, sample) of methods by name, class or instance; of all if none is given."""
    for entry in methods or names():
        found: Any = get(entry) if isinstance(entry, str) else entry
        if isinstance(found, Method):
            yield 0, found
        elif issubclass(found, Method):
            yield from enumerate(found.samples())


def contract_cases(
    *methods: str | Method | type[Method],
    models: Iterable[str] = tuple(MODELS),
    condition: Condition | None = None,
) -> list[Case]:
    """Return the cases of methods: every sample in every model that it may act in.

    Args:
        *methods: names, classes or instances; none means all registered methods.
        models: names out of `polyrank.testing.MODELS`.
        condition: what a conditioned method reads, (batch of `BATCH`, c), made from the method.

    Raises:
        ConfigError: for a model that is not known.
    """
    wanted = list(models)
    if unknown := sorted(set(wanted) - set(MODELS)):
        raise ConfigError(
            f"models: got {unknown}, expected some of {', '.join(MODELS)}; "
            "leave the argument out for all of them"
        )
    return [
        Case(method, index, MODELS[model], condition)
        for index, method in samples(*methods)
        for model in wanted
        if method.words or not MODELS[model].speaks
    ]
