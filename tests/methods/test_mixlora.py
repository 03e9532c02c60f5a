"""MixLoRA against experts computed one after the other, and what its papers' properties say."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.engine.attachment import attach
from polyrank.errors import ConfigError
from polyrank.frame import keyed
from polyrank.layers import adapter_of
from polyrank.ops.rank_gate.selection import NonFiniteError
from polyrank.parts import experts
from polyrank.parts.experts import Experts, Mixed
from polyrank.testing import MODELS, Case, assert_close
from polyrank.testing.probes import nudge

R, E, D = 2, 4, 24
SMALL = {"r": R, "experts": E, "alpha": 4.0}
# Of each family: (path of the FFN's first module, W1 or W3, W2, gate).
PLACES = {
    "llama": ("model.layers.0", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
    "gpt2": ("transformer.h.0", "mlp.c_fc", "mlp.c_proj", ""),
    "vit": ("vit.layers.0", "mlp.fc1", "mlp.fc2", ""),
    "bert": ("bert.encoder.layer.0", "intermediate.dense", "output.dense", ""),
}
ACTS = {"llama": F.silu, "vit": F.gelu, "bert": F.gelu}
ROUTED = [
    pytest.param({}, id="top-2"),
    pytest.param({"k": 1, "aux": 0.0}, id="top-1"),
    pytest.param({"k": E, "aux": 0.0}, id="all"),
    pytest.param({"router": "topp", "top_p": 0.5}, id="top-p"),
    pytest.param({"router": "topp", "top_p": 0.9, "tau": 2.0}, id="top-p-cool"),
    pytest.param({"router": "switch"}, id="switch"),
]
pytestmark = pytest.mark.filterwarnings("ignore:k. got 1, one expert a token")


def case(model="llama", **options):
    return Case(pr.method("mixlora", **{**SMALL, **options}), 0, MODELS[model])


def built(model="llama", spread=1.0, **options):
    """Return (model in fp64 whose factors are not zero, its first block, that block's place)."""
    made = case(model, **options).build(dtype=torch.float64).double()
    nudge(made)
    adapter = adapter_of(made)
    with torch.no_grad():
        for index, block in enumerate(mixtures(adapter)):
            rng = keyed("router", index)
            block.router.copy_(spread * torch.randn(block.router.shape, generator=rng))
    return made, mixtures(adapter)[0], made.get_base_model().get_submodule(PLACES[model][0])


def mixtures(adapter):
    return [block for block in adapter.blocks if isinstance(block, Mixed)]


def inputs(*key, shape=(3, 7, D)):
    x = torch.randn(shape, generator=keyed("ffn", *key), dtype=torch.float64)
    return x.requires_grad_()


def network(model, inside):
    """Return the FFN of a block as a function of x."""
    if model == "bert":
        return lambda x: inside.output.dense(inside.intermediate(x))
    return inside.mlp


def expert(model, inside, number, x, name="default"):
    """E_e(x), by the weights of one expert alone."""

    def linear(path, x):
        layer = inside.get_submodule(path)
        base = layer.base_layer
        view, ranks = layer.views[name], slice(number * R, (number + 1) * R)
        W = base.weight.T if model == "gpt2" else base.weight
        W = W + view.scale * view.B[:, ranks] @ view.A[ranks]
        return F.linear(x, W, base.bias)

    _, up, down, gate = PLACES[model]
    act = ACTS.get(model, inside.mlp.act if model == "gpt2" else None)
    a = act(linear(gate, x)) * linear(up, x) if gate else act(linear(up, x))
    return linear(down, a)


def weighed(z, router="topk", k=2, top_p=0.8, tau=1.0, **_):
    """ω (*, E), token by token."""
    rows = []
    for row in z.reshape(-1, z.shape[-1]):
        p, w = row.softmax(-1), torch.zeros_like(row)
        order = sorted(range(len(row)), key=lambda e: (-row[e].item(), e))
        if router == "topk":
            kept = order[:k]
            total = sum(p[e] for e in kept)
            rows.append(torch.stack([p[e] / total if e in kept else w[e] for e in range(len(row))]))
            continue
        kept, gathered = [], 0.0
        for e in order:
            kept.append(e)
            gathered += p[e].item() / tau
            if router == "switch" or gathered > top_p:
                break
        rows.append(torch.stack([p[e] / tau if e in kept else w[e] for e in range(len(row))]))
    return torch.stack(rows).reshape(z.shape)


def looped(model, inside, block, x, **options):
    w = weighed(F.linear(x, block.router), **options)
    return sum(w[..., e, None] * expert(model, inside, e, x) for e in range(block.experts))


# --- against a loop over experts ------------------------------------------------------------------


@pytest.mark.parametrize("options", ROUTED)
@pytest.mark.parametrize("model", PLACES)
def test_values_and_gradients_are_those_of_a_loop_over_experts(model, options):
    _made, block, inside = built(model, **{"aux": 0.0, **options})
    x = inputs(model)
    params = [p for p in inside.parameters() if p.requires_grad]
    names = {id(p): n for n, p in inside.named_parameters()}
    found, expected = network(model, inside)(x), looped(model, inside, block, x, **options)
    assert_close(found, expected)
    dy = torch.randn(found.shape, generator=keyed("dy"), dtype=found.dtype)
    ask = {"allow_unused": True, "materialize_grads": True}
    one, two = (torch.autograd.grad(y, [x, *params], dy, **ask) for y in (found, expected))
    compared = 0
    for param, a, b in zip([x, *params], one, two, strict=True):
        if "att" in names.get(id(param), ""):
            continue
        if options.get("k") == 1 and param is block.router:
            # Its weight is one, whatever the router says.
            assert_close(a, torch.zeros_like(a))
            continue
        assert_close(a, b)
        compared += bool(b.any())
    assert compared >= (5 if model != "llama" else 7) + (options.get("k") != 1)


def test_w2_is_shared_exactly_and_called_once():
    _made, block, inside = built()
    seen = []
    base = inside.mlp.down_proj.base_layer
    base.register_forward_hook(lambda m, args, y: seen.append(args[0].shape))
    x = inputs()
    y = inside.mlp(x)
    assert seen == [(*x.shape[:2], 40)]
    w = weighed(F.linear(x, block.router))
    parts = torch.stack([expert("llama", inside, e, x) for e in range(E)])
    assert_close(y, (w.movedim(-1, 0)[..., None] * parts).sum(0))
    for path in ("up_proj", "gate_proj"):
        layer, calls = getattr(inside.mlp, path).base_layer, []
        layer.register_forward_hook(lambda m, args, y, calls=calls: calls.append(args[0].shape))
        inside.mlp(x)
        assert calls == [x.shape]


# --- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", PLACES)
def test_without_values_it_is_the_base_bit_for_bit(model):
    toy = case(model)
    base, adapted = toy.tiny.build(), toy.build()
    with torch.no_grad():
        for block in mixtures(adapter_of(adapted)):
            block.router.mul_(50)
    for mode in (True, False):
        assert torch.equal(toy.answer(base.train(mode)), toy.answer(adapted.train(mode)))


@pytest.mark.parametrize("model", PLACES)
def test_one_expert_is_plain_lora(model):
    one, _, _ = built(model, experts=1, k=1, aux=0.0)
    plain = Case(pr.method("lora", r=R, alpha=4.0), 0, MODELS[model])
    lora = plain.build(dtype=torch.float64).double()
    held = dict(lora.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, param in one.named_parameters():
            if "polyrank_" in name and "router" not in name:
                held[name].copy_(param)
                copied += 1
    assert copied == 2 * len(adapter_of(lora).layers)
    found = case(model).answer(one, dtype=torch.float64)
    assert_close(found, plain.answer(lora, dtype=torch.float64))


def same_experts(adapter, experts):
    with torch.no_grad():
        for layer in (v for v in adapter.layers if isinstance(v.core, Experts)):
            layer.A.copy_(layer.A[:R].repeat(experts, 1))
            layer.B.copy_(layer.B[:, :R].repeat(1, experts))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_identical_experts_are_one_lora_ffn_whatever_the_router(k):
    made, block, inside = built(k=k)
    same_experts(adapter_of(made), E)
    x = inputs("same")
    assert_close(inside.mlp(x), expert("llama", inside, 0, x))
    with torch.no_grad():
        block.router.mul_(-3)
    assert_close(inside.mlp(x), expert("llama", inside, 0, x))


@pytest.mark.parametrize("options", ROUTED)
def test_experts_and_their_rows_of_the_router_can_be_permuted(options):
    _made, block, inside = built(**options)
    x, order = inputs("order"), torch.tensor([2, 0, 3, 1])
    before = inside.mlp(x)
    with torch.no_grad():
        block.router.copy_(block.router[order])
        for layer in (inside.mlp.up_proj, inside.mlp.gate_proj, inside.mlp.down_proj):
            view = layer.views["default"]
            ranks = (order[:, None] * R + torch.arange(R)).flatten()
            view.A.copy_(view.A[ranks])
            view.B.copy_(view.B[:, ranks])
    assert_close(inside.mlp(x), before)


def test_weights_of_top_k_sum_to_one_and_those_of_top_p_and_switch_do_not():
    for options, exact in (({}, True), ({"router": "topp"}, False), ({"router": "switch"}, False)):
        made, block, _ = built(**options)
        total = block.choice.weights(F.linear(inputs(), block.router)).sum(-1)
        assert bool(torch.isclose(total, torch.ones_like(total)).all()) is exact
        assert made.peft_config["default"].build().neutral is exact


# --- top-p ----------------------------------------------------------------------------------------


def test_top_p_keeps_the_first_alone_if_it_is_enough_and_all_if_nothing_is():
    _made, block, inside = built(router="topp", top_p=0.5)
    x = inputs("edge")
    sure = torch.zeros(3, 7, E, dtype=x.dtype)
    sure[..., 2] = 9.0
    assert block.choice.kept(sure).sum(-1).eq(1).all()
    block.choice = replace(block.choice, top_p=1.0)
    assert block.choice.kept(sure).all()
    y = inside.mlp(x)
    assert_close(y, looped("llama", inside, block, x, router="topp", top_p=1.0))


def test_even_probabilities_keep_the_lower_experts_until_the_sum_is_passed():
    _, block, _ = built(router="topp", top_p=0.5)
    kept = block.choice.kept(torch.zeros(1, E, dtype=torch.float64))
    # 1/4 + 1/4 does not exceed one half, so that a third one comes along.
    assert kept.tolist() == [[True, True, True, False]]


# --- switch ---------------------------------------------------------------------------------------


def test_an_expert_serves_its_first_real_tokens_and_the_others_pass_by():
    made, block, inside = built(router="switch", capacity=1)
    made.train()
    x = inputs("switch", shape=(2, 7, D))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    z = F.linear(x, block.router)
    p, chosen = z.softmax(-1).max(-1)
    flow = inside.mlp.up_proj.flow
    with flow.put(mask=mask):
        y = inside.mlp(x)
    everyone = looped("llama", inside, block, x, router="switch")
    dropped = 0
    for n in range(2):
        served = [0] * E
        for t in range(7):
            e = int(chosen[n, t])
            served[e] += int(mask[n, t])
            full = bool(mask[n, t]) and served[e] > 1
            assert_close(y[n, t], p[n, t] * x[n, t] if full else everyone[n, t])
            dropped += full
    assert dropped > 2
    made.eval()
    with flow.put(mask=mask):
        assert_close(inside.mlp(x), everyone)


def test_no_device_is_asked_how_many_experts_serve_a_token_where_it_is_known(monkeypatch):
    asked = []
    plain = experts._slots
    monkeypatch.setattr(experts, "_slots", lambda kept: asked.append(kept.shape) or plain(kept))
    for router, times in (("topk", 0), ("switch", 0), ("topp", 1)):
        built(router=router)[2].mlp(inputs())
        assert len(asked) == times


def test_jitter_reaches_the_router_alone_and_in_training_alone():
    made, block, inside = built(router="switch", jitter=0.5, capacity=99)
    x = inputs()
    assert_close(inside.mlp(x), looped("llama", inside, block, x, router="switch"))
    made.train()
    flow = inside.mlp.up_proj.flow
    ratio = block.logits(torch.ones_like(x), flow) / block.router.sum(-1)
    assert not torch.allclose(ratio, torch.ones_like(ratio))
    assert torch.equal(block.logits(x, flow), block.logits(x, flow))
    flow.draw.add_(1)
    assert not torch.equal(block.logits(torch.ones_like(x), flow) / block.router.sum(-1), ratio)
    y, z = inside.mlp(x), block.logits(x, flow)
    w = z.softmax(-1) * F.one_hot(z.argmax(-1), E)
    parts = torch.stack([expert("llama", inside, e, x) for e in range(E)])
    assert_close(y, (w.movedim(-1, 0)[..., None] * parts).sum(0))


def test_jitter_and_dropout_are_drawn_by_the_seed_of_the_run_not_of_the_starting_values():
    method = pr.method("mixlora", **SMALL, router="switch", jitter=0.5, dropout=0.1)

    def keys(start, run):
        model = pr.adapt(MODELS["llama"].build(), method, "all-linear", seed=start).train()
        optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.0))
        attachment = attach(optimizer, model, seed=run)
        model(**MODELS["llama"].inputs())
        attachment.detach()
        adapter = adapter_of(model)
        flow = adapter.layers[0].module.flow
        return flow.key(mixtures(adapter)[0].noise), flow.key(adapter.layers[0].seed)

    assert keys(1, 0) == keys(2, 0)
    assert all(one != two for one, two in zip(keys(1, 0), keys(1, 5), strict=True))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": 0}, "experts: got 0"),
        ({"r": 0}, "r: got 0"),
        ({"k": 0}, r"k: got 0, expected 1\.\.4"),
        ({"k": 5}, r"k: got 5, expected 1\.\.4"),
        ({"k": 4}, "aux: got 0.001, but with k = experts = 4"),
        ({"router": "topp", "top_p": 0.0}, "top_p: got 0"),
        ({"router": "topp", "top_p": 1.5}, "top_p: got 1.5"),
        ({"router": "topp", "tau": 0.0}, "tau: got 0"),
        ({"router": "switch", "capacity": 0}, "capacity: got 0"),
        ({"router": "soft"}, "router: got 'soft'"),
        ({"aux": -1e-3}, "aux: got -0.001"),
        ({"z_loss": -1.0}, "z_loss: got -1"),
        ({"aux_over": "batch"}, "aux_over: got 'batch'"),
        ({"jitter": 1.0}, "jitter: got 1.0"),
        ({"capacity": 8}, "capacity: router 'topk' does not read it"),
        ({"router": "switch", "k": 3}, "k: router 'switch' does not read it"),
        ({"init_by": "lora-ga"}, "lora-ga cannot lend its start to mixlora"),
        ({"optim_by": "altlora"}, "altlora cannot lend its optimiser to mixlora"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        pr.method("mixlora", **{**SMALL, **options})


def test_logits_that_are_not_finite_are_refused():
    _made, block, inside = built()
    with torch.no_grad():
        block.router[1, 2] = math.inf
    with pytest.raises(NonFiniteError, match="not finite"):
        inside.mlp(inputs())


def test_what_the_factors_of_experts_cannot_do_is_refused():
    toy = case()
    model = toy.build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    with pytest.raises(ConfigError, match="a call of this layer alone"):
        layer(torch.zeros(2, D))
    with pytest.raises(ConfigError, match="1 ranks to keep"):
        pr.layers.truncate(model, 1)
    with pytest.raises(ConfigError, match="does not define banked"):
        pr.layers.append(model, force=True)
    with pytest.raises(pr.MergeError, match=r"keep the adapter unmerged$"):
        pr.merge(model)
    with pytest.raises(pr.MergeError, match=r"keep the adapter unmerged$"):
        pr.merge(model, approximate=[toy.tiny.inputs()])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_presets_are_the_released_settings():
    switch = pr.method("mixlora", preset="switch")
    assert (switch.capacity, switch.jitter, switch.z_loss, switch.router_std) == (32, 0.01, 1e-3, 1)
    assert pr.method("mixlora", preset="dynamic").top_p == 0.8
    made = pr.method("mixlora", preset="mixlora")
    site = replace(adapter_of(case().build()).layers[0].site, r=made.r, alpha=made.alpha)
    assert (made.experts, made.r, made.k, made.scale(site)) == (8, 16, 2, 2.0)
