"""Experts that are whole feed-forward networks: one frozen FFN, E low-rank updates of its layers.

FFN(x) = Σ_e ω_e(x) E_e(x),  E_e(x) = (W2 + s B²_e A²_e) a_e(x),
a_e(x) = act((W1 + s B¹_e A¹_e) x) ⊙ ((W3 + s B³_e A³_e) x), without the second factor if there is
no W3. W1 x and W3 x are computed once for all experts, and W2 once, on Σ_e ω_e a_e, since it is
linear. A token has as many slots as the token with the most experts; the ranks of all experts are
multiplied, those of the others as zeros, so that tokens need not be sorted by expert. Beside the
check that logits are finite, a device is waited for in topp alone, which counts the slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Block, Core, Flow, Original, Site, inject, seed_of
from polyrank.layers import AdaptedLinear, View
from polyrank.ops.philox import dropout, uniform
from polyrank.ops.rank_gate.selection import check_finite
from polyrank.parts import losses
from polyrank.parts.ffn import Form, differs
from polyrank.parts.routers import Choice


class Experts(Core):
    """Marks an FFN's layer: (E r_e) rows and columns, multiplied by the block around the FFN."""

    merges = "never"

    def __init__(self, site: Site, experts: int) -> None:
        super().__init__()
        self.widths = (experts * site.r, experts * site.r)
        self.path = site.path

    def _refuse(self, what: str, remedy: str) -> ConfigError:
        return ConfigError(
            f"{self.path}: got {what}, but its ranks belong to experts of the whole FFN; {remedy}"
        )

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Refuse: outside of its FFN the layer has no router.

        Raises:
            ConfigError: always.
        """
        raise self._refuse("a call of this layer alone", "call the FFN that it is a part of")

    def shortened(self, ranks: int) -> float:
        """Refuse to be cut.

        Raises:
            ConfigError: always.
        """
        raise self._refuse(f"{ranks} ranks to keep", "train with fewer ranks or experts")


class Charge(NamedTuple):
    """What a router adds to the objective.

    Attributes:
        balance: coefficient of the balance loss.
        over: "model": loads and probabilities are averaged over all FFNs before they are
            multiplied; "layer": the mean of the losses of all FFNs.
        z: coefficient of the mean of logsumexp(z)².
    """

    balance: float
    over: str
    z: float


class Tally:
    """Loads of the experts in one forward, over all FFNs; `read` once a backward took them."""

    def __init__(self) -> None:
        self.read = False
        self.kept: Tensor | None = None
        self.tokens: Tensor | float = 0.0

    def add(self, kept: Tensor, tokens: Tensor) -> None:
        """Count the real tokens that each expert of one more FFN serves."""
        if self.kept is None:
            self.kept, self.tokens = kept, tokens
        else:
            self.kept = self.kept + kept.to(self.kept.device)
            self.tokens = self.tokens + tokens.to(self.kept.device)


class _Spread(torch.autograd.Function):
    """Adds the gradient of E Σ_e F_e P_e, F and P means over all FFNs, when F is complete."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, p: Tensor, tally: Tally, factor: Tensor | float) -> Tensor:
        ctx.tally, ctx.factor, ctx.device = tally, factor, p.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        kept, tokens = ctx.tally.kept, ctx.tally.tokens
        ctx.tally.read = True
        share = kept / tokens.clamp_min(1) ** 2 * len(kept)
        return grad, share.to(ctx.device) * ctx.factor, None, None


