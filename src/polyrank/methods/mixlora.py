"""MixLoRA: one frozen FFN serves as E experts, each with LoRA updates of its own; attention LoRA.

Idea: experts that differ behind the non-linearity can specialise more than experts of one layer.
Maths: FFN(x) = Σ_e ω_e E_e(x),  E_e(x) = (W2 + s B²_e A²_e) a_e,  a_e = act((W1 + s B¹_e A¹_e) x)
    ⊙ ((W3 + s B³_e A³_e) x), or act(…) alone in an FFN of two layers;  z = W_g x,  s = alpha / r.
    ω of topk: softmax of the k largest z; topp: softmax(z) / tau from the largest down to the sum
    top_p, not renormalised; switch: softmax(z) at the largest. Added: aux · E Σ_e F_e P_e, F_e the
    tokens that choose e (k choices each), P_e the mean softmax(z); z_loss · mean logsumexp(z)².
    Computed as W1 x and W3 x once, W2 once on Σ_e ω_e a_e.
Source: arXiv:2404.15159; topp and switch are those of the released code.
Differs from the released code: jitter reaches the router alone, there the experts too; the switch
    form drops nobody in evaluation, there the whole FFN; padding takes no place in an expert; the
    weights of topp and of switch sum to less than one, so that these two do not start as the base.
Limits: dense FFNs of gate, up and down, or of two layers, known by name and checked by value; not
    on mixtures of experts; never merges. Cost: E r (d_in + d_out) weights a layer, E d a router;
    E = 8, k = 2, r = 16 on one CPU core take 1.2 times plain LoRA's time at d = 2048 and 2.5 times
    at 256, a loop over experts 2.7 and 2.4 times (`bench/mixlora_cost.py`).
Status: equal to a loop over experts; the paper's accuracies not verified. It is about multi-task
    data and protects no earlier task; three seeds beside sequential LoRA and others, on pictures
    and on texts, stand in `bench/results/streams-digits.md` and `streams-stdlib-ranks.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from polyrank.frame import Block, Core, Identity, Method, Site, register
from polyrank.parts.experts import Charge, Experts, Mixed, Skip
from polyrank.parts.ffn import form_of, hosts_expert
from polyrank.parts.routers import Choice, warn_of_idle_router

# How each router chooses, and which options it reads and the others do not.
ROUTERS = {"topk": ("softmax", ("k",)), "topp": ("top_p", ("top_p", "tau"))}
ROUTERS["switch"] = ("top1", ("capacity",))


@register
@dataclass(frozen=True, kw_only=True)
class MixLoRA(Method):
    """Mixture of FFN experts made of one FFN.

    Args:
        router: topk, topp (the dynamic form) or switch.
        experts: E >= 1.
        r: ranks of each expert in each layer of the FFN, and of each layer of the attention.
        k: experts per token of topk, 1 <= k <= E.
        top_p: probability that topp gathers, in (0, 1].
        tau: divides the probabilities of topp, > 0.
        capacity: tokens of a sequence that an expert of switch serves in training, >= 1; the others
            pass the FFN by.
        jitter: what the router reads is multiplied by U(1 ± jitter) in training, in [0, 1).
        aux: coefficient of the balance loss, >= 0.
        aux_over: "model": F and P are averaged over all FFNs before they are multiplied; "layer":
            the losses of the FFNs are averaged.
        z_loss: coefficient of the z-loss, averaged over the FFNs, >= 0.
        router_std: the router starts as N(0, router_std²), >= 0.
    """

    router: str = "topk"
    experts: int = 8
    r: int = 16
    alpha: float = 32.0
    k: int = 2
    top_p: float = 0.8
    tau: float = 1.0
    capacity: int = 32
    jitter: float = 0.0
    aux: float = 1e-3
    aux_over: str = "model"
    z_loss: float = 0.0
    router_std: float = 0.02

    merges = "never"
    scalings = ("alpha/r", "alpha/sqrt(r)", "alpha")
    choices: ClassVar = {"router": tuple(ROUTERS), "aux_over": ("model", "layer")}
    least: ClassVar = dict.fromkeys(("aux", "z_loss", "router_std", "jitter"), 0) | {
        "experts": 1,
        "capacity": 1,
    }
    presets: ClassVar = {
        "mixlora": {"dropout": 0.05},
        "dynamic": {"router": "topp", "dropout": 0.05},
        "switch": {"router": "switch", "jitter": 0.01, "z_loss": 1e-3, "router_std": 1.0},
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "neutral", self.router == "topk")
        if self.router == "topk":
            warn_of_idle_router(self.k, 1, self.experts)

    def problems(self) -> Iterator[str]:
        """Check the ranges, and that the router reads the options that were changed."""
        if not 0 < self.top_p <= 1:
            yield f"top_p: got {self.top_p}, expected 0 < top_p <= 1; 1 keeps all experts"
        if not self.tau > 0:
            yield f"tau: got {self.tau}, expected > 0; 1 leaves the probabilities as they are"
        if self.jitter >= 1:
            yield f"jitter: got {self.jitter}, expected < 1; 0.01 is common"
        if self.router == "topk" and not 1 <= self.k <= self.experts:
            yield f"k: got {self.k}, expected 1..{self.experts}; k counts experts, not ranks"
        elif self.router == "topk" and self.k == self.experts and self.aux:
            yield (
                f"aux: got {self.aux}, but with k = experts = {self.k} every expert serves every "
                "token, so the loss is constant; use aux=0, or fewer of them a token"
            )
        for name in (
            n for router, (_, own) in ROUTERS.items() if router != self.router for n in own
        ):
            if getattr(self, name) != getattr(type(self), name):
                yield f"{name}: router {self.router!r} does not read it; leave it out"

    def core(self, site: Site) -> Core:
        """Return the mark of an expert's layer, or plain LoRA outside of the FFN."""
        return Experts(site, self.experts) if hosts_expert(site) else Identity(site.r)

    def sub_block(self, site: Site) -> list[Block]:
        """Return the mixture in place of the transformer block's FFN, if that is adapted."""
        if (form := form_of(site)) is None:
            return []
        choice = Choice(ROUTERS[self.router][0], k=self.k, tau=self.tau, top_p=self.top_p)
        charge = Charge(self.aux, self.aux_over, self.z_loss)
        room = self.capacity if self.router == "switch" else 0
        options = (charge, room, self.jitter, self.router_std)
        mixed = Mixed(site, form, self.experts, choice, *options)
        return [*([Skip(form.first)] if form.first else []), mixed]

    def steered(self) -> bool:
        """Its losses, injected in backward, must know the micro-batches of an update."""
        return bool(self.aux or self.z_loss) or super().steered()

    def parameters_per_site(self, site: Site) -> int:
        """E r (d_in + d_out) in the FFN, r (d_in + d_out) outside; the routers come on top."""
        times = self.experts if hosts_expert(site) else 1
        return times * super().parameters_per_site(site)

    @classmethod
    def samples(cls) -> list[Method]:
        """Every router."""
        return [
            cls(r=2, experts=4, alpha=4),
            cls(r=2, experts=3, router="topp", top_p=0.5, aux_over="layer", dropout=0.1),
            cls(r=2, experts=3, router="switch", capacity=2, jitter=0.01, z_loss=1e-3),
        ]
