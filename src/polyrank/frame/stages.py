"""What the work on a task consists of, and the services of the engine that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from polyrank.frame.block import Block
from polyrank.frame.saved import Saved
from polyrank.frame.slots import Adapter, Group, Layer, Loss


@dataclass(kw_only=True)
class Phase:
    """One Trainer run inside a task: `steps` updates of the roles in `train`.

    0 steps stand for the run's own schedule, or, with `epochs`, for so many passes over the task's
    rows; both at once are refused. `losses` are the terms that count, by name or of the phase's
    own, each of them once, None for all that method and strategies have; `groups` hold exactly what
    trains, None leaves them to the method. `span` = (first, total) places the phase in a
    learning-rate schedule shared by several phases; `carry` maps the old optimiser state to the new
    one; `keep` is "last" or "best" (the best snapshot is put back at the end). `place` = (number,
    of) says which of several phases of the task it is, from 1, for progress; `of` is 0 where nobody
    knows yet. All phases of a task have names of their own, by which their draws are keyed.
    """

    name: str = "train"
    steps: int = 0
    epochs: int = 0
    train: frozenset[str] | None = None
    losses: tuple[str | Loss, ...] | None = None
    groups: list[Group] | None = None
    span: tuple[int, int] | None = None
    carry: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    check_every: int = 0
    keep: str = "last"
    place: tuple[int, int] | None = None


@dataclass(kw_only=True)
class Job:
    """Resumable work outside the Trainer, called until it returns True.

    All it knows is in the saved state.
    """

    name: str
    step: Callable[[Workshop, dict[str, Any]], bool]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A table of numbers that a method shows in the report, drawn as a heat map.

    Attributes:
        name: stem of its file, lower case with dashes.
        rows, columns: what the rows and the columns stand for.
        values: (rows, columns), NaN for what was not measured.
        unit: what the numbers count.
        note: one sentence on how to read it.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    unit: str = ""
    note: str = ""


class Boundary:
    """The state machine of a task, and the only place where shapes or base weights may change.

    No optimiser exists while it runs. `persistent` says that factors keep their meaning from task
    to task, `replicates` that it shows replicas after a task, which end where base weights change.
    """

    persistent: bool = True
    replicates: bool = False

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Prepare a task: append ranks, split, collect prototypes."""

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Phase | Job | None:
        """Return the next piece of work, from `state` alone: a killed run finds its way back."""
        if state.get("trained"):
            return None
        state["trained"] = True
        return Phase()

    def check(self, metrics: dict[str, float], state: dict[str, Any]) -> str:
        """Answer "go" or "stop" to figures measured inside a phase."""
        return "go"

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Close a task: statistics while the factors still live, then structure."""

    def deploys(self, workshop: Workshop) -> dict[str, AbstractContextManager[Any]]:
        """Return what is to be evaluated, each entered around its evaluation."""
        return {"": nullcontext()}

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return adapters to write beside the live one after the last task, by folder name.

        Plain LoRA, as `parts.plain_lora` makes it, or any other adapter in PEFT's layout.
        """
        return {}

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return what the report shows of the method, asked once after the last task.

        `routing` holds what the gates did on the test rows of every task, None without gates:
        "layers" (paths) and "tasks" (names), and by task and layer "load" (share of the tokens that
        chose each rank), "gate" (mean gate of each rank) and "entropy" (of the load).
        """
        return []


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Which samples a strategy asks the engine to keep, and how it wants them back.

    Rows are offered once, at the end of the update that trained on them, and replayed rows never.
    Which ones stay and which ones are drawn is keyed, so that a resumed run sees the same.

    Args:
        capacity: rows kept at most, or if below 1 their share of the stream's training rows.
        by: "stream", a reservoir over all that was offered; "class" or "task", equal parts.
        bytes: limit of what the rows and their stored logits take, 0 for none.
        ratio: replayed rows for every current row of a micro-batch; 0 adds none to batches.
        draws: 2 adds a second independent draw of the same size, under the role "again".
        stores: a part of {"logits"}: what is kept with a row from the forward that trained on it.
        shared: whether the task loss reads replayed rows too, as one batch with the current ones.
    """

    capacity: float = 0.05
    by: str = "stream"
    bytes: int = 0
    ratio: float = 1.0
    draws: int = 1
    stores: frozenset[str] = frozenset()
    shared: bool = True


@runtime_checkable
class Buffer(Protocol):
    """Stored samples of earlier updates."""

    def __len__(self) -> int:
        """Return the number of rows kept."""

    def tasks(self) -> list[int]:
        """Return the numbers of the tasks that have rows here, ascending."""

    def draw(self, count: int, *key: int | str, task: int | None = None) -> dict[str, Tensor]:
        """Return min(count, kept) different rows as one batch, drawn by (seed, key)."""


@runtime_checkable
class Workshop(Protocol):
    """The engine's services to boundaries, rules, losses and penalties.

    Attributes:
        adapter: the adapter as it is now.
        classes: classes of the current task, in the order of the head's rows; empty for text.
        known: number of classes of all earlier tasks: rows 0..known-1 of the head.
        first: whether no task was finished before this one.
    """

    adapter: Adapter
    classes: tuple[int, ...]
    known: int
    first: bool

    def memory(self, name: str) -> dict[str, Any]:
        """Return what an entry of that name keeps from task to task.

        Tensors and plain values, saved with the run.
        """

    def data(
        self, role: str, split: str = "train", *, seed: int | None = None, size: int | None = None
    ) -> Iterable[dict[str, Any]]:
        """Return batches of the current task; with a seed, shuffled by it.

        `size` rows a batch, None for as many as an update reads of one process.
        """

    def observe(
        self,
        batches: Iterable[dict[str, Any]],
        at: str,
        wants: frozenset[str],
        fn: Callable[..., None],
    ) -> dict[str, Any]:
        """Run batches and show `fn` what passes "linear", "block" or "head" places."""

    def grads(self, batch: dict[str, Any], params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return gradients of the task loss of one extra backward, reduced over processes."""

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Return what the model answers in evaluation mode, without gradients."""

    def absorb(
        self,
        *,
        lossy: bool = False,
        archive: bool | str = False,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Add the adapter's update to the base weights and redraw it.

        `lossy` allows a base below fp32; `archive` keeps the ranks, so that a saved adapter also
        fits the original base, "folded" into as few as hold them; `ranks` are the live ones from
        now on, by site path.
        """

    def append(self, name: str, r: int | None = None) -> None:
        """Freeze the live ranks into the bank and give r new ones, None: as many as before."""

    def redraw(self) -> None:
        """Write fresh starting values."""

    def keep(self, layer: Layer, ranks: Tensor) -> None:
        """Keep some live ranks of one layer, in the given order."""

    def reshaped(self) -> AbstractContextManager[list[Block]]:
        """Let the adapter's blocks change inside of the block: parts come, go, or freeze."""

    def saved(self) -> Saved:
        """Return the live adapter as a value, a copy of what would be written to disk now."""

    @property
    def replay(self) -> Buffer:
        """Return the buffer of stored samples: offered at update end, drawn by key."""

    def replica(self, name: str) -> None:
        """Keep a frozen copy of the adapter under a name that `Flow.view` can show."""

    def extend(self, name: str) -> None:
        """Give a replica's head the classes that the live head has gained since."""

    def view(self, name: str) -> AbstractContextManager[Any]:
        """Show "base" or a replica inside the block."""

    def rng(self, name: str) -> torch.Generator:
        """Return the generator keyed by (seed, task, name)."""
