"""What the words of `polyrank run` stand for: method, strategies and settings, with all faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polyrank.cli.lists import several
from polyrank.errors import ConfigError
from polyrank.pairs import pairs, worded

if TYPE_CHECKING:
    from polyrank.engine.recipe import Wanted
    from polyrank.engine.settings import Settings
    from polyrank.frame import Method, Strategy

STREAM = "digits"
# What fits the embedded model of width 64 in well under a minute.
SMALL: dict[str, dict[str, Any]] = {"smora": {"r": 16, "k": 4}}


class Choice(NamedTuple):
    """What a run is made of."""

    method: Method
    strategies: list[Strategy]
    settings: Settings


def asked(
    *,
    method: str | None,
    file: Path | None,
    options: Sequence[str],
    strategies: Sequence[str],
    stream: str | None,
    model: str | None,
    train: Sequence[str],
    target: Sequence[str] | None,
    references: Sequence[str] | None,
    seeds: Sequence[int] | None,
    problems: list[str],
) -> Wanted:
    """Return what the words of a command line ask for; add to `problems` what is wrong with them.

    A method file names the method, as its registered name is the file's.
    """
    from polyrank.engine.recipe import Wanted

    named = [_collect(problems, strategy, word) for word in strategies]
    brought = None if file is None else file.stem.lower().replace("_", "-")
    return Wanted.model_construct(
        method=method or brought,
        stream=stream,
        model=model,
        options=_collect(problems, lambda: pairs(options, "--set", "--set r=16 k=4")) or None,
        strategies=tuple(each for each in named if each) or None,
        train=_collect(problems, lambda: pairs(train, "--train", "--train lr=1e-3 epochs=2"))
        or None,
        target=targets(target),
        references=None if references is None else tuple(w for w in references if w != "none"),
        seeds=_collect(problems, lambda: unique(seeds)) if seeds else None,
    )


def choose(wanted: Wanted, file: Path | None, problems: list[str]) -> Choice:
    """Build method, strategies and settings, and look stream and references up.

    With the embedded model and no method named, the default takes options that fit its width.

    Raises:
        ConfigError: naming every fault, `problems` first.
    """
    from polyrank import frame
    from polyrank.engine.plan import unknown
    from polyrank.engine.settings import Settings
    from polyrank.streams import stream as find_stream

    name = frame.load_file(file).name if file is not None else "smora"
    method = wanted.method
    if method is not None and file is not None and frame.slug(method) != name:
        raise ConfigError(
            f"method: --method says {method!r}, --method-file brings {name!r}; give one of the two"
        )
    name = frame.slug(method or name)
    small = SMALL.get(name, {}) if wanted.model is None and method is None else {}
    options = _collect(problems, lambda: _lists(name, {**small, **(wanted.options or {})}))
    made: Any = None if options is None else _collect(problems, frame.method, name, **options)
    settings = _collect(problems, lambda: Settings.build(wanted.train or {}))
    combined = [
        _collect(problems, frame.method, each, **given) for each, given in wanted.strategies or ()
    ]
    _collect(problems, find_stream, wanted.stream or STREAM)
    problems += unknown(wanted.references or ())
    if made is not None and not isinstance(made, frame.Method):
        problems.append(f"method: {name!r} is a strategy; write --method lora --with {name}")
    problems += [
        f"with: {s.name!r} is a method and owns structure; give it with --method"
        for s in combined
        if isinstance(s, frame.Method)
    ]
    if problems:
        # What would be refused next is told as well.
        methods = [made] if isinstance(made, frame.Method) else []
        fit = [s for s in combined if isinstance(s, frame.Strategy)]
        more = [p for m in methods for p in frame.combination_problems(m, fit)]
        raise ConfigError([*problems, *more])
    return Choice(made, combined, settings)


def _lists(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options, "1,3" as a list where that is what an option holds."""
    from polyrank import frame

    known = {spec.name: spec.type for spec in fields(frame.get(name))}
    return {key: several(given, known.get(key)) for key, given in options.items()}


def _collect(problems: list[str], make: Callable[..., Any], /, *words: str, **values: Any) -> Any:
    try:
        return make(*words, **values)
    except ConfigError as error:
        problems += error.problems
        return None


def strategy(word: str) -> tuple[str, dict[str, Any]]:
    """Return name and options out of NAME or NAME:OPTION=VALUE,OPTION=VALUE.

    Raises:
        ConfigError: if an option is no pair.
    """
    return worded(word, "--with")


def borrowed(init: str | None, optim: str | None) -> list[str]:
    """Return as options what `--init` and `--optim` name."""
    found = (("init_by", init), ("optim_by", optim))
    return [f"{key}={word}" for key, word in found if word is not None]


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
