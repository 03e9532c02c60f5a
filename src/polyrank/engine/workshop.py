"""The engine's services to boundaries, rules, losses and penalties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrank.engine.data import TaskRows, batches
from polyrank.engine.reading import Reader
from polyrank.errors import ConfigError
from polyrank.frame import Block, Buffer, Layer, Loss, Saved, Workshop, keyed, seed_of
from polyrank.layers import (
    AdaptedLinear,
    ModelAdapter,
    View,
    absorb,
    adapter_of,
    append,
    extend,
    initialise,
    keep,
    redraw,
    replica,
    reshaped,
    saved_of,
    view,
)

LOGITS = frozenset({"logits"})


class TaskWorkshop(Workshop):
    """Services for one task; a boundary gets it and never the model itself.

    Args:
        model: the adapted model.
        reader: makes batches and runs the model.
        parts: datasets of the task by role and split, {"train": [...]}.
        seed: key of random draws.
        task: number of the task, as the scenario shows it.
        size: rows per batch.
        memories: what entries keep from task to task, by name.
        buffer: stored samples, if a strategy asked for them.
        classes: classes of the task.
        known: number of classes of all earlier tasks.
        first: whether no task was finished before.
        flowing: whether tasks follow each other without marks.

    Attributes:
        absorbed: whether base weights have changed.
        checked: figures of the last check inside a phase.
    """

    def __init__(
        self,
        model: nn.Module,
        reader: Reader,
        parts: Mapping[str, Sequence[Any]],
        *,
        seed: int,
        task: int,
        size: int,
        memories: dict[str, dict[str, Any]] | None = None,
        buffer: Buffer | None = None,
        classes: tuple[int, ...] = (),
        known: int = 0,
        first: bool = True,
        flowing: bool = False,
    ) -> None:
        self.model, self.reader, self.parts = model, reader, parts
        self.seed, self.task, self.size = seed, task, size
        self.memories = {} if memories is None else memories
        self.buffer, self.classes, self.known, self.first = buffer, classes, known, first
        self.flowing, self.absorbed = flowing, False
        self.checked: dict[str, float] = {}

    @property
    def adapter(self) -> ModelAdapter:  # type: ignore[override]
        """The adapter as it is now; views change with structure."""
        return adapter_of(self.model)

    def memory(self, name: str) -> dict[str, Any]:
        """Return what an entry of that name keeps from task to task."""
        return self.memories.setdefault(name, {})

    def data(
        self, role: str, split: str = "train", *, seed: int | None = None, size: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """Yield batches of a role, of `size` rows if given; with a seed, shuffled by it.

        Raises:
            ConfigError: if the task has no such data.
        """
        key = split if role == "train" else role
        if key not in self.parts:
            raise ConfigError(f"data: the task has {', '.join(sorted(self.parts))}, and no {key!r}")
        rows = TaskRows(self.parts[key])
        return batches(rows, size or self.size, self.reader.collate, seed=seed)

    @torch.no_grad()
    def observe(
        self,
        batches: Iterable[dict[str, Any]],
        at: str,
        wants: frozenset[str],
        fn: Callable[[str, dict[str, Tensor]], None],
    ) -> dict[str, Any]:
        """Call `fn(path, {"input", "output"})` per adapted linear layer and batch; no gradients.

        Raises:
            ConfigError: for places or wishes that are not served.
        """
        if at != "linear" or not wants <= {"input", "output"}:
            raise ConfigError(
                f"observe: got at={at!r}, wants={sorted(wants)}; "
                "'linear' with 'input', 'output' is served"
            )

        def hook(path: str) -> Callable[..., None]:
            def seen(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                found = {"input": args[0], "output": output}
                fn(path, {name: found[name] for name in wants})

            return seen

        layers = {m for m in self.model.modules() if isinstance(m, AdaptedLinear)}
        handles = [
            layer.module.base_layer.register_forward_hook(hook(layer.site.path))
            for layer in self.adapter.layers
            if layer.module in layers
        ]
        try:
            with self._still():
                for batch in batches:
                    self.reader.forward(self.model, self._moved(batch), LOGITS)
        finally:
            for handle in handles:
                handle.remove()
        return {}

    def initialise(self, rate: float) -> bool:
        """Write the starting values of an adapter that waits for statistics of this task's rows.

        Args:
            rate: learning rate of the first update.

        Returns:
            Whether it waited.
        """
        if not any(view.waiting for view in self.adapter.layers):
            return False
        role = "train" if "train" in self.parts else "text"
        # In their order, where rows of later tasks lie behind those of the first.
        seed = None if self.flowing else seed_of(self.seed, self.task, "start")
        batches = self.data(role, seed=seed)
        initialise(self.model, batches, self._mean_loss, rate=rate, key=f"task-{self.task}")
        return True

    def _mean_loss(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Return the mean task loss of one batch, and over how many terms it is."""
        loss = self.reader.loss()
        out = self.reader.forward(model, batch, loss.needs | LOGITS)
        count = self._count(loss, batch)
        return loss(out, batch) / count, count

    @staticmethod
    def _count(loss: Loss, batch: Mapping[str, Tensor]) -> int:
        labels = batch["labels"]
        count = int((labels[:, 1:] != -100).sum()) if labels.dim() == 2 else len(labels)
        return max(1, count if loss.per == "label" else len(labels))

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Return the model's logits of one batch in evaluation mode, without gradients."""
        with self._still():
            out = self.reader.forward(self.model, self._moved(batch), LOGITS)
        return cast("Tensor", out.logits)

    def grads(self, batch: dict[str, Any], params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return gradients of the mean task loss of one batch, averaged over processes.

        `.grad` stays as it is, and in evaluation mode nothing counts or drops out.
        """
        moved = self._moved(batch)
        loss = self.reader.loss()
        with self._still(), torch.enable_grad():
            out = self.reader.forward(self.model, moved, loss.needs | LOGITS)
            value = loss(out, moved) / self._count(loss, moved)
            found = torch.autograd.grad(value, list(params), allow_unused=True)
        grads = [
            p.new_zeros(p.shape) if g is None else g for g, p in zip(found, params, strict=True)
        ]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for grad in grads:
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
        return grads

    @contextmanager
    def _still(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _moved(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        return {key: value.to(device) for key, value in batch.items()}

    def absorb(
        self,
        *,
        lossy: bool = False,
        archive: bool | str = False,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Add the adapter's update to the base weights and redraw it."""
        key = f"absorb-{self.task}"
        absorb(self.model, lossy=lossy, archive=archive, ranks=ranks, seed=self.seed, key=key)
        self.absorbed = True

    def append(self, name: str, r: int | None = None) -> None:
        """Freeze the live ranks into the bank and give r new ones, None: as many as before."""
        append(self.model, r, seed=self.seed, key=f"append-{self.task}")

    def redraw(self) -> None:
        """Write fresh starting values."""
        redraw(self.model, seed=self.seed, key=f"task-{self.task}")

    def replica(self, name: str) -> None:
        """Keep a frozen copy of the adapter.

        Raises:
            ConfigError: if the adapter holds blocks, which a replica would show as they are now.
        """
        if self.adapter.blocks:
            raise ConfigError(
                f"replica: adapter {self.adapter.name!r} holds blocks, which cannot be kept twice; "
                "use a strategy without a teacher or an average"
            )
        replica(self.model, name)

    def extend(self, name: str) -> None:
        """Give a replica's head the classes that the live head has gained since."""
        extend(self.model, name)

    def view(self, name: str) -> AbstractContextManager[Any]:
        """Show "base" or a replica inside the block."""
        return view(self.model, name)

    def keep(self, layer: Layer, ranks: Tensor) -> None:
        """Keep some live ranks of one layer, in the given order."""
        keep(self.model, cast("View", layer), ranks)

    def reshaped(self) -> AbstractContextManager[list[Block]]:
        """Let the adapter's blocks change inside of the block."""
        return reshaped(self.model)

    def saved(self) -> Saved:
        """Return the live adapter as a value, a copy of what would be written to disk now."""
        return saved_of(self.model)

    @property
    def replay(self) -> Buffer:
        """Return the buffer of stored samples.

        Raises:
            ConfigError: if no strategy of the run asked for one.
        """
        if self.buffer is None:
            raise ConfigError(
                "replay: nothing is stored in this run; a strategy asks for it by its replay()"
            )
        return self.buffer

    def rng(self, name: str) -> torch.Generator:
        """Return the generator keyed by (seed, task, name)."""
        return keyed(self.seed, self.task, name)
