"""Properties of the rank gate that hold whatever path computes it."""

import pytest
import torch

from polyrank.ops.philox import keep_mask
from polyrank.ops.rank_gate import Epilogue, NonFiniteError, eager, gate, naive
from polyrank.testing.tolerance import assert_close

PATHS = {"naive": naive.rank_gate, "eager": eager.rank_gate}


@pytest.fixture(params=PATHS)
def op(request):
    return PATHS[request.param]


def products(case):
    h = case.x @ case.A.T
    return h, None if case.rows is None else case.x @ case.rows.T


def lora(case, scale, A=None, B=None):
    A, B = case.A if A is None else A, case.B if B is None else B
    return case.y + scale * (case.x @ A.T) @ B.T


# --- every kind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_zero_B_leaves_the_base_output_bit_for_bit(make, name, op, dtype):
    case = make(name, dtype=dtype, lead=(3, 7))
    out, _, grads = case.with_(B=torch.zeros_like(case.B, requires_grad=True)).run(op)
    assert torch.equal(out, case.y)
    assert not any(grads[n].any() for n in ("x", "A", "rows", "gate") if n in grads)
    assert grads["B"].any()


def test_ranks_have_no_order(make, name, op):
    case = make(name)
    e, m = case.epilogue, case.epilogue.block
    blocks = torch.randperm(12 // m)
    ranks = (blocks[:, None] * m + torch.arange(m)).flatten()
    moved = case.with_(
        A=case.A[ranks],
        B=case.B[:, ranks],
        rows=None if case.rows is None else case.rows[blocks],
        epilogue=Epilogue(
            kind=e.kind, k=e.k, block=m, score=e.score, bias_in_weight=e.bias_in_weight,
            total=e.total, tau=e.tau, delta=e.delta,
            bias=None if e.bias is None else e.bias[ranks],
            gate=None if e.gate is None else e.gate[ranks],
        ),
    )  # fmt: skip
    (out, counts), (expected, plain) = moved.call(op, count=True), case.call(op, count=True)
    assert_close(out, expected)
    assert counts is None or torch.equal(counts, plain[ranks])


def test_a_token_does_not_see_the_others(make, name, op):
    case = make(name, lead=(8,))
    x = case.x.detach().clone()
    x[3:] = torch.randn_like(x[3:]) * 5
    expected, _ = case.call(op)
    out, _ = case.with_(x=x).call(op)
    assert torch.equal(out[:3], expected[:3])
    assert not torch.equal(out[3:], expected[3:])


def test_no_tokens(make, name, op):
    case = make(name, lead=(3, 0), d_in=5, d_out=4)
    mask = torch.ones(3, 0, dtype=torch.bool)
    out, counts, grads = case.run(op, count=True, mask=mask)
    assert out.shape == (3, 0, 4)
    assert counts is None or (counts.shape == (12,) and not counts.any())
    assert not any(g.any() for g in grads.values())
    assert all(g.isfinite().all() for g in grads.values())


def test_the_bank_learns_nothing_and_carries_x(make, name, op):
    case = make(name)
    full, _, plain = case.run(op)
    out, _, grads = case.run(op, live_from=5)
    assert torch.equal(out, full)
    assert not grads["A"][:5].any()
    assert not grads["B"][:, :5].any()
    assert_close(grads["A"][5:], plain["A"][5:])
    assert_close(grads["B"][:, 5:], plain["B"][:, 5:])
    assert_close(grads["x"], plain["x"])
    B = case.B.detach().clone()
    B[:, :5] = 0
    without = case.with_(B=B.requires_grad_()).run(op, live_from=5)[2]
    assert not torch.allclose(without["x"], grads["x"])


def test_row_scale_reaches_parameters_only(make, name, op):
    case = make(name)
    d = torch.linspace(0.1, 4, 11, dtype=torch.float64)
    out, _, grads = case.run(op, row_scale=d)
    expected, _, plain = case.run(op)
    assert_close(out, expected)
    assert_close(grads["x"], plain["x"])
    assert torch.equal(grads["y"], plain["y"])
    assert_close(grads["B"], d[:, None] * plain["B"])
    # The gradient of everything inside B is linear in what arrives at y.
    leaves = {n: t for n, t in case.tensors().items() if n in ("A", "rows", "gate")}
    out, _ = case.call(op)
    arriving = torch.linspace(-1, 1.5, out.numel(), dtype=torch.float64).view(out.shape) * d
    for key, grad in zip(leaves, torch.autograd.grad(out, leaves.values(), arriving), strict=True):
        assert_close(grads[key], grad)


def test_row_scale_of_ones_changes_nothing(make, name, op):
    case = make(name)
    expected = case.run(op)[2]
    for key, grad in case.run(op, row_scale=torch.ones(11, dtype=torch.float64))[2].items():
        assert_close(grad, expected[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shadow_of_the_same_factors_cancels_exactly(make, op, dtype):
    case = make("none", dtype=dtype, lead=(4, 9))
    same = (case.A.detach().clone(), case.B.detach().clone(), None)
    assert torch.equal(case.call(op, shadow=same)[0], case.y)


@pytest.mark.parametrize("delta", [None, 2.0, [1.0, -2.0, 0.5], torch.arange(9.0).view(3, 3)])
def test_the_shadow_is_subtracted_with_the_same_scale(make, name, op, delta):
    case = make(name)
    rng = torch.Generator().manual_seed(1)
    A0 = torch.randn(3, 13, generator=rng, dtype=torch.float64)
    B0 = torch.randn(11, 3, generator=rng, dtype=torch.float64)
    delta = None if delta is None else torch.as_tensor(delta, dtype=torch.float64)
    middle = torch.eye(3, dtype=torch.float64) if delta is None else delta
    middle = middle if middle.dim() == 2 else torch.eye(3, dtype=torch.float64) * middle
    W0 = case.scale * B0 @ middle @ A0
    (expected, _), (out, _) = case.call(op), case.call(op, shadow=(A0, B0, delta))
    assert_close(out, expected - case.x @ W0.T)
    # A part of the base: it sees x without dropout.
    (expected, _), (out, _) = (
        case.call(op, dropout=0.4, seed=2, **extra) for extra in ({}, {"shadow": (A0, B0, delta)})
    )
    assert_close(out, expected - case.x @ W0.T)


def test_dropout_averages_to_nothing_and_scales_what_is_left(make, op):
    case = make("none", lead=(2,), d_in=6, d_out=3)
    runs = [case.run(op, dropout=0.25, seed=s) for s in range(400)]
    mean = torch.stack([out.detach() for out, _, _ in runs]).mean(0)
    expected, _, plain = case.run(op)
    assert_close(mean, expected, tol=0.1, reason="mean of 400 masks: 4 standard errors")
    slope = torch.stack([grads["x"] for _, _, grads in runs]).mean(0)
    assert_close(slope, plain["x"], tol=0.1, reason="mean of 400 masks: 4 standard errors")


def test_backward_uses_the_mask_of_forward(make, name, op):
    case = make(name, lead=(4,))
    _, _, grads = case.run(op, dropout=0.5, seed=21)
    keep = keep_mask(case.x.shape, 0.5, 21, torch.device("cpu"))
    assert not grads["x"][~keep].any()
    assert grads["x"][keep].all()


def test_another_seed_is_another_mask(make, op):
    case = make("none")
    a, b, c = (case.call(op, dropout=0.5, seed=s)[0] for s in (1, 2, 1))
    assert torch.equal(a, c)
    assert not torch.equal(a, b)


# --- linear router ----------------------------------------------------------------------------


def test_k_gates_are_on_and_sum_to_total(make, router):
    case = make(router, lead=(40,))
    e = case.epilogue
    g = gate(*products(case), e)
    assert ((g != 0).sum(-1) == e.k).all()
    assert_close(g.sum(-1), torch.full((40,), e.sum, dtype=torch.float64))
    if not e.bias_in_weight or e.score == "softmax":
        assert (g >= 0).all()
    blocks = g.unflatten(-1, (-1, e.block))
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))


def test_a_mixture_of_experts_is_a_rank_gate(make, router, op):
    case = make(router)
    e, m = case.epilogue, case.epilogue.block
    omega = gate(*products(case), e)[:, ::m]
    experts = [
        omega[:, i, None] * ((case.x @ A.T) @ B.T)
        for i, (A, B) in enumerate(zip(case.A.split(m), case.B.split(m, 1), strict=True))
    ]
    out, _ = case.call(op)
    assert_close(out, case.y + case.scale * torch.stack(experts).sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_all_ranks_on_and_no_router_is_plain_lora(make, op, score, dtype):
    case = make("sigmoid", k=12, score=score, dtype=dtype)
    case = case.with_(rows=torch.zeros_like(case.rows, requires_grad=True), scale=16 / 12)
    out, _, grads = case.run(op)
    plain = make("none", dtype=dtype).with_(scale=16 / 12)
    expected, _, expected_grads = plain.run(op)
    assert_close(out, expected)
    assert_close(out, lora(case, 16 / 12))
    for key in ("A", "B", "x"):
        assert_close(grads[key], expected_grads[key])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("block", [1, 3])
def test_one_active_block_teaches_the_router_nothing(make, op, score, block):
    case = make("sigmoid", k=block, block=block, score=score)
    grads = case.run(op)[2]
    assert float(grads["rows"].abs().max()) <= 1e-12 * float(grads["A"].abs().max())
    assert make("sigmoid", k=2 * block, block=block, score=score).run(op)[2]["rows"].any()


def test_gates_do_not_depend_on_the_scale_of_the_weights(make, router, op):
    # With x = 1 the gradient of rows is that of the logits: a row of dz for each token.
    case = make(router, lead=(13,))
    case = case.with_(x=torch.eye(13, dtype=torch.float64, requires_grad=True))
    e, m = case.epilogue, case.epilogue.block
    dz = case.run(op)[2]["rows"].T
    z = case.rows.T
    p = z.sigmoid() if e.score == "sigmoid" else z
    on = gate(*products(case), e)[:, ::m] != 0
    if e.score == "softmax":
        along = dz.sum(-1)
    else:
        b = 0.0 if not e.bias_in_weight else e.bias[::m]
        along = torch.where(on, (p + b) * dz / (p * (1 - p)), 0.0).sum(-1)
    assert not dz[~on].any()
    assert_close(dz.abs().max() + along, dz.abs().max().expand(13))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("block", [1, 3])
def test_ranks_that_no_token_selects_get_exactly_nothing(make, op, score, block):
    off = torch.arange(12) < 6
    bias = torch.where(off, 0.0, 50.0)
    case = make("sigmoid", bias=bias, k=6, block=block, score=score)
    _, counts, grads = case.run(op, count=True)
    assert torch.equal(counts, torch.where(off, 0, 9))
    assert not grads["A"][off].any()
    assert not grads["B"][:, off].any()
    assert not grads["rows"][off[::block]].any()
    assert all(grads[n].isfinite().all() and grads[n].any() for n in ("A", "B", "rows"))


@pytest.mark.parametrize("in_weight", [False, True])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_constant_on_all_biases_selects_the_same(make, op, score, in_weight):
    bias = torch.linspace(-0.2, 0.2, 12)
    (out, counts), (out_c, counts_c) = (
        make("sigmoid", bias=bias + c, score=score, bias_in_weight=in_weight).call(op, count=True)
        for c in (0.0, 0.25)
    )
    assert torch.equal(counts, counts_c)
    if in_weight and score == "sigmoid":
        assert not torch.allclose(out, out_c)
    else:
        assert_close(out_c, out, dtype=torch.float32)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_rank(make, op, score):
    case = make("sigmoid", score=score, k=6, block=3)
    equal = case.with_(rows=torch.zeros_like(case.rows, requires_grad=True))
    out, counts = equal.call(op, count=True)
    assert torch.equal(counts, torch.where(torch.arange(12) < 6, 9, 0))
    assert_close(out, lora(case, case.scale, case.A[:6], case.B[:, :6]))


def test_counts_are_of_real_tokens(make, router, op):
    case = make(router, lead=(3, 10))
    e = case.epilogue
    mask = torch.rand(3, 10) > 0.4
    out, counts = case.call(op, count=True, mask=mask)
    expected, every = case.call(op, count=True)
    assert torch.equal(out, expected)
    on = gate(*products(case), e) != 0
    assert counts.dtype == torch.int64
    assert not counts.requires_grad
    assert torch.equal(every, on.flatten(0, 1).sum(0))
    assert torch.equal(counts, on[mask].sum(0))
    assert int(counts.sum()) == e.k * int(mask.sum())
    assert case.call(op)[1] is None
    assert not case.call(op, count=True, mask=torch.zeros(3, 10, dtype=torch.bool))[1].any()


def test_other_kinds_count_nothing(make, op):
    for name in ("none", "static", "self"):
        assert make(name).call(op, count=True)[1] is None


@pytest.mark.parametrize("shift", [-0.6, -2.0])
def test_the_divisor_is_bounded_where_the_bias_is_in_the_weight(make, op, shift):
    case = make("sigmoid", k=3, bias=torch.full((12,), shift), bias_in_weight=True)
    out, _, grads = case.run(op)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads.values())


def test_a_router_that_is_sure_of_nothing_gives_zeros_not_nan(make, op):
    case = make("sigmoid", dtype=torch.float32)
    x, rows = torch.ones(9, 13), torch.full((12, 13), -20.0)
    out, counts, grads = case.with_(
        x=x.requires_grad_(), rows=rows.requires_grad_()
    ).run(op, count=True)  # fmt: skip
    assert torch.equal(out, case.y)
    assert torch.equal(counts, torch.where(torch.arange(12) < 4, 9, 0))
    assert all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "self"])
