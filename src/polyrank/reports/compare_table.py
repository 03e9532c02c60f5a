"""compare.md and compare.csv: one line a system, means and deviations over seeds, differences."""

import csv
import io
import math
from collections.abc import Sequence

from polyrank import metrics
from polyrank.metrics.statistics import (
    MARK,
    Difference,
    mean,
    paired_difference,
    sample_deviation,
)
from polyrank.reports.compare_view import COSTS, GENERAL, SCORES, Compared, Comparison

_HEADS = {
    "average_accuracy": "average {word}",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "average_incremental_accuracy": "incremental",
    GENERAL: "general change",
    "trainable": "weights",
    "seconds": "seconds",
    "extra_samples": "extra",
}
_DIGITS = {"trainable": 0, "seconds": 1, "extra_samples": 2}
_MISSING = "-"


def markdown(found: Comparison) -> str:
    """The tables as aligned markdown, readable as it is, with what the numbers mean."""
    seeds = ", ".join(map(str, found.seeds))
    single = len(found.seeds) == 1
    spread = "One seed, no deviation" if single else "Mean ± sample standard deviation over seeds"
    parts = [
        f"# Comparison on {found.stream}",
        f"{found.scenario}, {len(found.tasks)} tasks, after the last; seed{'s' * (not single)} "
        f"{seeds}.\nScores are of {_headline(found)}.\n{spread}.",
        _grid(*_values(found)),
        *([] if found.baseline is None else _differences(found, found.baseline)),
        *([] if not found.notes else ["## Notes", "\n".join(f"- {n}" for n in found.notes)]),
        "## What the columns mean",
        "\n".join(_meanings(found)),
        f"Runs: {', '.join(found.runs)}.",
    ]
    return "\n\n".join(parts) + "\n"


def sheet(found: Comparison) -> str:
    """The same as one table with all digits; empty where there is no value."""
    shown = columns(found)
    scores = [name for name in shown if name not in COSTS]
    head = ["system", "role", "prediction", "seeds", "baseline"]
    for name in shown:
        head += [name, f"{name}_sd"]
        if name in scores:
            head += [f"{name}_{part}" for part in ("difference", "error", "pairs", "marked")]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(head)
    baseline = found.baseline
    for system in found.systems:
        seeds = " ".join(map(str, sorted(system.seeds)))
        row = [system.label, system.role, found.headline, seeds, baseline.label if baseline else ""]
        for name in shown:
            values = list(system.by_seed(name).values())
            row += [_exact(mean(values)), _exact(sample_deviation(values))]
            if name in scores:
                row += _exact_difference(system, baseline, name)
        writer.writerow(row)
    return sink.getvalue()


def columns(found: Comparison) -> list[str]:
    """The figures that are shown: those of optional content only if a system has it."""
    optional = {GENERAL, "extra_samples"}
    return [
        name
        for name in _HEADS
        if name not in optional
        or any(not math.isnan(x) for s in found.systems for x in s.by_seed(name).values())
    ]


def difference(system: Compared, baseline: Compared, name: str) -> Difference:
    """A system's difference to the baseline in one figure, paired by seed."""
    return paired_difference(system.by_seed(name), baseline.by_seed(name))


def _headline(found: Comparison) -> str:
    if found.headline == "restricted":
        return "restricted predictions: the classes of the tested task compete"
    return "unrestricted predictions: all classes seen so far compete"


def _values(found: Comparison) -> tuple[list[str], list[list[str]]]:
    shown = columns(found)
    head = ["system", "seeds", *(_HEADS[name].format(word=found.word) for name in shown)]
    rows = [
        [system.label, str(len(system.seeds)), *(_cell(system, name) for name in shown)]
        for system in found.systems
    ]
    return head, rows


def _cell(system: Compared, name: str) -> str:
    values = [x for x in system.by_seed(name).values() if not math.isnan(x)]
    if not values:
        return _MISSING
    digits = _DIGITS.get(name, 3)
    text = _fixed(mean(values), digits)
    deviation = sample_deviation(values)
    # A number of weights that all seeds share needs no deviation.
    if not math.isnan(deviation) and not (name in COSTS and deviation == 0):
        text += f" ± {_fixed(deviation, digits)}"
    unknown = len(system.seeds) - len(values)
    return f"{text} ({len(values)} of {len(system.seeds)})" if unknown else text


def _differences(found: Comparison, baseline: Compared) -> list[str]:
    names = [name for name in columns(found) if name not in COSTS]
    rows, compared, marked = [], 0, 0
    for system in found.systems:
        if system is baseline:
            continue
        gaps = [difference(system, baseline, name) for name in names]
        compared += sum(gap.count > 1 for gap in gaps)
        marked += sum(gap.marked for gap in gaps)
        pairs = max(gap.count for gap in gaps)
        rows.append([system.label, str(pairs), *(_gap(gap, pairs) for gap in gaps)])
    if not rows:
        return []
    head = ["system", "pairs", *(f"Δ {_HEADS[name].format(word=found.word)}" for name in names)]
    text = (
        f"Paired by seed: mean difference ± its standard error (SE).\n{compared} comparisons, "
        f"{marked} marked: * is |Δ| > {MARK:g} SE.\nThe more comparisons and the fewer pairs, the "
        "more marks come by chance."
        if compared
        else "Mean difference; fewer than two seeds in common, so no standard error and no mark."
    )
    return [f"## Difference to {baseline.label}", text, _grid(head, rows)]


def _gap(gap: Difference, pairs: int) -> str:
    if not gap.count:
        return _MISSING
    text = _fixed(gap.mean, 3, sign=True)
    if gap.count > 1:
        text += f" ± {_fixed(gap.error, 3)}"
    if gap.count < pairs:
        text += f" ({gap.count} pairs)"
    return f"{text} *" if gap.marked else text


def _meanings(found: Comparison) -> list[str]:
    formulas = metrics.definitions()
    lines = [f"- {_HEADS[name].format(word=found.word)}: {formulas[name]}" for name in SCORES]
    if found.word == "score":
        lines.append(f"- a: {', '.join(found.scored)}, of each of which more is better")
    told = {
        GENERAL: "score on what no task trains, after the last task minus before the first",
        "trainable": "weights that are trained",
        "seconds": "training and evaluation",
        "extra_samples": "replayed rows per update, mean",
    }
    shown = columns(found)
    return lines + [f"- {_HEADS[name]}: {text}" for name, text in told.items() if name in shown]


def _exact_difference(system: Compared, baseline: Compared | None, name: str) -> list[str]:
    if baseline is None or system is baseline:
        return [""] * 4
    gap = difference(system, baseline, name)
    marked = str(gap.marked).lower() if gap.count > 1 else ""
    return [_exact(gap.mean), _exact(gap.error), str(gap.count), marked]


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _fixed(value: float, digits: int, sign: bool = False) -> str:
    # Rounding first, so that no "-0.000" is printed.
    value = round(value, digits) + 0.0
    return f"{value:{'+' if sign else ''},.{digits}f}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded; numbers stand at the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    texts = [
        "| " + " | ".join(_aligned(cell, widths[i], i) for i, cell in enumerate(line)) + " |"
        for line in lines
    ]
    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([texts[0], "| " + " | ".join(rule) + " |", *texts[1:]])


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
