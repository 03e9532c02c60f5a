"""PEFT's own generic tests with polyrank's methods in place of PEFT's.

Not collected from here: `run_peft_suite.py` copies this file beside PEFT's tests and runs it there.
The lists that PEFT's decorators refer to are replaced before anything is collected, so every case
below runs what PEFT asks of its own methods. Case names hold the word "ranked", by which the runner
selects them.
"""

import functools
import os
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft_tests import test_custom_models as custom
from peft_tests import testing_common as common
from transformers import AutoModelForCausalLM

import polyrank
from polyrank.testing import MODELS

# Seeds with which no router starts saturated, and so without gradient: PEFT feeds numbers up to 89.
METHODS = {
    "lora": {"method": "lora", "options": {"r": 4}},
    "smora": {"method": "smora", "options": {"r": 4, "k": 2}},
    "unbalanced smora": {"method": "smora", "options": {"r": 4, "k": 2, "balance": 0.0}, "seed": 1},
    "moe-lora": {"method": "moe-lora", "options": {"r": 8, "experts": 4, "k": 2}, "seed": 3},
}
MERGES = {"lora"}
Config = polyrank.PolyrankConfig

# Plain loops of PEFT's tests do not know about rules; this is what polyrank offers such trainers.
polyrank.attach_automatically()


@dataclass
class RankedLora(Config):
    """A class whose defaults make a plain LoRA, for tests that are given classes."""


@dataclass
class RankedSmora(Config):
    """The same for a routed method."""

    method: str = "smora"
    options: dict = field(default_factory=lambda: {"r": 4, "k": 2, "balance": 0.0})


PLACES = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
]


def rows():
    for name, base in METHODS.items():
        for number, (model, kwargs) in enumerate(PLACES):
            yield f"ranked {name} {number}", model, Config, {**base, **kwargs}


def pairs():
    for name, base in METHODS.items():
        same = {**base, "target_modules": ["lin0"], "init_weights": False}
        other = {**same, "target_modules": ["lin1"]}
        yield f"ranked {name} same", "ours", Config, dict(same), {**same, "seed": 5}
        yield f"ranked {name} different", "ours", Config, dict(same), dict(other)


def mixed():
    same = {"target_modules": ["lin0"], "init_weights": False}
    for name, base in METHODS.items():
        yield f"ranked {name}", *(Config(**{**base, **same, "seed": seed}) for seed in (1, 2))
    lora, smora = METHODS["lora"], METHODS["smora"]
    yield "ranked lora beside smora", Config(**lora, **same), Config(**smora, **same)


custom.TEST_CASES[:] = rows()
custom.ALL_PEFT_CONFIG_CLASSES[:] = [RankedLora, RankedSmora]
custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = pairs()
custom.MIXED_ADAPTER_TEST_CASES[:] = mixed()


def skip_merging(model_id, config_cls, config_kwargs):
    method = config_kwargs.get("method", "lora")
    if method not in MERGES:
        pytest.skip(f"{method} weighs ranks for each token, so it refuses to merge")


def conv1d_is_served(model_id, config_cls, config_kwargs):
    """PEFT skips GPT-2 for classes that it does not list; here it runs."""


for module in (custom, common):
    module._skip_if_merging_not_supported = skip_merging
    if hasattr(module, "_skip_if_conv1d_not_supported"):
        module._skip_if_conv1d_not_supported = conv1d_is_served


def balanced(kwargs):
    """Whether a case keeps a balance bias, saved and never trained by the optimiser."""
    config = kwargs["config_kwargs"]
    return config.get("method") == "smora" and config["options"].get("balance", 1) != 0


def routed(kwargs):
    return kwargs["config0"].method not in MERGES


def unless(base, name, applies, why):
    """A test of PEFT's that is skipped, with a reason, where its demand is refused on purpose."""
    inner = getattr(base, name)

    @functools.wraps(inner)
    def run(self, *args, **kwargs):
        if applies(kwargs):
            pytest.skip(why)
        return inner(self, *args, **kwargs)

    return run


