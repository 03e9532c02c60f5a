"""Statistics for starts from data: what they equal, what they leave behind, what they cost."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import polyrank as pr
from polyrank.errors import ConfigError, InertError
from polyrank.frame import Init
from polyrank.layers import AdaptedLinear, adapter_of, gather, hook_of, redraw, statistics
from polyrank.parts.starts import GradientStart
from polyrank.testing import MODELS, assert_close

FAMILIES = ["llama", "gpt2", "t5", "bert", "clip"]


class Gradient(Init):
    """Wants the gradient and does nothing with it."""

    wants = frozenset({"weight_grad"})

    def __init__(self, reduction="mean", **limits):
        self.reduction = reduction
        self.training = False
        self.__dict__.update(limits)


def adapted(name="llama", dtype=torch.float32, method="lora-ga", **options):
    tiny = MODELS[name]
    made = pr.method(method, **{"r": 1, **options})
    return tiny, pr.adapt(tiny.build(dtype), made, seed=1).eval()


def by_hand(name, batches, dtype=torch.float32):
    """The mean over batches of autograd's gradients by the base weights, (d_out, d_in)."""
    tiny = MODELS[name]
    model = tiny.build(dtype)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            grad = module.weight.grad
            found[path] = grad.T if type(module).__name__ == "Conv1D" else grad
    return found


def batches_of(tiny, count=3, dtype=torch.float32):
    return [tiny.inputs(seed, dtype) for seed in range(count)]


