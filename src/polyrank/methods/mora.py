"""MoRA (MoRAM): ranks that select themselves, from a bank that grows by r ranks a task.

Idea: a rank is a memory, its row of A the key and its column of B the value; how strongly a token
    answers to the key decides how much of the value is read, so that no router is needed and the
    ranks of old tasks, frozen, stay within reach. Not MoRA "High-Rank Updating", arXiv:2405.12130.
Maths: z = A x over all R = r t ranks, s = z / max(‖z‖, eps), w = softmax(s / tau) over the k
    largest s, 0 elsewhere and, in evaluation, where s < delta (not normalised again);
    y = W x + b + c · B (w ⊙ z). The r ranks of the task train; a task begins by freezing the last
    ones and adding r: A Kaiming uniform, B = 0. k below 2 counts as 2: with one rank w = 1, and
    nothing teaches the selection.
Source: arXiv:2506.21035 and both released programs: presets "x-tail" and "trace".
Differs from the released code: frozen ranks keep c, and no evaluation holds untrained ranks; their
    program for language models halves a task that has ended and grows when it saves
    (`released=True`).
Limits: no merge. Growing changes answers at once although B = 0: new keys enter norm, choice and
    softmax, and with R a given tau weighs more evenly. A new rank that no token puts among its k
    learns nothing; the vital sign `reached` tells. `layers.compact` drops values that cannot
    matter, of which digits has none: independent keys, as R <= d_in mostly are, can all be reached.
    Cost: r (d_in + d_out) a task and layer, all of them kept; time at most linear in R, with ten
    tasks 0.6 of that of ten LoRAs of PEFT (bench/mora_cost.py).
Status: formula, growth and resumption tested; the paper's figures not verified; on digits (recipe
    mora, 3 seeds) it forgets 0.30 among a task's own classes, sequential LoRA of the same r 0.38
    (one seed says the reverse), and as much among all classes, 0.97 and 0.96; rows of every task
    read the ranks of all tasks alike.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from polyrank.errors import ConfigError
from polyrank.frame import SCALINGS, Adapter, Boundary, Core, Method, Site, register
from polyrank.parts.boundaries import Append
from polyrank.parts.selfgate import SelfGate


@register
@dataclass(frozen=True, kw_only=True)
class SelfActivatedRanks(Method):
    """Self-activated sparse mixture of ranks.

    Args:
        r: ranks of a task.
        k: ranks that a token keeps out of all there are, >= 1; None keeps as many as a task has.
        tau: temperature of the softmax over kept ranks, > 0; 0.01 to 0.1 are common.
        delta: threshold on s in evaluation, in [0, 1]; 0 switches it off, up to 0.3 is common.
        eps: lower bound of the norm, > 0; one program has 1e-12, the other 1e-8.
        alpha: numerator of the scaling c.
        scaling: of c; "alpha" takes it as it is.
        strict: whether k = 1 is an error, or counts as 2 as in both programs.
        released: whether frozen ranks lose c and a task that ends adds ranks, as theirs for text.
    """

    r: int = 16
    k: int | None = None
    tau: float = 0.01
    delta: float = 0.2
    eps: float = 1e-12
    alpha: float = 1.0
    scaling: str | float = "alpha"
    strict: bool = False
    released: bool = False

    merges = "never"
    needs = frozenset({"boundary"})
    scalings: ClassVar = tuple(word for word in SCALINGS if word != "alpha/k")
    presets: ClassVar = {
        "x-tail": {"r": 16, "k": 16, "tau": 0.01, "delta": 0.2, "alpha": 1.0},
        "trace": {
            "r": 8, "k": 8, "tau": 0.03, "delta": 0.2, "eps": 1e-8, "alpha": 2.0, "dropout": 0.1
        },
    }  # fmt: skip

    def problems(self) -> Iterator[str]:
        """Check the gate."""
        # Of an r that is no number, its own check tells.
        k, said = (self.r or 1, ", as many as r") if self.k is None else (self.k, "")
        least = 2 if self.strict else 1
        if not isinstance(k, numbers.Integral) or isinstance(k, bool):
            yield f"k: got {k!r}, expected an integer, or null for as many as r"
        elif k < least:
            yield f"k: got {k}{said}, expected >= {least}; one rank alone teaches no selection"
        if not self.tau > 0:
            yield f"tau: got {self.tau}, expected > 0; 0.01 to 0.1 are common"
        if not 0 <= self.delta <= 1:
            yield f"delta: got {self.delta}, expected 0..1; it bounds a cosine, 0 switches it off"
        if not self.eps > 0:
            yield f"eps: got {self.eps}, expected > 0; use 1e-12"

    def core(self, site: Site) -> Core:
        """Return the gate of one layer."""
        k = site.r if self.k is None else int(self.k)
        if self.strict and k < 2:
            raise ConfigError(f"k at {site.path!r}: got {k}, the rank there, expected >= 2; set k")
        given = {"tau": self.tau, "delta": self.delta, "eps": self.eps}
        return SelfGate(site.r, k=k, **given, fades=self.released)

    def boundary(self) -> Boundary:
        """Freeze the last task's ranks and add new ones."""
        return Append("mora", early=self.released)

    def vital_sign(self, adapter: Adapter) -> dict[str, float]:
        """Return the size of B, and the share of live ranks that were ever chosen in training."""
        found = super().vital_sign(adapter)
        reached = [layer.B.detach().any(0).float().mean() for layer in adapter.layers]
        found["reached"] = float(torch.stack(reached).mean()) if reached else 0.0
        return found

    @classmethod
    def samples(cls) -> list[Method]:
        """Sparse, with a threshold; as released for language models."""
        return [
            cls(r=4, k=3, tau=0.1, delta=0.2),
            cls(r=4, k=8, tau=0.3, alpha=2.0, dropout=0.1, released=True),
        ]
