"""Adapters on disk in PEFT's layout: read and written whole, safetensors and JSON only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from polyrank.errors import CheckpointError, ConfigError, RunError, nearest
from polyrank.frame import Saved
from polyrank.io.files import read_json, write_bytes, write_json
from polyrank.layers import saved_of
from polyrank.layers.card import card, loading
from polyrank.parts.transforms import plain_lora

CONFIG, TENSORS, PLAN = "adapter_config.json", "adapter_model.safetensors", "polyrank_plan.json"
CARD = "README.md"
_OURS = frozenset({CONFIG, TENSORS, PLAN, CARD})


def _same(saved: Saved) -> Saved:
    return saved


FORMATS: dict[str, Callable[[Saved], Saved]] = {"peft-lora": plain_lora, "polyrank": _same}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "peft-lora",
    adapter: str | None = None,
) -> Path:
    """Write an adapter of a model for use elsewhere; the model stays as it is.

    "peft-lora" is an ordinary LoRA that computes the same and loads in PEFT without polyrank;
    a growing head becomes a module that is saved whole, so that the base which it loads onto needs
    a classifier of that many classes. "polyrank" is what `save_pretrained` writes.

    Args:
        model: a PEFT model with a polyrank adapter.
        path: folder to write; an adapter that is there is replaced.
        format: "peft-lora" or "polyrank".
        adapter: its name; None is the active one.

    Raises:
        ConfigError: for another format, or a head that is more than a linear layer.
        MergeError: if no LoRA equals the adapter; nothing is written then.
        RunError: if the folder holds something else, or cannot be written.
    """
    return write_saved(converted(saved_of(model, adapter), format), path)


def converted(saved: Saved, format: str) -> Saved:
    """Return an adapter in another format.

    Raises:
        ConfigError: if the format is unknown.
        MergeError: if the format cannot hold it.
    """
    if format not in FORMATS:
        raise ConfigError(
            f"format: got {format!r}, expected one of {', '.join(FORMATS)};"
            f"{nearest(format, FORMATS) or ' peft-lora loads anywhere'}"
        )
    return FORMATS[format](saved)


def read_saved(folder: str | os.PathLike[str]) -> Saved:
    """Read an adapter that PEFT or `write_saved` wrote.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    folder = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: holds no {name}, expected the folder of an adapter; check the path, or "
                "save the adapter with safe_serialization=True"
            )
    try:
        # Not mapped into memory: the file may be replaced while its tensors live.
        tensors = load((folder / TENSORS).read_bytes())
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / TENSORS}: is damaged ({error}); save the adapter again"
        ) from error
    plan = read_json(folder / PLAN) if (folder / PLAN).is_file() else {}
    return Saved(tensors=tensors, config=read_json(folder / CONFIG), plan=plan)


def loading_of(saved: Saved, folder: str | os.PathLike[str]) -> list[str]:
    """Return the lines of Python that put an adapter in a folder onto its base."""
    base = saved.config.get("base_model_name_or_path") or "BASE"
    return loading(saved.config, saved.plan, json.dumps(str(base)), json.dumps(str(folder)))


def write_saved(saved: Saved, folder: str | os.PathLike[str]) -> Path:
    """Write an adapter beside `folder` and rename it there; an older adapter gives way.

    Its README.md says what it is and how it is loaded.

    Raises:
        RunError: if the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    _check(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    write_json(aside / CONFIG, saved.config)
    held = {key: tensor.contiguous() for key, tensor in saved.tensors.items()}
    write_bytes(aside / TENSORS, save(held, metadata={"format": "pt"}))
    if saved.plan:
        write_json(aside / PLAN, saved.plan)
    write_bytes(aside / CARD, card(saved.config, saved.plan, folder).encode())
    try:
        if folder.exists():
            folder.replace(old)
        aside.replace(folder)
    except OSError as error:
        raise RunError(
            f"{folder}: could not be written ({error.strerror}); choose a folder that you may "
            "write to"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _check(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file, expected a folder; choose another name")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if foreign := sorted(names - _OURS):
        raise RunError(
            f"{folder}: holds files of something else ({', '.join(foreign[:3])}), expected an "
            "adapter, or a new or empty folder; choose another folder"
        )
