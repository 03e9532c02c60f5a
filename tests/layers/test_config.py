"""The saved configuration: what it takes, what it refuses, all at once; which modules it hits."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError
from polyrank.layers import AdaptedLinear, adapter_of, hook_of
from polyrank.testing import MODELS, assert_close

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def edit(folder, **changes):
    """Rewrites fields of a saved config."""
    file = f"{folder}/adapter_config.json"
    with open(file) as stream:
        about = json.load(stream)
    about.update(changes)
    with open(file, "w") as stream:
        json.dump(about, stream)


def sites(model):
    return {layer.site.path: layer.site for layer in adapter_of(model).layers}


def untouched(model, kinds):
    return kinds == [type(m) for m in model.modules()] and hook_of(model) is None


# --- options -------------------------------------------------------------------------------------


def test_an_unknown_option_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown option 'alhpa'.* did you mean 'alpha'\?"):
        pr.PolyrankConfig(method="lora", options={"alhpa": 3})


def test_an_unknown_method_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"got 'smroa'.* did you mean 'smora'\?"):
        pr.PolyrankConfig(method="smroa")


def test_all_errors_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        pr.PolyrankConfig(
            method="smora",
            options={"r": 0, "k": "two", "gates": 1},
            rank_pattern={"q_proj": 0},
            alpha_pattern={"q_proj": -1},
            bias="all",
            target_parameters=["mlp.experts.down_proj"],
            head={"names": []},
            layers_pattern="layers",
        )
    text = str(caught.value)
    assert len(caught.value.problems) >= 9
    for word in ("'gates'", "r: got 0", "k: got 'two'", "rank_pattern", "alpha_pattern", "bias"):
        assert word in text
    assert "target_parameters" in text
    assert "head: got" in text
    assert "layers_pattern" in text


def test_options_are_completed_so_that_a_file_says_all(case, folder):
    saved = folder(case("smora", r=4, k=2).build())
    with open(f"{saved}/adapter_config.json") as stream:
        about = json.load(stream)
    assert about["method"] == "smora"
    assert about["options"] == pr.method("smora", r=4, k=2).options()
    assert about["schema_version"] == 1
    assert about["peft_type"] == "POLYRANK"


def test_a_file_of_a_newer_version_is_refused(case, folder):
    saved = folder(case("lora", r=2).build())
    edit(saved, schema_version=99)
    with pytest.raises(CheckpointError, match=r"got 99, expected at most 1; .*pip install -U"):
        PeftConfig.from_pretrained(saved)


def test_an_unknown_field_of_a_file_is_dropped_by_peft_with_a_warning(case, trained, folder):
    lora = case("lora", r=2)
    model = trained(lora)
    saved = folder(model)
    edit(saved, future_field=[1, 2])
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'future_field'."):
        back = PeftModel.from_pretrained(lora.tiny.build(), saved)
    assert torch.equal(lora.answer(back.eval()), lora.answer(model))


def test_an_unknown_option_in_a_file_is_refused(case, folder):
    saved = folder(case("lora", r=2).build())
    edit(saved, options={"r": 2, "sparsity": 0.5})
    with pytest.raises(ConfigError, match="unknown option 'sparsity'"):
        PeftConfig.from_pretrained(saved)


def test_a_strategy_owns_no_structure():
    with pytest.raises(ConfigError, match="'joint' is a strategy and owns no structure"):
        pr.PolyrankConfig(method="joint")


# --- which modules -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "up_proj"], 4),
        (r".*\.1\.self_attn\.[qv]_proj", 2),
        (None, 4),
        (["model.layers.0.mlp.up_proj"], 1),
    ],
    ids=["all-linear", "names", "expression", "defaults", "path"],
)
def test_targets_are_named_as_in_peft(targets, count, case):
    assert len(sites(case("lora", r=2).build(target_modules=targets))) == count


def test_modules_are_excluded_and_blocks_chosen(case):
    lora = case("lora", r=2)
    model = lora.build(target_modules="all-linear", exclude_modules=["down_proj", "o_proj"])
    assert len(sites(model)) == 10
    assert not any("down_proj" in path or "o_proj" in path for path in sites(model))
    model = lora.build(target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    assert sorted(sites(model)) == [f"model.layers.1.self_attn.{n}_proj" for n in "qv"]
    model = lora.build(target_modules=["q_proj"], layers_to_transform=0, layers_pattern="layers")
    assert sorted(sites(model)) == ["model.layers.0.self_attn.q_proj"]


def test_ranks_and_scales_by_pattern(case, trained, folder):
    lora = case("lora", r=4, alpha=8.0)
    patterns = {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 3},
        "alpha_pattern": {"v_proj": 16.0},
    }
    model = trained(lora, target_modules="all-linear", **patterns)
    found = sites(model)
    assert found["model.layers.0.self_attn.q_proj"].r == 2
    assert found["model.layers.0.mlp.up_proj"].r == 4
    assert found["model.layers.1.mlp.up_proj"].r == 3
    layers = {layer.site.path: layer for layer in adapter_of(model).layers}
    assert layers["model.layers.0.self_attn.q_proj"].scale == 8.0 / 2
    assert layers["model.layers.0.self_attn.v_proj"].scale == 16.0 / 4
    assert layers["model.layers.1.mlp.up_proj"].A.shape[0] == 3
    back = PeftModel.from_pretrained(lora.tiny.build(), folder(model)).eval()
    assert torch.equal(lora.answer(back), lora.answer(model))


def test_a_pattern_that_matches_nothing_is_noticed(case):
    with pytest.warns(RuntimeWarning, match="did not match any targeted module"):
        case("lora", r=2).build(target_modules=["q_proj"], rank_pattern={"z_proj": 1})


def test_a_rank_that_the_method_cannot_have_somewhere_leaves_the_model_whole(case):
    smora = case("smora", r=4, k=2)
    base = smora.tiny.build()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError, match=r"down_proj.*got r=1, k=2"):
        pr.adapt(base, smora.method, rank_pattern={"down_proj": 1})
    assert untouched(base, kinds)
    assert all(p.requires_grad for p in base.parameters())


def test_a_target_that_matches_nothing_is_answered_with_names_that_would(case):
    lora = case("lora", r=2)
    base = lora.tiny.build()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError) as caught:
        pr.adapt(base, lora.method, target_modules=["qproj"])
    text = str(caught.value)
    assert "target_modules: got ['qproj'], which matches no layer; did you mean 'q_proj'?" in text
    assert all(name in text for name in LLAMA)
    assert "all-linear" in text
    assert untouched(base, kinds)
    with pytest.raises(ConfigError, match=r"got 'nothing\.\*', which matches no layer"):
        get_peft_model(base, pr.PolyrankConfig(target_modules="nothing.*"))
    with pytest.raises(ConfigError, match=r"whole path; write \['q_proj'\]"):
        get_peft_model(base, pr.PolyrankConfig(target_modules="q_proj"))
    assert untouched(base, kinds)


def test_a_single_name_that_matches_nothing_is_refused_too(case):
    lora = case("lora", r=2)
    base = lora.tiny.build()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError) as caught:
        pr.adapt(base, lora.method, target_modules=["q_proj", "vproj", "dow_proj"])
    assert len(caught.value.problems) == 2
    assert "'vproj' matches no layer; did you mean 'v_proj'? leave it out" in str(caught.value)
    assert untouched(base, kinds)


def test_everything_excluded_is_refused(case):
    lora = case("lora", r=2)
    with pytest.raises(ConfigError, match="matches no layer"):
        lora.build(target_modules=["q_proj"], exclude_modules=["q_proj"])


class Odd(nn.Module):
    """Layers that cannot be adapted, beside one that can."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.embed(x)
        h = h + self.conv(h.transpose(1, 2)).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.last(h)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("embed", r"'embed' is a Embedding, and polyrank adapts linear layers"),
        ("conv", r"'conv' is a Conv1d, and polyrank adapts linear layers"),
        ("attention", r"'attention' is a MultiheadAttention"),
        ("out_proj", r"belongs to nn\.MultiheadAttention.*leave it out with exclude_modules"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_and_nothing_changes(target, words):
    base = Odd()
    kinds = [type(m) for m in base.modules()]
    with pytest.raises(ConfigError, match=words):
        pr.adapt(base, pr.method("lora", r=2), target_modules=["last", target])
    assert untouched(base, kinds)


def test_all_linear_layers_of_an_odd_model_leave_attention_alone():
    base = Odd()
    x = torch.randint(0, 8, (2, 5))
    expected = base(x)
    model = pr.adapt(base, pr.method("lora", r=2), exclude_modules=["out_proj"])
    assert sorted(sites(model)) == ["last"]
    # Attention of frozen weights takes another path through torch.
    assert_close(model(x), expected)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match=r"Sequential has no linear layer to adapt; pass a model"):
        pr.adapt(nn.Sequential(nn.Conv2d(1, 1, 1)), pr.method("lora"))


