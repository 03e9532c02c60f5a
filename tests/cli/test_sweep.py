"""`polyrank sweep`: from a file to the table, with the engine and with bad words."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.cli import main
from polyrank.engine.vit import small_vit

SPEC = """
stream: one.yaml
model: base
seeds: [0]
train: {epochs: 1, batch_size: 64, warmup: 0.0}
lr: 1e-2
lr_fixed_because: a test of the engine
methods:
  lora: {options: {r: 2}}
  wild: {method: lora, options: {r: 2, alpha: 8}, lr: 1e30}
"""


def called(capsys, *words, code=0):
    """Run the command in this process; return what it prints on both streams."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured


@pytest.fixture
def spec():
    Path("one.yaml").write_text("use: digits\noptions: {tasks: 1}\n", encoding="utf-8")
    Path("spec.yaml").write_text(SPEC, encoding="utf-8")
    return "spec.yaml"


def test_a_sweep_runs_reports_and_goes_on(capsys, spec):
    small_vit(2).save_pretrained("base")
    first = called(capsys, "sweep", spec, "--out", "mine")
    assert "lora lr=0.01 seed 0: validation 0." in first.err
    assert "wild lr=1e+30 seed 0: diverged: loss: got nan at" in first.err
    assert "1 diverged" in first.out
    folder = Path("mine")
    made = {p.name for p in folder.iterdir()}
    assert made == {"lr.png", "runs", "runs.jsonl", "spec.lock", "table.csv", "table.md"}
    lora, wild = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
    # Ten batches of 64 rows or fewer; both began with the same model and the same rows.
    assert lora["updates"] == 10
    assert (lora["order"], lora["base"]) == (wild["order"], wild["base"])
    assert (wild["state"], wild["validation"], wild["test"]) == ("diverged", 0.0, 0.0)
    run = json.loads((folder / "runs" / lora["id"] / "run.json").read_text())
    assert (run["seed"], run["train"]["lr"], run["validate"]) == (0, 0.01, True)
    results = json.loads((folder / "runs" / lora["id"] / "results.json").read_text())
    (system,) = results["systems"]
    assert lora["validation"] == system["validation"]["metrics"]["unrestricted"]["average_accuracy"]
    assert lora["test"] == system["metrics"]["unrestricted"]["average_accuracy"]

    table = (folder / "table.md").read_bytes()
    (folder / "table.md").unlink()
    again = called(capsys, "sweep", spec, "--out", "mine")
    assert (again.out, again.err) == (first.out, "")
    assert (folder / "table.md").read_bytes() == table
    # A run that was done when its line was cut off is read back.
    (folder / "runs.jsonl").write_text(f"{json.dumps(wild)}\n{json.dumps(lora)[:50]}")
    called(capsys, "sweep", spec, "--out", "mine")
    assert [*map(json.loads, (folder / "runs.jsonl").read_text().splitlines())] == [wild, lora]
    assert (folder / "table.md").read_bytes() == table


def test_a_dry_call_writes_nothing(capsys, spec):
    text = called(capsys, "sweep", spec, "--dry").out
    assert text.splitlines()[-2] == "2 runs left, 20 updates"
    assert sorted(p.name for p in Path().iterdir()) == ["one.yaml", "spec.yaml"]


def test_ends_of_a_range_that_are_moved_are_told_beside_the_outline(capsys):
    text = "methods: {lora: }\nlr: {low: 1e-3, high: 1e-2}\nseeds: [1]\n"
    Path("own.yaml").write_text(text, encoding="utf-8")
    captured = called(capsys, "sweep", "own.yaml", "--dry")
    assert captured.err.startswith("lr of lora: low 0.001 and high 0.01 are no points 0.0002")
    assert captured.out.startswith("lora: 4 rates from 1.12e-03")


def test_the_recipe_is_valid_and_has_a_name(capsys):
    lines = called(capsys, "sweep", "sweep-digits", "--dry").out.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == ["lora", "lora-plus", "smora"]
    assert lines[3].startswith("36 runs left, 2268 updates;")
    probed = called(capsys, "sweep", "sweep-digits", "--dry", "--probe").out.splitlines()
    assert probed[0].startswith("lora, probe: 4 rates")
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("recipe", "left"),
    # Tasks at once share their last batch: 616 rows are 20 batches; 207, 205 and 204 are 21.
    [("sweep-starts", "144 runs left, 14400 updates"), ("sweep-starts-text", "72 runs left")],
)
def test_the_sweeps_of_starts_compare_eight_on_one_joint_task(capsys, recipe, left):
    lines = called(capsys, "sweep", recipe, "--dry").out.splitlines()
    named = [
        "lora",
        "rslora",
        "lora-plus",
        "lora-ga",
        "lora-sb",
        "altlora",
        "altlora-plus",
        "allora",
    ]
    assert [line.partition(":")[0] for line in lines[:8]] == named
    assert lines[8].startswith(left)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ("digits",),
            "sweep: got 'digits', expected a YAML file or one of: sweep-digits, sweep-starts-text,",
        ),
        (("missing.yaml",), "sweep: the file 'missing.yaml' does not exist"),
        (("sweep-digits", "--report-only"), "holds no spec.lock, so it is no sweep"),
    ],
)
def test_bad_words_end_with_one_clear_error(capsys, words, says):
    captured = called(capsys, "sweep", *words, code=2)
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not captured.out
    assert not list(Path().iterdir())


def test_faults_of_a_file_are_lines_in_a_process_of_its_own():
    Path("bad.yaml").write_text("methods: {lroa: }\nlr: 1e-3\nsedes: [1]\n", encoding="utf-8")
    words = [sys.executable, "-m", "polyrank", "sweep", "bad.yaml", "--out", "x"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["sedes", "lr", "methods.lroa"]
    assert all(line.startswith("error: bad.yaml: ") for line in lines)
    assert not Path("x").exists()


def test_a_run_that_fails_is_named_and_the_code_is_two(capsys, spec, monkeypatch):
    from polyrank.engine.sweep import once
    from polyrank.errors import RunError

    def fail(*args, **options):
        raise RunError("disk: full")

    small_vit(2).save_pretrained("base")
    monkeypatch.setattr(once, "run", fail)
    captured = called(capsys, "sweep", spec, code=2)
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: lora lr=0.01 seed 0: RunError: disk: full",
        "error: wild lr=1e+30 seed 0: RunError: disk: full",
    ]
    assert "1 failed, 1 missing" in captured.out
