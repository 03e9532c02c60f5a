"""The commands that a user types, in a process of their own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from polyrank.cli import main
from polyrank.engine.interrupt import Interrupts

ESCAPE = "\x1b"


def polyrank(*words, cwd):
    """Run the command line and return the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "polyrank", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def faults(capsys, *words):
    """Run a command that must fail in this process; return its error lines."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return lines


def test_a_method_of_ones_own_trains_saves_and_reports(tmp_path):
    made = polyrank("new-method", "scaled", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    shown = polyrank("methods", "--method-file", "scaled.py", cwd=tmp_path)
    assert "scaled (method)" in shown.stdout
    assert "first value of every weight" in shown.stdout

    words = ["--method-file", "scaled.py", "--set", "r=4", "start=0.5", "--train", "epochs=1"]
    ran = polyrank("run", *words, "--references", "none", "--out", "mine", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "scaled r=4" in ran.stdout
    assert ESCAPE not in ran.stdout + ran.stderr
    folder = tmp_path / "mine"
    assert {"run.json", "events.jsonl", "results.json", "report.html"} <= {
        p.name for p in folder.iterdir()
    }
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "done"
    assert run["method"]["options"]["start"] == 0.5
    results = json.loads((folder / "results.json").read_text())
    (system,) = results["systems"]
    assert system["unrestricted"][0][1] is None
    assert (folder / system["adapter"] / "adapter_model.safetensors").is_file()

    again = polyrank(
        "run", *words, "--references", "none", "--out", "mine", "--seed", "1", cwd=tmp_path
    )
    assert again.returncode == 2
    assert "mine" in again.stderr
    assert json.loads((folder / "results.json").read_text()) == results

    (folder / "report.html").unlink()
    reported = polyrank("report", "mine", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert (folder / "report.html").stat().st_size > 10_000


def test_help_teaches(tmp_path):
    top = polyrank("--help", cwd=tmp_path)
    assert top.returncode == 0
    for word in ("run", "methods", "report", "doctor", "new-method"):
        assert word in top.stdout
    assert "--set r=8 alpha=16" in polyrank("run", "--help", cwd=tmp_path).stdout


def test_doctor_finds_nothing_wrong_here(tmp_path):
    found = polyrank("doctor", cwd=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("ok ") == 4


def test_report_needs_no_torch(tmp_path):
    code = (
        "import sys; from polyrank.cli import main\n"
        "try: main(['report', 'nowhere'])\n"
        "except SystemExit as end: assert end.code == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nowhere" in done.stderr


def test_every_fault_is_named_before_anything_happens(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = faults(
        capsys,
        "run",
        "--set",
        "r=32",
        "lora_alhpa=2",
        "--train",
        "lrr=1",
        "epochs=0",
        "--with",
        "ewcc",
        "--out",
        "x",
    )
    text = "\n".join(lines)
    assert len(lines) == 4
    assert "lora_alhpa" in text
    assert "did you mean 'lr'" in text
    assert "epochs: got 0" in text
    assert "ewcc" in text
    assert not (tmp_path / "x").exists()


def test_faults_of_settings_do_not_hide_what_cannot_be_combined(capsys):
    words = ["--method", "mora", "--with", "ewc", "--train", "epochs=-1"]
    first, second = faults(capsys, "run", *words)
    assert "epochs: got -1" in first
    assert "mora trains other ranks in each task" in second


@pytest.mark.parametrize(
    "words",
    [("--set", "xyzzy=1"), ("--train", "xyzzy=1"), ("--references", "xyzzy")],
    ids=["option", "setting", "reference"],
)
def test_without_a_guess_the_remedy_is_to_choose(capsys, words):
    (line,) = faults(capsys, "run", *words)
    assert "; choose one" in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--method", "smroa"), "did you mean 'smora'"),
        (("run", "--method", "joint"), "is a strategy"),
        (("run", "--with", "lora"), "is a method"),
        (("run", "--stream", "digit"), "did you mean 'digits'"),
        (("run", "--stream", "tasks.yaml"), "tasks.yaml"),
        (("run", "--references", "sequental"), "did you mean 'sequential'"),
        (("run", "--model", "no/such/folder/here"), "model: cannot load"),
        (("run", "--method-file", "missing.py"), "missing.py"),
        (("report", "missing"), "does not exist"),
        (("methods", "smroa"), "did you mean 'smora'"),
        (("new-method", "smora"), "shipped method"),
        (("new-method", "9lives"), "beginning with a letter"),
    ],
    ids=lambda value: "-".join(value).replace("/", "_") if isinstance(value, tuple) else "",
)
def test_bad_words_end_with_one_clear_error(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    lines = faults(capsys, *words)
    assert len(lines) == 1
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows neither signal")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_last_line_of_a_stopped_run_says_where_it_lies_and_how_it_goes_on(
    capsys, monkeypatch, name
):
    number = signal.Signals[name]

    def stopped(*words, out, **options):
        with Interrupts(out) as interrupts:
            os.kill(os.getpid(), number)
            assert interrupts.asked == number
            interrupts.stop()

    monkeypatch.setattr("polyrank.engine.run", stopped)
    with pytest.raises(SystemExit) as caught:
        main(["run", "--method", "lora", "--out", "runs/a b"])
    assert caught.value.code == 128 + number
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "stopped: runs/a b is kept; `polyrank resume 'runs/a b'`, or the same command again, "
        "goes on from its last checkpoint"
    )
