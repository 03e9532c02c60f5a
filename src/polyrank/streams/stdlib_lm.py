"""A stream of real text for language models that installs with Python: kinds of source code.

Each task is a group of modules of the standard library that read alike: imports, XML, mail, tables
of character sets, asyncio. A text is a passage of whole lines. Files are shared out to
training, validation and tests within their group, so that none serves two; `pretraining` holds
other modules, which no task uses, for a small model that is trained once. The text depends on the
Python version, which the stream records, and the hash covers every row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polyrank.errors import StreamError
from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Rows
from polyrank.streams.split import checked_seed, class_order
from polyrank.streams.stdlib_sources import (
    SHARES,
    Excerpt,
    divided,
    passages,
    sources,
    spread,
    version,
)

GROUPS: Mapping[str, tuple[str, ...]] = {
    "imports": ("importlib", "pkgutil", "runpy", "zipimport", "modulefinder"),
    "markup": ("xml",),
    "mail": ("email", "mailbox", "smtplib", "imaplib", "poplib"),
    "tables": ("encodings",),
    "async": ("asyncio",),
}
PRETRAINING = (
    "_pydecimal",
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "codeop",
    "collections",
    "concurrent",
    "configparser",
    "contextlib",
    "copy",
    "ctypes",
    "dataclasses",
    "difflib",
    "dis",
    "doctest",
    "enum",
    "fractions",
    "ftplib",
    "functools",
    "gettext",
    "http",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "multiprocessing",
    "optparse",
    "pdb",
    "pickle",
    "platform",
    "pydoc",
    "random",
    "selectors",
    "shutil",
    "socket",
    "ssl",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "traceback",
    "typing",
    "unittest",
    "urllib",
    "weakref",
    "wsgiref",
)
# Passages of a task by role: at most these, evenly over its files.
MOST: Mapping[str, int] = {"train": 320, "validation": 32, "test": 64}
LEAST: Mapping[str, int] = {"train": 160, "validation": 16, "test": 32}
PRETRAINING_MOST: Mapping[str, int] = {"train": 4000, "test": 64}
_PRETRAINING_SHARES: Mapping[str, float] = {"train": 0.9, "test": 0.1}
_WIDTH = 320
_KIND = "language-modelling"


def stdlib_lm(seed: int = 0, *, tasks: int = 5, order: str | Sequence[int] = "natural") -> Stream:
    """Groups of modules of the standard library as tasks of a language model.

    A row is {"text": whole lines of at most 320 characters, "task": index of the task}; the score
    is the mean log-likelihood of a token. `pretraining` is `general` too: its test rows say what
    a model keeps of what it knew.

    Args:
        seed: Draws the order of training rows, and that of the groups if `order` is "seed".
        tasks: Number of tasks, 1..5; the first ones in the order.
        order: "natural" (as `GROUPS` has them), "seed", or a permutation of 0..4.

    Raises:
        StreamError: if there are fewer groups, or Python was installed without its sources.
    """
    if type(tasks) is not int or not 1 <= tasks <= len(GROUPS):
        raise StreamError(
            f"tasks: got {tasks!r}, expected 1..{len(GROUPS)}, one group of modules each; ask for "
            "fewer tasks"
        )
    names = list(GROUPS)
    shown = [names[i] for i in class_order(len(names), order, seed)][:tasks]
    files = sources([*(module for name in shown for module in GROUPS[name]), *PRETRAINING])
    texts = {name: _texts(files, GROUPS[name], MOST) for name in shown}
    problems = [
        f"{name}: got {len(by_role[role])} {role} passages, expected at least {least}; use a "
        "Python whose standard library is whole"
        for name, by_role in texts.items()
        for role, least in LEAST.items()
        if len(by_role[role]) < least
    ]
    if problems:
        raise StreamError(problems)
    base = _texts(files, PRETRAINING, PRETRAINING_MOST, _PRETRAINING_SHARES)
    pretraining = _task(0, "pretraining", base, seed)
    return Stream(
        name="stdlib-lm",
        scenario="text",
        tasks=tuple(_task(i, name, texts[name], seed) for i, name in enumerate(shown)),
        seed=seed,
        pretraining=pretraining,
        general=pretraining,
        base="causal",
        options={
            "tasks": tasks,
            "order": order if isinstance(order, str) else [int(c) for c in order],
            "python": version(),
        },
    )


def _texts(
    files: Mapping[str, Sequence[Path]],
    modules: Sequence[str],
    most: Mapping[str, int],
    shares: Mapping[str, float] = SHARES,
) -> dict[str, list[Excerpt]]:
    texts = [passages(file, _WIDTH) for module in modules for file in files[module]]
    roles = divided([len(part) for part in texts], shares)
    return {
        role: spread(
            [e for part, own in zip(texts, roles, strict=True) if own == role for e in part], count
        )
        for role, count in most.items()
    }


def _task(index: int, name: str, texts: Mapping[str, list[Excerpt]], seed: int) -> Task:
    data = {}
    for role, rows in texts.items():
        if role == "train":
            drawn = np.random.RandomState([checked_seed(seed), *name.encode()])
            rows = [rows[i] for i in drawn.permutation(len(rows))]
        columns = {"text": [e.text for e in rows], "task": np.full(len(rows), index)}
        data[role] = Rows(columns, origin=np.array([f"{e.file}:{e.line}" for e in rows]))
    return Task(
        index=index,
        name=name,
        kind=_KIND,
        labels=(),
        classes=(),
        data=data,
        metric="negative_loss",
    )
