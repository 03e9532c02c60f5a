"""The kernels equal the reference: on a GPU, and small shapes in Triton's interpreter."""

import os

import pytest
import torch

from polyrank.errors import ConfigError
from polyrank.ops.rank_gate import (
    Epilogue,
    NonFiniteError,
    Projection,
    linears,
    naive,
    rank_gate,
)
from polyrank.testing.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is imported, which other packages do.
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
triton = pytest.importorskip("triton")

# The interpreter multiplies bits where it should multiply bf16 numbers.
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")
SMALL = {
    "t9-d13-o11": {"lead": (9,), "d_in": 13, "d_out": 11},
    "b2-t17-d40-o70": {"lead": (2, 17), "d_in": 40, "d_out": 70},
}
LARGE = {
    "t1-d64-o64": {"lead": (1,), "d_in": 64, "d_out": 64},
    "t5-d257-o129": {"lead": (5,), "d_in": 257, "d_out": 129},
    "b3-t333-d1000-o515": {"lead": (3, 333), "d_in": 1000, "d_out": 515},
    "t2048-d512-o1024": {"lead": (2048,), "d_in": 512, "d_out": 1024},
}
LOOSE = {
    "tol": 1.6e-2,
    "reason": "16 bits: the roundings of several factors add up where thousands of tokens do",
}


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("POLYRANK_OPS", "triton")


def same(case, loose=None, **options):
    tolerance = loose or {"dtype": case.x.dtype}
    out, counts, grads = case.run(naive.rank_gate, count=True, **options)
    out_t, counts_t, grads_t = case.run(rank_gate, count=True, **options)
    assert out_t.dtype == out.dtype
    assert_close(out_t, out, **tolerance)
    assert (counts is None) == (counts_t is None)
    assert counts is None or torch.equal(counts_t, counts)
    for name, grad in grads.items():
        assert grads_t[name].dtype == grad.dtype, name
        assert_close(grads_t[name], grad, **tolerance)


def scales(case):
    return torch.linspace(0.2, 3, case.B.shape[0]).to(case.B)


@pytest.mark.parametrize("shape", SMALL)
def test_values_and_gradients(make, name, shape):
    same(make(name, dtype=torch.float32, device=DEVICE, **SMALL[shape]))


