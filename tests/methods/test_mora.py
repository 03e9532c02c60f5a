"""mora: what the self-activated gate weighs, what teaches it, and what it must equal."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.layers import append
from polyrank.ops.rank_gate import NonFiniteError, rank_gate
from polyrank.parts import selfgate
from polyrank.testing import assert_close

D_IN, D_OUT, R = 6, 5, 4


class Net(nn.Module):
    """One adapted layer, which may be recomputed in backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D_IN, D_OUT)
        self.reentrant = None

    def forward(self, x):
        if self.reentrant is None:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def adapted(grown=0, dtype=torch.float64, drawn=True, **options):
    """A layer whose bank has grown so many times, all values drawn."""
    torch.manual_seed(0)
    method = pr.method("mora", **{"r": R, "tau": 0.2, "delta": 0.2, **options})
    model = pr.adapt(Net(), method, ["layer"], seed=0).to(dtype)
    draw(model, drawn)
    for _ in range(grown):
        append(model, R, seed=1)
        model.to(dtype)
        draw(model, drawn)
    return model.eval()


def draw(model, drawn=True):
    with torch.no_grad():
        if drawn:
            only(model).B.normal_()


def only(model):
    return pr.adapter_of(model).layers[0]


def inputs(count=64, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(count, D_IN, dtype=dtype)


def base(model, x):
    return nn.functional.linear(
        x, only(model).module.base_layer.weight, only(model).module.base_layer.bias
    )


def keys(model):
    A, B, _, _ = only(model).factors(only(model).module.flow)
    return A.detach(), B.detach()


def scores(model, x):
    z = x @ keys(model)[0].T
    return z / z.norm(dim=-1, keepdim=True)


def gates(model, x):
    return only(model).core.gates_of(x @ keys(model)[0].T, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mora_1_without_values_it_is_the_base_bit_for_bit(training, dtype):
    model = adapted(dtype=dtype, drawn=False)
    model.train(training)
    x = inputs(dtype=dtype)
    assert torch.equal(model(x), only(model).module.base_layer(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mora_1_an_input_of_zeros_gives_the_bias(training):
    model = adapted(2).train(training)
    x = torch.zeros(3, D_IN, dtype=torch.float64, requires_grad=True)
    y = model(x)
    assert torch.equal(y, only(model).module.base_layer.bias.expand(3, -1))
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(only(model).A.grad).all()


@pytest.mark.parametrize("k", [1, 2, 3, 12, 99])
def test_mora_2_k_ranks_weigh_and_their_weights_sum_to_one(k):
    model, x = adapted(2, k=k).train(), inputs()
    w = gates(model, x)
    assert_close(w.sum(-1), torch.ones(len(x)))
    assert ((w > 0).sum(-1) == min(max(k, 2), 3 * R)).all()
    s = scores(model, x)
    least = torch.where(w > 0, s, math.inf).amin(-1)
    assert (torch.where(w > 0, -math.inf, s).amax(-1) <= least).all()


def test_mora_2_in_evaluation_what_is_below_the_threshold_is_gone():
    model, x = adapted(2, k=8, delta=0.3), inputs()
    w, s = gates(model, x), scores(model, x)
    full = gates(model.train(), x)
    assert torch.equal(w, torch.where(s >= 0.3, full, 0.0))
    assert (s[w > 0] >= 0.3).all()
    total = w.sum(-1)
    assert (total <= 1 + 1e-12).all()
    # Not normalised again.
    assert total.min() < 0.99


def test_mora_2_nothing_may_be_left():
    model, x = adapted(2, delta=1.0), inputs()
    assert not gates(model, x).any()
    assert torch.equal(model(x), only(model).module.base_layer(x))


def test_mora_3_the_size_of_an_input_scales_the_update_and_its_sign_chooses_anew():
    model, x = adapted(2, k=5, delta=0.1), inputs()
    update = model(x) - base(model, x)
    for a in (0.5, 3.0):
        assert_close(gates(model, a * x), gates(model, x))
        assert_close(model(a * x) - base(model, a * x), a * update)
    turned = gates(model, -x)
    assert ((turned > 0) != (gates(model, x) > 0)).any(-1).all()


def test_mora_4_hot_and_with_all_ranks_it_is_plain_lora():
    count = 3 * R
    model, x = adapted(2, k=count, tau=1e6, delta=0.0, alpha=2.0), inputs()
    A, B = keys(model)
    found = model(x) - base(model, x)
    expected = 2.0 / count * (x @ A.T) @ B.T
    assert_close(found, expected, tol=1e-6, reason="weights differ from 1/R by s/tau")
    with pytest.raises(pr.MergeError):
        model.merge_and_unload()


@pytest.mark.parametrize("k", [2, 5])
def test_mora_5_cold_it_reads_the_best_rank_alone(k):
    model, x = adapted(2, k=k, tau=1e-7, delta=0.0, alpha=2.0), inputs()
    A, B = keys(model)
    z = x @ A.T
    best = z.argmax(-1)
    expected = 2.0 * z.gather(-1, best[:, None]) * B.T[best]
    assert_close(model(x) - base(model, x), expected)


@pytest.mark.parametrize("alpha", [2.0, 5.0])
@pytest.mark.parametrize("released", [False, True])
def test_mora_6_freezing_alone_keeps_the_answers_unless_as_released(released, alpha):
    factor = 1 / alpha if released else 1.0
    model, x = adapted(1, alpha=alpha, released=released), inputs()
    A, B = keys(model)
    before = gates(model, x), only(model).B.detach().clone()
    append(model, R, seed=2)
    model.to(torch.float64)
    layer = only(model)
    held_A, held_B = layer.bank
    assert layer.scale == alpha
    assert torch.equal(held_A, A)
    assert torch.equal(held_B[:, -R:], factor * before[1])
    frozen = rank_gate(
        base(model, x), x, held_A, None, held_B, layer.core.fused(), layer.scale, 2 * R
    )[0]
    expected = (
        base(model, x)
        + alpha * (before[0] * (x @ A.T)) @ (torch.cat([B[:, :R], factor * B[:, R:]], dim=1)).T
    )
    assert_close(frozen, expected)


def test_mora_6_as_released_ranks_lose_the_scale_that_their_layer_has():
    # The scale stays 8 / 4 when a growth has two ranks, of which alpha / r would make 4.
    model = adapted(0, alpha=8.0, scaling="alpha/r", released=True)
    for r in (2, 2):
        before = only(model).B.detach().clone()
        append(model, r, seed=2)
        model.to(torch.float64)
        layer = only(model)
        assert layer.scale == 2.0
        assert torch.equal(layer.bank[1][:, -before.shape[1] :], 0.5 * before)
        draw(model)


def test_mora_6_growing_changes_the_answers_at_once():
    model, x = adapted(1, k=3), inputs()
    before = model(x)
    append(model, R, seed=2)
    model.to(torch.float64)
    assert not only(model).B.any()
    changed = (model(x) - before).abs().amax(-1)
    assert (changed > 1e-3).double().mean() > 0.5


def test_mora_6_a_fresh_key_takes_the_weight_of_an_old_one():
    # By hand: keys (1, 0), (0, 1) with value 1, x = (1, 1): both weigh 1/2, so the update is 1.
    # A fresh key (1, 1) has z = 2 of a norm √6: k = 2 keeps it and the first key, whose weight is
    # 1 / (1 + e^(1/√6)) at tau = 1, and whose z is 1.
    x = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    A = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    B = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    gate = pr.method("mora", r=2, tau=1.0, delta=0.2).core(only(adapted(r=2)).site).eval().fused()
    zero = torch.zeros(1, 1, dtype=torch.float64)
    trained = rank_gate(zero, x, A[:2], None, B[:, :2], gate, 1.0)[0]
    grown = rank_gate(zero, x, A, None, B, gate, 1.0)[0]
    assert_close(trained, torch.tensor([[1.0]]))
    assert_close(grown, torch.tensor([[1 / (1 + math.exp(6**-0.5))]], dtype=torch.float64))


def test_mora_7_frozen_ranks_keep_their_bits_and_the_optimiser_knows_nothing_of_them(bench):
    work = bench("mora", dtype=torch.float32, r=2, tau=0.3)
    for task in range(2):
        work.begin(task)
        work.steps(count=2)
        work.end()
    work.begin(2)
    held = [part for layer in work.adapter.layers for part in layer.bank]
    before = [part.clone() for part in held]
    optimizer = pr.optimizer(work.model, lr=0.5, weight_decay=0.1)
    for _ in range(3):
        work.model(work.rows()["x"]).square().sum().backward()
        optimizer.step()
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for part, old in zip(held, before, strict=True):
        assert torch.equal(part, old)
        assert part.grad is None
        assert id(part) not in known
        assert part not in optimizer.state
    assert all(layer.B.any() for layer in work.adapter.layers)


def test_mora_8_ranks_may_change_places():
    model, x = adapted(2, k=5), inputs()
    before, weights = model(x), gates(model, x)
    layer = only(model)
    turn = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    with torch.no_grad():
        for part, dim in ((layer.bank[0], 0), (layer.bank[1], 1)):
            part.copy_(part.index_select(dim, turn).clone())
    layer.order = [layer.owners[n] for n in turn.tolist()]
    assert_close(model(x), before)
    whole = torch.cat([turn, torch.arange(8, 12)])
    assert_close(gates(model, x), weights[:, whole])
    assert layer.owners == [1, 0, 1, 0, 0, 1, 0, 1, 2, 2, 2, 2]


def test_mora_9_inputs_learn_through_frozen_keys():
    model, x = adapted(1, k=5), inputs().requires_grad_()
    model.train()
    (with_values,) = torch.autograd.grad(model(x).square().sum(), x)
    with torch.no_grad():
        only(model).bank[1].zero_()
    (without,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (with_values - without).abs().max() > 1e-2


def test_mora_9_live_keys_learn_from_what_frozen_ones_answer():
    model, x = adapted(1, k=5), inputs()
    model.train()

    def taught():
        return torch.autograd.grad(model(x).square().sum(), only(model).A)[0]

    before = taught()
    with torch.no_grad():
        only(model).bank[0].mul_(3)
    assert (taught() - before).abs().max() > 1e-3


def test_mora_10_one_rank_counts_as_two_or_is_refused():
    x = inputs()
    assert torch.equal(adapted(1, k=1)(x), adapted(1, k=2)(x))
    assert not torch.equal(adapted(1, k=1)(x), adapted(1, k=3)(x))
    with pytest.raises(pr.ConfigError, match=r"k: got 1, expected >= 2; one rank alone teaches no"):
        pr.method("mora", k=1, strict=True)
    assert pr.method("mora", k=2, strict=True).k == 2


def test_mora_10_what_is_left_out_counts_too():
    with pytest.raises(pr.ConfigError, match="k: got 1, as many as r, expected >= 2"):
        pr.method("mora", r=1, strict=True)
    assert pr.method("mora", r=1).k is None
    assert pr.method("mora", r=1, k=2, strict=True).k == 2
    for strict in (True, False):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        method = pr.method("mora", r=2, strict=strict)
        if strict:
            with pytest.raises(pr.ConfigError, match=r"k at '1': got 1, the rank there, expected"):
                pr.adapt(net, method, ["0", "1"], rank_pattern={"1": 1})
        else:
            pr.adapt(net, method, ["0", "1"], rank_pattern={"1": 1})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("eps", [1e-8, 10.0])
def test_short_inputs_are_divided_by_eps(eps, training):
    model = adapted(1, k=2 * R, eps=eps, delta=0.05, tau=0.5).train(training)
    A, B = keys(model)
    x = 0.1 * inputs()
    z = x @ A.T
    assert (z.norm(dim=-1) < 10).all()
    s = z / (10.0 if eps == 10.0 else z.norm(dim=-1, keepdim=True))
    w = (s / 0.5).softmax(-1)
    w = w if training else torch.where(s >= 0.05, w, 0.0)
    assert_close(gates(model, x), w)
    assert_close(model(x) - base(model, x), (w * z) @ B.T)


def test_numbers_of_numpy_are_numbers(tmp_path):
    method = pr.method("mora", r=np.int64(R), k=np.int64(3), tau=np.float32(0.5))
    model = pr.adapt(Net(), method, ["layer"], seed=0)
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "adapter_config.json").read_text())["options"]
    assert (kept["r"], kept["k"], kept["tau"]) == (R, 3, 0.5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_mora_11_recomputed_it_is_the_same(reentrant):
    found = []
    for recompute in (None, reentrant):
        model, x = adapted(1, dropout=0.3).train(), inputs().requires_grad_()
        model.get_base_model().reentrant = recompute
        y = model(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, only(model).A.grad, only(model).B.grad))
    assert all(map(torch.equal, *found))


def test_mora_11_rows_on_two_devices_teach_what_they_teach_on_one():
    model, x = adapted(1).train(), inputs()
    params = [only(model).A, only(model).B]
    whole = torch.autograd.grad(model(x).square().sum(), params)
    parts = [torch.autograd.grad(model(part).square().sum(), params) for part in x.split(24)]
    for expected, *shares in zip(whole, *parts, strict=True):
        assert_close(sum(shares), expected)
    assert_close(torch.cat([model(part) for part in x.split(24)]), model(x))


def test_mora_13_training_and_evaluation_differ_by_the_threshold_alone():
    x = inputs()
    for delta, equal in ((0.0, True), (0.3, False)):
        model = adapted(1, delta=delta)
        assert torch.equal(model.eval()(x), model.train()(x)) is equal


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r: got 0"),
        ({"k": 0}, "k: got 0, expected >= 1"),
        ({"k": 2.5}, "k: got 2.5, expected an integer, or null"),
        ({"k": True}, "k: got True, expected an integer, or null"),
        ({"tau": 0.0}, "tau: got 0.0, expected > 0"),
        ({"tau": None}, "tau: got None, expected a finite number"),
        ({"r": None}, "r: got None, expected an integer"),
        ({"tau": -0.1}, "tau: got -0.1"),
        ({"delta": -0.1}, "delta: got -0.1, expected 0..1"),
        ({"delta": 1.1}, "delta: got 1.1, expected 0..1"),
        ({"eps": 0.0}, "eps: got 0.0, expected > 0"),
        ({"scaling": "alpha/k"}, "scaling: got 'alpha/k'"),
        ({"detla": 0.1}, "did you mean 'delta'"),
        ({"preset": "x-tial"}, "did you mean 'x-tail'"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method("mora", **options)


def test_both_published_settings_are_presets():
    clip, text = (pr.method("mora", preset=word) for word in ("x-tail", "trace"))
    assert (clip.r, clip.k, clip.tau, clip.delta, clip.dropout) == (16, 16, 0.01, 0.2, 0.0)
    assert (text.r, text.k, text.tau, text.delta, text.dropout) == (8, 8, 0.03, 0.2, 0.1)
    assert (clip.eps, text.eps) == (1e-12, 1e-8)
    assert only(adapted(preset="x-tail")).scale == 1.0
    assert only(adapted(preset="trace", r=2)).scale == 2.0


def test_more_ranks_than_there_are_is_said_once(caplog):
    selfgate._say_clipped.cache_clear()
    with caplog.at_level("INFO", logger="polyrank.parts.selfgate"):
        for _ in range(2):
            adapted(k=9)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "self gate: k=9 exceeds r=4"
    ]


@pytest.mark.parametrize(
    ("x", "kind", "says"),
    [
        (torch.ones(2, D_IN + 1, dtype=torch.float64), RuntimeError, "shapes"),
        (torch.ones(2, D_IN, dtype=torch.int64), pr.ConfigError, "got torch.int64"),
        (torch.full((2, D_IN), math.nan, dtype=torch.float64), NonFiniteError, "2 of 2 tokens"),
    ],
    ids=["width", "integers", "nan"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bad_inputs_are_refused(training, x, kind, says):
    with pytest.raises(kind, match=says):
        adapted(1).train(training)(x)
