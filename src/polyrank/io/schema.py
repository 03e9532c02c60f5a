"""What run.json and results.json must hold; all faults of a file are reported together."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

SCHEMA = 1
STATUSES = ("running", "done", "failed", "interrupted")
ROLES = ("method", "reference")
VIEWS = ("unrestricted", "restricted")
# Scores that lie in 0..1; a task without a metric is scored by accuracy. Others are any numbers.
FRACTIONS = frozenset(
    {"accuracy", "choice_accuracy", "edit_similarity", "exact_match", "f1", "rouge_l", "sari"}
)
# The part of run.json that says which run it is; the rest says where and when it ran.
IDENTITY: dict[str, type] = {
    "method": dict,
    "stream": dict,
    "model": dict,
    "seed": int,
    "train": dict,
}
COLLECTED: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "versions": dict,
    "commit": (str, type(None)),
    "hardware": dict,
    "command": list,
    "started": str,
    "seconds": (int, float, type(None)),
    "status": str,
}
_TASK: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "labels": (list, type(None)),
    "n_train": int,
    "n_test": int,
}
_SYSTEM: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "label": str,
    "role": str,
    "restricted": list,
    "unrestricted": list,
    "counts": list,
    "metrics": dict,
    "seconds": (int, float, type(None)),
    "trainable": (int, type(None)),
    "adapter": (str, type(None)),
    "routing": (dict, type(None)),
}
# What may be left out: scores on what no task trains, before the first task and after each; the
# same figures on validation rows; replayed rows per update; which of several models it is; folders
# of adapters beside its own, by name; tables that the method shows.
_TASK_MORE: dict[str, type | tuple[type, ...]] = {"metric": str}
_SYSTEM_MORE: dict[str, type | tuple[type, ...]] = {
    "general": (list, type(None)),
    "validation": (dict, type(None)),
    "extra_samples": (int, float, type(None)),
    "deploy": (str, type(None)),
    "exports": (dict, type(None)),
    "figures": (list, type(None)),
}
_FIGURE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "title", "unit", "note"), str),
    **dict.fromkeys(("rows", "columns", "values"), list),
}
_FIGURES: dict[str, type | tuple[type, ...]] = {**dict.fromkeys(VIEWS, list), "metrics": dict}


def run_problems(data: Any) -> list[str]:
    """Every fault of the content of run.json, as sentences with what was expected."""
    if not isinstance(data, Mapping):
        return [f"run.json: got {type(data).__name__}, expected an object"]
    found = [*_version(data, "run.json"), *_keys(data, {**IDENTITY, **COLLECTED}, "run.json")]
    if isinstance(data.get("status"), str) and data["status"] not in STATUSES:
        found.append(f"run.json: status: got {data['status']!r}, expected one of {STATUSES}")
    for key in ("method", "stream"):
        part = data.get(key)
        if isinstance(part, Mapping) and not isinstance(part.get("name"), str):
            found.append(f"run.json: {key}.name: got {part.get('name')!r}, expected text")
    return found


def results_problems(data: Any) -> list[str]:
    """Every fault of the content of results.json (null or NaN: not measured)."""
    if not isinstance(data, Mapping):
        return [f"results.json: got {type(data).__name__}, expected an object"]
    found = [
        *_version(data, "results.json"),
        *_keys(data, {"tasks": list, "systems": list}, "results.json"),
    ]
    if found:
        return found
    if not data["tasks"]:
        found.append("results.json: tasks: got none, expected at least one")
    for j, task in enumerate(data["tasks"]):
        found += _keys(task, _TASK, f"results.json: tasks[{j}]", _TASK_MORE)
    metrics = [_metric(task) for task in data["tasks"]]
    names = []
    for i, system in enumerate(data["systems"]):
        where = f"results.json: systems[{i}]"
        missing = _keys(system, _SYSTEM, where, _SYSTEM_MORE)
        found += missing
        if not missing:
            names.append(system["name"])
            found += _system(system, metrics, where)
    twice = sorted({name for name in names if names.count(name) > 1})
    found += [f"results.json: systems: got {name!r} twice, expected unique names" for name in twice]
    return found


def map_scores(data: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of results.json's content with `change` applied to every score that may be missing."""
    systems = []
    for system in data["systems"]:
        new = dict(system)
        for key in (*_FIGURES, "general"):
            if new.get(key) is not None:
                new[key] = _deep(new[key], change)
        if new.get("validation") is not None:
            held = new["validation"]
            new["validation"] = {**held, **{key: _deep(held[key], change) for key in _FIGURES}}
        if system["routing"] is not None:
            routing = system["routing"]
            keys = [key for key in ("load", "gate", "entropy") if key in routing]
            new["routing"] = {**routing, **{key: _deep(routing[key], change) for key in keys}}
        if new.get("figures") is not None:
            new["figures"] = [
                {**figure, "values": _deep(figure["values"], change)} for figure in new["figures"]
            ]
        systems.append(new)
    return {**data, "systems": systems}


