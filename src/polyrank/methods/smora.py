"""SMoRA: every rank of one LoRA is an expert, and each token chooses k of them.

Idea: a mixture of LoRAs is one wide LoRA whose ranks are switched on in blocks; make the block a
    single rank.
Maths: y = W x + b + s · B (g(x) ⊙ A x);  z = W_g x,  p = σ(z),  Ω = the k largest of p + b (ties:
    lower index),  g_i = k · p_i / Σ_Ω p_j on Ω, else 0;  s = alpha / k. Balance after each update:
    b_i += u · sign(mean(c) − c_i).
Source: arXiv:2501.15103, section 3, and the released module.
Differs from the released code: the bias balances and does not weigh (`bias_in_weight=True` gives
    theirs); it is never trained by the optimiser; counts are summed over an update and over
    processes, never twice under gradient checkpointing (`balance_every="micro_batch"` steps after
    every forward); disabled adapters return the base output.
Limits: no exact merge, as the gate depends on the token. Cost: r (d_in + d_out) + (r / block) d_in.
Status: formula and balancing tested; the paper's accuracies not verified; on the digits stream it
    forgets as sequential LoRA does, since nothing in it protects old tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from polyrank.frame import Adapter, Core, Method, Rule, Site, register
from polyrank.parts.cores import RankGate
from polyrank.parts.routers import warn_of_idle_router
from polyrank.parts.rules import Balance

GATES = {"sigmoid_sum": "sigmoid", "softmax_topk": "softmax"}


@register
@dataclass(frozen=True, kw_only=True)
class SMoRA(Method):
    """Single-ranked mixture of experts.

    Args:
        r: ranks per layer.
        k: active ranks per token, 1 <= k <= r.
        block: ranks that are chosen together; divides r and k.
        alpha: numerator of the scaling, which divides by k.
        gate: "sigmoid_sum" (σ(z) over its sum) or "softmax_topk" (softmax over the chosen logits).
        bias_in_weight: whether the balance bias enters the gate's value.
        gate_sum: what the gates of a token sum to: "k" or "1".
        balance: step u of the balance bias, >= 0; 0 switches balancing off.
        balance_every: "step", once per update, or "micro_batch", after every training forward.
    """

    r: int = 64
    k: int = 8
    block: int = 1
    scaling: str | float = "alpha/k"
    gate: str = "sigmoid_sum"
    bias_in_weight: bool = False
    gate_sum: str = "k"
    balance: float = 1e-4
    balance_every: str = "step"

    merges = "never"
    choices: ClassVar = {
        "gate": tuple(GATES),
        "gate_sum": ("k", "1"),
        "balance_every": ("step", "micro_batch"),
    }
    least: ClassVar = {"balance": 0}

    def __post_init__(self) -> None:
        warn_of_idle_router(self.k, self.block, self.r)

    def problems(self) -> Iterator[str]:
        """Check how r, k and block fit."""
        if not 1 <= self.k <= self.r:
            yield f"k: got {self.k}, expected 1..r={self.r}; k counts active ranks"
        if self.block < 1 or self.r % self.block or self.k % self.block:
            yield (
                f"block: got {self.block}, expected a divisor of r={self.r} and of k={self.k}; "
                "1 always fits"
            )

    def core(self, site: Site) -> Core:
        """Return the rank gate of one layer."""
        return RankGate(
            site,
            k=self.k,
            block=self.block,
            score=GATES[self.gate],
            total=self.k if self.gate_sum == "k" else 1,
            balance=self.balance > 0,
            bias_in_weight=self.bias_in_weight,
            rate=self.balance if self.balance_every == "micro_batch" else 0.0,
        )

    def rules(self) -> list[Rule]:
        """Balance once per update."""
        return [Balance(self.balance)] if self.balance > 0 and self.balance_every == "step" else []

    def parameters_per_site(self, site: Site) -> int:
        """r (d_in + d_out) + (r / block) d_in."""
        return site.r * (site.d_in + site.d_out) + site.r // self.block * site.d_in

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the spread of the balance bias, where it can move, beside the size of B."""
        found = super().vital_sign(adapter)
        if self.balance and self.k < self.r:
            biases = [layer.core.get_parameter("balance_bias") for layer in adapter.layers]
            found["bias_spread"] = float(torch.stack([b.detach().std() for b in biases]).mean())
        return found

    @classmethod
    def samples(cls) -> list[Method]:
        """All four gates, blocks, both sums, no balancing, the released module."""
        return [
            cls(r=8, k=2),
            cls(r=8, k=4, block=2, gate="softmax_topk"),
            cls(r=8, k=2, bias_in_weight=True, balance_every="micro_batch", balance=1e-5),
            cls(r=8, k=2, gate="softmax_topk", bias_in_weight=True, gate_sum="1", balance=1e-2),
            cls(r=8, k=8, balance=0.0, dropout=0.1),
        ]
