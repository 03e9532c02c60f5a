"""Adapters on disk: exported ones load in PEFT in a process that has never heard of polyrank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file

import polyrank as pr
from polyrank.errors import CheckpointError, ConfigError, MergeError, RunError
from polyrank.frame import load_file, registry
from polyrank.io.adapters import read_saved, write_saved
from polyrank.layers import adapter_of, append, grow_head, saved_of
from polyrank.parts.transforms import plain_lora
from polyrank.testing import MODELS, Case

TOY = Path(__file__).parents[1] / "contracts" / "toys" / "scaled.py"
# Of what one float of the answer may differ, relative to the largest one.
LIMIT = 1e-6

STOCK = """
import json, sys, warnings
from pathlib import Path
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file

torch.set_num_threads(1)
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    about = json.loads((folder / "about.json").read_text())
    base = getattr(transformers, about["class"]).from_pretrained(folder / "base")
    with warnings.catch_warnings(record=True) as caught:
        model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    batch = load_file(folder / "batch")
    want = load_file(folder / "answer")["answer"]
    with torch.no_grad():
        got = model(**batch).logits
        plain = model.merge_and_unload()(**batch).logits
    top = want.abs().max()
    # transformers speaks to PEFT through this category.
    said = [str(w.message) for w in caught if w.category is not FutureWarning]
    errors = [float((x - want).abs().max() / top) for x in (got, plain)]
    found[folder.name] = [type(model.peft_config["default"]).__name__, *errors, said]
assert not [name for name in sys.modules if name.startswith("polyrank")]
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def _toy():
    load_file(TOY)
    yield
    del registry._found["scaled"]


def trained(name, model="llama", config=None, **options):
    case = Case(pr.method(name, **options), 0, MODELS[model])
    made = case.build(init_weights=False, **(config or {}))
    case.train(made)
    return case, made


def scalings():
    for scaling in ("alpha/r", "alpha/sqrt(r)", "alpha", 0.7):
        yield trained("lora", r=3, scaling=scaling)


def gated(family):
    case, model = trained("scaled", family, r=4)
    with torch.no_grad():
        for number, layer in enumerate(adapter_of(model).layers):
            layer.core.weight[: number % 5] = 0.0
    return case, model


def banked(family):
    case, model = trained("olora", family, r=2)
    append(model, 1)
    case.train(model)
    return case, model


def headed():
    head = {"module": "classifier", "names": ["a", "b"]}
    case, model = trained("lora", "vit", {"head": head, "modules_to_save": ["layernorm"]}, r=3)
    grow_head(model, ["c", "d", "e"])
    case.train(model)
    return case, model


def base_of(case, classes):
    """The tiny model with a classifier of that many classes, the same bits below it."""
    base = case.tiny.build()
    if classes:
        base.config.num_labels = base.num_labels = classes
        base.classifier = torch.nn.Linear(base.classifier.in_features, classes)
    return base


def test_exports_answer_alike_in_a_process_without_polyrank(tmp_path):
    made = [*scalings(), gated("llama"), gated("gpt2"), banked("llama"), banked("gpt2"), headed()]
    for number, (case, model) in enumerate(made):
        folder = tmp_path / "all" / f"{number}-{case.method.name}-{case.tiny.name}"
        pr.export(model, folder / "adapter")
        plan = json.loads((folder / "adapter" / "polyrank_plan.json").read_text())
        base = base_of(case, len(plan.get("labels", ())))
        base.save_pretrained(folder / "base")
        batch = {k: v for k, v in case.tiny.inputs(0).items() if k != "labels"}
        save_file(batch, folder / "batch")
        save_file({"answer": case.answer(model).contiguous()}, folder / "answer")
        (folder / "about.json").write_text(json.dumps({"class": type(base).__name__}))
    done = subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "all"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 9
    for name, (kind, live, merged, said) in found.items():
        assert kind == "LoraConfig"
        assert max(live, merged) < LIMIT, name
        assert not said, name


def test_the_head_knows_its_classes(tmp_path):
    _, model = headed()
    pr.export(model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert about["modules_to_save"] == ["classifier", "layernorm"]
    assert json.loads((tmp_path / "out" / "polyrank_plan.json").read_text())["labels"] == [*"abcde"]
    tensors = read_tensors(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors["base_model.model.classifier.weight"].shape == (5, 24)
    assert not [key for key in tensors if "polyrank" in key]


def test_a_live_adapter_as_a_value_is_what_is_saved(tmp_path):
    _, model = trained("lora", r=2)
    model.save_pretrained(tmp_path / "theirs")
    live, read = saved_of(model), read_saved(tmp_path / "theirs")
    assert {*live.tensors} == {*read.tensors}
    assert all(torch.equal(live.tensors[key], tensor) for key, tensor in read.tensors.items())
    pr.export(model, tmp_path / "ours", format="polyrank")
    again = read_saved(tmp_path / "ours")
    assert again.config["method"] == "lora"
    with torch.no_grad():
        adapter_of(model).layers[0].A.zero_()
    key = next(key for key in live.tensors if key.endswith("polyrank_A.weight"))
    assert live.tensors[key].any()
    a, b = plain_lora(again), plain_lora(read)
    assert a.config == b.config
    assert all(torch.equal(a.tensors[key], tensor) for key, tensor in b.tensors.items())


def test_the_named_adapter_is_exported(tmp_path):
    _, model = trained("lora", r=2)
    model.add_adapter(
        "other", pr.PolyrankConfig(method="lora", options={"r": 3}, target_modules=["q_proj"])
    )
    pr.export(model, tmp_path / "out", adapter="other")
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (about["r"], len(about["target_modules"])) == (3, 2)
    with pytest.raises(ConfigError, match="got 'missing', but the model holds"):
        pr.export(model, tmp_path / "no", adapter="missing")
    assert not (tmp_path / "no").exists()


def test_an_older_export_gives_way_and_other_files_stay(tmp_path):
    _, model = trained("lora", r=2)
    saved = saved_of(model)
    out = tmp_path / "out"
    write_saved(saved, out)
    write_saved(plain_lora(saved), out)
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "polyrank_plan.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"something else \(notes.txt\).* choose another folder"):
        pr.export(model, out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(RunError, match="is a file, expected a folder"):
        pr.export(model, out / "notes.txt")


def test_what_cannot_be_exported_leaves_nothing(tmp_path):
    _, routed = trained("smora", r=4, k=2)
    with pytest.raises(MergeError):
        pr.export(routed, tmp_path / "out")
    with pytest.raises(ConfigError, match="got 'onnx', expected one of peft-lora, polyrank"):
        pr.export(routed, tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        read_saved(tmp_path)
    _, model = trained("lora", r=2)
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_saved(tmp_path / "a")
