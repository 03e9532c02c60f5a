"""Tables and picture of a sweep, against numbers worked out by hand."""

import csv
import io
import json
import random
import struct
import subprocess
import sys

import pytest

from polyrank.engine.sweep.grid import Grid
from polyrank.engine.sweep.schedule import Group, Point
from polyrank.errors import RunError
from polyrank.reports.sweep import cells, markdown, notes, report_sweep, sheet_of, table_csv
from polyrank.testing import assert_close

GRID = Grid(anchor=1e-3, per_decade=2, first=0, last=2)
# Validation and test of each seed at each rate; None is a diverged run.
LORA = {0: [(0.5, 0.5)] * 3, 1: [(0.8, 0.70), (0.82, 0.72), (0.84, 0.74)], 2: [(0.7, 0.9)] * 3}
SMORA = {0: [(0.5, 0.5)] * 3, 1: [(0.9, 0.75), (0.9, 0.76), (0.9, 0.80)], 2: [None] * 3}


def group(label, **changes):
    values = {
        "id": f"{label}-{changes.get('stage', 'full')}",
        "label": label,
        "stage": "full",
        "grid": GRID,
        "seeds": (0, 1, 2),
        "extend": False,
        "axes": {},
        "config": {"train": {"epochs": 10}},
    }
    return Group(**{**values, **changes})


def lines(of, table):
    found = []
    for index, scores in table.items():
        for seed, pair in zip(of.seeds, scores, strict=False):
            state = "ok" if pair else "diverged"
            validation, test = pair or (0.0, 0.0)
            more = {
                "validation": validation,
                "test": test,
                "parameters": 12345,
                "seconds": 9 + seed,
            }
            found.append({**Point(group=of, index=index, seed=seed).line(), "state": state, **more})
    return found


def lock_of(*groups, **changes):
    return {
        "name": "made-up",
        "groups": [g.plain() for g in groups],
        "baseline": "lora",
        "score": "average_accuracy",
        "view": "unrestricted",
        "stream": {"name": "digits"},
        "worst": 0.0,
        **changes,
    }


def two():
    groups = [group("lora"), group("smora")]
    return lock_of(*groups), [*lines(groups[0], LORA), *lines(groups[1], SMORA)]


def test_the_table_holds_the_numbers_of_the_selected_rates():
    heads, lora, smora = cells(sheet_of(*two()))
    assert heads == [
        "method",
        "params",
        "best rate",
        "val",
        "test ± sd",
        "Δ to lora ± SE",
        "plateau",
        "flags",
        "time",
    ]
    assert lora == [
        "lora",
        "12\u2009345",
        "3.16e-03",
        "0.820",
        "0.720 ± 0.020",
        "–",
        "1×",
        "",
        "10.0 s",
    ]
    # Differences 0.05, 0.04, 0.06: their sd is 0.01, so that SE = 0.01 / √3.
    assert smora[3:] == ["0.900", "0.770 ± 0.026", "+0.050 ± 0.006*", "1×", "3 diverged", "10.0 s"]


def paced(lock, found, **halves):
    """Lines whose losses fall from 8 by a method's own amount every 5 updates, for 30 of them."""
    for line in found:
        fall = halves[line["method"]] / (1 + line["seed"] / 10)
        line["loss_at"] = [5 * n for n in range(1, 7)]
        line["loss"] = [8 - fall * n for n in range(6)]
    return sheet_of(lock, found)


def test_updates_to_the_loss_that_the_baseline_has_at_half():
    # Three entries are their middle: 8 less 1, 1 / 1.1, 1 / 1.2 after 15 updates, that is 7.086.
    heads, lora, smora = cells(paced(*two(), lora=1.0, smora=2.0))
    assert heads[7] == "updates to loss"
    # Middles by seed: 7, 6, …; 7.09, 6.18, …; 7.17, 6.33, …
    assert lora[7] == "18 ± 3"
    assert smora[7] == "15 ± 0"
    _, _, slow = cells(paced(*two(), lora=1.0, smora=0.24))
    assert slow[7] == "1 of 3 runs"
    rows = list(csv.DictReader(io.StringIO(table_csv(paced(*two(), lora=1.0, smora=0.24)))))
    assert_close(float(rows[1]["level"]), 8 - (1 + 1 / 1.1 + 1 / 1.2) / 3)
    assert (rows[1]["updates_to_level"], rows[1]["runs_at_level"]) == ("30.0", "1")
    text = "\n".join(notes(paced(*two(), lora=1.0, smora=2.0)))
    assert "what lora has after 50% of its updates (7.09)" in text


