"""Mixed batches: one adapter per sample, in forward and generate, beside modules trained whole."""

import copy

import pytest
import torch

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.layers import hook_of
from polyrank.testing import assert_close

NAMES = ["other", "__base__", "default"]


@pytest.fixture(params=["llama", "t5", "gpt2"])
def mixed(request, case, trained):
    """A model with two adapters of different methods, and the case."""
    smora = case("smora", request.param, r=4, k=2)
    model = trained(smora, init_weights=False)
    config = pr.PolyrankConfig(
        method="lora", options={"r": 3}, target_modules="all-linear", seed=5, init_weights=False
    )
    model.add_adapter("other", config)
    return smora, model


def alone(case, model, name, batch):
    """The answer of one adapter to the whole batch."""
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return case.tiny.read(model(**batch))
        model.set_adapter(name)
        return case.tiny.read(model(**batch))


def test_each_sample_gets_the_answer_of_its_adapter(mixed):
    case, model = mixed
    batch = case.tiny.inputs()
    with torch.no_grad():
        found = case.tiny.read(model(**batch, adapter_names=NAMES))
    each = [alone(case, model, name, batch) for name in NAMES]
    for index, expected in enumerate(each):
        assert_close(found[index], expected[index])
    assert not torch.allclose(each[0], each[1])
    assert hook_of(model).flow.plain


def test_it_does_not_matter_which_adapter_is_active(mixed):
    case, model = mixed
    batch = case.tiny.inputs()
    with torch.no_grad():
        one = case.tiny.read(model(**batch, adapter_names=NAMES))
        model.set_adapter("other")
        two = case.tiny.read(model(**batch, adapter_names=NAMES))
    assert torch.equal(one, two)


@pytest.mark.parametrize("mixed", ["llama", "t5"], indirect=True)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_takes_names_and_spreads_them_over_beams(mixed, beams):
    case, model = mixed
    batch = {k: v for k, v in case.tiny.inputs().items() if k != "labels"}
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    found = model.generate(**batch, adapter_names=NAMES, **how)
    for index, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(**batch, **how)
        else:
            model.set_adapter(name)
            expected = model.generate(**batch, **how)
        assert torch.equal(found[index], expected[index]), name


def test_modules_trained_whole_are_switched_by_sample_too(case, trained):
    lora = case("lora", r=3)
    model = trained(lora, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    config = copy.deepcopy(model.peft_config["default"])
    config.seed, config.init_weights = 9, False
    model.add_adapter("other", config)
    with torch.no_grad():
        head = model.get_base_model().lm_head.modules_to_save
        for name, offset in (("default", 0.1), ("other", -0.3)):
            head[name].weight.add_(offset)
    batch = lora.tiny.inputs()
    with torch.no_grad():
        found = model(**batch, adapter_names=NAMES).logits
    for index, name in enumerate(NAMES):
        assert_close(found[index], alone(lora, model, name, batch)[index])


def test_adapters_that_sit_in_different_layers_can_share_a_batch(case, trained):
    lora = case("lora", r=3)
    model = trained(lora, target_modules=["q_proj"])
    config = pr.PolyrankConfig(
        method="lora", options={"r": 2}, target_modules=["up_proj"], seed=3, init_weights=False
    )
    model.add_adapter("other", config)
    batch = lora.tiny.inputs()
    with torch.no_grad():
        found = model(**batch, adapter_names=NAMES).logits
    for index, name in enumerate(NAMES):
        assert_close(found[index], alone(lora, model, name, batch)[index])


def test_a_condition_goes_to_the_samples_it_belongs_to(case):
    toy = case("moe-lora", router="task", tasks=3, r=4, experts=2)
    model = toy.build(init_weights=False)
    config = copy.deepcopy(model.peft_config["default"])
    config.seed = 8
    model.add_adapter("other", config)
    batch = toy.tiny.inputs()
    condition = torch.tensor([[2], [0], [1]])
    with torch.no_grad():
        found = model(**batch, polyrank_condition=condition, adapter_names=NAMES).logits
        for index, name in enumerate(NAMES):
            if name != "__base__":
                model.set_adapter(name)
                expected = model(**batch, polyrank_condition=condition).logits
                assert_close(found[index], expected[index])


# --- refusals ------------------------------------------------------------------------------------


def test_mixed_batches_are_for_evaluation(mixed):
    case, model = mixed
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**case.tiny.inputs(), adapter_names=NAMES)


def test_an_unknown_name_is_refused(mixed):
    case, model = mixed
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        model(**case.tiny.inputs(), adapter_names=["default", "nobody", "other"])
    assert hook_of(model).flow.plain


def test_a_wrong_number_of_names_is_refused(mixed):
    case, model = mixed
    for names in (["default", "other"], NAMES * 2, []):
        with pytest.raises(ValueError, match="same as the number of inputs"):
            model(**case.tiny.inputs(), adapter_names=names)
    assert hook_of(model).flow.plain


def test_heads_answer_for_a_whole_batch(case, trained):
    lora = case("lora", "vit", r=2)
    model = trained(lora, head={"module": "classifier", "names": ["a"]})
    with pytest.raises(ConfigError, match="run the samples of one adapter at a time"):
        model(**lora.tiny.inputs(), adapter_names=["default"] * 3)


def test_merged_adapters_are_refused(case, trained):
    lora = case("lora", r=3)
    model = trained(lora)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**lora.tiny.inputs(), adapter_names=["default"] * 3)
