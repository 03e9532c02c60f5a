"""`polyrank compare` as it is typed."""

import subprocess
import sys

import pytest

from polyrank import metrics
from polyrank.cli import main
from polyrank.io import RunFolder

NAN = float("nan")


def polyrank(*words, cwd, **more):
    return subprocess.run(
        [sys.executable, "-m", "polyrank", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        **more,
    )


def system(name, label, role, matrix):
    views = {"unrestricted": matrix, "restricted": matrix}
    return {
        "name": name,
        "label": label,
        "role": role,
        **views,
        "counts": [5, 5],
        "metrics": {v: metrics.summary(m, [5, 5]) for v, m in views.items()},
        "seconds": 1.0,
        "trainable": 10,
        "adapter": None,
        "routing": None,
    }


def run(path, seed, status="done"):
    asked = {
        "method": {"name": "smora", "options": {"r": 4}},
        "stream": {"name": "toy", "scenario": "class-incremental"},
        "model": {},
        "seed": seed,
        "train": {},
    }
    systems = [
        system("smora", "smora r=4", "method", [[1.0, NAN], [0.5 + 0.1 * seed, 1.0]]),
        system("sequential", "sequential lora r=4", "reference", [[1.0, NAN], [0.1, 1.0]]),
    ]
    tasks = [{"name": n, "labels": None, "n_train": 9, "n_test": 5} for n in "ab"]
    folder = RunFolder.create(path, asked, command=["polyrank", "run"])
    folder.write_results({"tasks": tasks, "systems": systems})
    folder.finish(status)


def test_runs_are_compared_and_three_files_written(tmp_path):
    for seed in range(2):
        run(tmp_path / "runs" / f"smora-{seed}", seed)
    done = polyrank("compare", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "compare"
    assert {p.name for p in folder.iterdir()} == {"compare.md", "compare.csv", "compare.png"}
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert done.stdout.startswith(text)
    assert done.stdout.splitlines()[-1].endswith("compare.png")
    assert "0.775 ± 0.035" in text
    assert "## Difference to sequential lora r=4" in text

    words = ("runs/smora-0", "runs/smora-1", "--baseline", "smora", "--out", "deep/er")
    other = polyrank("compare", *words, cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    assert "## Difference to smora r=4" in (tmp_path / "deep" / "er" / "compare.md").read_text(
        encoding="utf-8"
    )


def test_a_pipe_without_greek_letters_gets_no_traceback(tmp_path):
    import os

    run(tmp_path / "run", 0)
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = polyrank("compare", "run", cwd=tmp_path, env=plain)
    assert done.returncode == 0, done.stderr
    assert "smora r=4" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("compare", "missing"), "missing: does not exist, expected a run folder"),
        (
            ("compare", "."),
            "broken: is not finished (status 'interrupted'); go on with `polyrank resume broken`",
        ),
        (("compare", "run", "--baseline", "smroa"), "did you mean 'smora'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_ends_with_one_clear_error(capsys, tmp_path, monkeypatch, words, says):
    run(tmp_path / "run", 0)
    run(tmp_path / "broken", 1, "interrupted")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "compare").exists()


def test_no_run_at_all_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare"])
    assert caught.value.code == 2
    assert "RUN" in capsys.readouterr().err
