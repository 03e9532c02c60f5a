"""osf and full in one's own loop: projections, the end of a task, what is refused in time."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import polyrank as pr
from polyrank import engine
from polyrank.errors import ConfigError, InertError
from polyrank.frame import keyed
from polyrank.layers import absorb, adapter_of, redraw
from polyrank.parts.resplit import end_task
from polyrank.parts.subspaces import nest
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits


def net(layers=2, rank=12):
    """Layers of 12 × 12 with a tanh between; the first weight may have few singular values."""
    model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(12, 12), nn.Tanh())])
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(torch.randn(param.shape, generator=keyed("loop", number)) / 12**0.5)
        U, S, V = torch.linalg.svd(model[0].weight)
        model[0].weight.copy_((U[:, :rank] * S[:rank]) @ V[:rank])
    return model


def start(base=None, name="osf", targets=("0", "2"), **options):
    pattern = options.pop("rank_pattern", {})
    base = net() if base is None else base
    made = pr.method(name, **options)
    return pr.adapt(base, made, list(targets), seed=0, rank_pattern=pattern)


def train(model, steps=3, lr=1e-2, optimizer=None):
    made = optimizer or torch.optim.AdamW(pr.parameter_groups(model, lr=lr))
    attached = pr.attach(made, model, total=steps)
    model.train()
    for step in range(steps):
        x, y = torch.randn(2, 9, 12, generator=keyed("loop rows", step))
        (model(x) - y).square().mean().backward()
        made.step()
        made.zero_grad()
    attached.detach()
    model.eval()
    return made


def views(model):
    return adapter_of(model).layers


def test_directions_that_vanish_are_off_what_is_protected():
    model = start(net(rank=2), effective_rank=3, nested=True)
    view = views(model)[0]
    for param in view.module.parameters():
        param.requires_grad_(False)
    U, V = view.core.high_u.clone(), view.core.high_v.clone()
    before = view.weight() - (view.B * view.core.weight) @ view.A
    nest(view, U, V)
    one = torch.eye(9)
    for high, low in ((view.core.high_u, view.B), (view.core.high_v.mT, view.A.mT)):
        assert float((high.mT @ low).abs().max()) <= 1e-6
        assert float((low.mT @ low - one).abs().max()) <= 1e-6
    assert float((view.weight() - (view.B * view.core.weight) @ view.A - before).norm()) <= 1e-6


@pytest.mark.parametrize("small", [0, 2**16], ids=["alone", "together"])
@pytest.mark.parametrize("share", [0.25, 0.5], ids=["off", "kept"])
def test_what_has_not_moved_keeps_its_bits_however_coarse_the_products(share, small, monkeypatch):
    monkeypatch.setattr("polyrank.parts.projection.SMALL", small)
    model = start(net(), effective_rank=share)
    # Bases of three digits, as TF32 takes them.
    for view in views(model):
        for basis in (view.core.high_u, view.core.high_v):
            if basis is not None:
                basis.data = basis.bfloat16().float()
    made = torch.optim.SGD(pr.parameter_groups(model, lr=0.1), lr=0.1)
    attached = pr.attach(made, model)
    model.train()
    for _ in range(20):
        (model(torch.ones(1, 12)) * 0).sum().backward()
        made.step()
    attached.detach()
    for view in views(model):
        A0, B0, S0 = view.shadow
        assert all(map(torch.equal, (view.A, view.B, view.core.weight), (A0, B0, S0)))


@pytest.mark.parametrize("options", [{"effective_rank": 3}, {"schedule": "rising", "rise": 0.25}])
def test_a_nested_split_stays_nested_in_ones_own_loop(options):
    model = start(nested=True, **options)
    held = [(v.core.high_u.clone(), v.core.high_v.clone()) for v in views(model)]
    train(model, 30, lr=0.3)
    with pytest.raises(ConfigError, match=r"absorb: at 0 .*polyrank.end_task"):
        absorb(model, archive="folded")
    x = torch.randn(4, 12, generator=keyed("x"))
    expected, free = model(x), end_task(model, 0)
    assert_close(model(x), expected)
    assert free == {view.site.path: view.site.r for view in views(model)}
    for view, (U, V) in zip(views(model), held, strict=True):
        assert_close((view.core.high_u.mT @ U).square().sum(), torch.tensor(float(U.shape[1])))
        assert_close((view.core.high_v @ V.mT).square().sum(), torch.tensor(float(len(V))))
    with pytest.raises(ConfigError, match="end_task"):
        absorb(model)


def test_in_ones_own_loop_a_task_ends_as_the_engine_ends_it(bench):
    options = {"schedule": "adaptive", "trr": 0.5, "rows": 12, "dtype": torch.float32}
    work, own = (bench("osf", **options) for _ in range(2))
    for each in (work, own):
        each.begin(0)
        each.steps(count=3)
    work.end()
    with pytest.raises(ConfigError, match="got no batches"):
        end_task(own.model, 0)
    batches = [{"x": batch["x"]} for batch in own.data("train")]
    end_task(own.model, 0, batches)
    assert [v.site.r for v in views(own.model)] == [v.site.r for v in work.adapter.layers]
    for view, other in zip(views(own.model), work.adapter.layers, strict=True):
        assert_close(view.weight(), other.weight())
    with pytest.raises(ConfigError, match="'lora' does not split weights"):
        end_task(start(name="lora"), 0)


def test_the_free_rank_of_a_pattern_stays_through_the_tasks(bench):
    work = bench("osf", schedule="rising", rise=0.25, dtype=torch.float32)
    work.model = pr.adapt(
        type(work.model.get_base_model())(), work.method, ["first", "second"], seed=1,
        rank_pattern={"second": 9}, head="classifier",
    )  # fmt: skip
    for task in range(2):
        work.begin(task)
        work.steps(count=1)
        work.end()
        assert [view.site.r for view in work.adapter.layers] == [[3, 9], [2, 9]][task]
    model = start(schedule="rising", rise=0.25, rank_pattern={"2": 11})
    assert end_task(model, 0) == {"0": 6, "2": 11}


def test_a_nested_split_needs_something_to_protect():
    with pytest.raises(ConfigError, match="r at 2: got 12, all of its directions"):
        start(nested=True, rank_pattern={"2": 12})


def test_integers_of_other_libraries_are_integers():
    assert [view.site.r for view in views(start(effective_rank=np.int64(4)))] == [8, 8]


def test_what_would_train_in_vain_is_refused_before_it_trains():
    with pytest.raises(ConfigError, match="all 2 layers are frozen as a whole"):
        train(start(effective_rank=1.0))
    tied = net(), net()
    for model in tied:
        model[2].weight = model[0].weight
    with pytest.raises(ConfigError, match=r"base weight at [02]: is shared by 2 modules"):
        train(start(tied[0]))
    train(start(tied[1], "full"))


def test_a_start_that_has_learnt_is_not_thrown_away():
    model = start()
    redraw(model)
    train(model)
    with pytest.raises(ConfigError, match="redraw: the split at 0 and 1 more layers has learnt"):
        redraw(model)
    absorb(model)
    redraw(model)


@pytest.mark.parametrize("parametrisation", ["factors", "core", "block"])
def test_a_schedule_that_moves_moves_in_ones_own_loop_or_absorb_says_what_to_call(parametrisation):
    model = start(schedule="progressive", tasks=3, parametrisation=parametrisation)
    assert [view.site.r for view in views(model)] == [11, 11]
    for task in range(2):
        train(model)
        with pytest.raises(ConfigError, match=r"how much is protected changes .*end_task"):
            absorb(model)
        end_task(model, task)
        assert [view.site.r for view in views(model)] == [8 - 4 * task] * 2


@pytest.mark.parametrize("parametrisation", ["factors", "core", "block"])
def test_moments_of_the_old_split_are_not_for_the_new_one(parametrisation):
    model = start(parametrisation=parametrisation)
    old = train(model)
    absorb(model, archive="folded")
    with pytest.raises(ConfigError, match="optimizer: misses"):
        train(model, optimizer=old)
    train(model)


def test_in_fp64_another_rank_is_as_exact():
    model = start().double()
    absorb(model, ranks={"0": 4, "2": 4})
    view = views(model)[0]
    assert {p.dtype for p in (view.A, view.B, *view.core.parameters())} == {torch.float64}
    assert_close(
        (view.B * view.core.weight) @ view.A,
        (lambda U, S, V: (U[:, 8:] * S[8:]) @ V[8:])(*torch.linalg.svd(view.weight())),
    )


def test_decay_leaves_the_tail_alone_unless_asked_for():
    for decayed, most in ((False, 0.0), (True, 1.0)):
        groups = pr.parameter_groups(start(decayed=decayed), lr=0.1, weight_decay=0.5)
        decays = {tuple(p.shape): g["weight_decay"] for g in groups for p in g["params"]}
        # U_l, V_l, and S_l, which as a gate never decays.
        assert decays == {(12, 6): 0.5 * most, (6, 12): 0.5 * most, (6,): 0.0}
    groups = pr.parameter_groups(start(parametrisation="block"), lr=0.1, weight_decay=0.5)
    assert [group["weight_decay"] for group in groups] == [0.5]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("osf", {"r": 64}, "r: got 64, expected 8, since 'osf' trains weights"),
        ("osf", {"alpha": 4.0}, "alpha: got 4.0, expected 16.0"),
        ("full", {"r": 4}, "r: got 4, .*leave it out"),
        ("full", {"dropout": 0.1}, "dropout: got 0.1, expected 0.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, says):
    with pytest.raises(ConfigError, match=says):
        pr.method(name, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "progressive", "tasks": 2}, "tasks: got 2, and 3 tasks come"),
        ({"schedule": "rising", "rise": 0.5}, r"rise: got 0.5, with which task 2 of 3 .*0.333"),
        ({"schedule": "adaptive", "trr": 1.0}, "trr: got 1"),
        ({"effective_rank": 1.0}, "effective_rank: got 1.0"),
    ],
)
def test_a_stream_that_outlasts_what_is_free_is_refused_before_a_model_is_loaded(
    options, says, tmp_path
):
    with pytest.raises(ConfigError, match=says):
        engine.run(None, few_digits(rows=8, tasks=3), pr.method("osf", **options), out=tmp_path)
    assert not [*pr.method("osf", preset="t5").too_long(14)]
    assert [*pr.method("osf", preset="t5").too_long(15)]


@pytest.mark.parametrize("name", ["osf", "lora-ga"])
def test_a_used_config_without_its_tensors_does_not_train(name, tmp_path):
    if name == "osf":
        model = start()
    else:
        model = start(name=name, r=2)
        rows = torch.randn(2, 4, 12, generator=keyed("ga"))
        pr.initialise(model, [rows], lambda model, batch: model(batch[0]).square().mean())
    model.save_pretrained(tmp_path)
    used = copy.deepcopy(model.peft_config["default"])
    saved = PeftConfig.from_pretrained(tmp_path)
    saved.inference_mode = False
    for config in (used, saved):
        again = get_peft_model(net(), config)
        with pytest.raises(InertError, match="its tensors were never loaded"):
            train(again)
    train(PeftModel.from_pretrained(net(), str(tmp_path), is_trainable=True))
    if name == "osf":
        again = get_peft_model(net(), used)
        redraw(again)
        train(again)
        expected = copy.deepcopy(model)
        train(expected)
        assert_close(views(again)[0].delta(), views(expected)[0].delta())
    # What takes its values another way has them all the same.
    other = get_peft_model(net(), used)
    other.load_state_dict(model.state_dict())
    train(other)


def test_a_small_update_is_seen_in_bf16():
    model = start(net().to(torch.bfloat16), targets=["0"])
    x = torch.randn(64, 12, generator=keyed("bf16")).to(torch.bfloat16)
    base = model(x)
    assert torch.equal(base, net().to(torch.bfloat16)(x))
    view = views(model)[0]
    with torch.no_grad():
        for number, param in enumerate((view.A, view.B, view.core.weight)):
            param.add_(1e-4 * torch.randn(param.shape, generator=keyed("moved", number)))
    x = x.requires_grad_()
    found = view.add(torch.zeros(64, 12, dtype=torch.bfloat16), x, view.module.flow)
    exact = x.double() @ view.delta().double().T
    assert float((found.double() - exact).norm().detach()) < 0.01 * float(exact.norm().detach())
    grads = torch.autograd.grad(found.sum(), (view.A, view.B, view.core.weight))
    A, B, S = (p.detach().double().requires_grad_() for p in (view.A, view.B, view.core.weight))
    wanted = torch.autograd.grad((x.double() @ ((B * S) @ A).T).sum(), (A, B, S))
    for grad, other in zip(grads, wanted, strict=True):
        assert_close(grad, other, tol=2e-2, reason="products of two factors rounded to bf16")
