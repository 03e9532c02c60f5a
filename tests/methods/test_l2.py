"""l2: the distance of dense updates from Gram matrices, and of factors as they are."""

import pytest
import torch

import polyrank as pr
from polyrank.frame import Step
from polyrank.parts.consolidate import difference, product_of, squared_norms
from polyrank.testing import assert_close

STEP = Step(index=0, total=1, lr=0.1, peak=0.1)


def factors(seed, d_out=7, d_in=9, r=3):
    torch.manual_seed(seed)
    return (
        torch.randn(d_out, r, dtype=torch.float64, requires_grad=True),
        torch.randn(r, d_in, dtype=torch.float64, requires_grad=True),
    )


def started(bench, task=1, nudged=True, **options):
    """A bench whose second task has begun: the anchor is what the first one ended with."""
    own = {k: options.pop(k) for k in ("space", "include_head", "weight") if k in options}
    strategy = pr.method("l2", **{"weight": 1.0, **own})
    work = bench(**options)
    work.begin(0, strategy.boundary())
    if task:
        work.nudge()
        work.end()
        work.begin(1, strategy.boundary())
    (penalty,) = strategy.penalties()
    penalty.bind(work.adapter, work)
    if nudged:
        work.nudge(0.2, seed=1)
    return work, penalty


def dense(work):
    return {v.site.path: v.delta().double() for v in work.adapter.layers}


def test_rehearsal_free_7_gram_form_is_the_norm_of_the_product_and_so_are_its_gradients():
    (B, A), (D, C) = factors(0), factors(1)
    found = squared_norms([(B, A), (D, C)])
    expected = (B @ A).square().sum() + (D @ C).square().sum()
    assert_close(found, expected, tol=1e-9, reason="the property's own figure")
    grads = torch.autograd.grad(found, [A, B])
    assert_close(grads[0], 2 * (B.T @ B) @ A)
    assert_close(grads[1], 2 * B @ (A @ A.T))


def test_the_distance_of_two_products_and_all_its_gradients():
    (B, A), (B0, A0) = factors(0), factors(1)
    found = squared_norms([difference((B, A), (B0.detach(), A0.detach()))])
    expected = (B @ A - B0 @ A0).square().sum()
    assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad(found, [A, B]), torch.autograd.grad(expected, [A, B]), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("r", [1, 2, 5])
def test_ranks_may_come_and_go(r):
    (B, A), (B0, A0) = factors(0), factors(1, r=r)
    found = squared_norms([difference((B, A), (B0.detach(), A0.detach()))])
    expected = (B @ A - B0 @ A0).square().sum()
    assert_close(found, expected)
    for got, want in zip(
        torch.autograd.grad(found, [A, B]), torch.autograd.grad(expected, [A, B]), strict=True
    ):
        assert_close(got, want)


def test_rehearsal_free_3_equal_factors_are_exactly_zero_apart_in_any_precision():
    for dtype in (torch.float64, torch.float32):
        B, A = (t.detach().to(dtype).requires_grad_() for t in factors(0))
        found = squared_norms([difference((B, A), (B.detach(), A.detach()))])
        assert found == 0
        assert not any(g.any() for g in torch.autograd.grad(found, [A, B]))


def test_rehearsal_free_7_at_the_start_the_penalty_and_its_gradients_are_zero(bench):
    work, penalty = started(bench, task=0, nudged=False)
    found = penalty(work.adapter, STEP)
    assert found == 0
    for view in work.adapter.layers:
        assert not any(
            g.any() for g in torch.autograd.grad(found, [view.A, view.B], retain_graph=True)
        )


def test_the_first_task_is_held_to_the_base(bench):
    work, penalty = started(bench, task=0)
    assert_close(penalty(work.adapter, STEP), sum(d.square().sum() for d in dense(work).values()))


def test_later_tasks_are_held_to_the_end_of_the_last_one(bench):
    work, penalty = started(bench, nudged=False)
    then = dense(work)
    assert penalty(work.adapter, STEP) == 0
    work.nudge(0.2, seed=1)
    now = dense(work)
    expected = sum((now[path] - then[path]).square().sum() for path in now)
    assert_close(penalty(work.adapter, STEP), expected)


def test_rehearsal_free_4_the_penalty_is_quadratic_in_the_update(bench):
    work, penalty = started(bench, task=0)
    once = penalty(work.adapter, STEP)
    with torch.no_grad():
        for view in work.adapter.layers:
            view.B.mul_(2)
    assert_close(penalty(work.adapter, STEP), 4 * once)
    assert once > 0


def test_rehearsal_free_4_factors_too(bench):
    work, penalty = started(bench, space="factors", nudged=False)
    before = work.weights()
    work.nudge(0.2, seed=1)
    once, gap = penalty(work.adapter, STEP), {}
    gap = {n: p.detach() - before[n] for n, p in work.adapter.named().items() if "head" not in n}
    assert_close(once, sum(g.square().sum() for g in gap.values()))
    with torch.no_grad():
        for name, p in work.adapter.named().items():
            p.copy_(before[name] + 2 * (p - before[name]))
    assert_close(penalty(work.adapter, STEP), 4 * once)


def test_a_core_that_merges_enters_through_its_matrix(bench):
    work, penalty = started(bench, method="moe-lora", router="moslora", experts=1, r=3)
    assert work.adapter.layers[0].core.delta().requires_grad
    found = penalty(work.adapter, STEP)
    for view in work.adapter.layers:
        P, A = product_of(view)
        assert_close(P @ A, view.delta())
    grads = torch.autograd.grad(found, [v.core.weight for v in work.adapter.layers])
    assert all(g.any() for g in grads)


