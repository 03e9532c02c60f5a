"""What the table of a sweep means and what limits it, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from polyrank.engine.sweep.pace import SHARE, WIDTH

if TYPE_CHECKING:
    from polyrank.reports.sweep import Row, Sheet


def notes(sheet: Sheet) -> list[str]:
    """What the table means and what limits it, a sentence or two each."""
    seeds = sorted({seed for row in sheet.rows for seed in row.group.seeds})
    listed = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    found = [
        f"stream {sheet.lock['stream']['name']}; rates selected by the mean validation "
        f"{sheet.score} over {listed}, of tied rates the smaller one; test took no part",
    ]
    if len(seeds) > 1:
        found.append("sd: sample standard deviation over seeds")
    compared = [row.difference for row in sheet.rows if row.difference is not None]
    if compared:
        marked = "; * where |Δ| > 2 SE" if len(seeds) > 1 else "; one seed, so no SE"
        count = f"{len(compared)} comparison{'s' if len(compared) > 1 else ''}"
        found.append(f"Δ: difference on test, paired by seed{marked}; {count}, not corrected for")
    found.append(
        "plateau: largest over smallest rate whose validation is within one point of the best, or "
        "within two standard errors; at edge: the best rate is the smallest or largest one tried"
    )
    found += [*_tried(sheet.rows), *_ties(sheet), *_pace(sheet)]
    if any(row.choice.diverged for row in sheet.rows):
        found.append(f"a diverged run counts as {sheet.lock['worst']:g}, the worst value")
    if any(row.choice.missing or row.choice.best is None for row in sheet.rows):
        found.append("the sweep is not finished: the same call makes the runs that are missing")
    fixed = {row.group.label: row.group.fixed for row in sheet.rows if row.group.fixed}
    found += [f"{label} has one rate, because: {reason}" for label, reason in fixed.items()]
    found += sorted({_probed(row) for row in sheet.rows if row.probe is not None})
    if sheet.unused:
        are = "line of runs.jsonl is" if sheet.unused == 1 else "lines of runs.jsonl are"
        found.append(
            f"{sheet.unused} {are} of other settings or another version of the code and not used"
        )
    return found


def _probed(row: Row) -> str:
    assert row.probe is not None
    short, whole = (g.config["train"]["epochs"] for g in (row.probe[0], row.group))
    return (
        f"probed: the whole grid with {short} of {whole} epochs, then the best {row.group.points} "
        "rates in full"
    )


def _tried(rows: Sequence[Row]) -> list[str]:
    """Say which rates were run in full."""
    found: dict[str, list[str]] = {}
    for row in rows:
        tried = [
            f"{row.group.grid.rate(level.index):.2e}" for level in row.choice.levels if level.whole
        ]
        if tried:
            found.setdefault(", ".join(tried), []).append(row.group.name)
    return [f"rates of {', '.join(names)}: {tried}" for tried, names in found.items()]


def _ties(sheet: Sheet) -> list[str]:
    """Name those whose range of scores over seeds overlaps that of the baseline."""
    tied = []
    for row in sheet.rows:
        same = (other for other in sheet.rows if other.group.axes == row.group.axes)
        base = next((other for other in same if other.group.label == sheet.baseline), None)
        if base in (None, row) or len(row.choice.test) < 2 or not base.choice.test:
            continue
        own, other = row.choice.test, base.choice.test
        if min(own) <= max(other) and min(other) <= max(own):
            tied.append(row.group.name)
    if not tied:
        return []
    names = ", ".join(tied)
    return [f"tied with {sheet.baseline}, since their tests' ranges over seeds overlap: {names}"]


def _pace(sheet: Sheet) -> list[str]:
    levels = {row.level: row.group.axes for row in sheet.rows if row.level is not None}
    if not levels:
        return []
    shown = ", ".join(
        " ".join([f"{level:.3g}", *(f"for {key}={value}" for key, value in axes.items())])
        for level, axes in levels.items()
    )
    return [
        "updates to loss: mean ± sd, at each one's best rate, of how many updates pass until the "
        f"training loss is what {sheet.baseline} has after {SHARE:.0%} of its updates ({shown}); "
        f"losses are means of {WIDTH} entries of the log, and counts are as coarse as it is"
    ]
