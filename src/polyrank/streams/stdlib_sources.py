"""Python's own standard library as text: its files, what is read of them, who gets which file."""

import ast
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

from polyrank.errors import StreamError

# Share of the rows that each role aims at; files are whole, so that it is met roughly.
SHARES: Mapping[str, float] = {"train": 0.6, "validation": 0.15, "test": 0.25}
_TESTS = frozenset({"test", "tests", "__pycache__"})


class Excerpt(NamedTuple):
    """A piece of one file: its path below the library's folder, its first line, the text."""

    file: str
    line: int
    text: str


def folder() -> Path:
    """The folder that holds the standard library's sources."""
    return Path(sysconfig.get_path("stdlib"))


def version() -> str:
    """What the text depends on: the interpreter and its version, such as "CPython 3.12.1"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def sources(names: Iterable[str]) -> dict[str, tuple[Path, ...]]:
    """The files of modules and packages by name, sorted by path, without their tests.

    Raises:
        StreamError: naming all that are not there as files.
    """
    root = folder()
    found = {name: tuple(_files(root, name)) for name in names}
    if missing := [name for name, files in found.items() if not files]:
        raise StreamError(
            f"standard library: got no source files of {', '.join(missing)} in {root}, expected "
            "those of CPython; use a Python that is installed as files, neither embedded, frozen "
            "nor a zip"
        )
    return found


def documented(path: Path, width: int) -> tuple[Excerpt, ...]:
    """Functions and classes that have a docstring, in the order of the file.

    The text is the source with the docstring, unindented. It ends where the next documented
    function or class begins, so that no line stands in two texts, and after `width` characters.
    """
    return tuple(e._replace(text=e.text[:width].rstrip()) for e in _documented(folder(), path))


def passages(path: Path, width: int) -> tuple[Excerpt, ...]:
    """A whole file as texts of whole lines, each at most `width` characters, as they come.

    A longer line is a text of its own, cut after `width` characters; blank texts are left out.
    """
    return _passages(folder(), path, width)


def divided(counts: Sequence[int], shares: Mapping[str, float] = SHARES) -> list[str]:
    """The role of each file, so that no file serves two.

    The largest file goes first, each to the role that lacks most rows of its share.

    Args:
        counts: Rows of each file.
        shares: Share of the rows by role, 1 together.
    """
    lacking = {role: share * sum(counts) for role, share in shares.items()}
    roles = [""] * len(counts)
    for index in sorted(range(len(counts)), key=lambda i: (-counts[i], i)):
        # Ties fall to the role that is named first.
        roles[index] = max(lacking, key=lambda role: lacking[role])
        lacking[roles[index]] -= counts[index]
    return roles


def spread(rows: Sequence[Excerpt], most: int) -> list[Excerpt]:
    """At most so many rows, evenly over all of them, in their order."""
    count = min(len(rows), most)
    return [rows[i * len(rows) // count] for i in range(count)]


def _files(root: Path, name: str) -> Iterator[Path]:
    at = root / name
    if at.is_dir():
        # By parts, since on Windows paths sort without regard to case.
        found = [(path.relative_to(root).parts, path) for path in at.rglob("*.py")]
        yield from (path for parts, path in sorted(found) if not _TESTS & set(parts))
    elif at.with_suffix(".py").is_file():
        yield at.with_suffix(".py")


@cache
def _documented(root: Path, path: Path) -> tuple[Excerpt, ...]:
    lines = _lines(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    spans = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False):
            first = min(n.lineno for n in (node, *node.decorator_list))
            spans.append((first, node.end_lineno or first))
    spans.sort()
    found = []
    for (first, last), following in zip(spans, [*spans[1:], (len(lines) + 1, 0)], strict=False):
        text = "\n".join(lines[first - 1 : min(last, following[0] - 1)])
        found.append(Excerpt(_name(root, path), first, dedent(text).strip()))
    return tuple(found)


@cache
def _passages(root: Path, path: Path, width: int) -> tuple[Excerpt, ...]:
    found, first, size = [], 0, 0
    lines, name = _lines(path), _name(root, path)
    for number, line in enumerate([*lines, None]):
        if line is None or (size and size + len(line) + 1 > width):
            text = "\n".join(lines[first:number])[:width]
            if text.strip():
                found.append(Excerpt(name, first + 1, text))
            first, size = number, 0
        size += 0 if line is None else len(line) + 1
    return tuple(found)


def _lines(path: Path) -> list[str]:
    # Reads the encoding that the file declares, and every line end as one.
    with tokenize.open(path) as file:
        return file.read().split("\n")


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()
