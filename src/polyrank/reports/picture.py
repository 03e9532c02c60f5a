"""matrix.png: the accuracy matrices of all systems side by side."""

import io
import math
import textwrap
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from polyrank.reports import words
from polyrank.reports.view import System, View

PAPER, INK, SOFT, _EMPTY = "#ffffff", "#1c2326", "#66727a", "#f6f6f4"
SCALE = LinearSegmentedColormap.from_list(
    "polyrank", ["#dcebe8", "#a3cdc7", "#4f9d9c", "#1b6a73", "#0b3f4b"]
)
_FONTS = ("Inter", "Source Sans 3", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
_PER_ROW = 4
# Inches: one map with its labels; text above all maps, and below each.
_MAP, _GAP, _LEFT, _TOP, _BELOW = 2.1, 0.42, 0.95, 1.0, 0.95
_LINE = 0.19
_TITLE = "Accuracy on each task, after each task"


def draw(view: View, dpi: int = 200) -> bytes:
    """A PNG, 4 maps a row, on white: readable on light and dark pages alike."""
    columns = min(_PER_ROW, len(view.systems))
    rows = math.ceil(len(view.systems) / columns)
    # Not narrower than the title, about 0.13 inch a letter.
    width = max(_LEFT + columns * _MAP + (columns - 1) * _GAP + 0.35, 0.13 * len(_TITLE) + 0.5)
    below = _below(view, width)
    top = _TOP + _LINE * (len(below) - 1)
    height = top + rows * (_MAP + _BELOW + 0.4)
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER)
    FigureCanvasAgg(figure)
    family = typeface()
    _headline(figure, below, family, width, height)
    for n, system in enumerate(view.systems):
        row, column = divmod(n, columns)
        left = _LEFT + column * (_MAP + _GAP)
        bottom = height - top - row * (_MAP + _BELOW + 0.4) - 0.4 - _MAP
        box = (left / width, bottom / height, _MAP / width, _MAP / height)
        _map(figure.add_axes(box), system, view.tasks, column == 0, family)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _below(view: View, width: float) -> list[str]:
    """The lines below the title, about 0.078 inch a letter."""
    stream = view.run["stream"]
    text = (
        f"{stream['name']}, {stream['scenario']}, seed {view.run['seed']}: "
        "rows are the tasks trained so far, columns the task tested, all classes seen compete"
    )
    return textwrap.wrap(text, int((width - 0.5) / 0.078))


def _headline(figure: Figure, below: list[str], family: str, width: float, height: float) -> None:
    left = 0.28 / width
    figure.text(
        left,
        1 - 0.28 / height,
        _TITLE,
        family=family,
        size=15,
        weight="bold",
        color=INK,
        va="top",
    )
    for number, line in enumerate(below):
        y = 1 - (0.62 + _LINE * number) / height
        figure.text(left, y, line, family=family, size=9.5, color=SOFT, va="top")


def _map(axes: Axes, system: System, tasks: list[str], first: bool, family: str) -> None:
    size = len(tasks)
    axes.imshow(system.unrestricted, cmap=SCALE, vmin=0, vmax=1, aspect="equal")
    for i, j in np.ndindex(size, size):
        value = system.unrestricted[i, j]
        if math.isnan(value):
            _empty(axes, i, j)
        elif size <= 12:
            light = value > 0.5
            axes.text(
                j,
                i,
                words.short(value),
                ha="center",
                va="center",
                family=family,
                size=min(13, 40 / size),
                weight="bold" if i == j else "normal",
                color="white" if light else (INK if j <= i else SOFT),
            )
    # White lines between the cells, none around.
    axes.set_xticks(np.arange(size - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(size - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=PAPER, linewidth=2.5 if size <= 12 else 0.5)
    axes.tick_params(which="both", length=0, pad=5)
    axes.spines[:].set_visible(False)
    names = [words.clipped(task, 9) for task in tasks]
    # About 0.075 inch a letter of this size; labels that would touch are left out.
    letters = max(map(len, names)) * 0.075 + 0.08
    across = range(0, size, max(1, math.ceil(size * letters / _MAP)))
    down = range(0, size, max(1, math.ceil(size / 12)))
    style: dict[str, Any] = {"family": family, "size": 9, "color": SOFT}
    axes.set_xticks(list(across), [names[j] for j in across], **style)
    axes.set_yticks(list(down), [f"after {names[i]}" if first else "" for i in down], **style)
    weight = "bold" if system.role == "method" else "normal"
    label = "\n".join(textwrap.wrap(system.label, 25, max_lines=2, placeholder=" …"))
    axes.set_title(label, loc="left", family=family, size=11.5, weight=weight, color=INK, pad=9)
    _numbers(axes, system, family)


def _numbers(axes: Axes, system: System, family: str) -> None:
    average = words.fraction(system.metric("average_accuracy"), 2)
    lost = words.fraction(system.metric("forgetting"), 2)
    place: dict[str, Any] = {"transform": axes.transAxes, "family": family, "va": "top"}
    axes.text(0, -0.17, average, size=17, weight="bold", color=INK, **place)
    axes.text(0, -0.31, "average accuracy", size=8.5, color=SOFT, **place)
    axes.text(0.62, -0.17, lost, size=17, color=INK, **place)
    axes.text(0.62, -0.31, "forgetting", size=8.5, color=SOFT, **place)


def _empty(axes: Axes, i: int, j: int) -> None:
    corner = (j - 0.5, i - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=_EMPTY, edgecolor="none", zorder=0.5))
    axes.text(j, i, "·", ha="center", va="center", size=9, color="#b4bcc0")


def typeface() -> str:
    """The first font of the list that this machine has."""
    available = set(font_manager.get_font_names())
    return next((name for name in _FONTS if name in available), "sans-serif")
