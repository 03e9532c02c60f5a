"""Banks, shadows, replicas, pruned and absorbed ranks: toys that change shapes and base weights."""

import copy

import pytest
import torch
from peft import PeftModel

import polyrank as pr
from polyrank.errors import ConfigError, MergeError
from polyrank.layers import (
    absorb,
    adapter_of,
    append,
    keep,
    redraw,
    replica,
)
from polyrank.testing import MODELS, Case, assert_close, check_method

pytestmark = pytest.mark.usefixtures("toys")


def case(name, model="llama", **options):
    return Case(pr.method(name, **options), 0, MODELS[model])


def trained(case, steps=2, **config):
    model = case.build(**config)
    case.train(model, steps=steps)
    return model


def numbers(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def layers_of(model):
    return adapter_of(model).layers


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


# --- bank -----------------------------------------------------------------------------------------


def test_append_freezes_what_was_learned_and_changes_nothing_at_first():
    lora = case("lora", r=3)
    model = trained(lora)
    before = lora.answer(model)
    learned = [(layer.A.clone(), layer.B.clone()) for layer in layers_of(model)]
    append(model, 2)
    assert_close(lora.answer(model), before)
    for layer, (A, B) in zip(layers_of(model), learned, strict=True):
        assert torch.equal(layer.bank[0], A)
        assert torch.equal(layer.bank[1], B)
        assert layer.A.shape == (2, A.shape[1])
        assert not layer.B.any()
        assert layer.A.requires_grad
        assert not any(t.requires_grad for t in layer.bank)


def test_a_banked_adapter_learns_with_live_ranks_only_and_banks_again():
    lora = case("lora", r=3)
    model = trained(lora)
    append(model)
    frozen = [layer.bank[0].clone() for layer in layers_of(model)]
    held = {id(p) for group in pr.parameter_groups(model, lr=1.0) for p in group["params"]}
    assert held == {id(p) for layer in layers_of(model) for p in (layer.A, layer.B)}
    lora.train(model)
    for layer, A in zip(layers_of(model), frozen, strict=True):
        assert torch.equal(layer.bank[0], A)
        assert layer.B.any()
    before = lora.answer(model)
    append(model, 1)
    assert layers_of(model)[0].bank[0].shape[0] == 6
    assert_close(lora.answer(model), before)
    plain = copy.deepcopy(model).merge_and_unload()
    assert_close(lora.answer(plain), before)


def test_a_verb_between_tasks_leaves_the_bank_frozen():
    lora = case("lora", r=2)
    model = trained(lora)
    append(model)
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names
    assert all("polyrank_bank" not in n for n in names)


def test_a_core_without_room_for_a_bank_is_refused_before_anything_changes():
    smora = case("smora", r=4, k=2)
    model = trained(smora)
    before = numbers(model)
    with pytest.raises(ConfigError, match="does not define banked"):
        append(model)
    assert_same(before, numbers(model))


# --- shadow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", ["none", "number", "diagonal", "matrix"])
def test_a_shadow_is_subtracted_in_forward_merge_and_file(delta, tmp_path):
    toy = case("shadowed", delta=delta)
    base = toy.tiny.build()
    model = toy.build()
    assert_close(toy.answer(model), toy.answer(base))
    toy.train(model)
    answer = toy.answer(model)
    assert not torch.equal(answer, toy.answer(base))
    assert all(layer.shadow is not None for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(toy.tiny.build(), str(tmp_path)).eval()
    assert torch.equal(toy.answer(again), answer)
    wide = model.double()
    plain = copy.deepcopy(wide).merge_and_unload()
    expected = toy.answer(wide, dtype=torch.float64)
    assert_close(toy.answer(plain, dtype=torch.float64), expected, dtype=torch.float32)


def test_the_shadow_never_trains_and_can_be_taken_away():
    toy = case("shadowed")
    model = trained(toy)
    layer = layers_of(model)[0]
    assert not any(t.requires_grad for t in layer.shadow)
    layer.shadow = None
    assert layer.shadow is None
    assert not any("polyrank_shadow" in n for n, _ in layer.module.named_parameters())


def test_the_shadowed_toy_keeps_the_contract_except_neutrality_to_the_bit(toys):
    checks = ["declared", "counted", "base", "merged", "gradients", "size", "vital"]
    assert check_method("shadowed", models=["gpt2"], checks=checks) == len(checks)


# --- replica and view -----------------------------------------------------------------------------


def test_a_replica_is_what_the_adapter_was_and_the_base_view_what_it_never_was():
    smora = case("smora", r=4, k=2)
    base = smora.answer(smora.tiny.build())
    model = trained(smora)
    then = smora.answer(model)
    replica(model, "slow")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    smora.train(model)
    now = smora.answer(model)
    assert not torch.equal(then, now)
    with pr.view(model, "slow"):
        assert torch.equal(smora.answer(model), then)
    with pr.view(model, "base"):
        assert torch.equal(smora.answer(model), base)
    assert torch.equal(smora.answer(model), now)
    assert trainable == [n for n, p in model.named_parameters() if p.requires_grad]
    assert not any("replica" in n for n in trainable)


def test_a_view_inside_training_is_a_teacher_without_counts_or_gradients():
    smora = case("smora", r=4, k=2)
    model = trained(smora)
    replica(model, "slow")
    model.train()
    with torch.no_grad(), pr.view(model, "slow"):
        smora.loss(model)
    assert all(layer.core.counts is None for layer in layers_of(model))
    smora.loss(model).backward()
    assert any(layer.core.counts is not None for layer in layers_of(model))


def test_an_unknown_view_and_a_bad_name_are_refused():
    model = trained(case("lora", r=2))
    with pr.view(model, "fast"), pytest.raises(ConfigError, match="keeps no such replica"):
        case("lora", r=2).answer(model)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    for name in ("", "base", "other", "a.b", "keys"):
        with pytest.raises(ConfigError, match="replica: got name"):
            replica(model, name)


# --- keep, absorb, redraw -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "scaled"])
def test_kept_ranks_act_as_they_did(name):
    toy = case(name, r=4)
    model = trained(toy)
    for layer in layers_of(model):
        with torch.no_grad():
            layer.B[:, [0, 2]] = 0.0
    before = toy.answer(model)
    for layer in layers_of(model):
        keep(model, layer, torch.tensor([3, 1]))
        assert layer.A.shape[0] == layer.B.shape[1] == layer.site.r == 2
        assert layer.A.requires_grad
    assert_close(toy.answer(model), before)
    toy.train(model)


def test_kept_ranks_of_a_router_take_its_rows_along():
    smora = case("smora", r=4, k=2, balance=0.0, gate="softmax_topk")
    model = trained(smora)
    layer = layers_of(model)[0]
    rows = layer.core.router.weight.clone()
    keep(model, layer, torch.tensor([2, 0, 3]))
    assert torch.equal(layer.core.router.weight, rows[[2, 0, 3]])
    smora.answer(model)


def test_whole_blocks_are_kept_or_none():
    smora = case("smora", r=8, k=4, block=2)
    model = trained(smora)
    layer, rows = layers_of(model)[0], layers_of(model)[0].core.router.weight.clone()
    before = numbers(model)
    with pytest.raises(ConfigError, match="splits one; keep whole blocks"):
        keep(model, layer, torch.tensor([0, 2, 4, 6]))
    assert_same(before, numbers(model))
    keep(model, layer, torch.tensor([4, 5, 0, 1]))
    assert torch.equal(layer.core.router.weight, rows[[2, 0]])


@pytest.mark.parametrize("ranks", [[], [0, 0], [4], [-1]], ids=str)
def test_ranks_that_are_not_there_cannot_be_kept(ranks):
    model = trained(case("lora", r=4))
    with pytest.raises(ConfigError, match=r"expected different numbers out of 0\.\.3"):
        keep(model, layers_of(model)[0], torch.tensor(ranks, dtype=torch.int64))


def test_too_few_ranks_for_the_method_change_nothing():
    model = trained(case("smora", r=4, k=2))
    before = numbers(model)
    with pytest.raises(ConfigError, match="k"):
        keep(model, layers_of(model)[0], torch.tensor([1]))
    assert_same(before, numbers(model))


@pytest.mark.parametrize("structure", ["plain", "bank", "shadow"])
def test_absorbing_moves_the_update_into_the_base_once(structure):
    toy = case("shadowed") if structure == "shadow" else case("lora", r=3)
    model = trained(toy).double()
    if structure == "bank":
        append(model)
        toy.train(model.float())
        model = model.double()
    before = toy.answer(model, dtype=torch.float64)
    replica(model, "old")
    absorb(model)
    after = toy.answer(model, dtype=torch.float64)
    assert_close(after, before, dtype=torch.float32)
    layer = layers_of(model)[0]
    assert layer.bank is None
    assert (layer.shadow is not None) is (structure == "shadow")
    with pr.view(model, "old"), pytest.raises(ConfigError, match="keeps no such replica"):
        toy.answer(model, dtype=torch.float64)
    toy.train(model.float())


def test_absorbing_what_no_matrix_equals_or_twice_is_refused_whole():
    smora, lora = case("smora", r=4, k=2), case("lora", r=2)
    model = trained(smora)
    before = numbers(model)
    with pytest.raises(MergeError, match="keep the adapter unmerged"):
        absorb(model)
    assert_same(before, numbers(model))
    model = trained(lora)
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged into the base"):
        absorb(model)


def test_absorbing_below_fp32_names_the_loss_and_can_be_insisted_on():
    lora = case("lora", r=2)
    model = trained(lora).bfloat16()
    with pytest.raises(MergeError, match=r"would lose \d+\.\d% of the update"):
        absorb(model)
    absorb(model, lossy=True)
    assert not layers_of(model)[0].B.any()


def test_a_redraw_is_keyed_and_neutral():
    lora = case("lora", r=2)
    model, twin = trained(lora), trained(lora)
    first = layers_of(model)[0].A.clone()
    redraw(model, seed=5)
    redraw(twin, seed=5)
    assert torch.equal(lora.answer(model), lora.answer(lora.tiny.build()))
    assert torch.equal(layers_of(model)[0].A, layers_of(twin)[0].A)
    redraw(twin, seed=6)
    assert not torch.equal(layers_of(model)[0].A, layers_of(twin)[0].A)
    assert not torch.equal(layers_of(model)[0].A, first)
