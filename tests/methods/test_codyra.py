"""codyra: gates, shrinking, the end of a task, and what must equal what."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

import polyrank as pr
from polyrank.errors import ConfigError, MergeError, RunError
from polyrank.layers import AdaptedLinear, append, keep
from polyrank.parts.gates import FORMS, kept_ranks, shrink
from polyrank.parts.ramp import levels, twin_ranks
from polyrank.parts.settle import settled_ranks
from polyrank.testing import MODELS, assert_close

SHORT = {"levels": 2, "dense": 0.0, "kappa_max": 0.05}


def begun(bench, **options):
    work = bench("codyra", **{"r": 4, **SHORT, **options})
    work.begin(0)
    return work


def weights_of(work):
    return [layer.module.dense_weight().detach().clone() for layer in work.adapter.layers]


def gates_of(work):
    return [layer.core.gate.detach().clone() for layer in work.adapter.layers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "vit"])
def test_codyra_1_a_fresh_layer_is_the_base_in_any_dtype(name, dtype):
    tiny = MODELS[name]
    inputs = {k: v for k, v in tiny.inputs(dtype=dtype).items() if k != "labels"}
    expected = tiny.read(tiny.build(dtype)(**inputs))
    model = pr.adapt(tiny.build(dtype), "codyra", seed=1).eval()
    assert torch.equal(tiny.read(model(**inputs)), expected)
    assert all(layer.core.gate.abs().min() > 0 for layer in pr.adapter_of(model).layers)


def test_codyra_2_gates_of_one_are_lora_of_scale_one(bench):
    found = []
    for name, options in (("codyra", {"start": "ones"}), ("lora", {"scaling": 1.0})):
        work = bench(name, **{"r": 4, **options})
        work.begin(0)
        with torch.no_grad():
            for layer in work.adapter.layers:
                layer.B.copy_(torch.arange(layer.B.numel()).reshape(layer.B.shape) / 10)
        found.append(work.logits(work.rows()))
    assert_close(*found)


def test_codyra_2_ranks_may_be_permuted(bench):
    work = begun(bench)
    work.nudge()
    expected = work.logits(work.rows())
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in work.adapter.layers:
            layer.A.copy_(layer.A[order])
            layer.B.copy_(layer.B[:, order])
            layer.core.gate.copy_(layer.core.gate[order])
    assert_close(work.logits(work.rows()), expected)


def test_codyra_3_a_rank_without_gate_may_go_and_bounds_the_rank(bench):
    work = begun(bench, r=5)
    work.nudge()
    with torch.no_grad():
        for layer in work.adapter.layers:
            layer.core.gate[torch.tensor([0, 3])] = 0
    expected = work.logits(work.rows())
    assert kept_ranks(work.adapter) == {"first": 3, "second": 3}
    for layer in work.adapter.layers:
        assert int(torch.linalg.matrix_rank(layer.delta())) == 3
        keep(work.model, layer, layer.core.gate.nonzero().flatten())
    work.model.double()
    assert [layer.site.r for layer in work.adapter.layers] == [3, 3]
    assert_close(work.logits(work.rows()), expected)


@pytest.mark.parametrize("into", ["base", "bank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_codyra_4_answers_stay_when_a_task_ends(bench, into, dtype):
    work = begun(bench, into=into, dtype=dtype)
    for task in range(3):
        if task:
            work.begin(task)
        drawn = gates_of(work)
        work.steps(count=6)
        before, kept = work.logits(work.rows()), kept_ranks(work.adapter)
        assert sum(kept.values()) > 0
        work.end()
        assert_close(work.logits(work.rows()), before)
        assert all(not layer.B.any() for layer in work.adapter.layers)
        assert [layer.site.r for layer in work.adapter.layers] == [4, 4]
        assert not any(map(torch.equal, drawn, gates_of(work)))
        assert twin_ranks(work.adapter) == {"first": 4, "second": 4}


def test_codyra_5_the_base_is_its_start_and_all_archived_products(bench):
    work = begun(bench, kappa_max=0.2)
    start, ranks = weights_of(work), []
    for task in range(3):
        if task:
            work.begin(task)
        work.steps(count=6)
        ranks.append(kept_ranks(work.adapter))
        work.end()
    assert work.memory("codyra")["kept"] == ranks
    assert any(0 < rank < 4 for found in ranks for rank in found.values())
    for layer, weight in zip(work.adapter.layers, start, strict=True):
        A, B = layer.dormant
        assert len(A) == sum(found[layer.site.path] for found in ranks)
        assert_close(layer.module.dense_weight(), weight + B @ A)


def test_codyra_5_without_ranks_the_base_keeps_its_bits(bench):
    for into in ("base", "bank"):
        work = begun(bench, into=into)
        work.steps(count=3)
        with torch.no_grad():
            for layer in work.adapter.layers:
                layer.core.gate.zero_()
        before, answers = weights_of(work), work.logits(work.rows())
        work.end()
        assert all(map(torch.equal, weights_of(work), before))
        assert torch.equal(work.logits(work.rows()), answers)
        assert [len(saved.tensors) for saved in work.boundaries[0].exports(work).values()] == [2]


def test_codyra_6_at_first_only_b_moves(bench):
    work = begun(bench)
    optimizer = pr.optimizer(work.model, lr=0.1)
    attached = pr.attach(optimizer, work.model, total=9, workshop=work, evaluated=True)
    before = work.weights()
    work.model.train()
    attached.begin()
    batch = work.rows()
    nn.functional.cross_entropy(work.out(batch).logits, batch["labels"]).backward()
    for layer in work.adapter.layers:
        assert not layer.A.grad.any()
        assert not layer.core.gate.grad.any()
        assert layer.B.grad.any()
    optimizer.step()
    attached.detach()
    moved = {name for name, p in work.weights().items() if not torch.equal(p, before[name])}
    assert {name.split(".")[1] for name in moved if not name.startswith("head")} == {"B"}


@pytest.mark.parametrize("form", FORMS)
def test_codyra_9_without_gradient_the_sum_of_thresholds_decides(form):
    kappas = levels(100, 0.5, 50, 0.005)
    total = sum(kappas)
    margin = torch.tensor([0.1, 0.5, 0.99, 0.999])
    drawn = torch.cat([total * margin, total + 0.01 * (1.001 + margin)]).double()
    g = torch.cat([drawn, -drawn])
    for kappa in kappas:
        g = shrink(g, kappa, form)
    dies = torch.tensor([True] * 4 + [False] * 4).repeat(2)
    assert torch.equal(g == 0, dies)


def test_codyra_9_the_draw_alone_leaves_half_of_the_ranks():
    kappas = levels(500, 0.5, 50, 0.005)
    # Every normal value as often as it is drawn, without the luck of a draw.
    drawn = NormalDist()
    quantiles = [drawn.inv_cdf((i + 0.5) / 20000) for i in range(20000)]
    found = {}
    for form in FORMS:
        g = torch.tensor(quantiles, dtype=torch.float64)
        for kappa in kappas:
            g = shrink(g, kappa, form)
        found[form] = 16 * float((g != 0).double().mean())
    total = sum(kappas)
    for form, lost in (("soft", total), ("released", total + 0.005)):
        expected = 32 * (1 - drawn.cdf(lost))
        assert_close(found[form], expected, tol=1e-3, reason="20 000 values stand for all")
    assert [round(found[form], 1) for form in FORMS] == [8.3, 8.2]


def test_codyra_11_clip_vit_b_16_has_these_many():
    config = CLIPConfig(vision_config={"patch_size": 16})
    with torch.device("meta"):
        model = CLIPModel(config)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        adapted = pr.adapt(model, pr.method("codyra", r=16), targets)
    roles = pr.adapter_of(adapted).roles()
    count = {role: sum(p.numel() for p in params) for role, params in roles.items()}
    assert count["A"] + count["B"] == 4_423_680
    assert count["core"] == 2_304
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 4_425_984


# --- the schedule in training, and what is refused ------------------------------------------------


def test_the_rule_shrinks_after_each_real_step_as_the_schedule_says(bench):
    work = begun(bench, kappa_max=0.03, into="base")
    drawn = gates_of(work)
    work.steps(count=12)
    for layer, g in zip(work.adapter.layers, drawn, strict=True):
        for kappa in levels(12, 0.0, 2, 0.03):
            g = shrink(g, kappa)
        assert torch.equal(layer.core.twin, g)
    sign = work.method.vital_sign(work.adapter)
    assert sign["kept_ranks"] == sum(kept_ranks(work.adapter).values()) / 2
    assert sign["twin_ranks"] == sum(twin_ranks(work.adapter).values()) / 2
    assert 0 < sign["gate_size"] < 2


@pytest.mark.parametrize("first", [0.9, 0.7])
def test_the_published_second_beta_reaches_any_adam_and_the_first_is_the_runs(bench, first):
    work = begun(bench, r=2, beta_2=0.9999)
    groups = pr.parameter_groups(work.model, lr=0.1)
    other = nn.Parameter(torch.zeros(2))
    for made in (
        pr.optimizer(work.model, lr=0.1, betas=(first, 0.999)),
        torch.optim.Adam([*groups, {"params": [other]}], betas=(first, 0.999)),
    ):
        attached = pr.attach(made, work.model, total=9, workshop=work)
        found = [group["betas"] for group in made.param_groups]
        assert found[:2] == [(first, 0.9999)] * 2
        # What is no part of the adapter is none of its business.
        assert found[2:] == [(first, 0.999)] * (len(found) - 2)
        assert [group["weight_decay"] for group in made.param_groups[:2]] == [0.0, 0.0]
        attached.detach()
    assert len(found) == 3
    plain = torch.optim.SGD(pr.parameter_groups(work.model, lr=0.1))
    pr.attach(plain, work.model, total=9, workshop=work).detach()
    assert not any("betas" in group for group in plain.param_groups)


def test_no_tensor_is_chosen_by_the_word_gate():
    model = pr.adapt(MODELS["llama"].build(), "codyra", ["gate_proj", "up_proj"])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("polyrank_" in name for name in names)
    assert sum(name.endswith(".gate") for name in names) == len(names) / 3


def test_a_boundary_without_training_between_is_refused(bench):
    work = begun(bench)
    work.steps(count=2)
    work.end()
    before = weights_of(work)
    with pytest.raises(RunError, match="train between two boundaries"):
        work.end()
    assert all(map(torch.equal, weights_of(work), before))


def test_gates_that_are_not_finite_end_no_task(bench):
    work = begun(bench)
    work.steps(count=2)
    with torch.no_grad():
        work.adapter.layers[1].core.gate[2] = math.nan
    before = weights_of(work)
    with pytest.raises(RunError, match="second is the first"):
        work.end()
    assert all(map(torch.equal, weights_of(work), before))


def half(work):
    """Store the base weights in bf16, as a model loaded so would."""
    for layer in work.adapter.layers:
        base = layer.module.get_base_layer()
        base.weight.data = base.weight.data.bfloat16()


def test_a_base_below_fp32_keeps_its_bits_and_gets_a_bank(bench, monkeypatch):
    work = begun(bench, dtype=torch.float32)
    work.steps(count=4)
    half(work)
    before, kept = weights_of(work), kept_ranks(work.adapter)
    # The bench's own service would widen the base again.
    monkeypatch.setattr(work, "append", lambda name: append(work.model, seed=1))
    work.boundaries[0].finish(None, work, {})
    assert [len(v.bank[0]) for v in work.adapter.layers] == list(kept.values())
    after = weights_of(work)
    assert {weight.dtype for weight in after} == {torch.bfloat16}
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("lossy", [False, True])
def test_absorbing_into_bf16_names_the_loss_unless_it_is_asked_for(bench, lossy):
    work = begun(bench, dtype=torch.float32, into="base", lossy=lossy)
    work.steps(count=4)
    half(work)
    before = weights_of(work)
    if lossy:
        work.boundaries[0].start(None, work, {})
        work.boundaries[0].finish(None, work, {})
        assert not any(map(torch.equal, weights_of(work), before))
        return
    # Refused before a task is trained, and at its end if the base has changed meanwhile.
    with pytest.raises(
        MergeError, match=r"2 are stored below fp32 \(first in torch.bfloat16.*loss"
    ):
        work.boundaries[0].start(None, work, {})
    with pytest.raises(MergeError, match=r"would lose \d+\.\d% of the update.*lossy=True"):
        work.boundaries[0].finish(None, work, {})
    assert all(map(torch.equal, weights_of(work), before))
    assert work.memory("codyra") == {}


def test_a_quantised_base_is_refused_before_a_task_or_gets_a_bank(bench, monkeypatch):
    for into in ("base", "auto"):
        work = bench("codyra", r=4, into=into, **SHORT)
        monkeypatch.setattr(AdaptedLinear, "quantised", lambda self: True)
        if into == "base":
            with pytest.raises(MergeError, match=r"2 are quantised.*into='bank'"):
                work.begin(0)
        else:
            work.begin(0)
            work.steps(count=4)
            kept = kept_ranks(work.adapter)
            work.end()
            assert [len(v.bank[0]) for v in work.adapter.layers] == list(kept.values())
        monkeypatch.undo()


# --- in one's own loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["base", "bank"])
def test_a_task_ends_in_ones_own_loop_as_in_the_engine(bench, into, tmp_path):
    works = [begun(bench, into=into, kappa_max=0.2) for _ in range(2)]
    ours, theirs = works
    for task in range(2):
        for work in works:
            if task:
                work.begin(task)
            work.steps(count=6)
        drawn, before = gates_of(ours), ours.logits(ours.rows())
        kept = kept_ranks(ours.adapter)
        assert pr.settle(ours.model, task=task) == kept
        theirs.end()
        assert 0 < sum(kept.values()) < 8
        assert_close(ours.logits(ours.rows()), before)
        for mine, other in zip(ours.adapter.layers, theirs.adapter.layers, strict=True):
            assert torch.equal(mine.module.dense_weight(), other.module.dense_weight())
            for A, B in zip(settled_ranks(mine), settled_ranks(other), strict=True):
                assert torch.equal(A, B)
            # The draws of both are keyed differently.
            with torch.no_grad():
                for key, param in mine.core.named_parameters():
                    other.core.get_parameter(key).copy_(param)
                other.A.copy_(mine.A)
        assert not any(map(torch.equal, drawn, gates_of(ours)))
    ours.model.save_pretrained(tmp_path / "adapter")
    # On the base from before, the archive acts.
    torch.manual_seed(5)
    base = type(ours.model.get_base_model())().double()
    loaded = pr.load(base, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    answers = loaded.double()(ours.rows()["x"])
    # It was loaded in fp32.
    assert_close(answers, ours.logits(ours.rows()), dtype=torch.float32)


def test_what_ends_no_task_is_refused(bench):
    work = begun(bench)
    attached = pr.attach(pr.optimizer(work.model, lr=0.1), work.model, total=9)
    work.nudge()
    before = work.weights()
    with pytest.raises(ConfigError, match=r"call detach\(\)"):
        pr.settle(work.model, task=0)
    attached.detach()
    assert all(torch.equal(p, before[name]) for name, p in work.weights().items())
    pr.settle(work.model, task=0)
    with pytest.raises(RunError, match="train between two boundaries"):
        pr.settle(work.model, task=1)
    with pytest.raises(ConfigError, match=r"is 'lora', whose tasks do not end like this"):
        pr.settle(bench("lora").model, task=0)
    with pytest.raises(ConfigError, match=r"prune: a task of 'codyra' ends by polyrank\.settle"):
        pr.prune(work.model)
    assert [layer.site.r for layer in work.adapter.layers] == [4, 4]


def test_presets_are_the_published_settings():
    tail, plain = (pr.method("codyra", preset=name) for name in ("x-tail", "arguments"))
    for made, kappa in ((tail, 0.005), (plain, 7e-4)):
        facts = (made.r, made.scaling, made.kappa_max, made.levels, made.dense, made.beta_2)
        assert facts == (16, 1.0, kappa, 50, 0.5, 0.9999)
        assert (made.form, made.start, len(made.losses())) == ("released", "normal", 1)
    assert pr.method("codyra").form == "soft"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r: got 0"),
        ({"kappa_max": -0.1}, "kappa_max: got -0.1, expected >= 0"),
        ({"kappa_max": math.nan}, "kappa_max: got nan"),
        ({"dense": 1.5}, r"dense: got 1.5, expected 0..1"),
        ({"dense": -0.5}, "dense: got -0.5"),
        ({"levels": 1}, "levels: got 1, expected >= 2"),
        ({"beta_2": 1.0}, "beta_2: got 1.0"),
        ({"form": "hard"}, "form: got 'hard'"),
        ({"start": "zeros"}, "start: got 'zeros'"),
        ({"into": "weights"}, "into: got 'weights'"),
        ({"lossy": True}, "lossy: got true with into='auto'.*use into='base'"),
        ({"kapa_max": 0.1}, "did you mean 'kappa_max'"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ConfigError, match=says):
        pr.method("codyra", **options)


def test_what_is_no_linear_layer_is_no_target():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises((ConfigError, ValueError), match=r"0.*Embedding|Embedding"):
        pr.adapt(net, "codyra", ["0"])
