"""The public operator: paths, refusals, autocast, compiled graphs, overwriting y."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

import polyrank.ops.rank_gate as package
from polyrank.errors import ConfigError
from polyrank.ops.rank_gate import Epilogue, NonFiniteError, eager, naive, rank_gate
from polyrank.testing.tolerance import assert_close

# --- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "module"), [("auto", eager), ("eager", eager), ("naive", naive), (None, eager)]
)
def test_the_environment_picks_the_path(make, monkeypatch, path, module):
    if path is None:
        monkeypatch.delenv("POLYRANK_OPS", raising=False)
    else:
        monkeypatch.setenv("POLYRANK_OPS", path)
    called = []
    for each in (eager, naive):
        plain = each.rank_gate
        monkeypatch.setattr(
            each, "rank_gate", lambda *a, f=plain, m=each, **k: (called.append(m), f(*a, **k))[1]
        )
    case = make("sigmoid")
    out, _ = case.call(rank_gate)
    assert called == [module]
    assert_close(out, case.call(eager.rank_gate)[0])


@pytest.mark.parametrize(
    ("path", "message"),
    [("triton", "POLYRANK_OPS: got 'triton', but .*unset it"), ("egaer", "did you mean 'eager'")],
)
def test_a_forced_path_that_cannot_run_raises(make, monkeypatch, path, message):
    monkeypatch.setenv("POLYRANK_OPS", path)
    with pytest.raises(ConfigError, match=message):
        make("none").call(rank_gate)


def test_the_reference_has_at_most_forty_lines():
    source = Path(package.__file__).with_name("naive.py").read_text(encoding="utf-8")
    nodes = (ast.Module, ast.FunctionDef)
    documented = [n for n in ast.walk(ast.parse(source)) if isinstance(n, nodes)]
    texts = {
        line
        for node in documented
        if ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    code = [
        line
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in texts
    ]
    assert len(code) <= 40


# --- refusals ---------------------------------------------------------------------------------


def ones(*shape):
    return torch.ones(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "changes", "options", "message"),
    [
        ("none", {"x": ones(9, 12)}, {}, r"x: got shape \(9, 12\), expected \(9, 13\)"),
        ("none", {"x": torch.ones(9, 13, dtype=torch.int64)}, {}, "x: got torch.int64"),
        ("none", {"y": ones(8, 11)}, {}, r"y: got shape \(8, 11\), expected \(9, 11\)"),
        ("none", {"B": ones(11, 10)}, {}, r"B: got shape \(11, 10\), expected \(11, 12\)"),
        ("none", {"rows": ones(12, 13)}, {}, "rows: got .* for kind 'none', expected None"),
        ("none", {"B": ones(11, 13)}, {"live_from": 4}, r"B: got shape \(11, 13\)"),
        ("self", {"B": ones(11, 8)}, {"live_from": 3}, "or up to live_from = 3 columns fewer"),
        ("sigmoid", {"rows": None}, {}, r"rows: got None, expected \(12, 13\)"),
        ("sigmoid", {"rows": ones(6, 13)}, {}, r"rows: got shape \(6, 13\), expected \(12, 13\)"),
        ("sigmoid", {"epilogue": Epilogue("linear", k=13)}, {}, "k <= r = 12"),
        ("sigmoid", {"epilogue": Epilogue("linear", k=5, block=5)}, {}, "block a divisor of r"),
        ("sigmoid", {"epilogue": Epilogue("linear", k=2, bias=torch.ones(3))}, {}, r"bias: got"),
        ("static", {"epilogue": Epilogue("static", gate=torch.ones(3))}, {}, r"gate: got shape"),
        ("none", {}, {"live_from": 13}, r"live_from: got 13, expected 0\.\.12"),
        ("none", {}, {"live_from": -1}, "live_from: got -1"),
        ("none", {}, {"dropout": 1.0}, "dropout: got 1.0.*0 turns it off"),
        ("none", {}, {"row_scale": ones(13)}, r"row_scale: got shape \(13,\), expected \(11,\)"),
        ("sigmoid", {}, {"mask": torch.ones(8, dtype=torch.bool)}, "mask: got shape"),
        ("sigmoid", {}, {"mask": torch.ones(9)}, "mask: got torch.float32"),
        ("none", {}, {"shadow": (ones(3, 12), ones(11, 3), None)}, "shadow A0: got shape"),
        ("none", {}, {"shadow": (ones(3, 13), ones(11, 2), None)}, "shadow B0: got shape"),
        ("none", {}, {"shadow": (ones(3, 13), ones(11, 3), ones(2))}, "shadow δ0: got shape"),
        ("none", {}, {"shadow": (ones(3, 13), ones(11, 3), ones(3, 2))}, "shadow δ0: got shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(make, kind, changes, options, message):
    with pytest.raises(ConfigError, match=message):
        make(kind).with_(**changes).call(rank_gate, **options)


def test_all_faults_are_told_at_once(make):
    with pytest.raises(ConfigError) as caught:
        make("none").with_(x=ones(9, 12), B=ones(11, 3)).call(rank_gate, dropout=2.0)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "liner"}, "did you mean 'linear'"),
        ({"kind": "static"}, "gate: got none for kind 'static'"),
        ({"kind": "static", "gate": torch.ones(2, 2)}, r"gate: got shape \(2, 2\)"),
        ({"gate": torch.ones(2)}, "gate: got shape .* for kind 'none'"),
        ({"kind": "linear", "k": 0}, "k: got 0, expected >= 1"),
        ({"kind": "linear", "k": 4, "block": 3}, "block: got 3 with k = 4"),
        ({"kind": "linear", "k": 4, "block": 0}, "block: got 0"),
        ({"kind": "linear", "score": "sigmod"}, "did you mean 'sigmoid'"),
        ({"kind": "linear", "total": 0.0}, "total: got 0.0"),
        ({"kind": "self", "k": 0}, "k: got 0"),
        ({"kind": "self", "tau": 0.0}, "tau: got 0.0"),
        ({"kind": "self", "tau": float("nan")}, "tau: got nan"),
        ({"kind": "self", "delta": 1.5}, "delta: got 1.5.*0 turns it off"),
        ({"kind": "self", "eps": 0.0}, "eps: got 0.0"),
    ],
)
def test_epilogues_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Epilogue(**fields)


def test_an_epilogue_tells_all_its_faults():
    with pytest.raises(ConfigError) as caught:
        Epilogue("linear", k=3, block=2, score="x", total=-1.0)
    assert len(caught.value.problems) == 3


# --- autocast ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_computes_in_its_dtype(make, name, inside):
    case = make(name, dtype=torch.float32, lead=(2, 9))
    half = case.with_(
        y=case.y.detach().bfloat16().requires_grad_(), x=case.x.detach().bfloat16().requires_grad_()
    )
    expected, counts, expected_grads = half.run(rank_gate, count=True)
    leaves = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, counts_a = case.with_(y=case.y.bfloat16()).call(rank_gate, count=True)
        cotangent = torch.linspace(-1, 1.5, out.numel()).view(out.shape).to(out)
        if inside:
            grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    if not inside:
        grads = torch.autograd.grad(out, list(leaves.values()), cotangent)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert counts is None or torch.equal(counts, counts_a)
    for (key, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, expected_grads[key].to(grad))


def test_autocast_leaves_the_reference_in_fp32(make, monkeypatch):
    monkeypatch.setenv("POLYRANK_OPS", "naive")
    case = make("sigmoid", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = case.call(rank_gate)
    assert torch.equal(out, case.call(rank_gate)[0])


# --- compiled graphs --------------------------------------------------------------------------

# torch 2.13 instantiates any autograd.Function to trace it, and warns of it itself.
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@compiles
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *(
            (k, "eager")
            for k in ("none", "static", "sigmoid-b", "sigmoid-bw", "softmax-m2", "self")
        ),
        ("sigmoid-m3", "naive"),
    ],
)
def test_one_graph_under_compile(make, kind, path, monkeypatch):
    monkeypatch.setenv("POLYRANK_OPS", path)
    torch._dynamo.reset()
    case = make(kind, lead=(2, 5))
    tensors = case.tensors()
    fields = {n: v for n, v in vars(case.epilogue).items() if n != "gate"}
    dropout = 0.2 if kind == "sigmoid-b" else 0.0
    shadow = (ones(2, 13), ones(11, 2), None)

    def function(seed, y, x, A, B, rows=None, gate=None):
        return rank_gate(
            y, x, A, rows, B, Epilogue(**fields, gate=gate), 1.7, 2, shadow, dropout=dropout,
            seed=seed, mask=x[..., 0] > 0, count=True,
        )  # fmt: skip

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    # A seed that is a tensor changes from step to step within one graph.
    for seed in (torch.tensor(5), torch.tensor(-77)):
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


@compiles
def test_a_compiled_router_turns_nan_into_nan(make):
    torch._dynamo.reset()
    case = make("sigmoid", lead=(5,))
    x = case.x.detach().clone()
    x[2, 0] = float("nan")

    def function(x):
        return case.with_(x=x).call(rank_gate)[0]

    out = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(out.isnan().all(-1), torch.arange(5) == 2)
    assert int(out.isnan().sum()) == out.shape[-1]


# --- overwriting y ----------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(12,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_inplace_gives_the_same_in_the_memory_of_y(make, name, lead, bias, trains):
    base = nn.Linear(13, 11, bias=bias, dtype=torch.float64).requires_grad_(trains)
    case = make(name, lead=lead)
    leaves = {n: t for n, t in case.tensors().items() if n != "y"} | dict(base.named_parameters())
    leaves = {n: t for n, t in leaves.items() if t.requires_grad}
    results = []
    for inplace in (False, True):
        y = base(case.x)
        place = y.data_ptr()
        out, counts = case.with_(y=y).call(rank_gate, count=True, inplace=inplace)
        assert (out.data_ptr() == place) == inplace
        grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        results.append((out, counts, *grads))
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("lead", [(12,), (3, 4)], ids=str)
def test_inplace_in_the_first_layer_whose_input_needs_no_gradient(make, name, lead):
    base = nn.Linear(13, 11, dtype=torch.float64).requires_grad_(False)
    case = make(name, lead=lead)
    case = case.with_(x=case.x.detach())
    leaves = [t for n, t in case.tensors().items() if t.requires_grad and n not in ("x", "y")]
    results = []
    for inplace in (False, True):
        y = base(case.x)
        assert not y.requires_grad
        out, counts = case.with_(y=y).call(rank_gate, count=True, inplace=inplace)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append((out, counts, *grads))
    for a, b in zip(*results, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_inplace_without_gradients(make, name):
    case = make(name, lead=(2, 6))
    base = nn.Linear(13, 11, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = case.with_(y=base(case.x)).call(rank_gate)
        y = base(case.x)
        out, _ = case.with_(y=y).call(rank_gate, inplace=True)
    assert torch.equal(out, expected)
    assert out.data_ptr() == y.data_ptr()


@pytest.mark.parametrize("kind", ["leaf", "transposed", "slice"])
def test_inplace_leaves_alone_what_it_may_not_overwrite(make, kind):
    case = make("sigmoid", lead=(6, 4))
    if kind == "leaf":
        y = case.y
    elif kind == "transposed":
        y = (case.y * 1).transpose(0, 1).contiguous().transpose(0, 1)
    else:
        y = torch.cat([case.y, case.y])[6:]
    before = y.detach().clone()
    out, _, grads = case.with_(y=y).run(rank_gate, inplace=True)
    expected, _, expected_grads = case.with_(y=y).run(rank_gate)
    assert torch.equal(y, before)
    assert torch.equal(out, expected)
    assert all(torch.equal(grads[n], expected_grads[n]) for n in grads)


def test_inplace_is_noticed_by_who_needs_the_old_values(make):
    case = make("none")
    y = case.y.exp()
    out, _ = case.with_(y=y).call(rank_gate, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_inplace_y_is_untouched(make, name):
    case = make(name)
    before = case.y.detach().clone()
    for option in ({}, {"shadow": (ones(2, 13), ones(11, 2), None)}):
        case.call(rank_gate, **option)
        assert torch.equal(case.y, before)


# --- a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_equals_the_reference(make, name, dtype):
    case = make(name, dtype=dtype, lead=(2, 64), d_in=96, d_out=80, device="cuda")
    tolerance = {"dtype": dtype}
    for options in ({}, {"live_from": 5, "dropout": 0.2, "seed": 7}):
        out, counts, grads = case.run(naive.rank_gate, count=True, **options)
        out_e, counts_e, grads_e = case.run(rank_gate, count=True, **options)
        assert_close(out_e, out, **tolerance)
        assert counts is None or torch.equal(counts, counts_e)
        for key, grad in grads.items():
            assert_close(grads_e[key], grad, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "self"])
def test_cuda_refuses_bad_logits_without_waiting_for_them_in_a_training_step(make, kind):
    case = make(kind, dtype=torch.float32, lead=(5,), device="cuda")
    x = case.x.detach().clone()
    x[2, 0] = float("inf")
    bad = case.with_(x=x.requires_grad_())
    out, _ = bad.call(rank_gate)
    with pytest.raises(NonFiniteError, match="some tokens"):
        out.sum().backward()
    with torch.no_grad(), pytest.raises(NonFiniteError, match="1 of 5 tokens"):
        bad.call(rank_gate)
    case.run(rank_gate)
