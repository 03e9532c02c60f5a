"""A method may take its start or its optimiser from another one, where the mathematics fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from polyrank.errors import ConfigError
from polyrank.frame.slots import conflicts
from polyrank.pairs import worded

if TYPE_CHECKING:
    from polyrank.frame.method import Method

WORDS = {"init": "start", "optim": "optimiser"}
# What a lender takes over from the method that borrows.
SHARED = ("r", "alpha", "scaling", "dropout")


def lent(method: Method, what: str) -> Method | None:
    """Return the method that lends its start ("init") or its optimiser ("optim"), or None.

    It has the borrower's rank, scaling and dropout.

    Raises:
        ConfigError: if there is no such method, or its options are wrong.
    """
    from polyrank.frame.registry import method as make

    found = _asked(method, what)
    if found is None:
        return None
    name, options = found
    shared = {key: getattr(method, key) for key in SHARED}
    return make(name, **options, **shared)  # type: ignore[no-any-return]


def _asked(method: Method, what: str) -> tuple[str, dict[str, Any]] | None:
    text: Any = getattr(method, f"{what}_by")
    if not text or not isinstance(text, str):
        return None
    name, options = worded(text)
    fixed = (*SHARED, "init_by", "optim_by")
    problems = [f"{name}: {k!r} is shared; give it to {method.name}" for k in options if k in fixed]
    if problems:
        raise ConfigError(problems)
    return name, options


def lending_problems(method: Method, *, sound: bool) -> Iterator[str]:
    """Yield why a method cannot take what it asks others for.

    Args:
        method: the borrower.
        sound: whether its other options are right, so that they may be handed on.
    """
    found = [problem for what in WORDS for problem in _problems(method, what, sound)]
    yield from found
    if sound and not found and method.optim_by:
        yield from (f"optim_by: {problem}" for problem in conflicts(method.acting()))


def _problems(method: Method, what: str, sound: bool) -> Iterator[str]:
    from polyrank.frame.registry import method as make

    option = f"{what}_by"
    try:
        asked = _asked(method, what)
        if asked is None:
            return
        name, options = asked
        lender: Any = make(name, **options)
        if lender.kind != "method":
            yield f"{option}: {lender.name} is a strategy; combine it with --with {lender.name}"
            return
        # First whether the mathematics fits, then the numbers.
        reasons = list(lender.lends(what, method)) if sound else []
        for reason in reasons:
            yield (
                f"{option}: {lender.name} cannot lend its {WORDS[what]} to {method.name}: "
                f"{reason}; leave {option} out, or choose another method"
            )
        if sound and not reasons:
            lent(method, what)
    except ConfigError as error:
        yield from (f"{option}: {problem}" for problem in error.problems)
