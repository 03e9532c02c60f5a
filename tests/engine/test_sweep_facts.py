"""What a sweep reads in a run's folder: scores, divergence, budget."""

import math

import pytest

from polyrank.engine.sweep.facts import diverged, facts, fallen
from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.testing import assert_close

NAN = math.nan
ASKED = {
    "method": {"name": "lora", "options": {"r": 8}},
    "stream": {"name": "toy", "scenario": "class-incremental", "hash": "abc"},
    "model": {"source": "here", "class": "ViT", "fingerprint": "f"},
    "seed": 0,
    "train": {"lr": 1e-3, "epochs": 2},
}
SHOWN = ("average_accuracy", "unrestricted", 0.0)


def figures(score):
    matrix = [[score]]
    metrics = {view: {"average_accuracy": score} for view in ("unrestricted", "restricted")}
    return {"unrestricted": matrix, "restricted": matrix, "counts": [10], "metrics": metrics}


def system(**changes):
    return {
        "name": "lora",
        "label": "lora r=8",
        "role": "method",
        **figures(0.6),
        "validation": figures(0.7),
        "seconds": 2.5,
        "trainable": 128,
        "adapter": None,
        "routing": None,
        "extra_samples": 4.0,
        **changes,
    }


def made(path, losses=(2.0, 1.0), asked=ASKED, phases=("train",), task="a", **changes):
    """A finished run whose phases log one loss every 10 updates."""
    folder = RunFolder.create(path, asked, command=["x"])
    folder.event("phase", system="base", task="0", phase="base", total=440)
    for phase in phases:
        where = {"system": "lora r=8", "task": task}
        folder.event("phase", **where, phase=phase, total=10 * len(losses))
        for number, loss in enumerate(losses, 1):
            folder.event("train", **where, step=10 * number, total=100, loss=loss)
    tasks = [{"name": "a", "labels": ["0"], "n_train": 10, "n_test": 10}]
    folder.write_results({"tasks": tasks, "systems": [system(**changes)]})
    folder.finish()
    return RunFolder.open(path)


def test_scores_and_spendings_are_those_of_the_method(tmp_path):
    found = facts(made(tmp_path / "run", phases=("warm", "train")), *SHOWN)
    assert found["state"] == "ok"
    assert_close([found["validation"], found["test"]], [0.7, 0.6])
    # Two phases of two entries; the base model's updates are not the method's.
    assert found["updates"] == 40
    assert (found["seconds"], found["parameters"], found["extra_samples"]) == (2.5, 128, 4.0)
    assert found["loss"] == [2.0, 1.0, 2.0, 1.0]
    # Updates are counted through both phases.
    assert found["loss_at"] == [10, 20, 30, 40]
    assert found["versions"]["python"]


def test_a_resumed_phase_counts_once(tmp_path):
    folder = RunFolder.create(tmp_path / "run", ASKED, command=["x"])
    where = {"system": "lora r=8", "task": "a"}
    for first in (10, 20):
        folder.event("phase", **where, phase="train", total=30)
        for step in range(first, 40, 10):
            folder.event("train", **where, step=step, total=30, loss=float(step))
    tasks = [{"name": "a", "labels": ["0"], "n_train": 10, "n_test": 10}]
    folder.write_results({"tasks": tasks, "systems": [system()]})
    folder.finish()
    found = facts(folder, *SHOWN)
    assert found["updates"] == 30
    assert found["loss"] == [10.0, 20.0, 30.0]
    assert found["loss_at"] == [10, 20, 30]


def test_order_and_base_tell_what_methods_share(tmp_path):
    def shared(name, **changes):
        found = facts(made(tmp_path / name, asked={**ASKED, **changes}), *SHOWN)
        return found["order"], found["base"]

    first = shared("first")
    other = {"name": "smora", "options": {}}
    assert shared("rate", train={"lr": 5e-2, "epochs": 2}, method=other) == first
    assert shared("epochs", train={"lr": 1e-3, "epochs": 3})[0] != first[0]
    assert shared("seed", seed=1)[0] != first[0]
    assert shared("data", stream={**ASKED["stream"], "hash": "xyz"})[0] != first[0]
    assert shared("base", model={**ASKED["model"], "fingerprint": "g"})[1] != first[1]
    assert shared("moved", model={**ASKED["model"], "source": "there"}) == first


