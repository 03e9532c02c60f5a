"""altlora: what does not go with balancing, steps that fail as a whole, copies of optimisers."""

import copy

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.errors import ConfigError, RunError
from polyrank.frame import combination_problems, keyed
from polyrank.parts.gates import StaticGate

WIDTH = 6


def draw(*shape, key=0):
    rng = keyed("altlora-steps", key, *shape)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def adapted(method="altlora", **options):
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
    with torch.no_grad():
        for key, p in enumerate(base.parameters()):
            p.copy_(draw(*p.shape, key=key))
    return pr.adapt(base, pr.method(method, **{"r": 2, **options}), ["0", "2"], seed=1).double()


def backward(model, n=0):
    (model(draw(8, WIDTH, key=90 + n)) - draw(8, WIDTH, key=50 + n)).square().mean().backward()


def train(model, optimizer, first, count):
    attached = pr.attach(optimizer, model)
    model.train()
    for n in range(first, first + count):
        optimizer.zero_grad()
        backward(model, n)
        attached.before_clip()
        optimizer.step()
    attached.detach()


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("strategy", ["l2", "ewc", "ilora"])
def test_balancing_goes_with_nothing_that_means_factors(strategy):
    still, balanced = pr.method("altlora"), pr.method("altlora", balance_every=2)
    made = pr.method(strategy)
    assert combination_problems(still, [made]) == []
    (found,) = combination_problems(balanced, [made])
    assert f" of {strategy} expects an untouched factoring" in found
    assert "but 'balance_every' of altlora changes it first; drop one of the two" in found
    assert combination_problems(balanced, [pr.method("replay")]) == []


@pytest.mark.parametrize(("method", "options"), [("allora", {"apply_to": "update"}), ("sora", {})])
def test_balancing_is_not_lent_where_steps_are_written(method, options):
    if method == "allora":
        pr.method(method, optim_by="altlora", **options)
    with pytest.raises(ConfigError, match="'balance_every' changes it first"):
        pr.method(method, optim_by="altlora:balance_every=2", **options)


def test_balancing_stands_beside_an_optimiser_alone():
    model = adapted(balance_every=2)
    train(model, pr.optimizer(model, 0.1), 0, 4)
    with pytest.raises(ConfigError, match="balance_every"):
        pr.attach(pr.optimizer(model, 0.1), model, strategies=[pr.method("l2")])


@pytest.mark.parametrize("fault", ["missing", "infinite"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_joint_step_with_one_bad_gradient_moves_nothing(fault, side):
    model = adapted(joint=True)
    optimizer = pr.optimizer(model, 0.1)
    backward(model)
    last = getattr(pr.adapter_of(model).layers[1], side)
    if fault == "missing":
        last.grad = None
    else:
        last.grad[0, 0] = torch.inf
    before = weights(model)
    words = {"missing": f"{side} is to move and has no", "infinite": f"the gradient of {side} or"}
    with pytest.raises(RunError, match=rf"altlora at 2: {words[fault]}"):
        optimizer.step()
    assert [n for n, p in weights(model).items() if not torch.equal(before[n], p)] == []
    assert not any(optimizer.state.values())


def test_a_copy_of_model_and_optimiser_goes_on_by_itself(monkeypatch):
    method = type(pr.method("altlora"))
    monkeypatch.setattr(method, "core", lambda self, site: StaticGate(site.r))
    model = adapted(plus=True)
    optimizer = pr.optimizer(model, 0.05)
    train(model, optimizer, 0, 3)
    twin, other = copy.deepcopy((model, optimizer))
    assert other.parts.keys() == optimizer.parts.keys()
    theirs = {id(p) for p in twin.parameters()}
    assert all(id(p) in theirs for part in other.parts.values() for p in part.state)
    (gates, own) = (o.parts["altlora"].gates for o in (other, optimizer))
    assert len(gates) == len(own) == 2
    assert {id(g) for g in gates.values()} <= theirs
    start = weights(twin)
    train(model, optimizer, 3, 1)
    assert [n for n, p in weights(twin).items() if not torch.equal(start[n], p)] == []
    # Without being attached: the copy knows its gates.
    other.zero_grad()
    backward(twin.train(), 3)
    other.step()
    for name, value in weights(model).items():
        assert torch.equal(weights(twin)[name], value), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"damping": -1.0}, "damping: got -1.0, expected a finite number >= 0"),
        ({"beta1": 1.0}, "beta1: got 1.0, expected 0 <= beta1 < 1"),
        ({"eps": 0.0}, "eps: got 0.0, expected > 0"),
        ({"first": "C"}, 'expected "A" or "B"'),
        ({"switch_every": 0}, "switch_every: got 0, expected >= 1"),
        ({"released": True}, "expected joint=True"),
        ({"joint": True, "switch_every": 2}, "leave it at 1"),
        ({"factor_lr": 0.0}, "factor_lr: got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        pr.method("altlora", **options)
