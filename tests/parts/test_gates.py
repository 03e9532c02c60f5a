"""Static gates and what shrinks them: operators, the flat vector, the rule."""

import copy
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, RunError
from polyrank.frame import Step
from polyrank.parts.gates import (
    FORMS,
    FlatGates,
    Shrinkage,
    StaticGate,
    by_place,
    kept_ranks,
    shrink,
    static_gates,
)
from polyrank.testing import assert_close

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(type(pr.method("lora")), "core", lambda self, site: StaticGate(site.r))
    found = pr.adapt(Net(), pr.method("lora", r=4), ["first", "second"], seed=0)
    monkeypatch.setattr(
        type(pr.method("lora")), "rules", lambda self: [Shrinkage(lambda step: 0.1)]
    )
    return found


def released(v, k):
    """The three statements of the released codes, one value at a time."""
    out = []
    for value in v.tolist():
        one = torch.tensor(value, dtype=v.dtype)
        if one > k:
            one = one - k
        if one < -k:
            one = one + k
        out.append(torch.zeros_like(one) if one.abs() < k else one)
    return torch.stack(out)


def values(dtype, k=0.25):
    drawn = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = [f * k for f in (-2, -1, 0, 1, 2)]
    near = [e + s * 1e-7 for e in edges for s in (-1, 1)]
    return torch.cat([drawn, torch.tensor([*edges, *near], dtype=torch.float64)]).to(dtype)


@DTYPES
def test_the_soft_operator_is_its_closed_form(dtype):
    v = values(dtype)
    expected = v.sign() * (v.abs() - 0.25).clamp_min(0)
    assert torch.equal(shrink(v, 0.25), expected)


@DTYPES
def test_the_released_operator_is_its_three_statements(dtype):
    v = values(dtype)
    found = shrink(v, 0.25, "released")
    assert torch.equal(found, released(v, 0.25))
    fixed = torch.tensor([-0.25, 0.25], dtype=dtype)
    assert torch.equal(shrink(fixed, 0.25, "released"), fixed)
    assert ((found == 0) | (found.abs() >= 0.25)).all()


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_operators_are_odd_keep_signs_and_never_enlarge(form, dtype):
    v = values(dtype)
    found = shrink(v, 0.25, form)
    assert torch.equal(shrink(-v, 0.25, form), -found)
    assert (found * v >= 0).all()
    assert (found.abs() <= v.abs()).all()
    assert torch.equal(shrink(v, 0.0, form), v)
    assert found.data_ptr() != v.data_ptr()


def test_only_the_soft_operator_is_a_contraction():
    v = values(torch.float64)
    gap = (v[:, None] - v[None]).abs()
    for form, holds in (("soft", True), ("released", False)):
        found = shrink(v, 0.25, form)
        assert bool(((found[:, None] - found[None]).abs() <= gap + 1e-15).all()) is holds


def test_the_flat_vector_is_the_gates_and_survives_a_copy(model):
    adapter = pr.adapter_of(model)
    before = [p.detach().clone() for _, p in static_gates(adapter)]
    flat = FlatGates(adapter)
    assert torch.equal(flat.vectors()[0], torch.cat(before))
    flat.vectors()[0][0] = 5.0
    assert float(static_gates(adapter)[0][1][0].detach()) == 5.0
    # Moving a model gives its parameters storage of their own.
    model.double().float()
    for _, gate in static_gates(adapter):
        gate.data = gate.data.clone()
    with torch.no_grad():
        static_gates(adapter)[1][1][2] = 7.0
    flat.vectors()[0][1] = 6.0
    assert float(flat.vectors()[0][6]) == 7.0
    assert float(static_gates(adapter)[0][1][1].detach()) == 6.0
    other = copy.deepcopy(model)
    with torch.no_grad():
        flat.vectors()[0].zero_()
    assert float(static_gates(pr.adapter_of(other))[1][1][2].detach()) == 7.0