def test_a_shadow_counts_in_the_first_task_and_cancels_later(bench):
    work = bench()
    strategy = pr.method("l2", weight=1.0)
    torch.manual_seed(3)
    for view in work.adapter.layers:
        kept = torch.randn(2, view.A.shape[1]).double(), torch.randn(len(view.B), 2).double()
        view.shadow = (*kept, torch.tensor([0.5, 2.0]).double())
    work.begin(0, strategy.boundary())
    (penalty,) = strategy.penalties()
    penalty.bind(work.adapter, work)
    work.nudge()
    assert_close(penalty(work.adapter, STEP), sum(d.square().sum() for d in dense(work).values()))
    work.end()
    work.begin(1, strategy.boundary())
    penalty.bind(work.adapter, work)
    assert penalty(work.adapter, STEP) == 0


def test_rehearsal_free_8_after_absorbing_the_penalty_is_exactly_zero(bench):
    strategy, merging = pr.method("l2", weight=1.0), pr.method("absorb")
    work = bench()
    work.begin(0, strategy.boundary(), merging.boundary())
    work.nudge()
    rows = work.rows()
    answers = work.out(rows).logits.detach()
    work.end()
    assert_close(work.out(rows).logits, answers)
    work.begin(1, strategy.boundary(), merging.boundary())
    (penalty,) = strategy.penalties()
    penalty.bind(work.adapter, work)
    assert penalty(work.adapter, STEP) == 0
    assert work.memory("l2")["products"] == {}
    work.nudge(seed=1)
    assert_close(penalty(work.adapter, STEP), sum(d.square().sum() for d in dense(work).values()))


def test_appended_ranks_are_held_to_what_the_bank_says(bench):
    work, penalty = started(bench, method="olora", lambda_1=0.0, nudged=False)
    assert penalty(work.adapter, STEP) == 0
    then = dense(work)
    work.nudge(0.2, seed=1)
    now = dense(work)
    expected = sum((now[path] - then[path]).square().sum() for path in now)
    assert_close(penalty(work.adapter, STEP), expected)
    grads = torch.autograd.grad(penalty(work.adapter, STEP), [work.adapter.layers[0].A])
    assert grads[0].any()


@pytest.mark.parametrize("space", ["weights", "factors"])
def test_of_the_head_only_rows_of_earlier_classes_are_held(bench, space):
    work, penalty = started(bench, space=space, include_head=True, nudged=False)
    before = work.weights()
    head = work.adapter.head
    with torch.no_grad():
        head.weight[work.known :] += 1
    assert penalty(work.adapter, STEP) == 0
    work.nudge(0.2, seed=1)
    found = torch.autograd.grad(penalty(work.adapter, STEP), [head.weight, head.bias])
    for got, param, name in zip(found, (head.weight, head.bias), "01", strict=True):
        gap = 2 * (param - before[f"head-0.head.{name}"])[: work.known]
        assert_close(got[: work.known], gap)
        assert not got[work.known :].any()


def test_rehearsal_free_9_a_large_weight_keeps_the_anchor(bench):
    """½ (θ − θ̂)ᵀ H (θ − θ̂) + λ ‖θ − θ'‖²: at θ' + (H + 2λ I)⁻¹ H (θ̂ − θ') nothing pulls."""
    work, penalty = started(bench, space="factors", nudged=False)
    params = [p for n, p in work.adapter.named().items() if "head" not in n]
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    torch.manual_seed(0)
    root = torch.randn(len(flat), len(flat), dtype=torch.float64) / 10
    H, goal = root @ root.T, flat + torch.randn(len(flat), dtype=torch.float64)
    for weight in (0.1, 10.0, 1e6):
        shift = torch.linalg.solve(
            H + 2 * weight * torch.eye(len(flat)).double(), H @ (goal - flat)
        )
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(flat + shift, params)
        pull = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(penalty(work.adapter, STEP), params)]
        )
        assert_close(weight * pull, H @ (goal - flat - shift), tol=1e-9, reason="a solved system")
    assert float(shift.abs().max()) < 1e-4


def test_training_is_held_and_without_weight_it_is_not(bench):
    drifts = {}
    for weight in (0.0, 1.0):
        strategy = pr.method("l2", weight=weight)
        work = bench(dtype=torch.float32)
        work.begin(0, strategy.boundary())
        work.steps([strategy], count=8)
        drifts[weight] = sum(float(d.square().sum()) for d in dense(work).values())
    assert 0 < drifts[1.0] < 0.5 * drifts[0.0]
    plain = bench(dtype=torch.float32)
    plain.begin(0)
    plain.steps(count=8)
    assert sum(float(d.square().sum()) for d in dense(plain).values()) == drifts[0.0]


def test_without_an_engine_and_with_bad_options_it_says_so(bench):
    work = bench()
    (penalty,) = pr.method("l2").penalties()
    with pytest.raises(pr.ConfigError, match=r"l2: .*polyrank\.run"):
        penalty.bind(work.adapter, None)
    with pytest.raises(pr.ConfigError, match="weight: got -1"):
        pr.method("l2", weight=-1.0)
    with pytest.raises(pr.ConfigError, match=r"space: got 'weight'.*did you mean 'weights'"):
        pr.method("l2", space="weight")
