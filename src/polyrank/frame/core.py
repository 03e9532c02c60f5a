"""The core φ of `y = W x + b + s · B φ(A x ; x)`: the only part of an adapted layer that varies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from polyrank.errors import MergeError
from polyrank.frame.flow import Flow


class Portion(NamedTuple):
    """The leading ranks that a forward reads.

    Attributes:
        ranks: how many rows of A and columns of B are read; nothing else is touched.
        held: the first of them that receive no gradient, 0 <= held <= ranks; x receives all.
        gain: multiplies the update.

    In compiled code all three may be 0-d tensors, so that another portion needs no other graph;
    the ranks that are not read then are multiplied as zeros.
    """

    ranks: int | Tensor
    held: int | Tensor = 0
    gain: float | Tensor = 1.0


def exactly(
    fn: Callable[[Tensor], Tensor], module: nn.Module, names: frozenset[str]
) -> Callable[[Tensor], Tensor]:
    """Return fn, changed so that it lowers the precision of no parameter of these names."""
    exact = {id(p) for n, p in module.named_parameters() if n in names}
    half = (torch.bfloat16, torch.float16)

    def moved(t: Tensor) -> Tensor:
        found = fn(t)
        keep = id(t) in exact and t.dtype not in half and found.dtype in half
        return found.to(t.dtype).copy_(t.detach()) if keep else found

    return moved


class Core(nn.Module):
    """Turns h = A x into q, the input of B. It never sees x itself, only the products it asked for.

    A subclass sets `widths`, implements `forward` and, if its map is linear and the same for every
    token, `delta`.

    Attributes:
        widths: (rows of A, columns of B).
        axes: for each parameter name the meaning of its axes, out of "rank" (one entry per live
            rank), "in", "expert", None; pruning, growing and permuting read it and need no method
            of their own.
        merges: "exact", "per-condition" (delta needs one) or "never".
        epilogue: which fused form serves the core: "none", "static", "linear", "self"; "python" if
            none does.
        frozen: names of parameters that are saved but never trained.
        gates: names of trained parameters that are never decayed, whatever the optimiser's weight
            decay.
        counting: True if the core wants `count` to be called in training.
        competing: True if a rank without a value still changes what others do, since it enters a
            norm or a selection: a bank must not grow before its last ranks were trained, and a
            rank whose value goes keeps its key.
        ordered: True if a rank means something behind all earlier ones only, so that what is kept
            of them is a prefix.
        owns: True if the core was made from its base weight, which then no other module reads and
            no other such core is made from.
        unabsorbed: why the base weight must not take the update as it stands, and what to call
            instead; empty if it may.
    """

    widths: tuple[int, int]
    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {}
    merges: str = "exact"
    epilogue: str = "python"
    frozen: frozenset[str] = frozenset()
    gates: frozenset[str] = frozenset()
    counting: bool = False
    competing: bool = False
    ordered: bool = False
    owns: bool = False
    unabsorbed: str = ""

    def count(self, counts: Tensor) -> None:
        """Take the number of tokens that chose each rank.

        Only called if `counting` and the forward is live.
        """

    def banked(self, ranks: int) -> None:
        """Learn that `ranks` frozen ranks now stand before the live ones."""

    def portion(self) -> Portion | None:
        """Return which leading ranks are read, or None for all; `delta` speaks of all ranks."""
        return None

    def shortened(self, ranks: int) -> float:
        """Return the factor on the update once only the first `ranks` ranks are left."""
        return 1.0

    def faded(self, scale: float) -> float:
        """Return the factor on the values of ranks that are frozen, in a layer of that scale."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """Return plain values that were set on the core and are saved with the adapter."""
        return {}

    def configure(self, settings: dict[str, Any]) -> None:
        """Take back what `settings` gave."""

    def unreachable(self, A: Tensor) -> Tensor:
        """Return which ranks, (R,) bool, no input makes act in evaluation; A (R, d_in): all keys.

        A rank that is not marked may still never act.
        """
        return torch.zeros(len(A), dtype=torch.bool, device=A.device)

    def settle(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the live factors as a bank holds them, once the core has gone: B φ(A x) stays.

        Called under no_grad. A core that weighs ranks the same for every token folds its weights
        into B and drops the ranks that it silences.
        """
        return A, B

    def rows(self) -> Tensor | None:
        """Return extra rows (e, d_in) to be read in the same pass over x as A, or None."""
        return None

    def fused(self) -> Any:
        """Return the operator's epilogue for this core; called unless `epilogue` is "python"."""
        raise TypeError(f"{type(self).__name__} has epilogue {self.epilogue!r} and no fused form")

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Map h (*, widths[0]) and z = x rowsᵀ (*, e), fp32, to q (*, widths[1]) in the dtype of h.

        Side effects are limited to counts taken without gradients while `flow.live(self.training)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward(h, z, flow)")

    def outcome(
        self, product: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        """Return product(x, A, B) = B φ(A x ; x), (*, d_out), or what stands in its place.

        Called if `epilogue` is "python", for what acts behind B. `product` may be called more than
        once, as with detached arguments, if `forward` counts nothing.
        """
        return product(x, A, B)

    def apart(
        self, x: Tensor, A: Tensor, B: Tensor, shadow: tuple[Tensor, Tensor, Tensor | None]
    ) -> Tensor | None:
        """Return B φ(A x) less the shadow, (*, d_out), or None: two products, one subtracted.

        Called in the place of `outcome` where a shadow is subtracted, for cores that can take the
        differences of factors first, of which lower precisions round less.
        """
        return None

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the matrix (widths[1], widths[0]) in fp32 that forward applies to every token.

        Raises:
            MergeError: if the map depends on the token.
        """
        # An approximation is a mean of gates; a core without any would refuse that as well.
        mean = ", or ask for an approximation with polyrank.merge(model, approximate=batches)"
        raise MergeError(
            f"merge: the core {type(self).__name__} weighs ranks for each token, so no single "
            f"matrix equals it; keep the adapter unmerged{mean * hasattr(self, 'gates_of')}"
        )

    def base_gain(self) -> Tensor | None:
        """Return α₀ (0-d) that multiplies the base output without its bias, or None for 1."""
        return None

    def fill(self, rng: torch.Generator) -> None:
        """Draw the starting values of the core's own parameters.

        Called under no_grad, with no parameter on meta.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Core:
        # model.bfloat16() must not round what counts in steps of 1e-5: gates and statistics.
        super()._apply(exactly(fn, self, self.frozen | self.gates), recurse)  # type: ignore[no-untyped-call]
        return self

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that may train, by identity."""
        return [p for name, p in self.named_parameters() if name not in self.frozen]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, loss: Tensor, factor: Tensor | float) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(loss)
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss) * ctx.factor, None


def inject(q: Tensor, loss: Tensor, flow: Flow) -> Tensor:
    """Return q unchanged and add flow.aux · ∂loss to the gradients when q is differentiated.

    The loss belongs to the layer that computes it: nothing is collected, so a recomputed segment
    cannot count it twice and a forward that is thrown away leaves nothing behind.
    """
    apply: Callable[..., Tensor] = _Inject.apply
    return apply(q, loss, flow.aux)
