"""allora: row factors, whose gradients they scale and whose not, ablations, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import polyrank as pr
from polyrank.errors import ConfigError, MergeError
from polyrank.frame import Identity, conflicts, keyed
from polyrank.layers.verbs import merge
from polyrank.ops.rank_gate import rank_gate
from polyrank.parts.gates import StaticGate
from polyrank.parts.row_scale import ByOutput, row_scales
from polyrank.testing import assert_close

D_IN, D_OUT, R = 6, 9, 4


def draw(*shape, key=0, dtype=torch.float64):
    return torch.randn(*shape, generator=keyed("allora", key, *shape), dtype=dtype)


def layer_of(method="allora", dtype=torch.float64, zero=False, r=R, **options):
    """A model of one adapted linear layer, and the adapter's view of it."""
    scaling = {"scaling": 1.0} if method == "lora" else {}
    made = pr.method(method, r=r, **{**scaling, **options})
    base = nn.Sequential(nn.Linear(D_IN, D_OUT)).to(dtype)
    with torch.no_grad():
        base[0].weight.copy_(draw(D_OUT, D_IN, key=1))
        base[0].bias.copy_(draw(D_OUT, key=1))
    model = pr.adapt(base, made, ["0"], seed=1).to(dtype)
    (view,) = pr.adapter_of(model).layers
    with torch.no_grad():
        view.A.copy_(draw(r, D_IN, key=2))
        if not zero:
            view.B.copy_(draw(D_OUT, r, key=3))
    return model, view


def attached(model, lr=0.1, kind=torch.optim.SGD, **options):
    optimizer = kind(pr.parameter_groups(model, lr=lr), lr=lr, **options)
    return optimizer, pr.attach(optimizer, model)


def gradients(method, x, delta, **options):
    """The answer, and the gradients of x, A and B, at a layer as an update finds it."""
    model, view = layer_of(method, **options)
    _, attachment = attached(model)
    model.train()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(delta)
    attachment.detach()
    return y.detach(), x.grad, view.A.grad, view.B.grad, view


def by_hand(view, eta2):
    rows = (view.B.detach().double() @ view.A.detach().double()).norm(dim=1)
    return (rows + 1 / eta2) ** -0.5