FP32 = (
    "the balance bias stays fp32, or its steps of 1e-4 would vanish; the rest is in test_bases.py"
)
RULE = "the rule moves the balance bias, which no gradient does; smora without it runs"
BIAS = "polyrank never trains the biases of the base, so bias is 'none' or an error"
GRADIENT = "asks for a gradient of every parameter, which the balance bias never has"
MERGED = "a routed adapter refuses to merge, and the test merges it to see another refusal"


class TestCustomModels(custom.TestPeftCustomModel):
    """PEFT's tests of small custom models."""

    test_adapter_dtype_autocast = unless(
        custom.TestPeftCustomModel,
        "test_adapter_dtype_autocast",
        lambda k: balanced(k) and not k["autocast_adapter_dtype"] and k["dtype"] != torch.float32,
        FP32,
    )
    test_only_params_are_updated = unless(
        custom.TestPeftCustomModel, "test_only_params_are_updated", balanced, RULE
    )
    test_adding_multiple_adapters_with_bias_raises = unless(
        custom.TestPeftCustomModel,
        "test_adding_multiple_adapters_with_bias_raises",
        lambda k: True,
        BIAS,
    )


class TestActiveAdapters(custom.TestMultipleActiveAdapters):
    """PEFT's tests of several active adapters."""


class TestMixedBatches(custom.TestMixedAdapterBatches):
    """PEFT's tests of an adapter per sample."""

    test_mixed_adapter_batches_merged_raises = unless(
        custom.TestMixedAdapterBatches, "test_mixed_adapter_batches_merged_raises", routed, MERGED
    )


# --- language models -----------------------------------------------------------------------------

SAVED = Path(os.environ["POLYRANK_PEFT_MODELS"])
NOT_OURS = {
    "_test_training_prompt_learning_tasks": "prompt learning",
    "_test_weighted_combination_of_adapters_lora": "called by another test",
    "_test_weighted_combination_of_adapters_ia3": "called by another test",
}
REFUSED = {
    "_test_add_adapter_no_autocast_adapter_dtype": (balanced, FP32),
    "_test_training_gradient_checkpointing": (balanced, GRADIENT),
    "_test_training_layer_indexing": (balanced, GRADIENT),
    "_test_adding_multiple_adapters_with_bias_raises": (lambda k: True, BIAS),
}
EXTRA = {
    "_test_generate_pos_args": {"raises_err": False},
    "_test_add_adapter_no_autocast_adapter_dtype": {"dtype": torch.bfloat16},
    "_test_passing_input_embeds_works": {"test_name": "ranked"},
}


def saved_models():
    for name in ("llama", "gpt2"):
        folder = SAVED / name
        if not folder.is_dir():
            MODELS[name].build().save_pretrained(folder)
        yield str(folder)


class _Language(common.PeftCommonTester):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


CASES = [
    pytest.param(
        folder, Config, {**base, "init_weights": False}, id=f"ranked-{name}-{Path(folder).name}"
    )
    for folder in saved_models()
    for name, base in METHODS.items()
]


def _test_of(name):
    def run(self, model_id, config_cls, config_kwargs):
        given = {"model_id": model_id, "config_cls": config_cls, "config_kwargs": config_kwargs}
        applies, why = REFUSED.get(name, (lambda k: False, ""))
        if applies(given):
            pytest.skip(why)
        given["config_kwargs"] = dict(config_kwargs)
        # PEFT skips mixed batches for classes that it does not list.
        listed = Config if "mixed_adapter_batches" in name else common.LoraConfig
        with mock.patch.object(common, "LoraConfig", listed):
            return getattr(self, name)(**given, **EXTRA.get(name, {}))

    return pytest.mark.parametrize(("model_id", "config_cls", "config_kwargs"), CASES)(run)


TestLanguageModels = type(
    "TestLanguageModels",
    (_Language,),
    {
        name[1:]: _test_of(name)
        for name in dir(common.PeftCommonTester)
        if name.startswith("_test_") and name not in NOT_OURS
    },
)
