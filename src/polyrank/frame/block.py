"""What acts around a whole module of a transformer block, not at one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from polyrank.frame.core import exactly
from polyrank.frame.flow import Flow


class Original(Protocol):
    """What a block replaces: called with a value, it runs the original with all its arguments.

    Attributes:
        module: the module at the add point.
        inside: the transformer block around it.
        adapter: name of the adapter whose block calls.
        alone: False if another adapter's block lies between this one and the module.
    """

    module: nn.Module
    inside: nn.Module
    adapter: str
    alone: bool

    def __call__(self, value: Tensor) -> Tensor:
        """Return the original's output."""


class Block(nn.Module):
    """Replaces the output of the module at `add`, having read the input of the module at `tap`.

    Both are module paths relative to the transformer block, which is "" itself. If `tap` is a part
    of what is at `add`, the original runs on x before the block does. Trained parameters have role
    "side" unless `roles` names another. A block whose shapes change says them in `settings`, and
    the change is made inside of `polyrank.layers.reshaped`.

    Attributes:
        tap: whose input is read.
        add: whose output is replaced.
        frozen: names of parameters that are saved but never trained.
        exact: names of parameters that keep fp32 when the model is lowered to less.
        unreached: names of trained parameters to which the gradient of the model's own loss is
            none, or zero, as of a part with a phase and a loss of its own.
        roles: roles of parameters by the first part of their names.
        left: what the losses of such parts read of the last forward, as `Out.sides`.
        peers: how many transformer blocks of the model hold blocks of its adapter.
    """

    tap: str
    add: str
    frozen: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()
    roles: ClassVar[dict[str, str]] = {}
    peers: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What is left belongs to the graph of one forward, which no copy can take along.
        return {**self.__dict__, "left": {}}

    def unfit(self, inside: nn.Module, adapter: str) -> Iterator[str]:
        """Yield why it cannot work in the transformer block `inside`, whose layers are adapted."""
        yield from ()

    def settings(self) -> dict[str, Any]:
        """Return what decides its shapes beside the options, as plain values for the config."""
        return {}

    def configure(self, settings: dict[str, Any]) -> None:
        """Take the shapes that `settings` told of, once, before the weights are loaded."""

    def forward(self, base: Original, x: Tensor, tapped: Tensor, flow: Flow) -> Tensor:
        """Return what replaces `base(x)`; the mask of `flow` is that of the tokens of x."""
        raise NotImplementedError(
            f"{type(self).__name__} must define forward(base, x, tapped, flow)"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        super()._apply(exactly(fn, self, self.exact), recurse)  # type: ignore[no-untyped-call]
        return self
