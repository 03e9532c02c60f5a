"""The fused road: when it is taken, which layers share it, and that outputs are the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.layers import fused
from polyrank.layers.linear import AdaptedLinear
from polyrank.ops.rank_gate import naive
from polyrank.ops.rank_gate.epilogue import KINDS
from polyrank.ops.rank_gate.projection import INTERPRETED
from polyrank.testing import assert_close


class Block(nn.Module):
    """Three layers that read x, then one that reads their sum; `used` says which are called."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, n, bias=n == 4) for n in (4, 4, 4))
        self.o = nn.Linear(4, 5)
        self.used = "qkv"

    def forward(self, x):
        return self.o(sum(getattr(self, name)(x) for name in self.used).tanh())


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="kernels can run here")
@pytest.mark.parametrize(("name", "options"), [("lora", {}), ("smora", {"k": 2})])
def test_kernels_that_are_forced_and_cannot_run_are_an_error(monkeypatch, name, options):
    model = pr.adapt(Block(), pr.method(name, r=4, **options), target_modules=["q", "o"], seed=0)
    x = torch.randn(2, 6)
    expected = model(x)
    monkeypatch.setenv("POLYRANK_OPS", "triton")
    with pytest.raises(ConfigError, match=r"POLYRANK_OPS: got 'triton', but .*unset it"):
        model(x)
    monkeypatch.setenv("POLYRANK_OPS", "")
    assert torch.equal(model(x), expected)


@pytest.fixture
def calls(monkeypatch):
    """Stands in for the kernels by the reference, and notes how many layers a call serves."""
    found = []

    def linears(x, projections, dropout=0.0, seed=0, mask=None, memo=None):
        found.append(len(projections))

        def one(p, count):
            return naive.rank_gate(
                F.linear(x, p.W, p.b), x, p.A, p.rows, p.B, p.epilogue, p.scale, p.live_from,
                None, p.row_scale, dropout, seed, mask, count=count,
            )  # fmt: skip

        # As in the operator, counting saves nothing for backward.
        with torch.no_grad():
            counts = [one(p, p.counts)[1] for p in projections]
        return [one(p, False)[0] for p in projections], counts

    monkeypatch.setattr(fused, "linears", linears)
    monkeypatch.setattr(fused, "reach", lambda x: (256, KINDS))
    return found


def adapted(method=None, **options):
    torch.manual_seed(0)
    method = method or pr.method("smora", r=4, k=2, **options)
    return pr.adapt(Block(), method, target_modules=["q", "k", "v", "o"], seed=0)


def layers(model):
    return [m for m in model.modules() if isinstance(m, AdaptedLinear)]


def filled(model):
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for view in (layer.views["default"] for layer in layers(model)):
            view.B.copy_(torch.randn(view.B.shape, generator=rng))
    return model


def step(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return out, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["lora", "smora"])
def test_siblings_are_computed_together_from_the_second_forward(calls, name, monkeypatch):
    options = {"k": 2} if name == "smora" else {}
    model = filled(adapted(pr.method(name, r=4, **options)))
    x = torch.randn(3, 6, requires_grad=True)
    first, grads = step(model, x)
    assert calls == [1, 1, 1, 1]
    second, again = step(model, x)
    assert calls[4:] == [3, 1]
    monkeypatch.setattr(fused, "reach", lambda x: (0, ()))
    plain, expected = step(model, x)
    assert len(calls) == 6
    for out, found in ((first, grads), (second, again)):
        assert_close(out, plain)
        assert found.keys() == expected.keys()
        for key, grad in found.items():
            assert_close(grad, expected[key])


def test_tokens_are_counted_once_however_layers_are_computed(calls):
    model = adapted()
    for _ in range(3):
        step(model, torch.randn(5, 6))
    counts = [layer.views["default"].core.counts for layer in layers(model)]
    assert [int(c.sum()) for c in counts] == [3 * 5 * 2] * 4


def test_a_layer_that_is_no_longer_asked_is_no_longer_computed(calls):
    model = filled(adapted())
    block = model.get_base_model()
    for _ in range(2):
        step(model, torch.randn(3, 6))
    block.used = "qk"
    for _ in range(fused._PATIENCE + 1):
        step(model, torch.randn(3, 6))
    assert calls[-2:] == [2, 1]
    assert len(block.q.sharing.followers) == 1


def test_x_that_changed_in_between_is_read_again(calls):
    model = filled(adapted()).eval()
    block = model.get_base_model()
    with torch.no_grad():
        model(torch.randn(3, 6))
        x = torch.randn(3, 6)
        block.q(x)
        x.add_(1.0)
        found = block.k(x)
        expected = copy.deepcopy(model).get_base_model().k(x.clone())
    assert_close(found, expected)


@pytest.mark.parametrize("change", ["hook", "trained", "dropout", "view", "two", "merged"])
def test_what_cannot_be_fused_goes_the_ordinary_way(calls, change):
    method = pr.method("lora", r=2, dropout=0.5 if change == "dropout" else 0.0)
    model = filled(adapted(method)).eval()
    x = torch.randn(3, 6)
    for _ in range(2):
        model(x)
    before = len(calls)
    block = model.get_base_model()
    if change == "hook":
        block.q.base_layer.register_forward_hook(lambda *a: None)
    elif change == "trained":
        block.q.base_layer.weight.requires_grad_(True)
    elif change == "dropout":
        model.train()
    elif change == "view":
        with model.disable_adapter():
            model(x)
        assert len(calls) == before
        return
    elif change == "two":
        config = {"method": "lora", "options": {"r": 2}, "target_modules": ["q", "k", "v", "o"]}
        model.add_adapter("other", pr.PolyrankConfig(**config))
        model.base_model.set_adapter(["default", "other"])
    else:
        block.q.merge()
    model(x)
    served = calls[before:]
    expected = {"hook": 3, "trained": 3, "dropout": 4, "two": 0, "merged": 3}[change]
    assert sum(served) == expected
    if change == "dropout":
        assert served == [1, 1, 1, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_segment_recomputes_what_it_computed(calls, reentrant):
    model = filled(adapted())
    block = model.get_base_model()
    x = torch.randn(3, 6, requires_grad=True)
    expected, grads = step(model, x)
    whole = block.forward
    block.forward = lambda x: checkpoint(whole, x, use_reentrant=reentrant)
    for _ in range(3):
        out, found = step(model, x)
        assert_close(out, expected)
        for key, grad in grads.items():
            assert_close(found[key], grad)


def test_a_copy_shares_nothing_with_the_original(calls):
    model = filled(adapted())
    for _ in range(2):
        step(model, torch.randn(3, 6))
    twin = copy.deepcopy(model)
    assert all(not layer.sharing.followers for layer in layers(twin))
    x = torch.randn(3, 6)
    assert_close(twin(x), model(x))
