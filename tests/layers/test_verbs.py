"""PEFT's verbs on a model: several adapters, switching, merging, status, names, hot-swap."""

import copy

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, MergeError
from polyrank.layers import AdaptedLinear, hook_of
from polyrank.testing import assert_close


def second(model, name="other", **changes):
    """Adds an adapter like the first one, with other starting values and a B that is not zero."""
    config = copy.deepcopy(model.peft_config["default"])
    for key, value in {"seed": 7, "init_weights": False, **changes}.items():
        setattr(config, key, value)
    model.add_adapter(name, config)
    return model


def deltas(case, model, *names):
    """What adapters add to one adapted layer's output, each on its own."""
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLinear))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    base = layer.base_layer(x)
    found = []
    for name in names:
        model.set_adapter(name)
        found.append(layer(x) - base)
    return layer, x, base, found


# --- several adapters ----------------------------------------------------------------------------


def test_adapters_are_added_switched_and_deleted(either, trained):
    model = trained(either)
    first = either.answer(model)
    second(model)
    assert torch.equal(either.answer(model), first)
    model.set_adapter("other")
    other = either.answer(model)
    assert not torch.equal(other, first)
    model.set_adapter("default")
    assert torch.equal(either.answer(model), first)
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not any(".other." in name for name, _ in model.named_parameters())
    assert torch.equal(either.answer(model), first)


def test_deleting_the_last_adapter_leaves_unload_as_the_way_out(either, trained):
    model = trained(either)
    model.delete_adapter("default")
    plain = model.unload()
    assert torch.equal(either.answer(plain), either.answer(either.tiny.build()))


def test_several_active_adapters_add_up(either, trained):
    model = second(trained(either))
    layer, x, base, (one, two) = deltas(either, model, "default", "other")
    model.base_model.set_adapter(["default", "other"])
    assert_close(layer(x) - base, one + two)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} >= {"other"}


def test_an_adapter_may_have_other_ranks_options_and_targets(case, trained):
    lora = case("lora", r=3)
    model = trained(lora)
    answer = lora.answer(model)
    smora = pr.method("smora", r=4, k=2)
    config = pr.PolyrankConfig(
        method="smora", options=smora.options(), target_modules=["q_proj"], seed=0
    )
    model.add_adapter("routed", config)
    assert torch.equal(lora.answer(model), answer)
    model.set_adapter("routed")
    assert torch.equal(lora.answer(model), lora.answer(lora.tiny.build()))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("q_proj" in n and ".routed." in n for n in trainable)
    model.set_adapter("default")
    assert torch.equal(lora.answer(model), answer)


def test_a_frozen_adapter_stays_frozen_while_another_is_added(either, trained):
    model = trained(either)
    model.set_requires_grad("default", requires_grad=False)
    second(model)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("other", requires_grad=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(".other." in n and "balance_bias" not in n for n in names)


def test_disabled_adapters_are_the_base_and_come_back(either, trained):
    model = second(trained(either))
    base = either.answer(either.tiny.build())
    answer = either.answer(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        assert torch.equal(either.answer(model), base)
        assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(either.answer(model), answer)
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}


def test_unload_takes_everything_off(either, trained):
    plain = trained(either).unload()
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(m, AdaptedLinear) for m in plain.modules())
    assert hook_of(plain) is None
    assert not hasattr(plain, "peft_config")
    again = pr.adapt(plain, either.method, seed=1)
    assert torch.equal(either.answer(again.eval()), either.answer(either.tiny.build()))


# --- status --------------------------------------------------------------------------------------


def test_the_status_names_types_adapters_and_what_trains(either, trained):
    model = second(trained(either))
    status = model.get_model_status()
    assert status.adapter_model_type == "PolyrankModel"
    assert status.peft_types == {"default": "POLYRANK", "other": "POLYRANK"}
    assert status.available_adapters == ["default", "other"]
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.enabled is True
    assert status.num_adapter_layers == 14
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.get_layer_status()
    assert len(layers) == 14
    assert all(layer.requires_grad["other"] is False for layer in layers)
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


