"""The ramp of thresholds against the loop that it stands for, and gates without gradients."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.frame import Step
from polyrank.parts.gates import FORMS, kept_ranks, shrink
from polyrank.parts.ramp import Ramp, TwinGate, levels, stride, twin_ranks
from polyrank.testing import assert_close

PUBLISHED = (500, 0.5, 50, 0.005)


def loop(total, dense, count, kappa_max):
    """The released loop: the level rises before the forward, the threshold acts after the step."""
    grid = np.linspace(0, kappa_max, count)
    start = dense * total
    every = math.floor((total - start) / count)
    level, found = 0, []
    for t in range(total):
        if every > 0 and t >= start and t % every == 0:
            level += 1
        found.append(float(grid[min(level, count - 1)]) if t > start else 0.0)
    return found


@pytest.mark.parametrize("dense", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.9, 1.0])
def test_levels_are_those_of_the_released_loop_to_the_bit(dense):
    for total in (0, 1, 7, 59, 60, 100, 105, 333, 500, 1000):
        for count in (2, 3, 7, 50):
            assert levels(total, dense, count, 0.005) == loop(total, dense, count, 0.005)


def test_levels_of_the_published_run():
    found = levels(*PUBLISHED)
    assert stride(500, 0.5, 50) == 5
    assert not any(found[:251])
    assert found[251:255] == [0.005 / 49] * 4
    assert found[255] == 2 * (0.005 / 49)
    assert found[490:] == [0.005] * 10
    assert max(found[:490]) < 0.005
    assert_close(sum(found), 0.64990, tol=1e-5, reason="the published sum has five digits")


def test_levels_that_never_rise():
    assert stride(60, 0.5, 50) == 0
    assert levels(60, 0.5, 50, 0.005) == [0.0] * 60
    assert levels(60, 1.0, 2, 0.005) == [0.0] * 60
    assert max(levels(100, 0.5, 50, 0.005)) == 0.005


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def made(monkeypatch):
    """Returns an adapted model whose rule is a ramp."""

    def make(r=6, form="soft", kappa_max=0.2, idle=False, dense=0.0):
        cls = type(pr.method("lora"))
        monkeypatch.setattr(cls, "core", lambda self, site: TwinGate(site.r))
        ramp = Ramp(dense, 2, kappa_max, form, idle=idle)
        monkeypatch.setattr(cls, "rules", lambda self: [ramp])
        return pr.adapt(Net(), pr.method("lora", r=r), ["first", "second"], seed=0)

    return make


def train(model, steps, rate=0.0, total=None):
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=rate))
    attached = pr.attach(optimizer, model, total=steps if total is None else total)
    x = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    model.train()
    try:
        for _ in range(steps):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        attached.detach()


@pytest.mark.parametrize("form", FORMS)
def test_a_twin_goes_where_its_gate_goes_without_gradients(made, form):
    model = made(form=form, kappa_max=0.08)
    cores = [layer.core for layer in pr.adapter_of(model).layers]
    drawn = [core.gate.detach().clone() for core in cores]
    assert all(torch.equal(core.twin, core.gate) for core in cores)
    train(model, 8)
    for core, value in zip(cores, drawn, strict=True):
        for kappa in levels(8, 0.0, 2, 0.08):
            value = shrink(value, kappa, form) if kappa else value
        assert torch.equal(core.twin, value)
        assert torch.equal(core.gate, value)
        assert 0 < int((value == 0).sum()) < 6
    assert twin_ranks(pr.adapter_of(model)) == kept_ranks(pr.adapter_of(model))


def test_a_twin_never_learns_and_outlives_a_copy(made):
    model = made(kappa_max=0.01)
    train(model, 6, rate=0.02)
    cores = [layer.core for layer in pr.adapter_of(model).layers]
    assert not any(torch.equal(core.twin, core.gate) for core in cores)
    assert not any(core.twin.requires_grad for core in cores)
    model.bfloat16()
    assert {core.twin.dtype for core in cores} == {torch.float32}
    # Copies have twins of their own, which go on alike.
    learnt = [core.twin.clone() for core in cores]
    other = copy.deepcopy(model.float())
    train(other, 6, rate=0.02)
    copies = [layer.core for layer in pr.adapter_of(other).layers]
    for core, value, left in zip(copies, learnt, cores, strict=True):
        for kappa in levels(6, 0.0, 2, 0.01):
            value = shrink(value, kappa) if kappa else value
        assert torch.equal(core.twin, value)
        assert not torch.equal(core.twin, left.twin)


def test_without_their_number_updates_are_refused_before_the_first_one(made):
    model = made()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match="pass total="):
        train(model, 2, total=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"got update 5, expected 4 at most.*detach before the"):
        train(model, 5, total=4)


def test_a_task_too_short_for_its_levels_is_refused_unless_allowed(made):
    with pytest.raises(ConfigError, match=r"got 2 for the last 100% of 1 updates.*train 2 updates"):
        train(made(), 1)
    with pytest.raises(ConfigError, match=r"last 0% of 9 updates.*take fewer levels"):
        train(made(dense=1.0), 9)
    model = made(idle=True)
    train(model, 1)
    assert all(torch.equal(v.core.twin, v.core.gate) for v in pr.adapter_of(model).layers)


def test_levels_belong_to_one_length(made):
    ramp = Ramp(0.0, 2, 0.1, "soft", idle=False)
    for total in (4, 8):
        step = Step(index=3, total=total, lr=0.1, peak=0.1)
        ramp.begin(step)
        assert ramp.known == levels(total, 0.0, 2, 0.1)


def test_an_adapter_without_twins_has_none():
    model = pr.adapt(Net(), "lora", ["first"], seed=0)
    assert twin_ranks(pr.adapter_of(model)) == {}
