"""Adam for gates, thresholds in stages, the mean of all gates, and the boundary that goes on."""

import copy
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.frame import Job, Phase, Step
from polyrank.parts.gates import FlatGates, StaticGate
from polyrank.parts.optimizer import build_optimizer
from polyrank.parts.sparsify import (
    SCHEDULES,
    AdamGate,
    GateNorm,
    Levels,
    Stages,
    stage_of,
    thresholds,
)
from polyrank.testing import assert_close


def adam_by_hand(value, grads, lr, betas=(0.9, 0.999), eps=1e-6):
    """One number through the released gate optimiser."""
    m = v = 0.0
    for t, grad in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        rate = lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        value -= rate * m / (math.sqrt(v) + eps)
    return value


@pytest.mark.parametrize("size", [1.0, 1e-6], ids=str)
def test_the_gate_optimiser_is_its_formula(size):
    torch.manual_seed(0)
    start, grads = torch.randn(5).double(), size * torch.randn(7, 5).double()
    gate = nn.Parameter(start.clone())
    optimizer = AdamGate([{"params": [gate], "lr": 0.01}])
    for row in grads:
        gate.grad = row.clone()
        optimizer.step()
    expected = [adam_by_hand(float(g), grads[:, i].tolist(), 0.01) for i, g in enumerate(start)]
    assert_close(gate.detach(), expected)


def test_its_epsilon_is_not_that_of_torch():
    gates = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    for gate in gates:
        gate.grad = torch.full((1,), 1e-6, dtype=torch.float64)
    AdamGate([{"params": [gates[0]], "lr": 1.0}]).step()
    torch.optim.Adam([gates[1]], lr=1.0, eps=1e-6).step()
    moved = [float(1 - gate.detach()) for gate in gates]
    assert_close(moved[0], 1e-6 / (1e-6 + 1e-6 / math.sqrt(1e-3)))
    assert_close(moved[1], 0.5)


def test_a_parameter_without_a_gradient_is_left_alone_and_its_time_stands():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = AdamGate([{"params": [first, second], "lr": 0.1}])
    for index in range(3):
        first.grad = torch.full((2,), 0.5)
        second.grad = torch.full((3,), 0.5) if index == 2 else None
        optimizer.step()
    assert (optimizer.state[first]["step"], optimizer.state[second]["step"]) == (3, 1)
    assert_close(second.detach(), [adam_by_hand(1.0, [0.5], 0.1)] * 3, dtype=torch.float32)
    assert_close(first.detach(), [adam_by_hand(1.0, [0.5] * 3, 0.1)] * 2, dtype=torch.float32)


def test_decay_is_refused_and_a_closure_is_called():
    gate = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"adam-gate: got weight decay 0\.1"):
        AdamGate([{"params": [gate], "lr": 0.1, "weight_decay": 0.1}])

    def closure():
        gate.grad = None
        loss = gate.square().sum()
        loss.backward()
        return loss

    loss = AdamGate([{"params": [gate], "lr": 0.1}]).step(closure)
    assert float(loss.detach()) == 2.0
    assert (gate.detach() < 1).all()


def test_its_state_goes_on_to_the_same_bits():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]

    def made(pair):
        groups = [
            {"params": [pair[0]], "lr": 0.1, "weight_decay": 0.1},
            {"params": [pair[1]], "lr": 0.1, "weight_decay": 0.0, "update": "adam-gate"},
        ]
        return build_optimizer(groups, torch.optim.AdamW, {})

    def grads(pair, seed):
        rng = torch.Generator().manual_seed(seed)
        for p in pair:
            p.grad = torch.randn(p.shape, generator=rng)

    whole, first = made(ours), made(theirs)
    for seed in range(2):
        for pair, one in ((ours, whole), (theirs, first)):
            grads(pair, seed)
            one.step()
    again = made(theirs)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 5):
        for pair, one in ((ours, whole), (theirs, again)):
            grads(pair, seed)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- thresholds ----------------------------------------------------------------------------------

ORACLE = {
    "linear": np.linspace,
    "log_linear": lambda a, b, n: np.log(np.linspace(np.exp(a), np.exp(b), n)),
    "exp_linear": lambda a, b, n: np.exp(np.linspace(np.log(a), np.log(b), n)),
}


