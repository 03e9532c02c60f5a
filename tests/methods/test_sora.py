"""sora: gates, their two steps, what is refused, and the published properties one by one."""

import copy
import math

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, RunError
from polyrank.frame import method
from polyrank.layers import AdaptedLinear
from polyrank.parts.gates import Shrinkage, kept_ranks, static_gates
from polyrank.testing import assert_close

D_IN, WIDTH, D_OUT, R = 7, 9, 5, 4
EPS = 1e-6 / math.sqrt(1 - 0.999)


class Net(nn.Module):
    """Two adapted layers of different shapes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(D_IN, WIDTH), nn.Linear(WIDTH, D_OUT)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def adapted(dtype=torch.float64, drawn=True, name="sora", **options):
    made = pr.method(name, **{"r": R, **options})
    model = pr.adapt(Net(), made, ["first", "second"], seed=0).to(dtype)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers if drawn else ():
            layer.B.normal_(0, 0.3)
    return model.train()


def layers(model):
    return pr.adapter_of(model).layers


def gates(model):
    return [gate for _, gate in static_gates(pr.adapter_of(model))]


def flat(model):
    return torch.cat([gate.detach() for gate in gates(model)])


def rows(seed=0, dtype=torch.float64, count=6):
    torch.manual_seed(10 + seed)
    return torch.randn(count, D_IN, dtype=dtype)


def loss_of(model, seed=0):
    torch.manual_seed(20 + seed)
    dtype = layers(model)[0].A.dtype
    target = torch.randn(6, D_OUT).to(dtype)
    return (model(rows(seed, dtype)) - target).square().mean()


def attached(model, lr=0.01, decay=0.0, **options):
    made = pr.optimizer(model, lr=lr, weight_decay=decay)
    return made, pr.attach(made, model, **options)


def train(model, steps=3, lr=0.01, clip=None, first=0, made=None, **options):
    """Own loop; returns the optimiser."""
    made, attachment = attached(model, lr, **options) if made is None else (made, None)
    for index in range(first, first + steps):
        loss_of(model, index).backward()
        if attachment is not None:
            attachment.before_clip()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        made.zero_grad()
    if attachment is not None:
        attachment.detach()
    return made


def test_sora_1_a_fresh_adapter_answers_like_the_base_bit_for_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = adapted(dtype, drawn=False)
        x = rows(dtype=dtype)
        for layer, data in zip(layers(model), (x, x.new_ones(3, WIDTH)), strict=True):
            assert torch.equal(layer.module(data), layer.module.base_layer(data))
        assert flat(model).abs().min() > 0


def test_sora_2_gates_of_one_are_plain_lora():
    ours, lora = adapted(alpha=12.0), adapted(name="lora", alpha=12.0)
    with torch.no_grad():
        for a, b in zip(layers(lora), layers(ours), strict=True):
            b.A.copy_(a.A)
            b.B.copy_(a.B)
            b.core.gate.fill_(1.0)
    assert [layer.scale for layer in layers(ours)] == [12.0 / R] * 2
    assert_close(ours(rows()), lora(rows()))
    assert not torch.allclose(adapted()(rows()), lora(rows()))


def test_sora_2_a_sign_may_stand_in_the_gate_or_in_b():
    model = adapted().eval()
    before = model(rows())
    with torch.no_grad():
        for layer in layers(model):
            layer.core.gate[1] *= -1
    assert not torch.allclose(model(rows()), before)
    with torch.no_grad():
        for layer in layers(model):
            layer.B[:, 1] *= -1
    assert_close(model(rows()), before)


@pytest.mark.parametrize("clip", [None, 0.1], ids=str)
@pytest.mark.parametrize("lambda_1", [0.0, 1e-3, 10.0])
def test_sora_3_the_first_step_moves_gates_by_the_penalty_alone(lambda_1, clip):
    model = adapted(drawn=False, xi=0.0, lambda_1=lambda_1)
    before, lr = flat(model), 0.02
    made, attachment = attached(model, lr)
    loss_of(model).backward()
    for layer in layers(model):
        assert not layer.A.grad.any()
        assert not layer.core.gate.grad.any()
        assert layer.B.grad.any()
    attachment.before_clip()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9)
    made.step()
    attachment.detach()
    share = lambda_1 / (2 * R) * min(1.0, (clip or 1e9) / (float(norm) + 1e-6))
    expected = before - lr * share / (share + EPS) * before.sign()
    assert_close(flat(model), expected)
    assert torch.equal(flat(model), before) is (lambda_1 == 0)


@pytest.mark.parametrize("form", ["soft", "released"])
def test_sora_4_a_threshold_of_zero_is_skipped(form, monkeypatch):
    model = adapted(xi=0.0, form=form)
    monkeypatch.setattr("polyrank.parts.gates.shrink", None)
    train(model)
    with pytest.raises(TypeError):
        train(adapted(xi=1e-3, form=form))


@pytest.mark.parametrize("form", ["soft", "released"])
def test_sora_5_a_gate_of_zero_without_a_gradient_stays(form):
    model = adapted(xi=1e-3, form=form, lambda_1=1.0)
    with torch.no_grad():
        for layer in layers(model):
            layer.core.gate[2] = 0
            layer.B[:, 2] = 0
            layer.A[2] = 0
    train(model, steps=5)
    assert all(gate[2] == 0 for gate in gates(model))
    assert all((gate[:2] != 0).all() for gate in gates(model))


@pytest.mark.parametrize(("form", "factor"), [("soft", 1.0), ("released", 2.0)])
@pytest.mark.parametrize("above", [False, True])
def test_sora_5_a_gate_comes_back_if_its_step_passes_the_threshold(form, factor, above):
    model, lr = adapted(xi=1e-3, form=form), factor * 1e-3 * (1.01 if above else 0.99)
    made, attachment = attached(model, lr)
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    loss_of(model).backward()
    for gate in gates(model):
        gate.grad.copy_(torch.tensor([1.0, -1.0, 0.0, 5.0]))
    made.step()
    attachment.detach()
    for gate in gates(model):
        assert (gate != 0).tolist() == [above, above, False, above]
        assert (gate.sign() == torch.tensor([-1.0, 1.0, 0.0, -1.0]) * above).all()


def test_sora_9_the_mean_counts_the_gates_of_all_layers():
    model = adapted(lambda_1=3.0, xi=0.0)
    twin = adapted(xi=0.0)
    found = {}
    for key, one in (("with", model), ("without", twin)):
        _, attachment = attached(one)
        loss_of(one).backward()
        attachment.before_clip()
        attachment.detach()
        found[key] = torch.cat([gate.grad for gate in gates(one)])
    assert_close(found["with"] - found["without"], 3.0 / (2 * R) * flat(model).sign())
    for a, b in zip(layers(model), layers(twin), strict=True):
        assert torch.equal(a.A.grad, b.A.grad)
        assert torch.equal(a.B.grad, b.B.grad)


@pytest.mark.parametrize(("form", "end"), [("soft", 0.5), ("released", 0.0)])
def test_sora_10_adam_comes_before_the_threshold(form, end):
    xi = 1e-3
    model = adapted(xi=xi, form=form)
    # With a gradient of -1 the first step is then ξ upwards.
    made, attachment = attached(model, xi * (1 + EPS))
    with torch.no_grad():
        for gate in gates(model):
            gate.fill_(0.5 * xi)
    loss_of(model).backward()
    for gate in gates(model):
        gate.grad.fill_(-1.0)
    made.step()
    attachment.detach()
    assert_close(flat(model), torch.full((2 * R,), end * xi, dtype=torch.float64))


def test_sora_11_gates_never_decay_and_stand_in_one_group():
    model = adapted(xi=0.0)
    groups = pr.parameter_groups(model, lr=0.1, weight_decay=0.5)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held)) == 6
    (own,) = [group for group in groups if id(gates(model)[0]) in map(id, group["params"])]
    assert {id(p) for p in own["params"]} == {id(gate) for gate in gates(model)}
    assert (own["weight_decay"], own["update"], own["lr"]) == (0.0, "adam-gate", 0.1)
    before = flat(model)
    made, attachment = attached(model, decay=0.5)
    factors = [layer.A.detach().clone() for layer in layers(model)]
    (0 * loss_of(model)).backward()
    made.step()
    attachment.detach()
    assert torch.equal(flat(model), before)
    assert all(
        not torch.equal(layer.A, old) for layer, old in zip(layers(model), factors, strict=True)
    )
    faster = pr.parameter_groups(adapted(gate_lr=3.0), lr=0.1)
    assert_close([group["lr"] for group in faster], [0.1, 0.3])


def permuted(model, made, order):
    """The ranks of every layer in another order, moments with them."""
    with torch.no_grad():
        for layer in layers(model):
            for param, dim in ((layer.A, 0), (layer.B, 1), (layer.core.gate, 0)):
                param.copy_(param.index_select(dim, order))
                for key, value in (made.state[param] if made else {}).items():
                    if key != "step":
                        value.copy_(value.index_select(dim, order))


def test_sora_12_permuted_ranks_answer_and_train_the_same():
    order = torch.tensor([2, 0, 3, 1])
    runs = []
    for turn in (False, True):
        model = adapted(lambda_1=0.5, xi=2e-3)
        made, attachment = attached(model)
        train(model, steps=3, made=made)
        before = model(rows())
        if turn:
            permuted(model, made, order)
            assert_close(model(rows()), before)
        train(model, steps=4, first=3, made=made)
        attachment.detach()
        runs.append((model(rows()), flat(model).view(2, R)))
    assert_close(runs[1][0], runs[0][0])
    assert_close(runs[1][1], runs[0][1][:, order])


def test_sora_13_counts_of_deberta_v3_base():
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
        intermediate_size=3072, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, type_vocab_size=0, max_relative_positions=-1,
    )  # fmt: skip
    with torch.device("meta"):
        base = DebertaV2Model(config)
    targets = (
        r".*encoder\.layer\.\d+\.(attention\.self\.(query|key|value)_proj|attention\.output\.dense"
        r"|intermediate\.dense|output\.dense)"
    )
    model = pr.adapt(base, pr.method("sora", r=8), targets)
    sizes = [layer.A.numel() + layer.B.numel() for layer in layers(model)]
    assert (len(sizes), sum(sizes), flat(model).numel()) == (72, 1_327_104, 576)


# --- an update, and what is none ------------------------------------------------------------------


def test_accumulation_shrinks_once_an_update():
    found = []
    for parts in (1, 3):
        model = adapted(xi=1e-3, lambda_1=0.5)
        made, attachment = attached(model, accumulation=parts)
        target = torch.ones(6, D_OUT, dtype=torch.float64)
        for _ in range(4):
            for piece in torch.arange(6).chunk(parts):
                loss = (model(rows()[piece]) - target[piece]).square().sum() / target.numel()
                loss.backward()
            made.step()
            made.zero_grad()
        attachment.detach()
        found.append(flat(model))
    assert_close(found[1], found[0])


def test_an_update_that_a_loss_scaler_skips_shrinks_nothing():
    model = adapted(torch.float32, xi=1e-2)
    made, attachment = attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    attachment.scaler = scaler
    for bad in (True, False):
        before = flat(model).clone()
        scaler.scale(loss_of(model)).backward()
        if bad:
            layers(model)[0].B.grad[0, 0] = math.inf
        scaler.unscale_(made)
        attachment.before_clip()
        scaler.step(made)
        scaler.update()
        made.zero_grad()
        assert torch.equal(flat(model), before) is bad
        assert attachment.index == (0 if bad else 1)
        assert ("exp_avg" in made.state[gates(model)[0]]) is not bad
    attachment.detach()


@pytest.mark.parametrize("kind", ["lambda", "one-cycle"])
def test_a_threshold_by_rate_knows_the_peak_of_a_schedule_that_warms_up(kind):
    model = adapted(xi=0.1, xi_scale="rate")
    made = pr.optimizer(model, lr=0.5)
    if kind == "lambda":
        rates = torch.optim.lr_scheduler.LambdaLR(made, lambda index: (0.25, 1.0, 0.5)[index])
        shares = (0.25, 1.0, 0.5)
    else:
        # From a quarter of the highest rate up to it in one step, then half-way down to 0.
        options = {"div_factor": 4.0, "pct_start": 0.5, "anneal_strategy": "linear"}
        options |= {"total_steps": 4, "final_div_factor": 1e12}
        rates = torch.optim.lr_scheduler.OneCycleLR(made, 0.5, **options)
        shares = (0.25, 1.0, 0.5)
    attachment = pr.attach(made, model)
    expected = flat(model)
    for share in shares:
        loss_of(model).backward()
        for gate in gates(model):
            gate.grad = None
        made.step()
        made.zero_grad()
        rates.step() if share != 0.5 else None
        expected = expected.sign() * (expected.abs() - 0.1 * share).clamp_min(0)
        assert_close(flat(model), expected)
    attachment.detach()


def test_stages_are_named_by_the_phase_of_ones_own_loop():
    for phase, xi in (("train", 0.1), ("stage-0", 0.1), ("stage-1", 0.3), ("stage-9", 0.3)):
        model = adapted(schedule=[0.1, 0.3])
        made, attachment = attached(model, lr=1e-12, phase=phase)
        before = flat(model)
        loss_of(model).backward()
        made.step()
        attachment.detach()
        found = before.sign() * (before.abs() - xi).clamp_min(0)
        assert_close(flat(model), found, tol=1e-9, reason="the rate is 1e-12 and not 0")


def test_shrink_only_moves_nothing_but_gates_in_later_stages():
    options = {"schedule": [0.0, 0.1], "shrink_only": True}
    model = adapted(**options)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gate = flat(model)
    train(model, steps=2, decay=0.5, phase="stage-1")
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]) is ("polyrank_core" not in name), name
    assert_close(flat(model), gate.sign() * (gate.abs() - 0.2).clamp_min(0))
    train(model, steps=1, phase="stage-0")
    assert not torch.equal(
        layers(model)[0].A, before["base_model.model.first.polyrank_A.default.weight"]
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 0}, "r: got 0, expected at least 1"),
        ({"xi": -1e-4}, "xi: got -0.0001, expected >= 0"),
        ({"xi": float("nan")}, "xi: got nan, expected a finite number"),
        ({"lambda_1": -1.0}, "lambda_1: got -1"),
        ({"gate_lr": 0.0}, "gate_lr: got 0.0, expected > 0"),
        ({"schedule": "linear", "xi": 1e-3, "xi_max": 1e-4}, "xi_max: got 0.0001, expected at"),
        ({"schedule": "exp_linear", "xi": 0.0, "xi_max": 1e-3}, "xi: got 0, expected > 0"),
        ({"schedule": "linear", "stages": 0}, "stages: got 0, expected >= 1"),
        ({"schedule": "sinus"}, "schedule: got 'sinus'"),
        ({"schedule": [0.2, 0.1]}, "numbers that do not fall"),
        ({"form": "hard"}, "form: got 'hard', expected one of soft, released"),
        (
            {"xi_max": 0.1},
            "xi_max: got 0.1, but with schedule='none' it does nothing; leave it at 0",
        ),
        ({"stages": 3}, "stages: got 3, but with schedule='none'"),
        ({"stage_steps": 3}, "stage_steps: got 3, but with schedule='none'"),
        ({"check_every": 3}, "check_every: got 3, but with schedule='none'"),
        ({"schedule": [0, 1], "xi": 0.1}, "xi: got 0.1, but with schedule=(0, 1) it does nothing"),
        ({"schedule": [0, 1], "xi_max": 1}, "xi_max: got 1, but with schedule=(0, 1)"),
        ({"schedule": [0, 1], "stages": 2}, "stages: got 2, but with schedule=(0, 1)"),
        ({"schedule": [1], "check_every": 2}, "check_every: got 2, but with schedule=(1,)"),
        (
            {"schedule": "linear", "xi_max": 0.1, "stages": 1, "stage_steps": 2},
            "stage_steps: got 2, but with schedule='linear' it does nothing",
        ),
        ({"shrink_only": True}, "shrink_only: got true with xi_scale='constant', schedule='none'"),
        ({"shrink_only": True, "schedule": [0, 1], "xi_scale": "rate"}, "shrink_only: got true"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ConfigError, match="sora: ") as caught:
        method("sora", **options)
    assert says in str(caught.value)


def test_options_survive_json_and_presets_are_the_published_ones():
    made = method("sora", schedule=[0, 1e-4])
    assert made.options()["schedule"] == [0, 1e-4]
    assert method("sora", **made.options()) == made
    first, second = method("sora", preset="sts-b"), method("sora", preset="rte")
    assert (first.r, first.alpha, first.dropout) == (8, 16.0, 0.0)
    assert (first.lambda_1, first.xi, first.form, first.schedule) == (
        10.0,
        3e-4,
        "released",
        "none",
    )
    assert_close(second.levels().values(), [7e-4 * k / 6 for k in range(7)])
    assert second.lambda_1 == 1e-3
    assert second.needs == {"boundary", "passes"}
    assert first.needs == frozenset()


def test_gates_stay_in_fp32_and_other_dtypes_are_refused():
    model = adapted(torch.float32).bfloat16()
    assert {gate.dtype for gate in gates(model)} == {torch.float32}
    train(model, steps=1)
    gates(model)[0].data = gates(model)[0].data.bfloat16()
    with pytest.raises(ConfigError, match="expected float32 or float64"):
        attached(model)


def test_optimisers_that_do_not_own_the_gates_are_refused():
    model = adapted()
    with pytest.raises(ConfigError, match=r"polyrank\.optimizer\(model, lr=\.\.\.\)"):
        pr.attach(torch.optim.AdamW(pr.parameter_groups(model, lr=0.1)), model)
    factors = [p for layer in layers(model) for p in (layer.A, layer.B)]
    with pytest.raises(ConfigError, match="misses 2 trainable tensors"):
        pr.attach(torch.optim.AdamW(factors), model)
    _, attachment = attached(model)
    with pytest.raises(ConfigError, match="attached already"):
        attached(model)
    attachment.detach()
    twice = torch.optim.SGD([{"params": [gate]} for gate in gates(model)], lr=0.1)
    twice.param_groups.append({**twice.param_groups[0], "weight_decay": 0.0})
    with pytest.raises(ConfigError, match="stands in 2 groups"):
        Shrinkage(lambda step: 0.1).bind(pr.adapter_of(model), twice, None)


@pytest.mark.parametrize("form", ["soft", "released"])
def test_gates_that_are_not_finite_stop_the_run(form):
    model = adapted(xi=1e-3, form=form)
    made, attachment = attached(model)
    loss_of(model).backward()
    gates(model)[1].grad[0] = math.nan
    with pytest.raises(RunError, match="1 layers hold NaN or infinity"):
        made.step()
    with pytest.raises(RunError, match="1 layers hold NaN or infinity"):
        attachment.detach()
    with pytest.raises(RunError, match="second is the first"):
        attached(model)


def test_merging_is_exact_and_refused_on_a_quantised_base(monkeypatch):
    model = adapted().eval()
    expected = model(rows())
    assert_close(copy.deepcopy(model).merge_and_unload()(rows()), expected)
    monkeypatch.setattr(AdaptedLinear, "quantised", lambda self: True)
    with pytest.raises(pr.MergeError, match="quantised"):
        model.merge_adapter()


def test_the_vital_sign_tells_kept_ranks_and_sizes():
    model = adapted()
    with torch.no_grad():
        gates(model)[0][:3] = 0
    adapter = pr.adapter_of(model)
    sign = adapter.method.vital_sign(adapter)
    assert kept_ranks(adapter) == {"first": 1, "second": 4}
    assert sign["kept_ranks"] == 2.5
    assert_close(sign["gate_size"], float(flat(model).abs().mean()))
