"""Run folders: refusals, atomic files, null and NaN, the event log, what surrounds a run."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from polyrank.errors import RunError
from polyrank.io import environment, files, runs
from polyrank.io.runs import RunFolder

NAN = math.nan
ASKED = {
    "method": {"name": "lora", "options": {"r": 8}},
    "stream": {"name": "toy", "scenario": "class-incremental", "hash": "abc"},
    "model": {"kind": "tiny"},
    "seed": 0,
    "train": {"lr": 1e-3},
}


def results(**changes):
    system = {
        "name": "lora",
        "label": "lora r=8",
        "role": "method",
        "restricted": [[1.0, NAN], [0.5, 0.75]],
        "unrestricted": [[1.0, NAN], [0.25, 0.75]],
        "counts": [4, 8],
        "metrics": {"unrestricted": {"forgetting": 0.75}, "restricted": {"forgetting": NAN}},
        "seconds": 1.5,
        "trainable": 128,
        "adapter": None,
        "routing": {
            "layers": ["q", "v"],
            "tasks": ["a", "b"],
            "load": [[[0.5, 0.5], [1.0]], [[0.25, 0.75], [1.0]]],
            "entropy": [[1.0, NAN], [0.5, 0.0]],
        },
    }
    tasks = [
        {"name": "a", "labels": ["0", "1"], "n_train": 10, "n_test": 4},
        {"name": "b", "labels": None, "n_train": 20, "n_test": 8},
    ]
    return {"tasks": tasks, "systems": [{**system, **changes}]}


def snapshot(folder):
    return {p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_a_new_run_records_what_a_result_depends_on(tmp_path):
    folder = RunFolder.create(tmp_path / "deep" / "run", ASKED, command=["polyrank", "run"])
    run = json.loads((folder.path / "run.json").read_text())
    assert run == folder.run == RunFolder.open(folder.path).run
    assert {key: run[key] for key in ASKED} == ASKED
    assert run["schema"] == 1
    assert run["status"] == "running"
    assert run["seconds"] is None
    assert run["command"] == ["polyrank", "run"]
    assert run["versions"]["numpy"] == np.__version__
    assert run["hardware"]["cores"] >= 1
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$", run["started"])
    folder.finish()
    done = RunFolder.open(folder.path).run
    assert done["status"] == "done"
    assert 0 <= done["seconds"] < 60


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / ".gitkeep").touch()
    RunFolder.create(tmp_path, ASKED).finish()
    assert RunFolder.open(tmp_path).run["status"] == "done"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thesis.tex", "files of something else .thesis.tex.*choose another folder"),
        ("results.json", "holds results.json but no run.json.*empty this one"),
    ],
)
def test_other_files_are_never_touched(tmp_path, name, message, overwrite):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=message):
        RunFolder.create(tmp_path, ASKED, overwrite=overwrite)
    assert snapshot(tmp_path) == {name: b"mine"}


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match=r"is a file, expected a folder"):
        RunFolder.create(tmp_path / "run", ASKED)
    with pytest.raises(RunError, match=r"is a file, expected the folder of a run"):
        RunFolder.open(tmp_path / "run")


OTHER = {**ASKED, "seed": 1}


@pytest.mark.parametrize(
    ("status", "asked", "overwrite", "refused"),
    [
        ("done", ASKED, False, "holds the same run .lora, seed 0, done.; choose another"),
        ("done", OTHER, False, "holds another run .lora, seed 0, done.; choose another"),
        ("running", ASKED, False, "ask to overwrite"),
        ("done", OTHER, True, r"never overwritten .seed: 0 here, 1 asked for."),
        ("done", ASKED, True, None),
        ("failed", OTHER, True, None),
        ("running", OTHER, True, None),
    ],
)
def test_when_a_run_may_be_replaced(tmp_path, status, asked, overwrite, refused):
    old = RunFolder.create(tmp_path, ASKED)
    old.write_results(results())
    (tmp_path / "adapters" / "lora").mkdir(parents=True)
    (tmp_path / "adapters" / "lora" / "w").write_text("weights")
    if status == "running":
        old.close()
    else:
        old.finish(status)
    before = snapshot(tmp_path)
    if refused:
        with pytest.raises(RunError, match=refused):
            RunFolder.create(tmp_path, asked, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    else:
        new = RunFolder.create(tmp_path, asked, overwrite=overwrite)
        assert set(snapshot(tmp_path)) == {"run.json", "events.jsonl"}
        assert new.run["seed"] == asked["seed"]
        new.close()


@pytest.mark.skipif(runs.fcntl is None, reason="no file locks on this system")
def test_a_run_that_still_goes_on_is_not_replaced(tmp_path):
    running = RunFolder.create(tmp_path, ASKED)
    code = (
        "import sys; from polyrank.io.runs import RunFolder; import json\n"
        "RunFolder.create(sys.argv[1], json.loads(sys.argv[2]), overwrite=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(ASKED)]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "another process is writing this run" in other.stderr
    running.event("alive")
    assert [e["event"] for e in running.events()] == ["alive"]
    running.close()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_an_incomplete_configuration_writes_nothing(tmp_path):
    with pytest.raises(RunError, match=r"'seed' is missing or no int.*'train'"):
        RunFolder.create(tmp_path / "run", {k: ASKED[k] for k in ("method", "stream", "model")})
    with pytest.raises(RunError, match=r"method.name: got None"):
        RunFolder.create(tmp_path / "run", {**ASKED, "method": {}})
    assert not (tmp_path / "run").exists()


def test_differences_name_the_keys(tmp_path):
    folder = RunFolder.create(tmp_path, ASKED)
    asked = {**ASKED, "method": {"name": "lora", "options": {"r": 4, "k": 2}}, "seed": 3}
    assert folder.differences(asked) == [
        "method.options.k: null here, 2 asked for",
        "method.options.r: 8 here, 4 asked for",
        "seed: 0 here, 3 asked for",
    ]
    assert folder.differences(ASKED) == []
    folder.close()


def test_not_measured_is_null_on_disk_and_nan_in_memory(tmp_path):
    folder = RunFolder.create(tmp_path, ASKED)
    given = results()
    folder.write_results(given)
    raw = json.loads((tmp_path / "results.json").read_text())["systems"][0]
    assert raw["restricted"] == [[1.0, None], [0.5, 0.75]]
    assert raw["metrics"]["restricted"]["forgetting"] is None
    back = folder.results()
    system, expected = back["systems"][0], given["systems"][0]
    for view in ("restricted", "unrestricted"):
        np.testing.assert_array_equal(system[view], expected[view])
    assert math.isnan(system["metrics"]["restricted"]["forgetting"])
    assert math.isnan(system["routing"]["entropy"][0][1])
    assert system["routing"]["load"] == expected["routing"]["load"]
    # What is absent on purpose stays None.
    assert system["adapter"] is None
    assert back["tasks"][1]["labels"] is None
    assert back["schema"] == 1
    folder.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"role": "hero"}, r"systems\[0\].role: got 'hero', expected one of"),
        ({"restricted": [[1.0]]}, r"systems\[0\].restricted: expected a matrix of 2 x 2"),
        ({"unrestricted": [[1, 2], [0, 0]]}, r"unrestricted: got 2, expected a fraction 0..1"),
        ({"unrestricted": [[math.inf, 0], [0, 0]]}, "unrestricted: got 'inf'"),
        ({"counts": [4, 0]}, "expected 2 whole numbers above 0"),
        ({"metrics": {"restricted": {}}}, "metrics.unrestricted: got None"),
        ({"label": None}, "label: got NoneType, expected str"),
        ({"seconds": "long"}, "seconds: got str, expected int or float or null"),
        ({"routing": {"layers": []}}, "routing: 'load' is missing"),
        (
            {
                "routing": {
                    "layers": ["q"],
                    "tasks": ["a"],
                    "load": [[[0.5]]],
                    "entropy": [[1], [1]],
                }
            },
            "routing.entropy: expected 1 tasks with 1 layers",
        ),
        (
            {"routing": {"layers": ["q"], "tasks": ["a"], "load": [[0.5]], "entropy": [[1]]}},
            "routing.load: expected a list of one number per rank",
        ),
        (
            {"routing": {"layers": ["q"], "tasks": ["a"], "load": [[[-1]]], "entropy": [[1]]}},
            "routing.load: expected numbers of at least 0",
        ),
    ],
)
def test_results_that_do_not_fit_are_refused_before_the_file(tmp_path, changes, message):
    folder = RunFolder.create(tmp_path, ASKED)
    with pytest.raises(RunError, match=message):
        folder.write_results(results(**changes))
    assert not (tmp_path / "results.json").exists()
    folder.close()


def test_all_faults_of_a_file_are_listed_with_the_remedy(tmp_path):
    RunFolder.create(tmp_path, ASKED).finish()
    broken = {"schema": 7, "tasks": [], "systems": 3}
    (tmp_path / "results.json").write_text(json.dumps(broken))
    with pytest.raises(RunError) as caught:
        RunFolder.open(tmp_path).results()
    text = str(caught.value)
    assert "schema: got 7, expected 1" in text
    assert "systems: got int, expected list" in text
    assert "repeat the run" in text
    twice = results()
    twice["systems"] *= 2
    with pytest.raises(RunError, match=r"got 'lora' twice, expected unique names"):
        RunFolder.open(tmp_path).write_results(twice)


def test_unreadable_folders(tmp_path):
    with pytest.raises(RunError, match=r"does not exist, expected the folder of a run"):
        RunFolder.open(tmp_path / "none")
    with pytest.raises(RunError, match=r"holds no run.json"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 1, ')
    with pytest.raises(RunError, match=r"no JSON.*repeat the run"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunError, match=r"run.json: got list, expected an object"):
        RunFolder.open(tmp_path)
    RunFolder.create(tmp_path / "new", ASKED).close()
    with pytest.raises(RunError, match=r"no results.json yet .status 'running'."):
        RunFolder.open(tmp_path / "new").results()


def test_update_refuses_a_wrong_status(tmp_path):
    folder = RunFolder.create(tmp_path, ASKED)
    folder.update(train={"lr": 0.5})
    with pytest.raises(RunError, match=r"status: got 'finished', expected one of"):
        folder.finish("finished")
    assert RunFolder.open(tmp_path).run["train"] == {"lr": 0.5}
    assert RunFolder.open(tmp_path).run["status"] == "running"
    folder.close()


def test_events_are_lines_that_survive_a_cut(tmp_path):
    folder = RunFolder.create(tmp_path, ASKED)
    folder.event("task_start", task=0, name="é")
    folder.event("train", loss=NAN, scale=math.inf, at=np.float32(0.5))
    folder.close()
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"time": "2026-01-01", "ev')
    events = list(RunFolder.open(tmp_path).events())
    assert [e["event"] for e in events] == ["task_start", "train"]
    assert events[0]["name"] == "é"
    assert (events[1]["loss"], events[1]["scale"], events[1]["at"]) == (None, "inf", 0.5)
    again = RunFolder.open(tmp_path)
    again.event("resumed")
    again.close()
    assert [e["event"] for e in again.events()] == ["task_start", "train", "resumed"]
    assert path.read_bytes().startswith(whole)
    path.write_bytes(b"oops\n" + whole)
    with pytest.raises(RunError, match=r"line 1 is no JSON"):
        list(again.events())


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "data.json"
    code = (
        "import sys; from polyrank.io.files import write_json\n"
        "for i in range(10**9): write_json(sys.argv[1], [i] * 5000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    data = files.read_json(path)
    assert len(data) == 5000
    assert len(set(data)) == 1


def test_a_failed_write_keeps_the_old_file_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"No space left on device.; free some space"):
        files.write_json(path, {"new": 2})
    assert files.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_plain_values():
    @dataclasses.dataclass
    class Point:
        x: float
        y: frozenset

    value = {
        "a": np.array([[1.0, NAN]]),
        2: (np.int64(3), Path("b")),
        "p": Point(NAN, frozenset({"v", "q"})),
        "t": True,
        "i": -math.inf,
    }
    expected = {
        "a": [[1.0, None]],
        "2": [3, "b"],
        "p": {"x": None, "y": ["q", "v"]},
        "t": True,
        "i": "-inf",
    }
    assert files.plain(value) == expected
    assert type(files.plain(np.str_("s"))) is str
    with pytest.raises(RunError, match=r"got object .*expected numbers, text"):
        files.plain([object()])


def test_checksums(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.sha256_bytes(b"") == empty
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert files.sha256_file(tmp_path / "f") == files.sha256_bytes(b"x" * 3_000_000)
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": (2,), "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})
    with pytest.raises(RunError, match=r"could not be read"):
        files.sha256_file(tmp_path / "none")


def test_commit_is_that_of_the_tree_that_tracks_the_file(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    (tmp_path / "tracked.py").write_text("1")
    (tmp_path / "other.py").write_text("1")
    assert environment.commit(tmp_path / "tracked.py") is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "first")
    head = environment.commit(tmp_path / "tracked.py")
    assert re.fullmatch("[0-9a-f]{40}", head)
    assert environment.commit(tmp_path / "other.py") is None
    (tmp_path / "tracked.py").write_text("2")
    assert environment.commit(tmp_path / "tracked.py") == head + "+changes"


def test_versions_leave_out_what_is_not_installed():
    found = environment.versions(("numpy", "no-such-package-here"))
    assert set(found) == {"python", "numpy"}


def test_nothing_here_imports_torch(tmp_path):
    code = (
        "import sys, json; from polyrank.io.runs import RunFolder\n"
        "RunFolder.create(sys.argv[1], json.loads(sys.argv[2])).finish()\n"
        "RunFolder.open(sys.argv[1]); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(ASKED)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
