"""The loop of a sweep with a run that only pretends to train: killed anywhere, it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polyrank.engine.sweep.grid import Grid
from polyrank.engine.sweep.records import Records, read
from polyrank.engine.sweep.runner import work
from polyrank.engine.sweep.schedule import Group
from polyrank.errors import ConfigError, RunError
from polyrank.reports.sweep import markdown, prepare, table_csv

# A run of three steps that keeps its place, as the engine does; `tick` may kill the process.
PRETEND = """
import json, os, signal, sys
from pathlib import Path
from polyrank.engine.sweep import records, runner

folder, kills = Path(sys.argv[1]), set(map(int, sys.argv[2:]))
ticks = folder.with_suffix(".ticks")


def tick():
    count = int(ticks.read_text()) if ticks.exists() else 0
    ticks.write_text(str(count + 1))
    return count in kills


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def one(point, place):
    (place / "adapters").mkdir(parents=True, exist_ok=True)
    progress = place / "progress"
    first = int(progress.read_text()) if progress.exists() else 0
    for step in range(first, 3):
        if tick():
            die()
        progress.write_text(str(step + 1))
    fallen = point.group.label == "b" and point.index == 1 and point.seed == 0
    score = 0.0 if fallen else 0.9 - 0.02 * (point.index - 2) ** 2 + 0.003 * point.seed
    return {"state": "diverged" if fallen else "ok", "validation": score, "test": score / 2,
            "seconds": 1.5, "updates": None if fallen else 3, "order": str(point.seed)}


class Torn(records.Records):
    def append(self, line):
        if tick():
            self._file.write(json.dumps(line)[:40].encode())
            self._file.flush()
            die()
        super().append(line)
        if tick():
            die()


