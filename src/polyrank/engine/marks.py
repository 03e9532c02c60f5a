"""The scores of one system: both matrices of everything it deploys, validation, general ability."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.frame import Boundary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from polyrank.engine.plan import Plan
    from polyrank.engine.progress import Watch

NAN = float("nan")
Pair = tuple[Tensor, Tensor]


class Marks:
    """What is measured on the way; evaluation leaves modes and generators as they are.

    Args:
        plan: what is run.
        reader: reads and scores rows.
        watch: takes events.
        general: scores a model on the held-out task, or None.

    Attributes:
        matrices: (restricted, unrestricted) by deployed model, the system's own first.
        validation: the same of its own model on the validation rows, if the plan asks for it.
        general: scores on the held-out task, before the first task and after each.
    """

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        watch: Watch,
        general: Callable[[nn.Module], float] | None,
    ) -> None:
        self.plan, self.reader, self.watch, self._general = plan, reader, watch, general
        self.matrices: dict[str, Pair] = {}
        self.validation: Pair | None = None
        self.general: list[float] = []

    def score(
        self,
        model: nn.Module,
        row: int,
        boundaries: Sequence[Boundary],
        workshop: Any,
        where: dict[str, Any],
    ) -> None:
        """Score every task seen by everything that is deployed; fill row `row`."""
        with _undisturbed(model):
            for name, shown in deploys(boundaries, workshop).items():
                with shown:
                    pair = self.matrices.setdefault(name, self._empty())
                    self._fill(model, pair, row, "test")
                    own = name == next(iter(self.matrices))
                    if own and self.plan.validate:
                        self.validation = self.validation or self._empty()
                        self._fill(model, self.validation, row, "validation")
                    if own:
                        self.score_general(model)
                found = {"restricted": pair[0][row].tolist(), "unrestricted": pair[1][row].tolist()}
                extra = {"deploy": name} if name else {}
                self.watch("evaluate", {**where, **extra, **found})

    def score_general(self, model: nn.Module) -> None:
        """Score the held-out task, if the stream has one."""
        if self._general is not None:
            with _undisturbed(model):
                self.general.append(self._general(model))

    def _fill(self, model: nn.Module, pair: Pair, row: int, split: str) -> None:
        size = self.plan.settings.eval_batch_size
        for column in range(row + 1):
            task = self.plan.stream[column]
            found = self.reader.score(model, task, task.data[split], size)
            pair[0][row, column] = found.restricted if self.plan.restricts() else NAN
            pair[1][row, column] = found.unrestricted

    def _empty(self) -> Pair:
        shape = (len(self.plan.stream), len(self.plan.stream))
        made = [torch.full(shape, NAN, dtype=torch.float64) for _ in range(2)]
        return made[0], made[1]

    def state(self) -> dict[str, Any]:
        """Return what a resumed course needs."""
        return {
            "matrices": {name: list(pair) for name, pair in self.matrices.items()},
            "validation": None if self.validation is None else list(self.validation),
            "general": torch.tensor(self.general, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.matrices = {name: (a, b) for name, (a, b) in state["matrices"].items()}
        kept = state["validation"]
        self.validation = None if kept is None else (kept[0], kept[1])
        self.general = state["general"].tolist()


def deploys(boundaries: Sequence[Boundary], workshop: Any) -> dict[str, Any]:
    """Return what is evaluated, by name.

    Raises:
        ConfigError: if two entries of a run say it.
    """
    found: dict[str, Any] = {"": nullcontext()}
    for boundary in boundaries:
        if type(boundary).deploys is not Boundary.deploys:
            if list(found) != [""]:
                raise ConfigError(
                    "deploys: two entries of the run say what is to be evaluated; "
                    "combine one of them with other strategies"
                )
            found = boundary.deploys(workshop)
    return found


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and modes and generators back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        model.train(training)
