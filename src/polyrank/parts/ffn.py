"""Feed-forward networks of known kinds: where their layers are, and whether they are what they say.

y = W2 (act(W1 x) ⊙ W3 x), or y = W2 act(W1 x) with two layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn

from polyrank.errors import ConfigError
from polyrank.frame import Site, keyed
from polyrank.layers import AdaptedLinear


class Form(NamedTuple):
    """Where a kind of FFN has its parts, by paths relative to its transformer block.

    Attributes:
        add: the module whose output is replaced.
        up: W1 of two layers, W3 of three.
        down: W2.
        act: the non-linearity.
        gate: W1 of three layers.
        first: the module that holds all before `down`, where none holds the whole FFN.
        before: a dropout in front of `down`.
        after: a dropout behind it.
    """

    add: str
    up: str
    down: str
    act: str
    gate: str = ""
    first: str = ""
    before: str = ""
    after: str = ""

    def linears(self) -> list[str]:
        """Return the paths of its linear layers."""
        return [path for path in (self.gate, self.up, self.down) if path]

    def within(self, modules: Collection[str]) -> Form | None:
        """Return the form with its place among the modules of a block, or None if it has none."""
        ends = [path for path in modules if f".{path}".endswith(f".{self.up}")]
        for prefix in (path.removesuffix(self.up) for path in ends):
            found = Form(*(prefix + path if path else "" for path in self))
            if all(path in modules for path in found if path):
                return found
        return None


FORMS = (
    Form("mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "mlp.gate_proj"),
    Form("mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"),
    Form("mlp", "mlp.c_fc", "mlp.c_proj", "mlp.act", after="mlp.dropout"),
    Form("mlp", "mlp.fc1", "mlp.fc2", "mlp.activation_fn"),
    Form("mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp.act"),
    Form(
        "output.dense",
        "intermediate.dense",
        "output.dense",
        "intermediate.intermediate_act_fn",
        first="intermediate",
    ),
    *(
        Form(
            "DenseReluDense",
            f"DenseReluDense.{up}",
            "DenseReluDense.wo",
            "DenseReluDense.act",
            gate,
            before="DenseReluDense.dropout",
        )
        for gate, up in (("DenseReluDense.wi_0", "wi_1"), ("", "wi"))
    ),
)
LINEARS = frozenset(path for form in FORMS for path in form.linears())


def _place(path: str) -> str:
    """Return a layer's path behind the last number in it, that of its transformer block."""
    found = re.fullmatch(r".*\.\d+\.(.+)", path)
    return found[1] if found else ""


def hosts_expert(site: Site) -> bool:
    """Say whether a linear layer is a part of an FFN, by its place in its transformer block.

    A site without a place stands for any.
    """
    return not site.path or (site.depth >= 0 and _place(site.path) in LINEARS)


def form_of(site: Site) -> Form | None:
    """Return the form of a transformer block's FFN, or None if none of its layers is adapted.

    Raises:
        ConfigError: for experts in place of an FFN, several FFNs, and one of an unknown form.
    """
    if not site.adapted:
        return None
    if any("experts" in path.split(".") for path in site.modules):
        raise ConfigError(
            f"targets: the FFN at {site.path!r} is a mixture of experts already, which weighs "
            "fused tensors by a router of its own; use a model with dense FFNs, or the method "
            "moe-lora on its linear layers"
        )
    form = next(filter(None, (f.within(site.modules) for f in FORMS)), None)
    mine = [path for path in site.adapted if _place(f"{site.path}.{path}") in LINEARS]
    attention = all("att" in path.lower() for path in site.adapted)
    if form is None and (mine or not attention):
        raise ConfigError(
            f"targets: the layers of {site.path!r} form no FFN of gate, up and down, or of two "
            f"layers, that is known by name ({', '.join(sorted(site.adapted)[:4])} …); expected "
            "such as mlp.gate_proj, mlp.up_proj, mlp.down_proj; adapt the attention alone with "
            "another method, or use a model with such FFNs"
        )
    if form is None or not mine:
        return None
    if others := sorted(set(mine) - set(form.linears())):
        raise ConfigError(
            f"targets: {site.path!r} holds several FFNs, of which {others[0]!r} is in another one "
            f"than {form.down!r}, expected one of them between two norms; use a model whose "
            "blocks are not grouped into stages, or moe-lora on its linear layers"
        )
    if form.first and form.down not in mine:
        raise ConfigError(
            f"targets: {form.down!r} of {site.path!r} is not adapted, where the experts of its FFN "
            "are put together; name it in target_modules too"
        )
    return form


def differs(form: Form, inside: nn.Module, width: int) -> Iterator[str]:
    """Yield a line if an FFN of adapted layers computes something else than its form says.

    Three tokens pass it, without adapters. A model on meta cannot tell.
    """
    first, down = inside.get_submodule(form.first or form.add), inside.get_submodule(form.down)
    layer = next(m for m in inside.modules() if isinstance(m, AdaptedLinear))
    weight = next(down.parameters())
    if any(p.is_meta for p in (weight, *first.parameters())):
        return
    x = torch.randn(1, 3, width, generator=keyed("probe", form.up))
    dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())[1]
    x = x.to(weight.device, dtype)
    modes = [(m, m.training) for m in first.modules()]
    act, up = inside.get_submodule(form.act), inside.get_submodule(form.up)
    with torch.no_grad(), layer.flow.put(view="base"):
        for module, _ in modes:
            module.training = False
        expected = first(x)
        a = act(inside.get_submodule(form.gate)(x)) * up(x) if form.gate else act(up(x))
        found = a if form.first else down(a)
        for module, mode in modes:
            module.training = mode
    if found.shape != expected.shape or not torch.allclose(found, expected, 1e-2, 1e-3):
        said = f"{form.act}({form.gate}(x)) * {form.up}(x)"
        said = said if form.gate else f"{form.act}({form.up}(x))"
        yield (
            f"{type(first).__name__} computes something else than {form.down}({said}); use a "
            "model with a plain FFN, or moe-lora on its linear layers"
        )