def test_only_methods_can_be_adapted_with():
    with pytest.raises(ConfigError, match=r"expected a method such as polyrank\.method"):
        pr.adapt(MODELS["llama"].build(), pr.method("joint"))
    with pytest.raises(ConfigError, match="smora: k: got 9"):
        pr.adapt(MODELS["llama"].build(), pr.method("smora", r=4, k=2).__class__(r=4, k=9))


# --- config and tensors --------------------------------------------------------------------------


@pytest.fixture
def saved(case, trained, folder):
    smora = case("smora", r=4, k=2)
    return smora, folder(trained(smora))


def rewrite(folder, change):
    file = f"{folder}/adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


KEY = "base_model.model.model.layers.0.mlp.up_proj.polyrank_core.router.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), r"router\.weight is missing"),
        (lambda t: t.update({KEY: t[KEY][:2]}), r"got \(2, 24\), expected \(4, 24\)"),
        (
            lambda t: t.update({KEY.replace("router", "gate"): t[KEY].clone()}),
            "is not in the config",
        ),
        (lambda t: t.update({KEY.replace("up_", "z_"): t[KEY].clone()}), "is not in the config"),
        (lambda t: t.clear(), "and 50 more"),
    ],
    ids=["missing", "shape", "unknown", "elsewhere", "empty"],
)
def test_tensors_that_do_not_fit_are_refused_before_anything_is_copied(change, words, saved):
    smora, place = saved
    model = smora.build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    rewrite(place, change)
    with pytest.raises(CheckpointError, match=words):
        model.load_adapter(place, adapter_name="loaded")
    with pytest.raises(CheckpointError, match="config and tensors disagree"):
        pr.hotswap(model, place)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], before[n]) for n in before)
    with pytest.raises(CheckpointError, match=r"load the adapter_config\.json that was saved"):
        pr.load(smora.tiny.build(), place)


