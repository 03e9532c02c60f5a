"""What users call on a model: adapt, load, merge, swap, look through a view."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from polyrank.errors import CheckpointError, ConfigError, MergeError, nearest
from polyrank.frame import Group, Method
from polyrank.frame import method as make
from polyrank.layers.adapter import adapter_of
from polyrank.layers.config import PolyrankConfig
from polyrank.layers.gates import gate_statistics
from polyrank.layers.ownership import untrainable
from polyrank.layers.root import hook_of
from polyrank.layers.views import View, wide


def adapt(
    model: nn.Module,
    method: Method | str,
    target_modules: list[str] | str | None = "all-linear",
    *,
    adapter_name: str = "default",
    head: str | dict[str, Any] | None = None,
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> PeftModel:
    """Put an adapter into a model and return a `peft.PeftModel`.

    Args:
        model: the pretrained model; its weights are frozen and stay where they are.
        method: a method such as `polyrank.method("smora", r=64, k=8)`, or its name.
        target_modules: as in PEFT; None takes PEFT's defaults for the architecture.
        adapter_name: key of the adapter.
        head: module path of a classifier to replace by one that grows, or {"module": …, "names":
            […]}.
        autocast_adapter_dtype: keep factors in fp32 over a half-precision base; gates always are.
        **options: further fields of `PolyrankConfig`: rank_pattern, exclude_modules, seed …

    Raises:
        ConfigError: naming everything that is wrong with the options.
    """
    made = make(method) if isinstance(method, str) else method
    if not isinstance(made, Method):
        raise ConfigError(
            f"method: got {type(made).__name__}, expected a method such as "
            f"polyrank.method('smora', r=64, k=8)"
        )
    if wrong := _misplaced(made, options):
        raise ConfigError(wrong)
    if problems := made.checks():
        raise ConfigError([f"{made.name}: {problem}" for problem in problems])
    if not any(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules()):
        raise ConfigError(
            f"model: {type(model).__name__} has no linear layer to adapt; pass a model with "
            f"nn.Linear or Conv1D modules"
        )
    config = PolyrankConfig(
        method=made.name,
        options=made.options(),
        target_modules=target_modules,
        head={"module": head, "names": []} if isinstance(head, str) else head,
        **options,
    )
    return get_peft_model(
        cast("Any", model),
        config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )


def _misplaced(made: Method, options: dict[str, Any]) -> list[str]:
    """Say which keywords of `adapt` are no fields of the configuration."""
    known = {spec.name for spec in fields(PolyrankConfig)}
    own = {spec.name for spec in fields(made)}
    return [
        f"adapt: {name!r} is an option of the method; write method('{made.name}', {name}=...)"
        if name in own
        else f"adapt: unknown option {name!r};{nearest(name, known) or ' see PolyrankConfig'}"
        for name in options
        if name not in known
    ]


def load(model: nn.Module, path: str | Path, **options: Any) -> PeftModel:
    """Load a saved adapter onto a base model: `PeftModel.from_pretrained`, polyrank's type known.

    Args:
        model: the base model that the adapter was trained on.
        path: folder with adapter_config.json and adapter_model.safetensors, or a hub id.
        **options: passed on, `adapter_name`, `is_trainable` …

    Raises:
        CheckpointError: if config and tensors disagree.
    """
    return PeftModel.from_pretrained(cast("Any", model), str(path), **options)


def hotswap(model: PeftModel, path: str | Path, *, adapter_name: str = "default") -> None:
    """Copy a saved adapter into one that is in the model; no module is made, compiled code stays.

    Raises:
        CheckpointError: if the saved adapter has another method, other options or other shapes.
    """
    held = cast("PolyrankConfig", model.peft_config[adapter_name])
    found = cast("PolyrankConfig", PolyrankConfig.from_pretrained(str(path)))
    keys = ("method", "options", "target_modules", "rank_pattern", "alpha_pattern", "sites", "head")
    differ = [key for key in keys if getattr(held, key) != getattr(found, key)]
    if differ:
        raise CheckpointError(
            f"hotswap: the saved adapter differs from {adapter_name!r} in {', '.join(differ)}; "
            "delete the adapter and load the new one with model.load_adapter"
        )
    weights = load_peft_weights(str(path), device=str(next(model.parameters()).device))
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)


@contextmanager
def view(model: nn.Module, name: str) -> Iterator[None]:
    """Show another view of the model: "base", or a replica by name; nothing else changes."""
    with _flow(model).put(view=name):
        yield


@contextmanager
def conditioned(model: nn.Module, condition: Tensor) -> Iterator[None]:
    """Give conditioned cores what they read, (batch, c), in all forwards inside, `generate` too."""
    with _flow(model).put(ambient=condition, condition=condition):
        yield


def _flow(model: nn.Module) -> Any:
    hook = hook_of(model)
    if hook is None:
        raise ConfigError(
            "model: no polyrank adapter found; make one with polyrank.adapt(model, method)"
        )
    return hook.flow


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    adapter: str | None = None,
    groups: Iterable[Group] | None = None,
) -> list[dict[str, Any]]:
    """Return the groups that a torch optimiser needs for a method: rates, decay, gates undecayed.

    What else trains (`modules_to_save`, layers one unfroze) comes after them, vectors undecayed.
    Groups that are given, such as those of a phase, take the place of the method's.

    >>> optimizer = torch.optim.AdamW(polyrank.parameter_groups(model, lr=1e-4))  # doctest: +SKIP
    """
    found = adapter_of(model, adapter)
    active = sorted({name for view in found.layers for name in view.module.active_adapters})
    if adapter is None and len(active) > 1:
        raise ConfigError(
            f"adapters {active} are all active, and one optimiser trains one of them; name it "
            "with adapter=..., and call set_adapter with that name alone"
        )
    if not found.trained():
        raise ConfigError(
            f"adapter {found.name!r}: nothing in it trains; load it with is_trainable=True, or "
            "call set_adapter with its name"
        )
    if problems := [*untrainable(model, found)]:
        raise ConfigError(problems)
    made = []
    for group in found.method.grouping(found, None) if groups is None else groups:
        decay = weight_decay if group.weight_decay is None else group.weight_decay
        made.append(
            {
                "params": group.params,
                "lr": lr * group.lr,
                "weight_decay": decay,
                "update": group.update,
                **group.options,
            }
        )
    held = {id(p) for group in made for p in group["params"]}
    others = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in held and "polyrank_" not in name
    ]
    for matrix, decay in ((True, weight_decay), (False, 0.0)):
        if params := [p for p in others if (p.dim() >= 2) is matrix]:
            made.append({"params": params, "lr": lr, "weight_decay": decay})
    return made


def merge(
    model: PeftModel,
    *,
    approximate: Iterable[dict[str, Any]] | None = None,
    condition: Tensor | None = None,
) -> nn.Module:
    """Merge the active adapter into the base weights and return the plain model.

    Args:
        model: a PEFT model with a polyrank adapter.
        approximate: batches of model inputs. A core that weighs ranks for each token is replaced
            by its mean gate over them, W + s · B diag(E[g]) A: an approximation, never exact.
        condition: for cores that merge per condition, the one to merge for, (1, c) or (c,).

    Raises:
        MergeError: if the adapter has no exact dense form and no approximation was asked for,
            before anything changes.
    """
    found = adapter_of(model)
    if approximate is None and condition is None:
        return cast("nn.Module", model.merge_and_unload())
    merged = sorted({name for layer in found.layers for name in layer.module.merged_adapters})
    others = sorted({name for layer in found.layers for name in layer.module.active_adapters})
    if merged or others != [found.name]:
        raise MergeError(
            f"merge: {merged or 'nothing'} is merged already and {others} are active, but with a "
            "condition or an approximation one adapter is merged; call unmerge_adapter() and "
            "set_adapter(name) first"
        )
    uncovered = any(v.shadow is not None or v.core.base_gain() is not None for v in found.layers)
    if approximate is not None and uncovered:
        raise MergeError(
            f"merge: adapter {found.name!r} has a shadow or a base gain, which a mean of gates "
            "does not cover; keep it unmerged"
        )
    if approximate is not None:
        deltas = _mean_deltas(model, found.layers, approximate)
    else:
        assert condition is not None
        deltas = [layer.delta(condition) for layer in found.layers]
    weights = [layer.module.dense_weight() for layer in found.layers]
    if found.blocks:
        raise MergeError(
            f"merge: adapter {found.name!r} holds blocks, which no base weight equals; stay "
            f"unmerged"
        )
    for layer, weight, delta in zip(found.layers, weights, deltas, strict=True):
        delta = delta.T if layer.module.transposed else delta
        weight.data = (wide(weight.detach()) + delta.to(weight.device)).to(weight.dtype)
        layer.module.merged_adapters.append(found.name)
    # Not `unload`, which would drop the head and the modules that were trained whole.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return cast("nn.Module", model.merge_and_unload())


def _mean_deltas(
    model: PeftModel, layers: list[View], batches: Iterable[dict[str, Any]]
) -> list[Tensor]:
    deltas = []
    for layer, stats in zip(layers, gate_statistics(model, layers, batches), strict=True):
        A, B, _, _ = layer.factors(layer.module.flow)
        # Ranks without a value stand first: they have a gate, and no column of B.
        A, gate = A[-B.shape[1] :], stats.mean()[-B.shape[1] :].to(B.device, torch.float32)
        deltas.append(layer.scale * (B.detach().float() * gate) @ A.detach().float())
    return deltas
