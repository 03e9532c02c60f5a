"""Blocks whose shapes change, several of them in one place, and what a block is told."""

import copy

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.engine.attachment import attach
from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Flow, keyed
from polyrank.layers import BlockHost, adapter_of, replica, reshaped, saved_of
from polyrank.testing import MODELS, Case, assert_close

pytestmark = pytest.mark.usefixtures("toys")


def case(**options):
    return Case(pr.method("growing", **options), 0, MODELS["llama"])


def grown(widths=(4, 2)):
    toy = case()
    model = toy.build()
    toy.train(model)
    for index, width in enumerate(widths):
        with reshaped(model) as blocks:
            blocks[index % 2].grow(width)
        toy.train(model)
    return toy, model


def test_a_block_grows_and_the_config_says_so():
    toy = case()
    model = toy.build()
    toy.train(model)
    now = toy.answer(model)
    old = adapter_of(model).blocks[0].up[0].weight
    with reshaped(model) as blocks:
        blocks[0].grow(5)
        assert "model.layers.0:mlp" not in model.peft_config["default"].sites
    assert torch.equal(toy.answer(model), now)
    assert model.peft_config["default"].sites == {"model.layers.0:mlp": {"block": {"widths": [5]}}}
    assert not old.requires_grad
    before = old.clone()
    toy.train(model)
    assert torch.equal(old, before)
    assert adapter_of(model).blocks[0].up[1].weight.any()
    assert not torch.equal(toy.answer(model), now)


@pytest.mark.parametrize("low", [False, True], ids=["filled", "meta"])
def test_a_grown_block_is_rebuilt_by_from_pretrained(low, tmp_path):
    toy, model = grown()
    model.save_pretrained(tmp_path)
    again = pr.load(toy.tiny.build(), tmp_path, low_cpu_mem_usage=low).eval()
    assert not any(p.is_meta for p in again.parameters())
    assert [b.widths for b in adapter_of(again).blocks] == [[3, 4], [3, 2]]
    assert torch.equal(toy.answer(again), toy.answer(model))
    assert saved_of(model).config["sites"]["model.layers.1:mlp"] == {"block": {"widths": [2]}}


def test_a_frozen_adapter_stays_frozen_when_its_blocks_change():
    _toy, model = grown()
    for param in model.parameters():
        param.requires_grad_(False)
    with reshaped(model) as blocks:
        blocks[0].grow(1)
    assert not any(p.requires_grad for p in model.parameters())


def test_an_error_between_two_changes_leaves_an_adapter_that_can_be_saved(tmp_path):
    toy, model = grown(())

    def half():
        with reshaped(model) as blocks:
            blocks[0].grow(5)
            blocks[1].grow("wide")

    with pytest.raises(TypeError):
        half()
    assert model.peft_config["default"].sites == {"model.layers.0:mlp": {"block": {"widths": [5]}}}
    assert adapter_of(model).blocks[0].up[1].weight.requires_grad
    model.save_pretrained(tmp_path)
    again = pr.load(toy.tiny.build(), tmp_path).eval()
    assert torch.equal(toy.answer(again), toy.answer(model))


def test_blocks_do_not_change_under_an_optimiser():
    toy = case()
    model = toy.build()
    attachment = attach(torch.optim.SGD(pr.parameter_groups(model, lr=0.1)), model)
    with pytest.raises(ConfigError, match="reshaped: an optimiser is attached"), reshaped(model):
        pass
    attachment.detach()


def test_two_blocks_stand_in_one_transformer_block():
    toy = case(pair=True)
    model = toy.build()
    assert torch.equal(toy.answer(model), toy.answer(toy.tiny.build()))
    toy.train(model)
    gains = [b.gain.item() for b in adapter_of(model).blocks if hasattr(b, "gain")]
    assert len(gains) == 2
    assert all(gain != 1 for gain in gains)
    assert len(adapter_of(model).blocks) == 4
    with model.disable_adapter():
        assert torch.equal(toy.answer(model), toy.answer(toy.tiny.build()))


def test_two_blocks_at_one_place_are_refused(toys, monkeypatch):
    block = type(pr.method("growing").sub_block(adapter_of(case().build()).layers[0].site)[0])
    monkeypatch.setattr(
        toys["growing"], "sub_block", lambda self, site: [block(24, 2), block(24, 3)]
    )
    with pytest.raises(ConfigError, match="several blocks at one add point"):
        case().build()