def test_a_base_in_the_folder_is_told_by_its_content(tmp_path):
    bases = []
    for name, content in (("one", b"1"), ("two", b"2"), ("same", b"1")):
        folder = made(tmp_path / name)
        (folder.path / "base").mkdir()
        (folder.path / "base" / "model.safetensors").write_bytes(content)
        bases.append(facts(folder, *SHOWN)["base"])
    assert bases[0] == bases[2] != bases[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"validation": None}, "has no unrestricted average_accuracy on validation,"),
        ({"validation": figures(NAN)}, "on validation,"),
        (figures(NAN), "on test,"),
    ],
    ids=["none", "nan", "test"],
)
def test_a_run_without_scores_is_refused(tmp_path, changes, says):
    with pytest.raises(RunError, match=says):
        facts(made(tmp_path / "run", **changes), *SHOWN)


def curve(*losses, every=10):
    return {every * number: loss for number, loss in enumerate(losses, 1)}


@pytest.mark.parametrize(
    ("losses", "every", "lost"),
    [
        ((1.0, 3.1, 3.1, 3.1, 3.1, 3.1), 10, True),
        ((1.0, 3.1, 3.1, 3.1, 3.1), 10, False),
        ((1.0, 3.1, 3.1, 3.0, 3.1, 3.1, 3.1), 10, False),
        ((1.0, 3.1, 3.1, 3.0, 3.1, 3.1, 3.1, 3.1, 3.1), 10, True),
        ((1.0, *[9.0] * 49), 1, False),
        ((1.0, *[9.0] * 50), 1, True),
        ((1.0, math.inf), 50, True),
        ((5.0, 4.0, 3.0), 100, False),
        ((), 10, False),
    ],
)
def test_a_loss_three_times_its_first_for_fifty_updates_has_diverged(losses, every, lost):
    assert (diverged(curve(*losses, every=every)) is not None) is lost


def test_a_diverged_run_has_the_worst_value_though_it_has_scores(tmp_path):
    found = facts(made(tmp_path / "run", losses=(1.0, *[4.0] * 6)), *SHOWN)
    assert (found["state"], found["validation"], found["test"]) == ("diverged", 0.0, 0.0)
    assert "above 3 times its first value (1) for 50 updates until update 60" in found["why"]
    low = facts(made(tmp_path / "low", losses=(1.0, *[4.0] * 6)), *SHOWN[:2], -1.0)
    assert low["test"] == -1.0


def test_each_phase_has_its_own_first_loss(tmp_path):
    # The second phase begins above three times the end of the first, and falls.
    folder = made(tmp_path / "run", losses=(8.0, 2.0, 1.5, 1.4, 1.3, 1.2, 1.1), phases=("a", "b"))
    assert facts(folder, *SHOWN)["state"] == "ok"


def test_a_run_that_stopped_at_a_loss_that_is_no_number_has_diverged(tmp_path):
    folder = made(tmp_path / "run")
    error = RunError("loss: got nan at lora r=8, task 'a', step 3; lower the learning rate")
    found = fallen(folder, error, 0.0)
    assert (found["state"], found["validation"], found["test"]) == ("diverged", 0.0, 0.0)
    assert found["why"] == "loss: got nan at lora r=8, task 'a', step 3"
    assert found["order"] == facts(folder, *SHOWN)["order"]
    assert fallen(folder, RunError("weights: 3 tensors are no longer finite (x)"), 0.0)
    assert fallen(folder, RunError("disk: full"), 0.0) is None


def test_a_long_loss_is_thinned(tmp_path):
    found = facts(made(tmp_path / "run", losses=tuple(2 - i / 1000 for i in range(501))), *SHOWN)
    assert 100 <= len(found["loss"]) <= 200
    assert found["loss"][0] == 2.0
    assert found["loss_at"][:2] == [10, 10 + 10 * round(501 / len(found["loss"]))]
    assert len(found["loss_at"]) == len(found["loss"])
