"""Cores of mixtures: E experts of r_e ranks each, seen as one wide LoRA."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Core, Flow, Site, inject, seed_of
from polyrank.ops.rank_gate import Epilogue
from polyrank.ops.rank_gate.selection import check_finite, largest
from polyrank.parts import losses
from polyrank.parts.cores import Router
from polyrank.parts.routers import Choice, condition_of, gumbel, ids, per_sample


def each(weights: Tensor, h: Tensor) -> Tensor:
    """Multiply the ranks of every expert in h (*, E r_e) by its weight (*, E)."""
    return (weights[..., None] * h.unflatten(-1, (weights.shape[-1], -1))).flatten(-2)


class Mixture(Core):
    """q from h = A x and the weights ω(x) of E experts, chosen for each token by a linear router.

    A subclass says in `spread` how the two combine.

    Args:
        site: where the core sits.
        experts: E >= 1.
        ranks: r_e >= 1, ranks of one expert.
        choice: how logits become weights.
        charge: losses on the logits of real tokens, injected in training.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"router.weight": ("expert", "in")}
    merges = "never"

    def __init__(
        self,
        site: Site,
        experts: int,
        ranks: int,
        choice: Choice,
        charge: losses.Charge = losses.NOTHING,
    ) -> None:
        super().__init__()
        self.widths = (experts * ranks, experts * ranks)
        self.experts, self.ranks = experts, ranks
        self.choice, self.charge = choice, charge
        self.router = Router(experts, site.d_in)
        self.path = site.path
        self.noise = seed_of("gumbel", site.path)

    def rows(self) -> Tensor:
        """Return the router's rows, read in the same pass as A."""
        return self.router.weight

    def fill(self, rng: torch.Generator) -> None:
        """Draw the router."""
        self.router.fill(rng)

    def banked(self, ranks: int) -> None:
        """Refuse: a frozen rank would belong to no expert.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.path}: got {ranks} frozen ranks before {self.experts} experts, expected none: "
            "the router has no logit for them; use a method that grows by frozen ranks"
        )

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return q, and inject the losses of the logits if this is training."""
        assert z is not None
        check_finite(z)
        noise = None
        if self.choice.kind == "gumbel" and self.training:
            noise = gumbel(z.shape, flow.key(self.noise), z.device)
        weights = self.choice.weights(z, noise)
        q = self.spread(weights, h).to(h.dtype)
        if self.charge.due() and self.training and torch.is_grad_enabled():
            q = inject(q, self.loss(z, weights, flow), flow)
        return q

    def spread(self, weights: Tensor, h: Tensor) -> Tensor:
        """Combine ω (*, E) in fp32 and h (*, widths[0]) to (*, widths[1])."""
        raise NotImplementedError(f"{type(self).__name__} must define spread(weights, h)")

    def loss(self, z: Tensor, weights: Tensor, flow: Flow) -> Tensor:
        """Return the sum of the losses of this layer's logits, each times its coefficient, 0-d."""
        c, total = self.charge, z.new_zeros(())
        if c.balance:
            kept = largest(z, 1) if c.first else self.choice.kept(z)
            total = total + c.balance * losses.balance(z, kept, flow.mask)
        if c.z:
            total = total + c.z * losses.z_square(z, flow.mask)
        if c.localized:
            what = f"{self.path}: the localized balance loss reads each sample's type, 0 or 1"
            types = condition_of(flow, 2, what, z.device)
            mask = None if flow.mask is None else flow.mask.reshape(len(types), -1)
            shared = per_sample(weights, len(types), what)
            total = total + c.localized * losses.localized(shared, types, mask, c.gap)
        return total


class Blocks(Mixture):
    """q = (ω ⊗ 1) ⊙ h: a rank gate that is constant within each expert's block."""

    form: Epilogue | None = None

    @property
    def epilogue(self) -> str:  # type: ignore[override]
        """Say which fused form serves: the rank gate's, for a softmax without a loss due."""
        due = self.charge.due() and self.training
        return "linear" if self.choice.kind == "softmax" and not due else "python"

    def fused(self) -> Epilogue:
        """Return the operator's form; made anew only when something of it changed."""
        k, r, e = self.choice.k * self.ranks, self.ranks, self.form
        if torch.compiler.is_compiling() or e is None or (e.k, e.block) != (k, r):
            e = Epilogue(kind="linear", k=k, block=r, score="softmax", total=r)
            if not torch.compiler.is_compiling():
                self.form = e
        return e

    def gates_of(self, h: Tensor, z: Tensor | None) -> Tensor:
        """Return the gate of every rank, (*, E r_e) in fp32, as evaluation uses it."""
        assert z is not None
        return self.choice.weights(z).repeat_interleave(self.ranks, dim=-1)

    def spread(self, weights: Tensor, h: Tensor) -> Tensor:
        return each(weights, h)


