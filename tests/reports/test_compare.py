"""Comparing runs: by hand, over seeds, paired; what is one system, and what is refused."""

import csv
import io
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from polyrank import metrics, reports
from polyrank.errors import ConfigError, RunError
from polyrank.io import RunFolder
from polyrank.reports import compare_picture, compare_table, compare_view

NAN = math.nan
OPEN = (-math.inf, math.inf)


def entry(name, label, role, matrix, restricted=None, **more):
    views = {"unrestricted": matrix, "restricted": matrix if restricted is None else restricted}
    counts = [10] * len(matrix)
    return {
        "name": name,
        "label": label,
        "role": role,
        **views,
        "counts": counts,
        "metrics": {
            v: metrics.summary(m, counts, missing="nan", limits=OPEN) for v, m in views.items()
        },
        "seconds": 10.0,
        "trainable": 1000,
        "adapter": None,
        "routing": None,
        **more,
    }


def method(matrix, name="smora", **more):
    return entry(name, f"{name} r=4", "method", matrix, **more)


def sequential(matrix, **more):
    return entry("sequential", "sequential lora r=4", "reference", matrix, **more)


def two(first, kept, second):
    return [[first, NAN], [kept, second]]


def write(path, systems, *, seed=0, stream=(), metric=None, status="done", tasks=None, **more):
    """A run folder as an engine leaves it."""
    size = len(systems[0]["unrestricted"])
    names = tasks or [f"task {i}" for i in range(size)]
    described = [{"name": n, "n_train": 9} for n in names]
    run = {
        "method": {"name": systems[0]["name"], "options": {"r": 4}},
        "strategies": [],
        "stream": {
            "name": "toy",
            "scenario": "class-incremental",
            "seed": seed,
            "hash": f"rows of seed {seed}",
            "options": {"tasks": size, "seed": seed, "root": str(path)},
            "tasks": described,
            **dict(stream),
        },
        "model": {"source": "embedded", "fingerprint": f"made at seed {seed}"},
        "target_modules": ["q"],
        "seed": seed,
        "train": {"lr": 0.01},
        **more,
    }
    extra = {"metric": metric} if metric else {}
    results = {
        "tasks": [{"name": n, "labels": None, "n_train": 9, "n_test": 10, **extra} for n in names],
        "systems": systems,
    }
    folder = RunFolder.create(path, run, command=["polyrank", "run", "--seed", str(seed)])
    folder.write_results(results)
    folder.close() if status == "running" else folder.finish(status)
    return path


def three_seeds(root):
    """Two systems whose seeds move both alike: 0.7, 0.6, 0.5 against 0.5, 0.45, 0.25."""
    own = [two(0.9, 0.6, 0.8), two(0.8, 0.5, 0.7), two(0.7, 0.4, 0.6)]
    base = [two(0.9, 0.2, 0.8), two(0.8, 0.2, 0.7), two(0.7, 0.0, 0.5)]
    for seed in range(3):
        write(root / f"run-{seed}", [method(own[seed]), sequential(base[seed])], seed=seed)
    return root


