"""Which classes come when: the order of classes and how many each task gets."""

from collections.abc import Sequence

import numpy as np

from polyrank.errors import StreamError

REMAINDERS = ("last", "spread", "error")


def class_order(n_classes: int, order: str | Sequence[int] = "natural", seed: int = 0) -> list[int]:
    """The original class numbers in the order in which the stream shows them.

    Args:
        n_classes: Number of classes.
        order: "natural" (0, 1, 2, …), "seed" (numpy's legacy permutation of the seed, as the
            class-incremental benchmarks draw it, there mostly with seed 1993) or the order itself.
        seed: For "seed", 0..2**32-1.

    Raises:
        StreamError: if the order is no permutation of 0..n_classes-1.
    """
    if order == "natural":
        return list(range(n_classes))
    if order == "seed":
        return [int(c) for c in np.random.RandomState(checked_seed(seed)).permutation(n_classes)]
    if isinstance(order, str) or sorted(order) != list(range(n_classes)):
        raise StreamError(
            f"order: got {order!r}, expected 'natural', 'seed' or a permutation of "
            f"0..{n_classes - 1}; name every class once"
        )
    return [int(c) for c in order]


def share_out(n_classes: int, n_tasks: int, remainder: str = "last") -> list[int]:
    """How many classes each task gets; none is ever dropped.

    Args:
        n_classes: Number of classes to share out.
        n_tasks: Number of tasks, 1..n_classes.
        remainder: If they do not divide evenly: "last" gives the rest to the last task, "spread"
            one more to each of the first tasks, "error" refuses.

    Raises:
        StreamError: if it cannot be done.
    """
    if type(n_tasks) is not int or not 1 <= n_tasks <= n_classes:
        raise StreamError(
            f"tasks: got {n_tasks!r}, expected 1..{n_classes}, at least one class each; "
            "ask for fewer tasks"
        )
    if remainder not in REMAINDERS:
        raise StreamError(f"remainder: got {remainder!r}, expected one of {REMAINDERS}; choose one")
    each, rest = divmod(n_classes, n_tasks)
    if not rest:
        return [each] * n_tasks
    if remainder == "error":
        raise StreamError(
            f"{n_classes} classes do not divide into {n_tasks} tasks; choose remainder='last' or "
            "'spread', or another number of tasks"
        )
    if remainder == "last":
        return [each] * (n_tasks - 1) + [each + rest]
    return [each + (i < rest) for i in range(n_tasks)]


def checked_seed(seed: int) -> int:
    """The seed, if numpy's legacy generator takes it.

    Raises:
        StreamError: otherwise.
    """
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise StreamError(f"seed: got {seed!r}, expected 0..{2**32 - 1}; choose a whole number")
    return seed
