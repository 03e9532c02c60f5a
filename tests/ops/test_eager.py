"""The eager path equals the reference: values, counts and all gradients."""

import pytest
import torch

from polyrank.ops.rank_gate import eager, naive
from polyrank.testing.tolerance import assert_close

SHAPES = {
    "t9-d13-o11": {"lead": (9,), "d_in": 13, "d_out": 11},
    "b2-t5-d16-o24": {"lead": (2, 5), "d_in": 16, "d_out": 24},
    "b3-s1-t7-d40-o5": {"lead": (3, 1, 7), "d_in": 40, "d_out": 5},
    "t0": {"lead": (2, 0), "d_in": 8, "d_out": 6},
}
# A sum of one or three terms may cancel, so that its rounding in 16 bits has no bound.
SMALL = {
    "token": {"lead": (), "d_in": 7, "d_out": 3},
    "t1-d1-o1": {"lead": (1,), "d_in": 1, "d_out": 1},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LOOSE = {
    "tol": 1.6e-2,
    "reason": "bf16: the roundings of two updates that are subtracted, or of four factors, add up",
}


def shadow(case, delta=None):
    rng = torch.Generator().manual_seed(7)
    A0 = torch.randn(3, case.A.shape[1], generator=rng)
    B0 = torch.randn(case.B.shape[0], 3, generator=rng)
    return tuple(t if t is None else t.to(case.A) for t in (A0, B0, delta))


def scales(case):
    return torch.linspace(0.2, 3, case.B.shape[0]).to(case.B)


def real(case, every):
    lead = case.x.shape[:-1]
    return torch.arange(lead.numel(), device=case.x.device).view(lead) % every > 0


OPTIONS = {
    "bank": lambda case: {"live_from": 5},
    "bank-all": lambda case: {"live_from": 12},
    "shadow": lambda case: {"shadow": shadow(case)},
    "shadow-0d": lambda case: {"shadow": shadow(case, torch.tensor(0.7))},
    "shadow-1d": lambda case: {"shadow": shadow(case, torch.tensor([0.5, -1.0, 2.0]))},
    "shadow-2d": lambda case: {"shadow": shadow(case, torch.arange(9.0).view(3, 3))},
    "row_scale": lambda case: {"row_scale": scales(case)},
    "dropout": lambda case: {"dropout": 0.3, "seed": 2**63 + 5},
    "mask": lambda case: {"mask": real(case, 3)},
    "everything": lambda case: {
        "live_from": 3,
        "shadow": shadow(case, torch.ones(3, 3).tril()),
        "row_scale": scales(case),
        "dropout": 0.2,
        "seed": -4,
        "mask": real(case, 2),
    },
}


def same(case, loose=None, **options):
    """Compare output, counts and gradients of both paths, in the tolerance of the dtype of x."""
    tolerance = loose or {"dtype": case.x.dtype}
    out, counts, grads = case.run(naive.rank_gate, count=True, **options)
    out_e, counts_e, grads_e = case.run(eager.rank_gate, count=True, **options)
    assert out_e.dtype == out.dtype
    assert_close(out_e, out, **tolerance)
    assert (counts is None) == (counts_e is None)
    assert counts is None or torch.equal(counts_e, counts)
    for name, grad in grads.items():
        assert grads_e[name].dtype == grad.dtype, name
        assert_close(grads_e[name], grad, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(make, name, shape, dtype):
    same(make(name, dtype=dtype, **SHAPES[shape]))


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_shapes(make, name, shape, dtype):
    same(make(name, dtype=dtype, **SMALL[shape]))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_options(make, name, option, dtype):
    case = make(name, lead=(2, 11), d_in=10, d_out=14, dtype=dtype)
    summed = option.startswith(("shadow", "dropout", "everything")) and dtype == torch.bfloat16
    same(case, LOOSE if summed else None, **OPTIONS[option](case))


def without_values(case, silent):
    """The case with B short of its first columns, and with zeros in their place."""
    short = case.B.detach()[:, silent:].clone().requires_grad_()
    padded = torch.nn.functional.pad(short.detach(), (silent, 0)).requires_grad_()
    return case.with_(B=short), case.with_(B=padded)


@pytest.mark.parametrize("live_from", [4, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_silent_ranks_have_a_key_and_no_value(make, name, live_from, dtype):
    options = {"live_from": live_from, "row_scale": None}
    case = make(name, lead=(2, 11), d_in=10, d_out=14, dtype=dtype)
    silent, padded = without_values(case, 4)
    same(silent, **options)
    options |= {"row_scale": scales(case), "shadow": shadow(case), "dropout": 0.2, "seed": 3}
    for path in (naive, eager):
        out, _, grads = silent.run(path.rank_gate, **options)
        expected, _, expected_grads = padded.run(path.rank_gate, **options)
        expected_grads["B"] = expected_grads["B"][:, 4:]
        assert_close(out, expected)
        for key, grad in grads.items():
            assert_close(grad, expected_grads[key])


@pytest.mark.parametrize("wanted", ["y", "x", "A", "rows", "B", "gate"])
def test_one_gradient_alone(make, wanted):
    case = make("static" if wanted == "gate" else "sigmoid", lead=(2, 4))
    every = case.run(eager.rank_gate)[2]
    for other, tensor in case.tensors().items():
        tensor.requires_grad_(other == wanted)
    grads = case.run(eager.rank_gate)[2]
    assert grads.keys() == {wanted}
    assert_close(grads[wanted], every[wanted])


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float64], ids=str)
def test_weights_are_cast_and_x_is_not(make, name, weights):
    case = make(name, dtype=torch.float32, lead=(2, 5))
    masters = {n: t.detach().to(weights).requires_grad_() for n, t in case.tensors().items()}
    epilogue = case.epilogue
    if "gate" in masters:
        epilogue = make(name, gate=masters["gate"]).epilogue
    kept = {n: masters.get(n) for n in ("A", "rows", "B")}
    mixed = case.with_(epilogue=epilogue, **kept)
    out, _, grads = mixed.run(eager.rank_gate)
    expected, _, expected_grads = case.run(eager.rank_gate)
    assert out.dtype == torch.float32
    # The values are bf16 numbers, so no cast loses anything.
    assert_close(out, expected)
    for key, grad in grads.items():
        assert grad.dtype == (torch.float32 if key in "yx" else weights)
        assert_close(grad, expected_grads[key])


def test_output_takes_the_dtype_of_y(make, name):
    case = make(name, dtype=torch.bfloat16, lead=(7,))
    y = case.y.detach().float().requires_grad_()
    # What arrives from y is rounded once more.
    same(case.with_(y=y), LOOSE)


def test_strided_inputs(make, name):
    case = make(name, lead=(6, 4))
    turned = case.with_(**{n: getattr(case, n).transpose(0, 1) for n in ("x", "y")})
    out, _ = turned.call(eager.rank_gate)
    expected, _ = case.call(eager.rank_gate)
    assert_close(out, expected.transpose(0, 1))
    assert_close(*(torch.autograd.grad(o.square().sum(), case.x)[0] for o in (out, expected)))


def test_gradients_by_finite_differences(make, name):
    for path in (naive, eager):
        case = make(name, lead=(3,), d_in=4, d_out=3, seed=3)
        tensors = case.tensors()

        def function(*values, case=case, names=tuple(tensors), path=path):
            given = dict(zip(names, values, strict=True))
            gate = given.pop("gate", None)
            if gate is not None:
                given["epilogue"] = make(name, gate=gate).epilogue
            extra = {"shadow": shadow(case), "dropout": 0.25, "seed": 1}
            return case.with_(**given).call(path.rank_gate, **extra)[0]

        assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_row_scale_fails_finite_differences_on_purpose(make):
    case = make("none", lead=(3,), d_in=4, d_out=3)

    def function(B):
        return case.with_(B=B).call(eager.rank_gate, row_scale=scales(case))[0]

    assert not torch.autograd.gradcheck(function, (case.B,), raise_exception=False)


def test_second_derivatives_are_refused(make, name):
    case = make(name)
    out, _ = case.call(eager.rank_gate)
    (grad,) = torch.autograd.grad(out.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["none", "static", "sigmoid-b", "softmax"])
def test_backward_holds_no_more_than_x_h_and_the_router(make, kind):
    tokens, r = 64, 12
    case = make(kind, lead=(tokens,), d_in=32, d_out=40, dtype=torch.float32)
    given = {t.untyped_storage().data_ptr() for t in case.tensors().values()}
    held = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in given:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        case.call(eager.rank_gate, count=True)
    columns = r + (r + 1 if case.rows is not None else 0)
    assert sum(held.values()) <= 4 * tokens * columns
