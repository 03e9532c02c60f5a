"""The recipes that come with polyrank, by name, and how words of a command line change one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polyrank.errors import ConfigError, nearest

if TYPE_CHECKING:
    from polyrank.engine.recipe import Wanted

FOLDER = Path(__file__).parents[1] / "recipes"
# Files whose names begin with this are for `polyrank sweep`, the others for `polyrank run`.
SWEEP = "sweep-"


def names(*, sweeps: bool = False) -> dict[str, Path]:
    """Return the files for one of the two commands, by the name that it takes."""
    found = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path for path in found if path.stem.startswith(SWEEP) is sweeps}


def file_of(word: str, *, sweeps: bool = False) -> Path:
    """Return the path of a file, or of the recipe of that name.

    Raises:
        ConfigError: if it is neither.
    """
    known = names(sweeps=sweeps)
    if word in known or Path(word).suffix in (".yaml", ".yml"):
        return known.get(word, Path(word))
    what = "sweep" if sweeps else "recipe"
    hint = nearest(word, known) or " correct the name"
    raise ConfigError(
        f"{what}: got {word!r}, expected a YAML file or one of: {', '.join(known)};{hint}"
    )


def wanted(recipe: str | None, smoke: bool, words: Wanted, problems: list[str]) -> Wanted:
    """Return what a run is asked for: the recipe's, changed by the words beside it.

    Raises:
        ConfigError: naming every fault of the recipe, after `problems` of the words.
    """
    if recipe is None and smoke:
        raise ConfigError([*problems, "smoke: is a part of a recipe; give --recipe NAME as well"])
    if recipe is None:
        return words
    from polyrank.engine.recipe import read

    try:
        return words.over(read(file_of(recipe), smoke=smoke))
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
