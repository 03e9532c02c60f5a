"""A stream of real text that installs with Python: whose source is this function?

Ten packages of the standard library are the classes, two in each of five tasks. A text is the
source of one function or class that has a docstring, with that docstring, up to where the next
documented one begins: no line stands in two texts. A package's files are shared out to training,
validation and tests, so that none serves two; the packages differ in size (a class has 34 to 160
training texts on CPython 3.10 to 3.13). Nothing is taken out of a text: its package's name stands
as a word in one of twelve, nearly half of them in `logging`, where it is plain English, and one in
160 imports it.

The text depends on the Python version, which the stream records, and the hash covers every row.
Files, lines and shares do not depend on the platform or on where Python is installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polyrank.errors import StreamError
from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Rows
from polyrank.streams.split import checked_seed, class_order, share_out
from polyrank.streams.stdlib_sources import Excerpt, divided, documented, sources, spread, version

PACKAGES = (
    "asyncio",
    "xml",
    "email",
    "unittest",
    "importlib",
    "multiprocessing",
    "http",
    "urllib",
    "logging",
    "wsgiref",
)
# What general ability is measured on: modules of one file each, all of them in no package above.
GENERAL = ("_pydecimal", "inspect", "ipaddress", "tarfile")
# Rows of a class by role: at most these, evenly over its files, so that a run takes minutes.
MOST: Mapping[str, int] = {"train": 160, "validation": 40, "test": 80}
LEAST: Mapping[str, int] = {"train": 24, "validation": 6, "test": 12}
_GENERAL_MOST = 90
# Twice what 64 tokens of a sentence encoder hold.
_WIDTH = 512
_KIND = "sequence-classification"


def stdlib(
    seed: int = 0,
    *,
    tasks: int = 5,
    order: str | Sequence[int] = "natural",
    remainder: str = "last",
) -> Stream:
    """Ten packages of the standard library as a class-incremental stream of texts.

    A row is {"text": source of at most 512 characters, "label": class in the seen order, "task":
    index of the task}. `general` holds texts of four other modules; there every third function
    is for tests, since a module is one file.

    Args:
        seed: Draws the order of training rows, and that of the packages if `order` is "seed".
        tasks: Number of tasks, 1..10.
        order: "natural" (asyncio, xml, …, as `PACKAGES` has them), "seed", or a permutation of
            0..9.
        remainder: Where packages go that do not divide evenly, see `share_out`.

    Raises:
        StreamError: if it cannot be divided so, or Python was installed without its sources.
    """
    sizes = share_out(len(PACKAGES), tasks, remainder)
    shown = [PACKAGES[c] for c in class_order(len(PACKAGES), order, seed)]
    files = sources([*PACKAGES, *GENERAL])
    texts = _texts(files)
    made, first = [], 0
    for index, size in enumerate(sizes):
        names = shown[first : first + size]
        made.append(_task(index, names, [texts[n] for n in names], seed, first=first))
        first += size
    return Stream(
        name="stdlib",
        scenario="class-incremental",
        tasks=tuple(made),
        seed=seed,
        base="minilm",
        general=_general(files, seed),
        options={
            "tasks": tasks,
            "order": order if isinstance(order, str) else [int(c) for c in order],
            "remainder": remainder,
            "python": version(),
        },
    )


def _texts(library: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, list[Excerpt]]]:
    """The rows of each package by role.

    Raises:
        StreamError: if packages have too few.
    """
    found, problems = {}, []
    for name in PACKAGES:
        texts = [documented(file, _WIDTH) for file in library[name]]
        roles = divided([len(part) for part in texts])
        found[name] = {
            role: spread(
                [e for part, own in zip(texts, roles, strict=True) if own == role for e in part],
                most,
            )
            for role, most in MOST.items()
        }
        problems += [
            f"{name}: got {len(found[name][role])} {role} texts, expected at least {least}; use a "
            "Python whose standard library is whole"
            for role, least in LEAST.items()
            if len(found[name][role]) < least
        ]
    if problems:
        raise StreamError(problems)
    return found


def _general(library: Mapping[str, Sequence[Path]], seed: int) -> Task:
    texts = []
    for name in GENERAL:
        rows = spread(
            [e for file in library[name] for e in documented(file, _WIDTH)], _GENERAL_MOST
        )
        train = [e for i, e in enumerate(rows) if i % 3 != 2]
        texts.append({"train": train, "test": rows[2::3]})
    return _task(0, GENERAL, texts, seed, name="general")


def _task(
    index: int,
    names: Sequence[str],
    texts: Sequence[Mapping[str, list[Excerpt]]],
    seed: int,
    *,
    first: int = 0,
    name: str | None = None,
) -> Task:
    data = {}
    for role in texts[0]:
        rows = [(e, first + i) for i, by_role in enumerate(texts) for e in by_role[role]]
        if role == "train":
            key = [checked_seed(seed), first]
            rows = [rows[i] for i in np.random.RandomState(key).permutation(len(rows))]
        columns = {
            "text": [e.text for e, _ in rows],
            "label": np.array([label for _, label in rows]),
            "task": np.full(len(rows), index),
        }
        data[role] = Rows(columns, origin=np.array([f"{e.file}:{e.line}" for e, _ in rows]))
    return Task(
        index=index,
        name=name or "-".join(names),
        kind=_KIND,
        labels=tuple(names),
        classes=tuple(range(first, first + len(names))),
        data=data,
    )