def test_ties_and_the_rates_that_were_run_are_told():
    lock, found = two()
    text = "\n".join(notes(sheet_of(lock, found)))
    assert "rates of lora, smora: 1.00e-03, 3.16e-03, 1.00e-02" in text
    # .70 to .74 and .75 to .80 do not meet.
    assert "tied with" not in text
    for line in found:
        line["test"] += 0.02 * (line["method"] == "lora")
    assert "tied with lora, since their tests' ranges over seeds overlap: smora" in "\n".join(
        notes(sheet_of(lock, found))
    )


def test_the_csv_holds_them_in_full():
    rows = list(csv.DictReader(io.StringIO(table_csv(sheet_of(*two())))))
    assert [row["method"] for row in rows] == ["lora", "smora"]
    assert rows[0]["difference"] == rows[0]["rank"] == ""
    assert_close(float(rows[1]["rate"]), 1e-3 * 10**0.5)
    assert_close(float(rows[1]["test"]), 0.77)
    assert_close(float(rows[1]["test_sd"]), 0.0007**0.5)
    assert (rows[1]["test_low"], rows[1]["test_high"], rows[1]["rates"]) == ("0.75", "0.8", "3")
    assert_close(float(rows[1]["difference"]), 0.05)
    assert_close(float(rows[1]["difference_se"]), 0.01 / 3**0.5)
    assert (rows[1]["marked"], rows[1]["diverged"], rows[1]["missing"]) == ("true", "3", "0")
    assert (rows[0]["at_edge"], rows[0]["seeds"]) == ("false", "3")


def test_the_order_of_lines_changes_no_byte():
    lock, found = two()
    sheet = sheet_of(lock, found)
    for seed in range(10):
        random.Random(seed).shuffle(found)
        again = sheet_of(lock, [*found, found[0]])
        assert markdown(again) == markdown(sheet)
        assert table_csv(again) == table_csv(sheet)


def test_of_two_lines_of_one_run_the_same_is_taken_whatever_their_order():
    lock, found = two()
    double = {**found[3], "test": 0.1, "seconds": 1.0}
    first, second = sheet_of(lock, [double, *found]), sheet_of(lock, [*found, double])
    assert markdown(first) == markdown(second)


def test_notes_say_what_limits_the_comparison():
    lock, found = two()
    text = "\n".join(notes(sheet_of(lock, found)))
    assert "mean validation average accuracy (unrestricted) over seeds 0, 1, 2" in text
    assert "1 comparison, not corrected for" in text
    assert "a diverged run counts as 0, the worst value" in text
    assert "not finished" not in text
    foreign = {**found[0], "group": "elsewhere"}
    assert "1 line of runs.jsonl is of other settings" in "\n".join(
        notes(sheet_of(lock, [foreign]))
    )


def test_one_seed_has_no_deviation():
    groups = [group(label, seeds=(0,)) for label in ("lora", "smora")]
    found = [*lines(groups[0], LORA), *lines(groups[1], SMORA)]
    _, lora, smora = cells(sheet_of(lock_of(*groups), found))
    assert (lora[4], smora[5]) == ("0.700", "+0.050")
    assert "sd:" not in markdown(sheet_of(lock_of(*groups), found))


