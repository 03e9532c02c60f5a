"""Where a run lies: a new folder, or that of the same run, stopped or finished."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.errors import RunError
from polyrank.io import environment
from polyrank.io.runs import RunFolder

if TYPE_CHECKING:
    from polyrank.engine.plan import Plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Places:
    """What decides how a run is kept, and not what comes out of it.

    Attributes:
        save_every: updates between two checkpoints; None goes by the clock.
        prefix_cache: whether outputs of frozen layers may be kept.
        overwrite: whether an old run gives way.
    """

    save_every: int | None = None
    prefix_cache: bool = True
    overwrite: bool = False


def place_of(
    plan: Plan,
    out: str | Path | None,
    identity: dict[str, Any],
    command: Sequence[str] | None,
    overwrite: bool,
) -> tuple[RunFolder, str]:
    """Return (the folder, "new", "again" for a stopped run or "done" for a finished one).

    Raises:
        RunError: if the folder holds another run; it says what differs.
    """
    path = _free(f"{plan.stream.name}-{plan.method.name}", identity) if out is None else Path(out)
    if not overwrite and (path / "run.json").is_file():
        old = RunFolder.open(path)
        if changed := old.differences(identity):
            listed = "; ".join(changed[:5]) + ("; …" if len(changed) > 5 else "")
            raise RunError(
                f"{path}: holds another run ({listed}); choose another folder, or give what that "
                "run was started with"
            )
        if old.run["status"] == "done":
            return old, "done"
        old.resume()
        _tell_versions(old)
        return old, "again"
    return RunFolder.create(path, identity, command=command, overwrite=overwrite), "new"


def _tell_versions(folder: RunFolder) -> None:
    now, then = environment.versions(), folder.run["versions"]
    differ = [f"{k}: {then.get(k)} then, {v} now" for k, v in now.items() if then.get(k) != v]
    if differ:
        _log.warning("versions have changed (%s); the bits may differ", "; ".join(differ))
        folder.event("versions", differ=differ)


def _free(name: str, identity: dict[str, Any]) -> Path:
    """Return the folder of an unfinished run of this configuration, or the first free one."""
    root = Path("runs")
    number = 1
    while (path := root / (name if number == 1 else f"{name}-{number}")).exists():
        if (path / "run.json").is_file():
            old = RunFolder.open(path)
            unfinished = old.run["status"] != "done" and not old.taken()
            if unfinished and not old.differences(identity):
                return path
        number += 1
    return path
