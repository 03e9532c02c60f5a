"""One adapter's view of one adapted layer, and the holders of its tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Core, Flow, KaimingZero, Layer, Method, Portion, Site, seed_of
from polyrank.ops.philox import dropout as seeded_dropout
from polyrank.ops.rank_gate import rank_gate

if TYPE_CHECKING:
    from polyrank.layers.linear import AdaptedLinear


def wide(t: Tensor) -> Tensor:
    """Return t in fp32, or as it is in fp64."""
    return t if t.dtype == torch.float64 else t.float()


def _through(delta: Tensor, h: Tensor) -> Tensor:
    """Return δ0 h for h (…, w) and δ0 a matrix, a diagonal (w,) or a number."""
    return F.linear(h, delta) if delta.dim() == 2 else h * delta


def _shaded(x: Tensor, shadow: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    """Return B0 δ0 A0 x."""
    A0, B0, delta = shadow
    h0 = F.linear(x, A0.to(x.dtype))
    h0 = h0 if delta is None else _through(delta.to(h0.dtype), h0)
    return F.linear(h0, B0.to(h0.dtype))


def _part(
    A: Tensor, B: Tensor, portion: Portion, live_from: int, scale: float
) -> tuple[Tensor, Tensor, int, float]:
    """Return (A, B, live_from, scale) of the leading ranks that are read."""
    ranks, held, gain = portion
    if not isinstance(ranks, Tensor):
        # Slices, so that what is left out costs nothing and cannot spoil anything.
        return A[:ranks], B[:, :ranks], min(max(live_from, int(held)), ranks), scale * float(gain)
    place = torch.arange(len(A), device=A.device)
    read, still = place < ranks, place < held
    A = torch.where(still[:, None], A.detach(), A)
    B = torch.where(still, B.detach(), B) * gain
    # By where and not by a product, which would let what is left out spoil the rest.
    return torch.where(read[:, None], A, 0.0), torch.where(read, B, 0.0), live_from, scale


def _held(factor: Tensor, ranks: int, dim: int) -> Tensor:
    """Return a factor whose first ranks receive no gradient."""
    if not ranks:
        return factor
    first, rest = factor.split([ranks, factor.shape[dim] - ranks], dim)
    return torch.cat([first.detach(), rest], dim)


class Factor(nn.Module):
    """Holds one weight, so that its name ends in ``<adapter>.weight`` as PEFT's own do."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))


class Frozen(nn.Module):
    """Holds frozen factors: a bank of earlier ranks, a shadow that is subtracted, or a replica."""

    def __init__(
        self, A: Tensor, B: Tensor, core: nn.Module | None = None, delta: Tensor | None = None
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A, requires_grad=False)
        self.B = nn.Parameter(B, requires_grad=False)
        self.delta = None if delta is None else nn.Parameter(delta, requires_grad=False)
        self.core = None if core is None else core.requires_grad_(False)
        # Of a replica: (live ranks, banked ranks) when it was made.
        self.shape = (0, 0)

    def train(self, mode: bool = True) -> Frozen:
        """Stay in evaluation mode: Trainer calls model.train() before every micro-batch."""
        return super().train(False)


