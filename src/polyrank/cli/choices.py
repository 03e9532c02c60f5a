"""What the words of `polyrank run` stand for: method, strategies and settings, with all faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyrank.cli.values import pairs
from polyrank.errors import ConfigError

if TYPE_CHECKING:
    from polyrank.engine.settings import Settings
    from polyrank.frame import Method, Strategy

# What fits the embedded model of width 64 in well under a minute.
SMALL: dict[str, dict[str, Any]] = {"smora": {"r": 16, "k": 4}}


class Choice(NamedTuple):
    """What a run is made of."""

    method: Method
    strategies: list[Strategy]
    settings: Settings


def choose(
    method: str | None,
    file: Path | None,
    options: Sequence[str],
    strategies: Sequence[str],
    train: Sequence[str],
    *,
    embedded: bool,
    stream: str,
    references: Sequence[str],
) -> Choice:
    """Build method, strategies and settings, and look stream and references up.

    With the embedded model and no method named, the default takes options that fit its width.

    Raises:
        ConfigError: naming every fault.
    """
    from polyrank import frame
    from polyrank.engine.plan import unknown
    from polyrank.engine.settings import Settings
    from polyrank.streams import stream as find_stream

    name = frame.load_file(file).name if file is not None else "smora"
    if method is not None and file is not None and frame.slug(method) != name:
        raise ConfigError(
            f"method: --method says {method!r}, --method-file brings {name!r}; give one of the two"
        )
    name = frame.slug(method or name)
    problems: list[str] = []
    small = SMALL.get(name, {}) if embedded and method is None else {}
    values = {**small, **(_collect(problems, lambda: pairs(options, "--set")) or {})}
    made = _collect(problems, frame.method, name, **values)
    settings = _collect(problems, lambda: Settings.build(pairs(train, "--train")))
    combined = [_collect(problems, lambda word=word: strategy(word)) for word in strategies]
    _collect(problems, find_stream, stream)
    problems += unknown(references)
    if made is not None and not isinstance(made, frame.Method):
        problems.append(f"method: {name!r} is a strategy; write --method lora --with {name}")
    problems += [
        f"with: {s.name!r} is a method and owns structure; give it with --method"
        for s in combined
        if isinstance(s, frame.Method)
    ]
    if problems:
        raise ConfigError(problems)
    return Choice(made, combined, settings)


def _collect(problems: list[str], make: Callable[..., Any], /, *words: str, **values: Any) -> Any:
    try:
        return make(*words, **values)
    except ConfigError as error:
        problems += error.problems
        return None


def strategy(word: str) -> Any:
    """Build a strategy from NAME or NAME:OPTION=VALUE,OPTION=VALUE.

    Raises:
        ConfigError: if it is none, or an option is wrong.
    """
    from polyrank import frame

    name, _, options = word.partition(":")
    return frame.method(name, **pairs(options.split(","), "--with") if options else {})


def targets(words: Sequence[str] | None) -> list[str] | str | None:
    """Return what `--target` names: a keyword of PEFT, a list of modules, or nothing."""
    if not words:
        return None
    return words[0] if list(words) == ["all-linear"] else list(words)


def unique(seeds: Sequence[int]) -> list[int]:
    """Return the seeds as they are.

    Raises:
        ConfigError: if one is given twice, or is below 0.
    """
    problems = [f"seed: got {s}, expected an integer >= 0" for s in seeds if s < 0]
    problems += [f"seed: got {s} twice; leave one out" for s in {*seeds} if seeds.count(s) > 1]
    if problems:
        raise ConfigError(problems)
    return list(seeds)


def repeated(words: Sequence[str], seed: int) -> list[str]:
    """Return a command for one seed alone, without a folder: what repeats one run of several."""
    kept, skipping = [], False
    for word in words:
        if word.startswith("-"):
            skipping = word.partition("=")[0] in ("--seed", "--out")
        if not skipping:
            kept.append(word)
    return [*kept, "--seed", str(seed)]