def test_a_second_derivative_is_refused(make):
    case = make("sigmoid", dtype=torch.float32, device=DEVICE, **SMALL["b2-t17-d40-o70"])
    out, _ = case.call(rank_gate)
    (grad,) = torch.autograd.grad(out.square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["none", "sigmoid-b", "softmax", "self"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_sixteen_bits(make, kind, dtype):
    same(make(kind, dtype=dtype, device=DEVICE, **SMALL["b2-t17-d40-o70"]))


@pytest.mark.parametrize("kind", ["none", "static", "sigmoid-m3-bw", "softmax-b", "self-cut"])
def test_options_together(make, kind):
    case = make(kind, dtype=torch.float32, device=DEVICE, lead=(2, 9), d_in=40, d_out=23)
    real = (torch.arange(18).view(2, 9) % 3 > 0).to(DEVICE)
    same(case, live_from=5, row_scale=scales(case), dropout=0.2, seed=2**63 + 5, mask=real)
    same(case, live_from=12, dropout=0.3, seed=-4)


@pytest.mark.parametrize("kind", ["none", "sigmoid", "self"])
def test_silent_ranks(make, kind):
    case = make(kind, dtype=torch.float32, device=DEVICE)
    same(case.with_(B=case.B.detach()[:, 4:].clone().requires_grad_()), live_from=6)


@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_slices_of_larger_factors(make, kind):
    case = make(kind, dtype=torch.float32, device=DEVICE, k=3)
    A, B = (t.detach().clone().requires_grad_() for t in (case.A, case.B))
    rows = None if case.rows is None else case.rows.detach()[:7].requires_grad_()
    same(case.with_(A=A[:7], B=B[:, :7], rows=rows), live_from=4)


def test_strided_inputs(make):
    case = make("sigmoid", dtype=torch.float32, device=DEVICE, lead=(6, 4))
    turned = case.with_(**{n: getattr(case, n).transpose(0, 1) for n in ("x", "y")})
    same(turned)
    same(case.with_(x=case.x.detach().t().contiguous().t() if case.x.dim() == 2 else case.x))


@pytest.mark.parametrize("kind", ["none", "sigmoid", "self"])
def test_no_tokens(make, kind):
    same(make(kind, dtype=torch.float32, device=DEVICE, lead=(2, 0)))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_ties_go_to_the_lower_rank(make, score):
    case = make("sigmoid", score=score, k=5, dtype=torch.float32, device=DEVICE)
    case = case.with_(rows=torch.zeros_like(case.rows))
    _, counts = case.call(rank_gate, count=True)
    assert counts.tolist() == [9] * 5 + [0] * 7


def step(case):
    out, _ = case.call(rank_gate)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    out.sum().backward()


def test_logits_that_are_not_finite(make):
    case = make("sigmoid", dtype=torch.float32, device=DEVICE, lead=(5,))
    x = case.x.detach().clone()
    x[2, 0] = float("nan")
    bad = case.with_(x=x.requires_grad_())
    with pytest.raises(NonFiniteError, match="some tokens"):
        step(bad)
    case.run(rank_gate)


def test_inference_keeps_nothing_and_gives_the_same(make, name):
    case = make(name, dtype=torch.float32, device=DEVICE, lead=(3,))
    with torch.no_grad():
        out, _ = case.call(rank_gate)
    assert_close(out, case.call(naive.rank_gate)[0])


@pytest.mark.parametrize("lead", [(12,), (3, 4)], ids=str)
def test_inplace_writes_into_y(make, lead):
    case = make("sigmoid", dtype=torch.float32, device=DEVICE, lead=lead)
    base = torch.nn.Linear(13, 11, device=DEVICE).requires_grad_(False)
    results = []
    for inplace in (False, True):
        y = base(case.x)
        place = y.data_ptr()
        out, _ = case.with_(y=y).call(rank_gate, inplace=inplace)
        assert (out.data_ptr() == place) == inplace
        leaves = [t for n, t in case.tensors().items() if n != "y"]
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "float64: kernels compute in"),
        ({"r": 300, "d_in": 4}, "one tile holds up to 256 ranks"),
    ],
)
def test_what_kernels_cannot_serve_is_refused(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make("none", **{"dtype": torch.float32, "device": DEVICE, **changes}).call(rank_gate)
    case = make("none", dtype=torch.float32, device=DEVICE)
    pair = (case.A.detach()[:2], case.B.detach()[:, :2], None)
    with pytest.raises(ConfigError, match="shadow: kernels subtract no second pair"):
        case.call(rank_gate, shadow=pair)


# --- projections that share x -----------------------------------------------------------------


def projections(make, kinds, dtype, biased, **sizes):
    """Frozen linear layers over one x, each with its own epilogue and ranks."""
    found, cases = [], []
    for i, kind in enumerate(kinds):
        case = make(kind, seed=i, dtype=dtype, device=DEVICE, d_out=11 + 6 * i, **sizes)
        cases.append(case)
        rng = torch.Generator().manual_seed(i)
        W = torch.randn(case.y.shape[-1], case.x.shape[-1], generator=rng)
        b = torch.randn(case.y.shape[-1], generator=rng) if biased else None
        W, b = (t if t is None else t.bfloat16().to(DEVICE, dtype) for t in (W, b))
        found.append(
            Projection(W, b, case.A, case.rows, case.B, case.epilogue, case.scale, counts=True)
        )
    return found, cases


@pytest.mark.parametrize("kinds", [("sigmoid",), ("none", "sigmoid-m3", "self")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_layers_that_share_x(make, kinds, dtype, biased):
    layers, cases = projections(make, kinds, dtype, biased, lead=(2, 9), d_in=40)
    x = cases[0].x
    leaves = [t for c in cases for n, t in c.tensors().items() if n not in ("x", "y")]
    outs, counts = linears(x, layers)
    wide = x.detach().float().requires_grad_()
    expected = []
    for layer, case, count in zip(layers, cases, counts, strict=True):
        y = torch.nn.functional.linear(
            wide, layer.W.float(), None if layer.b is None else layer.b.float()
        )
        one, wanted = case.with_(x=wide, y=y).call(naive.rank_gate, count=True)
        assert (wanted is None) == (count is None)
        assert count is None or torch.equal(count, wanted)
        expected.append(one)
    for out, one in zip(outs, expected, strict=True):
        assert_close(out, one, dtype=dtype)
    weights = [torch.linspace(-1, 1.5, o.numel(), device=DEVICE).view(o.shape) for o in outs]
    got = torch.autograd.grad(outs, [x, *leaves], [w.to(dtype) for w in weights])
    want = torch.autograd.grad(expected, [wide, *leaves], weights)
    for one, other in zip(got, want, strict=True):
        assert_close(one.float(), other.float(), dtype=dtype)


def test_one_of_two_layers_used(make):
    layers, cases = projections(make, ("none", "sigmoid"), torch.float32, False, lead=(5,))
    x = cases[0].x
    (first, _), _ = linears(x, layers)
    (alone,), _ = linears(x, layers[:1])
    leaves = [x, cases[0].A, cases[0].B]
    for one, other in zip(
        *(torch.autograd.grad(o.square().sum(), leaves) for o in (first, alone)), strict=True
    ):
        assert_close(one, other)


def test_the_operators_are_what_a_compiler_believes(make):
    from polyrank.ops.rank_gate import triton as kernels

    case = make("sigmoid-b", dtype=torch.float32, device=DEVICE, **SMALL["t9-d13-o11"])
    given = [None, None, case.A, case.rows, case.B, None, case.epilogue.bias, None]
    given = [t if t is None else t.detach() for t in given]
    given[0] = case.y.detach()
    member = kernels._member(case.epilogue, case.A.shape[0], case.scale, 0, True)
    with torch.enable_grad():
        call = kernels._call_of([member], case.x, given, 0.0, owned=False)
    inputs = (case.x.detach(), given, None, None, 0, call.numbers())
    torch.library.opcheck(torch.ops.polyrank.rank_gate.default, inputs)


# --- a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_shapes(make, name, shape, dtype):
    same(
        make(name, dtype=dtype, device="cuda", **LARGE[shape]),
        LOOSE if dtype.itemsize < 4 else None,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("r", [1, 5, 33, 64, 100, 256])
@pytest.mark.parametrize("kind", ["none", "sigmoid-b", "softmax", "self"])
def test_ranks(make, kind, r):
    if r == 1 and kind in ("sigmoid-b", "softmax"):
        pytest.skip("one active rank teaches a router nothing: its gradient is rounding")
    case = make(kind, r=r, k=max(2, r // 3), dtype=torch.bfloat16, device="cuda", lead=(700,),
                d_in=256, d_out=384)  # fmt: skip
    same(case, LOOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "sigmoid"])
def test_a_cuda_graph_replays_forward_and_backward(make, kind):
    case = make(kind, dtype=torch.bfloat16, device="cuda", lead=(512,), d_in=256, d_out=256)
    leaves = list(case.tensors().values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(case.call(rank_gate)[0].sum(), leaves)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out, _ = case.call(rank_gate)
            grads = torch.autograd.grad(out.sum(), leaves)
    with torch.no_grad():
        case.x.copy_(torch.randn_like(case.x))
    with torch.cuda.stream(stream):
        graph.replay()
        expected, _ = case.call(rank_gate)
        wanted = torch.autograd.grad(expected.sum(), leaves)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    for one, other in zip(grads, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_the_same_bits_every_time(make):
    case = make("sigmoid", dtype=torch.bfloat16, device="cuda", lead=(4096,), d_in=512, d_out=512)
    first = case.run(rank_gate, count=True)
    for _ in range(5):
        again = case.run(rank_gate, count=True)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[2][n], again[2][n]) for n in first[2])


# torch 2.13 instantiates any autograd.Function to trace it, and warns of it itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["none", "static", "sigmoid-b", "self"])
def test_one_graph_under_compile(make, kind):
    torch._dynamo.reset()
    case = make(kind, dtype=torch.float32, device=DEVICE, lead=(2, 5))
    tensors = case.tensors()
    fields = {n: v for n, v in vars(case.epilogue).items() if n != "gate"}

    def function(seed, y, x, A, B, rows=None, gate=None):
        return rank_gate(
            y, x, A, rows, B, Epilogue(**fields, gate=gate), 1.7, 2, dropout=0.2, seed=seed,
            mask=x[..., 0] > 0, count=True,
        )  # fmt: skip

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for seed in (torch.tensor(5, device=DEVICE), torch.tensor(-77, device=DEVICE)):
        with torch._dynamo.config.patch(error_on_recompile=True):
            out, counts = compiled(seed, **tensors)
        expected, expected_counts = function(int(seed), **tensors)
        assert_close(out, expected)
        assert counts is None or torch.equal(counts, expected_counts)
        grads, wanted = (
            torch.autograd.grad(o.square().sum(), list(tensors.values())) for o in (out, expected)
        )
        for grad, want in zip(grads, wanted, strict=True):
            assert_close(grad, want)
