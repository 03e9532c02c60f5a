"""What MixLoRA's routers add to the objective: values, gradients, masks, recomputed segments."""

import math

import pytest
import torch
import torch.nn.functional as F

import polyrank as pr
from polyrank.errors import ConfigError
from polyrank.frame import keyed
from polyrank.layers import adapter_of
from polyrank.parts import losses
from polyrank.parts.experts import Mixed
from polyrank.parts.routers import Choice
from polyrank.testing import MODELS, Case, assert_close
from polyrank.testing.probes import nudge

E = 4
SMALL = {"r": 2, "experts": E, "alpha": 4.0}
FORMS = {
    "topk": ({"k": 2}, Choice("softmax", k=2)),
    "topp": ({"router": "topp", "top_p": 0.5}, Choice("top_p", top_p=0.5)),
    "switch": ({"router": "switch", "capacity": 2}, Choice("top1")),
}


def built(**options):
    made = pr.method("mixlora", **{**SMALL, **options})
    model = Case(made, 0, MODELS["llama"]).build(dtype=torch.float64).double()
    nudge(model)
    with torch.no_grad():
        for index, block in enumerate(mixtures(model)):
            block.router.copy_(torch.randn(block.router.shape, generator=keyed("router", index)))
    return model.train()


def mixtures(model):
    return [block for block in adapter_of(model).blocks if isinstance(block, Mixed)]


def batch():
    return MODELS["llama"].inputs()


def params_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model, loss):
    return torch.autograd.grad(loss, params_of(model))


def listen(block, logits):
    plain = block.logits
    block.logits = lambda x, flow: logits.append(plain(x, flow)) or logits[-1]


def heard(model, call):
    """Return the loss of a call and the logits of every router, in the graph."""
    logits = []
    for block in mixtures(model):
        listen(block, logits)
    loss = call(model)
    for block in mixtures(model):
        del block.logits
    return loss, logits


def mixtral(logits, choice, mask, over):
    """E Σ_slot Σ_e f P, of the logits of all layers one after the other, or of each alone."""
    rows = [z.reshape(-1, E)[mask.reshape(-1)] for z in logits]
    rows = [torch.cat(rows)] if over == "model" else rows
    terms = []
    for z in rows:
        share = choice.kept(z).to(z.dtype).mean(0)
        terms.append(E * (share * z.softmax(-1).mean(0)).sum())
    return sum(terms) / len(terms)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_even_logits_cost_k_whatever_the_tie_break(k):
    z = torch.zeros(11, E, dtype=torch.float64)
    value = mixtral([z, z], Choice("softmax", k=k), torch.ones(11, dtype=torch.bool), "model")
    assert_close(value, torch.tensor(float(k), dtype=torch.float64))
    assert_close(losses.balance(z, Choice("softmax", k=k).kept(z), None), value)
    assert_close(losses.balance(z, Choice("top1").kept(z), None), torch.ones(()).double())
    assert_close(losses.z_square(z, None), torch.tensor(math.log(E) ** 2, dtype=torch.float64))


def test_a_constant_on_the_logits_changes_the_z_loss_alone_which_can_vanish():
    z = torch.randn(9, E, generator=keyed("z"), dtype=torch.float64)
    shift = torch.randn(9, 1, generator=keyed("shift"), dtype=torch.float64)
    kept = Choice("softmax", k=2).kept
    assert_close(losses.balance(z + shift, kept(z + shift), None), losses.balance(z, kept(z), None))
    assert not torch.isclose(losses.z_square(z + shift, None), losses.z_square(z, None))
    gone = losses.z_square(z - z.logsumexp(-1, keepdim=True), None)
    assert float(gone) < 1e-28


def test_all_tokens_on_the_same_experts_cost_as_many_as_there_are():
    z = torch.full((9, E), -40.0, dtype=torch.float64)
    z[:, 1:3] = 40.0
    value = losses.balance(z, Choice("softmax", k=2).kept(z), None)
    assert_close(value, torch.tensor(float(E), dtype=torch.float64))


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["model", "layer"])
@pytest.mark.parametrize("form", FORMS)
def test_the_losses_reach_the_gradients_with_padding_left_out(form, over):
    options, choice = FORMS[form]
    added = {"aux": 0.3, "aux_over": over, "z_loss": 0.2}
    with_losses, plain = built(**options, **added), built(**options, aux=0.0)
    found = gradients(with_losses, with_losses(**batch()).loss)
    loss, logits = heard(plain, lambda model: model(**batch()).loss)
    mask = batch()["attention_mask"].bool()
    whole = loss + 0.3 * mixtral(logits, choice, mask, over)
    whole = whole + 0.2 * sum(losses.z_square(z, mask) for z in logits) / len(logits)
    for a, b in zip(found, gradients(plain, whole), strict=True):
        assert_close(a, b)
    alone = gradients(plain, plain(**batch()).loss)
    assert any(not torch.allclose(a, b) for a, b in zip(found, alone, strict=True))


