"""Checkpoints of a run: folders of one JSON and one safetensors file, checksummed and renamed.

    checkpoints/00000007/state.json            nested values; tensors stand as {"$tensor": name}
    checkpoints/00000007/tensors.safetensors
    checkpoints/00000007/checksums.json        of the two files

A folder is written aside, flushed and renamed, and the one before stays until it is complete: a
process killed at any instant leaves at least one whole checkpoint.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyrank.errors import CheckpointError, RunError
from polyrank.io.files import read_json, sha256_bytes, sha256_file, write_bytes

if TYPE_CHECKING:
    from torch import Tensor

STATE, TENSORS, SUMS = "state.json", "tensors.safetensors", "checksums.json"
_MARK = "$tensor"
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
        folder: where they lie; made when the first one is written.
        keep: how many stay.

    Attributes:
        damaged: what was found unreadable by `latest`, as sentences.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.damaged: list[str] = []

    def numbers(self) -> list[int]:
        """Numbers of the checkpoints that are there, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write a new checkpoint and drop the oldest ones.

        Args:
            state: nested dicts with string keys, lists, tensors, numbers, strings and None.

        Raises:
            RunError: if the disk refuses; what was there before is untouched.
            CheckpointError: if a value is neither a tensor nor plain.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        text = json.dumps(_packed(state, "", tensors), ensure_ascii=False).encode()
        numbers = self.numbers()
        final = self.folder / f"{(numbers[-1] + 1 if numbers else 1):08d}"
        aside = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            self._clear_aside()
            data = save(tensors)
            write_bytes(aside / TENSORS, data)
            write_bytes(aside / STATE, text)
            sums = {TENSORS: sha256_bytes(data), STATE: sha256_bytes(text)}
            write_bytes(aside / SUMS, json.dumps(sums).encode())
            os.replace(aside, final)
            _sync(self.folder)
        except (OSError, RunError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"checkpoint {final}: could not be written ({reason}); the one before is whole: "
                "free some space and give the same command again"
            ) from error
        for number in numbers[: max(0, len(numbers) + 1 - self.keep)]:
            shutil.rmtree(self.folder / f"{number:08d}", ignore_errors=True)
        return final

    def latest(self) -> dict[str, Any] | None:
        """Read the newest whole checkpoint, None if there is none at all.

        Damaged ones are left out, each with a warning and a sentence in `damaged`.

        Raises:
            CheckpointError: if there are checkpoints and every one is damaged.
        """
        numbers = self.numbers()
        for number in reversed(numbers):
            path = self.folder / f"{number:08d}"
            try:
                return self._read(path)
            except (RunError, CheckpointError, ValueError, KeyError, OSError) as error:
                sentence = f"checkpoint {path.name} is damaged ({error})"
                self.damaged.append(sentence)
                _log.warning("%s; the one before it is used", sentence)
        if numbers:
            raise CheckpointError(
                f"{self.folder}: all checkpoints are damaged: {'; '.join(self.damaged)}; delete "
                "the folder to start anew"
            )
        return None

    def clear(self) -> None:
        """Delete all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        sums = read_json(path / SUMS)
        for name in (STATE, TENSORS):
            if sha256_file(path / name) != sums[name]:
                raise CheckpointError(f"{name} does not have its checksum")
        plain = json.loads((path / STATE).read_text(encoding="utf-8"))
        found: dict[str, Any] = _unpacked(plain, load_file(str(path / TENSORS)))
        return found

    def _clear_aside(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)


def _packed(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value
    if isinstance(value, Mapping):
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise CheckpointError(
                f"state {path or 'root'}: got keys {strange[:3]}, expected strings; "
                "convert them before they are kept"
            )
        return {key: _packed(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if hasattr(value, "detach"):
        # Aliases share storage, which safetensors refuses.
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {_MARK: path}
    raise CheckpointError(
        f"state {path}: got {type(value).__name__}, expected tensors, numbers, strings, lists or "
        "mappings; convert it before it is kept"
    )


def _unpacked(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_MARK}:
            return tensors[value[_MARK]]
        return {key: _unpacked(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    return value


def _sync(folder: Path) -> None:
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
