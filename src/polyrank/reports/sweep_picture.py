"""lr.png: validation score against learning rate, a line for each method."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from polyrank.engine.sweep.select import Level
from polyrank.metrics.statistics import mean, sample_deviation

if TYPE_CHECKING:
    from polyrank.engine.sweep.schedule import Group
    from polyrank.engine.sweep.select import Choice
    from polyrank.reports.sweep import Row, Sheet

_INK, _SOFT = "#1c2326", "#66727a"
_COLOURS = (
    "#0b3f4b",
    "#c2572b",
    "#4f9d9c",
    "#8a5a9e",
    "#b8912b",
    "#3f6fb0",
    "#a33b55",
    "#5d7a2e",
    "#7d6a5a",
    "#2f8f6b",
)
_STYLES = ("-", "--", ":", "-.")


def draw(sheet: Sheet, dpi: int = 160) -> bytes:
    """A PNG on white; a band is the standard deviation over seeds, a ring the selected rate."""
    figure = Figure(figsize=(8.4, 4.8), dpi=dpi, facecolor="#ffffff")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.13, 0.66, 0.71))
    axes.set_xscale("log")
    fallen: list[tuple[float, str]] = []
    for number, row in enumerate(sheet.rows):
        style: dict[str, Any] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)],
        }
        fallen += _lines(axes, row, style)
    _crosses(axes, fallen)
    axes.set_xlabel("learning rate", color=_SOFT)
    axes.set_ylabel(f"validation {sheet.score}", color=_SOFT)
    axes.grid(color="#e6e9ea", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_SOFT, labelsize=9)
    if axes.get_lines():
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0)}
        axes.legend(**place, frameon=False, fontsize=9, labelcolor=_INK)
    title = f"{sheet.lock['name']}: what each method makes of a rate"
    figure.text(0.09, 0.94, title, size=13, color=_INK)
    below = "ring: selected rate; band: standard deviation over seeds; cross: a run that diverged"
    figure.text(0.09, 0.89, below, size=9, color=_SOFT)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _lines(axes: Axes, row: Row, style: dict[str, Any]) -> list[tuple[float, str]]:
    """Draw a method's lines; return rate and colour of its diverged runs."""
    if row.probe is not None:
        _line(
            axes, *row.probe, {**style, "alpha": 0.4, "linewidth": 1.0}, f"{row.group.name}, probe"
        )
    _line(axes, row.group, row.choice, {**style, "linewidth": 1.8}, row.group.name)
    if row.choice.best is not None and row.rate is not None:
        top = mean(row.choice.validation)
        ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot([row.rate], [top], "o", color=style["color"], **ring)
    shown = [(row.group, row.choice), *([row.probe] if row.probe else [])]
    return [
        (group.grid.rate(level.index), style["color"])
        for group, choice in shown
        for level in choice.levels
        if level.diverged
    ]


def _line(axes: Axes, group: Group, choice: Choice, style: dict[str, Any], label: str) -> None:
    levels = [level for level in choice.levels if level.scores]
    if not levels:
        return
    steps = [group.grid.rate(level.index) for level in levels]
    middles = [mean(_scores(level)) for level in levels]
    axes.plot(steps, middles, marker="o", markersize=4, label=label, **style)
    spreads = [sample_deviation(_scores(level)) for level in levels]
    wide = [0.0 if math.isnan(spread) else spread for spread in spreads]
    low = [m - w for m, w in zip(middles, wide, strict=True)]
    high = [m + w for m, w in zip(middles, wide, strict=True)]
    axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _scores(level: Level) -> list[float]:
    return list(level.scores.values())


def _crosses(axes: Axes, fallen: list[tuple[float, str]]) -> None:
    """Mark diverged runs at the bottom, those of several methods above each other."""
    height: dict[float, int] = {}
    for rate, colour in fallen:
        level = height[rate] = height.get(rate, -1) + 1
        place = axes.get_xaxis_transform()
        axes.plot(
            [rate],
            [0.02 + 0.04 * level],
            "x",
            color=colour,
            transform=place,
            clip_on=False,
            markeredgewidth=2,
        )
