"""Walks over the modules of a model that may hold many adapters."""

from __future__ import annotations

from torch import nn

from polyrank.layers.linear import AdaptedLinear

_HELD = {*AdaptedLinear.adapter_layer_names, *AdaptedLinear.other_param_names}


def outer(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model with their paths, but for what adapted layers hold of adapters.

    As and in the order of `named_modules`. Every adapter that is added asks for the layers and
    blocks around it several times, which is not to grow with the adapters that are there already.
    """
    found, seen, ahead = [], set(), [("", model)]
    while ahead:
        path, module = ahead.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((path, module))
        held = _HELD if isinstance(module, AdaptedLinear) else ()
        prefix = f"{path}." if path else ""
        ahead += [
            (prefix + name, child)
            for name, child in reversed(module._modules.items())
            if child is not None and name not in held
        ]
    return found
