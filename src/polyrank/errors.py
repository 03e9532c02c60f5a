"""Exception classes of polyrank: every message says what, got, expected and the remedy.

One base class, `PolyrankError`, catches everything that polyrank raises on purpose. Each class also
derives from the built-in error a caller would expect, so that `except ValueError` keeps working.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any


class PolyrankError(Exception):
    """Base of every error that polyrank raises on purpose."""


class ConfigError(PolyrankError, ValueError):
    """One or more faults in a configuration, reported together before anything is loaded.

    Args:
        problems: One problem, or all problems found; each one a full sentence with its remedy.

    Attributes:
        problems: The problems as a list, in the order in which they were found; never empty.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if not self.problems:
            raise ValueError(f"{type(self).__name__} got no problem; raise it only if there is one")
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # By default an exception is rebuilt from its message, which would join the list for good.
        return type(self), (self.problems,)


class StreamError(ConfigError):
    """A task or a stream of tasks that cannot be read or does not fit together."""


class MergeError(PolyrankError, ValueError):
    """An update that has no exact dense form was to be merged; raised before a weight changes."""


class CheckpointError(PolyrankError, ValueError):
    """A saved file whose parts are missing, damaged or disagree with its description."""


class InertError(PolyrankError, RuntimeError):
    """A method's vital sign shows that what it is about never happened."""


class RunError(PolyrankError, RuntimeError):
    """A run folder that holds another run, or a run that cannot go on."""


def nearest(word: str, words: Iterable[str]) -> str:
    """A suggestion to append to a message about an unknown name.

    Args:
        word: The name that was not found.
        words: The names that exist.

    Returns:
        `" did you mean 'x'?"`, with a leading space, or `""` if no name is close.
    """
    names = {name.lower(): name for name in sorted(words)}
    found = get_close_matches(word.lower(), names, n=1)
    return f" did you mean {names[found[0]]!r}?" if found else ""
