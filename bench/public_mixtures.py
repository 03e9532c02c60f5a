"""Mixtures of LoRA experts as others publish them, at the ranks of ours: 8 experts, 2 active.

xlora: PEFT's X-LoRA, whose experts are whole adapters and weighed by a classifier that reads a
forward of the frozen model first. mixlora: the package of the paper's authors, experts in the FFN,
LoRA of an expert's rank in the attention (`pip install --no-deps mixlora==0.2.3`). eulerforge:
experts in every layer, each with a router (`pip install --no-deps eulerforge==0.1.0`). All in the
dtype of the base, where the packages would choose fp32; without dropout and without what they count
for reports; scale 2, as elsewhere.
"""

import tempfile
from importlib import import_module

import torch
from torch import nn

EXPERTS, ACTIVE = 8, 2


def package(name, module):
    """A module of a package that is not among polyrank's own needs."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SystemExit(f"{module}: {error}; pip install --no-deps {name}") from error


def xlora(base, r, targets):
    """PEFT's X-LoRA with trained experts; every expert starts from the same saved adapter."""
    from peft import LoraConfig, XLoraConfig, get_peft_model

    own = LoraConfig(r=r // EXPERTS, lora_alpha=2 * r // EXPERTS, target_modules=targets)
    with tempfile.TemporaryDirectory() as folder:
        saved = get_peft_model(base, own, autocast_adapter_dtype=False)
        saved.save_pretrained(folder)
        given = XLoraConfig(
            hidden_size=base.config.hidden_size, adapters={str(i): folder for i in range(EXPERTS)},
            enable_softmax=False, enable_softmax_topk=True, top_k_lora=ACTIVE,
            layerwise_scalings=True, use_trainable_adapters=True,
        )  # fmt: skip
        model = get_peft_model(saved.unload(), given, autocast_adapter_dtype=False)
    # PEFT loads experts in fp32 whatever it is told; the buffers of the base stay as they are.
    for p in model.parameters():
        p.data = p.data.to(base.dtype)
    return model


def mixlora(base, r, targets):
    """The package of MixLoRA; it keeps experts where no module lists them."""
    found = package("mixlora==0.2.3", "mixlora")
    each = {
        "base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA",
        "r": r // EXPERTS, "lora_alpha": 2 * r // EXPERTS, "lora_dropout": 0.05,
        "target_modules": targets, "routing_strategy": "mixlora", "num_experts": EXPERTS,
        "top_k": ACTIVE, "act_fn": base.config.hidden_act,
    }  # fmt: skip
    config = found.MixLoraConfig.from_config(each)
    config.dtype_ = base.dtype
    found.inject_adapter_in_model(base, config, _Drawn(base, config))
    for layer in base.model.layers:
        # Registered, so that the optimiser finds them.
        (moe,) = layer.mlp.mixlora_moes.values()
        layer.mlp.experts = nn.ModuleList(moe.experts_.values())
        layer.mlp.router = moe.gate_ = nn.Parameter(moe.gate_)
    for module in base.modules():
        if hasattr(module, "dropout_"):
            module.dropout_ = nn.Identity()
    return base


class _Drawn:
    """Weights by the names that the package reads from a file."""

    def __init__(self, base, config):
        self.base, self.config = base, config
        self.rng = torch.Generator(base.device).manual_seed(0)

    def __getitem__(self, name):
        path = name.removeprefix("mixlora.").split(".experts.")[0].split(".lora_")[0]
        r = self.config.lora_r_
        if path.endswith("moe_gate.weight"):
            shape = (EXPERTS, self.base.config.hidden_size)
        else:
            layer = self.base.get_submodule(f"model.{path}")
            layer = getattr(layer, "base_layer_", layer)
            n, d = layer.weight.shape
            shape = (r, d) if "lora_A" in name else (n, r)
        drawn = torch.randn(shape, generator=self.rng, device=self.base.device)
        return (drawn / shape[-1] ** 0.5).to(self.config.dtype_)


def eulerforge_layer(layer, r):
    """A linear layer beside experts of its own."""
    found = package("eulerforge==0.1.0", "eulerforge.modules.mixture_lora")
    return found.MixtureLoRALinear(
        layer, EXPERTS, ACTIVE, r // EXPERTS, 2.0 * r / EXPERTS, 0.0, track_stats=False
    )


def eulerforge(base, r, targets):
    """A model whose layers of the blocks each have experts of their own."""
    for block in base.model.layers:
        for path, layer in list(block.named_modules()):
            parent, _, leaf = path.rpartition(".")
            if leaf in targets:
                setattr(block.get_submodule(parent), leaf, eulerforge_layer(layer, r))
    return base


PUBLIC = {"xlora": xlora, "public mixlora": mixlora, "eulerforge": eulerforge}
