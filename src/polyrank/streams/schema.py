"""What may stand in a stream's YAML file: keys, types and defaults; every fault with its key path.

A task says where its data come from, what the columns mean and how rows are split by role. What
holds for all tasks may stand beside `tasks` once; a task's own word wins.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from polyrank.errors import nearest
from polyrank.streams import templates
from polyrank.streams.kinds import KINDS, METRICS
from polyrank.streams.scenarios import HELD_OUT_ROLES, SCENARIOS, TRAINING_ROLES
from polyrank.streams.split import REMAINDERS

ROLES = (*TRAINING_ROLES, *HELD_OUT_ROLES)
FORMATS = ("json", "jsonl", "csv", "tsv", "parquet", "text", "images")
UNITS = ("line", "paragraph", "document")
Path = tuple[str | int, ...]
_TYPES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "model_attributes_type": "keys with values",
    "list_type": "a list",
    "tuple_type": "a list",
}


def refuse(message: str) -> NoReturn:
    """Raise an error that `problems` repeats word by word."""
    raise PydanticCustomError("told", "{message}", {"message": message})


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it."""
    text = raw(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def raw(value: Any) -> str:
    """A value of a label column as text, alike whether it comes from YAML, JSON, CSV or numpy."""
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        refuse(
            f"got {shown(value)}, which YAML reads from a bare yes, no, on, off, true or false; "
            "put the word in quotes"
        )
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str) or not value:
        refuse(f"got {shown(value)}, expected text; write a word, or leave the key out")
    return value


def _one_of(words: Iterable[str]) -> Callable[[str], str]:
    known = tuple(words)

    def check(value: str) -> str:
        if value not in known:
            hint = nearest(value, known) or " choose one"
            refuse(f"got {value!r}, expected one of {', '.join(known)};{hint}")
        return value

    return check


def _template(value: str) -> str:
    try:
        templates.parts(value)
    except ValueError as error:
        refuse(f"got {shown(value)}: {error}")
    return value


