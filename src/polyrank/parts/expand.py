"""A task that asks, block by block, whether what is there suffices, and adds what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from polyrank.errors import CheckpointError, ConfigError
from polyrank.frame import (
    Adapter,
    Boundary,
    Figure,
    Group,
    Job,
    Loss,
    Phase,
    Saved,
    Workshop,
    seed_of,
)
from polyrank.parts.branches import Expandable
from polyrank.parts.describe import RD, Reconstruction, branches_of

FUNC, HEAD = "func", "head"
NAN = float("nan")
Groups = Callable[[Adapter, frozenset[str]], list[Group]]


def groups_of(
    adapter: Adapter, roles: frozenset[str], rate: float, given: dict[str, Any]
) -> list[Group]:
    """Return one group for what trains of some roles, and one for descriptors at another rate.

    Args:
        adapter: whose parameters.
        roles: which of them.
        rate: of descriptors, times the run's.
        given: what both groups have.
    """
    found = {role: params for role, params in adapter.roles().items() if role in roles}
    own = found.pop("descriptor", [])
    rest = [p for role in sorted(found) for p in found[role]]
    groups = [Group(params=rest, **given), Group(params=own, lr=rate, **given)]
    return [group for group in groups if group.params]


class Detect:
    """Looks at one batch a call; all it knows is in the state.

    Args:
        tau: S above which a block gets an adapter.
        size: rows of a batch.
        least: rows that a last, incomplete batch must have to count; 0 leaves it out.
        signed: whether unusually low errors do not count.
        ordered: whether each block looks at all rows before the next deeper one does.
    """

    def __init__(self, tau: float, size: int, least: int, *, signed: bool, ordered: bool) -> None:
        self.tau, self.size, self.least = tau, size, least
        self.signed, self.ordered = signed, ordered
        # Where `rows` stands, and of which batch `errors` are; both can be made again.
        self.place = self.scored = (-1, -1)
        self.rows: Iterator[dict[str, Any]] = iter(())
        self.errors: dict[str, Tensor] = {}

    def __call__(self, workshop: Workshop, state: dict[str, Any]) -> bool:
        """Look at the next batch; return whether something else is to be done now."""
        blocks = branches_of(workshop.adapter, growing=True)
        if any(block.live for block in blocks):
            with workshop.reshaped():
                for block in blocks:
                    block.freeze()
        asked = self._asked(blocks, state)
        batch = self._batch(workshop, state) if asked else None
        if batch is None:
            return self._ended(blocks, state)
        state["batch"] += 1
        for number in asked:
            score = self._score(workshop, batch, blocks[number])
            state["scores"][number] = max(state["scores"][number], score)
            if score > self.tau:
                return self._expand(workshop, blocks, number, state)
        return False

    def _asked(self, blocks: list[Expandable], state: dict[str, Any]) -> list[int]:
        """Return the numbers of the blocks that may still grow, those in turn."""
        if self.ordered:
            turn = state["pass"]
            return [turn] if turn < len(blocks) and turn not in state["expanded"] else []
        return [n for n in range(len(blocks)) if n not in state["expanded"]]

    def _batch(self, workshop: Workshop, state: dict[str, Any]) -> dict[str, Any] | None:
        """Return the batch at the cursor, or None at the end of a pass.

        Raises:
            ConfigError: if not even one batch is left to look at.
        """
        place = (state["pass"], state["batch"])
        if place != self.place:
            seed = seed_of(workshop.rng("detect").initial_seed(), place[0])
            self.rows = iter(workshop.data("train", seed=seed, size=self.size))
            for _ in range(place[1]):
                next(self.rows, None)
        self.place = (place[0], place[1] + 1)
        batch = next(self.rows, None)
        count = 0 if batch is None else len(batch["labels"])
        if count < self.size and (not self.least or count < self.least):
            batch = None
        if batch is None and not state["batch"]:
            raise ConfigError(
                f"detection: got {count} rows, expected at least one batch of {self.size}; lower "
                "detect_batch, or set detect_least"
            )
        return batch

    def _score(self, workshop: Workshop, batch: dict[str, Any], block: Expandable) -> float:
        """Return S of one block on a batch; the forward that it needs is made once a batch."""
        if self.place != self.scored:
            for other in (found := branches_of(workshop.adapter, growing=True)):
                other.watched = True
            try:
                workshop.logits(batch)
                self.errors = {other.path: other.left.pop("errors") for other in found}
            finally:
                for other in found:
                    other.watched = False
            self.scored = self.place
        return block.score(self.errors[block.path], signed=self.signed)

    def _ended(self, blocks: list[Expandable], state: dict[str, Any]) -> bool:
        """Choose what follows a pass."""
        again = state["grown"] and len(state["expanded"]) < len(blocks)
        if again or (self.ordered and state["pass"] + 1 < len(blocks)):
            state.update({"pass": state["pass"] + 1, "batch": 0, "grown": False})
        else:
            state["stage"] = "end" if state["expanded"] else HEAD
        return True

    def _expand(
        self, workshop: Workshop, blocks: list[Expandable], number: int, state: dict[str, Any]
    ) -> bool:
        with workshop.reshaped():
            blocks[number].expand(workshop.rng(f"expand-{blocks[number].path}"))
        state["expanded"] = [*state["expanded"], number]
        state.update(stage=FUNC, grown=True)
        return True


class Expand(Boundary):
    """Task 1: func → rd. Later ones: look → func → rd → look …, or the head alone.

    Args:
        name: of the method, for the record.
        detect: looks for what is unusual.
        groups: makes the optimiser's groups of what some roles train.
        rd_epochs: passes of phases that train descriptors, 0 for the run's.
    """

    persistent = False

    def __init__(self, name: str, detect: Detect, groups: Groups, rd_epochs: int) -> None:
        self.name, self.detect, self.groups, self.rd_epochs = name, detect, groups, rd_epochs

    def start(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Check that the model can go on.

        Raises:
            ConfigError: without a head that grows, or if the last task was not finished.
            CheckpointError: if the statistics are gone.
        """
        if workshop.adapter.head is None:
            raise ConfigError(
                f"{self.name}: got a model whose answers are words, expected a classifier that "
                "grows; a mean over tokens would tell early ones what comes later"
            )
        blocks = branches_of(workshop.adapter, growing=True)
        if bare := [block.path for block in blocks if not block.described]:
            raise CheckpointError(
                f"{self.name}: got blocks without statistics ({bare[0]} is the first), expected "
                "descriptors and what is usual for them; load the whole adapter to go on, this "
                "one answers only"
            )
        if not workshop.first and any(block.live for block in blocks):
            raise ConfigError(
                f"{self.name}: got a task that follows one that was not finished, expected frozen "
                "adapters; finish it first, nothing is known about its rows"
            )
        state.update({"pass": 0, "batch": 0, "grown": False, "expanded": []})
        state["scores"] = [-float("inf")] * len(blocks)
        state["stage"] = FUNC if workshop.first else "look"

    def next(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> Phase | Job | None:
        """Return what the stage asks for."""
        stage = state["stage"]
        if stage == "look":
            return Job(name="detect", step=self.detect)
        number = len(state["expanded"]) or 1
        if stage == FUNC:
            state["stage"] = RD
            return self._phase(workshop, FUNC, number, {"side", "router", "head"}, None)
        if stage == RD:
            state["stage"] = "end" if workshop.first else "look"
            own = (Reconstruction(),)
            return self._phase(workshop, RD, number, {"descriptor"}, own, self.rd_epochs)
        if stage == HEAD:
            state["stage"] = "end"
            return self._phase(workshop, HEAD, number, {"head"}, None)
        return None

    def _phase(
        self,
        workshop: Workshop,
        name: str,
        number: int,
        roles: set[str],
        losses: tuple[Loss, ...] | None,
        epochs: int = 0,
    ) -> Phase:
        adapter = workshop.adapter
        train = frozenset(roles & adapter.roles().keys())
        return Phase(
            name=f"{name}-{number}",
            epochs=epochs,
            train=train,
            losses=losses,
            groups=self.groups(adapter, train),
            place=(2 * number - (name != RD), 2 if workshop.first else 0),
        )

    def finish(self, task: Any, workshop: Workshop, state: dict[str, Any]) -> None:
        """Freeze all but the head, and note what there is."""
        blocks = branches_of(workshop.adapter)
        with workshop.reshaped():
            for block in blocks:
                block.freeze()
        noted = workshop.memory(self.name)
        kept = {
            "tasks": getattr(task, "name", str(len(noted.get("tasks", ())))),
            "adapters": [block.count for block in blocks],
            "scores": [None if s == -float("inf") else s for s in state["scores"]],
            "passes": state["pass"] + (not workshop.first),
        }
        for key, value in kept.items():
            noted[key] = [*noted.get(key, ()), value]

    def exports(self, workshop: Workshop) -> dict[str, Saved]:
        """Return what answers without descriptors and statistics, which are most of the weights."""
        saved = workshop.saved()
        tensors = {
            key: value
            for key, value in saved.tensors.items()
            if not any(part.endswith(("descriptor", "window")) for part in key.split("."))
        }
        sites = {
            place: {"block": {**entry["block"], "described": False}}
            if "described" in entry.get("block", {})
            else entry
            for place, entry in saved.config["sites"].items()
        }
        return {"answers": Saved(tensors=tensors, config={**saved.config, "sites": sites})}

    def figures(self, workshop: Workshop, routing: dict[str, Any] | None) -> list[Figure]:
        """Return how many adapters there are, and how unusual each task was."""
        noted = workshop.memory(self.name)
        tasks = tuple(noted.get("tasks", ()))
        if not tasks:
            return []
        blocks = branches_of(workshop.adapter)
        paths = tuple(block.path for block in blocks)
        grow = tuple(block.path for block in blocks if block.growing)
        counts = noted["adapters"]
        total, most = sum(counts[-1]), len(paths) + (len(tasks) - 1) * len(grow)
        found = [
            Figure(
                name="adapters",
                title="Adapters by block and task",
                rows=paths,
                columns=tasks,
                values=tuple(tuple(float(n) for n in row) for row in zip(*counts, strict=True)),
                unit="adapters",
                note=f"Adapters of a block (row) after a task (column): {total} in the end, where "
                f"one for every task in every block that may grow would make {most}.",
            )
        ]
        if len(tasks) > 1:
            scores = [[NAN if s is None else s for s in row] for row in noted["scores"]]
            found.append(
                Figure(
                    name="expansion",
                    title="How unusual a task was",
                    rows=grow,
                    columns=tasks,
                    values=tuple(tuple(map(float, row)) for row in zip(*scores, strict=True)),
                    unit="S",
                    note="Highest score S of a block (row) on batches of a task (column); above "
                    f"{self.detect.tau:g} an adapter was added. A first task has none.",
                )
            )
        return found