def _system(system: Mapping[str, Any], metrics: list[str | None], where: str) -> Iterator[str]:
    size = len(metrics)
    if system["role"] not in ROLES:
        yield f"{where}.role: got {system['role']!r}, expected one of {ROLES}"
    yield from _figures(system, metrics, where)
    counts = system["counts"]
    if len(counts) != size or any(type(n) is not int or n < 1 for n in counts):
        yield f"{where}.counts: got {counts!r}, expected {size} whole numbers above 0"
    if system["routing"] is not None:
        yield from _routing(system["routing"], f"{where}.routing")
    held = system.get("validation")
    if held is not None:
        wrong = _keys(held, _FIGURES, f"{where}.validation")
        yield from wrong or _figures(held, metrics, f"{where}.validation")
    kept = system.get("general")
    if kept is not None and (not 1 <= len(kept) <= size + 1 or not all(map(_number, kept))):
        yield (
            f"{where}.general: got {kept!r:.80}, expected up to {size + 1} numbers or null, the "
            "score before the first task and after each"
        )
    for name, path in (system.get("exports") or {}).items():
        if not isinstance(path, str):
            yield f"{where}.exports: {name}: got {path!r}, expected the path of a folder"
    for i, figure in enumerate(system.get("figures") or ()):
        yield from _figure(figure, f"{where}.figures[{i}]")
    extra = system.get("extra_samples")
    if extra is not None and not (_number(extra) and extra >= 0):
        yield f"{where}.extra_samples: got {extra!r}, expected a number of at least 0, or null"


def _figures(part: Mapping[str, Any], metrics: list[str | None], where: str) -> Iterator[str]:
    """Yield the faults of two matrices and what was computed from them."""
    size = len(metrics)
    for view in VIEWS:
        rows = part[view]
        if len(rows) != size or any(not isinstance(r, list) or len(r) != size for r in rows):
            yield f"{where}.{view}: expected a matrix of {size} x {size}, one row and column a task"
            continue
        columns = list(zip(metrics, zip(*rows, strict=True), strict=True))
        wrong = [(x, name) for name, column in columns for x in column if not _score(x, name)]
        if wrong:
            value, name = wrong[0]
            expected = "a fraction 0..1" if _fraction(name) else f"a finite {name}"
            yield f"{where}.{view}: got {value!r}, expected {expected}, or null"
    for view in VIEWS:
        values = part["metrics"].get(view)
        if not isinstance(values, Mapping) or any(not _number(x) for x in values.values()):
            yield f"{where}.metrics.{view}: got {values!r:.80}, expected names with numbers or null"


def _figure(figure: Any, where: str) -> Iterator[str]:
    wrong = _keys(figure, _FIGURE, where)
    yield from wrong
    if wrong:
        return
    for key in ("rows", "columns"):
        if not figure[key] or any(not isinstance(word, str) for word in figure[key]):
            yield f"{where}.{key}: got {figure[key]!r:.80}, expected one word or more"
    rows, columns, values = (len(figure[key]) for key in ("rows", "columns", "values"))
    table = figure["values"]
    if values != rows or any(not isinstance(r, list) or len(r) != columns for r in table):
        yield f"{where}.values: expected {rows} rows of {columns} numbers"
    elif not all(_number(x) for row in table for x in row):
        yield f"{where}.values: expected finite numbers, or null"


def _routing(routing: Mapping[str, Any], where: str) -> Iterator[str]:
    wrong = _keys(routing, dict.fromkeys(("layers", "tasks", "load", "entropy"), list), where)
    yield from wrong
    if wrong:
        return
    tasks, layers = len(routing["tasks"]), len(routing["layers"])
    for key in ("load", "gate", "entropy"):
        if key == "gate" and key not in routing:
            continue
        rows = routing[key]
        if len(rows) != tasks or any(not isinstance(r, list) or len(r) != layers for r in rows):
            yield f"{where}.{key}: expected {tasks} tasks with {layers} layers each"
            continue
        cells = [x for row in rows for x in row]
        if key != "entropy":
            if any(not isinstance(x, list) or not x for x in cells):
                yield f"{where}.{key}: expected a list of one number per rank for every layer"
                continue
            cells = [x for layer in cells for x in layer]
        if any(not _number(x) or (key != "gate" and x is not None and x < 0) for x in cells):
            least = "finite numbers" if key == "gate" else "numbers of at least 0"
            yield f"{where}.{key}: expected {least}, or null"


def _keys(
    data: Any,
    expected: Mapping[str, type | tuple[type, ...]],
    where: str,
    more: Mapping[str, type | tuple[type, ...]] | None = None,
) -> list[str]:
    """The keys that are missing, and those of another type; `more` may be missing."""
    if not isinstance(data, Mapping):
        return [f"{where}: got {type(data).__name__}, expected an object"]
    found = [f"{where}: {key!r} is missing" for key in expected if key not in data]
    for key, kind in {**expected, **(more or {})}.items():
        if key in data and (not isinstance(data[key], kind) or isinstance(data[key], bool)):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            words = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            found.append(f"{where}: {key}: got {type(data[key]).__name__}, expected {words}")
    return found


def _version(data: Mapping[str, Any], where: str) -> list[str]:
    if data.get("schema") == SCHEMA:
        return []
    return [f"{where}: schema: got {data.get('schema')!r}, expected {SCHEMA}"]


def _number(value: Any) -> bool:
    if value is None:
        return True
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not math.isinf(value)


def _score(value: Any, metric: str | None) -> bool:
    if not _number(value):
        return False
    return value is None or math.isnan(value) or not _fraction(metric) or 0 <= value <= 1


def _metric(task: Any) -> str | None:
    name = task.get("metric") if isinstance(task, Mapping) else None
    return name if isinstance(name, str) else None


def _fraction(metric: str | None) -> bool:
    return metric is None or metric in FRACTIONS


def _deep(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep(item, change) for item in value]
    return change(value)
