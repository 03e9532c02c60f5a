"""Adapters to adapter: pure functions of saved tensors and their config; no model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from polyrank.errors import CheckpointError, ConfigError, MergeError, RunError
from polyrank.frame import Method, Saved, Site, method
from polyrank.layers.compat import get_pattern_key
from polyrank.layers.views import wide

PREFIX = "base_model.model."
_KEY = re.compile(r"(?:base_model\.model\.)?(.+?)\.(polyrank_[A-Za-z]+)\.(.+)")
# What a LoRA keeps of the config it is made from.
_COMMON = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "fan_in_fan_out")
_MORE = ("trainable_token_indices",)
# What the replicas of an adapter have in common with it.
_SHARED = ("polyrank_shadow.", "polyrank_archive.")
Parts = dict[str, Tensor]
Factors = tuple[Tensor, Tensor]


def plain_lora(saved: Saved, *, condition: Tensor | None = None) -> Saved:
    """Return the same function as an ordinary LoRA, which any PEFT loads without polyrank.

    Per site s B δ A − s B0 δ0 A0 becomes B' A': a diagonal δ keeps the ranks with an entry that is
    not 0, A' = A[keep], B' = s (B δ)[:, keep]; any other δ gives A' = A, B' = s B δ. The bank's
    ranks come first, the shadow's last; behind a bank, ranks whose B is 0 go as well. Sites end
    with different ranks, and each has lora_alpha equal to its rank, so that the scale is 1; a site
    without ranks is left out. What was absorbed and archived is in it, for the base from before.

    A growing head becomes a module that is saved whole, for a base whose classifier has a bias and
    that many classes (`num_labels=len(plan["labels"])`).

    Args:
        saved: an adapter of polyrank.
        condition: for cores that merge per condition, the one to export for, (1, c) or (c,).

    Raises:
        MergeError: if no LoRA equals it: a core weighs tokens or gains the base, blocks stand
            beside the linear layers, or absorbed updates were not archived.
        ConfigError: if it is no adapter of polyrank, or its head is more than a linear layer.
        CheckpointError: if config and tensors disagree.
        RunError: if a factor is not finite.
    """
    config = saved.config
    if (kind := config.get("peft_type")) != "POLYRANK":
        plain = "it is already an ordinary LoRA, copy it"
        hint = plain if kind == "LORA" else "give the folder that polyrank wrote"
        raise ConfigError(
            f"export: got an adapter of type {str(kind)!r}, expected POLYRANK; {hint}"
        )
    made = method(config["method"], **config["options"])
    sites, others = _parts(saved.tensors)
    blocks = [path for path, parts in sites.items() if any("polyrank_side" in k for k in parts)]
    if blocks:
        raise MergeError(
            f"export: adapter of {made.name!r} holds {len(blocks)} blocks, the first at "
            f"{blocks[0]}, which no linear update equals; keep it as a polyrank adapter"
        )
    if lost := list(_unkept(config.get("sites") or {}, sites)):
        raise MergeError(
            f"export: updates at {len(lost)} places, such as {lost[0]}, were absorbed into the "
            "base and not kept with the adapter, which fits no other base; save the merged model, "
            "or train with archive=True"
        )
    factors = {
        path: _factors(made, config, path, parts, condition)
        for path, parts in sites.items()
        if not any("polyrank_head" in key for key in parts)
    }
    heads = {path: parts for path, parts in sites.items() if path not in factors}
    for path, parts in heads.items():
        others |= {f"{PREFIX}{path}.{key}": t for key, t in _head(made, config, parts).items()}
    found = lora_of(factors, config, others)
    labels = (config.get("head") or {}).get("names", [])
    found.plan = {"method": made.name, **found.plan, **({"labels": labels} if heads else {})}
    return found


def of_replica(saved: Saved, name: str) -> Saved:
    """Return an adapter that is what one of its replicas keeps: factors, core, head; no replicas.

    What a replica shares stays: the shadow, and what was absorbed into the base.

    Args:
        saved: an adapter of polyrank.
        name: of the replica.

    Raises:
        ConfigError: if the adapter keeps no such replica.
    """
    noted = saved.config.get("sites") or {}
    known = sorted({each for site in noted.values() for each in site.get("replicas", {})})
    if name not in known:
        raise ConfigError(
            f"replica: got {name!r}, but the adapter keeps {', '.join(known) or 'none'}; make one "
            "with polyrank.layers.replica(model, name)"
        )
    sites, found = _parts(saved.tensors)
    shapes = dict(noted)
    for path, parts in sites.items():
        if any("polyrank_head" in key for key in parts):
            kept = _below(parts, f"polyrank_headcopy.{name}") or _below(parts, "polyrank_head")
            live = {f"polyrank_head.{key}": tensor for key, tensor in kept.items()}
        else:
            live, shapes[path] = _revived(parts, noted[path], name)
        found |= {f"{PREFIX}{path}.{key}": t.clone().contiguous() for key, t in live.items()}
    config = {**saved.config, "sites": shapes}
    if (head := config.get("head")) is not None:
        names = head.get("replicas", {}).get(name, head["names"])
        config["head"] = {"module": head["module"], "names": list(names)}
    return Saved(tensors=found, config=config, plan=dict(saved.plan))


def _revived(parts: Parts, noted: Mapping[str, Any], name: str) -> tuple[Parts, dict[str, Any]]:
    """Return the tensors and the shapes of a site whose live ranks are those of a replica."""
    held, archive = _below(parts, f"polyrank_replica.{name}"), _below(parts, "polyrank_archive")
    A, B, (r, bank) = held.pop("A"), held.pop("B"), noted["replicas"][name]
    absorbed = len(archive["A"]) if archive else 0
    if absorbed and not torch.equal(A[:absorbed], archive["A"].to(A)):
        # The base held it when the replica was made, so it does not stand in that one's bank.
        absorbed = 0
    # Ranks without a value come first: A then has more rows than B has columns.
    last = B.shape[1] - (len(A) - bank)
    found = {key: t for key, t in parts.items() if key.startswith(_SHARED)}
    found |= {f"polyrank_{key}": t for key, t in held.items()}
    found |= {"polyrank_A.weight": A[bank:], "polyrank_B.weight": B[:, last:]}
    own: tuple[str, ...] = (
        "r",
        "bank",
        "bank_values",
        "segments",
        "order",
        "evaluating",
        "replicas",
    )
    own += ("core", "replica_cores")
    shapes = {**{key: value for key, value in noted.items() if key not in own}, "r": r}
    if core := noted.get("replica_cores", {}).get(name, noted.get("core")):
        shapes["core"] = core
    if bank > absorbed:
        found |= {"polyrank_bank.A": A[absorbed:bank], "polyrank_bank.B": B[:, absorbed:last]}
        shapes["bank"] = bank - absorbed
        if last != bank:
            shapes["bank_values"] = last - absorbed
    return found, shapes


def lora_of(
    factors: Mapping[str, Factors],
    config: Mapping[str, Any],
    others: Mapping[str, Tensor] | None = None,
) -> Saved:
    """Return a plain LoRA with the update B A at every site, of any ranks.

    Args:
        factors: (A (r, d_in), B (d_out, r)) by module path, the scale folded in; r may be 0.
        config: of the adapter that it comes from, for example `workshop.saved().config`.
        others: tensors of modules saved whole, by their names in a PEFT file.

    Returns:
        The adapter; its plan holds the ranks by path, 0 for sites that were left out. An adapter
        without any rank keeps one of zeros, since PEFT loads none without targets.

    Raises:
        RunError: if a factor is not finite.
    """
    others = dict(others or {})
    if bad := [p for p, pair in factors.items() if not all(t.isfinite().all() for t in pair)]:
        raise RunError(
            f"export: updates at {len(bad)} places hold NaN or infinity ({bad[0]} is the first); "
            "look for a diverged training, and lower its learning rate"
        )
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    kept = {path: pair for path, pair in factors.items() if ranks[path]}
    if not kept and factors:
        path, (A, B) = next(iter(factors.items()))
        kept = {path: (A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))}
    tensors: Parts = {}
    for path, (A, B) in kept.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B.contiguous()
    sizes = {path: A.shape[0] for path, (A, _) in kept.items()}
    r = max(sizes.values(), default=1)
    # PEFT takes the first pattern that ends a path, so longer paths must come first.
    order = sorted(sizes, key=lambda path: (-len(path), path)) if {*sizes.values()} != {r} else []
    head = (config.get("head") or {}).get("module")
    whole = {*(config.get("modules_to_save") or ())}
    if head is not None and any(key.startswith(f"{PREFIX}{head}.") for key in others):
        whole.add(head)
    about = {
        "peft_type": "LORA",
        **{key: config.get(key) for key in _COMMON},
        **{key: config[key] for key in _MORE if config.get(key)},
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(sizes),
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": {path: sizes[path] for path in order},
        "alpha_pattern": {path: sizes[path] for path in order},
    }
    about["fan_in_fan_out"] = bool(about["fan_in_fan_out"])
    return Saved(tensors={**tensors, **others}, config=about, plan={"ranks": ranks})


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Parts], Parts]:
    """Return tensors by site and name inside of it, and those that are not polyrank's."""
    sites: dict[str, Parts] = {}
    others: Parts = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            others[key] = tensor.detach().clone()
        else:
            sites.setdefault(match[1], {})[f"{match[2]}.{match[3]}"] = tensor.detach()
    return sites, others


