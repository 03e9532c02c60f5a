"""Whether a method and strategies can work together, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from polyrank.frame.method import Method, Strategy
from polyrank.frame.slots import Rule, conflicts
from polyrank.frame.stages import Boundary


def combination_problems(method: Method, strategies: Sequence[Strategy]) -> list[str]:
    """List why a method and strategies cannot be combined; empty if they can."""
    return list(_problems(method, strategies))


def _problems(method: Method, strategies: Sequence[Strategy]) -> Iterator[str]:
    names = [strategy.name for strategy in strategies]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"strategies: {name!r} is given {names.count(name)} times; give it once"
    rules: list[Rule] = []
    entries: list[Method | Strategy] = [method, *strategies]
    owners: dict[int, str] = {}
    for entry in entries:
        found = entry.acting()
        owners |= {id(rule): entry.name for rule in found}
        rules += found
    yield from conflicts(rules, owners)
    yield from _one_of([e.name for e in entries if e.task_loss() is not None], "the task loss")
    yield from _one_of([s.name for s in strategies if s.replay() is not None], "the stored samples")
    yield from _one_of([e.name for e in entries if _shows(e)], "what is evaluated")
    yield from _meaning(method, strategies)
    yield from _copies(method, strategies)
    yield from (f"{method.name}: {reason}" for reason in method.unfit(strategies))
    for strategy in strategies:
        others = [other for other in strategies if other is not strategy]
        yield from (f"{strategy.name}: {reason}" for reason in strategy.unfit(method, others))


def _one_of(names: Sequence[str], what: str) -> Iterator[str]:
    if len(names) > 1:
        yield f"strategies: {', '.join(names)} all decide {what}; keep one of them"


def _shows(entry: Method | Strategy) -> bool:
    """Say whether an entry evaluates models of its own choice."""
    boundary = entry.boundary()
    return boundary is not None and type(boundary).deploys is not Boundary.deploys


def _meaning(method: Method, strategies: Sequence[Strategy]) -> Iterator[str]:
    changing = [f"{s.name} begins anew after each" for s in strategies if s.structural]
    if not method.boundary().persistent:
        changing.append(f"{method.name} trains other ranks in each task")
    for strategy in strategies:
        if strategy.persistent and changing:
            yield (
                f"{strategy.name}: needs factors that keep their meaning from task to task, but "
                f"{', and '.join(changing)}; drop one of them"
            )


def _copies(method: Method, strategies: Sequence[Strategy]) -> Iterator[str]:
    """Yield which strategies keep a second model, where blocks cannot be kept twice."""
    if type(method).sub_block is Method.sub_block:
        return
    for strategy in strategies:
        boundary = strategy.boundary()
        shows = boundary is not None and boundary.replicates
        if shows or any(loss.teacher != "base" for loss in strategy.losses()):
            yield (
                f"{strategy.name}: keeps a replica of the model, and the blocks of {method.name} "
                "cannot be kept twice; use a strategy without a teacher or an average"
            )
