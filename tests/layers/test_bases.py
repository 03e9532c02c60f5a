"""Kinds of base layers: Conv1D, half precision, bitsandbytes, torchao; and ways out of polyrank."""

import copy
import importlib.util

import pytest
import torch
from peft import PeftModel, convert_to_lora, save_as_lora
from peft.helpers import disable_input_dtype_casting
from torch import nn

import polyrank as pr
from polyrank.errors import MergeError
from polyrank.layers import AdaptedLinear, adapter_of
from polyrank.testing import assert_close


def first(model):
    return next(m for m in model.modules() if isinstance(m, AdaptedLinear))


# --- Conv1D --------------------------------------------------------------------------------------


def test_a_conv1d_is_adapted_merged_and_unmerged(case, trained):
    lora = case("lora", "gpt2", r=3)
    model = trained(lora).double()
    layers = [m for m in model.modules() if isinstance(m, AdaptedLinear)]
    assert all(layer.transposed for layer in layers)
    layer = layers[0]
    assert (layer.in_features, layer.out_features) == (24, 72)
    assert layer.get_delta_weight("default").shape == layer.base_layer.weight.shape == (24, 72)
    assert adapter_of(model).layers[0].weight().shape == (72, 24)
    answer = lora.answer(model, dtype=torch.float64)
    model.merge_adapter()
    assert_close(lora.answer(model, dtype=torch.float64), answer, dtype=torch.float32)
    model.unmerge_adapter()
    assert_close(lora.answer(model, dtype=torch.float64), answer)
    plain = model.merge_and_unload()
    assert_close(lora.answer(plain, dtype=torch.float64), answer, dtype=torch.float32)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_factors_are_fp32_unless_the_base_dtype_is_asked_for(dtype, either):
    full = either.build(dtype=dtype)
    half = either.build(dtype=dtype, autocast_adapter_dtype=False)
    for model, expected in ((full, torch.float32), (half, dtype)):
        for layer in adapter_of(model).layers:
            assert layer.A.dtype == layer.B.dtype == expected
            for key, param in layer.core.named_parameters():
                exact = key in layer.core.frozen | layer.core.gates
                assert param.dtype == (torch.float32 if exact else expected), key
        assert either.answer(model).dtype == dtype
        assert first(model)(torch.ones(2, 24, dtype=dtype)).dtype == dtype


def test_later_adapters_follow_the_same_policy(case, trained, folder):
    smora = case("smora", r=4, k=2)
    saved = folder(trained(smora))
    for cast, expected in ((True, torch.float32), (False, torch.bfloat16)):
        base = smora.tiny.build(torch.bfloat16)
        model = PeftModel.from_pretrained(base, saved, autocast_adapter_dtype=cast)
        model.load_adapter(saved, adapter_name="more", autocast_adapter_dtype=cast)
        model.add_adapter(
            "new", copy.deepcopy(model.peft_config["default"]), autocast_adapter_dtype=cast
        )
        for view in first(model).views.values():
            assert view.A.dtype == view.B.dtype == expected, view.name
            assert view.core.balance_bias.dtype == torch.float32


@pytest.mark.parametrize("move", ["bfloat16", "half", "to"])
def test_gates_and_statistics_outlive_a_cast_of_the_model(move, case, trained):
    smora = case("smora", r=4, k=2, balance=1e-3)
    model = trained(smora)
    bias = [layer.core.balance_bias.clone() for layer in adapter_of(model).layers]
    assert any(b.any() for b in bias)
    model = model.to(torch.bfloat16) if move == "to" else getattr(model, move)()
    for layer, before in zip(adapter_of(model).layers, bias, strict=True):
        assert torch.equal(layer.core.balance_bias, before)
        assert layer.A.dtype != torch.float32
    smora.answer(model)


def test_fp64_goes_through_and_comes_back(either, trained):
    model = trained(either)
    answer = either.answer(model)
    assert either.answer(model.double(), dtype=torch.float64).dtype == torch.float64
    assert_close(either.answer(model.float()), answer)


def test_the_input_is_never_cast_up(either):
    model = either.build(dtype=torch.bfloat16)
    seen = []
    layer = first(model)
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    either.answer(model)
    assert seen == [torch.bfloat16]
    # PEFT's switch against its own casting changes nothing, since there is none.
    with disable_input_dtype_casting(model):
        either.answer(model)


def test_autocast_gives_what_the_base_gives(either, trained):
    model = trained(either)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = first(model)(torch.ones(2, 24))
        base = first(model).base_layer(torch.ones(2, 24))
    assert y.dtype == base.dtype == torch.bfloat16


# --- quantised bases -----------------------------------------------------------------------------


