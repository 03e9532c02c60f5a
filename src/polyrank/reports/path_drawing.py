"""The path between two states of an adapter: the score of every task on the way."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from polyrank.io.files import write_bytes
from polyrank.reports.picture import INK, PAPER, SOFT

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def path_picture(
    found: Mapping[str, Any],
    path: str | os.PathLike[str],
    ends: tuple[str, str] = ("first", "second"),
) -> Path:
    """Draw what `polyrank.engine.connectivity` returned, as a PNG.

    Args:
        found: positions, scores and barriers by task.
        path: the file.
        ends: names of the two states.
    """
    figure = Figure(figsize=(6.4, 3.8), dpi=160, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, scores) in enumerate(found["scores"].items()):
        axes.plot(
            found["position"],
            scores,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            label=f"{name} (barrier {found['barrier'][name]:.2f})",
        )
    axes.set_xticks([0, 0.5, 1], [ends[0], "half-way", ends[1]])
    axes.set_ylabel("score, all classes compete", color=INK)
    axes.set_title("Between two states of one adapter", loc="left", color=INK)
    axes.tick_params(colors=SOFT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return write_bytes(path, sink.getvalue())