class View(Layer):
    """One adapter's view of one adapted layer; what methods, rules and penalties work on."""

    def __init__(self, module: AdaptedLinear, name: str, method: Method, site: Site) -> None:
        self.module = module
        self.name = name
        self.method = method
        self.site = site
        self.scale = method.scale(site)
        self.row_scale: Tensor | None = None
        self.seed = seed_of("dropout", site.path, name)
        # Of updates absorbed into the base: how to know that base again, and whether it is here.
        self.witness: dict[str, Any] | None = None
        self.absorbed = False
        # Of the bank: ranks of each growth, and once ranks have changed places whose each one is.
        self.segments: list[int] = []
        self.order: list[int] | None = None
        # Values were dropped that only training reads.
        self.evaluating = False
        # The method's start wants statistics that were not gathered yet.
        self.waiting = False
        # Its config says that it has started, and no tensors have followed yet.
        self.hollow = False

    @property
    def A(self) -> nn.Parameter:  # type: ignore[override]
        """Live rows (widths[0], d_in)."""
        return cast("Factor", self.module.polyrank_A[self.name]).weight

    @property
    def B(self) -> nn.Parameter:  # type: ignore[override]
        """Live columns (d_out, widths[1])."""
        return cast("Factor", self.module.polyrank_B[self.name]).weight

    @property
    def core(self) -> Core:  # type: ignore[override]
        """The method's core for this layer."""
        return cast("Core", self.module.polyrank_core[self.name])

    @property
    def bank(self) -> tuple[Tensor, Tensor] | None:  # type: ignore[override]
        """Frozen ranks before the live ones; an archive that the base weight lacks among them."""
        found = [self.archive] if self.archive is not None and not self.absorbed else []
        if self.name in self.module.polyrank_bank:
            held = cast("Frozen", self.module.polyrank_bank[self.name])
            found.append((held.A, held.B))
        if len(found) < 2:
            return found[0] if found else None
        (A, B), (more_A, more_B) = found
        return torch.cat([A, more_A]), torch.cat([B, more_B], dim=1)

    @property
    def owners(self) -> list[int]:  # type: ignore[override]
        """Of which growth each rank of `factors` is, from 0; the live ones come last."""
        held = [n for n, size in enumerate(self.segments) for _ in range(size)]
        held = held if self.order is None else list(self.order)
        return [*held, *[len(self.segments)] * self.A.shape[0]]

    @property
    def archive(self) -> tuple[Tensor, Tensor] | None:
        """Ranks that were absorbed into the base weight of training."""
        if self.name not in self.module.polyrank_archive:
            return None
        held = cast("Frozen", self.module.polyrank_archive[self.name])
        return held.A, held.B

    @property
    def dormant(self) -> tuple[Tensor, Tensor] | None:
        """The archive where the base weight holds it, so that it must not act."""
        return self.archive if self.absorbed else None

    @property
    def shadow(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Frozen (A0, B0, δ0) whose product is subtracted."""
        if self.name not in self.module.polyrank_shadow:
            return None
        held = cast("Frozen", self.module.polyrank_shadow[self.name])
        return held.A, held.B, held.delta

    @shadow.setter
    def shadow(self, factors: tuple[Tensor, Tensor, Tensor | None] | None) -> None:
        """Keep copies of (A0 (w, d_in), B0 (d_out, w), δ0 (), (w,), (w, w) or None), frozen."""
        held = self.module.polyrank_shadow
        if self.name in held:
            del held[self.name]
        if factors is None:
            return
        A0, B0, delta = factors
        delta = None if delta is None else delta.detach().clone()
        held[self.name] = Frozen(A0.detach().clone(), B0.detach().clone(), delta=delta)

    @torch.no_grad()
    def fill(
        self, rng: torch.Generator, stat: dict[str, Tensor] | None = None, *, started: bool = False
    ) -> None:
        """Write the starting values.

        Without the statistics that its start wants, the adapter waits for them and answers as its
        base; those of the base weight are taken from it. With `started` the saved start follows,
        which came from data or is dear to find again.
        """
        start = self.method.starting()
        if stat is None and start.wants == {"weight"} and not started:
            weight = getattr(self.module.get_base_layer(), "weight", None)
            stat = None if weight is None or weight.is_meta else {"weight": self.weight()}
        without = bool(start.wants) and stat is None
        self.waiting, self.hollow = without and not started, without and started
        if self.waiting:
            self.shadow = None
        (KaimingZero() if without else start).fill(self, stat, rng)

    def acts(self) -> bool:
        """Say whether this adapter takes part in a forward."""
        layer = self.module
        return not layer._disable_adapters and self.name in layer.active_adapters

    def weight(self) -> Tensor:
        """Return the base weight as dense fp32 (d_out, d_in), in fp64 if it is stored so."""
        weight = wide(self.module.dense_weight().detach())
        return weight.T if self.module.transposed else weight

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return this layer's parameters that may train, by role, as the method declares."""
        found = {"A": [self.A], "B": [self.B], "core": self.core.trained()}
        return {role: params for role, params in found.items() if role in self.method.trains}

    def factors(self, flow: Flow) -> tuple[Tensor, Tensor, Core, int]:
        """Return (A, B, core, live_from) of the view that the flow shows."""
        if flow.view:
            replica = self.module.replica_of(self.name, flow.view)
            return replica.A, replica.B, cast("Core", replica.core), replica.A.shape[0]
        if self.bank is None:
            return self.A, self.B, self.core, 0
        bank_A, bank_B = self.bank
        return (
            torch.cat([bank_A, self.A]),
            torch.cat([bank_B, self.B], dim=1),
            self.core,
            bank_A.shape[0],
        )

    def add(self, y: Tensor, x: Tensor, flow: Flow) -> Tensor:
        """Return y plus this adapter's update for the input x."""
        A, B, core, live_from = self.factors(flow)
        scale = self.scale
        if self.evaluating and core.training:
            raise ConfigError(
                f"training at {self.site.path}: the adapter was compacted for evaluation and lacks "
                "values that training reads; train the adapter as it was before"
            )
        if (portion := core.portion()) is not None:
            A, B, live_from, scale = _part(A, B, portion, live_from, scale)
        if (gain := core.base_gain()) is not None:
            bias = self.module.base_bias()
            y = gain * y if bias is None else gain * (y - bias) + bias
        dropout = self.method.dropout if core.training else 0.0
        seed = flow.key(self.seed) if dropout else 0
        mask = flow.tokens(self.site.masks, x.shape[:-1])
        if core.epilogue != "python":
            count = core.counting and flow.live(core.training)
            y, counts = rank_gate(
                y, x, A, core.rows(), B, core.fused(), scale, live_from, self.shadow,
                self.row_scale, dropout, seed, mask, count=count,
            )  # fmt: skip
            if counts is not None:
                core.count(counts)
            return y
        if self.row_scale is not None:
            raise ConfigError(
                f"row_scale at {self.site.path}: the core {type(core).__name__} runs without a "
                "kernel, which alone can scale the gradients of A and B and not that of the input; "
                "use a core with an epilogue, such as frame.Identity"
            )
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
        if autocast:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # Logits rounded to bf16 by autocast would tie, and change the choice of some tokens.
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            x_hat = seeded_dropout(x, dropout, seed) if dropout else x
            rows = core.rows()
            z = None if rows is None else F.linear(wide(x_hat), rows.to(wide(x_hat).dtype))
            if portion is not None and not isinstance(portion.held, Tensor):
                A, B = _held(A, portion.held, 0), _held(B, portion.held, 1)

            def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
                q = core(F.linear(x, A.to(x.dtype)), z, flow.at(mask))
                return F.linear(q, B.to(q.dtype))

            shadow = self.shadow
            update = None if shadow is None else core.apart(x_hat, A, B, shadow)
            if update is None:
                update = core.outcome(product, x_hat, A, B)
                update = update if shadow is None else update - _shaded(x, shadow)
            return y + update.to(y.dtype) * scale

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return the dense update (d_out, d_in) in fp32, in fp64 if the factors are.

        Raises:
            MergeError: if the core depends on the token, or on a condition that was not given.
        """
        A, B, core, _ = self.factors(Flow())
        A, B = wide(A.detach()), wide(B.detach())
        update = B @ core.delta(condition).detach().to(B) @ A
        if self.shadow is not None:
            A0, B0, delta = self.shadow
            # Multiplied in the order of what is added, so that equal factors cancel exactly.
            B0 = wide(B0)
            if delta is not None:
                B0 = B0 @ wide(delta) if delta.dim() == 2 else B0 * wide(delta)
            update = update - B0 @ wide(A0)
        update = update * self.scale
        if (gain := core.base_gain()) is not None:
            update = update + (float(gain) - 1) * self.weight()
        return update
