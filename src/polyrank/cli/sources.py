"""Where the adapter lies that a command is to read: in a folder of its own, or in a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polyrank.errors import CheckpointError, ConfigError, RunError, nearest


def adapter_in(source: Path, system: str | None) -> Path:
    """Return the folder of an adapter, looked up in results.json if a run was given.

    Raises:
        CheckpointError: if the folder is neither.
        ConfigError: if the run holds no adapter of that name, and where it is instead.
        RunError: if what the run saved is gone.
    """
    if (source / "adapter_config.json").is_file():
        if system is not None:
            raise ConfigError(f"system: {source} is an adapter, not a run; leave --system out")
        return source
    if not (source / "run.json").is_file():
        raise CheckpointError(
            f"{source}: holds neither run.json nor adapter_config.json, expected a run or an "
            "adapter; check the path"
        )
    from polyrank.io import RunFolder

    systems = RunFolder.open(source).results()["systems"]
    held = {entry["name"]: entry["adapter"] for entry in systems if entry["adapter"]}
    name = system or next((s["name"] for s in systems if s["role"] == "method"), "")
    name = next((s["name"] for s in systems if s["label"] == name), name)
    if name not in held:
        raise ConfigError(_unheld(source, name, systems, held))
    folder = source / str(held[name])
    if not folder.is_dir():
        raise RunError(f"{folder}: is missing, expected what the run saved; repeat the run")
    return folder


def _unheld(source: Path, name: str, systems: Sequence[Any], held: Iterable[str]) -> str:
    """Return why a run holds no adapter under a name."""
    known = f"system: got {name!r}, expected one of {', '.join(held)};"
    # "sora@stage-0", and "sora (stage-0)" as it is mostly called.
    own, _, part = name.replace(" (", "@", 1).rstrip(")").partition("@")
    found = next((s for s in systems if s["name"] in (name, f"{own}@{part}")), None)
    if found is None:
        return known + (nearest(name, held) or " choose one")
    if not found.get("deploy"):
        return f"{known} {name} trains no adapter"
    owner = next(s for s in systems if s["name"] == found["name"].partition("@")[0])
    if (path := (owner.get("exports") or {}).get(found["deploy"])) is not None:
        return f"{known} that one was exported by the run: {source / path}"
    return (
        f"{known} {found['deploy']} is no adapter of its own, but was evaluated out of "
        f"{owner['name']}, whose adapter holds it"
    )