def table(text, number=0):
    """The cells of one table of the markdown, by the first one of each line."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    head, _, *rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in blocks[number].splitlines()
    ]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def compared(tmp_path, *paths, **options):
    found = compare_view.gather(paths or [tmp_path], **options)
    lines = io.StringIO(compare_table.sheet(found))
    return compare_table.markdown(found), {row["system"]: row for row in csv.DictReader(lines)}


def test_three_seeds_by_hand(tmp_path):
    text, rows = compared(three_seeds(tmp_path / "runs").parent)
    shown = table(text)
    assert list(shown) == ["smora r=4", "sequential lora r=4"]
    # Averages 0.7, 0.6, 0.5; forgetting 0.3 each; incremental 0.8, 0.7, 0.6.
    assert shown["smora r=4"] == {
        "system": "smora r=4",
        "seeds": "3",
        "average accuracy": "0.600 ± 0.100",
        "forgetting": "0.300 ± 0.000",
        "backward transfer": "-0.300 ± 0.000",
        "incremental": "0.700 ± 0.100",
        "weights": "1,000",
        "seconds": "10.0",
    }
    # Differences 0.2, 0.15, 0.25: mean 0.2, sd 0.05.
    (line,) = table(text, 1).values()
    error = 0.05 / math.sqrt(3)
    assert line["pairs"] == "3"
    assert line["Δ average accuracy"] == f"+0.200 ± {error:.3f} *"
    # Forgetting 0.3 against 0.7, 0.6, 0.7.
    assert line["Δ forgetting"].startswith("-0.367 ± ")
    own = rows["smora r=4"]
    assert float(own["average_accuracy"]) == pytest.approx(0.6, abs=1e-12)
    assert float(own["average_accuracy_sd"]) == pytest.approx(0.1, abs=1e-12)
    assert float(own["average_accuracy_difference"]) == pytest.approx(0.2, abs=1e-12)
    assert float(own["average_accuracy_error"]) == pytest.approx(error, abs=1e-12)
    assert own["average_accuracy_pairs"] == "3"
    assert own["average_accuracy_marked"] == "true"
    assert own["baseline"] == "sequential lora r=4"
    assert (own["seeds"], own["prediction"], own["role"]) == ("0 1 2", "unrestricted", "method")
    assert rows["sequential lora r=4"]["average_accuracy_difference"] == ""
    for part in ("4 comparisons, 4 marked", "seeds 0, 1, 2", "all classes seen so far compete"):
        assert part in text
    assert f"average accuracy: {metrics.definitions()['average_accuracy']}" in text


def test_only_more_than_two_errors_are_marked(tmp_path):
    # Differences 1/8 and 3/8: mean 1/4, error 1/8, which is not more than twice; forgetting alike.
    for seed, gap in enumerate((0.125, 0.375)):
        systems = [method(two(0.5, 0.5, 0.5 + 2 * gap - 0.25)), sequential(two(0.5, 0.5, 0.25))]
        write(tmp_path / f"run-{seed}", systems, seed=seed)
    text, rows = compared(tmp_path)
    assert table(text, 1)["smora r=4"]["Δ average accuracy"] == "+0.250 ± 0.125"
    assert rows["smora r=4"]["average_accuracy_marked"] == "false"
    assert table(text, 1)["smora r=4"]["Δ forgetting"] == "+0.000 ± 0.000"
    assert "4 comparisons, 0 marked" in text


def test_one_seed_has_no_deviation_and_no_mark(tmp_path):
    write(tmp_path / "a", [method(two(0.9, 0.6, 0.8)), sequential(two(0.9, 0.1, 0.8))])
    text, rows = compared(tmp_path, tmp_path / "a")
    assert table(text)["smora r=4"]["average accuracy"] == "0.700"
    assert table(text, 1)["smora r=4"]["Δ average accuracy"] == "+0.250"
    assert "±" not in text
    assert "*" not in text.replace("**", "")
    assert "fewer than two seeds in common" in text
    assert rows["smora r=4"]["average_accuracy_sd"] == ""
    assert rows["smora r=4"]["average_accuracy_marked"] == ""


def test_differences_need_the_same_seed(tmp_path):
    for seed in range(3):
        systems = [method(two(0.9, 0.5 + 0.1 * seed, 0.9))]
        if seed < 2:
            systems.append(sequential(two(0.9, 0.1, 0.9)))
        write(tmp_path / f"run-{seed}", systems, seed=seed)
    text, rows = compared(tmp_path)
    assert table(text)["sequential lora r=4"]["seeds"] == "2"
    assert table(text, 1)["smora r=4"]["pairs"] == "2"
    # The third seed counts in the mean, not in the difference.
    assert float(rows["smora r=4"]["average_accuracy"]) == pytest.approx(0.75, abs=1e-12)
    assert float(rows["smora r=4"]["average_accuracy_difference"]) == pytest.approx(
        0.225, abs=1e-12
    )


def test_runs_are_found_below_a_folder_and_counted_once(tmp_path):
    a = write(tmp_path / "deep" / "er" / "b", [method(two(0.5, 0.5, 0.5))])
    write(tmp_path / "deep" / "a", [method(two(0.5, 0.5, 0.5), "osf")])
    write(tmp_path / ".hidden" / "c", [method(two(0.5, 0.5, 0.5), "sora")])
    found = compare_view.gather([tmp_path, a, a / ".." / "b"])
    assert found.runs == ["a", "b"]
    assert [s.label for s in found.systems] == ["osf r=4", "smora r=4"]
    assert compare_view.gather([a, tmp_path]).runs == ["b", "a"]
    assert compare_view.gather([str(a)]).seeds == [0]


def test_the_same_reference_of_several_runs_is_one_system(tmp_path):
    joint = [[NAN, NAN], [0.9, 0.9]]
    for name, shift in (("smora", 0.0), ("osf", 1e-10)):
        systems = [
            method(two(0.9, 0.5, 0.9), name),
            sequential(two(0.9, 0.25 + shift, 0.9)),
            entry("joint", "joint lora r=4", "reference", joint),
        ]
        write(tmp_path / name, systems)
    text, rows = compared(tmp_path)
    # Methods come first.
    assert list(rows) == ["osf r=4", "smora r=4", "sequential lora r=4", "joint lora r=4"]
    assert {row["seeds"] for row in rows.values()} == {"0"}
    assert "## Notes" not in text
    assert table(text)["joint lora r=4"]["forgetting"] == "-"
    assert rows["joint lora r=4"]["forgetting"] == ""
    assert table(text, 1)["joint lora r=4"]["Δ forgetting"] == "-"


def test_a_reference_that_differs_is_told(tmp_path):
    for name, kept in (("a", 0.25), ("b", 0.2500001)):
        systems = [method(two(0.9, 0.5, 0.9), name), sequential(two(0.9, kept, 0.9))]
        write(tmp_path / name, systems, tasks=["4-5", "6-7"])
    write(tmp_path / "c", [method(two(0.9, 0.5, 0.9), "c"), sequential(two(0.9, NAN, 0.9))])
    text, rows = compared(tmp_path, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert (
        "- sequential lora r=4, seed 0: b differs from a, which is shown; "
        "unrestricted on 4-5 after 6-7: 0.2500001 against 0.25.\n" in text
    )
    assert "c differs from a, which is shown; unrestricted on task 0 after task 1: nothing" in text
    assert float(rows["sequential lora r=4"]["average_accuracy"]) == 0.575


def test_equal_labels_are_told_apart_by_what_differs(tmp_path):
    def run(name, lr=0.01, **more):
        systems = [
            method(two(0.9, 0.5, 0.9)),
            sequential(two(0.9, 0.3, 0.9)),
            entry("probe", "frozen probe", "reference", two(0.8, 0.8, 0.8)),
        ]
        write(tmp_path / name, systems, train={"lr": lr}, **more)

    run("a")
    run("b", method={"name": "smora", "options": {"r": 4, "alpha": 8}})
    run("c", lr=0.1)
    found = compare_view.gather([tmp_path])
    assert [s.label for s in found.systems] == [
        "smora r=4 [lr=0.01 alpha=–]",
        "smora r=4 [lr=0.01 alpha=8]",
        "smora r=4 [lr=0.1 alpha=–]",
        "sequential lora r=4 [lr=0.01]",
        # Training is nothing to the probe: one system for all three.
        "frozen probe",
        "sequential lora r=4 [lr=0.1]",
    ]
    assert found.baseline is None
    assert (
        "2 systems are called 'sequential'; choose one by --baseline LABEL: 'seq" in found.notes[0]
    )
    chosen = compare_view.gather([tmp_path], "sequential lora r=4 [lr=0.1]")
    assert chosen.baseline.label == "sequential lora r=4 [lr=0.1]"


def test_bases_of_one_seed_tell_systems_apart(tmp_path):
    for name, weights in (("a", "made at seed 0"), ("b", "0123456789abcdef")):
        model = {"source": "object", "fingerprint": weights}
        write(tmp_path / name, [method(two(0.9, 0.5, 0.9))], model=model)
    labels = [s.label for s in compare_view.gather([tmp_path]).systems]
    assert labels == [
        "smora r=4 [fingerprint=made at see…]",
        "smora r=4 [fingerprint=0123456789a…]",
    ]


def test_restricted_figures_of_a_task_incremental_stream(tmp_path):
    own = method(two(0.5, 0.25, 0.5), restricted=two(1.0, 0.75, 0.75))
    write(tmp_path / "a", [own], stream={"scenario": "task-incremental"})
    text, rows = compared(tmp_path)
    assert rows["smora r=4"]["prediction"] == "restricted"
    assert float(rows["smora r=4"]["average_accuracy"]) == 0.75
    assert "restricted predictions: the classes of the tested task compete" in text
    assert compare_view.gather([tmp_path]).systems[0].seeds[0].curve == [1.0, 0.75]


def test_restricted_figures_where_they_are_asked_for(tmp_path):
    write(tmp_path / "a", [method(two(0.5, 0.25, 0.5), restricted=two(1.0, 0.5, 0.75))])
    for asked, forgets in ((False, 0.25), (True, 0.5)):
        (found,) = compare_view.gather([tmp_path], restricted=asked).systems
        assert found.by_seed("forgetting") == {0: forgets}
    write(tmp_path / "b", [method(two(0.5, 0.25, 0.5), restricted=[[NAN, NAN], [NAN, NAN]])])
    with pytest.raises(ConfigError, match="share their classes"):
        compare_view.gather([tmp_path / "b"], restricted=True)


def test_what_only_some_runs_have(tmp_path):
    plain = {"seconds": None, "trainable": None}
    write(tmp_path / "a", [method(two(0.9, 0.5, 0.9), **plain)])
    text, rows = compared(tmp_path)
    assert not {"general change", "extra"} & set(table(text)["smora r=4"])
    assert table(text)["smora r=4"]["seconds"] == "-"
    assert "general_change" not in rows["smora r=4"]
    more = {"general": [0.9, 0.8, 0.7], "extra_samples": 12.5, "trainable": 1200}
    write(tmp_path / "b", [method(two(0.9, 0.5, 0.9), **more)], seed=1)
    text, rows = compared(tmp_path)
    shown = table(text)["smora r=4"]
    assert shown["general change"] == "-0.200 (1 of 2)"
    assert shown["extra"] == "12.50 (1 of 2)"
    assert shown["weights"] == "1,200 (1 of 2)"
    assert float(rows["smora r=4"]["general_change"]) == pytest.approx(-0.2, abs=1e-12)
    assert "replayed rows per update" in text


def test_scores_that_are_no_accuracies(tmp_path):
    for seed in range(2):
        losses = [[-2.0 - seed, NAN], [-5.0, -1.0]]
        empty = np.full((2, 2), NAN)
        own = method(losses, restricted=empty)
        write(tmp_path / f"{seed}", [own], seed=seed, metric="negative_loss")
    text, _ = compared(tmp_path)
    assert table(text)["smora r=4"]["average score"] == "-3.000 ± 0.000"
    assert table(text)["smora r=4"]["forgetting"] == "2.500 ± 0.707"
    assert "a: negative_loss, of each of which more is better" in text
    drawn = compare_picture.draw(compare_view.gather([tmp_path]), dpi=100)
    assert share(Image.open(io.BytesIO(drawn)), "#0072b2") > 0.0005


def test_a_label_may_hold_any_letter(tmp_path):
    own = {**method(two(0.9, 0.5, 0.9)), "label": 'a | b, $x_1$ "c"'}
    write(tmp_path / "a", [own, sequential(two(0.9, 0.1, 0.9))])
    text, rows = compared(tmp_path)
    assert 'a \\| b, $x_1$ "c"' in table(text)
    assert 'a | b, $x_1$ "c"' in rows


def test_text_does_not_depend_on_where_and_when(tmp_path):
    three_seeds(tmp_path / "here" / "runs")
    first = reports.compare(tmp_path / "here", out=tmp_path / "one")
    assert first["compare.md"].read_text(encoding="utf-8") == compared(tmp_path / "here")[0]
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    again = reports.compare([tmp_path / "there"], out=tmp_path / "two")
    assert list(first) == ["compare.md", "compare.csv", "compare.png"]
    for name in ("compare.md", "compare.csv"):
        assert first[name].read_bytes() == again[name].read_bytes()
    assert {p.name for p in (tmp_path / "one").iterdir()} == set(first)


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_every_unfinished_run_is_named_with_the_remedy(tmp_path, status):
    for seed in range(3):
        write(
            tmp_path / f"run-{seed}",
            [method(two(0.9, 0.5, 0.9))],
            seed=seed,
            status="done" if seed == 1 else status,
        )
    with pytest.raises(RunError) as caught:
        reports.compare(tmp_path, out=tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    for line, seed in zip(lines, (0, 2), strict=True):
        assert f"run-{seed}: is not finished (status '{status}')" in line
        assert f"go on with `polyrank resume {tmp_path / f'run-{seed}'}`, or leave it out" in line
        assert ("wait for it, or go" in line) == (status == "running")
    assert not (tmp_path / "out").exists()


def test_a_run_begun_from_python_goes_on_from_python(tmp_path):
    path = write(tmp_path / "a", [method(two(0.9, 0.5, 0.9))], status="interrupted")
    folder = RunFolder.open(path)
    folder.update(command=["/usr/bin/study.py"])
    with pytest.raises(RunError, match=r"go on by its call with out='.*a', or leave it out"):
        compare_view.gather([path])


@pytest.mark.parametrize(
    ("stream", "told"),
    [
        ({"name": "other"}, "name: other here, toy there"),
        ({"scenario": "domain-incremental"}, "scenario: domain-incremental here, class-inc"),
        ({"options": {"tasks": 2, "order": "seed"}}, "options.order: seed here, None there"),
        ({"passes": 1}, "passes: 1 here, – there"),
        ({"hash": "other rows"}, "hash: other rows here, rows of seed 0 there"),
        ({"tasks": [{"name": "only"}]}, "tasks: 1 here, 2 there"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_runs_of_different_streams_are_refused(tmp_path, stream, told):
    write(tmp_path / "a", [method(two(0.9, 0.5, 0.9))])
    write(tmp_path / "b", [method(two(0.9, 0.5, 0.9))], stream=stream)
    with pytest.raises(RunError, match=re.escape(told)) as caught:
        compare_view.gather([tmp_path])
    assert "b: its stream is not that of" in str(caught.value)
    assert "compare runs of one stream at a time" in str(caught.value)


def test_the_seed_may_order_the_tasks(tmp_path):
    for seed, tasks in enumerate((["4-5", "6-7"], ["8-4", "9-6"])):
        write(tmp_path / f"{seed}", [method(two(0.9, 0.5, 0.9))], seed=seed, tasks=tasks)
    found = compare_view.gather([tmp_path])
    assert found.tasks == ["1", "2"]
    assert len(found.systems) == 1


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    run = write(tmp_path / "run", [method(two(0.9, 0.5, 0.9))])
    for paths, message in (
        ([], "runs: got none, expected at least one run folder"),
        ([tmp_path / "empty"], "empty: holds no run at any depth"),
        ([run, tmp_path / "none"], "none: does not exist, expected a run folder"),
        ([tmp_path / "file"], "file: is a file, expected a run folder"),
    ):
        with pytest.raises(RunError, match=message):
            reports.compare(paths, out=tmp_path / "out")
    with pytest.raises(RunError, match=r"run: is a run folder, expected one for the comparison"):
        reports.compare(run, out=run)
    assert {p.name for p in run.iterdir()} == {"run.json", "events.jsonl", "results.json"}
    assert not (tmp_path / "out").exists()


def test_the_baseline_is_a_label_or_a_name(tmp_path):
    three_seeds(tmp_path)
    for asked in ("smora", "smora r=4"):
        text, _ = compared(tmp_path, baseline=asked)
        assert "## Difference to smora r=4" in text
        assert list(table(text, 1)) == ["sequential lora r=4"]
    with pytest.raises(ConfigError, match=r"baseline: got 'smora r=5', expected one of 'smora r=4"):
        compare_view.gather([tmp_path], "smora r=5")
    write(tmp_path / "other", [method(two(0.9, 0.5, 0.9))], train={"lr": 1})
    with pytest.raises(ConfigError, match="2 systems are called 'smora', expected one; use a lab"):
        compare_view.gather([tmp_path], "smora")


def picture(systems, tmp_path, **more):
    write(tmp_path, systems, **more)
    # Half the dots a line, which is quicker.
    return Image.open(io.BytesIO(compare_picture.draw(compare_view.gather([tmp_path]), dpi=100)))


def share(image, colour):
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - wanted) < 12).all(1).mean()


def test_the_picture_shows_each_system_in_its_colour(tmp_path):
    systems = [method(two(0.9, 0.6, 0.8)), sequential(two(0.9, 0.2, 0.8))]
    image = picture(systems, tmp_path / "a")
    assert image.width > 2 * image.height > 800
    assert share(image, "#0072b2") > 0.0005
    assert share(image, "#454f55") > 0.0005
    # A colour that no system has.
    assert share(image, "#d55e00") == 0
    only = picture([systems[1]], tmp_path / "b")
    assert share(only, "#0072b2") == 0


@pytest.mark.parametrize("size", [1, 20])
def test_short_and_long_streams_are_drawn(tmp_path, size):
    falling = [[0.9 * 0.9 ** (i - j) if j <= i else NAN for j in range(size)] for i in range(size)]
    last = [[NAN] * size] * (size - 1) + [[0.9] * size]
    systems = [
        *(method(falling, f"method{i}") for i in range(9)),
        entry("joint", "joint lora r=4", "reference", last),
        entry("nothing", "never measured", "reference", np.full((size, size), NAN)),
    ]
    image = picture(systems, tmp_path)
    assert image.height > 450
    assert share(image, "#0072b2") > 0.0002


def test_every_system_has_a_sign_of_its_own():
    made = [
        compare_view.Compared(f"{role} {i}", "", role, {}, {})
        for role, count in (("method", 30), ("reference", 3))
        for i in range(count)
    ]
    styles = compare_picture._styles(made)
    assert len({(s.colour, s.marker) for s in styles.values()}) == 33
    assert all((s.dashes is None) == label.startswith("method") for label, s in styles.items())


def test_comparing_imports_no_torch_and_leaves_pyplot_alone(tmp_path):
    three_seeds(tmp_path)
    code = (
        "import sys; from polyrank import reports; reports.compare(sys.argv[1], out=sys.argv[2])\n"
        "print([m for m in ('torch', 'matplotlib.pyplot', 'sklearn', 'scipy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