class Skip(Block):
    """Hands its input on, where what follows computes the whole FFN."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.tap = self.add = place

    def forward(self, base: Original, x: Tensor, tapped: Tensor, flow: Flow) -> Tensor:
        """Return x."""
        return x


class Mixed(Block):
    """The FFN of a transformer block as a mixture of E experts, chosen by one router.

    Args:
        site: the transformer block.
        form: where its FFN has its parts.
        experts: E >= 1.
        choice: how logits become weights.
        charge: what the router adds to the objective.
        capacity: real tokens of a sequence that an expert serves in training, 0 for all; for those
            beyond it, the weight times x stands in place of the FFN.
        jitter: what the router reads is multiplied by U(1 ± jitter) in training.
        spread: the router starts as N(0, spread²).
    """

    def __init__(
        self,
        site: Site,
        form: Form,
        experts: int,
        choice: Choice,
        charge: Charge,
        capacity: int = 0,
        jitter: float = 0.0,
        spread: float = 0.02,
    ) -> None:
        super().__init__()
        self.tap = self.add = form.add
        self.form, self.choice, self.charge = form, choice, charge
        self.capacity, self.jitter, self.experts = capacity, jitter, experts
        self.path, self.noise = site.path, seed_of("jitter", site.path)
        self.router = nn.Parameter(torch.empty(experts, site.d_in).normal_(0, spread))

    def unfit(self, inside: nn.Module, adapter: str) -> Iterator[str]:
        """Yield a line if the module computes something else than its form says."""
        yield from differs(self.form, inside, self.router.shape[1])

    def forward(self, base: Original, x: Tensor, tapped: Tensor, flow: Flow) -> Tensor:
        """Return Σ_e ω_e E_e(x), and inject the router's losses if this is training.

        Raises:
            ConfigError: if experts of another adapter are active in the same FFN.
        """
        if not base.alone:
            raise ConfigError(
                f"{self.path}: blocks of several active adapters meet in one FFN, whose experts "
                "cannot be stacked; call set_adapter with one of them"
            )
        z = self.logits(x, flow)
        kept, weights = self.choice.kept(z), self.choice.weights(z)
        k = {"softmax": self.choice.k, "top1": 1}.get(self.choice.kind) or _slots(kept)
        slots = z.masked_fill(~kept, -torch.inf).sort(dim=-1, descending=True, stable=True)[1]
        slots = slots[..., :k].movedim(-1, 0)
        shares = weights.movedim(-1, 0).gather(0, slots)
        y = _Network(base, self, flow).run(x, slots, shares.to(x.dtype)[..., None])
        if self.capacity and self.training:
            y = torch.where(self.crowded(kept, flow)[..., None], shares[0][..., None].to(y) * x, y)
        return self.charged(y, z, kept, base.adapter, flow)

    def logits(self, x: Tensor, flow: Flow) -> Tensor:
        """Return z (*, E) in fp32, or in fp64 if x is."""
        x = x if x.dtype == torch.float64 else x.float()
        if self.jitter and self.training:
            u = uniform(flow.key(self.noise), torch.arange(x.numel(), device=x.device))
            x = x * (1 + self.jitter * (2 * u.view(x.shape).to(x.dtype) - 1))
        autocast = torch.is_autocast_enabled(x.device.type)
        # Logits rounded to bf16 by autocast would tie, and change the choice of some tokens.
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            z = F.linear(x, self.router.to(x.dtype))
        check_finite(z)
        return z

    def crowded(self, kept: Tensor, flow: Flow) -> Tensor:
        """Return the real tokens (*,) that come after the `capacity` first ones of their expert."""
        real = kept if flow.mask is None else kept & flow.mask[..., None]
        return (real & (real.cumsum(-2) > self.capacity)).any(-1)

    def charged(self, y: Tensor, z: Tensor, kept: Tensor, adapter: str, flow: Flow) -> Tensor:
        """Return y, with the gradients of the router's losses on its way back."""
        c, whole = self.charge, self.charge.over == "model"
        if not (c.balance or c.z) or not self.training or not flow.learning:
            return y
        if c.balance and whole:
            if torch.compiler.is_compiling():
                raise ConfigError(
                    "aux_over: 'model' needs the loads of all FFNs before the first gradient, "
                    "which compiled code does not wait for; use aux_over='layer'"
                )
            tally = self.tally(adapter, flow)
            real = kept if flow.mask is None else kept & flow.mask[..., None]
            tokens = z.new_tensor(kept[..., 0].numel()) if flow.mask is None else flow.mask.sum()
            if flow.live(self.training):
                tally.add(real.reshape(-1, self.experts).sum(0).to(z.dtype), tokens.to(z.dtype))
        if not torch.is_grad_enabled():
            return y
        loss = z.new_zeros(())
        if c.balance and whole:
            p = z.softmax(-1)
            p = p if flow.mask is None else p * flow.mask[..., None]
            p = p.reshape(-1, self.experts).sum(0)
            y = cast("Tensor", _Spread.apply(y, p, tally, flow.aux * c.balance))
        elif c.balance:
            loss = loss + c.balance / self.peers * losses.balance(z, kept, flow.mask)
        if c.z:
            loss = loss + c.z / self.peers * losses.z_square(z, flow.mask)
        return inject(y, loss, flow) if loss.requires_grad else y

    def tally(self, adapter: str, flow: Flow) -> Tally:
        """Return the loads of this forward; a recompute finds those of the forward it repeats."""
        key = ("experts", adapter)
        held: Tally | None = flow.notes.get(key)
        # Notes are emptied by the whole model; if only a part of it is called, they stay.
        if held is None or (held.read and flow.live(self.training)):
            held = flow.notes[key] = Tally()
        return held


