"""What a comparison says of runs that were not trained alike."""

import csv
import io
import math

from polyrank import metrics
from polyrank.io import RunFolder
from polyrank.layers.config import NO_TARGETS
from polyrank.reports import compare_table, compare_view

MATRIX = [[0.9, math.nan], [0.5, 0.9]]


def write(path, *names, seed=0, targets=("q",), **train):
    """A finished run of systems by their names, the first one its method."""
    row = {"unrestricted": MATRIX, "restricted": MATRIX, "counts": [10, 10], "seconds": 1.0}
    row |= {"trainable": 9, "adapter": None, "routing": None}
    figures = metrics.summary(MATRIX, [10, 10], missing="nan")
    row["metrics"] = {"unrestricted": figures, "restricted": figures}
    systems = [
        {"name": name, "label": f"{name} r=4", "role": "reference" if n else "method", **row}
        for n, name in enumerate(names)
    ]
    tasks = [{"name": n, "labels": None, "n_train": 9, "n_test": 10} for n in "ab"]
    run = {
        "method": {"name": names[0]},
        "stream": {"name": "toy", "scenario": "class-incremental", "tasks": tasks},
        "model": {"source": "embedded"},
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "seed": seed,
        "train": train,
    }
    folder = RunFolder.create(path, run, command=["polyrank", "run"])
    folder.write_results({"tasks": tasks, "systems": systems})
    folder.finish()


def notes(tmp_path):
    return compare_view.gather([tmp_path]).notes


def test_systems_that_were_trained_differently_are_named(tmp_path):
    write(tmp_path / "a", "mora", "probe", epochs=1, lr=0.1)
    write(tmp_path / "b", "allora", "sequential", epochs=2, lr=0.1)
    write(tmp_path / "c", "sora", epochs=2, lr=0.1, targets=["q", "v"])
    assert notes(tmp_path) == [
        "Trained differently: epochs 1 (mora), 2 (allora, sora, sequential); "
        "target_modules q (mora, allora, sequential), q, v (sora)."
    ]


def test_a_method_that_adapts_blocks_alone_has_no_targets_to_tell(tmp_path):
    write(tmp_path / "a", "mora", "sequential", lr=0.1)
    write(tmp_path / "b", "sema", lr=0.1, targets=NO_TARGETS)
    assert notes(tmp_path) == []
    write(tmp_path / "c", "sora", lr=0.1, targets=["q", "v"])
    (told,) = notes(tmp_path)
    assert told == ("Trained differently: target_modules q (mora, sequential), q, v (sora).")
    write(tmp_path / "d", "sema", "sequential", lr=0.1, targets=NO_TARGETS)
    labels = {system.label for system in compare_view.gather([tmp_path]).systems}
    assert {"sequential r=4 [target_modules=q]", "sequential r=4 [target_modules=–]"} < labels


def test_one_name_at_two_settings_is_told_by_its_label(tmp_path):
    for lr in (0.1, 0.2):
        write(tmp_path / str(lr), "mora", lr=lr)
    told = "lr 0.1 (mora r=4 [lr=0.1]), 0.2 (mora r=4 [lr=0.2])"
    assert f"Trained differently: {told}." in notes(tmp_path)


def test_seeds_of_one_configuration_were_trained_alike(tmp_path):
    for seed in range(2):
        write(tmp_path / str(seed), "mora", "sequential", seed=seed, lr=0.1)
    assert notes(tmp_path) == []


def test_without_a_reference_there_are_no_differences(tmp_path):
    write(tmp_path / "a", "mora", lr=0.1)
    found = compare_view.gather([tmp_path])
    text = compare_table.markdown(found)
    assert "choose what they are taken to by --baseline LABEL, one of 'mora r=4'." in text
    assert "## Difference" not in text
    (row,) = csv.DictReader(io.StringIO(compare_table.sheet(found)))
    assert (row["system"], row["baseline"]) == ("mora r=4", "")


def test_a_baseline_that_was_chosen_needs_no_note(tmp_path):
    write(tmp_path / "a", "mora", "sora", lr=0.1)
    assert compare_view.gather([tmp_path], "sora").notes == []
