"""A YAML file as it is read, and the faults that are found in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polyrank.errors import StreamError, nearest
from polyrank.streams.schema import Common, written
from polyrank.streams.schema import Path as Key


@dataclass
class Faults:
    """Faults of a file as they are found; what follows from one that is known is kept quiet."""

    file: str
    lines: list[str] = field(default_factory=list)
    keys: set[Key] = field(default_factory=set)
    silent: set[Key] = field(default_factory=set)

    def add(self, key: Key, message: str) -> None:
        """Note a fault of a key, unless it follows from a known one."""
        depth = {"tasks": 2, "pretraining": 1}.get(str(key[0]) if key else "", len(key))
        shared = key[depth:]
        known = {path[:i] for path in (key, shared) for i in range(1, len(path) + 1)}
        if () not in self.silent and not known & self.silent:
            self.note(key, message)

    def note(self, key: Key, message: str) -> None:
        """Note a fault of a key."""
        self.keys.add(key)
        line = ": ".join(part for part in (self.file, written(key), message) if part)
        if line not in self.lines:
            self.lines.append(line)

    def repeat(self, key: Key, error: StreamError) -> None:
        """Note what reading the data of a key found; each line begins with the inner key."""
        self.keys.add(key)
        where = f"{written(key)}." if key else ""
        self.lines += [f"{self.file}: {where}{line}" for line in error.problems]

    def touch(self, key: Key) -> bool:
        """Whether a fault is known of a task, or of what all tasks share."""
        every = self.keys | self.silent
        shared = any(not k or k[0] in ("root", *Common.model_fields) for k in every)
        return shared or any(k[: len(key)] == key for k in every if key)

    def stop(self) -> None:
        """Raise what was noted.

        Raises:
            StreamError: if anything was.
        """
        if self.lines:
            raise StreamError(self.lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which besides refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if isinstance(name, list | dict) or name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {name!r} is given twice or is no word",
                    problem_mark=key.start_mark,
                )
            seen.add(name)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def document(path: Path, what: str = "stream") -> Mapping[str, Any]:
    """The content of a file; `what` it is stands in messages.

    Raises:
        StreamError: if it cannot be read, or is no YAML.
    """
    try:
        # The loader is a safe one.
        found: Mapping[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        there = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
        hint = nearest(path.name, [other.name for other in there]) or " correct the path"
        raise StreamError(f"{what}: the file {str(path)!r} does not exist;{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{what}: cannot read {str(path)!r}: {error}; correct it") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise StreamError(f"{path.name}: {place}no YAML: {problem}; correct it") from error
    return found
