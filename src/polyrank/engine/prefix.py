"""A reader that computes the frozen first blocks of a model once a row, and never again.

What a run computes is, bit for bit, that of a run without. Kept states are those of a row in a
batch of fixed size, in evaluation mode, and an ordinary forward can give others for two reasons.
Where a row stands in its batch matters at the ends of vector loops: see `prefix_tails`. How many
rows there are decides which kernels run: of MKL's fp32 products, where a thread gets fewer than
four of the rows times tokens; of other devices nothing is assumed. The first is known beforehand.
As to the second, the first forward of every kind (rows, mode, threads, precision, what the blocks
get beside states) runs in full and is compared bit by bit. Batches that may differ run in full for
ever, with a warning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyrank.engine.prefix_find import Mark, Prefix, content_of, prefix_of, same_bits, unwrapped
from polyrank.engine.prefix_serve import Forward, Relay, Seen, watched
from polyrank.engine.prefix_store import (
    DTYPES,
    Shape,
    States,
    in_memory,
    on_disk,
    row_digests,
    row_shapes,
)
from polyrank.engine.prefix_tails import VECTOR, Tails
from polyrank.engine.reading import Reader
from polyrank.engine.reading.base import moved, undisturbed
from polyrank.errors import ConfigError, RunError
from polyrank.frame import Out
from polyrank.io import environment
from polyrank.streams import Dataset, OnePass

_log = logging.getLogger(__name__)

_LOGITS = frozenset({"logits"})
_NONE = (
    "the model has no single stack of transformer blocks of which the first ones, and all that "
    "stands before them, are frozen"
)


class _Unfit(Exception):
    """Says why nothing can be kept."""


class _Held(NamedTuple):
    """What is kept, and what it belongs to."""

    prefix: Prefix
    mark: Mark
    relay: Relay
    states: States


@dataclass
class _Cache:
    """What a `PrefixReader` knows; copies of the reader share it."""

    model: nn.Module
    memory: int
    limit: int
    folder: Path | None
    reason: str = "nothing was kept yet; call prefill"
    hits: int = 0
    misses: int = 0
    seconds: float = 0.0
    held: _Held | None = None
    told: set[Any] = field(default_factory=set)

    def drop(self, reason: str) -> None:
        """Forget all states, and say so."""
        self.held, self.reason = None, reason
        _log.warning("prefix: %s; its states are dropped, and all blocks run again", reason)


class PrefixReader(Reader):
    """A reader whose forwards take the frozen prefix of one model from what was kept.

    It is an instance of the class of the reader it is made of, and has its attributes: only
    `forward` differs. `prefill` fills it; until then, and where nothing can be kept, it is that
    reader.

    A forward takes kept states if every row is known by its content, the prefix is what it was, and
    hidden states are not asked for. Before each forward the prefix is looked at: its modules, its
    tensors (identity, version counter, some values of each), its dropout and its hooks. After a
    change all states are dropped with a warning; `prefill` may be called again.

    Args:
        reader: whose rows they are.
        model: the adapted model; forwards of other models run in full.
        memory: bytes that may be kept in memory; more than that goes into a file.
        limit: bytes that may be kept at all, and that all such files may take together.
        folder: of the files, `polyrank.io.cache.cache_folder()` if left out.

    Raises:
        ConfigError: if `memory` or `limit` is negative.
    """

    def __new__(cls, reader: Reader | None = None, *args: Any, **kwargs: Any) -> PrefixReader:
        """Return an object that runs the reader's own code: its scores come through `forward`."""
        kind = cls if reader is None else type(cls.__name__, (cls, type(reader)), {})
        return super().__new__(kind)

    def __init__(
        self,
        reader: Reader,
        model: nn.Module,
        *,
        memory: int = 2**30,
        limit: int = 2**33,
        folder: str | Path | None = None,
    ) -> None:
        if problems := [
            f"{name}: got {value}, expected bytes >= 0; use 0 to keep nothing there"
            for name, value in (("memory", memory), ("limit", limit))
            if value < 0
        ]:
            raise ConfigError(problems)
        self.__dict__.update(vars(reader))
        place = None if folder is None else Path(folder)
        self._cache = _Cache(unwrapped(model), memory, limit, place)

    @property
    def reason(self) -> str:
        """Why nothing is kept; empty if something is."""
        return self._cache.reason

    @property
    def hits(self) -> int:
        """Rows whose prefix did not run."""
        return self._cache.hits

    @property
    def misses(self) -> int:
        """Rows that ran in full though states are kept: see the class for when they do."""
        return self._cache.misses

    @property
    def kept(self) -> dict[str, Any]:
        """What is kept, for a record: rows, bytes, where, and the seconds that `prefill` took."""
        held, seconds = self._cache.held, self._cache.seconds
        if held is None:
            return {"rows": 0, "bytes": 0, "place": "", "seconds": seconds}
        shape, place = held.states.shape, held.states.place
        return {"rows": shape.count, "bytes": shape.bytes, "place": place, "seconds": seconds}

    # --- before training -------------------------------------------------------------------------

    def prefill(self, datasets: Iterable[Dataset], size: int = 64) -> PrefixReader:
        """Compute the prefix of all rows of some datasets, or read what another run has kept.

        Args:
            datasets: rows that will be seen; equal ones are kept once. Rows of an online stream are
                not counted as read.
            size: rows a forward. Of all sizes, batches of this one surely get the same bits.

        Returns:
            This reader; if nothing can be kept, its `reason` says why.

        Raises:
            ConfigError: if `size` is below 1.
        """
        if size < 1:
            raise ConfigError(f"size: got {size}, expected rows >= 1; 64 is common")
        cache, started = self._cache, time.perf_counter()
        cache.held, cache.hits, cache.misses, cache.told = None, 0, 0, set()
        prefix = prefix_of(cache.model)
        cache.reason = _NONE if prefix is None else prefix.reason
        try:
            if prefix is not None and not cache.reason:
                rows = [d.inner if isinstance(d, OnePass) else d for d in datasets]
                with undisturbed(cache.model):
                    cache.held = self._held(prefix, rows, size)
        except _Unfit as unfit:
            cache.reason = str(unfit)
        except (OSError, RunError) as error:
            cache.reason = f"the file could not be written ({error})"
            _log.warning("prefix: %s; all blocks run in every forward", cache.reason)
        cache.seconds = time.perf_counter() - started
        if cache.held is None:
            _log.info("prefix: not kept, because %s", cache.reason)
        return self

    def _held(self, prefix: Prefix, datasets: Sequence[Dataset], size: int) -> _Held:
        cache = self._cache
        rows = self._rows(datasets, size)
        digests = list(rows)
        first = digests[:size]
        batch = self._batch([rows[digest] for digest in first], first)
        tails = Tails(len(first))
        seen = self._watch(prefix, batch, tails=tails)
        found = seen.states
        if not isinstance(found, Tensor) or len(found) != len(first) or found.dtype not in DTYPES:
            raise _Unfit("the blocks get no floating states with one entry a row")
        prefix.extend(seen.called)
        if prefix.reason:
            raise _Unfit(prefix.reason)
        shape = Shape(len(digests), tuple(found.shape[1:]), found.dtype)
        if shape.bytes > cache.limit:
            raise _Unfit(f"{shape.bytes} bytes are needed, and the limit is {cache.limit}")
        relay = self._relay(prefix, batch, seen, tails)
        # Rows at the end of an uneven batch would have other bits than in the middle of it.
        even = next((n for n in range(size, size + VECTOR) if relay.even(n)), None)
        if even is None:
            raise _Unfit(f"no batch of about {size} rows is shared out evenly over the threads")
        self._check_alone(prefix, rows, even)

        def parts() -> Iterator[Tensor]:
            return self._parts(prefix, rows, even)

        mark = Mark(prefix.look())
        if shape.bytes <= cache.memory:
            states = in_memory(digests, shape, parts())
        else:
            key = {**content_of(prefix, mark), **_circumstances(found.device), "size": even}
            states = on_disk(digests, shape, parts, key, cache.folder, cache.limit)
        return _Held(prefix, mark, relay, states)

    def _rows(self, datasets: Sequence[Dataset], size: int) -> dict[bytes, Any]:
        """Return one row of each content by its digest, as (dataset, number)."""
        found: dict[bytes, Any] = {}
        shapes = set()
        for rows in datasets:
            for start in range(0, len(rows), size):
                part = range(start, min(start + size, len(rows)))
                inputs = self.inputs(self.collate([rows[i] for i in part]))
                digests = row_digests(inputs)
                if digests is None or len(digests) != len(part):
                    raise _Unfit("the model's inputs are not one entry a row")
                shapes.add(row_shapes(inputs))
                for number, digest in zip(part, digests, strict=True):
                    found.setdefault(digest, (rows, number))
        if not found:
            raise _Unfit("there are no rows")
        if len(shapes) > 1:
            raise _Unfit(
                f"rows have {len(shapes)} shapes, such as lengths; pad them to one of them"
            )
        return found

    def _batch(self, places: Sequence[Any], digests: Sequence[bytes]) -> dict[str, Tensor]:
        batch = self.collate([rows[number] for rows, number in places])
        if row_digests(self.inputs(batch)) != list(digests):
            raise _Unfit("rows change from one reading to the next, as augmented ones do")
        return moved(self._cache.model, batch)

    def _watch(self, prefix: Prefix, batch: Mapping[str, Tensor], **options: Any) -> Seen:
        with watched(prefix, **options) as seen:
            super().forward(prefix.model, batch, _LOGITS)
        return seen

    def _relay(
        self, prefix: Prefix, batch: Mapping[str, Tensor], seen: Seen, tails: Tails
    ) -> Relay:
        """Return what replaces the prefix, tried on one batch: all else must be as it was."""
        try:
            relay = Relay(prefix, seen, tails.loops)
        except ValueError as error:
            raise _Unfit(str(error)) from error
        with relay.served(seen.states, trusted=True):
            again = self._watch(prefix, batch)
        if not same_bits((again.entry, again.end), (seen.entry, seen.end)):
            raise _Unfit("what follows the prefix reads more of it than its states")
        return relay

    def _check_alone(self, prefix: Prefix, rows: Mapping[bytes, Any], size: int) -> None:
        """Refuse a prefix whose states of a row depend on the rows beside it."""
        one = [i % len(rows) for i in range(size)]
        # Half of the rows are others, and the order is another.
        two = [(size // 2 + i) % len(rows) for i in reversed(range(size))]
        both = [(one.index(number), place) for place, number in enumerate(two) if number in one]
        here, there = map(list, zip(*both, strict=True))
        first, second = (self._states(prefix, rows, numbers) for numbers in (one, two))
        if not same_bits(first[here], second[there]):
            raise _Unfit("states of a row depend on the rows beside it")

    def _states(self, prefix: Prefix, rows: Mapping[bytes, Any], numbers: Sequence[int]) -> Tensor:
        digests, places = list(rows), list(rows.values())
        batch = self._batch([places[i] for i in numbers], [digests[i] for i in numbers])
        return self._watch(prefix, batch, short=True).states

    def _parts(self, prefix: Prefix, rows: Mapping[bytes, Any], size: int) -> Iterator[Tensor]:
        """Yield states in order, all computed in batches of one size."""
        for start in range(0, len(rows), size):
            # The last batch is filled up with the first rows.
            numbers = [i % len(rows) for i in range(start, start + size)]
            yield self._states(prefix, rows, numbers)[: len(rows) - start]

    # --- every forward ---------------------------------------------------------------------------

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor], wants: frozenset[str]) -> Out:
        """Run the model once, without the prefix where its states are kept."""
        held = self._cache.held
        if held is None or unwrapped(model) is not self._cache.model:
            return super().forward(model, batch, wants)
        states = None
        if "hidden" not in wants and self._fresh(held):
            digests = row_digests(self.inputs(batch))
            states = None if digests is None else held.states.take(digests)
        if states is None or not self._even(held, len(states)):
            self._cache.misses += len(batch["labels"])
            return super().forward(model, batch, wants)
        device = next(model.parameters()).device
        with held.relay.served(states.to(device)) as forward:
            out = super().forward(model, batch, wants)
        self._count(held, forward, len(states))
        return out

    def _fresh(self, held: _Held) -> bool:
        """Say whether the prefix is what it was, and drop all states if not."""
        try:
            look = held.prefix.look()
            if look.busy():
                # Who listens shall hear it now, and need not stay.
                return False
            problem = look.problem()
            if not problem and not held.mark.of(look):
                problem = "weights or modules below the first adapted block have changed"
        except (AttributeError, IndexError) as error:
            problem = f"a module below the first adapted block is gone ({error})"
        if problem:
            self._cache.drop(problem)
        return not problem

    def _even(self, held: _Held, rows: int) -> bool:
        if held.relay.even(rows):
            return True
        self._tell(("even", rows), rows)
        return False

    def _count(self, held: _Held, forward: Forward, rows: int) -> None:
        if not forward.full:
            self._cache.hits += rows
            return
        self._cache.misses += rows
        if not held.relay.exact.get(forward.kind, True):
            self._tell(forward.kind, rows)

    def _tell(self, kind: Any, rows: int) -> None:
        if kind not in self._cache.told:
            self._cache.told.add(kind)
            _log.warning(
                "prefix: a batch of %d rows has, or may have, other bits here than those that are "
                "kept, and runs in full; choose batches of a multiple of 8 rows, and call prefill "
                "with their size and in the precision of training",
                rows,
            )


def _circumstances(device: torch.device) -> dict[str, Any]:
    """Return what decides the bits beside weights and inputs."""
    found = environment.hardware()
    return {
        **environment.versions(("torch", "transformers")),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": found["processor"],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
