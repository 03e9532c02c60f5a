"""Few tokens: whatever of a layer changes between two calls, the next one sees it.

The second call of a layer starts kernels by addresses. In the interpreter a stand-in for the
starter of a compiled kernel does so: it makes tensors of the addresses that it is given.
"""

import ctypes
import os
from dataclasses import replace

import pytest
import torch
from torch import nn

import polyrank as pr
from polyrank.layers.linear import AdaptedLinear
from polyrank.layers.views import Frozen
from polyrank.testing import assert_close

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads it when it is imported, which other packages do.
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")
from polyrank.ops.rank_gate import Epilogue, few  # noqa: E402
from polyrank.ops.rank_gate.launch import Launch  # noqa: E402

METHODS = {
    "lora": pr.method("lora", r=4),
    "smora": pr.method("smora", r=8, k=2),
    "sora": pr.method("sora", r=4),
    "mora": pr.method("mora", r=4),
    "moe-lora": pr.method("moe-lora", r=8, experts=4, router="topk", k=2, aux=0.01),
}


class Block(nn.Module):
    """Three layers that read x, then one that reads their sum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, 20, bias=i == 1) for i in range(3))
        self.o = nn.Linear(20, 24)

    def forward(self, x):
        return self.o((self.q(x) + self.k(x) * self.v(x)).tanh())


def _at(place, dtype):
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(place), dtype=dtype)


@pytest.fixture
def repeats(monkeypatch):
    """Numbers of the layers of each call that was started by addresses."""
    found, again, call = [], few.Again.__call__, Launch.__call__

    def counted(self, x, given):
        outs = again(self, x, given)
        found.extend([] if outs is None else [len(outs)])
        return outs

    def interpreted(self, *tensors, seed=None):
        dtypes = [t.dtype for t in tensors]
        call(self, *tensors, seed=seed)

        def run(gx, gy, gz, stream, work, a, b, c, *places):
            places = places[: len(dtypes)]
            call(work, *(_at(p, d) for p, d in zip(places, dtypes, strict=True)))

        self.ready[-1] = (run, self, ())

    monkeypatch.setattr(few.Again, "__call__", counted)
    if not CUDA:
        monkeypatch.setattr(few, "_PLANS", {})
        monkeypatch.setattr(Launch, "__call__", interpreted)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: 0, raising=False)
    return found


@pytest.fixture
def ask(monkeypatch, repeats):
    """Asks a model for its answer without gradients, by a path."""

    def answer(model, x, path="triton"):
        monkeypatch.setenv("POLYRANK_OPS", path)
        with torch.no_grad():
            return model(x)

    return answer


def built(name):
    torch.manual_seed(0)
    model = pr.adapt(Block().to(DEVICE), METHODS[name], target_modules=["q", "k", "v", "o"], seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for view in views(model):
            for t in (view.A, view.B):
                t.copy_(torch.randn(t.shape, generator=rng) / 4)
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, AdaptedLinear)]


def views(model):
    return [layer.views["default"] for layer in layers(model)]


def inputs(*lead):
    return torch.linspace(-1, 1, 24 * torch.Size(lead).numel(), device=DEVICE).sin().view(*lead, 24)


def other(t, scale=1.5):
    """Numbers of the same shape."""
    return (t.detach() * scale + 0.1).contiguous()


def replaced(module, name):
    setattr(module, name, nn.Parameter(other(getattr(module, name)), requires_grad=False))


def changed(module, name):
    t = getattr(module, name)
    t.data = other(t)


def turned(t):
    """The same shape, but columns in one piece each."""
    t.data = other(t.t()).t()


def second(model):
    config = {"method": "lora", "options": {"r": 3}, "target_modules": ["q", "k", "v", "o"]}
    model.add_adapter("other", pr.PolyrankConfig(**config))
    for layer in layers(model):
        layer.views["other"].B.data.fill_(0.3)


def merged(model):
    layer = model.get_base_model().k
    layer.merge()
    # As an optimiser would after it, so that a second addition shows.
    layer.base_layer.weight.data += 0.1


def fewer(model):
    for view in views(model):
        view.A.data, view.B.data = view.A.data[:2], view.B.data[:, :2].contiguous()


def weighted(layer, view):
    view.core.balance_bias.data.fill_(0.3)
    view.core.bias_in_weight = True


def rebased(layer, view):
    layer.base_layer = nn.Linear(24, 20, device=DEVICE).requires_grad_(False)


def bank(model):
    layer = model.get_base_model().k
    view = layer.views["default"]
    layer.polyrank_bank["default"] = Frozen(other(view.A)[:2], other(view.B)[:, :2].contiguous())
    view.core.banked(2)


def on(change):
    """A change of the second layer, of which the first one computes the output."""
    return lambda model: change(model.get_base_model().k, model.get_base_model().k.views["default"])


def set_core(**values):
    return on(lambda layer, view: [setattr(view.core, n, value) for n, value in values.items()])


CHANGES = {
    "A in place": ("lora", on(lambda layer, v: v.A.data.mul_(2))),
    "data of A": ("lora", on(lambda layer, v: changed(v, "A"))),
    "another A": ("lora", on(lambda layer, v: replaced(layer.polyrank_A["default"], "weight"))),
    "A in half": ("lora", on(lambda layer, v: setattr(v.A, "data", other(v.A).half()))),
    "data of B": ("smora", on(lambda layer, v: changed(v, "B"))),
    "another B": ("lora", on(lambda layer, v: replaced(layer.polyrank_B["default"], "weight"))),
    "columns of B apart": ("lora", on(lambda layer, v: turned(v.B))),
    "fewer ranks": ("lora", fewer),
    "W in place": ("lora", on(lambda layer, v: layer.base_layer.weight.data.mul_(2))),
    "data of W": ("lora", on(lambda layer, v: changed(layer.base_layer, "weight"))),
    "another W": ("smora", on(lambda layer, v: replaced(layer.base_layer, "weight"))),
    "another b": ("lora", on(lambda layer, v: replaced(layer.base_layer, "bias"))),
    "no b": ("lora", on(lambda layer, v: setattr(layer.base_layer, "bias", None))),
    "another base": ("lora", on(rebased)),
    "hook": (
        "lora",
        on(lambda layer, v: layer.base_layer.register_forward_hook(lambda m, a, y: y + 1)),
    ),
    "pre-hook": (
        "lora",
        on(lambda layer, v: layer.base_layer.register_forward_pre_hook(lambda m, a: (a[0] + 1,))),
    ),
    "another forward": (
        "lora",
        on(lambda layer, v: setattr(layer.base_layer, "forward", lambda x: x[..., :20] + 1)),
    ),
    "scale": ("lora", on(lambda layer, v: setattr(v, "scale", 5.0))),
    "bank": ("lora", bank),
    "merged": ("lora", merged),
    "another adapter": ("smora", lambda model: (second(model), model.set_adapter("other"))),
    "two adapters": (
        "lora",
        lambda model: (second(model), model.base_model.set_adapter(["default", "other"])),
    ),
    "no adapter": ("smora", lambda model: model.base_model.disable_adapter_layers()),
    "k": ("smora", set_core(k=5)),
    "total": ("smora", set_core(total=7.0)),
    "score": ("smora", set_core(score="softmax")),
    "balance bias in the weight": ("smora", on(weighted)),
    "data of the balance bias": (
        "smora",
        on(lambda layer, v: setattr(v.core.balance_bias, "data", torch.arange(8.0, device=DEVICE))),
    ),
    "balance bias in place": (
        "smora",
        on(lambda layer, v: v.core.balance_bias.data.copy_(torch.arange(8.0))),
    ),
    "k of experts": (
        "moe-lora",
        on(lambda layer, v: setattr(v.core, "choice", replace(v.core.choice, k=1))),
    ),
    "another router": ("smora", on(lambda layer, v: replaced(v.core.router, "weight"))),
    "data of the gate": ("sora", on(lambda layer, v: changed(v.core, "gate"))),
    "another gate": ("sora", on(lambda layer, v: replaced(v.core, "gate"))),
    "another form": ("mora", set_core(serving=Epilogue(kind="self", k=1))),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_seen_by_the_next_call(ask, repeats, change):
    name, act = CHANGES[change]
    model, x = repeating(name, ask, repeats)
    before = ask(model, x)
    act(model)
    found = [ask(model, x) for _ in range(2)]
    expected = ask(model, x, "eager")
    assert float((expected - before).abs().max()) > 1e-2
    for each in found:
        assert_close(each, expected)


def repeating(name, ask, repeats):
    """A model and an input of which calls repeat."""
    model, x = built(name), inputs(1, 2)
    for _ in range(3):
        ask(model, x)
    repeats.clear()
    ask(model, x)
    assert repeats == [3, 1]
    repeats.clear()
    return model, x


def test_a_shadow_is_refused_after_calls_without(ask, repeats):
    model, x = repeating("lora", ask, repeats)
    view = model.get_base_model().k.views["default"]
    view.shadow = (other(view.A), other(view.B), None)
    with pytest.raises(pr.ConfigError, match="shadow"):
        ask(model, x)


def test_a_training_forward_has_gradients_and_counts(ask, repeats):
    model, x = repeating("smora", ask, repeats)
    model.train()
    model(x).sum().backward()
    assert repeats == []
    assert [int(v.core.counts.sum()) for v in views(model)] == [2 * 2] * 4
    assert all(float(v.A.grad.abs().max()) > 0 for v in views(model))


def test_autocast_to_another_dtype_is_heeded(ask, repeats):
    model, x = repeating("lora", ask, repeats)
    with torch.autocast(DEVICE, torch.float16):
        found, expected = ask(model, x), ask(model, x, "eager")
    assert repeats == []
    assert found.dtype == torch.float16
    assert_close(found, expected)


@pytest.mark.parametrize("lies", ["at an odd place", "apart"])
def test_inputs_that_lie_elsewhere(ask, repeats, lies):
    model, x = repeating("smora", ask, repeats)
    wide = torch.zeros(1, 2, 26, device=DEVICE)
    moved = wide.flatten()[1:49].view(1, 2, 24) if lies == "at an odd place" else wide[..., :24]
    moved.copy_(x)
    assert_close(ask(model, moved), ask(model, x, "eager"))
    # What the last layer reads lies as before.
    assert repeats == [1]


def test_rows_that_came_apart_are_not_awaited_again(ask):
    model, x = built("smora"), inputs(2, 1)
    apart = torch.zeros(2, 5, 24, device=DEVICE)[:, -1:]
    apart.copy_(x)
    for given in (apart, x, apart, x, x):
        assert_close(ask(model, given), ask(model, x, "eager"))


@pytest.mark.parametrize("name", list(METHODS))
def test_calls_that_repeat_equal_the_path_without_kernels(ask, repeats, name):
    model = built(name)
    for lead in ((1, 1), (1, 1), (1, 1), (2, 3), (2, 3), (7,), (7,), (1, 1), (1, 1)):
        x = inputs(*lead)
        assert_close(ask(model, x), ask(model, x, "eager"))
    assert repeats == [1, *[3, 1] * 4]
