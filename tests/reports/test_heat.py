"""A method's own figures: the scale, the table of the page, a PNG each."""

import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from polyrank import reports
from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.io.runs import figure_files
from polyrank.reports import heat_picture, words
from polyrank.reports.heat import Heat, heats

NAN = math.nan
LAYERS = [f"vit.layers.{i}.attention.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
FIGURES = [
    {
        "name": "reuse",
        "title": "Whose atoms a task reads",
        "rows": ["4-5", "6-7"],
        "columns": ["4-5", "6-7"],
        "values": [[0.75, NAN], [0.25, 1.5]],
        "unit": "share",
        "note": "Rows are tasks <& columns too>.",
    },
    {
        "name": "kept",
        "title": "Kept ranks",
        "rows": LAYERS,
        "columns": ["after 4-5"],
        "values": [[4.0], [0.0], [-2.0], [3.0]],
        "unit": "",
        "note": "",
    },
]


def heat(values, **changes):
    values = np.array(values, dtype=float)
    rows, columns = ([f"n{i}" for i in range(size)] for size in values.shape)
    given = {"file": "a.png", "system": "lora", "title": "t", "rows": rows, "columns": columns}
    return Heat(**{**given, "values": values, "unit": "", "note": "", **changes})


@pytest.fixture
def figured(run_folder, results):
    """A run with two figures of its method."""
    results["systems"][0]["figures"] = FIGURES
    RunFolder.open(run_folder).write_results(results)
    return run_folder


@pytest.mark.parametrize(
    ("values", "low", "high", "shares", "texts"),
    [
        ([[1, 4]], 0, 4, [0.25, 1], ["1", "4"]),
        ([[-2, 6]], -2, 6, [0, 1], ["−2", "6"]),
        ([[-4, -1]], -4, 0, [0, 0.75], ["−4", "−1"]),
        ([[0.125, NAN]], 0, 0.125, [1, NAN], ["0.12", ""]),
        ([[0, 0]], 0, 0, [0, 0], ["0", "0"]),
        ([[NAN, NAN]], 0, 0, [0, 0], ["", ""]),
        ([[12.34, 1]], 0, 12.34, [1, 1 / 12.34], ["12.3", "1.0"]),
        ([[123.4, 1]], 0, 123.4, [1, 1 / 123.4], ["123", "1"]),
    ],
)
def test_the_scale_holds_zero_and_numbers_have_the_digits_they_need(
    values, low, high, shares, texts
):
    found = heat(values)
    assert (found.low, found.high) == (low, high)
    assert [found.text(value) for value in found.values[0]] == texts
    known = ~np.isnan(found.values[0])
    got = [found.share(value) for value in found.values[0][known]]
    assert got == [share for share, ok in zip(shares, known, strict=True) if ok]


def test_a_row_of_means_changes_neither_counts_nor_paths():
    shown = heat([[8, 12], [9, 16], [8.5, 14]])
    assert [shown.text(value) for value in (8.0, 16.0, 8.5)] == ["8", "16", "8.5"]
    assert heat([[0.5, 1.0], [0.25, 1.0]]).text(1.0) == "1.00"
    rows = ["model.layers.0.q", "model.layers.1.q", "mean"]
    assert words.trimmed(rows) == ["layers.0.q", "layers.1.q", "mean"]


def test_every_figure_has_a_table_and_a_picture(figured):
    made = reports.report(figured)
    pictures = {"smora-reuse.png", "smora-kept.png"}
    assert set(made) == {"report.html", "matrix.png", "matrix.csv"} | pictures
    text = made["report.html"].read_text(encoding="utf-8")
    first, second = re.findall(r'<table class="heat figure.*?</table>', text, re.S)
    assert 'aria-label="Whose atoms a task reads of smora r=16 k=4"' in first
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", first)
    assert cells == ["0.75", "", "0.25", "1.50"]
    assert re.findall(r"--v:([0-9.]+)", first) == ["0.5000", "0.1667", "1.0000"]
    assert first.count("not measured") == 1
    assert re.findall(r'<th scope="row" title="([^"]*)"', second) == [
        path.removeprefix("vit.") for path in LAYERS
    ]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", second) == ["4", "0", "−2", "3"]
    assert "Rows are tasks &lt;&amp; columns too&gt;." in text
    for name in pictures:
        image = Image.open(made[name])
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def colours(data):
    """The colours of a PNG with how many pixels have them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {colour: count for count, colour in image.getcolors(1 << 22)}


def test_the_picture_paints_the_values():
    low, high, empty = (220, 235, 232), (11, 63, 75), (246, 246, 244)
    none = colours(heat_picture.draw(heat(np.zeros((6, 6))), "digits"))
    half = colours(heat_picture.draw(heat(np.eye(6)), "digits"))
    gaps = colours(heat_picture.draw(heat(np.where(np.eye(6) == 1, 1, NAN)), "digits"))
    cell = none[low] / 36
    assert half[high] == pytest.approx(6 * cell, rel=0.1)
    assert half[low] == pytest.approx(30 * cell, rel=0.1)
    assert gaps[empty] == pytest.approx(30 * cell, rel=0.1)
    assert empty not in half


def test_nothing_is_cut_off_at_the_edges():
    """A border of paper around the longest words, of few cells and of many."""
    wordy = {"unit": "share of all that was read", "note": "Word " * 60, "title": "Word " * 20}
    many = heat(np.random.default_rng(0).normal(size=(90, 24)), **wordy)
    few = heat([[NAN]], rows=["a.very.long.path.of.some.layer.deep.down"], **wordy)
    for shown in (many, few):
        image = np.array(
            Image.open(io.BytesIO(heat_picture.draw(shown, "digits", 80))).convert("L")
        )
        assert max(image.shape) < 1200
        edges = [image[:8], image[-4:], image[:, :8], image[:, -4:]]
        assert all((edge == 255).all() for edge in edges)


def test_pictures_of_figures_belong_to_the_run(figured, results):
    reports.report(figured)
    asked = {key: RunFolder.open(figured).run[key] for key in ("method", "stream", "model")}
    asked |= {"seed": 0, "train": RunFolder.open(figured).run["train"]}
    (figured / "smora-mine.png").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"something else \(smora-mine\.png\)"):
        RunFolder.create(figured, asked, overwrite=True)
    (figured / "smora-mine.png").unlink()
    RunFolder.create(figured, asked, overwrite=True).close()
    assert not list(figured.glob("*.png"))


def test_systems_without_figures_have_none(results):
    assert heats(results) == []
    assert figure_files(results) == {}