runner.Records = Torn
lock = json.loads(folder.with_suffix(".json").read_text())
assert runner.work(lock, folder, one) == []
"""


def group(label, **changes):
    values = {
        "id": f"id-{label}",
        "label": label,
        "stage": "full",
        "grid": Grid(anchor=2e-4, per_decade=4, first=0, last=1),
        "seeds": (0, 1),
        "extend": True,
        "axes": {},
    }
    return Group(**{**values, **changes})


def lock_of(*groups, baseline="a"):
    return {
        "schema": 1,
        "name": "pretended",
        "groups": [g.plain() for g in groups],
        "baseline": baseline,
        "score": "average_accuracy",
        "view": "unrestricted",
        "stream": {"name": "digits"},
        "worst": 0.0,
    }


def pretend(folder, *kills):
    Path("pretend.py").write_text(PRETEND)
    folder.with_suffix(".json").write_text(json.dumps(lock_of(group("a"), group("b"))))
    times = 0
    while True:
        done = subprocess.run(
            [sys.executable, "pretend.py", folder, *map(str, kills)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode == 0:
            return times
        assert done.returncode == -9, done.stderr
        times += 1


def kept(folder):
    return sorted(p.parent.name for p in folder.glob("runs/*/adapters"))


def test_killed_between_runs_inside_them_and_while_writing_it_ends_the_same(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert pretend(whole) == 0
    # Every run ticks at its three steps, before its line and after: a kill inside the first run,
    # one in the line of the second, and one between it and the third.
    assert pretend(torn, 2, 9, 11) == 3
    lines = [read(folder) for folder in (whole, torn)]
    # Two rates for two seeds, and the points beyond the edges: two for a, one for b.
    assert len(lines[0]) == 14
    assert lines[0] == lines[1]
    assert len({line["id"] for line in lines[0]}) == 14
    for text in (markdown, table_csv):
        assert text(prepare(whole)) == text(prepare(torn))
    assert "1 diverged" in markdown(prepare(torn))
    assert kept(whole) == kept(torn)
    # The best rate of each method, both seeds.
    assert len(kept(whole)) == 4


def scored(values):
    """A run that gives {(label, index): score}; counts how often each point was made."""
    calls = []

    def one(point, place):
        calls.append((point.group.label, point.index, point.seed))
        found = values[point.group.label, point.index]
        if isinstance(found, Exception):
            raise found
        score, more = found if isinstance(found, tuple) else (found, {})
        shared = {"updates": 10, "order": "o", "base": "b"}
        return {"state": "ok", "validation": score, "test": score, "seconds": 1.0, **shared, **more}

    return one, calls


def test_finished_runs_are_skipped_and_more_seeds_or_rates_are_added(tmp_path):
    one, calls = scored({("a", i): 0.5 - 0.1 * abs(i) for i in range(-2, 4)})
    grid = Grid(anchor=2e-4, per_decade=4, first=-1, last=1)
    of = group("a", grid=grid, seeds=(0,))
    assert work(lock_of(of), tmp_path / "s", one) == []
    assert calls == [("a", -1, 0), ("a", 0, 0), ("a", 1, 0)]
    work(lock_of(of), tmp_path / "s", one)
    assert len(calls) == 3
    wider = group("a", grid=Grid(anchor=2e-4, per_decade=4, first=-1, last=2), seeds=(0, 1))
    work(lock_of(wider), tmp_path / "s", one)
    assert calls[3:] == [("a", -1, 1), ("a", 0, 1), ("a", 1, 1), ("a", 2, 0), ("a", 2, 1)]
    work(lock_of(group("a", id="other", grid=grid, seeds=(0,))), tmp_path / "s", one)
    assert len(calls) == 11
    assert "8 lines of runs.jsonl are of other settings" in markdown(prepare(tmp_path / "s"))


def test_a_failed_run_is_told_and_made_again_by_the_next_call(tmp_path):
    values = {("a", 0): RunError("disk: full"), ("a", 1): 0.5}
    one, calls = scored(values)
    of = group("a", extend=False, seeds=(0,))
    said = []
    (failed,) = work(lock_of(of), tmp_path / "s", one, say=said.append)
    assert failed == "a lr=0.0002 seed 0: RunError: disk: full"
    assert len(calls) == 2
    assert said[0].endswith("error: RunError: disk: full; 1 run left")
    assert "1 failed, 1 missing" in markdown(prepare(tmp_path / "s"))
    values["a", 0] = 0.6
    assert work(lock_of(of), tmp_path / "s", one) == []
    assert len(calls) == 3
    assert [line["state"] for line in read(tmp_path / "s")] == ["error", "ok", "ok"]
    assert "failed" not in markdown(prepare(tmp_path / "s"))


def test_a_fault_of_the_program_ends_the_sweep(tmp_path):
    one, _ = scored({("a", 0): ZeroDivisionError("a fault")})
    with pytest.raises(ZeroDivisionError):
        work(lock_of(group("a")), tmp_path / "s", one)
    assert read(tmp_path / "s") == []
    one, _ = scored({("a", 0): ConfigError(["one", "two"]), ("a", 1): 0.1})
    (failed,) = work(lock_of(group("a", extend=False, seeds=(0,))), tmp_path / "s", one)
    assert "one\ntwo" in failed


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("updates", 11, "updates: got 11 for 'b' and 10 for 'a' at seed 0"),
        ("order", "p", "data and settings: got p for 'b' and o for 'a'"),
        ("base", "c", "base model: got c for 'b' and b for 'a'"),
    ],
)
def test_methods_that_are_not_trained_alike_are_refused(tmp_path, key, value, says):
    values = {("a", 0): 0.5, ("a", 1): 0.4, ("b", 0): (0.9, {key: value})}
    one, calls = scored(values)
    both = [group(name, extend=False, seeds=(0,)) for name in "ab"]
    with pytest.raises(RunError, match="budget: ") as caught:
        work(lock_of(*both), tmp_path / "s", one)
    assert says in str(caught.value)
    assert len(calls) == 3
    with pytest.raises(RunError, match="budget: "):
        prepare(tmp_path / "s")


def test_what_may_differ_between_seeds_and_batches_and_after_divergence(tmp_path):
    values = {("a", 0): 0.5, ("a", 1): (0.0, {"state": "diverged", "updates": 2})}
    one, _ = scored(values)
    groups = [
        group("a", extend=False, axes={"batch": 16}),
        group("a", id="c", extend=False, axes={"batch": 32}),
    ]

    def varied(point, place):
        batch, found = point.group.axes["batch"], one(point, place)
        found["updates"] = found["updates"] * 16 // batch
        return {**found, "order": f"{batch} {point.seed}", "base": str(point.seed)}

    assert work(lock_of(*groups), tmp_path / "s", varied) == []
    assert len(read(tmp_path / "s")) == 8


def test_all_weights_are_kept_on_request(tmp_path):
    one, _ = scored({("a", 0): 0.5, ("a", 1): 0.4})

    def leaving(point, place):
        for name in ("adapters", "base", "checkpoints"):
            (place / name).mkdir(parents=True)
        (place / "run.json").touch()
        return one(point, place)

    of = group("a", extend=False)
    work(lock_of(of), tmp_path / "all", leaving, keep="all")
    assert len(kept(tmp_path / "all")) == 4
    work(lock_of(of), tmp_path / "best", leaving)
    assert len(kept(tmp_path / "best")) == 2
    assert len(list((tmp_path / "best").glob("runs/*/base"))) == 2
    assert len(list((tmp_path / "best").glob("runs/*/run.json"))) == 4


def test_other_folders_are_never_touched(tmp_path):
    one, calls = scored({})
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match=r"something else \(thesis.tex\)"):
        work(lock_of(group("a")), tmp_path / "s", one)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunError, match="is a file"):
        work(lock_of(group("a")), tmp_path / "s" / "thesis.tex", one)
    with Records(tmp_path / "t"), pytest.raises(RunError, match="another process is running"):
        work(lock_of(group("a")), tmp_path / "t", one)
    assert calls == []


def test_a_line_that_is_no_run_is_refused_by_its_number(tmp_path):
    one, _ = scored({("a", 0): 0.5, ("a", 1): 0.4})
    work(lock_of(group("a", extend=False, seeds=(0,))), tmp_path, one)
    path = tmp_path / "runs.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"id": "x", "gro')
    assert len(read(tmp_path)) == 2
    with Records(tmp_path) as records:
        assert len(records.lines) == 2
        with pytest.raises(RunError, match=r"group: got None, expected str"):
            records.append({"id": "x"})
    assert path.read_text() == whole
    path.write_text(whole + "{}\n")
    with pytest.raises(RunError, match=r"line 3: id: got None, expected str; .*delete the line"):
        read(tmp_path)
    path.write_text(whole + "no\n")
    with pytest.raises(RunError, match="line 3: no JSON"):
        read(tmp_path)
