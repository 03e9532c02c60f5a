"""matrix.csv: one line per system, kind of prediction, trained task and tested task."""

import csv
import io
import math

from polyrank.reports.view import View

COLUMNS = (
    "system",
    "role",
    "prediction",
    "after",
    "after_index",
    "on",
    "on_index",
    "accuracy",
    "n",
)


def render(view: View) -> str:
    """The matrices in long form; `accuracy` is empty where nothing was measured."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(COLUMNS)
    for system in view.systems:
        for kind in ("unrestricted", "restricted"):
            for i, row in enumerate(getattr(system, kind).tolist()):
                for j, value in enumerate(row):
                    accuracy = "" if math.isnan(value) else repr(value)
                    place = (view.tasks[i], i, view.tasks[j], j)
                    writer.writerow(
                        (system.name, system.role, kind, *place, accuracy, view.counts[j])
                    )
    return sink.getvalue()
