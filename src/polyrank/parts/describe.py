"""How descriptors learn, and how it is kept what is usual for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from polyrank.frame import ORDER, Adapter, Loss, Out, Rule, Step, Workshop
from polyrank.parts.branches import Expandable

# How the names of phases begin that train descriptors.
RD = "rd"


def branches_of(adapter: Adapter, *, growing: bool = False) -> list[Expandable]:
    """Return the branches of an adapter from input to output, or those alone that grow."""
    found = [block for block in adapter.blocks if isinstance(block, Expandable)]
    return [block for block in found if block.growing] if growing else found


class Reconstruction(Loss):
    """Σ over blocks of the newest descriptor's error, (1/d) ‖rec − m‖²; the engine's mean of rows.

    It is the loss of phases of its own, and reaches descriptors alone.
    """

    needs = frozenset({"sides"})

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum over rows and blocks."""
        return torch.stack([side["newest"].sum() for side in out.sides.values()]).sum()


class Record(Rule):
    """Lets the newest descriptors say how wrong they are, and keeps what is usual for them.

    Args:
        always: whether the errors of all phases are kept, or of those that train descriptors.
    """

    order = ORDER["balance"]

    def __init__(self, *, always: bool = False) -> None:
        self.always = always

    def bind(self, adapter: Adapter, optimizer: Any, workshop: Workshop | None) -> None:
        """Learn which branches there are."""
        found = branches_of(adapter, growing=True)
        self.branches = [branch for branch in found if branch.window is not None]

    def begin(self, step: Step) -> None:
        """Switch on what the phase reads."""
        for branch in self.branches:
            branch.describing = step.phase.startswith(RD)
            branch.recording = self.always or branch.describing
            branch.pending.clear()

    def after(self, step: Step) -> None:
        """Keep the errors of the update's micro-batches, of all processes."""
        for branch in self.branches:
            if branch.pending:
                assert branch.window is not None
                # At once, since a window drops what comes with the value that fills it.
                found = [_gathered(errors) for errors in branch.pending]
                branch.window.push(torch.cat(found)[:, None])
            branch.pending.clear()

    def release(self) -> None:
        """Leave nothing switched on."""
        for branch in self.branches:
            branch.describing = branch.recording = False
            branch.pending.clear()
            branch.left.clear()


def _gathered(values: Tensor) -> Tensor:
    """Return the values of all processes, in their order."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values.cpu())
    return torch.cat(found).to(values.device)


class HoldRows(Rule):
    """Keeps the head's rows of earlier classes, which a weight decay would shrink."""

    order = ORDER["prox"]

    def bind(self, adapter: Adapter, optimizer: Any, workshop: Workshop | None) -> None:
        """Copy the rows as they are."""
        known = 0 if workshop is None else workshop.known
        params = [] if adapter.head is None or not known else list(adapter.head.parameters())
        self.kept = [(p, p.detach()[:known].clone()) for p in params]

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """Put them back."""
        for param, rows in self.kept:
            param[: len(rows)] = rows
