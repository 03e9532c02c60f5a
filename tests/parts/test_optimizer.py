"""One optimiser, several update rules: as many separate ones, and what schedulers and files see."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError
from polyrank.frame import Group
from polyrank.parts import optimizer as module
from polyrank.parts.optimizer import GroupedOptimizer, build_optimizer, register_update
from polyrank.parts.sparsify import AdamGate

NAMES = ("adamw", "adam-gate")


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7))


def groups(pair, lr=0.1):
    first, second = pair
    return [
        {"params": [first], "lr": lr, "weight_decay": 0.01, "update": "adamw"},
        {"params": [second], "lr": lr / 2, "weight_decay": 0.0, "update": "sgd", "momentum": 0.9},
    ]


def grads(pair, seed):
    rng = torch.Generator().manual_seed(seed)
    for p in pair:
        p.grad = torch.randn(p.shape, generator=rng)


def twin(pair):
    return tuple(nn.Parameter(p.detach().clone()) for p in pair)


def test_equals_separate_optimisers_under_a_scheduler(pair):
    other = twin(pair)
    made = build_optimizer(groups(pair), AdamW, {"betas": (0.8, 0.9)})
    alone = [
        AdamW([other[0]], lr=0.1, weight_decay=0.01, betas=(0.8, 0.9)),
        SGD([other[1]], lr=0.05, momentum=0.9),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)) for o in (made, *alone)
    ]
    for index in range(4):
        grads(pair, index)
        grads(other, index)
        for one in (made, *alone):
            one.step()
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    assert len(made.state_dict()["state"]) == 2


def test_state_goes_through_a_file_and_on_to_the_same_bits(pair):
    made = build_optimizer(groups(pair), AdamW, {})
    grads(pair, 0)
    made.step()
    other = twin(pair)
    again = build_optimizer(groups(other), AdamW, {})
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    for index in (1, 2):
        for params, one in ((pair, made), (other, again)):
            grads(params, index)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))


def test_a_step_fires_the_hooks_of_all_optimisers_once(pair):
    seen = []
    made = build_optimizer(groups(pair), AdamW, {})
    handle = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(type(optimizer))
    )
    try:
        grads(pair, 0)
        made.step()
    finally:
        handle.remove()
    assert seen == [GroupedOptimizer]


def test_groups_without_an_update_of_their_own_need_no_grouping(pair):
    plain = [{"params": list(pair), "lr": 0.1, "update": "adamw"}]
    assert type(build_optimizer(plain, SGD, {})) is SGD


def test_an_update_that_nobody_serves_is_refused(pair):
    found = groups(pair)
    found[1]["update"] = "sdg"
    with pytest.raises(ConfigError, match="did you mean 'sgd'"):
        build_optimizer(found, AdamW, {})


def test_later_groups_are_served_and_get_their_defaults(pair):
    made = build_optimizer(groups(pair), AdamW, {})
    late = nn.Parameter(torch.ones(2))
    made.add_param_group({"params": [late], "lr": 0.5, "update": "sgd"})
    late.grad = torch.ones(2)
    made.step()
    assert torch.equal(late.detach(), torch.full((2,), 0.5))
    with pytest.raises(ConfigError, match="build it anew"):
        made.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1, "update": "other"})


def test_a_later_group_keeps_the_defaults_of_its_own_update(pair):
    made = build_optimizer(groups(pair), AdamW, {"weight_decay": 0.3})
    made.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "update": "sgd"})
    late = made.param_groups[-1]
    assert (late["weight_decay"], late["momentum"]) == (0, 0)
    before = len(made.param_groups)
    with pytest.raises(ConfigError, match="build it anew"):
        made.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1, "update": "other"})
    assert len(made.param_groups) == before


def test_schedulers_that_look_at_the_defaults_are_served(pair):
    other = twin(pair)
    mine = [{"params": [p], "lr": 0.1, "update": u} for p, u in zip(pair, NAMES, strict=True)]
    made = build_optimizer(mine, AdamW, {})
    alone = [AdamW([other[0]], lr=0.1), AdamGate([{"params": [other[1]], "lr": 0.1}])]
    cycles = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (made, *alone)]
    betas = []
    for index in range(8):
        grads(pair, index)
        grads(other, index)
        for one in (made, *alone):
            one.step()
        for cycle in cycles:
            cycle.step()
        betas.append(made.param_groups[0]["betas"][0])
    assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
    # Its default is to turn momentum against the rate.
    assert min(betas) < 0.86 < max(betas)


def test_a_scheduler_that_turns_what_some_group_lacks_is_refused_by_its_own_words(pair):
    made = build_optimizer(groups(pair), AdamW, {})
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=9)
    calm = torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=9, cycle_momentum=False)
    grads(pair, 0)
    made.step()
    calm.step()
    assert made.param_groups[0]["lr"] < 0.1


def test_a_scheduler_that_watches_a_score_halves_all_groups(pair):
    made = build_optimizer(groups(pair), AdamW, {})
    watch = torch.optim.lr_scheduler.ReduceLROnPlateau(made, factor=0.5, patience=0)
    for _ in range(2):
        grads(pair, 0)
        made.step()
        watch.step(1.0)
    assert [group["lr"] for group in made.param_groups] == [0.05, 0.025]


def test_a_checkpoint_must_agree_on_what_an_update_calls_fixed(pair, monkeypatch):
    class Mine(SGD):
        fixed = frozenset({"turn"})

    monkeypatch.setitem(module.UPDATES, "mine", Mine)
    found = groups(pair)
    found[1].update(update="mine", turn="first")
    made = build_optimizer(found, AdamW, {})
    kept = made.state_dict()
    made.load_state_dict(kept)
    kept["param_groups"][1]["turn"] = "second"
    with pytest.raises(CheckpointError, match="turn='second' of the update 'mine', and this run"):
        made.load_state_dict(kept)


def test_a_name_is_given_once(monkeypatch):
    monkeypatch.setattr(module, "UPDATES", {})

    class Mine(Optimizer):
        pass

    register_update("mine")(Mine)
    register_update("mine")(Mine)
    for name in ("mine", "adamw"):
        with pytest.raises(ValueError, match="taken"):
            register_update(name)(SGD)


def test_a_method_that_asks_for_an_update_gets_it_everywhere(monkeypatch):
    cls = type(pr.method("lora"))

    def asking(self, adapter, args=None):
        roles = adapter.roles()
        return [Group(params=roles["A"]), Group(params=roles["B"], update="sgd", lr=2.0)]

    monkeypatch.setattr(cls, "groups", asking)
    torch.manual_seed(0)
    model = pr.adapt(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), "lora", ["0", "1"])
    with pytest.raises(ConfigError, match=r"polyrank\.optimizer"):
        pr.attach(AdamW(pr.parameter_groups(model, 0.1)), model)
    made = pr.optimizer(model, 0.1, betas=(0.5, 0.9))
    attached = pr.attach(made, model)
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(torch.randn(3, 4)).sum().backward()
    made.step()
    attached.detach()
    for name, param in model.named_parameters():
        if "polyrank_B" in name:
            expected = before[name] - 0.2 * param.grad
            assert torch.equal(param.detach(), expected), name


@pytest.mark.parametrize("wrong", ["1e-4", True, float("nan"), -1.0, None], ids=repr)
def test_a_rate_that_is_no_number_is_refused_with_a_remedy(wrong):
    model = pr.adapt(nn.Sequential(nn.Linear(4, 6)), "lora", ["0"])
    with pytest.raises(ConfigError, match=r"^lr: got .*, expected a finite number >= 0; 1e-4 is"):
        pr.optimizer(model, wrong)
    with pytest.raises(ConfigError) as caught:
        pr.optimizer(model, "1e-4", weight_decay="0.1")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "lr",
        "weight_decay",
    ]


def test_a_rate_may_be_a_tensor():
    model = pr.adapt(nn.Sequential(nn.Linear(4, 6)), "lora", ["0"])
    assert float(pr.optimizer(model, torch.tensor(0.5)).param_groups[0]["lr"]) == 0.5
