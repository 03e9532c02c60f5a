"""A stream of handwritten digits that installs with scikit-learn: real data, no network.

The 1797 images of `sklearn.datasets.load_digits` stand in 14 contiguous form blocks (the same
sequence of labels starts anew in each). Training uses the first 8, validation the next 2, tests the
last 4, so that no test image shares a form block with a training image. That a block is one
writer is not documented anywhere.

Digits 0-3 train the base model, digits 4-9 come as tasks of a class-incremental stream.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np

from polyrank.streams.base import Stream, Task
from polyrank.streams.data import Rows
from polyrank.streams.split import checked_seed, class_order, share_out

# First row of each form block.
FORM_BLOCKS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
_BLOCKS_OF = {"train": range(8), "validation": range(8, 10), "test": range(10, 14)}
_BASE = (0, 1, 2, 3)
_NEW = (4, 5, 6, 7, 8, 9)


def digits(
    seed: int = 0,
    *,
    tasks: int = 3,
    order: str | Sequence[int] = "natural",
    remainder: str = "last",
) -> Stream:
    """Digits 4-9 as a class-incremental stream, with digits 0-3 as data for the base model.

    A row is {"pixel_values": (1, 8, 8) float32 in [-1, 1], "label": class in the seen order,
    "task": index of the task}.

    Args:
        seed: Draws the order of training rows, and that of the classes if `order` is "seed".
        tasks: Number of tasks, 1..6; 3 gives two new digits each.
        order: "natural" (4, 5, …, 9), "seed", or a permutation of 0..5 (0 is digit 4).
        remainder: Where digits go that do not divide evenly, see `share_out`.
    """
    sizes = share_out(len(_NEW), tasks, remainder)
    shown = [_NEW[c] for c in class_order(len(_NEW), order, seed)]
    made, first = [], 0
    for index, size in enumerate(sizes):
        made.append(_task(index, shown[first : first + size], first, seed))
        first += size
    options = {
        "tasks": tasks,
        "order": order if isinstance(order, str) else [int(c) for c in order],
    }
    return Stream(
        name="digits",
        scenario="class-incremental",
        tasks=tuple(made),
        seed=seed,
        pretraining=digits_base(seed),
        options={**options, "remainder": remainder},
    )


def digits_base(seed: int = 0) -> Task:
    """Digits 0-3, to train a base model on the spot: classes 0..3 with a head of their own."""
    return _task(0, _BASE, 0, seed)


def _task(index: int, numbers: Sequence[int], first: int, seed: int) -> Task:
    data = {}
    for role, blocks in _BLOCKS_OF.items():
        rows = _rows_of(numbers, blocks)
        if role == "train":
            key = [checked_seed(seed), *numbers]
            rows = rows[np.random.RandomState(key).permutation(len(rows))]
        images, targets = _images()
        label = first + np.array([numbers.index(t) for t in targets[rows]])
        columns = {"pixel_values": images[rows], "label": label, "task": np.full(len(rows), index)}
        data[role] = Rows(columns, origin=rows)
    return Task(
        index=index,
        name="-".join(map(str, numbers)),
        labels=tuple(map(str, numbers)),
        classes=tuple(range(first, first + len(numbers))),
        data=data,
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
