"""Side branches, heads that grow, rules, penalties and row scales, each with a toy."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import polyrank as pr
from polyrank.engine.attachment import attach
from polyrank.errors import ConfigError
from polyrank.frame import (
    PenaltyRule,
    Step,
    keyed,
)
from polyrank.layers import (
    AdaptedLinear,
    BlockHost,
    adapter_of,
    grow_head,
)
from polyrank.testing import MODELS, Case, assert_close, check_method

pytestmark = pytest.mark.usefixtures("toys")


def case(name, model="llama", **options):
    return Case(pr.method(name, **options), 0, MODELS[model])


def trained(case, steps=2, **config):
    model = case.build(**config)
    case.train(model, steps=steps)
    return model


def layers_of(model):
    return adapter_of(model).layers


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("targets", ["inside", "beside", "both"])
def test_a_block_works_inside_and_beside_adapted_layers(model, targets):
    names = {
        ("llama", "inside"): ["up_proj", "down_proj"],
        ("llama", "beside"): ["q_proj"],
        ("gpt2", "inside"): ["c_fc"],
        ("gpt2", "beside"): ["c_attn"],
    }.get((model, targets), "all-linear")
    toy = case("sided", model, family=model)
    base = toy.answer(toy.tiny.build())
    adapted = toy.build(target_modules=names)
    assert torch.equal(toy.answer(adapted), base)
    toy.train(adapted)
    adapter = adapter_of(adapted)
    assert len(adapter.blocks) == 2
    assert all(block.up.weight.any() for block in adapter.blocks)
    assert all(torch.equal(b.mean, torch.full((24,), 0.5)) for b in adapter.blocks)
    assert set(adapter.roles()) == {"A", "B", "side", "descriptor"}
    now = toy.answer(adapted)
    with adapted.disable_adapter():
        assert torch.equal(toy.answer(adapted), base)
    with pr.view(adapted, "base"):
        assert torch.equal(toy.answer(adapted), base)
    assert torch.equal(toy.answer(adapted), now)
    assert torch.equal(toy.answer(adapted.unload()), base)


def test_the_tap_reads_what_enters_the_norm_and_nothing_stays_behind():
    toy = case("sided")
    model = trained(toy)
    block = adapter_of(model).blocks[0]
    seen = {}
    inside = model.get_base_model().model.layers[0]
    inside.post_attention_layernorm.register_forward_pre_hook(
        lambda module, args: seen.update(norm=args[0])
    )
    block.register_forward_pre_hook(lambda module, args: seen.update(tapped=args[2], x=args[1]))
    toy.answer(model)
    assert seen["tapped"] is seen["norm"]
    assert not torch.equal(seen["x"], seen["tapped"])
    with model.disable_adapter():
        toy.answer(model)
    assert all(not m.tapped for m in model.modules() if isinstance(m, BlockHost))


def test_a_block_stands_around_a_transformer_block_and_reads_a_part_of_it(toys, monkeypatch):
    inner = toys["sided"].sub_block

    def around(self, site):
        block = inner(self, site)
        block.add = ""
        return block

    monkeypatch.setattr(toys["sided"], "sub_block", around)
    toy = case("sided")
    base = toy.answer(toy.tiny.build())
    model = toy.build()
    assert torch.equal(toy.answer(model), base)
    toy.train(model)
    assert not torch.equal(toy.answer(model), base)
    layer, block = model.get_base_model().model.layers[0], adapter_of(model).blocks[0]
    assert isinstance(layer.side_block, BlockHost)
    seen = []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    block.register_forward_pre_hook(lambda m, args: seen.append(args[2]))
    toy.answer(model)
    # The original runs once.
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert all(not m.tapped for m in model.modules() if isinstance(m, BlockHost))
    with model.disable_adapter():
        assert torch.equal(toy.answer(model), base)
    assert all(not m.tapped for m in model.modules() if isinstance(m, BlockHost))
    assert torch.equal(toy.answer(model.unload()), base)


def test_the_sided_toy_keeps_the_contract(toys):
    checks = ["neutral", "declared", "counted", "base", "merged", "gradients", "undecayed", "vital"]
    assert check_method("sided", models=["llama"], checks=checks) == len(checks)


def test_a_forward_that_a_module_had_of_its_own_stays_in_force_and_comes_back():
    toy = case("sided")
    base = toy.tiny.build()
    plain, mlp = toy.answer(base), base.model.layers[0].mlp

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    add_hook_to_module(mlp, Doubling())
    own, expected = mlp.forward, toy.answer(base)
    assert not torch.equal(expected, plain)
    model = pr.adapt(base, toy.method).eval()
    assert torch.equal(toy.answer(model), expected)
    assert torch.equal(toy.answer(copy.deepcopy(model)), expected)
    toy.train(model)
    trained = toy.answer(model)
    assert not torch.equal(trained, expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        adapter_of(model).blocks[0].up.weight.zero_()
    assert torch.equal(toy.answer(twin), trained)
    assert not torch.equal(toy.answer(model), trained)
    assert torch.equal(toy.answer(model.unload()), expected)
    assert mlp.forward is own
    remove_hook_from_module(mlp)
    assert torch.equal(toy.answer(base), plain)


def test_a_forward_put_around_a_block_later_outlives_it():
    toy = case("sided")
    base = toy.tiny.build()
    mlp = base.model.layers[0].mlp
    model = pr.adapt(base, toy.method)
    toy.train(model)
    now, inner = toy.answer(model), mlp.forward
    mlp.forward = lambda x: 2 * inner(x)
    doubled = toy.answer(model)
    assert not torch.equal(doubled, now)
    host = mlp._modules["side_block"]
    mlp._modules["side_block"] = nn.Sequential(host)
    assert torch.equal(toy.answer(model), doubled)
    mlp._modules["side_block"] = host
    plain = model.unload()
    expected = toy.answer(plain)
    again = pr.adapt(plain, toy.method).eval()
    assert torch.equal(toy.answer(again), expected)
    assert torch.equal(toy.answer(again.unload()), expected)
    del mlp.forward
    assert torch.equal(toy.answer(base), toy.answer(toy.tiny.build()))


def test_a_block_recomputed_in_backward_gets_the_same_gradients():
    toy = case("sided")
    model = trained(toy)
    model.train()
    toy.loss(model).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inner = model.get_base_model()
    # transformers 5.23 renamed the switch.
    name = "activation_checkpointing_enable"
    getattr(inner, name, inner.gradient_checkpointing_enable)({"use_reentrant": False})
    toy.loss(model).backward()
    for name, param in model.named_parameters():
        if name in expected:
            assert_close(param.grad, expected[name])


def test_two_adapters_bring_blocks_of_different_size():
    toy, wide = case("sided"), pr.method("sided", width=7, first=1)
    model = trained(toy)
    now = toy.answer(model)
    model.add_adapter("wide", pr.PolyrankConfig(method="sided", options=wide.options(), seed=3,
                                                target_modules="all-linear"))  # fmt: skip
    assert torch.equal(toy.answer(model), now)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".wide." in n)
    model.set_adapter("wide")
    assert len(adapter_of(model).blocks) == 1
    assert adapter_of(model).blocks[0].down.weight.shape[0] == 7
    assert torch.equal(toy.answer(model), toy.answer(toy.tiny.build()))
    model.set_adapter("default")
    assert torch.equal(toy.answer(model), now)
    model.set_adapter("wide")
    with pytest.warns(UserWarning, match="wide was active which is now deleted"):
        model.delete_adapter("wide")
    assert torch.equal(toy.answer(model), now)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("options", "words"), [({"family": "gpt2"}, "has no module 'ln_2' to tap")]
)
def test_a_block_at_a_place_that_is_not_there_is_refused_whole(options, words):
    base = MODELS["llama"].build()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError, match=words):
        pr.adapt(base, pr.method("sided", **options))
    assert kinds == [type(m) for m in base.modules()]


def test_a_block_in_a_model_without_blocks_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(self.one(x))

    with pytest.raises(ConfigError, match="found no transformer block in Two"):
        pr.adapt(Two(), pr.method("sided"), target_modules=["one"])


# --- head -----------------------------------------------------------------------------------------

HEAD = {"module": "classifier", "names": ["a", "b"]}


@pytest.mark.parametrize("model", ["vit", "bert"])
def test_a_head_grows_without_touching_old_rows(model):
    lora = case("lora", model, r=2)
    adapted = lora.build(head=dict(HEAD))
    assert lora.answer(adapted).shape == (3, 2)
    assert adapter_of(adapted).roles()["head"]
    old = adapter_of(adapted).head.weight.clone()
    grow_head(adapted, ["c", "d"])
    head = adapter_of(adapted).head
    assert torch.equal(head.weight[:2], old)
    assert head.names == ["a", "b", "c", "d"] == adapted.peft_config["default"].head["names"]
    assert lora.answer(adapted).shape == (3, 4)
    held = {id(p) for group in pr.parameter_groups(adapted, lr=1.0) for p in group["params"]}
    assert id(head.weight) in held
    before = head.weight.clone()
    lora.train(adapted)
    assert not torch.equal(head.weight, before)


def test_the_replaced_classifier_is_neither_adapted_nor_lost():
    lora = case("lora", "vit", r=2)
    base = lora.tiny.build()
    expected = lora.answer(base)
    model = pr.adapt(base, lora.method, head="classifier").eval()
    assert not any("classifier" in layer.site.path for layer in layers_of(model))
    assert lora.answer(model).shape == (3, 0)
    with model.disable_adapter():
        assert torch.equal(lora.answer(model), expected)
    assert torch.equal(lora.answer(model.unload()), expected)


def test_merging_keeps_the_head():
    lora = case("lora", "vit", r=2)
    model = trained(lora, head=dict(HEAD)).double()
    answer = lora.answer(model, dtype=torch.float64)
    plain = model.merge_and_unload()
    assert_close(lora.answer(plain, dtype=torch.float64), answer, dtype=torch.float32)
    assert not any(isinstance(m, AdaptedLinear) for m in plain.modules())


def test_two_adapters_have_heads_of_their_own():
    lora = case("lora", "vit", r=2)
    model = lora.build(head=dict(HEAD))
    config = copy.deepcopy(model.peft_config["default"])
    config.head = {"module": "classifier", "names": ["x"]}
    model.add_adapter("other", config)
    assert lora.answer(model).shape == (3, 2)
    model.set_adapter("other")
    assert lora.answer(model).shape == (3, 1)
    assert [n for n, p in model.named_parameters() if "head" in n and p.requires_grad] == [
        f"base_model.model.classifier.polyrank_head.other.{part}" for part in ("weight", "bias")
    ]
    with pytest.warns(UserWarning, match="other was active which is now deleted"):
        model.delete_adapter("other")
    assert lora.answer(model).shape == (3, 2)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"module": "score"}, "no module 'score'"),
        ({"module": "vit.layernorm"}, "without in_features"),
        ({"names": ["a"]}, "expected .*'module': 'classifier'"),
    ],
    ids=["missing", "no-width", "no-module"],
)
def test_a_head_that_does_not_fit_is_refused(head, words):
    with pytest.raises(ConfigError, match=words):
        case("lora", "vit").build(head=head)


def test_a_class_is_added_once_and_only_where_a_head_is():
    lora = case("lora", "vit", r=2)
    model = lora.build(head=dict(HEAD))
    with pytest.raises(ConfigError, match=r"classes \['b'\] are already there"):
        grow_head(model, ["c", "b"])
    assert adapter_of(model).head.names == ["a", "b"]
    with pytest.raises(ConfigError, match="has none; make it with"):
        grow_head(lora.build(), ["c"])


# --- rules, penalties, row scale ------------------------------------------------------------------


def test_a_penalty_counts_once_per_update_whatever_the_accumulation():
    grads = {}
    for micro in (1, 4):
        toy = case("scaled", pull=True)
        model = toy.build()
        optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.0))
        attachment = attach(optimizer, model, accumulation=micro)
        model.train()
        for _ in range(micro):
            (0.0 * toy.loss(model)).backward()
        attachment.before_clip()
        grads[micro] = [layer.core.weight.grad.clone() for layer in layers_of(model)]
        attachment.detach()
    for one, four in zip(grads[1], grads[4], strict=True):
        assert_close(one, torch.full((4,), 0.5))
        assert_close(four, one)


def test_a_penalty_reports_its_value():
    model = case("scaled", pull=True).build()
    rule = PenaltyRule(pr.method("scaled", pull=True).penalties()[0])
    rule.bind(adapter_of(model), None, None)
    rule.grads(Step(index=0, total=1, lr=0.1, peak=0.1))
    assert rule.value == pytest.approx(0.25 * 4 * len(layers_of(model)))


def test_a_row_scale_reaches_factors_and_gate_and_not_the_input():
    toy = case("scaled")
    model = trained(toy)
    layer = layers_of(model)[0].module
    view = layer.views["default"]
    x = torch.randn(5, layer.in_features, generator=keyed("x"), requires_grad=True)
    dy = torch.randn(5, layer.out_features, generator=keyed("dy"))
    scale = torch.rand(layer.out_features, generator=keyed("rows")) + 0.5

    def grads(row_scale, dy):
        view.row_scale = row_scale
        found = torch.autograd.grad(
            layer(x), [x, view.A, view.B, view.core.weight], dy, retain_graph=False
        )
        view.row_scale = None
        return found

    plain, rows, scaled = grads(None, dy), grads(scale, dy), grads(None, dy * scale)
    assert_close(rows[0], plain[0])
    for found, expected in zip(rows[1:], scaled[1:], strict=True):
        assert_close(found, expected)


def test_a_rule_sets_the_row_scale_at_the_start_of_an_update():
    toy = case("scaled", rows=True)
    model = toy.build()
    toy.train(model, steps=3)
    assert all(float(layer.row_scale[0]) == 3.0 for layer in layers_of(model))


def test_a_row_scale_that_nothing_would_apply_is_refused(toys):
    toy = case("moe-lora", router="smear", r=4, experts=2)
    model = toy.build()
    layers_of(model)[0].row_scale = torch.ones(layers_of(model)[0].site.d_out)
    with pytest.raises(ConfigError, match="runs without a kernel"):
        toy.answer(model)