def test_a_config_that_asks_for_other_shapes_is_refused(saved):
    smora, place = saved
    edit(place, options={"r": 6, "k": 2})
    with pytest.raises(CheckpointError, match=r"got \(4, \d+\), expected \(6, \d+\)"):
        PeftModel.from_pretrained(smora.tiny.build(), place)


def test_an_adapter_of_another_architecture_is_refused(saved, case):
    _, place = saved
    with pytest.raises((CheckpointError, ConfigError), match=r"layers|transformer\.h"):
        PeftModel.from_pretrained(MODELS["gpt2"].build(), place)


def test_modules_trained_whole_travel_with_the_adapter(case, trained, folder):
    smora = case("smora", r=4, k=2)
    model = trained(smora, target_modules=["q_proj"], modules_to_save=["lm_head"])
    held = {id(p) for p in model.parameters() if p.requires_grad}
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    assert id(head) in held
    with torch.no_grad():
        head.add_(0.5)
    back = PeftModel.from_pretrained(smora.tiny.build(), folder(model)).eval()
    assert torch.equal(smora.answer(back), smora.answer(model))


def test_trained_tokens_travel_with_the_adapter(case, folder):
    lora = case("lora", r=2)
    model = lora.build(target_modules=["q_proj"], trainable_token_indices=[4, 5])
    rows = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
    with torch.no_grad():
        for row in rows:
            row.add_(1.0)
    assert rows
    back = PeftModel.from_pretrained(lora.tiny.build(), folder(model)).eval()
    assert torch.equal(lora.answer(back), lora.answer(model))


def test_old_style_bin_files_are_written_and_read(case, trained, folder):
    smora = case("smora", r=4, k=2)
    model = trained(smora)
    place = folder(model, safe_serialization=False)
    back = PeftModel.from_pretrained(smora.tiny.build(), place).eval()
    assert torch.equal(smora.answer(back), smora.answer(model))


def test_the_layer_prints_its_name(case):
    model = case("lora", r=2).build()
    layer = next(m for m in model.modules() if isinstance(m, AdaptedLinear))
    assert repr(layer).startswith("polyrank.AdaptedLinear(")