def test_a_model_on_two_devices_has_a_flat_vector_on_each(model):
    held = [torch.empty(n, device=d) for n, d in ((2, "cpu"), (3, "meta"), (1, "cpu"))]
    assert by_place([*held, torch.empty(2, dtype=torch.float64)]) == [[0, 2], [1], [3]]
    adapter = pr.adapter_of(model)
    drawn = [gate.detach().clone() for _, gate in static_gates(adapter)]
    # Another dtype cannot stand in one vector either, and is here on every machine.
    static_gates(adapter)[1][1].data = drawn[1].double()
    flat = FlatGates(adapter)
    assert [v.dtype for v in flat.vectors()] == [torch.float32, torch.float64]
    flat.shrink(0.1, "soft")
    for (_, gate), value in zip(static_gates(adapter), drawn, strict=True):
        assert_close(gate, shrink(value, 0.1).to(gate.dtype), dtype=torch.float32)
    flat.vectors()[1][2] = float("inf")
    with pytest.raises(RunError, match=r"1 layers hold NaN or infinity \(second is the first"):
        flat.check_finite()


def test_gates_that_are_not_finite_are_found_when_rules_leave(model):
    for raising in (False, True):
        attached = pr.attach(torch.optim.SGD(pr.parameter_groups(model, lr=0.5)), model)
        gate = static_gates(pr.adapter_of(model))[1][1]
        kept = gate.detach().clone()
        with torch.no_grad():
            gate[3] = float("nan")
        if raising:
            # An error on its way says more than what it has left behind.
            with pytest.raises(KeyError), closing(SimpleNamespace(close=attached.detach)):
                raise KeyError
        else:
            with pytest.raises(RunError, match="second is the first"):
                attached.detach()
        # It left all the same.
        assert not attached.flow.attached
        with torch.no_grad():
            gate.copy_(kept)


def test_gates_below_fp32_and_gates_that_are_not_finite_are_refused(model):
    flat = FlatGates(pr.adapter_of(model))
    flat.check_finite()
    flat.vectors()[0][5] = float("nan")
    with pytest.raises(RunError, match="second is the first"):
        flat.check_finite()
    gate = static_gates(pr.adapter_of(model))[0][1]
    gate.data = gate.data.bfloat16()
    with pytest.raises(ConfigError, match="float32"):
        FlatGates(pr.adapter_of(model))


def test_the_rule_moves_gates_after_a_step_and_nothing_else(model):
    adapter = pr.adapter_of(model)
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.5))
    attached = pr.attach(optimizer, model)
    model.train()
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(x).square().mean().backward()
    optimizer.step()
    attached.detach()
    for name, param in model.named_parameters():
        moved = before[name] if param.grad is None else before[name] - 0.5 * param.grad
        expected = shrink(moved, 0.1) if "core" in name else moved
        assert_close(param, expected)
    assert kept_ranks(adapter) == {
        layer.site.path: int((gate != 0).sum()) for layer, gate in static_gates(adapter)
    }


def test_an_optimiser_without_the_gates_or_that_decays_them_is_refused(model):
    rule = Shrinkage(lambda step: 0.1)
    adapter = pr.adapter_of(model)
    bare = torch.optim.SGD([layer.A for layer in adapter.layers], lr=0.1)
    with pytest.raises(ConfigError, match="0 groups"):
        rule.bind(adapter, bare, None)
    decayed = torch.optim.SGD([g for _, g in static_gates(adapter)], lr=0.1, weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"weight decay 0\.1"):
        rule.bind(adapter, decayed, None)


def test_a_threshold_of_zero_changes_no_bit(model):
    rule = Shrinkage(lambda step: 0.0)
    adapter = pr.adapter_of(model)
    rule.bind(adapter, torch.optim.SGD([g for _, g in static_gates(adapter)], lr=0.1), None)
    before = rule.gates.vectors()[0].clone()
    rule.after(Step(index=0, total=1, lr=0.1, peak=0.1))
    assert torch.equal(rule.gates.vectors()[0], before)


def test_a_gate_of_one_call_is_not_kept():
    core = StaticGate(4)
    core.gate = None
    vars(core)["gate"] = torch.ones(4, requires_grad=True) * 2
    assert core.fused().gate.grad_fn is not None
    # A copy of what has a history is refused.
    core.gate = torch.nn.Parameter(torch.ones(4))
    copy.deepcopy(core)