def _below(parts: Parts, name: str) -> Parts:
    """Return what is held under a name."""
    return {k.removeprefix(f"{name}."): t for k, t in parts.items() if k.startswith(f"{name}.")}


@torch.no_grad()
def _factors(
    made: Method, config: Mapping[str, Any], path: str, parts: Parts, condition: Tensor | None
) -> Factors:
    """Return A' and B' of one site, with the scale folded into B'."""
    try:
        A, B = wide(parts["polyrank_A.weight"]), wide(parts["polyrank_B.weight"])
    except KeyError as error:
        raise CheckpointError(
            f"export: {path} has no {error.args[0]}, expected A and B; save the adapter again"
        ) from error
    site, scale = _site(made, config, path, A, B)
    core = made.core(site)
    core.configure((config.get("sites") or {}).get(path, {}).get("core", {}))
    held = [_below(parts, name) for name in ("polyrank_archive", "polyrank_bank")]
    banks = [(wide(bank["A"]), wide(bank["B"])) for bank in held if bank]
    if banks:
        core.banked(sum(rows.shape[0] for rows, _ in banks))
        A = torch.cat([*(rows for rows, _ in banks), A])
        B = torch.cat([*(columns for _, columns in banks), B], dim=1)
    try:
        core.load_state_dict(_below(parts, "polyrank_core"), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"export: {path}: the core {type(core).__name__} does not take the saved tensors "
            f"({' '.join(str(error).split())}); save the adapter again with the method as it is now"
        ) from error
    if core.merges == "never" or core.base_gain() is not None:
        why = "weighs ranks for each token" if core.merges == "never" else "gains the base's output"
        raise MergeError(
            f"export: the core {type(core).__name__} of {made.name!r} {why}, so that no LoRA "
            "equals it; keep it as a polyrank adapter"
        )
    delta = core.delta(condition).detach().to(B)
    if delta.shape != (B.shape[1], A.shape[0]):
        raise CheckpointError(
            f"export: {path}: got A {tuple(A.shape)}, B {tuple(B.shape)} and a core of "
            f"{tuple(delta.shape)}, which do not fit; save the adapter again with its config"
        )
    B = scale * (B @ delta)
    if delta.shape[0] == delta.shape[1] and torch.equal(delta, torch.diag(delta.diagonal())):
        keep = delta.diagonal() != 0
        if banks:
            # Ranks that were drawn anew after the last task, and have not learnt anything yet.
            keep &= (B != 0).any(dim=0)
        A, B = A[keep], B[:, keep]
    shadow = _below(parts, "polyrank_shadow")
    if not shadow and (config.get("sites") or {}).get(path, {}).get("shadow"):
        raise CheckpointError(
            f"export: {path} lacks the factors that its start subtracts (polyrank_shadow), without "
            "which the update is another one; save the adapter again"
        )
    if shadow:
        A = torch.cat([A, _left(shadow.get("delta"), wide(shadow["A"]))])
        B = torch.cat([B, -scale * wide(shadow["B"])], dim=1)
    return A.clone(), B.clone()