def test_an_unfinished_sweep_shows_what_it_has():
    lock, found = two()
    _, lora, smora = cells(sheet_of(lock, found[:7]))
    # The third rate has one seed of three, and is no candidate yet.
    assert lora[2:5] == ["3.16e-03", "0.820", "0.720 ± 0.020"]
    assert "2 missing" in lora[7]
    assert smora == ["smora", *["–"] * 6, "9 missing", "–"]
    assert "the same call makes the runs" in markdown(sheet_of(lock, found[:7]))
    assert cells(sheet_of(lock, []))[1][7] == "9 missing"


def test_methods_are_compared_at_equal_axes():
    groups = [group(m, id=f"{m}{r}", axes={"rank": r}) for r in (4, 8) for m in ("lora", "smora")]
    better = {i: [(v, t + 0.1) for v, t in scores] for i, scores in LORA.items()}
    tables = (LORA, LORA, better, LORA)
    found = [line for g, t in zip(groups, tables, strict=True) for line in lines(g, t)]
    rows = cells(sheet_of(lock_of(*groups), found))[1:]
    assert [row[0] for row in rows] == [
        "lora rank=4",
        "smora rank=4",
        "lora rank=8",
        "smora rank=8",
    ]
    assert [row[5] for row in rows] == ["–", "0.000 ± 0.000", "–", "−0.100 ± 0.000*"]
    table = list(csv.DictReader(io.StringIO(table_csv(sheet_of(lock_of(*groups), found)))))
    assert [row["rank"] for row in table] == ["4", "4", "8", "8"]


def test_without_a_baseline_there_is_no_difference():
    lock, found = two()
    heads, *rows = cells(sheet_of({**lock, "baseline": None}, found))
    assert heads[5] == "Δ ± SE"
    assert [row[5] for row in rows] == ["–", "–"]


def test_flags_of_edges_single_rates_and_probes():
    edge = {0: LORA[1], 1: LORA[0], 2: LORA[0]}
    short = group("probed", stage="probe", config={"train": {"epochs": 1}})
    groups = [
        group("edge"),
        group("single", grid=Grid(anchor=1e-3, per_decade=2, first=0, last=0), fixed="so | said"),
        short,
        group("probed", probe=short.id, points=2),
    ]
    found = [
        *lines(groups[0], edge),
        *lines(groups[1], {0: LORA[0]}),
        *lines(short, SMORA),
        # The best of the two rates is inside what the probe tried, or at its lower end.
        *lines(groups[3], {0: LORA[0], 1: LORA[1]}),
    ]
    sheet = sheet_of(lock_of(*groups), found)
    assert [row[7] for row in cells(sheet)[1:]] == ["at edge", "one rate", "probed, 3 diverged"]
    text = markdown(sheet)
    assert "single has one rate, because: so | said" in text
    assert "with 1 of 10 epochs, then the best 2 rates in full" in text
    waiting = sheet_of(lock_of(*groups), found[:-6])
    assert "6 missing" in cells(waiting)[3][7]


def test_a_pipe_in_a_name_keeps_the_table_whole():
    of = group("a|b")
    text = markdown(sheet_of(lock_of(of), lines(of, LORA)))
    assert "| a\\|b |" in text
    assert len({line.replace("\\|", "").count("|") for line in text.splitlines()[2:5]}) == 1


@pytest.fixture
def folder(tmp_path):
    lock, found = two()
    path = tmp_path / "sweep"
    path.mkdir()
    (path / "spec.lock").write_text(json.dumps(lock))
    (path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    return path


def test_three_files_are_written(folder):
    sheet, written = report_sweep(folder)
    assert sorted(written) == ["lr.png", "table.csv", "table.md"]
    assert written["table.md"].read_text() == markdown(sheet)
    assert written["table.csv"].read_text() == table_csv(sheet)
    data = written["lr.png"].read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > height > 400
    assert len(data) > 20_000


def test_what_is_no_sweep_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"holds no spec.lock, so it is no sweep"):
        report_sweep(tmp_path)


def test_tables_need_no_torch(folder):
    code = (
        "import sys; from polyrank.reports.sweep import report_sweep\n"
        "report_sweep(sys.argv[1])\n"
        "assert not {'torch', 'pydantic'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
