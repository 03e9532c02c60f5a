"""What has to be kept of a model and its optimiser so that training goes on to the same bits."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from polyrank.errors import CheckpointError, RunError
from polyrank.layers import PolyrankConfig, adapter_of
from polyrank.layers.plugin import install

MARK = "polyrank_"


def model_state(model: nn.Module, *, base: bool) -> dict[str, Any]:
    """Return an adapter's configuration and tensors.

    Args:
        model: the adapted model.
        base: include the base weights of adapted layers, which an absorbed update has changed.

    Raises:
        RunError: if some tensor is not finite: a checkpoint of it would be of no use.
    """
    tensors = {name: value for name, value in model.state_dict().items() if MARK in name}
    wrong = [n for n, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        raise RunError(
            f"weights: {len(wrong)} tensors are no longer finite ({wrong[0]} is the first); the "
            "last checkpoint is from before: lower the learning rate with --train lr=..., or clip "
            "harder with --train max_grad_norm=..."
        )
    found = adapter_of(model)
    config = cast("Any", model).peft_config[found.name].to_dict()
    layers = {v.site.path: v.module.dense_weight() for v in found.layers} if base else {}
    return {
        "adapter": found.name,
        "config": {key: _plain(value) for key, value in config.items()},
        "tensors": tensors,
        "base": layers,
    }


def restore_model(base: nn.Module, state: dict[str, Any]) -> nn.Module:
    """Put a kept adapter onto a fresh copy of its base model.

    Raises:
        CheckpointError: if the tensors do not fit what the configuration rebuilds.
    """
    from peft import get_peft_model

    install()
    kept = state["config"]
    # First: what was absorbed decides what the adapter does on a base.
    for path, weight in state["base"].items():
        held = cast("Tensor", base.get_submodule(path).weight)
        held.data = weight.to(held.device)
    config = PolyrankConfig(**{k: v for k, v in kept.items() if k != "peft_type"})
    # The base is that of the run wherever it lies now, so that PEFT need not warn.
    config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    model = cast("nn.Module", get_peft_model(cast("Any", base), config, state["adapter"]))
    own = {name: value for name, value in model.state_dict().items() if MARK in name}
    tensors = state["tensors"]
    differ = sorted(set(own) ^ set(tensors))
    differ += [n for n in own if n in tensors and own[n].shape != tensors[n].shape]
    if differ:
        raise CheckpointError(
            f"checkpoint: {len(differ)} tensors do not fit the model ({differ[0]} is the first); "
            "it was written by another version: start anew in another folder"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])
    return model


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(getattr(value, "value", value)) if hasattr(value, "value") else value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's state with string keys; parameters by their position."""
    kept = optimizer.state_dict()
    groups = [
        {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params"}
        for group in kept["param_groups"]
    ]
    state = {str(number): dict(values) for number, values in kept["state"].items()}
    return {"state": state, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    """Take back what `optimizer_state` gave.

    Raises:
        CheckpointError: if it belongs to another optimiser.
    """
    own = optimizer.state_dict()
    if len(own["param_groups"]) != len(kept["groups"]):
        raise CheckpointError(
            f"optimizer: the checkpoint has {len(kept['groups'])} groups, this run "
            f"{len(own['param_groups'])}; resume with the method that the run began with"
        )
    groups = []
    for now, old in zip(own["param_groups"], kept["groups"], strict=True):
        tuples = {k: tuple(v) for k, v in old.items() if isinstance(now.get(k), tuple)}
        groups.append({**old, **tuples, "params": now["params"]})
    state = {int(number): values for number, values in kept["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """Return the states of all global generators, which a base model's dropout draws from."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state()
    found: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [str(numpy[0]), numpy[1].tolist(), int(numpy[2]), int(numpy[3]), float(numpy[4])],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore_random(kept: dict[str, Any]) -> None:
    """Take back what `random_state` gave."""
    version, words, gauss = kept["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has, cached = kept["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has, cached))
    torch.set_rng_state(cast("Tensor", kept["torch"]))
    if "cuda" in kept:
        torch.cuda.set_rng_state(kept["cuda"])