def _unkept(sites: Mapping[str, Any], parts: Mapping[str, Parts]) -> Iterator[str]:
    """Yield the sites whose absorbed updates are in a base weight alone."""
    for path, noted in sites.items():
        held = parts.get(path, {})
        if noted.get("witness") is not None and not _below(held, "polyrank_archive"):
            yield path


def _left(delta: Tensor | None, A: Tensor) -> Tensor:
    """Return δ0 A0 for δ0 a matrix, a diagonal, a number or none."""
    if delta is None:
        return A
    delta = delta.to(A)
    return delta @ A if delta.dim() == 2 else delta.reshape(-1, 1) * A


def _site(
    made: Method, config: Mapping[str, Any], path: str, A: Tensor, B: Tensor
) -> tuple[Site, float]:
    """Return where a saved adapter sits, and its scale there."""
    noted = (config.get("sites") or {}).get(path, {})
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    r = noted.get("r", ranks.get(get_pattern_key(list(ranks), path)))
    site = Site(
        path=path,
        d_in=A.shape[1],
        d_out=B.shape[0],
        r=made.r if r is None else r,
        alpha=float(alphas.get(get_pattern_key(list(alphas), path), made.alpha)),
    )
    site = site if r is not None else replace(site, r=made.ranks(site))
    return site, float(noted.get("scale", made.scale(site)))


def _head(made: Method, config: Mapping[str, Any], parts: Parts) -> Parts:
    """Return weight and bias of the growing head; its replicas are left out."""
    found = _below(parts, "polyrank_head")
    names = cast("dict[str, Any]", config["head"])["names"]
    weight = found.get("weight")
    plain = weight is not None and weight.dim() == 2 and {*found} == {"weight", "bias"}
    if not plain or made.head(names, cast("Tensor", weight).shape[1]) is not None:
        raise ConfigError(
            f"export: the head of {made.name!r} is more than a linear layer ({sorted(found)}), "
            "expected weight and bias; keep it as a polyrank adapter"
        )
    return {key: wide(tensor).clone() for key, tensor in found.items()}