# --- merging -------------------------------------------------------------------------------------


def test_merge_and_unmerge_for_one_or_several_adapters(case, trained):
    lora = case("lora", r=3)
    model = second(trained(lora)).double()
    model.base_model.set_adapter(["default", "other"])
    answer = lora.answer(model, dtype=torch.float64)
    before = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default", "other"]
    assert_close(lora.answer(model, dtype=torch.float64), answer, dtype=torch.float32)
    model.unmerge_adapter()
    assert_close(lora.answer(model, dtype=torch.float64), answer)
    for name, param in model.named_parameters():
        if name in before:
            assert_close(param, before[name])


def test_only_named_adapters_are_merged(case, trained):
    lora = case("lora", r=3)
    model = second(trained(lora)).double()
    model.set_adapter("other")
    answer = lora.answer(model, dtype=torch.float64)
    model.set_adapter("default")
    plain = model.merge_and_unload(adapter_names=["other"])
    assert_close(lora.answer(plain, dtype=torch.float64), answer, dtype=torch.float32)


def test_a_routed_adapter_is_refused_by_name_and_a_dense_one_beside_it_is_not(case, trained):
    lora = case("lora", r=3)
    model = trained(lora)
    config = pr.PolyrankConfig(
        method="smora", options={"r": 4, "k": 2}, target_modules="all-linear", seed=0
    )
    model.add_adapter("routed", config)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MergeError, match="keep the adapter unmerged"):
        model.merge_adapter(adapter_names=["default", "routed"])
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    model.set_adapter("routed")
    model.merge_adapter(adapter_names=["default"])
    assert model.get_model_status().merged_adapters == ["default"]


def test_a_safe_merge_looks_at_all_layers_first(case, trained):
    model = trained(case("lora", r=3))
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    with torch.no_grad():
        layers[-1].views["default"].B[0, 0] = float("inf")
    bits = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights.*not finite at \S+, expected"
    ):
        model.merge_and_unload(safe_merge=True)
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert sum(isinstance(m, AdaptedLinear) for m in model.modules()) == len(layers)


def test_merged_adapters_come_out_before_they_are_switched_or_disabled(case, trained):
    lora = case("lora", r=3)
    model = second(trained(lora)).double()
    base = lora.tiny.build().double()
    expected = lora.answer(base, dtype=torch.float64)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(lora.answer(model, dtype=torch.float64), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("default")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert model.get_model_status().merged_adapters == []


# --- hot-swap, state dicts, injection ------------------------------------------------------------


def test_hotswap_copies_in_place_and_makes_no_module(either, trained, folder):
    one, two = trained(either), trained(either, steps=4)
    saved = folder(two)
    parts = [id(m) for m in one.modules()] + [id(p) for p in one.parameters()]
    pr.hotswap(one, saved)
    assert parts == [id(m) for m in one.modules()] + [id(p) for p in one.parameters()]
    assert torch.equal(either.answer(one), either.answer(two))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"r": 5}, "differs from 'default' in options"), ({"alpha": 3.0}, "in options")],
    ids=["rank", "alpha"],
)
def test_a_hotswap_between_different_adapters_is_refused(change, words, case, trained, folder):
    model = trained(case("lora", r=3))
    saved = folder(trained(case("lora", **{"r": 3, **change})))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=words):
        pr.hotswap(model, saved)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_state_dict_makes_the_round_trip_with_nested_names(either, trained):
    model, fresh = trained(either), either.build()
    state = get_peft_model_state_dict(model)
    assert state
    assert not any("default" in key for key in state)
    if either.method.name == "smora":
        assert any(key.endswith("polyrank_core.router.weight") for key in state)
        assert any(key.endswith("polyrank_core.balance_bias") for key in state)
    result = set_peft_model_state_dict(fresh, state)
    assert result.unexpected_keys == []
    assert not [key for key in result.missing_keys if "polyrank_" in key]
    assert torch.equal(either.answer(fresh), either.answer(model))
    again = get_peft_model_state_dict(fresh)
    assert all(torch.equal(again[key], state[key]) for key in state)
    second(fresh)
    set_peft_model_state_dict(fresh, state, adapter_name="other")
    fresh.set_adapter("other")
    assert torch.equal(either.answer(fresh), either.answer(model))


