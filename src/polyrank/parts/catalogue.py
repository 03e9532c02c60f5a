"""The routers of mixtures as rows of one table, and what their settings must satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

from polyrank.frame import Core, Site
from polyrank.parts.cores import RankGate
from polyrank.parts.losses import Charge
from polyrank.parts.mixtures import Blocks, Expand, Merged, Mixer, Mixture, TaskGate
from polyrank.parts.routers import Choice

_READS = ("aux", "z_loss", "experts_by_depth")


class Row(NamedTuple):
    """One router.

    Attributes:
        form: how experts combine.
        kind: how logits become weights, see `Choice`.
        on: the experts of a token: "all", "k", or as many as the kind says ("some").
        tau: temperature if none is asked for.
        reads: of the settings that only some routers read, those that this one reads.
    """

    form: type[Core]
    kind: str = ""
    on: str = "all"
    tau: float = 1.0
    reads: tuple[str, ...] = _READS


ROUTERS = {
    "soft": Row(Blocks, "softmax"),
    "topk": Row(Blocks, "softmax", "k"),
    "top1": Row(Blocks, "top1", "some"),
    "top1_gumbel": Row(Blocks, "gumbel", "some", tau=0.1, reads=(*_READS, "tau")),
    "topp": Row(Blocks, "top_p", "some", reads=(*_READS, "tau")),
    "loramoe": Row(Blocks, "softmax", reads=(*_READS, "beta")),
    "mola": Row(Blocks, "softmax", "k"),
    "hydra": Row(Expand, "softmax"),
    "smear": Row(Merged, "softmax"),
    "task": Row(TaskGate, reads=("tasks", "experts_by_depth")),
    "moslora": Row(Mixer, reads=()),
}


def mixture(
    site: Site,
    row: Row,
    experts: int,
    ranks: int,
    *,
    k: int,
    tau: float | None,
    top_p: float,
    charge: Charge,
    tasks: int,
    width: int,
) -> Core:
    """Return the core of one layer: E experts of r_e ranks, k of them on if the row says so."""
    if row.form is Mixer:
        return Mixer(experts * ranks)
    if row.form is TaskGate:
        return TaskGate(site, experts, ranks, tasks, width)
    k = k if row.on == "k" else experts
    if row.form is Blocks and row.kind == "softmax" and not charge.due():
        whole = replace(site, r=experts * ranks)
        return RankGate(
            whole, k=k * ranks, block=ranks, score="softmax", total=ranks, balance=False
        )
    choice = Choice(row.kind, k=k, tau=tau or row.tau, top_p=top_p)
    return cast("type[Mixture]", row.form)(site, experts, ranks, choice, charge)


def misfits(router: str, got: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a router's settings, beyond their types and smallest values."""
    if router == "mixlora":
        yield (
            "router: mixlora weighs whole FFN experts behind their non-linearity, which no mixture "
            "on a linear layer can do; use the method mixlora"
        )
    if got["tau"] is not None and (not isinstance(got["tau"], (int, float)) or not got["tau"] > 0):
        yield f"tau: got {got['tau']!r}, expected a number > 0; leave it out for the router's own"
    if not 0 < got["top_p"] <= 1:
        yield f"top_p: got {got['top_p']}, expected 0 < top_p <= 1; 1 keeps all experts"
    if router not in ROUTERS:
        return
    row = ROUTERS[router]
    for name in sorted({name for other in ROUTERS.values() for name in other.reads}):
        if got[name] and name not in row.reads:
            users = ", ".join(other for other in ROUTERS if name in ROUTERS[other].reads)
            yield f"{name}: router {router!r} does not read it; leave it out, or use {users}"
    if router == "task" and got["tasks"] < 1:
        yield f"tasks: got {got['tasks']}, expected how many tasks there are, >= 1"
    if row.reads:
        yield from _shares(row, got)


def _shares(row: Row, got: Mapping[str, Any]) -> Iterator[str]:
    """Yield what does not fit between experts, ranks, choices and losses."""
    counts = got["experts_by_depth"] or [got["experts"]]
    if not isinstance(counts, list) or not all(isinstance(n, int) and n > 0 for n in counts):
        if got["experts_by_depth"]:
            yield f"experts_by_depth: got {counts!r}, expected integers >= 1, one for each share"
        return
    if row.on == "k" and not 1 <= got["k"] <= min(counts):
        yield f"k: got {got['k']}, expected 1..{min(counts)}; k counts active experts, not ranks"
    if got["rank_per"] == "total" and any(got["r"] % count for count in counts):
        yield (
            f"r: got {got['r']}, expected a multiple of the experts {counts}, which share it; "
            "rank_per='expert' gives each expert r ranks"
        )
    if got["beta"] and any(count % 2 for count in counts):
        yield (
            f"experts: got {counts}, expected even numbers, since beta gives one half of them to "
            "each type of sample; change experts or leave beta out"
        )
    dense = row.on == "all" or (row.on == "k" and got["k"] >= max(counts))
    if got["aux"] > 0 and got["aux_form"] == "mixtral" and dense:
        yield (
            "aux: every expert serves every token, so the loss is constant; use "
            "aux_form='switch', z_loss, or a router that leaves experts out"
        )