def test_logits_that_are_not_finite_are_refused(make, op, kind, bad):
    case = make(kind, lead=(2, 5))
    x = case.x.detach().clone()
    x[1, 2, 0] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 10 tokens.*look for") as caught:
        case.with_(x=x).call(op)
    assert isinstance(caught.value, ValueError)


# --- static and self-activated gates ----------------------------------------------------------


def test_a_static_gate_is_a_diagonal(make, op):
    case = make("static")
    out, _, grads = case.run(op)
    g = case.epilogue.gate
    assert_close(out, lora(case, case.scale, case.A * g[:, None]))
    assert_close(g * grads["gate"], (case.A * grads["A"]).sum(-1))
    assert_close(g * grads["gate"], (case.B * grads["B"]).sum(0))


def test_a_closed_static_gate_silences_its_rank(make, op):
    g = torch.ones(12, dtype=torch.float64)
    g[[0, 5]] = 0
    case = make("static", gate=g.requires_grad_())
    grads = case.run(op)[2]
    closed = g == 0
    assert not grads["A"][closed].any()
    assert not grads["B"][:, closed].any()
    assert grads["gate"].all()


@pytest.mark.parametrize("k", [2, 5, 12, 20])
def test_self_activated_weights_sum_to_one(make, k):
    case = make("self", k=k, lead=(30,))
    h, _ = products(case)
    w = gate(h, None, case.epilogue)
    assert ((w > 0).sum(-1) == min(k, 12)).all()
    assert_close(w.sum(-1), torch.ones(30))
    cut = gate(h, None, make("self", k=k, delta=0.3).epilogue)
    s = h / h.norm(dim=-1, keepdim=True)
    assert (s[cut > 0] >= 0.3).all()
    assert torch.equal(cut[cut > 0], w[cut > 0])
    assert (cut == 0).any()


