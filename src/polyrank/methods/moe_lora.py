"""Mixtures of LoRA experts on linear layers: one method, eleven routers, the baselines of smora.

Idea: several small LoRAs share a layer; a router says how much of each a token, or a task, gets.
Maths: y = W x + b + s Σ_e ω_e B_e A_e x = W x + b + s B ((ω ⊗ 1) ⊙ A x);  z = W_g x,  s = α / r_e.
    ω of soft, loramoe: softmax(z); topk, mola: of the k largest z; top1: softmax(z) at the largest;
    topp: softmax(z) down to the sum top_p; top1_gumbel: softmax((z + Gumbel) / tau) in training,
    then one-hot; task: softmax(G e_task). hydra: soft with one A; smear: (Σ ω_e B_e)(Σ ω_e A_e);
    moslora: B M A. Each layer adds aux · E Σ_e f_e P_e (f_e: share of the tokens choosing e, P_e:
    mean softmax(z)) + z_loss · mean logsumexp(z)² + beta · Var(I ⊙ Q) / mean(I ⊙ Q)² (Q: Σ_t ω).
Source: arXiv:2312.09979 (loramoe), 2402.08562 (mola), 2310.18339 (task), 2404.19245 (hydra),
    2306.03745 (smear), 2406.11909 (moslora), 2404.15159 (topp, aux, z_loss), and the released
    module of 2501.15103 (soft, topk, top1_gumbel).
Differs from the released code: gates in fp32; losses skip padding and are summed over layers, where
    theirs averages aux over layers; router and experts see one dropped-out x; batch first.
Limits: single linear layers; moslora merges, task for one task. Cost: r (d_in + d_out) + E d_in.
Status: every form and loss tested against mixtures written out; MixLoRA is a method of its own; the
    papers' accuracies are not verified here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Core, Init, Method, Site, register
from polyrank.parts.catalogue import ROUTERS, Row, misfits, mixture
from polyrank.parts.inits import Gaussian
from polyrank.parts.losses import Charge
from polyrank.parts.routers import warn_of_idle_router


@register
@dataclass(frozen=True, kw_only=True)
class MoELoRA(Method):
    """Mixture of LoRA experts.

    Args:
        router: soft, topk, top1, top1_gumbel, topp, loramoe, mola, hydra, smear, task or moslora.
        experts: E >= 1.
        r: ranks, of the layer or of each expert as `rank_per` says.
        rank_per: "total": r_e = r / E; "expert": r_e = r.
        k: EXPERTS per token of topk and mola, 1 <= k <= E.
        scaling: "alpha/r_e", or "alpha/r" for all E r_e ranks (task as released), or a number.
        tau: temperature of top1_gumbel (None: 0.1) or of topp's probabilities (None: 1), > 0.
        top_p: probability that topp gathers, in (0, 1].
        aux: coefficient of the balance loss, >= 0.
        aux_form: "mixtral": all choices of a token count; "switch": the first.
        z_loss: coefficient of the z-loss, >= 0.
        beta: coefficient of loramoe's balance, >= 0; the condition holds sample types, 0 or 1.
        delta: its gap δ between a type's own experts and the others, >= 0.
        experts_by_depth: E of equal shares of the blocks, from below, such as (2, 4, 6, 8).
        tasks: how many tasks the router task knows; the condition holds 0..tasks-1.
        task_width: length of a task's embedding, >= 1.
    """

    router: str = "topk"
    experts: int = 8
    r: int = 64
    rank_per: str = "total"
    k: int = 2
    scaling: str | float = "alpha/r_e"
    tau: float | None = None
    top_p: float = 0.8
    aux: float = 0.0
    aux_form: str = "mixtral"
    z_loss: float = 0.0
    beta: float = 0.0
    delta: float = 0.1
    experts_by_depth: tuple[int, ...] = ()
    tasks: int = 0
    task_width: int = 64

    merges = "never"
    scalings = ("alpha/r_e", "alpha/r", "alpha/sqrt(r)", "alpha")
    choices: ClassVar = {
        "router": tuple(ROUTERS),
        "rank_per": ("total", "expert"),
        "aux_form": ("mixtral", "switch"),
    }
    least: ClassVar = {"experts": 1, "aux": 0, "z_loss": 0, "beta": 0, "delta": 0, "task_width": 1}

    def __post_init__(self) -> None:
        row, counts = self.row(), self.experts_by_depth
        needs = {"task": {"task_id"}}.get(self.router, {"condition"} if self.beta else set())
        for name, value in {
            "merges": row.form.merges,
            "needs": frozenset(needs),
            "experts_by_depth": tuple(counts) if isinstance(counts, list) else counts,
        }.items():
            object.__setattr__(self, name, value)
        if row.on == "k":
            warn_of_idle_router(self.k, 1, self.experts)

    def row(self) -> Row:
        """Return the catalogue's row; an unknown router, which is a problem, reads as soft."""
        return ROUTERS.get(self.router, ROUTERS["soft"])

    def problems(self) -> Iterator[str]:
        """Check how options fit together, and that the router reads those that are set."""
        yield from misfits(self.router, self.options())

    def shape(self, site: Site) -> tuple[int, int]:
        """Return (E, r_e); a site outside of any block has `experts`.

        Raises:
            ConfigError: if the experts cannot share the site's ranks evenly.
        """
        counts, E = self.experts_by_depth, self.experts
        if counts and site.depth >= 0:
            E = counts[site.depth * len(counts) // site.depths]
        E = E if self.router != "moslora" else 1
        if self.rank_per == "total" and site.r % E:
            raise ConfigError(
                f"r for {site.path!r}: got {site.r}, expected a multiple of {E} experts; "
                "change rank_pattern, or count ranks with rank_per='expert'"
            )
        return E, site.r if self.rank_per == "expert" else site.r // E

    def scale(self, site: Site) -> float:
        """Return s."""
        E, r_e = self.shape(site)
        if self.scaling == "alpha/r_e":
            return site.alpha / r_e
        return super().scale(replace(site, r=E * r_e))

    def core(self, site: Site) -> Core:
        """Return the mixture of one layer."""
        return mixture(
            site,
            self.row(),
            *self.shape(site),
            k=self.k,
            tau=self.tau,
            top_p=self.top_p,
            charge=Charge(self.aux, self.aux_form == "switch", self.z_loss, self.beta, self.delta),
            tasks=self.tasks,
            width=self.task_width,
        )

    def steered(self) -> bool:
        """Its losses, injected in backward, must know the micro-batches of an update."""
        return bool(self.aux or self.z_loss or self.beta) or super().steered()

    def init(self) -> Init:
        """MOELoRA draws A from N(0, 0.01²), the others as LoRA does."""
        return Gaussian(0.01) if self.router == "task" else super().init()

    def condition(self, batch: dict[str, Any], base_forward: Any = None) -> Tensor | None:
        """Return the batch's "condition"; to the router task, its "task" will do."""
        given = super().condition(batch, base_forward)
        return batch.get("task") if given is None and self.router == "task" else given

    def parameters_per_site(self, site: Site) -> int:
        """(r_e if hydra, else E r_e) d_in + E r_e d_out + the router's or the mixer's own."""
        E, r_e = self.shape(site)
        rows = r_e if self.router == "hydra" else E * r_e
        own = {"task": (self.tasks + E) * self.task_width, "moslora": r_e**2}
        return rows * site.d_in + E * r_e * site.d_out + own.get(self.router, E * site.d_in)

    @classmethod
    def samples(cls) -> list[Method]:
        """Every router, both counts of ranks, every loss."""
        plain = ("soft", "topk", "top1_gumbel", "hydra", "smear", "moslora")
        rows: list[dict[str, Any]] = [
            *({"router": name} for name in plain),
            {"k": 3, "aux": 1e-2, "z_loss": 1e-3, "scaling": "alpha/r", "dropout": 0.1},
            {"router": "top1", "aux": 1e-2, "aux_form": "switch"},
            {"router": "topp", "top_p": 0.6, "tau": 1.5, "rank_per": "expert", "r": 2},
            {"router": "loramoe", "beta": 0.1},
            {"router": "mola", "experts_by_depth": (2, 4)},
            {"router": "task", "tasks": 3, "scaling": "alpha/r"},
        ]
        return [cls(**{"r": 8, "experts": 4, **row}) for row in rows]
