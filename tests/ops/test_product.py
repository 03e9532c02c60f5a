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
hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU"),
]
LOOSE = {
    "tol": 1.6e-2,
    "reason": "16 bits: the roundings of several factors add up where thousands of tokens do",
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs none")
@pytest.mark.parametrize(
    ("pairs", "turned", "width"), [(2, True, 256), (4, False, 256), (2, False, 128)]
)
def test_it_compiles_for_hopper_without_a_gpu(pairs, turned, width):
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from polyrank.ops.rank_gate.kernels_product import product

    constants = {"PAIRS": pairs, "BIAS": turned, "TURNED": turned, "BM": 128, "BN": width,
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


def draw(*shape, dtype=torch.bfloat16):
    rng = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(*shape, generator=rng, device="cuda") * shape[-1] ** -0.5).to(dtype)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(size, marks=hopper, id="-".join(map(str, (size[0], size[1], *size[2]))))
        for size in [
            (1, 8, (8,)), (128, 256, (64,)), (1000, 1000, (264, 64)), (2047, 520, (512, 72, 8)),
            (5000, 4096, (1024, 512, 512, 384)), (333, 24, (1000, 16)),
        ]
    ],
)  # fmt: skip
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


def projections(make, kinds, biased, T, r=16, d_in=256):
    found, cases = [], []
    for i, kind in enumerate(kinds):
        sizes = {"lead": (T,), "d_in": d_in, "d_out": 512 - 128 * i, "r": r}
        case = make(kind, seed=i, dtype=torch.bfloat16, device="cuda", k=8, block=1, **sizes)
        W, b = draw(case.y.shape[-1], d_in), draw(case.y.shape[-1]) if biased else None
        cases.append(case)
        found.append(
            Projection(W, b, case.A, case.rows, case.B, case.epilogue, case.scale, counts=True)
        )
    return found, cases


@pytest.fixture
def counted(monkeypatch):
    """How often the kernel ran."""
    from polyrank.ops.rank_gate import product as module
    from polyrank.ops.rank_gate.product import Product

    calls, run = [], Product.run

    def counting(self, *inputs):
        calls.append(self.grid)
        run(self, *inputs)

    monkeypatch.setattr(Product, "run", counting)
    # Small sizes, that the reference may follow.
    monkeypatch.setattr(module, "LEAST_NUMBERS", 0)
    monkeypatch.setenv("POLYRANK_OPS", "triton")
    return calls


def check(x, layers, cases, dys=None, loose=LOOSE):
    outs, counts = linears(x, layers)
    leaves = [t for c in cases for n, t in c.tensors().items() if n not in ("x", "y")]
    wide = x.detach().float().requires_grad_()
    expected = []
    for layer, case, count in zip(layers, cases, counts, strict=True):
        b = None if layer.b is None else layer.b.float()
        y = torch.nn.functional.linear(wide, layer.W.float(), b)
        one, wanted = case.with_(x=wide, y=y).call(naive.rank_gate, count=True)
        assert count is None or torch.equal(count, wanted)
        expected.append(one)
    for out, one in zip(outs, expected, strict=True):
        assert_close(out, one, **loose)
    if dys is None:
        dys = [draw(*o.shape) for o in outs]
    got = torch.autograd.grad(outs, [x, *leaves], dys)
    want = torch.autograd.grad(expected, [wide, *leaves], [dy.float() for dy in dys])
    for one, other in zip(got, want, strict=True):
        assert_close(one.float(), other.float(), **loose)


KINDS = [("none",), ("sigmoid-b",), ("static", "softmax"), ("none", "sigmoid", "self")]


@pytest.mark.parametrize("kinds", [pytest.param(k, marks=hopper, id="-".join(k)) for k in KINDS])
@pytest.mark.parametrize("biased", [True, False])
def test_layers_that_share_x(make, counted, kinds, biased):
    layers, cases = projections(make, kinds, biased, 2100)
    check(cases[0].x, layers, cases)
    assert len(counted) == len(kinds) + 1


@pytest.mark.parametrize("how", [pytest.param(h, marks=hopper, id=h) for h in ("x", "dy", "many")])
def test_what_its_copies_cannot_read_is_served_otherwise(make, counted, how):
    kinds = ("none",) * 4 if how == "many" else ("none",)
    layers, cases = projections(make, kinds, False, 2100)
    x, dys = cases[0].x, None
    if how == "x":
        odd = draw(2100 * 256 + 1)[1:].view(2100, 256).requires_grad_()
        check(odd, layers, [cases[0].with_(x=odd)])
        assert not counted
        return
    if how == "dy":
        dys = [draw(2100 * 512 + 1)[1:].view(2100, 512)]
    check(x, layers, cases, dys)
    assert len(counted) == (0 if how == "many" else 2)


@pytest.mark.parametrize("steps", [pytest.param(3, marks=hopper)])
def test_the_same_bits_every_time_and_in_a_graph(make, counted, steps):
    layers, cases = projections(make, ("none", "sigmoid"), False, 4096)
    leaves = [cases[0].x, cases[1].A, cases[1].rows]

    def run():
        outs, _ = linears(cases[0].x, layers)
        return (*outs, *torch.autograd.grad([o.square().sum() for o in outs], leaves))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        first = run()
        for _ in range(steps):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = run()
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
