"""What the folder of one run says: its scores, whether it diverged, and what it spent."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from polyrank.errors import RunError
from polyrank.io import RunFolder
from polyrank.io.files import sha256_file, sha256_json

# A loss that stays so many times above its first value, for so many updates, has diverged.
TIMES, UPDATES = 3.0, 50
# Points of the loss that a line of runs.jsonl keeps.
POINTS = 200
# What the engine says when a loss, or a weight that is to be saved, is not finite.
_NOT_FINITE = re.compile(r"^loss: got (nan|inf|-inf) |no longer finite")
# Loss by update within a phase, for each task and phase.
Curves = dict[tuple[str, str], dict[int, float]]


def facts(folder: RunFolder, score: str, view: str, worst: float) -> dict[str, Any]:
    """Return the end of a run's line in runs.jsonl.

    Args:
        folder: of a finished run.
        score: metric that counts.
        view: "unrestricted" or "restricted".
        worst: score of a run that diverged.

    Raises:
        RunError: if the run has no such score on validation or test.
    """
    system = next(s for s in folder.results()["systems"] if s["role"] == "method")
    curves, totals = _curves(folder.events(), system["label"])
    why = next((reason for curve in curves.values() if (reason := diverged(curve))), None)
    return {
        **_outcome(why, system, score, view, worst),
        "seconds": system["seconds"],
        "parameters": system["trainable"],
        "extra_samples": system.get("extra_samples"),
        "updates": sum(totals.values()),
        **_shared(folder),
        **_losses(curves, totals),
    }


def fallen(folder: RunFolder, error: RunError, worst: float) -> dict[str, Any] | None:
    """Return the end of the line of a run that stopped since it diverged, None if it did not."""
    if not _NOT_FINITE.search(str(error)):
        return None
    # Without references the method is the last one to train; before it there may be the base.
    label = [e["system"] for e in folder.events() if e["event"] == "phase"][-1]
    curves, totals = _curves(folder.events(), label)
    return {
        "state": "diverged",
        "validation": worst,
        "test": worst,
        "why": str(error).partition(";")[0],
        **_shared(folder),
        **_losses(curves, totals),
    }


def diverged(curve: Mapping[int, float]) -> str | None:
    """Say why a phase has diverged: its loss stayed above 3 times its first value for 50 updates.

    Args:
        curve: mean loss since the entry before, by update.

    Returns:
        The reason, None if it has not.
    """
    first = next(iter(curve.values()), math.nan)
    above = before = 0
    for update, loss in curve.items():
        above = above + update - before if loss > TIMES * first else 0
        before = update
        if above >= UPDATES:
            return (
                f"the loss was above {TIMES:g} times its first value ({first:.4g}) for {above} "
                f"updates until update {update}"
            )
    return None


def _outcome(
    why: str | None, system: Mapping[str, Any], score: str, view: str, worst: float
) -> dict[str, Any]:
    if why is not None:
        return {"state": "diverged", "validation": worst, "test": worst, "why": why}
    parts = (("validation", system.get("validation") or {}), ("test", system))
    found = {name: part.get("metrics", {}).get(view, {}).get(score) for name, part in parts}
    missing = [name for name, value in found.items() if value is None or not math.isfinite(value)]
    if missing:
        raise RunError(
            f"run: has no {view} {score} on {' and '.join(missing)}, by which rates are compared; "
            "choose another score or view, or a stream with validation rows"
        )
    return {"state": "ok", **found}


def _shared(folder: RunFolder) -> dict[str, Any]:
    """Return what is to be the same for all methods at one seed, and where the run was made."""
    run = folder.run
    train = {key: value for key, value in run["train"].items() if key != "lr"}
    return {
        "order": sha256_json([run["stream"]["hash"], run["seed"], train])[:16],
        "base": _base(folder.path / "base", run["model"]),
        "versions": run["versions"],
        "commit": run["commit"],
    }


def _base(folder: Path, about: Mapping[str, Any]) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        # A base that is read from elsewhere is not copied; run.json has its fingerprint.
        known = {key: value for key, value in about.items() if key != "source"}
        return sha256_json(known)[:16]
    return sha256_json([sha256_file(path) for path in files])[:16]


def _curves(
    events: Iterable[Mapping[str, Any]], label: str
) -> tuple[Curves, dict[tuple[str, str], int]]:
    """Return the losses, and by phase the number of updates that a system was to make."""
    curves: Curves = {}
    totals: dict[tuple[str, str], int] = {}
    place = ("", "")
    for event in events:
        if event.get("system") != label:
            continue
        if event["event"] == "phase":
            # A phase that was resumed is announced again.
            place = (event["task"], event["phase"])
            totals[place] = event["total"]
        elif event["event"] == "train":
            loss = math.inf if event["loss"] is None else float(event["loss"])
            curves.setdefault(place, {})[event["step"]] = loss
    ordered = {key: dict(sorted(curve.items())) for key, curve in curves.items()}
    return ordered, totals


def _losses(curves: Curves, totals: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    """Return losses, and after which of all updates each was noted."""
    found: list[tuple[int, float]] = []
    before = 0
    for place, total in totals.items():
        found += [(before + at, loss) for at, loss in curves.get(place, {}).items()]
        before += total
    some = found[:: max(1, math.ceil(len(found) / POINTS))]
    return {
        "loss": [float(f"{loss:.6g}") for _, loss in some],
        "loss_at": [at for at, _ in some],
    }