def test_self_activated_update_is_homogeneous(make, op):
    case = make("self-cut")
    zero = torch.zeros_like(case.y)
    plain, _ = case.with_(y=zero).call(op)
    scaled, _ = case.with_(y=zero, x=case.x * 3).call(op)
    negated, _ = case.with_(y=zero, x=-case.x).call(op)
    assert_close(scaled, 3 * plain)
    assert not torch.allclose(negated, -plain)


def test_self_activated_limits_of_the_temperature(make, op):
    flat = make("self", k=12, tau=1e6)
    assert_close(
        flat.call(op)[0], lora(flat, flat.scale / 12), tol=1e-6, reason="tau = 1e6, not infinity"
    )
    sharp = make("self", k=3, tau=1e-4)
    h, _ = products(sharp)
    best, i = h.max(-1)
    assert_close(sharp.call(op)[0], sharp.y + sharp.scale * best[:, None] * sharp.B.T[i])


def test_self_activated_ties_and_zero_input(make, op):
    case = make("self", dtype=torch.float32)
    x = torch.zeros(9, 13, requires_grad=True)
    out, _, grads = case.with_(x=x).run(op)
    assert torch.equal(out, case.y)
    assert all(g.isfinite().all() for g in grads.values())
    w = gate(torch.ones(2, 12), None, case.epilogue)
    assert torch.equal(w > 0, (torch.arange(12) < 5).expand(2, 12))
