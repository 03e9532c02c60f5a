"""Few tokens without gradients: groups of projections by two launches equal the reference."""

import os

import pytest
import torch

from polyrank.ops.rank_gate import Memo, Projection, linears, naive
from polyrank.testing.tolerance import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is imported, which other packages do.
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from polyrank.ops.rank_gate import few, launch  # noqa: E402

# The interpreter multiplies bits where it should multiply bf16 numbers.
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu, id="bf16")


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setenv("POLYRANK_OPS", "triton")


@pytest.fixture
def groups(monkeypatch):
    """Sizes of the groups that were started together."""
    found, call = [], few.Pair.__call__

    def counted(self, x, given, outs):
        found.append(len(given))
        return call(self, x, given, outs)

    monkeypatch.setattr(few.Pair, "__call__", counted)
    return found


def projections(make, kinds, dtype, sizes, biased, **changes):
    rng = torch.Generator().manual_seed(3)
    cases, layers = [], []
    for i, (kind, d_out) in enumerate(zip(kinds, sizes, strict=True)):
        case = make(kind, dtype=dtype, device=DEVICE, seed=i, d_out=d_out, **changes)
        case = case.with_(scale=1.7 - i, **({"x": cases[0].x} if cases else {}))
        W = torch.randn(d_out, case.x.shape[-1], generator=rng).bfloat16().to(DEVICE, dtype)
        b = torch.randn(d_out, generator=rng).bfloat16().to(DEVICE, dtype) if biased else None
        cases.append(case)
        layers.append(
            Projection(W, b, case.A, case.rows, case.B, case.epilogue, case.scale, counts=False)
        )
    return layers, cases


def same(layers, cases, dtype):
    x = cases[0].x
    with torch.no_grad():
        outs, counts = linears(x, layers)
        assert counts == [None] * len(layers)
        for layer, case, out in zip(layers, cases, outs, strict=True):
            b = None if layer.b is None else layer.b.float()
            y = torch.nn.functional.linear(x.float(), layer.W.float(), b)
            wanted = case.with_(x=x.float(), y=y).call(naive.rank_gate)[0]
            assert out.dtype == dtype
            assert out.shape == wanted.shape
            assert_close(out.float(), wanted, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_every_gate_alone(make, name, dtype):
    layers, cases = projections(make, [name], dtype, [37], biased=False, lead=(3,), d_in=40)
    same(layers, cases, dtype)


@pytest.mark.parametrize("kind", ["none", "sigmoid-b", "static", "self"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("biased", [True, False])
def test_groups_of_unequal_heights_and_scales(make, kind, dtype, biased, groups):
    layers, cases = projections(
        make, [kind] * 4, dtype, [70, 3, 33, 9], biased, lead=(2, 9), d_in=300
    )
    same(layers, cases, dtype)
    assert groups == [3, 1]


def test_members_that_differ_are_started_apart(make, groups):
    kinds = ["none", "none", "sigmoid", "softmax"]
    layers, cases = projections(make, kinds, torch.float32, [8, 9, 10, 11], False, lead=(1,))
    same(layers, cases, torch.float32)
    assert groups == [2, 1, 1]


def test_what_needs_gradients_or_has_many_tokens_goes_the_other_way(make, groups):
    for lead, learning in (((5,), True), ((few.TOKENS + 1,), False)):
        layers, cases = projections(make, ["none"], torch.float32, [8], False, lead=lead)
        with torch.set_grad_enabled(learning):
            linears(cases[0].x, layers)
    assert groups == []
    same(*projections(make, ["none"], torch.float32, [8], False, lead=(few.TOKENS,)), torch.float32)
    assert groups == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "sigmoid", "self"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_sizes_of_a_model(make, kind, dtype, tokens):
    sizes = [2048, 512, 512]
    layers, cases = projections(
        make, [kind] * 3, dtype, sizes, False, lead=(1, tokens), d_in=2048, r=64
    )
    for _ in range(3):
        same(layers, cases, dtype)


@pytest.mark.parametrize("spare", [True, False])
def test_what_is_captured_takes_zeros_that_nobody_had(make, monkeypatch, spare):
    device, taken = torch.device(DEVICE), []
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    monkeypatch.setattr(launch, "_LOCKS", {})
    monkeypatch.setattr(launch, "_SPARE", {})
    if spare:
        launch.locks(device)
    split = launch.Launch.split

    def noted(self, like):
        found = split(self, like)
        taken.extend([found[1]] if self.room else [])
        return found

    monkeypatch.setattr(launch.Launch, "split", noted)
    layers, cases = projections(make, ("sigmoid", "none"), torch.float32, (11, 17), False,
                                lead=(1, 2), d_in=300)  # fmt: skip
    same(layers, cases, torch.float32)
    assert len({t.data_ptr() for t in taken}) == len(taken) == 2
    assert not any(t.any() for t in taken)
    assert all((t._base is not None) == spare for t in taken)


@pytest.mark.gpu
def test_graphs_of_one_stream_have_memory_of_their_own(make):
    groups, wanted, found, graphs = [], [], [], []
    for tokens in (1, 2):
        sizes = {"lead": (tokens,), "d_in": 2048, "r": 64, "k": 8}
        groups.append(
            projections(make, ("sigmoid",) * 3, torch.bfloat16, (512,) * 3, False, **sizes)
        )

    def run(layers, cases, memo):
        with torch.no_grad():
            return linears(cases[0].x, layers, memo=memo)[0]

    memos, stream = [Memo(), Memo()], torch.cuda.Stream()
    for group, memo in zip(groups, memos, strict=True):
        wanted += [run(*group, memo) for _ in range(2)][1:]
    torch.cuda.synchronize()
    for group, memo in zip(groups, memos, strict=True):
        # A stream that no kernel ran on before.
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            found.append(run(*group, memo))
    sides = [torch.cuda.Stream() for _ in graphs]
    for _ in range(50):
        for graph, side in list(zip(graphs, sides, strict=True))[::-1]:
            with torch.cuda.stream(side):
                graph.replay()
    torch.cuda.synchronize()
    for group, memo, one, other in zip(groups, memos, wanted, found, strict=True):
        assert all(map(torch.equal, one, other))
        assert all(map(torch.equal, one, run(*group, memo)))


@pytest.mark.parametrize("start", [0, 12])
def test_a_part_lies_where_its_tensor_does(start):
    whole = torch.arange(24.0, device=DEVICE).view(4, 6)
    part = launch.At(whole, whole.data_ptr(), start, 4, 6, torch.float32)
    assert part.tensor().data_ptr() == part.data_ptr()
    assert part.tensor().flatten()[0] == start / 4
    assert part.after(2).tensor().flatten()[0] == start / 4 + 2
