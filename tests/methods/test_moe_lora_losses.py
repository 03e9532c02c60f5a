"""Losses of mixtures, injected in backward; and gates that read a condition."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import polyrank as pr
from polyrank.testing import assert_close

D_IN, D_OUT, BATCH, TOKENS, E = 6, 5, 4, 9, 4
TYPES = torch.tensor([[1], [0], [0], [1]])


class Net(nn.Module):
    """Two adapted layers and a non-linearity; a mask comes as language models bring it."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second = nn.Linear(D_IN, D_IN), nn.Linear(D_IN, D_OUT)
        self.reentrant = reentrant

    def body(self, x):
        return self.second(self.first(x).tanh())

    def forward(self, x, attention_mask=None):
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def adapted(reentrant=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    method = pr.method("moe-lora", **{"experts": E, "r": 8, **options})
    model = pr.adapt(Net(reentrant), method, target_modules=["first", "second"], seed=0).to(dtype)
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            layer.B.normal_()
            if hasattr(layer.core, "router"):
                layer.core.router.weight.mul_(2)
    return model.train()


def inputs(dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(BATCH, TOKENS, D_IN, dtype=dtype, requires_grad=True)


def padding():
    lengths = torch.tensor([9, 4, 7, 1])
    return (torch.arange(TOKENS) < lengths[:, None]).long()


def logits(model, x):
    """The logits of both layers, by hand."""
    found = []
    first, second = pr.adapter_of(model).layers
    h = model.base_model.model.first(x).tanh()
    for layer, seen in ((first, x), (second, h)):
        found.append(seen @ layer.core.router.weight.T)
    return found


def switch_or_mixtral(z, chosen_per_token, real):
    """E Σ_slots Σ_e f P over tokens listed one by one."""
    flat, p = z.reshape(-1, E), z.softmax(-1).reshape(-1, E)
    tokens = [t for t in range(len(flat)) if real[t]]
    P = sum(p[t] for t in tokens) / len(tokens)
    total = 0
    for slot in range(chosen_per_token):
        picked = [sorted(range(E), key=lambda e: (-flat[t, e].item(), e))[slot] for t in tokens]
        total = total + sum(picked.count(e) / len(tokens) * P[e] for e in range(E))
    return E * total


def z_loss(z, real):
    flat = z.reshape(-1, E)
    return sum(flat[t].exp().sum().log() ** 2 for t in range(len(flat)) if real[t]) / sum(real)


def localized(z, types, real, gap):
    omega = z.softmax(-1)
    entries = []
    for n, kind in enumerate(types.flatten().tolist()):
        for e in range(E):
            own = (e < E // 2) == (kind == 1)
            load = sum(omega[n, t, e] for t in range(TOKENS) if real[n * TOKENS + t])
            entries.append(load * (1 + gap if own else 1 - gap))
    values = torch.stack(entries)
    mean = values.sum() / len(values)
    variance = ((values - mean) ** 2).sum() / (len(values) - 1)
    return variance / (mean**2 + 1e-10)


CASES = {
    "mixtral": ({"k": 2, "aux": 0.3}, lambda z, real: 0.3 * switch_or_mixtral(z, 2, real)),
    "switch": (
        {"k": 2, "aux": 0.3, "aux_form": "switch"},
        lambda z, real: 0.3 * switch_or_mixtral(z, 1, real),
    ),
    "top1": ({"router": "top1", "aux": 0.3}, lambda z, real: 0.3 * switch_or_mixtral(z, 1, real)),
    "z": ({"router": "soft", "z_loss": 0.2}, lambda z, real: 0.2 * z_loss(z, real)),
    "both": (
        {"k": 3, "aux": 0.3, "z_loss": 0.2},
        lambda z, real: 0.3 * switch_or_mixtral(z, 3, real) + 0.2 * z_loss(z, real),
    ),
    "hydra-z": ({"router": "hydra", "z_loss": 0.2}, lambda z, real: 0.2 * z_loss(z, real)),
    "smear-switch": (
        {"router": "smear", "aux": 0.3, "aux_form": "switch"},
        lambda z, real: 0.3 * switch_or_mixtral(z, 1, real),
    ),
    "loramoe": (
        {"router": "loramoe", "beta": 0.7, "delta": 0.25},
        lambda z, real: 0.7 * localized(z, TYPES, real, 0.25),
    ),
}


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def task_loss(y):
    torch.manual_seed(3)
    return (y * torch.randn(y.shape).to(y)).sum()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_loss_added_to_the_objective(case, masked):
    options, loss = CASES[case]
    mask = padding() if masked else torch.ones(BATCH, TOKENS, dtype=torch.long)
    model, x = adapted(**options), inputs()
    keys = {"attention_mask": mask, "polyrank_condition": TYPES}
    task_loss(model(x, **keys)).backward()
    got = [x.grad.clone(), *(p.grad for p in trained(model))]
    plain = adapted(**{**options, "aux": 0.0, "z_loss": 0.0, "beta": 0.0})
    real = mask.bool().flatten().tolist()
    objective = task_loss(plain(x, **keys)) + sum(loss(z, real) for z in logits(plain, x))
    want = torch.autograd.grad(objective, [x, *trained(plain)])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    without = torch.autograd.grad(task_loss(plain(x, **keys)), trained(plain))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(got[1:], without, strict=True))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("case", ["both", "loramoe", "hydra-z"])
def test_gradient_checkpointing_counts_a_loss_once(case, reentrant):
    options, _ = CASES[case]
    keys = {"attention_mask": padding(), "polyrank_condition": TYPES}
    found = []
    for mode in (None, reentrant):
        model, x = adapted(mode, **options), inputs()
        task_loss(model(x, **keys)).backward()
        found.append([x.grad, *(p.grad for p in trained(model))])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_noise_is_the_same_when_a_segment_is_computed_again(reentrant):
    found = []
    for mode in (None, reentrant):
        model, x = adapted(mode, router="top1_gumbel", tau=0.5), inputs()
        task_loss(model(x)).backward()
        found.append([x.grad, *(p.grad for p in trained(model))])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


# torch.compile itself makes an instance of the autograd function that injects.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [CASES["both"][0], CASES["loramoe"][0], {"router": "top1_gumbel"}], ids=str
)
def test_one_compiled_graph_gives_the_same_gradients(options):
    model, x = adapted(**options), inputs()
    layer = pr.adapter_of(model).layers[0]
    wanted = [x, layer.A, layer.B, layer.core.router.weight]
    compiled = torch.compile(layer.module, backend="aot_eager", fullgraph=True)
    with layer.module.flow.put(mask=padding().bool(), condition=TYPES):
        plain = torch.autograd.grad(task_loss(layer.module(x)), wanted)
        found = torch.autograd.grad(task_loss(compiled(x)), wanted)
    for a, b in zip(found, plain, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_is_divided_by_the_accumulation(accumulation):
    options, loss = CASES["both"]
    model, x = adapted(**options), inputs()
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.1))
    attachment = pr.attach(optimizer, model, accumulation=accumulation)
    parts = x.detach().split(BATCH // accumulation)
    for part in parts:
        (task_loss(model(part)) / accumulation).backward()
    got = [p.grad for p in trained(model)]
    attachment.detach()
    plain = adapted(k=3)
    objective = 0
    for part in parts:
        real = [True] * (len(part) * TOKENS)
        added = sum(loss(z, real) for z in logits(plain, part))
        objective = objective + (task_loss(plain(part)) + added) / accumulation
    for a, b in zip(got, torch.autograd.grad(objective, trained(plain)), strict=True):
        assert_close(a, b)


def test_a_loss_scaler_scales_the_loss_along():
    options, _ = CASES["both"]
    found = []
    for factor in (1.0, 1024.0):
        model, x = adapted(**options), inputs()
        with pr.adapter_of(model).layers[0].module.flow.put(aux=factor):
            (task_loss(model(x)) * factor).backward()
        found.append([p.grad / factor for p in trained(model)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_evaluation_and_forwards_without_gradients_add_nothing():
    options, _ = CASES["both"]
    plain = adapted(k=3)
    for model in (adapted(**options).eval(), adapted(k=3)):
        x = inputs()
        task_loss(model(x)).backward()
        want = torch.autograd.grad(task_loss(plain(x)), trained(plain))
        for p, b in zip(trained(model), want, strict=True):
            assert_close(p.grad, b)
    with torch.no_grad():
        assert_close(adapted(**options)(inputs()), plain(inputs()))


def test_a_batch_of_padding_alone_adds_no_nan():
    options, _ = CASES["both"]
    model, x = adapted(**options), inputs()
    mask = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    task_loss(model(x, attention_mask=mask)).backward()
    assert all(p.grad.isfinite().all() for p in trained(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_losses_are_taken_from_wide_logits(dtype):
    """A z-loss of logits near 300 has gradients that bf16 logits would give in steps of 2."""
    model = adapted(dtype=torch.float32, router="soft", z_loss=1.0)
    model.base_model.model.to(dtype)
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            for p in (layer.A, layer.B, layer.core.router.weight):
                p.data = p.data.float()
    x = inputs(dtype)
    layer = pr.adapter_of(model).layers[0]
    y = layer.module(x)
    (dW,) = torch.autograd.grad(y.float().sum() * 0, [layer.core.router.weight])
    z = x.detach().double() @ layer.core.router.weight.detach().double().T
    z.requires_grad_(True)
    loss = z.reshape(-1, E).logsumexp(-1).square().mean()
    dz = torch.autograd.grad(loss, z)[0].reshape(-1, E)
    expected = dz.T @ x.detach().double().reshape(-1, D_IN)
    assert_close(dW.double(), expected, dtype=torch.float32)


def test_localized_balance_needs_the_type_of_each_sample():
    model, x = adapted(router="loramoe", beta=0.1), inputs()
    with pytest.raises(pr.ConfigError, match=r"first: the localized.* got no condition; pass"):
        model(x)
    with pytest.raises(pr.ConfigError, match=r"got ids 0..2, expected 0..1"):
        model(x, polyrank_condition=torch.tensor([[0], [1], [2], [0]]))
    model.eval()(x)


def gated(**options):
    return adapted(router="task", tasks=3, task_width=5, **options)


def test_every_token_of_a_sample_has_the_same_weights():
    model, x = gated().eval(), inputs()
    tasks = torch.tensor([[2], [0], [2], [1]])
    y = model(x, polyrank_condition=tasks)
    for n, task in enumerate(tasks.flatten().tolist()):
        alone = model(x[n, 3:4][None], polyrank_condition=torch.tensor([[task]]))
        assert_close(alone[0, 0], y[n, 3])
    moved = model(x, polyrank_condition=torch.tensor([[1], [0], [2], [1]]))
    assert not torch.equal(moved[0], y[0])
    assert torch.equal(moved[1:], y[1:])


def test_beams_and_flattened_tokens_take_the_condition_of_their_sample():
    model, x = gated().eval(), inputs()
    tasks = torch.tensor([[2], [0], [2], [1]])
    y = model(x, polyrank_condition=tasks)
    with pr.conditioned(model, tasks):
        beams = model(x.repeat_interleave(3, 0))
        flat = model(x.reshape(-1, D_IN))
    assert_close(beams, y.repeat_interleave(3, 0))
    assert_close(flat.view(y.shape), y)
    assert_close(model(x, polyrank_condition=tasks.flatten()), y)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, r"first: the gate reads each sample's task: got no condition; pass integers 0..2"),
        (torch.tensor([[0], [1], [3], [0]]), "got ids 0..3, expected 0..2"),
        (torch.tensor([[0], [-1], [2], [0]]), "got ids -1..2, expected 0..2"),
        (torch.zeros(4, 1), "dtype torch.float32"),
        (torch.zeros(4, 2, dtype=torch.long), r"shape \(4, 2\)"),
        (torch.zeros(5, 1, dtype=torch.long), "got 5 rows for 4 samples"),
    ],
    ids=["missing", "too high", "negative", "float", "two columns", "other batch"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_condition_that_does_not_fit_is_refused(condition, message, training):
    model = gated().train(training)
    with pytest.raises(pr.ConfigError, match=message) as error:
        model(inputs(), polyrank_condition=condition)
    if "samples" not in message:
        assert "polyrank_condition=ids" in str(error.value)


def test_a_condition_changed_in_place_is_checked_again():
    model, x = gated(), inputs()
    tasks = torch.zeros(BATCH, 1, dtype=torch.long)
    model(x, polyrank_condition=tasks)
    tasks[2] = 7
    with pytest.raises(pr.ConfigError, match=r"got ids 0..7"):
        model(x, polyrank_condition=tasks)


@pytest.mark.parametrize("task", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_merging_for_a_task_is_exact(task, shape):
    model, x = gated().eval(), inputs()
    condition = torch.full(shape, task)
    y = model(x, polyrank_condition=torch.full((BATCH, 1), task))
    merged = pr.merge(model, condition=condition)
    assert isinstance(merged, Net)
    assert not any("polyrank" in name for name, _ in merged.named_parameters())
    assert_close(merged(x), y)


def test_the_update_of_a_task_comes_out_again():
    model = gated(dtype=torch.float32)
    for layer in pr.adapter_of(model).layers:
        W = layer.module.base_layer.weight.detach()
        update = layer.module.get_delta_weight("default", torch.tensor([1]))
        assert update.abs().max() > 0.1
        assert_close(W + update - update, W, tol=1e-6, reason="one rounding up and one down")


def test_merging_for_a_task_keeps_what_was_trained_whole():
    method = pr.method("moe-lora", router="task", tasks=2, experts=2, r=4)
    model = pr.adapt(Net(), method, target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        trained(model)[-2].normal_()
    x = inputs(torch.float32)
    y = model.eval()(x, polyrank_condition=torch.ones(BATCH, 1, dtype=torch.long))
    assert_close(pr.merge(model, condition=torch.tensor([1]))(x), y)


def test_merging_without_a_task_or_with_several_is_refused():
    model = gated()
    before = {name: p.clone() for name, p in model.named_parameters()}
    for condition, message in (
        (None, r"merge for one task by polyrank.merge\(model, condition="),
        (torch.tensor([0, 1]), r"got the tasks \[0, 1\], expected one"),
    ):
        with pytest.raises(pr.MergeError, match=message):
            pr.merge(model, condition=condition)
    with pytest.raises(pr.MergeError, match="merge for one task"):
        model.merge_adapter()
    with pytest.raises(pr.ConfigError, match=r"got ids 3..3, expected 0..2"):
        pr.merge(model, condition=torch.tensor([3]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("router", ["soft", "topk", "top1", "topp", "hydra", "smear"])
def test_merging_a_token_router_is_refused(router):
    with pytest.raises(pr.MergeError, match="weighs ranks for each token"):
        adapted(router=router).merge_and_unload()


def test_moslora_merges_exactly():
    model, x = adapted(router="moslora").eval(), inputs()
    y = model(x)
    assert_close(model.merge_and_unload()(x), y)


def test_a_mixture_keeps_no_bank():
    from polyrank.layers import append

    with pytest.raises(pr.ConfigError, match="the router has no logit for them"):
        append(adapted(router="smear"), 4)


def test_the_mean_gate_approximates_a_merge():
    model, x = adapted(router="topp", top_p=0.9).eval(), inputs()
    with torch.no_grad():
        for layer in pr.adapter_of(model).layers:
            layer.core.router.weight.zero_()
    y = model(x)
    merged = pr.merge(model, approximate=[{"x": x.detach()}])
    assert_close(merged(x), y, dtype=torch.float32)