class Expand(Mixture):
    """q = ω ⊗ h: all experts share the r_e rows of A and differ in their columns of B."""

    def __init__(
        self,
        site: Site,
        experts: int,
        ranks: int,
        choice: Choice,
        charge: losses.Charge = losses.NOTHING,
    ) -> None:
        super().__init__(site, experts, ranks, choice, charge)
        self.widths = (ranks, experts * ranks)

    def spread(self, weights: Tensor, h: Tensor) -> Tensor:
        return (weights[..., None] * h[..., None, :]).flatten(-2)


class Merged(Mixture):
    """q = ω ⊗ Σ_e ω_e h_e: (Σ ω_e B_e)(Σ ω_e A_e) x, experts averaged before use.

    No averaged matrix is formed: A x of all experts is averaged instead, r_e numbers a token.
    """

    def spread(self, weights: Tensor, h: Tensor) -> Tensor:
        shared = (weights[..., None] * h.unflatten(-1, (self.experts, -1))).sum(-2)
        return (weights[..., None] * shared[..., None, :]).flatten(-2)


class TaskGate(Core):
    """q = (ω ⊗ 1) ⊙ h with ω = softmax(G e_τ), the same for every token of a sample of task τ.

    e_τ is row τ of a table (tasks, width), G (E, width); both belong to this layer.

    Args:
        site: where the core sits.
        experts: E >= 1.
        ranks: r_e >= 1.
        tasks: how many tasks there are, >= 1; ids are 0..tasks-1.
        width: length of a task's embedding, >= 1.
    """

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "table": (None, None),
        "router.weight": ("expert", None),
    }
    merges = "per-condition"

    def __init__(self, site: Site, experts: int, ranks: int, tasks: int, width: int) -> None:
        super().__init__()
        self.widths = (experts * ranks, experts * ranks)
        self.ranks = ranks
        self.table = nn.Parameter(torch.empty(tasks, width))
        self.router = Router(experts, width)
        self.what = f"{site.path}: the gate reads each sample's task"

    def fill(self, rng: torch.Generator) -> None:
        """Draw the table from N(0, 1), the law of nn.Embedding, and G."""
        self.table.copy_(torch.empty(self.table.shape).normal_(generator=rng))
        self.router.fill(rng)

    def weights(self, tasks: Tensor) -> Tensor:
        """Return ω (batch, E) of task ids (batch,)."""
        return F.linear(self.table[tasks], self.router.weight).softmax(-1)

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return (ω ⊗ 1) ⊙ h; `flow.condition` holds the task of each sample.

        Raises:
            ConfigError: if it is missing, or an id is out of range.
        """
        tasks = condition_of(flow, len(self.table), self.what, h.device)
        weights = self.weights(tasks)[:, None]
        shared = per_sample(h, len(tasks), self.what)
        return each(weights.expand(*shared.shape[:-1], -1), shared).to(h.dtype).reshape(h.shape)

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return diag(ω ⊗ 1) of one task.

        Raises:
            MergeError: without a task, or with several.
            ConfigError: if the id is out of range.
        """
        if condition is None:
            raise MergeError(
                f"{self.what}, so no single matrix serves all of them; merge for one task by "
                "polyrank.merge(model, condition=torch.tensor([task])), or stay unmerged"
            )
        tasks = ids(torch.as_tensor(condition).reshape(-1, 1), len(self.table), self.what).unique()
        if len(tasks) != 1:
            raise MergeError(
                f"merge: got the tasks {tasks.tolist()}, expected one; base weights can hold the "
                "update of one task alone"
            )
        return self.weights(tasks.to(self.table.device))[0].repeat_interleave(self.ranks).diag()


class Mixer(Core):
    """q = M h, M (r, r) trained: every row of A meets every column of B; merges exactly."""

    axes: ClassVar[dict[str, tuple[str | None, ...]]] = {"weight": ("rank", "rank")}

    def __init__(self, r: int) -> None:
        super().__init__()
        self.widths = (r, r)
        self.weight = nn.Parameter(torch.empty(r, r))

    def fill(self, rng: torch.Generator) -> None:
        """Draw U(±1/√r), Kaiming uniform with a = √5."""
        bound = 1 / math.sqrt(len(self.weight))
        self.weight.copy_(torch.empty(self.weight.shape).uniform_(-bound, bound, generator=rng))

    def forward(self, h: Tensor, z: Tensor | None, flow: Flow) -> Tensor:
        """Return M h."""
        return F.linear(h, self.weight.to(h.dtype))

    def delta(self, condition: Tensor | None = None) -> Tensor:
        """Return M."""
        return self.weight
