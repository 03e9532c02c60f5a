"""The adapter of a live model as a value."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from polyrank.frame import Saved
from polyrank.layers.adapter import adapter_of
from polyrank.layers.blocks import block_shapes
from polyrank.layers.structure import config_of


def saved_of(model: nn.Module, adapter: str | None = None) -> Saved:
    """Return what `save_pretrained` would write of one adapter, by default the active one.

    The tensors are copies on the CPU; the config is plain values, shapes of every layer included.

    Raises:
        ConfigError: if the model has no such polyrank adapter.
    """
    found = adapter_of(model, adapter)
    config = config_of(model, found.name).to_dict()
    config["sites"] = {
        **config["sites"],
        **{view.site.path: view.module.shapes(found.name) for view in found.layers},
        **block_shapes(found),
    }
    config["inference_mode"] = True
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    path = getattr(base, "name_or_path", None)
    config["base_model_name_or_path"] = config.get("base_model_name_or_path") or path or None
    if config.get("task_type") is None:
        # What AutoPeftModel reads.
        about = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config["auto_mapping"] = about
    tensors = get_peft_model_state_dict(cast("Any", model), adapter_name=found.name)
    kept = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    return Saved(tensors=kept, config=config)
