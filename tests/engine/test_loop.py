"""A run through the digits stream: matrices, references, folder, and what is refused before."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch

import polyrank as pr
from polyrank import engine, metrics
from polyrank.engine import vit as bases
from polyrank.engine.reading import ImageReader
from polyrank.engine.settings import Settings
from polyrank.errors import ConfigError, InertError, RunError
from polyrank.frame import Loss, Method, registry
from polyrank.streams import stream

FAST = Settings(epochs=2, lr=5e-3)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return bases.small_vit(4)


@pytest.fixture(scope="module")
def ran(vit, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smora"
    method = pr.method("smora", r=8, k=2)
    return engine.run(copy.deepcopy(vit), "digits", method, train=FAST, out=out, progress=False)


def test_all_systems_are_measured_where_they_can_be(ran):
    names = [system["name"] for system in ran.results["systems"]]
    assert names == ["smora", "sequential", "joint", "probe"]
    for system in ran.results["systems"]:
        for kind in ("restricted", "unrestricted"):
            matrix = np.array(system[kind])
            measured = ~np.isnan(matrix)
            lower = np.tril(np.ones((3, 3), dtype=bool))
            if system["name"] == "joint":
                lower[:2] = False
            assert (measured == lower).all()
        whole = ~np.isnan(np.array(system["restricted"]))
        assert (
            np.array(system["restricted"])[whole] >= np.array(system["unrestricted"])[whole]
        ).all()


def test_metrics_are_those_of_the_matrices(ran):
    assert ran.metrics["average_accuracy"] == metrics.average_accuracy(ran.matrix)
    assert ran.metrics["forgetting"] == metrics.forgetting(ran.matrix)
    joint = ran.system("joint")
    assert np.isnan(joint["metrics"]["unrestricted"]["forgetting"])


def test_the_folder_holds_what_a_reader_needs(ran):
    run = json.loads((ran.path / "run.json").read_text())
    assert run["status"] == "done"
    assert run["method"] == {"name": "smora", "options": pr.method("smora", r=8, k=2).options()}
    assert {"torch", "peft", "transformers", "python"} <= set(run["versions"])
    assert len(run["stream"]["hash"]) == 64
    events = [
        json.loads(line)["event"] for line in (ran.path / "events.jsonl").read_text().splitlines()
    ]
    assert events.count("evaluate") == 3 + 3 + 1
    assert ran.report().is_file()


def test_routing_says_how_ranks_are_used(ran):
    routing = ran.system()["routing"]
    assert len(routing["load"]) == 3
    for task in routing["load"]:
        assert len(task) == len(routing["layers"])
        assert all(abs(sum(layer) - 2) < 1e-9 for layer in task)
    assert ran.system("sequential")["routing"] is None


def test_the_saved_adapter_is_the_one_that_was_measured(ran):
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(ran.path / "base")
    model = pr.load(model, ran.path / ran.system()["adapter"]).eval()
    for column, task in enumerate(stream("digits")):
        found = ImageReader().score(model, task, task.data["test"], 256)
        assert found.restricted == ran.restricted[2, column]
        assert found.unrestricted == ran.matrix[2, column]


def test_the_same_seed_gives_the_same_bits(vit, ran, tmp_path):
    again = engine.run(
        copy.deepcopy(vit), "digits", pr.method("smora", r=8, k=2),
        train=FAST, out=tmp_path / "x", references=(), progress=False,
    )  # fmt: skip
    first = dict(ran.model.named_parameters())
    second = dict(again.model.named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = engine.run(
        copy.deepcopy(vit), "digits", pr.method("smora", r=8, k=2),
        train=FAST, out=tmp_path / "y", references=(), seed=1, progress=False,
    )  # fmt: skip
    assert not np.array_equal(other.matrix, again.matrix, equal_nan=True)


def test_a_run_leaves_base_and_global_randomness_alone(vit, tmp_path):
    base = copy.deepcopy(vit).train()
    base.vit.eval()
    modes = [module.training for module in base.modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    engine.run(
        base,
        method=pr.method("lora", r=2),
        train=Settings(epochs=1),
        out=tmp_path / "a",
        references=("probe",),
        progress=False,
    )
    drawn = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))
    assert [module.training for module in base.modules()] == modes
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "joint"}, "is no method"),
        ({"strategies": ["lora"]}, "is no strategy"),
        ({"target_modules": ["nope"]}, "nope"),
    ],
    ids=["strategy-as-method", "method-as-strategy", "targets"],
)
def test_what_does_not_fit_is_refused_before_a_folder(vit, tmp_path, given, says):
    with pytest.raises(ConfigError, match=says):
        engine.run(copy.deepcopy(vit), **{"method": "lora", **given}, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_losses_in_a_loop_of_ones_own_are_refused(vit, monkeypatch):
    class Losing(Method):
        name = "losing"

        def losses(self):
            return [Loss()]

    monkeypatch.setitem(registry._found, "losing", Losing)
    model = pr.adapt(copy.deepcopy(vit), Losing(r=2))
    optimizer = torch.optim.SGD(pr.parameter_groups(model, lr=0.1))
    with pytest.raises(ConfigError, match="losing"):
        pr.attach(optimizer, model)


def test_evaluation_draws_nothing(vit):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    task = stream("digits")[0]
    ImageReader().score(vit, task, task.data["test"], 64)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_alone_needs_no_second_sequential_lora(vit, tmp_path):
    found = engine.run(
        copy.deepcopy(vit),
        method=pr.method("lora", r=4),
        train=Settings(epochs=1),
        out=tmp_path / "a",
        progress=False,
    )
    assert [s["name"] for s in found.results["systems"]] == ["lora", "joint", "probe"]


def test_faults_come_together_and_write_nothing(vit, tmp_path):
    with pytest.raises(ConfigError) as caught:
        engine.run(
            vit, method=pr.method("moe-lora", router="task", tasks=3, experts=2, r=4),
            references=("sequental",), train=Settings(epochs=0), out=tmp_path / "a",
        )  # fmt: skip
    text = str(caught.value)
    assert "needs" in text
    assert "did you mean 'sequential'" in text
    assert "epochs" in text
    assert not (tmp_path / "a").exists()


def test_a_wrong_rank_hides_no_other_fault(tmp_path):
    with pytest.raises(ConfigError) as caught:
        engine.run(method=registry.get("lora")(r=0), references=("sequental",), out=tmp_path / "a")
    assert len(caught.value.problems) == 2


def test_a_stream_without_pretraining_data_needs_a_model(tmp_path):
    bare = dataclasses.replace(stream("digits"), pretraining=None)
    with pytest.raises(ConfigError, match="no data to train one on; pass --model"):
        engine.run(stream=bare, method="lora", out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_model_that_does_not_fit_the_stream_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not take rows of task"):
        engine.run(bases.small_vit(4, image=16), out=tmp_path / "a")
    with pytest.raises(ConfigError, match="classifier"):
        engine.run(bases.small_vit(4).vit, out=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_diverged_run_ends_with_a_clear_error_and_is_marked(vit, tmp_path):
    with pytest.raises(RunError, match="lower the learning rate"):
        engine.run(
            copy.deepcopy(vit),
            method=pr.method("lora", r=4),
            train=Settings(lr=1e30, max_grad_norm=1e30, epochs=5),
            out=tmp_path / "a",
            progress=False,
        )
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "failed"


def test_a_method_that_does_nothing_is_found_out(vit, tmp_path, monkeypatch):
    class Inert(Method):
        name = "inert"
        trains = frozenset({"head"})

    monkeypatch.setitem(registry._found, "inert", Inert)
    with pytest.raises(InertError, match="stayed zero"):
        engine.run(
            copy.deepcopy(vit),
            method=Inert(r=2),
            train=Settings(epochs=1),
            out=tmp_path / "a",
            progress=False,
        )