def _names(value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        refuse(f"got {shown(value)}, expected {what}; write [a, b, …]")
    found = tuple(map(_word, value))
    if double := sorted({name for name in found if found.count(name) > 1}):
        refuse(f"got {double[0]!r} twice, expected each once; leave one out")
    return found


def _labels(value: Any) -> tuple[str, ...] | dict[str, str]:
    if isinstance(value, dict) and value:
        return {raw(key): _word(name) for key, name in value.items()}
    return _names(value, "names in their order, or value: name for each")


def _raws(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(each, list | dict) for each in values):
        refuse(f"got {shown(value)}, expected values of a column; write [a, b, …]")
    return tuple(map(raw, values))


def _where(value: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        refuse(f"got {shown(value)}, expected column: value or column: [values]")
    return {_word(key): _raws(values) for key, values in value.items()}


def _order(value: Any) -> str | tuple[str, ...]:
    return _names(value, "names in their order") if isinstance(value, list) else _word(value)


def _part(value: Any) -> Any:
    if isinstance(value, str):
        return {"from": value}
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not 0 < value <= 1:
            refuse(
                f"got {value}, expected a share in (0, 1]; for a number of rows write "
                f"{{rows: {value}}}"
            )
        return {"fraction": float(value)}
    return value


Word = Annotated[str, BeforeValidator(_word)]
Names = Annotated[tuple[str, ...], PlainValidator(lambda v: _names(v, "names in their order"))]
Template = Annotated[str, BeforeValidator(_word), AfterValidator(_template)]
Count = Annotated[int, Field(ge=1)]


class Model(BaseModel):
    """Unknown keys are faults, and nothing is turned into something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


M = TypeVar("M", bound=Model)


class Part(Model):
    """Which rows a role gets; a word alone is `from`, a number alone `fraction`.

    Args:
        source: Split of the data set on the hub, file beside the path, or a file.
        fraction: Share of those rows, drawn by key; roles that share a source share no row.
        rows: At most so many of them, drawn by key.
        per_class: At most so many of each class, drawn by key.
    """

    source: Word | None = Field(default=None, alias="from")
    fraction: float | None = Field(default=None, gt=0, le=1)
    rows: Count | None = None
    per_class: Count | None = None


Role = Annotated[Part | None, BeforeValidator(_part)]


class Columns(Model):
    """Where a row's fields come from: a column, or a template of columns such as "{a}: {b}"."""

    text: Template | None = None
    text_pair: Template | None = None
    label: Word | None = None
    label_name: Word | None = None  # the label's name, where `label` holds a number or a code
    prompt: Template | None = None
    answer: Template | None = None
    image: Word | None = None
    target: Word | None = None


class Common(Model):
    """What a task may say, and the stream for all of them."""

    kind: Annotated[Word, AfterValidator(_one_of(KINDS))] | None = None
    hub: Word | None = None
    config: Word | None = None
    revision: Word | None = None
    path: Word | None = None
    format: Annotated[Word, AfterValidator(_one_of(FORMATS))] | None = None
    header: Names | None = None  # names of the columns, of a CSV file without a first line of them
    sample_by: Annotated[Word, AfterValidator(_one_of(UNITS))] | None = None
    columns: Columns | None = None
    labels: Annotated[tuple[str, ...] | dict[str, str] | None, PlainValidator(_labels)] = None
    drop: Annotated[tuple[str, ...] | None, PlainValidator(_raws)] = None
    where: Annotated[dict[str, tuple[str, ...]] | None, PlainValidator(_where)] = None
    prompt: Template | None = None
    metric: Annotated[Word, AfterValidator(_one_of(METRICS))] | None = None
    domain: Word | None = None
    channels: int | None = Field(default=None, ge=1, le=4)
    train: Role = None
    validation: Role = None
    test: Role = None
    forget: Role = None
    retain: Role = None
    old: Role = None
    text: Role = None

    @property
    def roles(self) -> dict[str, Part]:
        """The roles that are named, in a fixed order."""
        found = {role: getattr(self, role) for role in ROLES}
        return {role: part for role, part in found.items() if part is not None}


class TaskSpec(Common):
    """One task of the file."""

    name: Word | None = None


class Split(Model):
    """How one source is divided into tasks.

    Args:
        by: "label" (its classes are shared out), "rows" (drawn by key) or a column (its values).
        tasks: Number of tasks; for a column one for each value if left out.
        order: Of classes or values: "natural", "seed", or all of them in a list.
        seed: For "seed"; the stream's if left out. Benchmarks mostly use 1993.
        remainder: Where classes go that do not divide evenly.
        blur: Share of each class's training rows that is moved to another task, drawn by key.
    """

    by: Word = "label"
    tasks: Count | None = None
    order: Annotated[str | tuple[str, ...], PlainValidator(_order)] = "natural"
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    remainder: Annotated[Word, AfterValidator(_one_of(REMAINDERS))] = "last"
    blur: float = Field(default=0.0, ge=0, lt=1)


class Sight(Model):
    """What a method may depend on, where it differs from the scenario's choice."""

    task_id_train: bool | None = None
    task_id_test: bool | None = None
    boundary: bool | None = None
    n_tasks: bool | None = None


class StreamSpec(Common):
    """The whole file."""

    name: Word | None = None
    about: Word | None = None
    scenario: Annotated[Word, AfterValidator(_one_of(SCENARIOS))] | None = None
    tasks: list[TaskSpec] | None = None
    split: Split | None = None
    order: Annotated[str | tuple[str, ...], PlainValidator(_order)] = "listed"
    orders: dict[Word, Names] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    passes: Count | None = None
    visible: Sight | None = None
    pretraining: TaskSpec | None = None
    root: Word | None = None
    use: Word | None = None
    options: dict[str, Any] | None = None


def read(document: Any) -> tuple[StreamSpec, list[tuple[Path, str]], set[Path]]:
    """Validate a document; what is at fault is taken out, so that the rest can be checked too.

    Returns:
        (the specification, faults as (key path, message), paths that nothing more is to be said
        about).
    """
    return read_as(StreamSpec, document, "tasks", _keys)


def read_as(
    model: type[M], document: Any, example: str, keys: Callable[[Path], list[str]]
) -> tuple[M, list[tuple[Path, str]], set[Path]]:
    """Validate a document against any model, as `read` does.

    Args:
        model: what the document is to be.
        document: what was read from a file.
        example: a key that it may have, for the message if it has none.
        keys: the keys that may stand beside the last one of a key path.
    """
    if not isinstance(document, dict):
        message = f"got {shown(document)}, expected keys with values such as `{example}:`"
        return model(), [((), message)], {()}
    faults: list[tuple[Path, str]] = []
    silent: set[Path] = set()
    while found := _errors(model, document):
        for fault in found:
            where, message, guess = _told(fault, keys)
            if any(key[: len(where)] == where for key, _ in faults):
                # An emptied entry of a list of words or numbers is at fault again.
                twice = any(key == where for key, _ in faults)
                document = _without(document, where[:-1] if twice else where)
                continue
            faults.append((where, message))
            silent |= {where} | ({(*where[:-1], guess)} if guess else set())
            document = _without(document, where)
    return model.model_validate(document), faults, silent


def written(path: Path) -> str:
    """A key path as people write it: tasks[1].columns.label."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")


def merged(common: Common, task: TaskSpec) -> TaskSpec:
    """A task with what the stream says for all of them; columns and roles merge key by key."""
    found: dict[str, Any] = {}
    for key in Common.model_fields:
        own, shared = getattr(task, key), getattr(common, key)
        if isinstance(own, Part | Columns) and shared is not None:
            found[key] = shared.model_copy(update=own.model_dump(exclude_none=True))
        else:
            found[key] = shared if own is None else own
    for one, other in (("hub", "path"), ("path", "hub")):
        if getattr(task, one) is not None and getattr(task, other) is None:
            found[other] = None
    return TaskSpec.model_construct(name=task.name, **found)


def _errors(model: type[Model], document: Any) -> list[ErrorDetails]:
    try:
        model.model_validate(document)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def _told(fault: ErrorDetails, keys: Callable[[Path], list[str]]) -> tuple[Path, str, str]:
    where, given = tuple(fault["loc"]), fault["input"]
    if fault["type"] == "extra_forbidden":
        known = keys(where)
        guess = nearest(str(where[-1]), known)
        text = f"unknown key, expected one of {', '.join(known)}; leave it out"
        text = f"unknown key;{guess}" if guess else text
        return where, text, guess.split("'")[1] if guess else ""
    if fault["type"] == "told":
        return where, fault["msg"], ""
    if fault["type"] in _TYPES:
        return where, f"got {shown(given)}, expected {_TYPES[fault['type']]}; correct it", ""
    text = fault["msg"].replace("Input should be", "expected")
    return where, f"got {shown(given)}, {text[0].lower()}{text[1:]}; correct it", ""


def _keys(where: Path) -> list[str]:
    inside: dict[str | int, type[Model]] = {
        "columns": Columns,
        "split": Split,
        "visible": Sight,
        "pretraining": TaskSpec,
        **dict.fromkeys(ROLES, Part),
    }
    owner = where[-2] if len(where) > 1 else None
    model = TaskSpec if isinstance(owner, int) else inside.get(owner or "", StreamSpec)
    return [field.alias or name for name, field in model.model_fields.items()]


def _without(document: Any, where: Path) -> Any:
    # A copy without the entry; an entry of a list becomes an empty one, so that numbers hold.
    if not where:
        return {}
    key, rest = where[0], where[1:]
    if isinstance(document, Mapping):
        kept = dict(document)
        if rest and key in kept and isinstance(kept[key], dict | list):
            kept[key] = _without(kept[key], rest)
        else:
            kept.pop(key, None)
        return kept
    items = list(document)
    if isinstance(key, int) and key < len(items):
        nested = rest and isinstance(items[key], dict | list)
        items[key] = _without(items[key], rest) if nested else {}
    return items
