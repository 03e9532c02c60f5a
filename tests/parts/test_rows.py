"""AdamW over rows: equal to AdamW where all is selected, and still where nothing is."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam
from torch.utils._python_dispatch import TorchDispatchMode

import polyrank as pr
from polyrank.parts.optimizer import build_optimizer
from polyrank.parts.rows import RowsAdamW
from polyrank.testing import assert_close

SHAPE = (5, 7)
CHOICES = [(0, 3), (0, 1), (2, 4), (0, 5), (0, 3)]


def made(axis, dtype=torch.float64, kind=RowsAdamW, **options):
    torch.manual_seed(0)
    shape = SHAPE if axis == 0 else SHAPE[::-1]
    param = nn.Parameter(torch.randn(shape, dtype=dtype))
    chosen = {"lr": 0.1, "weight_decay": 0.2, **options}
    return param, kind([param], **({"axis": axis} if kind is RowsAdamW else {}), **chosen)


def grad(param, seed):
    rng = torch.Generator().manual_seed(seed)
    param.grad = torch.randn(param.shape, generator=rng, dtype=param.dtype)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_all_rows_selected_it_is_adamw_bit_for_bit(axis, dtype):
    ours, theirs = made(axis, dtype), made(axis, dtype, AdamW, foreach=False)
    for seed in range(6):
        for param, optimizer in (ours, theirs):
            grad(param, seed)
            optimizer.step()
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_every_row_is_under_an_adamw_of_its_own_that_steps_when_it_is_selected(axis):
    param, optimizer = made(axis)
    rows = [nn.Parameter(row.detach().clone()) for row in param.unbind(axis)]
    alone = [AdamW([row], lr=0.1, weight_decay=0.2) for row in rows]
    for seed, (first, last) in enumerate(CHOICES):
        grad(param, seed)
        optimizer.param_groups[0].update(first=first, last=last)
        optimizer.step()
        for number in range(first, last):
            rows[number].grad = param.grad.select(axis, number)
            alone[number].step()
        assert_close(param, torch.stack([row.detach() for row in rows], dim=axis))
    counts = optimizer.state[param]["step"].tolist()
    assert counts == [sum(a <= n < b for a, b in CHOICES) for n in range(5)]


@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_not_selected_keeps_its_bits_and_is_not_even_read(axis):
    param, optimizer = made(axis)
    grad(param, 0)
    optimizer.step()
    before = {name: t.clone() for name, t in optimizer.state[param].items()} | {"p": param.clone()}
    state = optimizer.state[param]
    with torch.no_grad():
        for held in (param, state["exp_avg"], state["exp_avg_sq"], param.grad):
            held.narrow(axis, 0, 2).fill_(torch.nan)
    optimizer.param_groups[0].update(first=2, last=3)
    optimizer.step()
    for name, held in [("p", param), ("exp_avg", state["exp_avg"])]:
        assert held.narrow(axis, 0, 2).isnan().all()
        assert torch.equal(held.narrow(axis, 3, 2), before[name].narrow(axis, 3, 2))
        assert held.select(axis, 2).isfinite().all()
        assert not torch.equal(held.select(axis, 2), before[name].select(axis, 2))
    assert state["step"].tolist() == [1, 1, 2, 1, 1]


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation takes or makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        views = ("narrow", "slice", "detach", "select")
        if not any(name in str(func) for name in views):
            flat = torch.utils._pytree.tree_leaves((args, found))
            sizes = [t.numel() for t in flat if isinstance(t, torch.Tensor)]
            self.size = max([self.size, *sizes])
        return found


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_of_one_row_touches_one_row(axis):
    param, optimizer = made(axis)
    for seed in range(2):
        grad(param, seed)
        optimizer.step()
    optimizer.param_groups[0].update(first=3, last=4)
    with Largest() as watched:
        optimizer.step()
    assert watched.size == 7
    optimizer.param_groups[0].update(first=0, last=5)
    with Largest() as watched:
        optimizer.step()
    assert watched.size == 35


def test_state_goes_through_a_file_and_on_to_the_same_bits():
    (param, optimizer), (other, _) = made(0), made(0)
    optimizer.param_groups[0].update(first=1, last=3)
    grad(param, 0)
    optimizer.step()
    other.data.copy_(param)
    again = RowsAdamW([other], axis=0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[other]["step"].tolist() == [0, 1, 1, 0, 0]
    for seed, (held, one) in itertools.product((1, 2), ((param, optimizer), (other, again))):
        grad(held, seed)
        one.param_groups[0].update(first=0, last=seed + 1)
        one.step()
    assert torch.equal(param, other)


def test_no_row_no_gradient_no_step():
    param, optimizer = made(0)
    before = param.detach().clone()
    optimizer.step()
    grad(param, 0)
    optimizer.param_groups[0].update(first=2, last=2)
    optimizer.step()
    assert torch.equal(param, before)


def test_it_takes_the_runs_own_betas_and_eps_and_leaves_the_rest():
    param, other = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(2))
    groups = [
        {"params": [param], "lr": 0.1, "update": "rows"},
        {"params": [other], "lr": 0.1, "update": "adamw"},
    ]
    options = {"betas": (0.5, 0.6), "eps": 1e-3, "foreach": False}
    found = build_optimizer(groups, AdamW, options).parts
    assert found["rows"].defaults["betas"] == (0.5, 0.6)
    assert found["rows"].defaults["eps"] == 1e-3
    assert found["adamw"].defaults["foreach"] is False


@pytest.mark.parametrize(
    ("kind", "options", "decay", "says"),
    [
        (AdamW, {"fused": True}, 0.1, ""),
        (AdamW, {}, 0.1, ""),
        (Adam, {}, 0.0, ""),
        (Adam, {"decoupled_weight_decay": True}, 0.1, ""),
        (Adam, {}, 0.1, r"in for Adam with weight_decay=0\.1, which it adds to gradients"),
        (SGD, {}, 0.0, "in for SGD, expected Adam or AdamW"),
        (NAdam, {}, 0.0, "in for NAdam, expected Adam or AdamW"),
        (AdamW, {"amsgrad": True}, 0.0, "in for AdamW with amsgrad=True"),
        (AdamW, {"maximize": True}, 0.0, "in for AdamW with maximize=True"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_it_stands_in_for_adamw_and_for_nothing_else(kind, options, decay, says):
    net = nn.Sequential(nn.Linear(3, 4))
    model = pr.adapt(net, pr.method("dylora", r=2), ["0"], seed=0)
    if says:
        with pytest.raises(pr.ConfigError, match=says + r'.*update="gradient"'):
            pr.optimizer(model, 0.1, decay, kind=kind, **options)
    else:
        parts = pr.optimizer(model, 0.1, decay, kind=kind, **options).parts
        assert list(parts) == ["rows"]
    model = pr.adapt(
        nn.Sequential(nn.Linear(3, 4)), pr.method("dylora", r=2, update="gradient"), ["0"]
    )
    assert type(pr.optimizer(model, 0.1, decay, kind=kind, **options)) is kind
