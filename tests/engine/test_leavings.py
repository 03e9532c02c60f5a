"""What a system leaves besides its scores: figures and exported adapters, asked for once."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel

import polyrank as pr
from polyrank.engine import machine
from polyrank.engine.leavings import exported, figures_of
from polyrank.errors import ConfigError
from polyrank.frame import Boundary, Figure, Method, Saved
from polyrank.frame.plain import Identity
from polyrank.io.adapters import read_saved
from polyrank.parts.transforms import plain_lora
from polyrank.testing import assert_close
from polyrank.testing.streams import few_digits, tiny_vit

NAN = math.nan
ASKED = []


class Archive(Boundary):
    """Keeps the adapter after each task, in a memory that is saved with the run."""

    def finish(self, task, workshop, state):
        kept = workshop.saved()
        memory = workshop.memory("archive")
        memory[f"task-{len(memory)}"] = {"tensors": kept.tensors, "head": kept.config["head"]}

    def exports(self, workshop):
        now = workshop.saved()
        return {
            name: plain_lora(
                Saved(tensors=kept["tensors"], config={**now.config, "head": kept["head"]})
            )
            for name, kept in workshop.memory("archive").items()
        }

    def figures(self, workshop, routing):
        ASKED.append(routing)
        names = tuple(workshop.memory("archive"))
        values = ((0.5, NAN), (1.0, -2.0))
        return [Figure(name="reuse", title="Reuse", rows=names, columns=("a", "b"), values=values)]


class Gated(Identity):
    """Shows its gates: 1 for every rank and token."""

    def gates_of(self, h, z):
        return torch.ones_like(h)


@dataclass(frozen=True, kw_only=True)
class Archived(Method):
    name = "archived"

    def core(self, site):
        return Gated(site.r)

    def boundary(self):
        return Archive()


def run(out, monkeypatch):
    # A method outside of any file, known to PEFT's config by its name.
    monkeypatch.setitem(pr.frame.registry._found, "archived", Archived)
    return pr.run(
        tiny_vit(4),
        few_digits(tasks=2),
        Archived(r=2),
        references=["sequential"],
        train={"epochs": 1, "batch_size": 8},
        out=out,
        progress=False,
    )


def test_figures_and_exports_are_in_the_results_and_adapters_in_the_folder(tmp_path, monkeypatch):
    ASKED.clear()
    result = run(tmp_path / "run", monkeypatch)
    # Once for the method, not for the reference.
    (routing,) = ASKED
    assert [len(layer) for layer in routing["gate"][0]] == [2] * len(routing["layers"])
    assert all(value == 1.0 for task in routing["gate"] for layer in task for value in layer)
    own, reference = result.results["systems"]
    assert own["routing"] == routing
    assert "figures" not in reference
    assert "exports" not in reference
    (figure,) = json.loads((tmp_path / "run" / "results.json").read_text())["systems"][0]["figures"]
    assert figure["rows"] == ["task-0", "task-1"]
    assert figure["values"] == [[0.5, None], [1.0, -2.0]]
    again = pr.io.RunFolder.open(tmp_path / "run").results()["systems"][0]
    assert math.isnan(again["figures"][0]["values"][0][1])
    assert again["exports"] == {name: f"exports/archived/{name}" for name in figure["rows"]}

    assert "Reuse: archived r=2" in result.report().read_text(encoding="utf-8")
    assert (tmp_path / "run" / "archived-reuse.png").is_file()

    last = read_saved(tmp_path / "run" / "exports" / "archived" / "task-1")
    base = tiny_vit(4)
    base.classifier = torch.nn.Linear(16, len(last.plan["labels"]))
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / again["exports"]["task-1"]).eval()
    pixels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(loaded(pixels).logits, result.model.eval()(pixels).logits)


def test_a_run_killed_after_its_last_task_leaves_the_same(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", monkeypatch)
    entries = machine.Engine._entries

    def killed(self, course):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine.Engine, "_entries", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", monkeypatch)
    monkeypatch.setattr(machine.Engine, "_entries", entries)
    # Its base lies elsewhere by now, which is nothing that PEFT should warn of.
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = run(tmp_path / "moved", monkeypatch)
    for place in ("adapters/archived", "adapters/sequential", "exports/archived/task-1"):
        about = json.loads((tmp_path / "moved" / place / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == str((tmp_path / "moved" / "base").resolve())
        card = (tmp_path / "moved" / place / "README.md").read_text()
        assert f"`{'/'.join(['..'] * (place.count('/') + 1))}/base`, seen from this folder" in card
    events = list(pr.io.RunFolder.open(tmp_path / "moved").events())
    begun = [e["system"] for e in events if e["event"] == "task_start"]
    assert len(begun) == 4
    assert len([e for e in events if e["event"] == "resumed"]) == 1
    for key in ("figures", "exports", "unrestricted"):
        assert str(resumed.system()[key]) == str(whole.system()[key])
    for name in ("task-0", "task-1"):
        one, other = (
            read_saved(tmp_path / r / "exports/archived" / name) for r in ("moved", "whole")
        )
        assert all(torch.equal(other.tensors[key], tensor) for key, tensor in one.tensors.items())


class Shows(Boundary):
    def __init__(self, *figures, exports=None):
        self.made, self.kept = list(figures), exports or {}

    def figures(self, workshop, routing):
        return self.made

    def exports(self, workshop):
        return self.kept


def figure(name="a", rows=("x",), columns=("y",), values=((1.0,),)):
    return Figure(name=name, title="t", rows=rows, columns=columns, values=values)


def test_what_is_wrong_with_figures_is_said_at_once():
    wrong = [figure("A b"), figure(), figure(), figure("c", values=((1.0, 2.0),)), figure("d", ())]
    with pytest.raises(ConfigError) as caught:
        figures_of([Shows(*wrong)], None, None)
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "figure 'A b': got this name, expected lower-case words joined by '-'",
        "figure 'a': is given twice",
        "figure 'c': got rows of [2] values, expected 1 rows of 1, at least one each",
        "figure 'd': got rows of [1] values, expected 0 rows of 1, at least one each",
    ]


def test_names_of_exports_are_folders_each_once(tmp_path):
    saved = Saved(tensors={"a": torch.ones(1)}, config={"peft_type": "LORA"})
    with pytest.raises(ConfigError, match=r"got the name '\.\./x', expected letters"):
        exported([Shows(exports={"../x": saved})], None, tmp_path, "lora")
    with pytest.raises(ConfigError, match="got the name 'x' twice"):
        exported([Shows(exports={"x": saved})] * 2, None, tmp_path, "lora")
    assert [path.name for path in (tmp_path / "exports" / "lora").iterdir()] == ["x"]


def test_a_boundary_leaves_nothing_unless_it_says_so(tmp_path):
    assert figures_of([Boundary()], None, None) == []
    assert exported([Boundary()], None, tmp_path, "lora") == {}
    assert list(tmp_path.iterdir()) == []
