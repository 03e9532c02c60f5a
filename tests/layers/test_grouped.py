"""A batch of many adapters by stacked products equals one adapter at a time."""

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.layers import grouped
from polyrank.testing import assert_close

METHODS = {
    "lora": pr.method("lora", r=3),
    "smora": pr.method("smora", r=6, k=2),
    "smora-block": pr.method("smora", r=6, k=4, block=2),
    "sora": pr.method("sora", r=4),
}
NAMES = ["one", "two", "three", "four", "five"]


def model_of(method):
    rng = torch.Generator().manual_seed(0)
    base = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    config = {"method": method.name, "options": method.options(), "target_modules": ["0", "2"]}
    model = pr.adapt(base, method, target_modules=["0", "2"], adapter_name="one", seed=0)
    for name in NAMES[1:]:
        model.add_adapter(name, pr.PolyrankConfig(**config, seed=len(name)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "polyrank" in name:
                p.copy_(torch.randn(p.shape, generator=rng) / 2)
    return model.eval()


@pytest.fixture(params=list(METHODS))
def model(request):
    return model_of(METHODS[request.param])


@pytest.mark.parametrize("tokens", [None, 4])
def test_each_sample_has_its_own_adapter(model, tokens, monkeypatch):
    names = ["three", "__base__", "one", "five", "two", "four", "one"]
    x = torch.randn(len(names), *(() if tokens is None else (tokens,)), 7)
    calls = []
    plain = grouped.grouped
    monkeypatch.setattr(
        "polyrank.layers.linear.grouped", lambda *a: (calls.append(plain(*a)), calls[-1])[1]
    )
    with torch.no_grad():
        found = model(x, adapter_names=names)
        assert len(calls) == 2
        assert all(call is not None for call in calls)
        for index, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[index : index + 1])
            else:
                model.set_adapter(name)
                expected = model(x[index : index + 1])
            assert_close(found[index], expected[0])


def test_adapters_that_differ_take_turns(monkeypatch):
    model = model_of(METHODS["lora"])
    other = {"method": "lora", "options": {"r": 2}, "target_modules": ["0", "2"]}
    model.add_adapter("six", pr.PolyrankConfig(**other))
    results = []
    plain = grouped.grouped
    monkeypatch.setattr(
        "polyrank.layers.linear.grouped", lambda *a: (results.append(plain(*a)), results[-1])[1]
    )
    with torch.no_grad():
        model.eval()(torch.randn(6, 7), adapter_names=[*NAMES, "six"])
    assert results == [None, None]