X, DELTA = draw(5, D_IN, key=4), draw(5, D_OUT, key=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_allora_1_answers_are_those_of_lora_without_a_scale(dtype):
    x = X.to(dtype)
    ours, plain = layer_of(dtype=dtype), layer_of("lora", dtype=dtype)
    assert torch.equal(ours[0](x), plain[0](x))
    _, attachment = attached(ours[0])
    ours[0].train()
    plain[0].train()
    assert torch.equal(ours[0](x), plain[0](x))
    attachment.detach()
    model, view = layer_of(dtype=dtype, zero=True)
    assert torch.equal(
        model(x), F.linear(x, view.module.get_base_layer().weight, view.module.base_bias())
    )


@pytest.mark.parametrize("eta2", [1.0, 4.0])
def test_allora_2_rows_of_b_and_what_a_hears_are_scaled_and_the_input_is_not(eta2):
    y, dx, dA, dB, view = gradients("allora", X, DELTA, eta2=eta2)
    plain_y, plain_dx, _, plain_dB, _ = gradients("lora", X, DELTA)
    a = by_hand(view, eta2)
    assert torch.equal(y, plain_y)
    assert torch.equal(dx, plain_dx)
    assert_close(dB, a[:, None] * plain_dB)
    assert_close(dA, (a[:, None] * view.B.detach()).T @ (DELTA.T @ X))
    assert float((a - 1).abs().max()) > 0.1


def test_allora_3_factors_are_between_zero_and_eta_and_fall_with_the_row():
    model, view = layer_of(eta2=2.0)
    with torch.no_grad():
        view.B[0] = 0
        view.B[2] = 2 * view.B[1]
        view.B[3] *= (1 - 1 / 2) / (view.B[3] @ view.A).norm()
    (a,) = row_scales(pr.adapter_of(model).layers, 2.0)
    assert a.shape == (D_OUT,)
    assert ((a > 0) & (a <= 2**0.5)).all()
    assert_close(a[0], 2**0.5)
    assert_close(a[3], 1.0)
    assert a[2] < a[1]
    zero = layer_of(zero=True)[1]
    assert torch.equal(row_scales([zero], 4.0)[0], torch.full((D_OUT,), 2.0).double())


def test_allora_4_two_gram_matrices_give_the_norms_of_all_rows():
    views = [layer_of()[1], layer_of(zero=True)[1], layer_of()[1]]
    with torch.no_grad():
        # Rows that cancel: their norm is rounding alone, and no root of a negative number.
        views[2].A[1] = views[2].A[0]
        views[2].B.zero_()
        views[2].B[:, 0], views[2].B[:, 1] = 1e3, -1e3
    for view, a in zip(views, row_scales(views, 4.0), strict=True):
        assert a.isfinite().all()
        assert_close(a, by_hand(view, 4.0), tol=1e-5, reason="the root of a rounded zero is 1e-5")


def test_allora_5_factors_do_not_depend_on_the_factorisation():
    _, view = layer_of()
    before = row_scales([view], 4.0)[0]
    T = torch.eye(R, dtype=torch.float64) + 0.3 * draw(R, R, key=6)
    with torch.no_grad():
        view.A.copy_(T @ view.A)
        view.B.copy_(view.B @ torch.linalg.inv(T))
    assert_close(row_scales([view], 4.0)[0], before)


def test_allora_6_rows_of_equal_norm_are_scaled_alike():
    model, view = layer_of(eta2=1e12)
    rows = (view.B.detach() @ view.A.detach()).norm(dim=1)
    assert_close(row_scales([view], 1e12)[0], rows**-0.5, tol=1e-9, reason="1/η² is left")
    with torch.no_grad():
        view.B.div_(rows[:, None])
    _, attachment = attached(model)
    model.train()
    model(X).backward(DELTA)
    attachment.detach()
    scaled = [view.A.grad.clone(), view.B.grad.clone()]
    model.zero_grad()
    model(X).backward(DELTA)
    for found, plain in zip(scaled, (view.A.grad, view.B.grad), strict=True):
        assert_close(found, plain, tol=1e-9, reason="1/η² is left")


def test_allora_7_a_single_rank():
    _, view = layer_of(r=1)
    size = view.B.detach()[:, 0].abs() * view.A.detach().norm()
    assert_close(row_scales([view], 4.0)[0], (size + 0.25) ** -0.5)


def test_allora_8_under_adam_a_constant_factor_leaves_the_path_of_b_as_it_is(monkeypatch):
    ends = []
    for frozen in (True, False):
        model, view = layer_of()
        view.A.requires_grad_(False)
        optimizer = torch.optim.Adam([view.B], lr=0.1, eps=1e-30)
        attachment = pr.attach(optimizer, model)
        monkeypatch.setattr(attachment.rules[0], "begin", lambda step: None)
        view.row_scale = by_hand(view, 4.0) if frozen else None
        model.train()
        for n in range(6):
            model(draw(5, D_IN, key=n)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        attachment.detach()
        ends.append(view.B.detach().clone())
    assert_close(ends[0], ends[1], tol=1e-9, reason="six steps of rounding")


def test_allora_9_inputs_of_any_number_of_axes_give_the_same_gradients():
    x, delta = draw(12, D_IN, key=7), draw(12, D_OUT, key=8)
    flat = gradients("allora", x, delta)
    for shape in ((3, 4), (2, 2, 3)):
        found = gradients("allora", x.reshape(*shape, D_IN), delta.reshape(*shape, D_OUT))
        for ours, theirs in zip(found[1:4], flat[1:4], strict=True):
            assert_close(ours.reshape(theirs.shape), theirs)


def test_allora_9_micro_batches_share_the_factors_of_their_update():
    ends = []
    for parts in (1, 4):
        model, view = layer_of()
        optimizer, attachment = attached(model)
        model.train()
        for n in range(3):
            for x in draw(8, D_IN, key=20 + n).chunk(parts):
                model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        attachment.detach()
        ends.append((view.A.detach(), view.B.detach()))
    for ours, theirs in zip(*ends, strict=True):
        assert_close(ours, theirs)


def test_allora_10_the_gradient_is_not_that_of_the_answer_by_design():
    _, view = layer_of()

    def answer(A, B, x):
        y = x.new_zeros(len(x), D_OUT)
        core = Identity(R)
        return rank_gate(y, x, A, None, B, core.fused(), 1.0, 0, None, scales, 0.0, 0, None)[0]

    inputs = [t.detach().clone().requires_grad_() for t in (view.A, view.B, X)]
    scales = torch.ones(D_OUT).double()
    assert torch.autograd.gradcheck(answer, inputs)
    plain = answer(*inputs)
    scales = by_hand(view, 4.0)
    assert torch.equal(answer(*inputs), plain)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(answer, inputs)


def test_allora_11_merged_it_answers_the_same():
    model, _ = layer_of(dtype=torch.float32)
    x = X.float()
    expected = model(x)
    assert_close(model.merge_and_unload()(x), expected, tol=1e-6, reason="as the paper's layer")


def test_allora_11_by_output_gradients_are_scaled_token_by_token():
    y, dx, dA, dB, view = gradients("allora", X, DELTA, form="output")
    plain = gradients("lora", X, DELTA)
    A, B = view.A.detach(), view.B.detach()
    a = ((X @ A.T @ B.T).abs() + 0.25) ** -0.5
    assert_close(y, plain[0])
    assert_close(dx, plain[1])
    assert_close(dB, (a * DELTA).T @ (X @ A.T))
    assert_close(dA, ((a * DELTA) @ B).T @ X)


def test_allora_11_asf_scales_the_answer_and_cannot_be_merged():
    y, _, _, _, view = gradients("allora", X, DELTA, form="forward", eta2=2.0)
    base = F.linear(X, view.module.get_base_layer().weight, view.module.base_bias())
    f = X @ view.A.detach().T @ view.B.detach().T
    assert_close(y, base + f / (f.abs() + 0.5).sqrt())
    model, view = layer_of(form="forward", eta2=2.0)
    assert view.method.merges == "never"
    assert torch.autograd.gradcheck(model, X.clone().requires_grad_())
    with pytest.raises(MergeError, match="unmerged"):
        merge(model)
    with pytest.raises(MergeError):
        ByOutput(2, 4.0, forward=True).delta()


def test_allora_12_dropped_ranks_cost_in_expectation_what_the_theory_says():
    """E ‖E − (Z ∘ V) Bᵀ‖² over masks V of single ranks, each kept with p and divided by it."""
    p, x, target = 0.7, draw(1, D_IN, key=30), draw(1, D_OUT, key=31)
    gate = StaticGate(R)
    z = x @ draw(R, D_IN, key=2).T
    B = draw(D_OUT, R, key=3)
    mean = 0.0
    for mask in itertools.product((0.0, 1.0), repeat=R):
        kept = torch.tensor(mask, dtype=torch.float64)
        gate.gate.data = kept / p
        chance = p ** kept.sum() * (1 - p) ** (R - kept.sum())
        loss = (target - gate(z, None, None).detach() @ B.T).square().sum()
        mean = mean + chance * loss
    extra = (1 - p) / p * (z.square() * B.square().sum(0)).sum()
    assert_close(mean, (target - z @ B.T).square().sum() + extra)


def test_a_update_scales_what_the_optimiser_did_to_the_rows_of_b():
    model, view = layer_of(apply_to="update")
    optimizer, attachment = attached(model, kind=torch.optim.AdamW, weight_decay=0.1)
    plain, twin = layer_of("lora")
    other = torch.optim.AdamW(pr.parameter_groups(plain, lr=0.1), lr=0.1, weight_decay=0.1)
    start, a = view.B.detach().clone(), by_hand(view, 4.0)
    for one, made in ((model, optimizer), (plain, other)):
        one.train()
        one(X).backward(DELTA)
        made.step()
    attachment.detach()
    assert torch.equal(view.A, twin.A)
    assert_close(view.B, start + a[:, None] * (twin.B.detach() - start))
    assert view.row_scale is None


def test_nothing_is_left_behind_for_evaluation_or_another_optimiser():
    model, view = layer_of()
    optimizer, attachment = attached(model)
    model.train()
    model(X).backward(DELTA)
    assert view.row_scale is not None
    optimizer.step()
    attachment.detach()
    assert view.row_scale is None


def test_what_does_not_fit_is_refused_with_a_remedy():
    for options, text in (
        ({"scaling": "alpha/r"}, "s = 2, expected 1"),
        ({"scaling": "alpha/sqrt(r)"}, "leave scaling at 1.0"),
        ({"dropout": 0.05}, "allow_dropout=True"),
        ({"eta2": 0.0}, "eta2: got 0.0, expected > 0"),
        ({"form": "output", "apply_to": "update"}, "apply_to"),
    ):
        with pytest.raises(ConfigError, match=text):
            pr.method("allora", **options)
    assert pr.method("allora", r=8, alpha=8.0, scaling="alpha/r").checks() == []
    assert pr.method("allora", preset="commonsense-dropout").dropout == 0.05
    base = nn.Sequential(nn.Linear(D_IN, D_OUT))
    uneven = pr.method("allora", r=4, alpha=4.0, scaling="alpha/r")
    with pytest.raises(ConfigError, match="scaling at 0: got s = 2"):
        pr.adapt(base, uneven, ["0"], rank_pattern={"0": 2})


def test_true_gradients_and_scaled_ones_are_no_pair():
    ours, theirs = pr.method("allora").rules(), pr.method("altlora").rules()
    (problem,) = conflicts([*ours, *theirs])
    assert "'idle' expects an untouched true_grad, but 'scaledgradient' changes it" in problem
    assert conflicts([*pr.method("allora", apply_to="update").rules(), *theirs]) == []


def test_factors_are_those_of_the_update_where_a_start_is_subtracted():
    _, view = layer_of()
    with torch.no_grad():
        view.shadow = (view.A, view.B, None)
        (still,) = row_scales([view], 4.0)
        assert torch.equal(still, torch.full_like(still, 2.0))
        view.A.add_(1e-4 * draw(R, D_IN, key=7))
        view.B.add_(1e-4 * draw(D_OUT, R, key=8))
    for shadow in (view.shadow, (view.shadow[0], view.shadow[1], torch.full((R,), 0.5).double())):
        view.shadow = shadow
        (found,) = row_scales([view], 4.0)
        expected = (torch.linalg.norm(view.delta(), dim=1) + 0.25).rsqrt()
        assert_close(found, expected)
    # More ranks than the start has.
    view.shadow = (view.shadow[0][:2], view.shadow[1][:, :2], None)
    (found,) = row_scales([view], 4.0)
    assert_close(found, (torch.linalg.norm(view.delta(), dim=1) + 0.25).rsqrt())


def test_factors_are_in_single_precision_inside_autocast_too():
    _, view = layer_of(dtype=torch.float32)
    (expected,) = row_scales([view], 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = row_scales([view], 4.0)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", ["output", "forward"])
def test_roots_of_answers_in_half_precision_are_taken_in_single(form):
    core = ByOutput(1, 4.0, forward=form == "forward")
    f = torch.linspace(-3, 3, 997).bfloat16()[:, None].requires_grad_()
    A = torch.ones(1, 1, requires_grad=True)
    y = core.outcome(lambda x, A, B: f if A.requires_grad else f.detach(), f, A, A)
    assert y.dtype == torch.bfloat16
    a = (f.detach().float().abs() + 0.25).rsqrt()
    if form == "forward":
        assert torch.equal(y, (f.float() * a).bfloat16())
    else:
        (found,) = torch.autograd.grad(y, f, torch.ones_like(f))
        assert torch.equal(found, a.bfloat16())


def test_a_start_that_is_subtracted_is_not_lent_to_what_acts_behind_b():
    pr.method("allora", init_by="lora-ga")
    with pytest.raises(ConfigError, match=r"allora has ByOutput behind B.*choose another"):
        pr.method("allora", form="output", init_by="lora-ga")
