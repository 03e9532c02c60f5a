"""Streams of handwritten digits that install with scikit-learn: real data, no network.

The 1797 images of `sklearn.datasets.load_digits` stand in 14 contiguous form blocks (the same
sequence of labels starts anew in each). No test image shares a form block with a training image of
its stream or of the base model. That a block is one writer is not documented anywhere.

By default digits 0-3 train the base model and digits 4-9 come as tasks of a class-incremental
stream; training uses the first 8 blocks, validation the next 2, tests the last 4. With `domains`
the classes stay and what they look like changes: tasks of a domain-incremental stream are groups
of form blocks, quarter turns of the images, or plain and inverted images. The base model then
learns the same classes from plain images of the first 4 blocks, which no task uses.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from polyrank.errors import StreamError, nearest
from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Rows
from polyrank.streams.split import checked_seed, class_order, share_out

# First row of each form block.
FORM_BLOCKS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
DOMAINS = ("blocks", "rotation", "inversion")
_KIND = "image-classification"
_BLOCKS_OF = {"train": range(8), "validation": range(8, 10), "test": range(10, 14)}
_BASE = (0, 1, 2, 3)
_NEW = (4, 5, 6, 7, 8, 9)
# With domains: blocks of the base model, and those of the tasks.
_BASE_BLOCKS = {"train": range(3), "test": range(3, 4)}
_FREE = range(4, 14)
_TURNED_BLOCKS = {"train": range(4, 10), "validation": range(10, 11), "test": range(11, 14)}
_ALL = tuple(range(10))
# A 6 turned by 180 degrees is a 9, so that turned digits go without 9.
_CLASSES_OF = {"blocks": _ALL, "rotation": _ALL[:9], "inversion": _ALL}


def digits(
    seed: int = 0,
    *,
    tasks: int | None = None,
    order: str | Sequence[int] = "natural",
    remainder: str = "last",
    domains: str | None = None,
) -> Stream:
    """Digits 4-9 as a class-incremental stream, or all digits as a domain-incremental one.

    A row is {"pixel_values": (1, 8, 8) float32 in [-1, 1], "label": class in the seen order,
    "task": index of the task}.

    Args:
        seed: Draws the order of training rows, and that of the classes or domains if `order` is
            "seed".
        tasks: Number of tasks; 3 if left out, which gives two new digits each, and 2 for
            "inversion". At most 6 for classes, 5 for "blocks", 4 for "rotation".
        order: "natural" (4, 5, …, 9), "seed", or a permutation of 0..5 (0 is digit 4); with
            domains of the tasks instead.
        remainder: Where digits or blocks go that do not divide evenly, see `share_out`.
        domains: None for classes; "blocks", each task its own form blocks, of which the last is
            tested and, of four or more, the last but one validates; "rotation", the images of
            blocks 4-13 turned by 0, 90, 180, 270 degrees, digits 0-8; "inversion", the same images
            plain and with dark and bright exchanged. The images of "rotation" and "inversion" are
            the same ones in every task.

    Raises:
        StreamError: if it cannot be divided so.
    """
    if domains is not None and domains not in DOMAINS:
        hint = nearest(str(domains), DOMAINS) or " choose one"
        raise StreamError(
            f"domains: got {domains!r}, expected one of {', '.join(DOMAINS)}, or None for "
            f"classes;{hint}"
        )
    count = tasks if tasks is not None else 2 if domains == "inversion" else 3
    if domains is None:
        made, base = _by_classes(seed, count, order, remainder), digits_base(seed)
    else:
        made, base = _by_domains(seed, count, order, remainder, domains), _base(seed, domains)
    options = {
        "tasks": count,
        "order": order if isinstance(order, str) else [int(c) for c in order],
        "remainder": remainder,
    }
    return Stream(
        name="digits" if domains is None else f"digits-{domains}",
        scenario="class-incremental" if domains is None else "domain-incremental",
        tasks=tuple(made),
        seed=seed,
        pretraining=base,
        general=base,
        base="vit",
        options=options if domains is None else {**options, "domains": domains},
    )


def digits_base(seed: int = 0) -> Task:
    """Digits 0-3, to train a base model on the spot: classes 0..3 with a head of their own."""
    return _task(0, _BASE, _BLOCKS_OF, seed)


def _base(seed: int, domains: str) -> Task:
    return _task(0, _CLASSES_OF[domains], _BASE_BLOCKS, seed, domain="base")


def _by_classes(seed: int, count: int, order: str | Sequence[int], remainder: str) -> list[Task]:
    sizes = share_out(len(_NEW), count, remainder)
    shown = [_NEW[c] for c in class_order(len(_NEW), order, seed)]
    made, first = [], 0
    for index, size in enumerate(sizes):
        made.append(_task(index, shown[first : first + size], _BLOCKS_OF, seed, first=first))
        first += size
    return made


def _by_domains(
    seed: int, count: int, order: str | Sequence[int], remainder: str, domains: str
) -> list[Task]:
    most = {"blocks": len(_FREE) // 2, "rotation": 4, "inversion": 2}[domains]
    if type(count) is not int or not 1 <= count <= most:
        raise StreamError(
            f"tasks: got {count!r}, expected 1..{most} for domains {domains!r}; ask for fewer tasks"
        )
    ends = np.cumsum([_FREE.start, *share_out(len(_FREE), count, remainder)])
    made = []
    for index, number in enumerate(class_order(count, order, seed)):
        if domains == "blocks":
            first, last = int(ends[number]), int(ends[number + 1])
            blocks, name = _group(first, last), f"blocks {first}-{last - 1}"
        else:
            blocks = _TURNED_BLOCKS
            name = (
                f"{90 * number} degrees" if domains == "rotation" else ("plain", "inverted")[number]
            )
        turns = number if domains == "rotation" else 0
        sign = -1 if domains == "inversion" and number else 1
        made.append(
            _task(index, _CLASSES_OF[domains], blocks, seed, turns=turns, sign=sign, domain=name)
        )
    return made


def _group(first: int, last: int) -> dict[str, range]:
    held = last - 1
    if last - first < 4:
        return {"train": range(first, held), "test": range(held, last)}
    return {
        "train": range(first, held - 1),
        "validation": range(held - 1, held),
        "test": range(held, last),
    }


def _task(
    index: int,
    numbers: Sequence[int],
    blocks_of: dict[str, range],
    seed: int,
    *,
    first: int = 0,
    turns: int = 0,
    sign: int = 1,
    domain: str | None = None,
) -> Task:
    data = {}
    images, targets = _images()
    for role, blocks in blocks_of.items():
        rows = _rows_of(numbers, blocks)
        if role == "train":
            # Blocks of a domain are drawn in an order of their own.
            key = [checked_seed(seed), *numbers, *([] if domain is None else [blocks.start])]
            rows = rows[np.random.RandomState(key).permutation(len(rows))]
        label = first + np.array([numbers.index(t) for t in targets[rows]])
        pixels = sign * np.rot90(images[rows], turns, axes=(2, 3))
        columns = {"pixel_values": pixels, "label": label, "task": np.full(len(rows), index)}
        data[role] = Rows(columns, origin=rows)
    return Task(
        index=index,
        name=domain or "-".join(map(str, numbers)),
        kind=_KIND,
        labels=tuple(map(str, numbers)),
        classes=tuple(range(first, first + len(numbers))),
        data=data,
        domain=domain,
    )


def _rows_of(numbers: Sequence[int], blocks: range) -> np.ndarray:
    _, targets = _images()
    ends = (*FORM_BLOCKS[1:], len(targets))
    inside = np.arange(FORM_BLOCKS[blocks.start], ends[blocks.stop - 1])
    return inside[np.isin(targets[inside], numbers)]


@cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # Grey values 0..16 become -1..1.
    images = (bunch.images / 8.0 - 1.0).astype(np.float32)[:, None]
    return images, bunch.target