def everything(model):
    hook = hook_of(model)
    flow = hook.flow
    return {
        "modes": [m.training for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "bits": {n: p.detach().clone() for n, p in model.named_parameters()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "flow": (flow.mask, flow.condition, flow.learning, flow.view, int(flow.draw)),
        "rng": torch.get_rng_state(),
        "gathering": hook.gathering,
        "precision": torch.get_float32_matmul_precision(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_the_mean_over_batches_of_autograds(name):
    tiny, model = adapted(name, torch.float64)
    batches = batches_of(tiny, dtype=torch.float64)
    stats = gather(model, batches, None, Gradient())
    expected = by_hand(name, batches, torch.float64)
    for view in adapter_of(model).layers:
        found, want = stats[view.site.path]["weight_grad"], expected[view.site.path]
        assert_close(found, want, tol=1e-6, reason="the models' own losses are in fp32")
        assert stats[view.site.path]["weight_grad"].shape == (view.site.d_out, view.site.d_in)


def test_a_gradient_of_fp32_is_right_to_fp32_and_of_bf16_is_summed_in_fp32():
    tiny, model = adapted("llama")
    stats = gather(model, batches_of(tiny), None, Gradient())
    expected = by_hand("llama", batches_of(tiny))
    for path, stat in stats.items():
        assert_close(stat["weight_grad"], expected[path])
    _, half = adapted("llama", torch.bfloat16)
    for stat in gather(half, batches_of(tiny), None, Gradient()).values():
        assert stat["weight_grad"].dtype == torch.float32
    dy, x = torch.ones(3000, 2, dtype=torch.bfloat16), torch.ones(3000, 3, dtype=torch.bfloat16)
    assert torch.equal(statistics.outer(dy, x), torch.full((2, 3), 3000.0))


def test_the_order_of_hooks_and_batches_does_not_matter():
    tiny, model = adapted("llama", torch.float64)
    batches = batches_of(tiny, dtype=torch.float64)
    first = gather(model, batches, None, Gradient())
    calls = []
    layers = [view.module for view in adapter_of(model).layers]
    # Somebody else's hooks, before and behind those of the statistics.
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in layers[::-1]]
    again = gather(model, batches[::-1], None, Gradient())
    for handle in handles:
        handle.remove()
    assert len(calls) == len(layers) * len(batches)
    for path, stat in first.items():
        assert_close(again[path]["weight_grad"], stat["weight_grad"])


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_sum_over_samples_does_not_depend_on_the_size_of_batches(name):
    tiny, model = adapted(name, torch.float64)
    rows = tiny.inputs(0, torch.float64)
    singles = [{key: value[i : i + 1] for key, value in rows.items()} for i in range(3)]
    uneven = [{key: value[:2] for key, value in rows.items()}, singles[2]]
    whole = gather(model, [rows], None, Gradient("sum"))
    for batches in (singles, uneven):
        parts = gather(model, batches, None, Gradient("sum"))
        for path, stat in whole.items():
            found, want = parts[path]["weight_grad"], stat["weight_grad"]
            assert_close(found, want, tol=1e-6, reason="the models' own losses are in fp32")
            assert parts[path]["count"] == stat["count"]
    mean = gather(model, [rows], None, Gradient())
    stat = whole[next(iter(whole))]
    expected = stat["count"] * mean[next(iter(whole))]["weight_grad"]
    reason = "the models' own losses are in fp32"
    assert_close(stat["weight_grad"], expected, tol=1e-6, reason=reason)


@pytest.mark.parametrize("samples", [1, 4, 5])
def test_exactly_so_many_rows_are_looked_at(samples):
    tiny, model = adapted("bert")
    seen = []

    def loss(model, batch):
        seen.append(len(batch["labels"]))
        return model(**batch).loss

    gather(model, batches_of(tiny), loss, Gradient("sum", samples=samples))
    assert sum(seen) == samples
    with pytest.raises(ConfigError, match=r"hold 1 rows too few, expected 10; give more"):
        gather(model, batches_of(tiny), loss, Gradient("sum", samples=10))


def test_at_most_so_many_batches_are_looked_at():
    tiny, model = adapted("bert")
    seen = []
    gather(model, batches_of(tiny), lambda m, b: seen.append(1) or m(**b).loss, Gradient(batches=2))
    assert len(seen) == 2


@pytest.mark.parametrize("raises", [False, True])
def test_everything_is_put_back_even_if_the_loss_raises(raises):
    tiny, model = adapted("llama")
    model.train()
    model.base_model.model.model.layers[1].eval()
    layer = adapter_of(model).layers[0]
    layer.B.requires_grad_(False)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    layer.A.grad = torch.ones_like(layer.A)
    before = everything(model)

    def loss(model, batch):
        torch.rand(3)
        value = model(**batch).loss
        if raises:
            raise ValueError("no loss today")
        return value

    if raises:
        with pytest.raises(ValueError, match="no loss today"):
            gather(model, batches_of(tiny), loss, Gradient(training=True))
    else:
        gather(model, batches_of(tiny), loss, Gradient(training=True))
    after = everything(model)
    assert [key for key in before if not same(before[key], after[key])] == []


def test_one_layers_gradient_is_on_the_device_at_a_time(monkeypatch):
    tiny, model = adapted("llama")
    alive, most, made = [], [], statistics.outer

    def outer(dy, x):
        # On a CPU the copy to the host is the tensor itself, so that this one stands for a device.
        most.append(sum(ref() is not None for ref in alive))
        found = made(dy, x)
        alive.append(weakref.ref(found))
        return _Away(found)

    class _Away:
        def __init__(self, tensor):
            self.tensor = tensor

        def cpu(self):
            return self.tensor.clone()

    monkeypatch.setattr(statistics, "outer", outer)
    gc.disable()
    try:
        gather(model, batches_of(tiny), None, Gradient())
    finally:
        gc.enable()
    assert len(most) == 3 * len(adapter_of(model).layers)
    assert max(most) == 0


def test_wide_copies_are_of_a_part_of_the_tokens(monkeypatch):
    x, dy = torch.randn(7, 9, 4), torch.randn(7, 9, 3)
    whole = statistics.outer(dy.double(), x.double())
    monkeypatch.setattr(statistics, "LEAST", 5)
    assert_close(statistics.outer(dy, x), whole)


class _Allocated(TorchDispatchMode):
    """Counts the bytes of what is made inside and still lives; views of older tensors are free."""

    def __init__(self, *outside):
        super().__init__()
        self.old = {t.untyped_storage()._cdata for t in outside}
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.old:
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        living = (size for ref, size in self.made.values() if not ref.expired())
        self.peak = max(self.peak, sum(living))
        return found


@pytest.mark.parametrize(
    ("sides", "wide"),
    # Both sides long, so that a share of the gradient counts; and short, so that 64 tokens do.
    [((2048, 2304), 4 * 2048 * 2304 // 16), ((96, 40), 64 * 4 * (96 + 40))],
    ids=["share", "least"],
)
def test_a_gradient_takes_its_own_bytes_and_a_small_share(sides, wide):
    dy, x = (torch.ones(2, 150, d, dtype=torch.bfloat16) for d in sides)
    with _Allocated(dy, x) as counted:
        found = statistics.outer(dy, x)
    own = found.numel() * 4
    assert bool((found == 300).all())
    assert own < counted.peak <= own + wide


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
def test_recomputed_segments_give_the_same_gradient(reentrant):
    tiny, model = adapted("llama", torch.float64)
    batches = batches_of(tiny, dtype=torch.float64)
    plain = gather(model, batches, None, Gradient(training=True))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    passes = []
    layer = adapter_of(model).layers[0].module
    handle = layer.register_forward_pre_hook(lambda *_: passes.append(1))
    found = gather(model, batches, None, Gradient(training=True))
    handle.remove()
    assert len(passes) == 2 * len(batches)
    for path, stat in plain.items():
        assert_close(found[path]["weight_grad"], stat["weight_grad"])


class Rare(nn.Module):
    """A layer that nothing depends on, one whose input is zero, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.used, self.twice = nn.Linear(4, 5), nn.Linear(5, 5)
        self.unused, self.silent = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        y = self.used(x) + self.silent(0 * x)
        y += 1.0
        return self.twice(self.twice(y).tanh())


def rare(*targets):
    torch.manual_seed(3)
    return pr.adapt(Rare(), pr.method("lora-ga", r=1), list(targets), seed=1)


def square(model, x):
    return model(x).square().mean()


def test_a_layer_that_is_passed_twice_sums_its_passes_once_a_batch():
    model, x = rare("used", "twice"), torch.randn(3, 6, 4)
    stats = gather(model, list(x), square, Gradient())
    base = model.unload()
    base.requires_grad_(True)
    (sum(square(base, part) for part in x) / 3).backward()
    for path in ("used", "twice"):
        assert_close(stats[path]["weight_grad"], base.get_submodule(path).weight.grad)


@pytest.mark.parametrize(
    ("targets", "loss", "message"),
    [
        (("used", "unused"), square, r"no gradient reached at unused, from which no start"),
        (("used", "silent"), square, r"gradient is all zero at silent, .*exclude_modules"),
        (("used",), lambda m, x: m(x).sum() / 0, r"gradient is not finite at used"),
        (("used",), lambda m, x: x.sum(), r"does not depend on any adapted layer, such as used"),
    ],
    ids=["missing", "zero", "infinite", "cut"],
)
def test_a_layer_without_a_gradient_is_an_error_that_names_it(targets, loss, message):
    model = rare(*targets)
    before = everything(model)
    with pytest.raises(ConfigError, match=message):
        pr.initialise(model, [torch.randn(6, 4)], loss)
    assert all(view.waiting for view in adapter_of(model).layers)
    after = everything(model)
    assert same(before["bits"], after["bits"])


def test_without_a_batch_there_is_nothing_to_start_from():
    with pytest.raises(ConfigError, match="got no batch, expected at least one"):
        pr.initialise(rare("used"), [], square)


@pytest.mark.parametrize("batches", [{"input_ids": torch.ones(1, 4)}, [torch.ones(1, 4)]])
def test_batches_that_a_model_cannot_be_called_with_are_named(batches):
    with pytest.raises(ConfigError, match=r"got a batch of type (str|Tensor), expected mappings"):
        pr.initialise(rare("used"), batches)


def test_a_method_that_wants_statistics_does_not_train_without_them():
    tiny, model = adapted("llama")
    batch = tiny.inputs(0)
    base = tiny.build()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base(**batch).logits)
    model.train()
    with pytest.raises(InertError, match=r"wants weight_grad, .*call polyrank.initialise\(model"):
        model(**batch)
    with model.disable_adapter():
        model(**batch)
    pr.initialise(model, [batch])
    model(**batch).loss.backward()
    redraw(model, seed=3)
    with pytest.raises(InertError, match="nobody gathered"):
        model(**batch)


def test_a_trainer_and_a_loop_of_ones_own_are_stopped_too(tmp_path):
    from transformers import TrainingArguments

    tiny, model = adapted("bert")
    attached = pr.attach(pr.optimizer(model, 1e-3), model)
    model.train()
    with pytest.raises(InertError, match="nobody gathered"):
        model(**tiny.inputs(0))
    attached.detach()
    rows = [{k: v[i] for k, v in tiny.inputs(0).items()} for i in range(3)]
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[], max_steps=1)
    with pytest.raises(InertError, match="nobody gathered"):
        pr.Trainer(model, arguments, train_dataset=rows).train()


def test_a_start_that_fails_half_way_does_not_train(monkeypatch):
    tiny, model = adapted("llama")
    views = adapter_of(model).layers
    real, calls = GradientStart.fill, []

    def failing(self, layer, stat, rng):
        calls.append(layer)
        if layer is views[3]:
            raise ValueError("no decomposition today")
        real(self, layer, stat, rng)

    monkeypatch.setattr(GradientStart, "fill", failing)
    with pytest.raises(ValueError, match="no decomposition"):
        pr.initialise(model, batches_of(tiny, 1))
    monkeypatch.setattr(GradientStart, "fill", real)
    assert len(calls) == len(views) - 3
    model.train()
    with pytest.raises(InertError, match="nobody gathered"):
        model(**tiny.inputs(0))
    pr.initialise(model, batches_of(tiny, 1))
    model(**tiny.inputs(0))


def test_a_start_is_made_once_and_before_the_optimiser():
    tiny, model = adapted("llama")
    batches = batches_of(tiny, 1)
    attached = pr.attach(pr.optimizer(model, 1e-3), model)
    with pytest.raises(ConfigError, match="is attached to an optimiser; call this before"):
        pr.initialise(model, batches)
    attached.detach()
    pr.initialise(model, batches)
    with pytest.raises(ConfigError, match=r"has started already.*redraw\(model\)"):
        pr.initialise(model, batches)
    _, plain = adapted("llama", method="lora")
    with pytest.raises(ConfigError, match="'lora' starts without statistics"):
        pr.initialise(plain, batches)


def test_training_mode_is_keyed_and_evaluation_mode_is_an_option():
    def start(seed=1, **options):
        torch.manual_seed(seed)
        tiny, _ = adapted("bert")
        base = tiny.build()
        for module in base.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
        model = pr.adapt(base, pr.method("lora-ga", r=1, **options), seed=1)
        pr.initialise(model, batches_of(tiny))
        return {n: p for n, p in model.named_parameters() if "polyrank" in n}

    first, again, still = start(), start(seed=2), start(dropping=False)
    assert same(first, again)
    assert not same(first, still)


def test_inputs_and_outputs_are_shown_once_without_a_backward():
    class Moments(Init):
        wants = frozenset({"input", "output"})
        training = False

        def gather(self, site, stat, seen):
            assert not seen["input"].requires_grad
            for name, t in seen.items():
                stat[name] = stat.get(name, 0) + t.float().sum(0)
            stat["tokens"] = stat.get("tokens", torch.zeros(())) + len(seen["input"])
            return stat

    tiny, model = adapted("llama")
    batches = batches_of(tiny, 2)
    stats = gather(model, batches, None, Moments())
    layer, found = adapter_of(model).layers[0], []
    handle = layer.module.register_forward_hook(lambda m, a, y: found.append((a[0], y)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    stat = stats[layer.site.path]
    assert stat["tokens"] * 2 == sum(x[..., 0].numel() for x, _ in found)
    assert_close(stat["input"], sum(x.flatten(0, -2).sum(0) for x, _ in found) / 2)
    assert_close(stat["output"], sum(y.flatten(0, -2).sum(0) for _, y in found) / 2)


def test_the_gradient_is_that_at_the_weight_which_acts():
    """A bank is part of it, as in a later task."""
    tiny, model = adapted("bert", torch.float64, method="olora")
    pr.layers.append(model, seed=1)
    for view in adapter_of(model).layers:
        assert isinstance(view.module, AdaptedLinear)
        with torch.no_grad():
            for t in (*view.bank, view.A, view.B):
                t.copy_(torch.randn(t.shape, dtype=t.dtype) * 0.1)
    batches = batches_of(tiny, 2, torch.float64)
    stats = gather(model, batches, None, Gradient())
    merged = model.merge_and_unload()
    merged.requires_grad_(True)
    for batch in batches:
        (merged(**batch).loss / 2).backward()
    for path, stat in stats.items():
        grad = merged.get_submodule(path).weight.grad
        assert_close(stat["weight_grad"], grad, dtype=torch.float32)
