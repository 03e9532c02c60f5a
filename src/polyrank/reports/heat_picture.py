"""SYSTEM-FIGURE.png: one figure of a method as a heat map with its scale."""

import io
import math
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polyrank.reports import words
from polyrank.reports.heat import Heat
from polyrank.reports.picture import INK, PAPER, SCALE, SOFT, typeface

# Inches: a letter of labels and of the title; margins; the whole grid at most.
_LETTER, _BIG, _EDGE, _WIDEST, _HIGHEST = 0.075, 0.15, 0.28, 8.0, 9.0
_CELLS, _LINE = 400, 0.19


def draw(heat: Heat, where: str, dpi: int = 200) -> bytes:
    """A PNG on white; `where` says of which run it is."""
    rows, columns = heat.values.shape
    names = [words.clipped(name, 30) for name in heat.rows]
    heads = [words.clipped(name, 12) for name in heat.columns]
    wide = min(max(0.62, max(map(len, heads)) * _LETTER + 0.12), _WIDEST / columns)
    tall = min(0.36, _HIGHEST / rows)
    left = _EDGE + max(map(len, names)) * _LETTER + 0.12
    bar = min(1.6, columns * wide)
    key = left + bar + 0.1 + len(_told(heat)) * _LETTER
    width = max(left + columns * wide, key, 5.0) + _EDGE
    title = textwrap.wrap(heat.title, int((width - 2 * _EDGE) / _BIG)) or [""]
    below = textwrap.wrap(f"{heat.system}, {where}", int((width - 2 * _EDGE) / _LETTER))
    note = textwrap.wrap(heat.note, int((width - 2 * _EDGE) / _LETTER))
    top = _EDGE + 0.27 * len(title) + _LINE * len(below) + 0.5
    bottom = 0.72 + (_LINE * len(note) + 0.18 if note else 0)
    height = top + rows * tall + bottom
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER)
    FigureCanvasAgg(figure)
    family = typeface()

    def write(lines: list[str], down: float, step: float, **style: Any) -> None:
        for number, line in enumerate(lines):
            y = 1 - (down + number * step) / height
            figure.text(_EDGE / width, y, line, family=family, va="top", **style)

    write(title, _EDGE, 0.27, size=15, weight="bold", color=INK)
    write(below, _EDGE + 0.27 * len(title) + 0.05, _LINE, size=9.5, color=SOFT)
    write(note, top + rows * tall + 0.7, _LINE, size=9, color=SOFT)
    size = (columns * wide / width, rows * tall / height)
    axes = figure.add_axes((left / width, bottom / height, *size))
    _cells(axes, heat, wide, tall, family)
    _labels(axes, names, heads, wide, tall, family)
    low = (bottom - 0.36) / height
    _scale(figure.add_axes((left / width, low, bar / width, 0.12 / height)), heat, bar, family)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _cells(axes: Axes, heat: Heat, wide: float, tall: float, family: str) -> None:
    rows, columns = heat.values.shape
    shares = np.vectorize(heat.share, otypes=[float])(heat.values)
    axes.imshow(shares, cmap=SCALE, vmin=0, vmax=1, aspect="auto")
    texts = {(i, j): heat.text(heat.values[i, j]) for i, j in np.ndindex(rows, columns)}
    room = max(map(len, texts.values())) * 0.085 < wide and tall > 0.16
    for (i, j), text in texts.items():
        if math.isnan(heat.values[i, j]):
            corner = (j - 0.5, i - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="#f6f6f4", edgecolor="none"))
            text = "·"
        if room and rows * columns <= _CELLS:
            ink = "white" if shares[i, j] > 0.5 else INK
            style: dict[str, Any] = {"family": family, "color": "#b4bcc0" if text == "·" else ink}
            axes.text(j, i, text, ha="center", va="center", size=min(10, 28 * tall), **style)
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2 if min(wide, tall) > 0.25 else 0.5)
    axes.tick_params(which="both", length=0, pad=5)
    axes.spines[:].set_visible(False)


def _labels(
    axes: Axes, names: list[str], heads: list[str], wide: float, tall: float, family: str
) -> None:
    style: dict[str, Any] = {"family": family, "size": 9, "color": SOFT}
    # Labels that would touch are left out.
    letters = max(map(len, heads)) * _LETTER + 0.08
    across = range(0, len(heads), max(1, math.ceil(letters / wide)))
    down = range(0, len(names), max(1, math.ceil(0.16 / tall)))
    axes.set_xticks(list(across), [heads[j] for j in across], **style)
    axes.set_yticks(list(down), [names[i] for i in down], **style)
    axes.xaxis.tick_top()
    axes.tick_params(which="both", length=0, pad=5)


def _told(heat: Heat) -> str:
    """Both ends of the scale, what the numbers count, and what a dot is."""
    ends = [heat.text(heat.low), heat.text(heat.high)]
    text = " to ".join(dict.fromkeys(ends))
    return f"{text} {heat.unit}".strip() + (";  ·  not measured" if heat.gaps else "")


def _scale(axes: Axes, heat: Heat, bar: float, family: str) -> None:
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=SCALE, vmin=0, vmax=1, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    place: dict[str, Any] = {"transform": axes.transAxes, "va": "center", "ha": "left"}
    axes.text(1 + 0.1 / bar, 0.45, _told(heat), family=family, size=9, color=SOFT, **place)
