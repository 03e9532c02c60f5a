"""The definitions that are shipped with polyrank: YAML files of this folder."""

from pathlib import Path

from polyrank.errors import StreamError

FOLDER = Path(__file__).parent


def ready() -> dict[str, Path]:
    """Their files by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def copy(name: str, target: Path) -> None:
    """Write a definition to a new file, to edit.

    Raises:
        StreamError: if there is no such definition, or the file exists already.
    """
    if name not in ready():
        raise StreamError(
            f"copy: {name!r} is no ready definition, expected one of {', '.join(ready())}"
        )
    text = ready()[name].read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise StreamError(f"copy: {target} exists; choose another name, or remove it") from error
    except OSError as error:
        raise StreamError(f"copy: cannot write {target}: {error.strerror}") from error
