"""Cores with more than one user."""

from __future__ import annotations

import math
from typing import ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrank.errors import ConfigError
from polyrank.frame import Core, Flow, Site
from polyrank.ops.capture import capturing
from polyrank.ops.rank_gate import Epilogue, gate


class Router(nn.Module):
    """Rows W_g (E, d_in) of a linear router; z = W_g x has no additive term."""

    def __init__(self, experts: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_in))

    def fill(self, rng: torch.Generator) -> None:
        """Draw U(±1/√d_in), the law of nn.Linear."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=rng))


class RankGate(Core):
    """φ(h ; x) = g(x) ⊙ h: a linear router turns on k of r ranks for each token, in whole blocks.

    Args:
        site: where the core sits.
        k: active ranks, a multiple of `block`.
        block: ranks that share one router row; 1 makes every rank an expert.
        score: "sigmoid" (scores σ(z)) or "softmax" (scores z).
        total: sum of the gates over the chosen ranks.
        balance: whether to keep a balance bias b (r,) and count choices for it.
        bias_in_weight: whether b enters the gate's value, not only the choice.
        rate: if not 0, b takes its step right after every live forward and no rule is needed.

    Raises:
        ConfigError: if r, k and block do not fit together at this site.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "router.weight": ("expert", "in"),
        "balance_bias": ("rank",),
    }
    merges = "never"
    epilogue = "linear"

    def __init__(
        self,
        site: Site,
        *,
        k: int,
        block: int = 1,
        score: str = "sigmoid",
        total: float | None = None,
        balance: bool = True,
        bias_in_weight: bool = False,
        rate: float = 0.0,
    ) -> None:
        super().__init__()
        r = site.r
        if block < 1 or r % block or k % block or not 1 <= k <= r:
            raise ConfigError(
                f"rank gate at {site.path!r}: got r={r}, k={k}, block={block}, expected "
                "1 <= k <= r with block dividing both; change rank_pattern or k"
            )
        self.widths = (r, r)
        self.k, self.block, self.score = k, block, score
        self.total = float(k if total is None else total)
        self.bias_in_weight = bias_in_weight
        self.rate = rate
        self.router = Router(r // block, site.d_in)
        self.counting = balance
        self.frozen = frozenset({"balance_bias"}) if balance else frozenset()
        self.balance_bias = nn.Parameter(torch.zeros(r), requires_grad=False) if balance else None
        self.known: tuple[object, ...] = ()
        self.form: Epilogue | None = None
        # A plain tensor: DDP would overwrite a buffer by rank 0's copy at every forward.
        self.counts: Tensor | None = None
        # What replays of a CUDA graph add to, and whether any does.
        self.kept: Tensor | None = None
        self.replayed = False

    def rows(self) -> Tensor:
        """Return the router's rows, read in the same pass as A."""
        # Looked up where modules keep it: their own look-up takes a kernel's time.
        found = cast("nn.Module", self._modules["router"])._parameters.get("weight")
        return self.router.weight if found is None else found

    def fill(self, rng: torch.Generator) -> None:
        """Draw the router; the bias starts at zero."""
        self.router.fill(rng)
        if self.balance_bias is not None:
            self.balance_bias.zero_()

    def fused(self) -> Epilogue:
        """Return the operator's form; made anew only when something of it changed."""
        now = (self.k, self.block, self.score, self.bias_in_weight, self.total)
        # Looked up where it mostly is; wrappers keep it as a plain attribute.
        bias, e = self._parameters.get("balance_bias"), self.form
        bias = self.balance_bias if bias is None else bias
        if torch.compiler.is_compiling() or e is None or self.known != now or e.bias is not bias:
            e = Epilogue(
                kind="linear",
                k=self.k,
                block=self.block,
                score=self.score,
                bias=bias,
                bias_in_weight=self.bias_in_weight,
                total=self.total,
            )
            if not torch.compiler.is_compiling():
                self.form, self.known = e, now
        return e

    def gates_of(self, h: Tensor, z: Tensor | None) -> Tensor:
        """Return g (*, r) in fp32."""
        return gate(h, z, self.fused())

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return g ⊙ h and count the choices of real tokens in a live training forward."""
        g = self.gates_of(h, z)
        if self.counting and flow.live(self.training):
            chosen = (g.detach() != 0).reshape(-1, g.shape[-1])
            if flow.mask is not None:
                chosen = chosen[flow.mask.reshape(-1)]
            self.count(chosen.sum(0))
        return (g * h).to(h.dtype)

    def count(self, counts: Tensor) -> None:
        """Add the number of tokens that chose each rank, (r,) int64.

        Raises:
            ConfigError: if a CUDA graph is captured before any update was made without one.
        """
        if self.rate:
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                # Each process would move its own copy of the bias, and they would drift apart.
                dist.all_reduce(counts)
            self.balance(counts, self.rate)
            return
        if capturing(counts.device):
            if self.kept is None:
                raise ConfigError(
                    "rank gate: got a CUDA graph that captures the first training forward, "
                    "expected one before it; make an update without the graph, then capture"
                )
            # Replays run none of these lines: they must add where `taken` will look.
            self.kept.add_(counts)
            self.replayed = True
            return
        if self.kept is None and counts.is_cuda and not torch.compiler.is_compiling():
            self.kept = torch.zeros_like(counts)
        if torch.compiler.is_compiling() and self.counts is None:
            # What a compiled graph returns may lie in memory that its next run writes.
            self.counts = counts.clone()
        elif self.counts is None:
            # A module asks much of what it is given to hold.
            vars(self)["counts"] = counts
        else:
            self.counts = self.counts.to(counts.device) + counts

    @torch.no_grad()
    def taken(self) -> Tensor | None:
        """Return what was counted since the last call, (r,) int64, or None if nothing was."""
        found, self.counts = self.counts, None
        if self.replayed and self.kept is not None:
            found = self.kept + (0 if found is None else found)
            self.kept.zero_()
        return found

    @torch.no_grad()
    def balance(self, counts: Tensor, rate: float) -> None:
        """b += rate · sign(mean(c) − c): ranks chosen too rarely rise, always by the same step."""
        if self.balance_bias is not None:
            error = counts.double().mean() - counts.double()
            self.balance_bias.add_(error.sign().to(self.balance_bias), alpha=rate)