def test_means_over_the_model_and_over_its_layers_differ():
    found = [
        gradients(model, model(**batch()).loss)
        for model in (built(aux=0.3, aux_over=over) for over in ("model", "layer"))
    ]
    assert any(not torch.allclose(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("over", ["model", "layer"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_recomputed_segments_count_once(reentrant, over):
    # transformers 5.23 renamed the switch.
    name = "activation_checkpointing_enable"
    found = []
    for recompute in (False, True):
        model = built(aux=0.3, aux_over=over, z_loss=0.1, jitter=0.1)
        inner = model.get_base_model()
        model.enable_input_require_grads()
        if recompute:
            switch = getattr(inner, name, inner.gradient_checkpointing_enable)
            switch({"use_reentrant": reentrant})
        model(**batch()).loss.backward()
        found.append([p.grad for p in params_of(model)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


def test_two_forwards_before_a_backward_keep_their_loads_apart():
    model = built(aux=0.3)
    batches = [MODELS["llama"].inputs(seed) for seed in (0, 1)]
    apart = [gradients(model, model(**b).loss) for b in batches]
    both = gradients(model, sum(model(**b).loss for b in batches))
    for one, two, found in zip(*apart, both, strict=True):
        assert_close(found, one + two)


@pytest.mark.parametrize("over", ["model", "layer"])
def test_the_losses_are_divided_by_the_accumulation(over):
    found = []
    for micro in (1, 2):
        model = built(aux=0.3, aux_over=over, z_loss=0.1)
        optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.1))
        attachment = pr.attach(optimizer, model, accumulation=micro)
        for _ in range(micro):
            (model(**batch()).loss / micro).backward()
        found.append([p.grad.clone() for p in params_of(model)])
        attachment.detach()
    for a, b in zip(*found, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("over", ["model", "layer"])
def test_a_batch_without_a_real_token_adds_nothing(over):
    model = built(aux=0.3, aux_over=over, z_loss=0.1)
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 3, 24, generator=keyed("x"), dtype=torch.float64)
    with mlp.up_proj.flow.put(mask=torch.zeros(1, 3, dtype=torch.bool)):
        y = mlp(x)
    grad = torch.autograd.grad(y.sum() * 0.0, mixtures(model)[0].router)[0]
    assert_close(grad, torch.zeros_like(grad))


def test_loads_of_a_backbone_called_alone_do_not_add_up():
    model = built(aux=0.3)
    backbone = model.get_base_model().model
    tensors = {k: v for k, v in batch().items() if k != "labels"}
    routers = [block.router for block in mixtures(model)]
    found = [
        torch.autograd.grad(backbone(**tensors).last_hidden_state.sum() * 0.0, routers)
        for _ in range(3)
    ]
    assert any(g.any() for g in found[0])
    for one in found[1:]:
        for a, b in zip(one, found[0], strict=True):
            assert_close(a, b)


def test_evaluation_and_frozen_forwards_add_nothing():
    model, plain = built(aux=0.3).eval(), built(aux=0.0).eval()
    for a, b in zip(*(gradients(m, m(**batch()).loss) for m in (model, plain)), strict=True):
        assert_close(a, b)
    with torch.no_grad():
        model.train()(**batch())
    assert not model.get_base_model().model.layers[0].mlp.up_proj.flow.notes


def test_a_router_of_one_choice_learns_from_its_losses_alone():
    with pytest.warns(UserWarning, match="one expert a token"):
        quiet, model = built(k=1, aux=0.0), built(k=1, aux=0.3)
    for made, moved in ((quiet, False), (model, True)):
        made(**batch()).loss.backward()
        # Rounding is left of a softmax over one logit.
        assert (mixtures(made)[0].router.grad.abs().max().item() > 1e-9) is moved


# --- precision and compiled code ------------------------------------------------------------------


def test_the_router_stays_in_fp32_under_autocast_and_over_a_bf16_base():
    toy = Case(pr.method("mixlora", **SMALL), 0, MODELS["llama"])
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = toy.build(dtype=dtype)
        nudge(model)
        block, seen = mixtures(model)[0], []
        listen(block, seen)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(**batch()).loss
        loss.backward()
        assert seen[0].dtype == torch.float32 == block.router.grad.dtype
        assert all(torch.isfinite(p.grad).all() for p in params_of(model))
        mlp = model.get_base_model().model.layers[0].mlp
        assert mlp(torch.ones(1, 2, 24, dtype=dtype)).dtype == dtype


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_compiled_graph_gives_the_same_gradients():
    torch._dynamo.reset()
    model = built(aux=0.3, aux_over="layer", z_loss=0.1)
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 24, generator=keyed("x"), dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(x).square().sum(), wanted) for f in (compiled, mlp))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    torch._dynamo.reset()


def test_compiled_code_refuses_a_loss_that_waits_for_all_layers(monkeypatch):
    mlp = built(aux=0.3).get_base_model().model.layers[0].mlp
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(ConfigError, match="use aux_over='layer'"):
        mlp(torch.zeros(1, 2, 24, dtype=torch.float64))


# --- places ---------------------------------------------------------------------------------------


def adapted(base, targets="all-linear", **options):
    return pr.adapt(base, pr.method("mixlora", **{**SMALL, **options}), targets, seed=1)


def tiny(name, **more):
    import transformers

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
             "max_position_embeddings": 32, **more}  # fmt: skip
    kind = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        return kind(kind.config_class(**sizes))


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("Mixtral", {"num_local_experts": 4}, "is a mixture of experts already"),
        (
            "Qwen2Moe",
            {"num_experts": 4, "moe_intermediate_size": 8},
            "a mixture of experts already",
        ),
        ("Phi3", {}, "form no FFN of gate, up and down"),
    ],
)
def test_models_without_a_plain_ffn_are_refused_whole(name, more, words):
    base = tiny(name, **more)
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError, match=words):
        adapted(base)
    assert kinds == [type(m) for m in base.modules()]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Gemma", {}),
        ("Phi", {}),
        # Their first norms are those of queries and keys, as wide as a head or as all of them.
        ("Qwen3", {"head_dim": 16}),
        ("Gemma3", {"head_dim": 16}),
        ("Olmo2", {"num_key_value_heads": 1}),
        # Norms without weights.
        ("Olmo", {"eos_token_id": 1}),
    ],
)
def test_other_dense_models_start_as_the_base_and_train(name, more):
    base = tiny(name, **more)
    ids = batch()["input_ids"]
    with torch.no_grad():
        expected = base.eval()(input_ids=ids).logits.clone()
    model = adapted(base).eval()
    assert len(mixtures(model)) == 1
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    nudge(model)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in params_of(model))


