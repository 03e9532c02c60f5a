"""codyra in whole runs: what is saved, loaded elsewhere, exported, resumed and shown."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import polyrank as pr
from polyrank import engine
from polyrank.engine import machine
from polyrank.engine.phase_trainer import PhaseTrainer
from polyrank.engine.reading import ImageReader
from polyrank.io.adapters import read_saved
from polyrank.parts.gates import kept_ranks
from polyrank.parts.ramp import Ramp
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

OPTIONS = {"r": 4, "levels": 2, "dense": 0.0, "kappa_max": 0.05}
FAST = {"epochs": 2, "batch_size": 4, "lr": 1e-2}


def go(out, stream=None, **changes):
    return engine.run(
        tiny_vit(),
        stream or few_digits(rows=12, tasks=3),
        pr.method("codyra", **{**OPTIONS, **changes}),
        train=FAST,
        references=[],
        save_every=1,
        out=out,
        progress=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three tasks, and its test rows."""
    done = go(tmp_path_factory.mktemp("codyra") / "run")
    rows = [r for task in few_digits(rows=12, tasks=3) for r in task.data["test"]]
    return done, ImageReader().collate(rows)["pixel_values"]


def changed_base(model):
    """A fresh base with the weights that the run left."""
    base = tiny_vit()
    for layer in pr.adapter_of(model).layers:
        base.get_submodule(layer.site.path).weight.data = layer.module.dense_weight().clone()
    return base


FRESH = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import ViTForImageClassification
torch.set_num_threads(1)
root, adapter, whole, *exports = Path(sys.argv[1]), *sys.argv[2:]
x, wanted = (load_file(root / name) for name in ("x", "wanted"))

def gap(base, folders, kind, merges, **shape):
    model = ViTForImageClassification.from_pretrained(root / base, **shape).eval()
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).eval()
        model = model.merge_and_unload() if merges else model
    with torch.no_grad():
        found = model(x["x"]).logits
    assert found.shape == wanted[kind].shape
    return float((found - wanted[kind]).abs().max() / wanted[kind].abs().max())

