"""A toy user of every contract: shapes, what survives a fresh process, what is refused."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from torch import nn

import polyrank as pr
from polyrank.engine.attachment import attach
from polyrank.errors import CheckpointError, ConfigError, MergeError
from polyrank.frame import (
    Boundary,
    Flow,
    Job,
    PenaltyRule,
    Phase,
    Step,
    Workshop,
    keyed,
    load_file,
    registry,
)
from polyrank.layers import (
    AdaptedLinear,
    BlockHost,
    absorb,
    adapter_of,
    append,
    grow_head,
    keep,
    redraw,
    replica,
)
from polyrank.testing import MODELS, Case, assert_close, check_method

TOYS = Path(__file__).parent / "toys"


@pytest.fixture(autouse=True)
def toys():
    """The toy methods by name, registered for one test."""
    found = {file.stem: load_file(file) for file in sorted(TOYS.glob("*.py"))}
    yield found
    for name in found:
        del registry._found[name]


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


# --- bank ----------------------------------------------------------------------------------------


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


# --- shadow --------------------------------------------------------------------------------------


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


# --- replica and view ----------------------------------------------------------------------------


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


# --- keep, absorb, redraw ------------------------------------------------------------------------


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
    with pytest.raises(MergeError, match="weighs ranks for each token"):
        absorb(model)
    assert_same(before, numbers(model))
    model = trained(lora)
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged already"):
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


# --- blocks --------------------------------------------------------------------------------------


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


def test_the_sided_toy_keeps_the_contract(toys):
    checks = ["neutral", "declared", "counted", "base", "merged", "gradients", "undecayed", "vital"]
    assert check_method("sided", models=["llama"], checks=checks) == len(checks)


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


# --- head ----------------------------------------------------------------------------------------

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


# --- rules, penalties, row scale -----------------------------------------------------------------


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


# --- phases and jobs -----------------------------------------------------------------------------


class Detect(Boundary):
    """Looks at batches until it saw three, trains the side, then all, then looks at what it did."""

    persistent = False

    def start(self, task, workshop, state):
        state.update(seen=0, done=[], total=0.0)

    def next(self, task, workshop, state):
        if state["seen"] < 3:
            return Job(name="detect", step=self.look)
        for phase in (Phase(name="side", train=frozenset({"side"})), Phase(name="all")):
            if phase.name not in state["done"]:
                state["done"].append(phase.name)
                return phase
        return None

    def look(self, workshop, state):
        state["total"] += float(next(iter(workshop.data("train", seed=state["seen"])))["x"])
        state["seen"] += 1
        return state["seen"] == 3

    def check(self, metrics, state):
        return "stop" if metrics["loss"] < 0.1 else "go"

    def finish(self, task, workshop, state):
        state["finished"] = True


class Bench(Workshop):
    """As much of a workshop as the toy needs."""

    def data(self, role, split="train", *, seed=None):
        yield {"x": torch.rand((), generator=keyed(role, split, seed or 0))}


def drive(boundary, workshop, state, log, *, killed_after=math.inf):
    """What an engine does; `killed_after` calls it dies, with the state as saved last."""
    calls = 0
    if "seen" not in state:
        boundary.start(None, workshop, state)
    while (work := boundary.next(None, workshop, state)) is not None:
        if isinstance(work, Phase):
            log.append(work.name)
            continue
        done = False
        while not done:
            done = work.step(workshop, state)
            state = json.loads(json.dumps(state))
            calls += 1
            if calls == killed_after:
                return state
        log.append(work.name)
    boundary.finish(None, workshop, state)
    return state


def test_a_killed_task_finds_its_way_back_from_its_state_alone():
    whole_log, broken_log = [], []
    whole = drive(Detect(), Bench(), {}, whole_log)
    assert whole_log == ["detect", "side", "all"]
    broken = drive(Detect(), Bench(), {}, broken_log, killed_after=2)
    assert broken["seen"] == 2
    resumed = drive(Detect(), Bench(), json.loads(json.dumps(broken)), broken_log)
    assert broken_log == whole_log
    assert resumed == whole
    assert whole["finished"]


def test_a_boundary_says_when_a_phase_is_good_enough_and_what_is_evaluated():
    boundary = Detect()
    assert boundary.check({"loss": 0.05}, {}) == "stop"
    assert boundary.check({"loss": 0.5}, {}) == "go"
    assert list(boundary.deploys(Bench())) == [""]
    assert not boundary.persistent
    assert Boundary.persistent


def test_the_plain_boundary_is_one_phase():
    boundary, state = Boundary(), {}
    boundary.start(None, Bench(), state)
    first = boundary.next(None, Bench(), state)
    assert (first.name, first.train, first.keep) == ("train", None, "last")
    assert boundary.next(None, Bench(), json.loads(json.dumps(state))) is None


def test_a_phase_trains_its_roles_only():
    toy = case("sided")
    model = toy.build()
    adapter_of(model).train_only(frozenset({"side"}))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("polyrank_side" in n and "probe" not in n for n in names)
    adapter_of(model).train_only(None)
    assert any("polyrank_A" in n for n, p in model.named_parameters() if p.requires_grad)


# --- what a fresh process rebuilds ---------------------------------------------------------------

READER = """
import json, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
import polyrank
from peft import PeftModel
from polyrank.testing import MODELS, Case