def test_stages_of_several_ffns_are_refused_whole():
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "window_size": 2, "depths": [2]}
    base = SwinForImageClassification(SwinConfig(**sizes, num_heads=[2]))
    with pytest.raises(ConfigError, match=r"holds several FFNs, of which 'blocks\.1\.mlp\.fc1'"):
        adapted(base)


def test_an_ffn_that_only_looks_like_one_is_refused(monkeypatch):
    base = MODELS["llama"].build()
    kind = type(base.model.layers[0].mlp)
    monkeypatch.setattr(
        kind, "forward",
        lambda self, x: 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"LlamaMLP computes something else than mlp\.down_proj"):
        adapted(base)


@pytest.mark.parametrize("targets", [["down_proj"], ["up_proj", "q_proj"], ["gate_proj"]], ids=str)
def test_some_of_the_layers_may_be_left_out(targets):
    model = adapted(MODELS["llama"].build(torch.float64), targets).double()
    nudge(model)
    inside = model.get_base_model().model.layers[0]
    x = torch.randn(2, 5, 24, generator=keyed("x"), dtype=torch.float64)
    block = mixtures(model)[0]
    z = F.linear(x, block.router)
    weights, total = Choice("softmax", k=2).weights(z), 0

    def linear(name, x, e):
        layer = getattr(inside.mlp, name)
        if name not in targets:
            return layer(x)
        view, ranks = layer.views["default"], slice(2 * e, 2 * e + 2)
        return layer.base_layer(x) + view.scale * x @ view.A[ranks].T @ view.B[:, ranks].T

    for e in range(E):
        a = F.silu(linear("gate_proj", x, e)) * linear("up_proj", x, e)
        total = total + weights[..., e, None] * linear("down_proj", a, e)
    assert_close(inside.mlp(x), total)


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        ("llama", ["q_proj"], "found no transformer block in LlamaForCausalLM that it acts in"),
        ("bert", ["intermediate.dense"], "'output.dense' of .* is not adapted"),
    ],
)
def test_targets_without_experts_are_refused(model, targets, words):
    with pytest.raises(ConfigError, match=words):
        adapted(MODELS[model].build(), targets)


def test_a_plain_lora_beside_acts_along_and_a_second_mixture_is_refused():
    model = built(aux=0.0).eval()
    lora = pr.PolyrankConfig(method="lora", options={"r": 2}, target_modules="all-linear", seed=4)
    model.add_adapter("plain", lora)
    model.base_model.set_adapter(["default", "plain"])
    mlp = model.double().get_base_model().model.layers[0].mlp
    x = torch.randn(2, 5, 24, generator=keyed("x"), dtype=torch.float64)
    alone = mlp(x)
    views = [layer.views["plain"] for layer in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)]
    with torch.no_grad():
        for index, view in enumerate(views):
            view.B.copy_(torch.randn(view.B.shape, generator=keyed("B", index)))
    both = mlp(x)
    assert not torch.allclose(both, alone)
    with torch.no_grad():
        for view in views:
            view.module.base_layer.weight.add_(view.delta())
            view.B.zero_()
    assert_close(mlp(x), both)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="cannot be stacked"):
        mlp(x.float())