class Stack(nn.Module):
    """Two linear layers wide enough for every quantiser, 4-bit blocks included."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = make(64, 128), make(128, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def bits4(d_in, d_out):
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(d_in, d_out, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")


def bits8(d_in, d_out):
    import bitsandbytes as bnb

    return bnb.nn.Linear8bitLt(d_in, d_out, has_fp16_weights=False).to("cpu")


def int8(d_in, d_out):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = nn.Sequential(nn.Linear(d_in, d_out))
    quantize_(layer, Int8WeightOnlyConfig())
    return layer[0]


def has(name):
    return importlib.util.find_spec(name) is not None


needs_bnb = pytest.mark.skipif(not has("bitsandbytes"), reason="needs bitsandbytes")
needs_ao = pytest.mark.skipif(not has("torchao"), reason="needs torchao")
# Each library warns about its own future; none of it is about what is called here.
quiet = pytest.mark.filterwarnings("ignore")

KINDS = [
    pytest.param(bits4, marks=[needs_bnb, quiet], id="nf4"),
    pytest.param(bits8, marks=[needs_bnb, quiet], id="int8"),
    pytest.param(int8, marks=[needs_ao, quiet], id="torchao-int8"),
]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["lora", "smora"])
def test_a_quantised_base_is_adapted_trained_saved_and_not_merged(make, name, tmp_path):
    method = pr.method(name, **{"lora": {"r": 4}, "smora": {"r": 8, "k": 2}}[name])
    # bitsandbytes repacks 4-bit weights at the first evaluation and cannot train them afterwards.
    base = Stack(make)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, evaluated = base(x), Stack(make).eval()(x)
    model = pr.adapt(base, method, ["up", "down"], seed=1)
    layer = first(model)
    assert layer.quantised()
    assert (layer.in_features, layer.out_features) == (64, 128)
    with torch.no_grad():
        assert torch.equal(model.train()(x), expected)
    optimizer = torch.optim.AdamW(pr.parameter_groups(model, lr=1e-2))
    attachment = pr.attach(optimizer, model)
    for _ in range(3):
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    model.eval()
    with torch.no_grad():
        trained = model(x)
    assert not torch.equal(trained, evaluated)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(Stack(make), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(back(x), trained)
    for refused in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="keep the adapter unmerged"):
            refused()
    with torch.no_grad():
        assert torch.equal(model(x), trained)
        assert torch.equal(model.unload()(x), evaluated)


@pytest.mark.parametrize("make", KINDS)
def test_structure_that_needs_the_base_weight_says_so(make):
    model = pr.adapt(Stack(make), pr.method("lora", r=4), ["up", "down"], seed=1)
    with pytest.raises(MergeError, match=r"is quantised, and polyrank needs a dense one"):
        adapter_of(model).layers[0].weight()
    from polyrank.layers import absorb

    with pytest.raises(MergeError, match="is quantised"):
        absorb(model)


# --- ways out ------------------------------------------------------------------------------------


# PEFT tells its users of Conv1D about an option that polyrank needs nobody to set.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("tiny", ["llama", "gpt2"])
def test_an_exact_adapter_becomes_a_plain_lora(tiny, case, trained, tmp_path):
    lora = case("lora", tiny, r=3, scaling="alpha/sqrt(r)")
    model = trained(lora)
    assert model.base_model.supports_lora_conversion()
    config, state = convert_to_lora(model, rank=3)
    assert (config.peft_type.value, config.r) == ("LORA", 3)
    assert state
    save_as_lora(tmp_path, model, rank=3)
    back = PeftModel.from_pretrained(lora.tiny.build(), str(tmp_path)).eval()
    assert back.peft_config["default"].peft_type.value == "LORA"
    found, expected = lora.answer(back), lora.answer(model)
    assert_close(found, expected, tol=1e-6, reason="an SVD of a matrix that has the rank exactly")


def test_a_routed_adapter_says_that_it_cannot_become_one(case, trained):
    model = trained(case("smora", r=4, k=2))
    assert not model.base_model.supports_lora_conversion()
    assert not first(model).supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, rank=4)


@pytest.mark.parametrize("name", ["lora", "smora"])
def test_trls_reference_copy_finds_every_tensor(name, case, trained):
    adapted = case(name, **{"lora": {"r": 3}, "smora": {"r": 4, "k": 2, "balance": 1e-2}}[name])
    model = trained(adapted)
    answer = adapted.answer(model)
    model.add_adapter("ref", model.peft_config["default"])
    copied = 0
    for key, param in model.named_parameters():
        if ".default." in key:
            model.get_parameter(key.replace(".default.", ".ref.")).data.copy_(param.data)
            copied += 1
    assert copied == {"lora": 28, "smora": 56}[name]
    with torch.no_grad():
        for key, param in model.named_parameters():
            if ".default." in key:
                param.mul_(0.5)
    model.set_adapter("ref")
    assert torch.equal(adapted.answer(model), answer)


def test_a_routed_adapter_merges_approximately_on_request(case, trained):
    smora = case("smora", r=4, k=2)
    model = trained(smora, steps=6)
    batches = [
        {k: v for k, v in smora.tiny.inputs(seed).items() if k != "labels"} for seed in range(3)
    ]
    answer, base = smora.answer(model), smora.answer(smora.tiny.build())
    with pytest.raises(MergeError, match=r"polyrank\.merge\(model, approximate=batches\)"):
        pr.merge(model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(MergeError):
        model.merge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = pr.merge(model, approximate=batches)
    assert not any(isinstance(m, AdaptedLinear) for m in plain.modules())
    merged = smora.answer(plain)
    assert not torch.equal(merged, answer)
    assert (merged - answer).norm() < 0.8 * (base - answer).norm()


def test_a_gate_that_never_varies_merges_exactly_by_its_mean(case, trained):
    smora = case("smora", r=4, k=4, gate="softmax_topk", balance=0.0)
    model = smora.build(init_weights=False)
    with torch.no_grad():
        for layer in adapter_of(model).layers:
            layer.core.router.weight.zero_()
    answer = smora.answer(model)
    batch = {k: v for k, v in smora.tiny.inputs().items() if k != "labels"}
    plain = pr.merge(model, approximate=[batch])
    assert_close(smora.answer(plain), answer)


def test_a_task_is_merged_for_good(case, trained):
    toy = case("moe-lora", router="task", tasks=3, r=4, experts=2)
    model = trained(toy).double()
    batch = toy.tiny.inputs(0)
    condition = torch.full((3, 1), 2)
    with torch.no_grad():
        expected = model(**batch, polyrank_condition=condition).logits
        plain = pr.merge(model, condition=condition[:1])
        assert_close(plain(**batch).logits, expected, dtype=torch.float32)