@pytest.mark.parametrize("ends", [(1e-4, 7e-4), (3e-4, 3e-4), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("kind", ORACLE)
@pytest.mark.parametrize("stages", [1, 2, 7])
def test_a_schedule_is_its_list(kind, ends, stages):
    found = thresholds(kind, *ends, stages)
    assert_close(found, ORACLE[kind](*ends, stages))
    assert len(found) == stages
    assert found[0] == ends[0]
    assert all(b >= a for a, b in pairwise(found))


def test_the_published_schedule_begins_at_zero():
    expected = [0.0, 7e-4 / 6, 14e-4 / 6, 21e-4 / 6, 28e-4 / 6, 35e-4 / 6, 7e-4]
    assert_close(thresholds("linear", 0.0, 7e-4, 7), expected)
    assert thresholds("none", 0.3, 0.0, 7) == [0.3]
    assert {"none", *ORACLE} == set(SCHEDULES)


def step(phase="train", lr=0.1, peak=0.1, index=0):
    return Step(index=index, total=4, lr=lr, peak=peak, phase=phase)


@pytest.mark.parametrize(
    ("phase", "stage"),
    [("stage-0", 0), ("stage-12", 12), ("train", 0), ("3", 0), ("stage-x", 0), ("stage-", 0)],
)
def test_the_stage_stands_in_the_name_of_the_phase(phase, stage):
    assert stage_of(step(phase)) == stage


def test_a_level_belongs_to_its_stage_and_stays_past_the_last():
    levels = Levels(schedule=[0.1, 0.2, 0.4], first=9.0, last=9.0, stages=9)
    assert [levels(step(f"stage-{i}")) for i in range(5)] == [0.1, 0.2, 0.4, 0.4, 0.4]
    assert levels(step("train")) == 0.1
    rated = Levels(schedule="none", first=0.2, last=0.0, stages=7, scale="rate")
    assert_close(rated(step(lr=0.05, peak=0.1)), 0.1)
    # Nothing moves without a rate, so nothing shrinks.
    assert rated(step(lr=0.0, peak=0.0)) == 0.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"schedule": "lineal"}, "did you mean 'linear'"),
        ({"schedule": "zigzag"}, "or give a list"),
        ({"schedule": "linear", "first": 2e-3}, "xi_max: got 0.001, expected at least xi=0.002"),
        ({"schedule": "exp_linear", "first": 0.0}, "xi: got 0, expected > 0 with schedule 'exp"),
        ({"schedule": [2e-4, 1e-4]}, "numbers that do not fall"),
        ({"schedule": []}, "a list of finite numbers"),
        ({"schedule": [0.0, -1.0]}, "a list of finite numbers"),
        ({"schedule": [0.0, float("nan")]}, "a list of finite numbers"),
        ({"schedule": [0.0, "1"]}, "a list of finite numbers"),
        ({"schedule": [False, True]}, "a list of finite numbers"),
        ({"schedule": 3}, "a word or a list"),
    ],
)
def test_thresholds_that_are_none_or_fall_are_named(options, says):
    given = {"schedule": "none", "first": 1e-4, "last": 1e-3, "stages": 3, **options}
    problems = list(Levels(**given).problems())
    assert len(problems) == 1
    assert says in problems[0]


def test_sound_thresholds_have_no_problem():
    for kind in (*SCHEDULES, [0, 0, 1e-4]):
        assert not list(Levels(schedule=kind, first=1e-4, last=1e-3, stages=3).problems())


# --- the mean of all gates -----------------------------------------------------------------------


def test_the_mean_is_over_the_gates_of_all_layers_and_pulls_by_signs(monkeypatch):
    monkeypatch.setattr(type(pr.method("lora")), "core", lambda self, site: StaticGate(site.r))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    adapter = pr.adapter_of(
        pr.adapt(net, pr.method("lora", r=3), ["0", "1"], rank_pattern={"1": 5})
    )
    (flat,) = FlatGates(adapter).vectors()
    assert flat.shape == (8,)
    flat[2] = 0.0
    penalty = GateNorm(0.7)
    penalty.bind(adapter, None)
    found = penalty.weight * penalty(adapter, step())
    assert_close(found, 0.7 * flat.abs().sum() / 8)
    gates = [layer.core.gate for layer in adapter.layers]
    grads = torch.autograd.grad(found, gates)
    assert_close(torch.cat(grads), 0.7 * flat.sign() / 8)
    assert torch.cat(grads)[2] == 0


# --- stages --------------------------------------------------------------------------------------


class Shop:
    """As much of a workshop as the boundary needs."""

    def __init__(self, adapter):
        self.adapter, self.kept, self.memories = adapter, [], {}

    def memory(self, name):
        return self.memories.setdefault(name, {})

    def replica(self, name):
        self.kept.append(name)


@pytest.fixture
def shop(monkeypatch):
    monkeypatch.setattr(type(pr.method("lora")), "core", lambda self, site: StaticGate(site.r))
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    return Shop(pr.adapter_of(pr.adapt(net, pr.method("lora", r=3), ["0", "1"])))


def drive(boundary, shop, state, log, calls=99):
    """What an engine does, saving the state after every piece of work."""
    while calls and (work := boundary.next(None, shop, state)) is not None:
        calls -= 1
        log.append(work)
        if isinstance(work, Job):
            assert work.step(shop, state)
        state = json.loads(json.dumps(state))
    return state


def test_every_stage_is_a_phase_and_then_kept(shop):
    log = []
    boundary = Stages("x", 3, steps=7, check_every=0, roles=None)
    drive(boundary, shop, {}, log)
    names = ["stage-0", "keep-0", "stage-1", "keep-1", "stage-2", "keep-2"]
    assert [work.name for work in log] == names
    phases = [work for work in log if isinstance(work, Phase)]
    assert [(p.steps, p.keep, p.train, p.span) for p in phases] == [
        (0, "last", None, None),
        (7, "last", None, None),
        (7, "last", None, None),
    ]
    # The last stage is the live adapter.
    assert shop.kept == ["stage-0", "stage-1"]
    assert list(shop.memory("x")) == [f"all tasks stage-{i}" for i in range(3)]


def test_a_killed_boundary_finds_its_way_back_from_the_state_alone(shop):
    whole, log = [], []
    drive(Stages("x", 3, steps=0, check_every=0, roles=None), shop, {}, whole)
    state = {}
    for _ in whole:
        state = drive(Stages("x", 3, steps=0, check_every=0, roles=None), shop, state, log, calls=1)
    assert [work.name for work in log] == [work.name for work in whole]
    assert Stages("x", 3, steps=0, check_every=0, roles=None).next(None, shop, state) is None


def test_the_first_stage_may_end_with_its_best_state_and_later_ones_train_gates_alone(shop):
    log = []
    drive(Stages("x", 2, steps=0, check_every=5, roles=["core"]), shop, {}, log)
    first, second = (work for work in log if isinstance(work, Phase))
    assert (first.check_every, first.keep, first.train) == (5, "best", None)
    assert (second.check_every, second.keep, second.train) == (0, "last", frozenset({"core"}))
