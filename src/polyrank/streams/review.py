"""What can be said against a stream's file before any data are read."""

from collections.abc import Iterator
from pathlib import Path as FilePath

from polyrank.errors import nearest
from polyrank.streams import templates
from polyrank.streams.kinds import KINDS
from polyrank.streams.loaders import format_of, found_at
from polyrank.streams.schema import FORMATS, Common, Part, Path, StreamSpec, TaskSpec, merged

Fault = tuple[Path, str]
_USE_KEYS = {"use", "options", "name", "about", "seed"}
_SPLITTERS = ("label", "rows")


def review(spec: StreamSpec, base: FilePath | None) -> Iterator[Fault]:
    """Every fault of the file as (key path, message).

    Args:
        spec: The file.
        base: The folder that relative paths start from, None if there is none.
    """
    if spec.use is not None:
        other = sorted(spec.model_fields_set - _USE_KEYS)
        if other:
            yield (
                (other[0],),
                f"stands beside `use`, expected only {', '.join(sorted(_USE_KEYS))}; put options "
                f"of {spec.use!r} below `options`, or drop `use`",
            )
        return
    if spec.options is not None:
        yield ("options",), "stands without `use`, expected the stream they are for; add `use`"
    if spec.scenario is None:
        yield ("scenario",), "is missing, expected one such as class-incremental; add it"
    yield from _shape(spec)
    yield from _orders(spec)
    listed: list[tuple[Path, TaskSpec]] = [
        (("tasks", i), merged(spec, task)) for i, task in enumerate(spec.tasks or ())
    ]
    if spec.pretraining is not None:
        listed.append((("pretraining",), merged(spec, spec.pretraining)))
    if not spec.tasks and spec.split is not None:
        listed.append(((), merged(spec, TaskSpec(name=spec.name or "all"))))
    if base is None and (paths := [name for _, task in listed for name in _relative(task)]):
        yield (
            ("root",),
            f"is missing, expected the folder that holds {paths[0]!r} and others, which are not "
            "shipped with this definition; name it as `root`",
        )
    for path, task in listed:
        if path and task.name is None:
            yield (*path, "name"), "is missing, expected a short one for tables; add it"
        yield from ((path + key, message) for key, message in _task(task, base))


def _shape(spec: StreamSpec) -> Iterator[Fault]:
    if spec.tasks and spec.split is not None:
        yield ("split",), "stands beside `tasks`, expected one of the two; leave one out"
    elif not spec.tasks and spec.split is None:
        yield ("tasks",), "got none, expected a list of tasks, or `split` to make them; add one"
    names = [task.name for task in spec.tasks or () if task.name is not None]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ("tasks",), f"got the name {name!r} twice, expected unique names; rename one"
    if spec.split is None:
        return
    split = spec.split
    labelled = spec.kind is None or KINDS[spec.kind].labelled
    if split.by in _SPLITTERS and split.tasks is None:
        yield ("split", "tasks"), "is missing, expected the number of tasks; add it"
    if split.by == "label" and not labelled:
        yield (
            ("split", "by"),
            f"got 'label', but {spec.kind} has none; divide by rows or by a column",
        )
    if split.blur and split.by != "label":
        yield ("split", "blur"), f"got {split.blur} with by {split.by!r}, expected by: label"
    elif split.blur and spec.scenario not in (None, "blurry"):
        yield (
            ("split", "blur"),
            f"got {split.blur} in a {spec.scenario} stream, expected scenario: blurry; change one",
        )


def _orders(spec: StreamSpec) -> Iterator[Fault]:
    names = [task.name for task in spec.tasks or () if task.name is not None]
    lists: list[tuple[Path, tuple[str, ...]]] = [
        (("orders", key), order) for key, order in (spec.orders or {}).items()
    ]
    if isinstance(spec.order, tuple):
        lists.append((("order",), spec.order))
    elif spec.order not in ("listed", "seed", *(spec.orders or ())):
        known = ["listed", "seed", *(spec.orders or ())]
        hint = nearest(spec.order, known) or " choose one"
        yield ("order",), f"got {spec.order!r}, expected one of {', '.join(known)};{hint}"
    for path, order in lists:
        for name in order:
            if name not in names:
                hint = nearest(name, names) or " leave it out"
                yield path, f"got {name!r}, expected names of tasks: {', '.join(names)};{hint}"


def _task(task: TaskSpec, base: FilePath | None) -> Iterator[Fault]:
    yield from _source(task, base)
    yield from _roles(task, base)
    if task.kind is None:
        yield ("kind",), f"is missing, expected one of {', '.join(KINDS)}; add it"
        return
    kind = KINDS[task.kind]
    if task.metric is not None and task.metric not in kind.metrics:
        yield (
            ("metric",),
            f"got {task.metric!r}, expected one of {', '.join(kind.metrics)} for {task.kind}; "
            "choose one",
        )
    fields = (*kind.fields, *kind.optional)
    given = [] if task.columns is None else sorted(task.columns.model_dump(exclude_none=True))
    for field in given:
        if field not in fields:
            yield (
                ("columns", field),
                f"is no field of {task.kind}, expected some of {', '.join(fields)}; leave it out",
            )
    if not kind.labelled:
        for key in ("labels", "drop"):
            if getattr(task, key) is not None:
                yield (key,), f"is for tasks with labels, but {task.kind} has none; leave it out"
    yield from _prompt(task)


