"""What one forward pass carries beside its activations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def _zero() -> Tensor:
    # On the CPU even if the model is being built on another device.
    return torch.zeros((), dtype=torch.int64, device="cpu")


@dataclass
class Flow:
    """One per model, held by reference by every adapted layer.

    It is filled before the base model runs and stays filled until the next forward with gradients,
    because a checkpointed segment is recomputed in backward and must see what its forward saw. A
    forward without gradients (evaluation, a teacher) puts back what it found. Of two forwards with
    gradients before one backward, a recompute sees the later one.

    Attributes:
        mask: (batch, seq) bool, the real tokens of the input; None if all are real.
        decoder_mask: (batch, seq) bool, those of the decoder's input in an encoder-decoder model.
        condition: (batch, c), what a conditioned core reads: task ids, user or domain weights.
        ambient: the condition of forwards that bring none of their own.
        lane: (batch,) int64, index into `lanes` of each sample's adapter; -1 is the base model.
        lanes: adapter names that `lane` refers to.
        beams: how many copies of each sample `lane` counts.
        view: ``""`` live, ``"base"`` without adapters, else the name of a replica; never touches
            requires_grad.
        aux: factor of losses injected in backward: 1/accumulation steps times the loss scale.
        draw: 0-d int64, key of all that is drawn in this training forward; a tensor, so that
            compiled code need not be compiled again for the next one.
        learning: True in a forward with gradients; without them none is training, in any mode.
        plain: True if neither view, lane nor condition is set: layers then take the fused path.
        attached: adapters whose rules run at every update.
        stepped: adapters whose rules ran since the last training forward.
        watchers: called before every training forward of the model.
        notes: what the layers of one training forward tell each other, in a dict of its own for
            every forward; a recompute finds what its forward left. Not kept in compiled code.
    """

    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    condition: Tensor | None = None
    ambient: Tensor | None = None
    lane: Tensor | None = None
    lanes: tuple[str, ...] = ()
    beams: int = 1
    view: str = ""
    aux: float | Tensor = 1.0
    draw: Tensor = field(default_factory=_zero)
    learning: bool = True
    plain: bool = True
    attached: set[str] = field(default_factory=set)
    stepped: set[str] = field(default_factory=set)
    watchers: list[Callable[[], None]] = field(default_factory=list)
    notes: dict[Any, Any] = field(default_factory=dict)

    def live(self, training: bool) -> bool:
        """Say whether this is a training forward that happens for the first time.

        A recompute of a checkpointed segment runs inside backward, where autograd has a graph task.
        The grad mode inside a layer cannot tell, because a reentrant checkpoint runs its first pass
        without gradients.
        """
        if not training or self.view or not self.learning:
            return False
        if torch.compiler.is_compiling():
            return True
        return torch._C._current_graph_task_id() == -1

    def tokens(self, masks: str, shape: torch.Size) -> Tensor | None:
        """Return the mask for activations of leading shape `shape`, or None if all tokens are real.

        Some models flatten (batch, seq) before their feed-forward layers.
        """
        mask = {"mask": self.mask, "decoder": self.decoder_mask}.get(masks)
        if mask is None or mask.shape == shape:
            return mask
        return mask.flatten() if len(shape) == 1 and shape[0] == mask.numel() else None

    def key(self, seed: int) -> int | Tensor:
        """Return the key of 63 bits that `seed` has in this forward, and in no other.

        `seed` tells places of the model apart. Runs differ by `draw`, which the engine fills from
        the seed of the run; the seed of an adapter decides its starting values alone.
        """
        draw = self.draw if torch.compiler.is_compiling() else int(self.draw)
        return (seed + draw) & (2**63 - 1)

    @contextmanager
    def put(self, **values: object) -> Iterator[Flow]:
        """Set fields for the duration of a block and put the old values back."""
        before = {name: getattr(self, name) for name in values}
        self._set(values)
        try:
            yield self
        finally:
            self._set(before)

    def _set(self, values: dict[str, object]) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.plain = not self.view and self.lane is None and self.condition is None

    def __deepcopy__(self, memo: dict[int, object]) -> Flow:
        """Copy what a forward left, not who watches: a copy of a model does not train along."""
        own: dict[str, Any] = {"watchers": [], "attached": set(), "stepped": set(), "notes": {}}
        return replace(self, draw=self.draw.clone(), **own)

    def __getstate__(self) -> dict[str, object]:
        own: dict[str, Any] = {"watchers": [], "attached": set(), "stepped": set(), "notes": {}}
        return {**self.__dict__, **own}

    def at(self, mask: Tensor | None) -> Flow:
        """Return the flow as one layer sees it: `mask` is the one that belongs to its tokens."""
        return replace(self, mask=mask, decoder_mask=None)

    def rows(self, index: Tensor) -> Flow:
        """Return the flow of some samples of the batch, for the layers of a mixed batch."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        masks = (pick(self.mask), pick(self.decoder_mask))
        part = Flow(*masks, pick(self.condition), view=self.view, aux=self.aux, draw=self.draw)
        part.learning = self.learning
        part.plain = part.condition is None and not part.view
        return part
