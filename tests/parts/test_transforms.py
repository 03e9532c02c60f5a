"""Adapters to adapter: what a plain LoRA holds, and what it refuses; values, no stock PEFT."""

from pathlib import Path

import pytest
import torch

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, MergeError, RunError
from polyrank.frame import Saved, keyed, load_file, registry
from polyrank.io.adapters import write_saved
from polyrank.layers import absorb, adapter_of, append, replica, saved_of
from polyrank.parts.transforms import lora_of, of_replica, plain_lora
from polyrank.testing import MODELS, Case, assert_close

TOYS = Path(__file__).parents[1] / "contracts" / "toys"


@pytest.fixture(scope="module", autouse=True)
def _toys():
    names = [path.stem for path in sorted(TOYS.glob("*.py")) if load_file(path)]
    assert names == ["growing", "scaled", "shadowed", "sided"]
    yield
    for name in names:
        del registry._found[name]


def trained(name, model="llama", config=None, **options):
    case = Case(pr.method(name, **options), 0, MODELS[model])
    made = case.build(init_weights=False, **(config or {}))
    case.train(made)
    return case, made


def deltas(saved):
    """B A of every site of a plain LoRA, its scale asked of its own config."""
    found = {}
    for key, A in saved.tensors.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            r = saved.config["rank_pattern"].get(path, saved.config["r"])
            alpha = saved.config["alpha_pattern"].get(path, saved.config["lora_alpha"])
            assert A.shape[0] == r
            B = saved.tensors[key.replace("lora_A", "lora_B")]
            found[path] = alpha / r * B.double() @ A.double()
    return found


def same(saved, model):
    """Hold a plain LoRA to the updates of the live model."""
    found = deltas(saved)
    for view in adapter_of(model).layers:
        want = view.delta()
        got = found.pop(view.site.path, torch.zeros_like(want)).to(want)
        assert_close(got, want)
    assert not found


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3},
        {"r": 3, "scaling": "alpha/sqrt(r)"},
        {"r": 3, "scaling": "alpha"},
        {"r": 3, "scaling": 0.7},
    ],
    ids=lambda options: str(options.get("scaling", "alpha/r")),
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_scaling_becomes_one(options, family):
    narrow, other = {"llama": ("q_proj", "v_proj"), "gpt2": ("c_attn", "c_fc")}[family]
    pattern = {"rank_pattern": {narrow: 2}, "alpha_pattern": {other: 5.0}}
    _, model = trained("lora", family, pattern, **options)
    saved = saved_of(model)
    before = {key: tensor.clone() for key, tensor in saved.tensors.items()}
    found = plain_lora(saved)
    same(found, model)
    assert {*found.plan["ranks"].values()} == {2, 3}
    assert all(torch.equal(saved.tensors[key], tensor) for key, tensor in before.items())
    assert found.config["fan_in_fan_out"] is (family == "gpt2")


def test_ranks_of_gates_that_are_zero_go_and_a_layer_without_any_is_no_target():
    _, model = trained("scaled", r=4)
    layers = adapter_of(model).layers
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.core.weight[: number % 5] = 0.0
    found = plain_lora(saved_of(model))
    same(found, model)
    ranks = found.plan["ranks"]
    assert [ranks[layer.site.path] for layer in layers] == [4 - n % 5 for n in range(len(layers))]
    empty = {path for path, rank in ranks.items() if rank == 0}
    assert empty
    assert {*found.config["target_modules"]} == {*ranks} - empty
    again = plain_lora(saved_of(model))
    assert again.config == found.config


def test_an_adapter_without_any_rank_keeps_one_of_zeros():
    _, model = trained("scaled", r=2)
    with torch.no_grad():
        for layer in adapter_of(model).layers:
            layer.core.weight.zero_()
    found = plain_lora(saved_of(model))
    assert {*found.plan["ranks"].values()} == {0}
    (delta,) = deltas(found).values()
    assert not delta.any()
    assert len(found.config["target_modules"]) == 1


def test_a_bank_comes_first():
    case, model = trained("olora", r=2)
    append(model, 1)
    case.train(model)
    saved = saved_of(model)
    found = plain_lora(saved)
    same(found, model)
    path = adapter_of(model).layers[0].site.path
    bank = saved.tensors[f"base_model.model.{path}.polyrank_bank.A"]
    assert torch.equal(found.tensors[f"base_model.model.{path}.lora_A.weight"][:2], bank)
    assert {*found.plan["ranks"].values()} == {3}


def test_an_archive_is_part_of_it_and_absorbed_updates_without_one_are_refused():
    case, model = trained("lora", r=2)
    layers = adapter_of(model).layers
    before = {layer.site.path: layer.weight().clone() for layer in layers}
    absorb(model, archive=True)
    # Drawn anew, the live ranks do nothing yet.
    assert {*plain_lora(saved_of(model)).plan["ranks"].values()} == {2}
    case.train(model)
    found = plain_lora(saved_of(model))
    updates = deltas(found)
    for layer in adapter_of(model).layers:
        whole = layer.weight() - before[layer.site.path] + layer.delta()
        assert_close(updates[layer.site.path].to(whole), whole)
    assert {*found.plan["ranks"].values()} == {4}

    case, model = trained("lora", r=2)
    absorb(model)
    with pytest.raises(MergeError, match=r"absorbed into the base and not kept .* archive=True"):
        plain_lora(saved_of(model))


