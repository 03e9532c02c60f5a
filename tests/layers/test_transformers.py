"""transformers' own verbs for adapters: add, load, switch, delete, save, without a PeftModel."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import polyrank as pr
from polyrank.layers import AdaptedLinear


@pytest.fixture
def answer():
    def read(case, model):
        with torch.no_grad():
            return case.tiny.read(model.eval()(**case.tiny.inputs()))

    return read


def test_an_adapter_is_added_switched_and_deleted(either, answer):
    model = either.tiny.build()
    base = answer(either, model)
    config = pr.PolyrankConfig(
        method=either.method.name,
        options=either.method.options(),
        target_modules="all-linear",
        seed=2,
        init_weights=False,
    )
    model.add_adapter(config, adapter_name="first")
    first = answer(either, model)
    assert not torch.equal(first, base)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".first." in n and "balance_bias" not in n for n in trainable)
    model.disable_adapters()
    assert torch.equal(answer(either, model), base)
    model.enable_adapters()
    assert torch.equal(answer(either, model), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    other = pr.PolyrankConfig(
        method="lora", options={"r": 2}, target_modules=["q_proj"], seed=4, init_weights=False
    )
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.add_adapter(other, adapter_name="second")
    assert model.active_adapters() == ["second"]
    second = answer(either, model)
    assert not torch.equal(second, first)
    model.set_adapter("first")
    assert torch.equal(answer(either, model), first)
    model.delete_adapter("second")
    assert not any(".second." in n for n, _ in model.named_parameters())
    assert torch.equal(answer(either, model), first)


def test_a_folder_is_loaded_into_a_plain_model(either, trained, folder, answer):
    adapted = trained(either)
    model = either.tiny.build()
    info = model.load_adapter(folder(adapted))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert torch.equal(answer(either, model), either.answer(adapted))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "polyrank" in n)


def test_an_adapter_folder_names_its_base_model(either, tmp_path, answer):
    base = either.tiny.build()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = pr.adapt(base, either.method, seed=1)
    either.train(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(answer(either, model), either.answer(adapted))


def test_a_model_with_an_adapter_saves_the_adapter_only(either, trained, folder, tmp_path, answer):
    adapted = trained(either)
    model = either.tiny.build()
    model.load_adapter(folder(adapted), adapter_name="mine")
    state = model.get_adapter_state_dict("mine")
    assert state
    assert all("polyrank_" in key and ".mine" not in key for key in state)
    model.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    fresh = either.tiny.build()
    fresh.load_adapter(str(tmp_path / "again"))
    assert torch.equal(answer(either, fresh), either.answer(adapted))


def test_heads_load_without_a_peft_model(case, trained, folder):
    lora = case("lora", "vit", r=2)
    adapted = trained(lora, head={"module": "classifier", "names": ["a", "b"]})
    model = lora.tiny.build()
    model.load_adapter(folder(adapted))
    assert torch.equal(lora.answer(model.eval()), lora.answer(adapted))


def test_hotswap_of_transformers_is_refused_by_transformers(either, trained, folder):
    saved = folder(trained(either))
    model = either.tiny.build()
    model.load_adapter(saved)
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(saved, adapter_name="default", hotswap=True)


def test_a_model_from_pretrained_is_adapted_in_bf16(either, tmp_path):
    either.tiny.build().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = pr.adapt(base, either.method, seed=1)
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLinear))
    assert layer.views["default"].A.dtype == torch.float32
    with torch.no_grad():
        assert model(**either.tiny.inputs()).logits.dtype == torch.bfloat16
