"""compare.png: how systems get on from task to task, and where they end."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from polyrank.metrics.statistics import mean, sample_deviation
from polyrank.reports import words
from polyrank.reports.compare_view import Compared, Comparison
from polyrank.reports.picture import INK, PAPER, SOFT, typeface

# The colours of Okabe and Ito, told apart by colour-blind eyes; without yellow, faint on white.
_METHODS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_REFERENCES = ("#454f55", "#7f8a91", "#a9b2b7")
_DASHES = ((4, 2), (1, 1.5), (5, 1.5, 1, 1.5))
# As many as have no common factor with the colours, so that pairs repeat late.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FAINT = "#e3e7e8"
_LABEL = 30
# Inches: the curve, a panel of points, one of its rows, and what lies around and between them.
_CURVE, _PANEL, _ROW = 4.6, 1.75, 0.33
_LEFT, _TOP, _BELOW, _GAP, _VALUE = 0.75, 1.2, 0.75, 0.3, 0.55
_PANELS = (("average_accuracy", "average {word}"), ("forgetting", "forgetting (less is better)"))


@dataclass(frozen=True)
class Style:
    """How one system is drawn everywhere."""

    colour: str
    marker: str
    dashes: tuple[float, ...] | None


def draw(found: Comparison, dpi: int = 200) -> bytes:
    """A PNG on white: curves over tasks at the left, the last figures at the right."""
    styles = _styles(found.systems)
    ranked = sorted(found.systems, key=_rank)
    inner = max(2.7, _ROW * len(ranked))
    labels = 0.076 * max(len(words.clipped(s.label, _LABEL)) for s in ranked) + 0.55
    first = _LEFT + _CURVE + labels
    width = first + 2 * (_PANEL + _VALUE) + _GAP + 0.15
    height = _TOP + inner + _BELOW
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=PAPER)
    FigureCanvasAgg(figure)
    family = typeface()
    _headline(figure, found, family)
    bottom, tall = _BELOW / height, inner / height
    axes = figure.add_axes((_LEFT / width, bottom, _CURVE / width, tall))
    _curves(axes, found, styles, family)
    for number, (name, title) in enumerate(_PANELS):
        left = first + number * (_PANEL + _VALUE + _GAP)
        axes = figure.add_axes((left / width, bottom, _PANEL / width, tall))
        _points(axes, name, ranked, styles, family)
        _title(axes, title.format(word=found.word), family)
        if number == 0:
            _names(axes, ranked, styles, family)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _styles(systems: Sequence[Compared]) -> dict[str, Style]:
    found = {}
    numbers = {"method": 0, "reference": 0}
    for place, system in enumerate(systems):
        n = numbers[system.role]
        numbers[system.role] += 1
        method = system.role == "method"
        colours = _METHODS if method else _REFERENCES
        dashes = None if method else _DASHES[n % len(_DASHES)]
        marker = _MARKERS[(n if method else place) % len(_MARKERS)]
        found[system.label] = Style(colours[n % len(colours)], marker, dashes)
    return found


def _rank(system: Compared) -> float:
    value = mean(list(system.by_seed("average_accuracy").values()))
    return math.inf if math.isnan(value) else -value


def _headline(figure: Figure, found: Comparison, family: str) -> None:
    width, height = figure.get_size_inches()
    left = 0.28 / width
    place: dict[str, Any] = {"family": family, "va": "top"}
    title = f"{found.word.capitalize()} from task to task, and after the last"
    figure.text(left, 1 - 0.26 / height, title, size=15, weight="bold", color=INK, **place)
    compete = "all classes seen" if found.headline == "unrestricted" else "the task's classes"
    seeds = ", ".join(map(str, found.seeds))
    spread = "; bands and bars: ± one standard deviation" if len(found.seeds) > 1 else ""
    below = (
        f"{found.stream}, {found.scenario}: {compete} compete; "
        f"seed{'s' * (len(found.seeds) > 1)} {seeds}{spread}"
    )
    figure.text(left, 1 - 0.6 / height, below, size=9.5, color=SOFT, **place)


def _curves(axes: Axes, found: Comparison, styles: dict[str, Style], family: str) -> None:
    size = len(found.tasks)
    # On a long stream a sign now and then, at another place for each.
    step = max(1, size // 5) if size > 12 else 1
    # Methods last, so that they lie above the references.
    for order, system in enumerate(reversed(found.systems)):
        style, curves = styles[system.label], [f.curve for f in system.seeds.values()]
        points = [[curve[i] for curve in curves] for i in range(size)]
        middle, spread = [mean(p) for p in points], [sample_deviation(p) for p in points]
        known = [i for i in range(size) if not math.isnan(middle[i])]
        line: dict[str, Any] = {"color": style.colour, "zorder": 3 + order}
        axes.plot(
            known,
            [middle[i] for i in known],
            marker=style.marker,
            markevery=(order % step if len(known) > step else 0, step),
            markersize=6,
            markeredgecolor=PAPER,
            markeredgewidth=0.7,
            linewidth=1.9,
            dashes=style.dashes or (None, None),
            clip_on=False,
            **line,
        )
        wide = [i for i in known if not math.isnan(spread[i])]
        low, high = ([middle[i] + s * spread[i] for i in wide] for s in (-1, 1))
        if len(wide) > 1:
            axes.fill_between(wide, low, high, color=style.colour, alpha=0.16, linewidth=0)
        elif wide:
            axes.vlines(wide, low, high, linewidth=1.9, **line)
    _frame(axes, family)
    if found.word == "accuracy":
        axes.set_ylim(0, 1)
    axes.set_xlim(-0.15, size - 1 + 0.15)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    names = [words.clipped(task, 9) for task in found.tasks]
    letters = max(map(len, names)) * 0.075 + 0.12
    every = max(1, math.ceil(size * letters / _CURVE))
    axes.set_xticks(range(0, size, every), names[::every], family=family, size=9, color=SOFT)
    axes.set_xlabel("after task", family=family, size=9, color=SOFT)
    _title(axes, f"average {found.word} over the tasks seen", family)


def _points(
    axes: Axes, name: str, ranked: Sequence[Compared], styles: dict[str, Style], family: str
) -> None:
    for row, system in enumerate(ranked):
        axes.axhline(row, color=_FAINT, linewidth=0.8, zorder=1)
        style = styles[system.label]
        values = [x for x in system.by_seed(name).values() if not math.isnan(x)]
        middle, spread = mean(values), sample_deviation(values)
        axes.text(
            1.06,
            row,
            words.fraction(middle),
            transform=axes.get_yaxis_transform(),
            family=family,
            size=10,
            weight="bold" if system.role == "method" else "normal",
            color=INK,
            va="center",
        )
        if not values:
            continue
        if len(values) > 1:
            ends = (middle - spread, middle + spread)
            axes.hlines(row, *ends, color=style.colour, linewidth=2.2, zorder=2)
            around = [row] * len(values)
            axes.scatter(values, around, s=9, color=style.colour, alpha=0.45, lw=0, zorder=3)
        point: dict[str, Any] = {
            "s": 46,
            "color": style.colour,
            "edgecolor": PAPER,
            "linewidth": 0.7,
        }
        axes.scatter([middle], [row], marker=style.marker, zorder=4, clip_on=False, **point)
    axes.set_ylim(len(ranked) - 0.5, -0.5)
    axes.set_yticks([])
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=4)
    if all(math.isnan(x) for system in ranked for x in system.by_seed(name).values()):
        axes.set_xticks([])
    _frame(axes, family)
    axes.spines["left"].set_visible(False)


def _names(axes: Axes, ranked: Sequence[Compared], styles: dict[str, Style], family: str) -> None:
    """The rows' labels, each behind its sign; they are the legend of the whole picture."""
    letter = 1 / _PANEL
    for row, system in enumerate(ranked):
        style = styles[system.label]
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        sign: dict[str, Any] = {
            "marker": style.marker,
            "s": 40,
            "color": style.colour,
            "linewidth": 0,
        }
        axes.scatter([-0.1 * letter], [row], **sign, **place)
        axes.text(
            -0.22 * letter,
            row,
            words.clipped(system.label, _LABEL),
            family=family,
            size=10,
            weight="bold" if system.role == "method" else "normal",
            color=INK,
            ha="right",
            va="center",
            **place,
        )


def _title(axes: Axes, text: str, family: str) -> None:
    axes.set_title(text, loc="left", family=family, size=10.5, color=INK, pad=9)


def _frame(axes: Axes, family: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b4bcc0")
    axes.tick_params(length=0, pad=5, labelsize=9, labelcolor=SOFT, labelfontfamily=family)