def test_the_blocks_of_all_active_adapters_act():
    toy, model = grown(())
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("second")
    toy.train(model)
    tuner = model.base_model

    def mlp(names):
        tuner.set_adapter(names)
        layer = model.get_base_model().model.layers[0].mlp
        with torch.no_grad():
            return layer(x)

    x = torch.randn(2, 5, 24, generator=keyed("x"))
    both, one, two, none = (mlp(n) for n in (["default", "second"], ["default"], ["second"], []))
    assert not torch.equal(both, one)
    # Each adds its part to the base; the factors inside of the MLP are those of both.
    for block in (m for m in model.modules() if isinstance(m, BlockHost)):
        for parts in block.owned.values():
            for up in parts.up:
                nn.init.zeros_(up.weight)
    linear = [mlp(n) for n in (["default", "second"], ["default"], ["second"], [])]
    sides = [a - b for a, b in zip((both, one, two, none), linear, strict=True)]
    assert_close(sides[0], sides[1] + sides[2], tol=1e-5, reason="differences of fp32 sums")


def test_a_block_knows_its_width_its_neighbours_and_the_layers_that_are_adapted():
    seen = []

    class Looking(type(pr.method("growing"))):
        def sub_block(self, site):
            seen.append(site)
            return super().sub_block(site)

    from polyrank.frame import registry

    Looking.name = "growing"
    registry._found["growing"] = Looking
    pr.adapt(MODELS["llama"].build(), Looking(), target_modules=["q_proj"])
    assert [site.d_in for site in seen] == [24, 24]
    assert seen[0].adapted == ("self_attn.q_proj",)
    assert {"mlp", "mlp.up_proj", "self_attn.q_proj"} <= set(seen[0].modules)
    assert not any("base_layer" in p or "polyrank" in p for p in seen[0].modules)


def test_a_block_sees_the_mask_of_its_tokens_and_what_it_stands_around():
    toy = case()
    model = toy.build()
    seen = []
    block = adapter_of(model).blocks[0]
    block.register_forward_pre_hook(lambda m, args: seen.append((args[0], args[3])))
    toy.answer(model)
    base, flow = seen[0]
    assert isinstance(flow, Flow)
    assert flow.mask.sum() == 3 * 7 - 2
    layer = model.get_base_model().model.layers[0]
    assert base.module is layer.mlp
    assert base.inside is layer
    assert base.adapter == "default"
    assert base.alone


def test_a_copy_of_the_model_has_blocks_of_its_own():
    toy, model = grown()
    twin = copy.deepcopy(model)
    now = toy.answer(model)
    assert torch.equal(toy.answer(twin), now)
    with torch.no_grad():
        for block in adapter_of(model).blocks:
            block.up[0].weight.add_(1)
    assert torch.equal(toy.answer(twin), now)
    assert not torch.equal(toy.answer(model), now)


def test_a_copy_leaves_behind_what_a_training_forward_left():
    toy, model = grown(())
    block = adapter_of(model).blocks[0]
    model.train()
    toy.loss(model).backward(retain_graph=True)
    block.left["kept"] = block.up[0].weight.sum()
    twin = copy.deepcopy(model)
    assert not adapter_of(twin).blocks[0].left
    assert "kept" in block.left
    assert torch.equal(toy.answer(twin), toy.answer(model))


def test_a_lowered_model_keeps_what_a_block_calls_exact():
    toy, model = grown()
    with torch.no_grad():
        adapter_of(model).blocks[0].age.fill_(1 + 2**-12)
    model.bfloat16()
    block = adapter_of(model).blocks[0]
    assert block.age.dtype == torch.float32
    assert float(block.age) == 1 + 2**-12
    assert block.up[0].weight.dtype == torch.bfloat16
    assert torch.isfinite(toy.answer(model)).all()


def test_what_a_block_cannot_do_is_refused():
    toy, model = grown()
    with pytest.raises(ConfigError, match="holds blocks, which cannot be kept twice"):
        replica(model, "slow")
    with pytest.raises(MergeError, match="is not linear"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="answer for a whole batch"):
        model(**toy.tiny.inputs(), adapter_names=["default"] * 3)
    with pr.view(model, "slow"), pytest.raises(ConfigError, match="keeps no"):
        toy.answer(model)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_blocks_answer_as_eager_ones():
    model = grown()[1]
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 24, generator=keyed("x"))
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    expected, found = mlp(x), compiled(x)
    assert_close(found, expected)
    params = [p for p in mlp.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(y.square().sum(), params) for y in (found, expected)]
    for one, two in zip(*grads, strict=True):
        assert_close(one, two)
    torch._dynamo.reset()