def _slots(kept: Tensor) -> int:
    """Return how many experts the token with the most of them has; compiled code takes all."""
    if torch.compiler.is_compiling():
        return kept.shape[-1]
    return int(kept.sum(-1).max()) if kept.numel() else 1


class _Network:
    """The layers of one FFN as one adapter's experts see them in one forward."""

    def __init__(self, base: Original, block: Mixed, flow: Flow) -> None:
        self.inside, self.name, self.form, self.flow = base.inside, base.adapter, block.form, flow
        self.experts, self.summing = block.experts, block.choice.kind == "softmax"

    def run(self, x: Tensor, slots: Tensor, shares: Tensor) -> Tensor:
        """Return Σ_j ω_j E_{e_j}(x); slots (k, *) are the experts e_j, shares (k, *, 1) the ω_j."""
        form, inside = self.form, self.inside
        up = self.widened(form.up, x, slots)
        act = inside.get_submodule(form.act)
        a = act(self.widened(form.gate, x, slots)) * up if form.gate else act(up)
        a = inside.get_submodule(form.before)(a) if form.before else a
        a = a.expand(len(slots), *a.shape[1:])
        shares = shares.to(a.dtype)
        if self.summing:
            # The weights sum to one: written so that equal experts give back what each gives.
            mixed = a[0] + (shares[1:] * (a[1:] - a[:1])).sum(0)
        else:
            mixed = (shares * a).sum(0)
        y = self.plain(form.down, mixed)
        layer = inside.get_submodule(form.down)
        bias = getattr(getattr(layer, "base_layer", layer), "bias", None)
        if bias is not None and not self.summing:
            y = y + (shares.sum(0) - 1).to(y.dtype) * bias.to(y.dtype)
        if (view := self.view(form.down)) is not None:
            q = (shares * self.ranks(view, a, slots)).sum(0)
            y = y + F.linear(q, view.B.to(q.dtype)).to(y.dtype) * view.scale
        return cast("Tensor", inside.get_submodule(form.after)(y) if form.after else y)

    def view(self, path: str) -> View | None:
        """Return the experts' view of a layer, or None if it has none that acts."""
        layer = self.inside.get_submodule(path)
        if not isinstance(layer, AdaptedLinear) or layer.merged_adapters:
            return None
        return layer.views.get(self.name)

    def plain(self, path: str, x: Tensor) -> Tensor:
        """Return what a layer gives without the experts: its base, and other active adapters."""
        layer = self.inside.get_submodule(path)
        if not isinstance(layer, AdaptedLinear):
            return cast("Tensor", layer(x))
        weight = getattr(layer.base_layer, "weight", None)
        if self.form.before and weight is not None and weight.is_floating_point():
            # T5 keeps this layer in fp32.
            x = x.to(weight.dtype)
        y = layer.base_layer(x)
        others = [n for n in layer.active_adapters if n != self.name and n in layer.views]
        for name in () if layer.merged_adapters else others:
            y = layer.views[name].add(y, x, layer.flow)
        return cast("Tensor", y)

    def widened(self, path: str, x: Tensor, slots: Tensor) -> Tensor:
        """Return W x + s B_e A_e x of every slot, (k, *, d_out); (1, *, d_out) without experts."""
        y = self.plain(path, x)[None]
        if (view := self.view(path)) is None:
            return y
        q = self.ranks(view, x, slots)
        return y + F.linear(q, view.B.to(q.dtype)).to(y.dtype) * view.scale

    def ranks(self, view: View, x: Tensor, slots: Tensor) -> Tensor:
        """Return A x in the ranks of the expert of every slot and 0 in those of all others."""
        p = view.method.dropout if view.core.training else 0.0
        x = dropout(x, p, self.flow.key(view.seed)) if p else x
        h = F.linear(x, view.A.to(x.dtype))
        owner = torch.arange(h.shape[-1], device=h.device) // view.site.r
        return torch.where(slots[..., None] == owner, h, 0.0)
