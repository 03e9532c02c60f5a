"""olora: a bank of frozen ranks, a penalty on their overlap, and what must equal what."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.frame import Step
from polyrank.layers import keep
from polyrank.methods.olora import Overlap
from polyrank.testing import assert_close

STEP = Step(index=0, total=1, lr=0.1, peak=0.1)


def after(bench, tasks, steps=2, **options):
    """A bench at the start of a task, all earlier ones trained."""
    work = bench("olora", **{"r": 2, "dtype": torch.float32, **options})
    for task in range(tasks):
        work.begin(task)
        work.steps(count=steps)
        work.end()
    work.begin(tasks)
    return work


def overlap(work, lambda_1=1.0, lambda_2=0.0, power=1):
    penalty = Overlap(lambda_1, lambda_2, power)
    penalty.bind(work.adapter, None)
    return penalty(work.adapter, STEP)


def by_hand(work, power=1):
    total = 0.0
    for layer in work.adapter.layers:
        for old in layer.bank[0].split(2):
            total = total + ((old @ layer.A.T).abs() ** power).sum()
    return total


def test_olora_1_the_first_task_is_plain_lora_bit_for_bit(bench):
    found = []
    for name in ("olora", "lora"):
        work = bench(name, dtype=torch.float32)
        work.begin(0)
        losses = work.steps(count=5)
        found.append((losses, work.weights()))
    assert found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name])


def test_olora_2_a_task_begins_with_the_answers_of_the_last(bench):
    work = after(bench, 1, dtype=torch.float64)
    work.steps(count=3)
    rows = work.rows()
    before = work.logits(rows)
    work.end()
    work.begin(2)
    assert torch.equal(work.logits(rows)[:, : before.shape[1]], before)
    assert all(layer.bank[0].shape[0] == 4 for layer in work.adapter.layers)
    assert all(not layer.B.any() for layer in work.adapter.layers)


def test_olora_3_old_ranks_keep_their_bits(bench):
    work = after(bench, 2)
    before = [(A.clone(), B.clone()) for A, B in (v.bank for v in work.adapter.layers)]
    work.steps(count=5, lr=0.5)
    for layer, (A, B) in zip(work.adapter.layers, before, strict=True):
        assert torch.equal(layer.bank[0], A)
        assert torch.equal(layer.bank[1], B)
        assert layer.B.any()
        assert not layer.bank[0].requires_grad


@pytest.mark.parametrize("power", [1, 2])
def test_olora_4_the_overlap_is_that_of_every_pair_of_tasks(bench, power):
    work = after(bench, 2)
    found = overlap(work, power=power)
    assert_close(found, by_hand(work, power))
    assert found > 0
    torch.manual_seed(0)
    turn = torch.tensor([1, 0])
    sign = torch.tensor([[1.0], [-1.0]])
    with torch.no_grad():
        for layer in work.adapter.layers:
            layer.A.copy_(sign * layer.A[turn])
            layer.bank[0].copy_(-layer.bank[0].flip(0))
    assert_close(overlap(work, power=power), found)
    with torch.no_grad():
        for layer in work.adapter.layers:
            layer.A.mul_(3)
    assert_close(overlap(work, power=power), 3**power * found)


def test_olora_4_and_9_on_the_complement_nothing_overlaps_and_old_inputs_pass_by(bench):
    work = after(bench, 2, r=1)
    work.nudge()
    with torch.no_grad():
        for layer in work.adapter.layers:
            Q, _ = torch.linalg.qr(layer.bank[0].T)
            layer.A.sub_((layer.A @ Q) @ Q.T)
            x = torch.randn(7, len(layer.bank[0])) @ layer.bank[0]
            read = x @ layer.A.T @ layer.B.T
            assert float(read.abs().max()) < 1e-5 * float(x.abs().max())
            assert layer.A.abs().max() > 1e-3
        assert float(overlap(work)) < 1e-5


def test_olora_5_only_the_new_directions_are_pushed(bench):
    work = after(bench, 1)
    work.nudge()
    found = overlap(work)
    layers = work.adapter.layers
    A, B = ([getattr(v, side) for v in layers] for side in "AB")
    grads = torch.autograd.grad(found, A, retain_graph=True)
    for layer, grad in zip(layers, grads, strict=True):
        old = layer.bank[0]
        assert_close(grad, (old @ layer.A.T).sign().T @ old)
    unused = torch.autograd.grad(found, B, allow_unused=True)
    assert unused == (None,) * len(B)


def test_olora_6_a_bank_equals_a_sum_of_loras(bench):
    work = after(bench, 2, dtype=torch.float64)
    work.nudge()
    torch.manual_seed(0)
    for layer in work.adapter.layers:
        x = torch.randn(5, layer.site.d_in, dtype=torch.float64)
        expected = nn.functional.linear(
            x, layer.module.get_base_layer().weight, layer.module.base_bias()
        )
        A, B = layer.bank
        parts = [*zip(A.split(2), B.split(2, dim=1), strict=True), (layer.A, layer.B)]
        assert len(parts) == 3
        for a, b in parts:
            expected = expected + layer.scale * (x @ a.T) @ b.T
        assert_close(layer.module(x), expected)


def test_olora_7_merged_it_answers_the_same(bench):
    work = after(bench, 2)
    work.nudge()
    rows = work.rows()
    expected = work.logits(rows)
    assert_close(work.model.merge_and_unload()(rows["x"]), expected)


def test_olora_8_without_weights_it_is_one_lora_after_the_other():
    assert pr.method("olora", lambda_1=0.0, lambda_2=0.0).penalties() == []
    assert len(pr.method("olora").penalties()) == 1
    assert len(pr.method("olora", lambda_1=0.0, lambda_2=0.1).penalties()) == 1


def test_olora_8_training_with_a_weight_lowers_the_overlap(bench):
    ends = {}
    for weight in (0.0, 2.0):
        work = after(bench, 1, lambda_1=weight)
        work.steps(count=10)
        ends[weight] = float(by_hand(work).detach())
    assert ends[2.0] < 0.5 * ends[0.0]


@pytest.mark.parametrize("power", [1, 2])
def test_olora_10_accumulation_counts_the_penalty_once(bench, power):
    found = []
    for accumulation in (1, 4):
        work = after(bench, 1, dtype=torch.float64, lambda_1=0.5, lambda_2=0.1, power=power)
        work.steps(count=3, accumulation=accumulation)
        found.append(work.weights())
    for name, value in found[0].items():
        assert_close(found[1][name], value, dtype=torch.float32)


def test_norms_are_not_squared_and_pull_nowhere_at_zero(bench):
    work = bench("olora")
    work.begin(0)
    found = overlap(work, lambda_1=0.5, lambda_2=0.3)
    layers = work.adapter.layers
    assert_close(found, 0.3 * sum(layer.A.norm() for layer in layers))
    grads = torch.autograd.grad(found, [p for v in layers for p in (v.A, v.B)])
    for layer, a, b in zip(layers, grads[::2], grads[1::2], strict=True):
        assert_close(a, 0.3 * layer.A / layer.A.norm())
        assert torch.equal(b, torch.zeros_like(layer.B))


def test_a_first_task_has_nothing_to_avoid(bench):
    work = bench("olora")
    work.begin(0)
    found = overlap(work)
    assert found == 0
    assert not found.requires_grad


def test_more_ranks_than_inputs_warn_or_stop(bench):
    for strict in (False, True):
        work = bench("olora", r=4, strict=strict)
        work.begin(0)
        work.end()
        # Six inputs of the first layer, eight ranks.
        if strict:
            with pytest.raises(pr.ConfigError, match="r at first: 4 ranks are taken and 4 are to"):
                work.begin(1)
            assert all(layer.bank is None for layer in work.adapter.layers)
        else:
            with pytest.warns(UserWarning, match="of 6 inputs no more can be independent"):
                work.begin(1)
            assert work.adapter.layers[0].bank[0].shape == (4, 6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lambda_1": -0.5}, "lambda_1: got -0.5"),
        ({"lambda_2": -1.0}, "lambda_2: got -1"),
        ({"power": 3}, "power: got 3, expected 1"),
        ({"r": 0}, "r: got 0"),
        ({"lamda_1": 1.0}, "did you mean 'lambda_1'"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(pr.ConfigError, match=says):
        pr.method("olora", **options)


def test_ranks_that_differ_by_layer_stay_so_as_banks_grow(bench):
    work = after(bench, 1)
    first = work.adapter.layers[0]
    keep(work.model, first, torch.tensor([1]))
    work.steps(count=1)
    work.end()
    work.begin(2)
    for layer in work.adapter.layers:
        own = 1 if layer.site.path == first.site.path else 2
        assert layer.A.shape[0] == layer.B.shape[1] == own