print(gap("pristine", exports, "stock", True))
# Without one of them it is another model.
print(gap("pristine", exports[:-1], "stock", True))
wide = {"num_labels": wanted["ours"].shape[1], "ignore_mismatched_sizes": True}
print(gap("pristine", [whole], "ours", False, **wide))
assert "polyrank" not in sys.modules
import polyrank
print(gap("pristine", [adapter], "ours", False))
print(gap("changed", [adapter], "ours", False))
"""


def test_the_saved_adapter_fits_both_bases_and_the_exports_stock_peft(finished, tmp_path):
    done, x = finished
    changed = changed_base(done.model)
    tiny_vit().save_pretrained(tmp_path / "pristine")
    changed.save_pretrained(tmp_path / "changed")
    with torch.no_grad():
        answers = {"ours": done.model(x).logits, "stock": changed.eval()(x).logits}
    save_file({"x": x}, tmp_path / "x")
    save_file({k: v.contiguous() for k, v in answers.items()}, tmp_path / "wanted")
    exports = done.system()["exports"]
    assert list(exports) == ["01-4-5", "02-6-7", "03-8-9"]
    folders = [done.path / path for path in (done.system()["adapter"], *exports.values())]
    folders.insert(1, pr.export(done.model, tmp_path / "whole"))
    told = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    stock, fewer, whole, pristine, again = map(float, told.stdout.split())
    assert max(stock, whole) < 1e-6
    assert fewer > 1e-4
    assert pristine < 1e-5
    assert again < 1e-5


def test_an_exported_task_has_the_ranks_that_it_kept(finished):
    done, _ = finished
    figure = done.system()["figures"][0]
    rows, values = figure["rows"], torch.tensor(figure["values"])
    paths = [layer.site.path for layer in pr.adapter_of(done.model).layers]
    assert list(rows) == [*paths, "mean"]
    assert list(figure["columns"][:2]) == ["4-5", "4-5, drawn"]
    assert_close(values[-1], values[:-1].mean(0))
    assert 0 < values[:-1].min() <= values.max() <= 4
    for number, folder in enumerate(done.system()["exports"].values()):
        plan = json.loads((done.path / folder / "polyrank_plan.json").read_text())
        assert [plan["ranks"][path] for path in paths] == values[:-1, 2 * number].tolist()


def test_a_bank_exports_the_same_updates_and_an_unarchived_base_none(tmp_path, caplog):
    stream = few_digits(rows=12, tasks=2)
    done = {
        name: go(tmp_path / name, stream, **options)
        for name, options in {
            "base": {},
            "bank": {"into": "bank"},
            "bare": {"archive": False},
        }.items()
    }
    assert "exports" not in done["bare"].system()
    (told,) = [r.getMessage() for r in caplog.records if r.name == "polyrank.parts.settle"]
    assert told == "codyra: nothing is exported, since the ranks of 2 tasks were not archived"
    first, second = (
        read_saved(done[name].path / next(iter(done[name].system()["exports"].values())))
        for name in ("base", "bank")
    )
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], t) for name, t in second.tensors.items())
    assert all(layer.bank is not None for layer in pr.adapter_of(done["bank"].model).layers)


def test_codyra_12_every_task_begins_with_an_empty_optimiser(tmp_path, monkeypatch):
    bind, begin, seen = Ramp.bind, Ramp.begin, []

    def bound(self, adapter, optimizer, workshop):
        self.held = optimizer
        bind(self, adapter, optimizer, workshop)

    def begun(self, step):
        if step.index in (0, 1) and (step.task, step.index) not in [s[:2] for s in seen]:
            seen.append((step.task, step.index, len(self.held.state)))
        begin(self, step)

    monkeypatch.setattr(Ramp, "bind", bound)
    monkeypatch.setattr(Ramp, "begin", begun)
    go(tmp_path / "run", few_digits(rows=12, tasks=2))
    tensors = seen[1][2]
    assert seen == [(0, 0, 0), (0, 1, tensors), (1, 0, 0), (1, 1, tensors)]
    assert tensors > 0


class Killed(BaseException):
    """Stands for a kill."""


def losses_of(out, monkeypatch, dies_after=None):
    """Run, or go on with, the stream; return the losses of all updates made here."""
    found, own = [], PhaseTrainer._own_loss
    save, written = machine.Checkpoints.save, 0

    def told(self, model, batch):
        loss, answer = own(self, model, batch)
        found.append(float(loss.detach()))
        return loss, answer

    def dying(self, state):
        nonlocal written
        save(self, state)
        written += 1
        if written == dies_after:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(PhaseTrainer, "_own_loss", told)
        patched.setattr(machine.Checkpoints, "save", dying)
        if dies_after:
            with pytest.raises(Killed):
                go(out, few_digits(rows=24, tasks=2))
            return found, None
        return found, go(out, few_digits(rows=24, tasks=2))


@pytest.mark.parametrize("where", ["inside a task", "between tasks"])
def test_codyra_13_the_next_losses_are_those_of_an_uninterrupted_run(where, tmp_path, monkeypatch):
    whole, done = losses_of(tmp_path / "whole", monkeypatch)
    assert len(whole) == 24
    events = [json.loads(line) for line in (done.path / "events.jsonl").read_text().splitlines()]
    saves = [event for event in events if event["event"] == "checkpoint"]
    last = max(i for i, e in enumerate(saves) if (e["group"], e["stage"]) == (0, "work"))
    stop = last + 2 if where == "between tasks" else 3
    first, _ = losses_of(tmp_path / "cut", monkeypatch, dies_after=stop)
    second, again = losses_of(tmp_path / "cut", monkeypatch)
    assert len(first) == (12 if where == "between tasks" else 3)
    assert len(second) >= 10
    assert first + second == whole
    ours, theirs = done.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert done.system()["figures"] == again.system()["figures"]


def test_the_engine_publishes_the_vital_sign_of_every_task(finished):
    done, _ = finished
    events = [json.loads(line) for line in (done.path / "events.jsonl").read_text().splitlines()]
    signs = [event for event in events if event["event"] == "vital_sign"]
    values = done.system()["figures"][0]["values"][-1]
    assert [sign["kept_ranks"] for sign in signs] == list(values[::2])
    assert [sign["twin_ranks"] for sign in signs] == list(values[1::2])
    assert kept_ranks(pr.adapter_of(done.model)).keys() == set(
        done.system()["figures"][0]["rows"][:-1]
    )


def test_a_task_too_short_for_the_levels_is_refused_before_anything_is_loaded(tmp_path):
    stream = few_digits(rows=12, tasks=2)
    with pytest.raises(pr.ConfigError) as caught:
        go(tmp_path / "run", stream, levels=7)
    assert len(caught.value.problems) == 1
    assert "codyra: task '4-5-6': levels: got 7 for the last 100% of 6 updates" in str(caught.value)
    assert not (tmp_path / "run").exists()
    plan = engine.plan.Plan.build(
        stream, pr.method("codyra", **{**OPTIONS, "levels": 7}), ["joint"], [], FAST, None, 0
    )
    # Pooled, both tasks give 12 updates.
    assert plan.method.levels == 7
