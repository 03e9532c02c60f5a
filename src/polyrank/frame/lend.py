"""A method may take its start or its optimiser from another one, where the mathematics fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polyrank.errors import ConfigError
from polyrank.frame.slots import conflicts
from polyrank.frame.words import worded

if TYPE_CHECKING:
    from polyrank.frame.method import Method

WORDS = {"init": "start", "optim": "optimiser"}
# What a lender takes over from the method that borrows.
SHARED = ("r", "alpha", "scaling", "dropout")


def lent(method: Method, what: str, *, sound: bool = True) -> Method | None:
    """Return the method that lends its start ("init") or its optimiser ("optim"), or None.

    It has the borrower's rank, scaling and dropout, unless those are not `sound`.

    Raises:
        ConfigError: if there is no such method, or its options are wrong.
    """
    from polyrank.frame.registry import method as make

    text: Any = getattr(method, f"{what}_by")
    if not text or not isinstance(text, str):
        return None
    name, options = worded(text)
    fixed = (*SHARED, "init_by", "optim_by")
    if problems := [
        f"{name}: {key!r} is shared; give it to {method.name} itself"
        for key in options
        if key in fixed
    ]:
        raise ConfigError(problems)
    shared = {key: getattr(method, key) for key in SHARED} if sound else {}
    made: Any = make(name, **options)
    if made.kind != "method":
        raise ConfigError(f"{made.name} is a strategy; combine it with --with {made.name}")
    return make(name, **options, **shared)  # type: ignore[no-any-return]


def lending_problems(method: Method, *, sound: bool) -> Iterator[str]:
    """Yield why a method cannot take what it asks others for.

    Args:
        method: the borrower.
        sound: whether its other options are right, so that they may be handed on.
    """
    found = []
    for what, word in WORDS.items():
        try:
            lender = lent(method, what, sound=sound)
        except ConfigError as error:
            found += [f"{what}_by: {problem}" for problem in error.problems]
            continue
        if lender is not None:
            found += [
                f"{what}_by: {lender.name} cannot lend its {word} to {method.name}: {reason}; "
                f"leave {what}_by out, or choose another method"
                for reason in lender.lends(what, method)
            ]
    yield from found
    if sound and not found and method.optim_by:
        yield from (f"optim_by: {problem}" for problem in conflicts(method.acting()))