def test_a_saved_adapter_loads_beside_another_under_its_own_name(either, trained, folder):
    model = trained(either)
    saved = folder(model)
    answer = either.answer(model)
    other = trained(either, steps=4)
    other.load_adapter(saved, adapter_name="loaded")
    assert not any(p.requires_grad for n, p in other.named_parameters() if ".loaded." in n)
    other.set_adapter("loaded")
    assert torch.equal(either.answer(other), answer)
    both = folder(other, "both")
    back = PeftModel.from_pretrained(either.tiny.build(), f"{both}/loaded").eval()
    assert torch.equal(either.answer(back), answer)


def test_loading_for_training_trains_what_is_declared(either, trained, folder):
    model = trained(either)
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    saved = folder(model)
    back = PeftModel.from_pretrained(either.tiny.build(), saved, is_trainable=True)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == expected
    still = PeftModel.from_pretrained(either.tiny.build(), saved)
    assert not any(p.requires_grad for p in still.parameters())


def test_layers_can_be_injected_without_a_peft_model(either, trained, folder):
    model = trained(either)
    saved = folder(model)
    config = pr.PolyrankConfig.from_pretrained(saved)
    bare = inject_adapter_in_model(config, either.tiny.build()).eval()
    set_peft_model_state_dict(bare, load_peft_weights(saved, device="cpu"))
    batch = either.tiny.inputs()
    with torch.no_grad():
        assert torch.equal(bare(**batch).logits, either.answer(model))


def test_places_can_be_read_from_the_keys_of_a_state_dict(either, trained):
    model = trained(either, target_modules=["q_proj", "down_proj"])
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(model).items()
    }
    config = pr.PolyrankConfig(
        method=either.method.name, options=either.method.options(), target_modules=["o_proj"]
    )
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        bare = inject_adapter_in_model(config, either.tiny.build(), state_dict=state)
    set_peft_model_state_dict(bare, state)
    with torch.no_grad():
        assert torch.equal(bare.eval()(**either.tiny.inputs()).logits, either.answer(model))


# --- names ---------------------------------------------------------------------------------------

MODULES = ["self_attn", "model", "layers", "q_proj", "0"]
ATTRIBUTES = ["keys", "pop", "weight", "bias", "base_layer", "polyrank_A", "side_block"]


@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained in the prefix")
@pytest.mark.parametrize("name", [*MODULES, *ATTRIBUTES, "", "a.b", "a b", "rank", "router"])
def test_a_name_that_would_lose_tensors_is_refused_and_nothing_changes(name, case, trained):
    smora = case("smora", r=4, k=2)
    base = smora.tiny.build()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError, match=r"adapter name: .*rename the adapter"):
        pr.adapt(base, smora.method, adapter_name=name)
    assert kinds == [type(m) for m in base.modules()]
    assert hook_of(base) is None
    model = trained(smora)
    answer, keys = smora.answer(model), set(model.state_dict())
    with pytest.raises(ConfigError, match=r"adapter name: .*rename the adapter"):
        second(model, name)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(smora.answer(model), answer)
    assert set(model.state_dict()) == keys


@pytest.mark.parametrize("name", ["default", "task-1", "task_2", "B2", "2024"])
def test_good_names_save_every_tensor(name, case, folder):
    lora = case("lora", r=2)
    model = pr.adapt(lora.tiny.build(), lora.method, adapter_name=name, seed=1)
    second_model = case("lora", r=2).build()
    state = get_peft_model_state_dict(model, adapter_name=name)
    assert len(state) == len(get_peft_model_state_dict(second_model)) == 28
