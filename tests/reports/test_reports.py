"""Reports: one self-contained page, a picture, a CSV and plain tables, all true to the results."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from polyrank import metrics, reports
from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.reports import page, words
from polyrank.reports.picture import draw
from polyrank.reports.view import prepare

VOID = {"meta", "br", "img", "wbr", "line", "circle", "path", "hr"}


class Reader(HTMLParser):
    """Collects text, addresses and table cells, and insists on closed tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], []
        self.cells, self.tables = None, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [values[key] for key in ("src", "href", "xlink:href") if key in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((values.get("aria-label") or values["class"], []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][1][-1][-1] += data

    def table(self, name):
        return next(rows for label, rows in self.tables if label == name)


def shown(folder):
    opened = RunFolder.open(folder)
    return prepare(opened.run, opened.results())


def read(folder):
    reports.report(folder)
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_three_files_beside_the_results(run_folder):
    before = {p.name: p.read_bytes() for p in run_folder.iterdir()}
    made = reports.report(run_folder)
    assert set(made) == {"report.html", "matrix.png", "matrix.csv"}
    assert {p.name for p in run_folder.iterdir()} == {*before, *made}
    assert all((run_folder / name).read_bytes() == data for name, data in before.items())
    first = {name: path.read_bytes() for name, path in made.items()}
    assert {n: p.read_bytes() for n, p in reports.report(run_folder).items()} == first


@pytest.mark.parametrize("name", ["run_folder", "long_folder"])
def test_the_page_is_self_contained_and_well_formed(request, name):
    folder = request.getfixturevalue(name)
    found = read(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert {"script", "link", "iframe", "object"}.isdisjoint(found.tags)
    assert found.addresses
    assert all(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert not re.search(r"https?:|url\(|@import", text)
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert "nan" not in " ".join(found.text).lower().split()


def test_the_page_shows_the_numbers_of_the_results(run_folder, results):
    found = read(run_folder)
    rows = found.table("compare")[1:]
    for row, system in zip(rows, results["systems"], strict=True):
        free, told = system["metrics"]["unrestricted"], system["metrics"]["restricted"]
        assert row[0] == system["label"] + system["role"]
        expected = [
            free["average_accuracy"],
            free["average_incremental_accuracy"],
            free["forgetting"],
            free["backward_transfer"],
            told["average_accuracy"],
        ]
        assert row[1:6] == [words.fraction(v) for v in expected]
    assert rows[2][3] == "–"
    for system in results["systems"]:
        for kind in ("unrestricted", "restricted"):
            cells = found.table(f"{kind} accuracy of {system['label']}")[1:]
            assert [row[0] for row in cells] == ["after 4-5", "after 6-7", "after 8-9"]
            expected = [[words.short(v) for v in row] for row in system[kind].tolist()]
            assert [row[1:] for row in cells] == expected


def test_the_page_tells_how_to_repeat_the_run(run_folder):
    text = " ".join(read(run_folder).text)
    run = json.loads((run_folder / "run.json").read_text())
    for part in ("polyrank run --method smora", "options.k", run["versions"]["numpy"], "0e9408641"):
        assert part in text
    for value in (run["hardware"]["system"], run["started"]):
        assert value in text


def test_the_page_prints_every_definition(run_folder):
    text = "".join(read(run_folder).text)
    for name in ("average_accuracy", "forgetting", "backward_transfer"):
        formula = metrics.definitions()[name]
        assert "".join(part for part, _ in words.formula(formula)) in text


def test_what_comes_from_outside_is_escaped(tmp_path, results):
    from_outside = "<script>alert(1)</script> & [bold]"
    results["systems"][0]["label"] = from_outside
    results["tasks"][0]["name"] = '"><img src=x>'
    folder = RunFolder.create(tmp_path, {**ask(), "method": {"name": "smora"}})
    folder.write_results(results)
    folder.finish()
    found = read(tmp_path)
    assert "script" not in found.tags
    assert all(a.startswith("data:") for a in found.addresses)
    assert from_outside in "".join(found.text)
    plain = reports.terminal_text(folder.results(), width=200)
    assert from_outside in plain
    assert 'on "><img src=x>' in plain


def ask():
    return {
        "method": {"name": "m"},
        "stream": {"name": "s", "scenario": "class-incremental"},
        "model": {},
        "seed": 0,
        "train": {},
    }


def test_one_task_has_no_forgetting(tmp_path, results):
    results["tasks"] = results["tasks"][:1]
    for system in results["systems"]:
        for kind in ("unrestricted", "restricted"):
            system[kind] = [[0.75]]
            system["metrics"][kind] = metrics.summary([[0.75]], [104])
        system["counts"], system["routing"] = [104], None
    folder = RunFolder.create(tmp_path, ask(), command=["/usr/lib/polyrank/__main__.py", "run"])
    folder.write_results(results)
    folder.close()
    found = read(tmp_path)
    assert found.table("compare")[1][1:4] == ["0.750", "0.750", "–"]
    assert "running" in found.text
    assert "python -m polyrank run" in found.text
    assert "Ranks at work" not in "".join(found.text)


def test_a_run_without_results_is_refused_and_nothing_is_written(tmp_path):
    RunFolder.create(tmp_path / "a", ask()).close()
    with pytest.raises(RunError, match=r"no results.json yet .status 'running'."):
        reports.report(tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"run.json", "events.jsonl"}
    (tmp_path / "b").mkdir()
    with pytest.raises(RunError, match=r"holds no run.json"):
        reports.report(tmp_path / "b")


def test_routing_is_shown_per_layer_and_task(run_folder, results):
    found = read(run_folder)
    routing = results["systems"][0]["routing"]
    rows = found.table("routing")
    assert rows[0] == ["layer", "4-5", "6-7", "8-9"]
    assert [row[0] for row in rows[1:3]] == ["layer.0.attention.value", "layer.0.attention.query"]
    for layer, row in enumerate(rows[1:]):
        assert row[1:] == [f"{routing['entropy'][t][layer]:.2f}" for t in range(3)]
    assert len(found.addresses) == 3 * 8
    top = routing["load"].max()
    address = found.addresses[4]
    assert address == page.strip(routing["load"][1][1].tolist(), top)


def test_a_strip_is_one_pixel_per_rank_as_opaque_as_its_load():
    import base64

    data = base64.b64decode(page.strip([0.0, 0.25, math.nan, 0.5], 0.5).split(",")[1])
    image = Image.open(io.BytesIO(data))
    assert image.size == (4, 1)
    assert [image.getpixel((x, 0))[3] for x in range(4)] == [0, 128, 0, 255]
    assert page.highest([[[0.1, math.nan], [0.7]]]) == 0.7
    assert page.highest([[[math.nan]]]) == 0
    assert page.strip([0.0], 0.0)


def test_the_picture_shows_the_matrices(run_folder):
    image = Image.open(io.BytesIO(draw(shown(run_folder))))
    assert image.width > 1500
    assert image.width > 2 * image.height
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # Many dark cells: accuracies near 1; and cells of the light end.
    dark = (np.abs(pixels.astype(int) - (11, 63, 75)) < 24).all(1).mean()
    assert dark > 0.05
    results = RunFolder.open(run_folder).results()
    for system in results["systems"]:
        system["unrestricted"] = np.zeros((3, 3)).tolist()
    pale = Image.open(io.BytesIO(draw(prepare(RunFolder.open(run_folder).run, results))))
    assert pale.size == image.size
    pixels = np.asarray(pale.convert("RGB")).reshape(-1, 3)
    assert (np.abs(pixels.astype(int) - (11, 63, 75)) < 24).all(1).mean() < 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_text_of_the_picture_is_cut_off(run_folder, count):
    results = RunFolder.open(run_folder).results()
    results["systems"] = results["systems"][:count]
    run = {**RunFolder.open(run_folder).run}
    run["stream"] = {**run["stream"], "scenario": "domain-incremental-without-boundaries"}
    image = np.asarray(Image.open(io.BytesIO(draw(prepare(run, results), 80))).convert("L"))
    for edge in (image[:8], image[:, :8], image[:, -8:]):
        assert (edge == 255).all()


def test_the_page_shows_the_general_score_as_the_terminal_does(tmp_path, results, build_run):
    heads = read(build_run(tmp_path / "plain")).table("compare")[0]
    assert not any("general" in head for head in heads)
    results["systems"][0]["general"] = [0.9, 0.8, 0.625, 0.5]
    found = read(build_run(tmp_path / "general", results))
    head, mine, other = found.table("compare")[:3]
    before, after = head.index("generalbefore"), head.index("generalafter")
    assert (mine[before], mine[after]) == ("0.900", "0.500")
    assert (other[before], other[after]) == ("–", "–")
    assert "score on what no task trains" in " ".join(found.text)


def test_tables_say_which_of_several_models_stands_for_a_system(results, tmp_path, build_run):
    assert "evaluated beside it" not in reports.terminal_text(results)
    other = {**results["systems"][0], "name": "smora@stage-0", "label": "smora (stage-0)"}
    results["systems"].insert(1, {**other, "deploy": "stage-0"})
    told = "smora r=16 k=4: the adapter as it is after its last phase; the models in brackets"
    assert told in " ".join(reports.terminal_text(results).split())
    assert told in " ".join(read(build_run(tmp_path / "several", results)).text)
    results["systems"][0]["deploy"] = "slow"
    assert "smora r=16 k=4: the model 'slow'; the" in " ".join(
        reports.terminal_text(results).split()
    )


def test_the_csv_gives_back_every_score(run_folder, results):
    reports.report(run_folder)
    with open(run_folder / "matrix.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 9
    back = {}
    for line in lines:
        value = float(line["accuracy"]) if line["accuracy"] else math.nan
        matrix = back.setdefault((line["system"], line["prediction"]), np.zeros((3, 3)))
        matrix[int(line["after_index"]), int(line["on_index"])] = value
        assert int(line["n"]) == results["tasks"][int(line["on_index"])]["n_test"]
    for system in results["systems"]:
        for kind in ("unrestricted", "restricted"):
            np.testing.assert_array_equal(back[system["name"], kind], system[kind])


def test_the_terminal_shows_matrices_averages_and_forgetting(results):
    text = reports.terminal_text(results, width=90)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 90
    for system in results["systems"]:
        summary = system["metrics"]["unrestricted"]
        line = [line for line in text.splitlines() if line.startswith(system["label"])][-1]
        numbers = line.removeprefix(system["label"]).split()
        expected = [
            summary["average_accuracy"],
            summary["average_incremental_accuracy"],
            summary["forgetting"],
            summary["backward_transfer"],
            system["metrics"]["restricted"]["average_accuracy"],
        ]
        assert numbers == ["-" if math.isnan(v) else f"{v:.3f}" for v in expected]
    first = next(line for line in text.splitlines() if line.startswith("smora"))
    a = results["systems"][0]["unrestricted"]
    assert first.split()[3:] == ["4-5", f"{a[0, 0]:.3f}", "-", "-", f"{a[0, 0]:.3f}"]


def test_a_long_stream_shows_curves_in_the_terminal(long_folder):
    text = reports.terminal_text(RunFolder.open(long_folder).results(), width=120)
    assert "after each of 20 tasks" in text
    curve = metrics.average_accuracy_curve(shown(long_folder).systems[0].unrestricted)
    line = next(line for line in text.splitlines() if line.startswith("task-7"))
    assert line.split()[1] == f"{curve[7]:.3f}"


def test_colour_only_in_a_terminal(results):
    table = reports.terminal_table(results)
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=90)
    terminal.print(table)
    assert "\x1b[" in terminal.file.getvalue()
    piped = Console(file=io.StringIO(), width=90)
    piped.print(table)
    assert "\x1b" not in piped.file.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_gets_plain_text_in_any_encoding(run_folder, encoding):
    code = (
        "import sys; from rich.console import Console; from polyrank import reports\n"
        "from polyrank.io import RunFolder\n"
        "Console().print(reports.terminal_table(RunFolder.open(sys.argv[1]).results()))"
    )
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(run_folder)]
    out = subprocess.run(command, capture_output=True, check=True, env=environment(encoding)).stdout
    assert b"\x1b" not in out
    assert b"forgetting" in out
    out.decode(encoding)


def environment(encoding):
    import os

    return {**os.environ, "PYTHONIOENCODING": encoding}


def test_reporting_imports_no_torch_and_leaves_pyplot_alone(run_folder):
    code = (
        "import sys; from polyrank import reports; reports.report(sys.argv[1])\n"
        "print([m for m in ('torch', 'matplotlib.pyplot', 'sklearn') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(run_folder)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_chart_breaks_at_gaps_and_stays_inside(run_folder):
    prepared = shown(run_folder)
    prepared.systems[0].curve[1] = math.nan
    drawn = page.chart(prepared)
    line = drawn["lines"][0]
    assert len(line["paths"]) == 2
    assert len(line["points"]) == 2
    assert len(drawn["lines"][2]["points"]) == 1
    for each in drawn["lines"]:
        for x, y, _ in each["points"]:
            assert drawn["left"] <= x <= drawn["right"]
            assert 0 <= y <= drawn["base"]
    values = [line["last"] for line in drawn["legend"]]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (words.fraction(0.84249), "0.842"),
        (words.fraction(-0.5), "−0.500"),
        (words.fraction(-0.0001), "0.000"),
        (words.fraction(math.nan), "–"),
        (words.fraction(None, missing="-"), "-"),
        (words.short(1.0), "1"),
        (words.short(0.996), "1"),
        (words.short(0.0), "0"),
        (words.short(0.074), ".07"),
        (words.short(math.nan), ""),
        (words.whole(1234567), "1\u2009234\u2009567"),
        (words.whole(None), "–"),
        (words.seconds(59.94), "59.9 s"),
        (words.seconds(125), "2 min 05 s"),
        (words.seconds(4800), "1 h 20 min"),
        (words.seconds(None), "–"),
        (words.clipped("abcdef", 4), "abc…"),
        (words.trimmed(["a.b.0.q", "a.b.1.q"]), ["b.0.q", "b.1.q"]),
        (words.trimmed(["a.b"]), ["a.b"]),
        (words.trimmed(["q", "v"]), ["q", "v"]),
        (
            page.flat({"a": {"b": [1, 2], "c": None}, "d": [{"e": True}], "f": []}),
            [("a.b", "1, 2"), ("a.c", "–"), ("d[0].e", "True"), ("f", "none")],
        ),
        (
            words.formula("F_k = Σ_{j<k} max_{i∈{1..k}} a_{i,j}^2"),
            [
                ("F", ""),
                ("k", "sub"),
                (" = Σ", ""),
                ("j<k", "sub"),
                (" max", ""),
                ("i∈{1..k}", "sub"),
                (" a", ""),
                ("i,j", "sub"),
                ("2", "sup"),
            ],
        ),
    ],
)
def test_words(got, expected):
    assert got == expected