def _prompt(task: TaskSpec) -> Iterator[Fault]:
    kind = KINDS[task.kind or ""]
    if task.prompt is None:
        return
    asked = templates.names(task.prompt)
    if task.kind == "image-text":
        if asked != ["label"]:
            yield ("prompt",), f"got {task.prompt!r}, expected {{label}} in it, once, and no other"
    elif not kind.prompted:
        yield ("prompt",), f"is for language models, but {task.kind} has none; leave it out"
    elif not asked:
        yield ("prompt",), f"got {task.prompt!r}, expected columns in it; write {{text}} or others"


def _source(task: TaskSpec, base: FilePath | None) -> Iterator[Fault]:
    if task.hub is not None:
        if task.path is not None:
            yield ("path",), "stands beside `hub`, expected one of the two; leave one out"
        for key in ("format", "header", "sample_by"):
            if getattr(task, key) is not None:
                yield (key,), "is for files, but the data come from `hub`; leave it out"
        return
    for key in ("config", "revision"):
        if getattr(task, key) is not None:
            yield (key,), "is for a data set of the hub, but `hub` is missing; leave it out"
    if task.path is not None:
        yield from _exists(("path",), task.path, base, task)
    elif not any(part.source for part in task.roles.values()):
        yield (
            ("path",),
            "is missing, expected where the data are: `path`, `hub`, or a file for each role; "
            "add one",
        )
    else:
        for role, part in task.roles.items():
            if part.source is None:
                yield (role, "from"), "is missing, expected a file; add it, or give a `path`"
            else:
                yield from _exists((role,), part.source, base, task)


def _relative(task: TaskSpec) -> list[str]:
    """The paths of a task that need a folder to start from."""
    files = [] if task.path is not None else [part.source for part in task.roles.values()]
    names = [] if task.hub is not None else [task.path, *files]
    return [name for name in names if name is not None and not FilePath(name).is_absolute()]


def _exists(key: Path, name: str, base: FilePath | None, task: Common) -> Iterator[Fault]:
    if base is None and not FilePath(name).is_absolute():
        return
    path = (base or FilePath()) / name
    files = found_at(path)
    if not files:
        near = _neighbour(path)
        yield key, f"got {name!r}, but {path} does not exist;{near or ' correct the path'}"
        return
    if task.format is None and any(format_of(file) is None for file in files):
        yield (
            key,
            f"got {name!r}, whose ending says no format; add format: {', '.join(FORMATS[:-1])}",
        )


def _neighbour(path: FilePath) -> str:
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [other.name for other in path.parent.iterdir()])


def _roles(task: TaskSpec, base: FilePath | None) -> Iterator[Fault]:
    sources: dict[str, list[tuple[str, Part]]] = {}
    for role, part in task.roles.items():
        source = source_of(task, role, part, base)
        # "./rows.csv" is "rows.csv".
        source = source if task.hub is not None else str(FilePath(source))
        sources.setdefault(source, []).append((role, part))
        if task.hub is not None and part.fraction is not None and part.source is None:
            yield (
                (role,),
                f"got the fraction {part.fraction:g} of no split; write "
                f"{{from: train, fraction: {part.fraction:g}}}",
            )
    for parts in sources.values():
        roles = ", ".join(role for role, _ in parts)
        whole = [role for role, part in parts if part.fraction is None]
        total = sum(part.fraction or 0 for _, part in parts)
        if len(parts) > 1 and whole:
            yield (
                (whole[-1],),
                f"reads the same rows as others ({roles}), expected rows of its own; give each of "
                "them a fraction",
            )
        elif total > 1 + 1e-9:
            yield (
                (parts[-1][0],),
                f"fractions of one source ({roles}) add up to {total:g}, expected at most 1; "
                "lower one",
            )
    if task.kind is not None and not KINDS[task.kind].labelled:
        for role, part in task.roles.items():
            if part.per_class is not None:
                yield (
                    (role, "per_class"),
                    f"is for tasks with labels, but {task.kind} has none; use rows",
                )


def source_of(task: TaskSpec, role: str, part: Part, base: FilePath | None) -> str:
    """What a role reads: a split, a file or an entry of the folder; "" is the path itself."""
    if part.source is not None:
        return part.source
    if task.hub is not None:
        return role
    folder = task.path is not None and ((base or FilePath()) / task.path).is_dir()
    return role if folder and part.fraction is None else ""