torch.set_num_threads(1)
root, toys = Path(sys.argv[1]), Path(sys.argv[2])
for file in sorted(toys.glob("*.py")):
    polyrank.load_method_file(file)
for folder in sorted(root.iterdir()):
    name, model = folder.name.split("-")
    tiny = MODELS[model]
    case = Case(polyrank.method("lora"), 0, tiny)
    loaded = PeftModel.from_pretrained(tiny.build(), str(folder)).eval()
    wanted = load_file(folder / "answers")
    found = {"": case.answer(loaded)}
    if "slow" in wanted:
        with polyrank.view(loaded, "slow"):
            found["slow"] = case.answer(loaded)
    same = all(torch.equal(found[key.removeprefix("live")], wanted[key]) for key in wanted)
    print(folder.name, same)
"""


def bank():
    lora = case("lora", r=3)
    model = trained(lora)
    replica(model, "slow")
    append(model, 2)
    lora.train(model)
    append(model, 1)
    lora.train(model)
    return lora, model


def pruned():
    toy = case("scaled", r=4)
    model = trained(toy)
    for index, layer in enumerate(layers_of(model)):
        keep(model, layer, torch.arange(1 + index % 3))
    toy.train(model)
    return toy, model


def shadow():
    toy = case("shadowed", delta="matrix")
    return toy, trained(toy)


def head():
    smora = case("smora", "vit", r=4, k=2)
    model = trained(smora, head=dict(HEAD))
    grow_head(model, ["c"])
    smora.train(model)
    return smora, model


def block():
    toy = case("sided", first=1)
    model = trained(toy)
    replica(model, "slow")
    toy.train(model)
    return toy, model


def test_a_fresh_process_rebuilds_every_shape_from_the_config(tmp_path, toys):
    wanted = []
    for make in (bank, pruned, shadow, head, block):
        toy, model = make()
        folder = tmp_path / "saved" / f"{make.__name__}-{toy.tiny.name}"
        model.save_pretrained(folder)
        answers = {"live": toy.answer(model)}
        if any("polyrank_replica" in n for n, _ in model.named_parameters()):
            with pr.view(model, "slow"):
                answers["slow"] = toy.answer(model)
        save_file({k: v.contiguous() for k, v in answers.items()}, folder / "answers")
        wanted.append(f"{folder.name} True")
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "saved", TOYS],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == sorted(wanted)


@pytest.mark.parametrize("low", [False, True], ids=["filled", "meta"])
def test_structure_loads_from_the_config_here_too(low, tmp_path):
    for make in (bank, pruned, shadow):
        toy, model = make()
        folder = tmp_path / make.__name__
        model.save_pretrained(folder)
        answer = toy.answer(model)
        again = PeftModel.from_pretrained(toy.tiny.build(), str(folder), low_cpu_mem_usage=low)
        assert torch.equal(toy.answer(again.eval()), answer)
        assert not any(p.is_meta for p in again.parameters())
        notes = json.loads((folder / "adapter_config.json").read_text())["sites"]
        assert len(notes) == len(layers_of(model))


def test_a_config_that_forgets_the_bank_is_refused_before_anything_is_copied(tmp_path):
    _, model = bank()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    about = json.loads(file.read_text())
    about["sites"] = {}
    file.write_text(json.dumps(about))
    assert any(
        "polyrank_bank" in key for key in read_tensors(tmp_path / "adapter_model.safetensors")
    )
    with pytest.raises(CheckpointError, match=r"polyrank_bank\S+ is not in the config"):
        PeftModel.from_pretrained(MODELS["llama"].build(), str(tmp_path))


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_a_flow_knows_that_it_is_plain():
    flow = Flow()
    with flow.put(view="slow"):
        assert not flow.plain
    assert flow.plain
