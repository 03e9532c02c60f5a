"""Flags of the command line that take several values."""

from __future__ import annotations

from collections.abc import Sequence

from polyrank.errors import ConfigError

# Options that take several values behind one flag, as in `--set r=16 k=4`.
MANY = ("--set", "--train", "--with", "--references", "--seed", "--target")

# The words of the command that is being run, for its record.
TYPED: list[str] = []


def spread(arguments: Sequence[str]) -> list[str]:
    """Repeat a flag before each of its values: `--set r=16 k=4` becomes `--set r=16 --set k=4`.

    Raises:
        ConfigError: if such a flag has no value.
    """
    found: list[str] = []
    flag, used = None, True
    for word in [*arguments, "-"]:
        if word.startswith("-"):
            if not used:
                raise ConfigError(f"{flag}: got no value, expected at least one; or leave it out")
            flag = word if word in MANY else None
            used = flag is None
            if used:
                found.append(word)
        elif flag is not None:
            found += [flag, word]
            used = True
        else:
            found.append(word)
    return found[:-1]
