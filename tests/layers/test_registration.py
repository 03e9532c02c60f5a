"""Registration with PEFT: either import order, in fresh processes, by every way of loading."""

import json
import os
import pickle
import subprocess
import sys

import peft
import pytest
from peft.utils import PeftType

import polyrank as pr
from polyrank.layers import plugin
from polyrank.testing import MODELS

CHILD = """
import sys
order, root = sys.argv[1], sys.argv[2]
if order == "peft first":
    import peft
    import polyrank
else:
    import polyrank
    # Looks for PEFT when it is imported, and imports it when it meets an adapter.
    from transformers import AutoModelForCausalLM
    assert "peft" not in sys.modules
    lazy = AutoModelForCausalLM.from_pretrained(root + "/adapter")
import json, warnings
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.utils import PeftType

torch.set_num_threads(1)
wanted = load_file(root + "/answer")
batch = {"input_ids": wanted["ids"]}

def same(model):
    with torch.no_grad():
        return torch.equal(model.eval()(**batch).logits, wanted["logits"])

def base():
    return LlamaForCausalLM.from_pretrained(root + "/base")

adapter = root + "/adapter"
found = {
    "type": PeftType("POLYRANK") is PeftType.POLYRANK and PeftType.POLYRANK in list(PeftType),
    "config": PeftConfig.from_pretrained(adapter).method == "smora",
    "PeftModel": same(PeftModel.from_pretrained(base(), adapter)),
    "meta": same(PeftModel.from_pretrained(base(), adapter, low_cpu_mem_usage=True)),
    "AutoPeftModelForCausalLM": same(AutoPeftModelForCausalLM.from_pretrained(adapter)),
    "AutoPeftModel": same(AutoPeftModel.from_pretrained(adapter)),
    "AutoModel": same(AutoModelForCausalLM.from_pretrained(adapter)),
    "load_adapter": True,
    "polyrank.load": same(polyrank.load(base(), adapter)),
}
model = base()
model.load_adapter(adapter)
found["load_adapter"] = same(model)
if order == "polyrank first":
    found["lazy"] = same(lazy)
names = ["v_proj", "q_proj", "down_proj", "up_proj", "k_proj", "o_proj"]
config = polyrank.PolyrankConfig(method="lora", options={"r": 2}, target_modules=names, seed=0,
                                 exclude_modules=["z", "lm_head"], modules_to_save=None)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    again = get_peft_model(base(), config)
again.save_pretrained(root + "/" + order)
print(json.dumps(found))
"""

ORDERS = ("polyrank first", "peft first")


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    """What two fresh processes with different hash seeds say, and the folder they wrote to."""
    from safetensors.torch import save_file

    from polyrank.testing import Case

    root = tmp_path_factory.mktemp("orders")
    case = Case(pr.method("smora", r=4, k=2), 0, MODELS["llama"])
    base = case.tiny.build()
    base.save_pretrained(root / "base")
    base.name_or_path = str(root / "base")
    model = pr.adapt(base, case.method, seed=1)
    case.train(model)
    model.save_pretrained(root / "adapter")
    ids = case.tiny.inputs()["input_ids"]
    save_file({"ids": ids, "logits": model(input_ids=ids).logits.detach()}, root / "answer")
    said = {}
    for seed, order in enumerate(ORDERS):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD, order, root],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONHASHSEED": str(seed + 1)},
            check=False,
        )
        assert done.returncode == 0, f"{order}: {done.stderr[-3000:]}"
        said[order] = json.loads(done.stdout.splitlines()[-1])
    return root, said


@pytest.mark.parametrize("order", ORDERS)
def test_every_way_of_loading_works_in_every_import_order(order, children):
    _, said = children
    assert len(said[order]) == 9 + (order == "polyrank first")
    assert all(said[order].values()), said[order]


def test_two_processes_write_the_same_bytes(children):
    root, _ = children
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, *others = [(root / order / name).read_bytes() for order in ORDERS]
        assert first
        assert all(other == first for other in others), name
    about = json.loads((root / ORDERS[0] / "adapter_config.json").read_text())
    assert about["target_modules"] == sorted(about["target_modules"])
    assert about["exclude_modules"] == ["lm_head", "z"]


def test_the_type_is_a_real_member_of_the_enum():
    member = PeftType.POLYRANK
    assert member is PeftType("POLYRANK") is PeftType["POLYRANK"]
    assert member in list(PeftType)
    assert (member.name, member.value) == ("POLYRANK", "POLYRANK")
    assert {member: 1}["POLYRANK"] == 1
    assert pickle.loads(pickle.dumps(member)) is member


def test_a_second_registration_changes_nothing():
    before = dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)
    plugin.install()
    assert before == peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING


def test_the_config_that_comes_back_from_json_holds_the_member(case, trained, folder):
    saved = folder(trained(case("smora", r=4, k=2)))
    config = peft.PeftConfig.from_pretrained(saved)
    assert type(config) is pr.PolyrankConfig
    assert config.peft_type is PeftType.POLYRANK
    assert config.build() == pr.method("smora", r=4, k=2)


def test_the_model_card_says_what_it_is_and_how_it_is_loaded(case, tmp_path):
    base = case("lora").tiny.build()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = pr.adapt(base, pr.method("lora", r=2))
    path = tmp_path / "adapters" / "mine"
    model.save_pretrained(path)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "- polyrank\n" in card.split("---")[1]
    assert "[More Information Needed]" not in card
    assert "- Method: `lora`" in card
    assert "`r=2 alpha=16.0 scaling=alpha/r dropout=0.0 lr_ratio=1.0`" in card
    assert "- Base: `../../base`, seen from this folder." in card
    names = {}
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('folder = "."', f'folder = "{path}"'), names)
    assert names["model"].peft_config["default"].build() == pr.method("lora", r=2)

    # It follows the adapter until somebody takes it over.
    pr.truncate(model, 1)
    model.save_pretrained(path)
    card = (path / "README.md").read_text(encoding="utf-8")
    assert card.count("# An adapter of polyrank") == 1
    (path / "README.md").write_text("---\nlicense: mit\n---\nMine.\n", encoding="utf-8")
    model.save_pretrained(path)
    assert "\nMine.\n" in (path / "README.md").read_text(encoding="utf-8")
