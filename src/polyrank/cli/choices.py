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
    combined = [_collect(problems, frame.method, word) for word in strategies]
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