@pytest.mark.parametrize("delta", ["none", "number", "diagonal", "matrix"])
def test_a_shadow_is_subtracted(delta):
    _, model = trained("shadowed", r=2, delta=delta)
    for layer in adapter_of(model).layers:
        A0, B0, kept = layer.shadow
        layer.shadow = (A0, B0, None if kept is None else kept * 1.5)
    found = plain_lora(saved_of(model))
    same(found, model)
    assert {*found.plan["ranks"].values()} == {4}


def test_factors_in_double_stay_double():
    _, model = trained("lora", r=2)
    model.double()
    found = plain_lora(saved_of(model))
    same(found, model)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float64}


def test_factors_below_single_are_written_in_single():
    _, model = trained("lora", r=2)
    model.bfloat16()
    found = plain_lora(saved_of(model))
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


def test_a_shared_tail_of_two_paths_is_no_confusion():
    from peft.utils.other import get_pattern_key

    A, B = torch.ones(1, 3), torch.ones(2, 1)
    wide = (A.expand(2, 3), B.expand(2, 2))
    found = lora_of({"fc": (A, B), "x.fc": wide, "y.x.fc": (A, B)}, {})
    ranks = found.config["rank_pattern"]
    picked = {path: ranks[get_pattern_key(list(ranks), path)] for path in ("fc", "x.fc", "y.x.fc")}
    assert picked == {"fc": 1, "x.fc": 2, "y.x.fc": 1}


def test_what_no_lora_equals_is_refused():
    _, routed = trained("smora", r=4, k=2)
    with pytest.raises(MergeError, match=r"RankGate of 'smora' weighs ranks .* keep it as a poly"):
        plain_lora(saved_of(routed))
    _, sided = trained("sided")
    with pytest.raises(MergeError, match=r"holds 2 blocks, the first at model\.layers\.0\.mlp"):
        plain_lora(saved_of(sided))


def test_what_does_not_fit_its_config_is_refused():
    _, model = trained("scaled", r=3)
    saved = saved_of(model)
    path = adapter_of(model).layers[0].site.path
    stem = f"base_model.model.{path}.polyrank"
    with pytest.raises(ConfigError, match="type 'LORA', expected POLYRANK"):
        plain_lora(plain_lora(saved))
    for part, says in (("A", "has no polyrank_A.weight"), ("core", "does not take")):
        fewer = {k: t for k, t in saved.tensors.items() if f"{stem}_{part}.weight" != k}
        with pytest.raises(CheckpointError, match=says):
            plain_lora(Saved(tensors=fewer, config=saved.config))
    short = {**saved.tensors, f"{stem}_B.weight": saved.tensors[f"{stem}_B.weight"][:, :2]}
    with pytest.raises(CheckpointError, match="which do not fit"):
        plain_lora(Saved(tensors=short, config=saved.config))


@pytest.mark.parametrize("banked", [False, True], ids=["live", "banked"])
@pytest.mark.parametrize("absorbed", [False, True], ids=["original", "absorbed"])
def test_a_replica_as_an_adapter_answers_like_its_view(tmp_path, banked, absorbed):
    """Whatever lies below it, in a bank or in the base, and whatever has grown since."""
    case = Case(pr.method("codyra", r=3, start="ones"), 0, MODELS["llama"])
    model = case.build(init_weights=False)
    shaken = keyed("replica")

    def learn():
        with torch.no_grad():
            for layer in pr.adapter_of(model).layers:
                layer.B.normal_(generator=shaken)
                layer.core.gate.normal_(generator=shaken)

    if absorbed:
        learn()
        absorb(model, archive=True)
    if banked:
        learn()
        append(model, 2)
    learn()
    replica(model, "then")
    with pr.view(model, "then"):
        expected = case.answer(model)
    learn()
    if not absorbed:
        append(model, 4)
    found = of_replica(saved_of(model), "then")
    assert not any("replica" in key for key in found.tensors)
    for kind, saved in (("ours", found), ("stock", plain_lora(found))):
        write_saved(saved, tmp_path / kind)
        loaded = pr.load(case.tiny.build(), tmp_path / kind).eval()
        assert_close(case.answer(loaded), expected)
    with pytest.raises(ConfigError, match="replica: got 'now', but the adapter keeps then"):
        of_replica(saved_of(model), "now")
    with pytest.raises(ConfigError, match="replica: got 'then', but the adapter keeps none"):
        of_replica(found, "then")


@pytest.mark.parametrize("where", ["A", "B", "gate"])
def test_an_update_that_is_not_finite_is_not_exported(where):
    case = Case(pr.method("sora", r=3), 0, MODELS["llama"])
    model = case.build(init_weights=False)
    layer = pr.adapter_of(model).layers[1]
    with torch.no_grad():
        {"A": layer.A, "B": layer.B, "gate": layer.core.gate}[where].view(-1)[0] = float("nan")
    with pytest.raises(RunError, match=f"1 places hold NaN or infinity .{layer.site.path}"):
        plain_lora(saved_of(model))
