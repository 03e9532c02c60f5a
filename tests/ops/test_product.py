"""A base product and the update as one sum, on a Hopper GPU; anywhere with Triton it compiles."""

import os
import re
from itertools import product as every

import pytest
import torch

from polyrank.ops.rank_gate import Projection, linears, naive
from polyrank.testing.tolerance import assert_close

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
WAYS = ("x", "W", "rows of x", "rows of W", "dy", "expanded dy", "members")
LOOSE = {
    "tol": 1.6e-2,
    "reason": "16 bits: the roundings of several factors add up where thousands of tokens do",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs none")
@pytest.mark.parametrize(("pairs", "turned"), [(2, True), (4, False)])
def test_it_compiles_for_hopper_without_a_gpu(monkeypatch, pairs, turned):
    # Triton 3.9 asks that one be chosen.
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from polyrank.ops.rank_gate.kernels_product import product

    constants = {"PAIRS": pairs, "BIAS": turned, "TURNED": turned, "BM": 128, "BN": 256,
                 "BK": 64, "STAGES": 3, "GROUP": 8, "WARPS": 8}  # fmt: skip
    signature, known, aligned = {}, {}, {}
    for i, name in enumerate(product.arg_names):
        if name in constants:
            signature[name], known[i,] = "constexpr", constants[name]
            continue
        pointer = name in ("out", "bias") or re.fullmatch("[aw][0-3]", name)
        signature[name] = "*bf16" if pointer else "i32"
        if name != "steps":
            aligned[i,] = [["tt.divisibility", 16]]
    made = triton.compile(
        GluonASTSource(product, signature, known, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 8, "maxnreg": 168},
    )
    # What a processor of an H100 has for one program.
    assert made.metadata.shared <= 232448 - 1024
    assert made.asm["ptx"].count("wgmma.mma_async") >= 4


def on_hopper(test):
    """Marks a test that needs such a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")(test))


def draw(*shape, dtype=torch.bfloat16):
    rng = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=rng, device="cuda") * shape[-1] ** -0.5).to(dtype)


@pytest.mark.parametrize(
    "size",
    [
        (1, 8, (8,)), (128, 256, (64,)), (1000, 1000, (264, 64)), (2047, 520, (512, 72, 8)),
        (5000, 4096, (1024, 512, 512, 384)), (333, 24, (1000, 16)),
    ],
    ids=str,
)  # fmt: skip
@on_hopper
def test_a_sum_of_products_writes_every_element(size):
    from polyrank.ops.rank_gate.product import Product

    T, N, depths = size
    for turned, biased, dtype in every((True, False), (True, False), (torch.bfloat16, torch.half)):
        pairs = [
            (draw(T, K, dtype=dtype), draw(*((N, K) if turned else (K, N)), dtype=dtype))
            for K in depths
        ]
        bias = draw(N, dtype=torch.float32) if biased else None
        # Rows of a are apart further than they are long.
        pairs[0] = (torch.cat([pairs[0][0], pairs[0][0]], 1)[:, : depths[0]], pairs[0][1])
        out = torch.full((T, N), float("nan"), device="cuda", dtype=dtype)
        strides = (N, [a.stride(0) for a, _ in pairs], [w.stride(0) for _, w in pairs])
        run = Product((T, N), depths, strides, turned=turned, bias=biased, device=out.device).run
        expected = sum(a.double() @ (w.double().T if turned else w.double()) for a, w in pairs)
        expected = expected if bias is None else expected + bias
        for _ in range(2):
            # Compiled at the first time, started directly at the next.
            out.fill_(float("nan"))
            run(out, pairs, bias)
            assert_close(out, expected, dtype=dtype)


def projections(make, kinds, biased, T, *, dtype=torch.bfloat16, scale=1.7, **options):
    """Frozen layers over one x (T, 256) with adapters of 16 ranks."""
    found, cases = [], []
    for i, kind in enumerate(kinds):
        sizes = {"lead": (T,), "d_in": 256, "d_out": 512 - 128 * i, "r": 16}
        case = make(kind, seed=i, dtype=dtype, device="cuda", k=8, block=1, **sizes)
        n = case.y.shape[-1]
        # As large as what the update adds: without it nothing would be right.
        b = 20 * draw(n, dtype=biased) * n**0.5 if biased else None
        case = case.with_(scale=scale)
        cases.append(case)
        W = draw(n, 256, dtype=dtype)
        parts = (case.A, case.rows, case.B, case.epilogue, scale)
        found.append(Projection(W, b, *parts, counts=True, **options))
    return found, cases


@pytest.fixture
def folded(monkeypatch):
    """How often the kernel ran, on sizes that the reference can follow."""
    from polyrank.ops.rank_gate import plan
    from polyrank.ops.rank_gate.product import Product

    calls, run = [], Product.run

    def counting(self, *inputs):
        calls.append(self.grid)
        run(self, *inputs)

    monkeypatch.setattr(Product, "run", counting)
    monkeypatch.setattr(plan, "pays", lambda *sizes: True)
    monkeypatch.setattr(plan, "_PLANS", {})
    monkeypatch.setenv("POLYRANK_OPS", "triton")
    return calls


def check(x, layers, cases, dys=None, **options):
    outs, counts = linears(x, layers)
    leaves = [t for c in cases for n, t in c.tensors().items() if n not in ("x", "y")]
    wide = x.detach().float().requires_grad_()
    expected = []
    for layer, case, count in zip(layers, cases, counts, strict=True):
        b = None if layer.b is None else layer.b.float()
        y = torch.nn.functional.linear(wide, layer.W.float(), b)
        one, wanted = case.with_(x=wide, y=y).call(naive.rank_gate, count=True, **options)
        assert count is None or torch.equal(count, wanted)
        expected.append(one)
    for out, one in zip(outs, expected, strict=True):
        assert_close(out, one, **LOOSE)
    if dys is None:
        dys = [draw(*o.shape, dtype=o.dtype) for o in outs]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    found = []
    for results, first in ((outs, x), (expected, wide)):
        given = [dys[i].to(results[i]) for i in used]
        chosen = [results[i] for i in used]
        found.append(torch.autograd.grad(chosen, [first, *leaves], given, allow_unused=True))
    for one, other in zip(*found, strict=True):
        other = torch.zeros_like(one) if other is None else other
        assert_close(one.float(), other.float(), **LOOSE)


KINDS = [("none",), ("sigmoid-b",), ("static", "softmax"), ("none", "sigmoid", "self")]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("biased", [torch.bfloat16, torch.float32, None], ids=str)
@on_hopper
def test_layers_that_share_x(make, folded, kinds, biased):
    layers, cases = projections(make, kinds, biased, 700)
    check(cases[0].x, layers, cases)
    assert len(folded) == len(kinds) + 1


@on_hopper
def test_biases_of_two_dtypes_have_launches_of_their_own(make, folded):
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        layers, cases = projections(make, ("none",), dtype, 700)
        check(cases[0].x, layers, cases)


@pytest.mark.parametrize("how", WAYS)
@on_hopper
def test_what_its_copies_cannot_read_is_served_otherwise(make, folded, how):
    kinds = ("none",) * 4 if how == "members" else ("none",)
    layers, cases = projections(make, kinds, None, 700)
    x, dys, ran = cases[0].x, None, 2
    if how == "x":
        x, ran = draw(700 * 256 + 1)[1:].view(700, 256).requires_grad_(), 0
    elif how == "W":
        odd = draw(512 * 256 + 1)[1:].view(512, 256)
        layers, ran = [layers[0]._replace(W=odd)], 0
    elif how == "rows of x":
        x = draw(700, 264)[:, :256].requires_grad_()
    elif how == "rows of W":
        layers = [layers[0]._replace(W=draw(512, 264)[:, :256])]
    elif how == "dy":
        dys = [draw(700 * 512 + 1)[1:].view(700, 512)]
    elif how == "expanded dy":
        dys = [draw(1, 512).expand(700, 512)]
    elif how == "members":
        # Forward has two pairs for each; backward would have five.
        ran = 4
    check(x, layers, [c.with_(x=x) for c in cases], dys)
    assert len(folded) == ran


@on_hopper
def test_an_output_that_nobody_used(make, folded):
    layers, cases = projections(make, ("none", "sigmoid"), None, 700)
    check(cases[0].x, layers, cases, [None, draw(700, 384)])
    check(cases[0].x, layers, cases, [draw(700, 512), None])
    assert len(folded) == 6


@on_hopper
def test_frozen_ranks_and_scaled_gradients(make, folded):
    factors = torch.linspace(0.2, 3, 512, device="cuda")
    layers, cases = projections(make, ("sigmoid",), None, 700, live_from=5, row_scale=factors)
    check(cases[0].x, layers, cases, live_from=5, row_scale=factors)
    assert len(folded) == 2


@on_hopper
def test_small_scales_in_fp16(make, folded):
    layers, cases = projections(make, ("none",), None, 700, dtype=torch.half, scale=1 / 64)
    with torch.no_grad():
        cases[0].B.mul_(1e-4)
    # A scaled loss: gradients of A are in the range of fp16, if B was when it was rounded.
    check(cases[0].x, layers, cases, [4096 * draw(700, 512, dtype=torch.half)])
    layers, cases = projections(make, ("none",), None, 700, dtype=torch.half, scale=2.0)
    check(cases[0].x, layers, cases)
    assert len(folded) == 2


@on_hopper
def test_dropout_folds_forward_alone(make, folded):
    layers, cases = projections(make, ("none",), None, 700)
    (out,), _ = linears(cases[0].x, layers, 0.3, 7)
    out.backward(torch.ones_like(out))
    assert len(folded) == 1
    y = torch.nn.functional.linear(cases[0].x, layers[0].W)
    wanted = naive.rank_gate(
        *(t.float() for t in (y, cases[0].x, cases[0].A)), None, cases[0].B, cases[0].epilogue, 1.7,
        dropout=0.3, seed=7,
    )[0]  # fmt: skip
    assert_close(out, wanted, **LOOSE)


@on_hopper
def test_more_dimensions_and_no_gradients(make, folded):
    layers, cases = projections(make, ("sigmoid",), None, 2000)
    x = cases[0].x.view(4, 500, 256)
    with torch.no_grad():
        (out,), _ = linears(x, layers)
    (again,), _ = linears(cases[0].x, layers)
    assert torch.equal(out.view(2000, 512), again)


@on_hopper
def test_a_launcher_of_an_unknown_version(make, folded, monkeypatch):
    from polyrank.ops.rank_gate import product

    def allocate(size, alignment, stream):
        raise AssertionError("an allocator of somebody else was asked")

    monkeypatch.setattr(product, "DIRECT", False)
    triton.set_allocator(allocate)
    layers, cases = projections(make, ("none",), None, 700)
    for _ in range(2):
        check(cases[0].x, layers, cases)
    assert len(folded) == 4


@on_hopper
def test_the_same_bits_every_time_and_in_graphs_side_by_side(make, folded):
    streams, graphs, wanted, found = [torch.cuda.Stream() for _ in range(2)], [], [], []
    for seed in range(2):
        layers, cases = projections(make, ("none", "sigmoid"), None, 4096 - 64 * seed)
        leaves = [cases[0].x, cases[1].A, cases[1].rows]

        def run(x=cases[0].x, layers=layers, leaves=leaves):
            outs, _ = linears(x, layers)
            return (*outs, *torch.autograd.grad([o.square().sum() for o in outs], leaves))

        with torch.cuda.stream(streams[0]):
            wanted.append(run())
            for _ in range(3):
                assert all(map(torch.equal, wanted[-1], run()))
            streams[0].synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=streams[0]):
                found.append(run())
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(wanted, found, strict=True):
        assert all(map(torch.equal, one, other))
