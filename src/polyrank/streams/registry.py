"""Streams by name."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from polyrank.errors import StreamError, nearest
from polyrank.streams.base import Stream
from polyrank.streams.digits import digits

_STREAMS: dict[str, Callable[..., Stream]] = {"digits": digits}
_FILES = (".yaml", ".yml", ".json", ".jsonl", ".csv", ".parquet", ".txt")


def names() -> list[str]:
    """The streams that `stream` knows by name."""
    return sorted(_STREAMS)


def stream(source: str | os.PathLike[str] | Stream, /, **options: Any) -> Stream:
    """A stream by its name, or the stream itself if it is one already.

    Args:
        source: A name of `names()` or a `Stream`.
        **options: Of the named stream, for example `seed=1`.

    Raises:
        StreamError: on an unknown name or option, or on a path.
    """
    known = ", ".join(names())
    if isinstance(source, Stream):
        if options:
            raise StreamError(
                f"stream {source.name!r}: got the options {sorted(options)} for a stream that is "
                "built already, expected none; build it with them"
            )
        return source
    if isinstance(source, os.PathLike) or (isinstance(source, str) and _is_path(source)):
        raise StreamError(
            f"stream: got the path {os.fspath(source)!r}, but this version reads no files; use one "
            f"of the built-in streams ({known}), or build a polyrank.streams.Stream in Python"
        )
    if not isinstance(source, str):
        raise StreamError(
            f"stream: got {type(source).__name__}, expected a name ({known}) or a Stream; "
            "build one with polyrank.streams.Stream"
        )
    if source not in _STREAMS:
        hint = nearest(source, _STREAMS) or " choose one"
        raise StreamError(f"stream: got {source!r}, expected one of: {known};{hint}")
    make = _STREAMS[source]
    accepted = list(inspect.signature(make).parameters)
    unknown = [
        f"stream {source!r}: unknown option {key!r}, expected one of {', '.join(accepted)};"
        f"{nearest(key, accepted) or ' leave it out'}"
        for key in options
        if key not in accepted
    ]
    if unknown:
        raise StreamError(unknown)
    return make(**options)


def _is_path(source: str) -> bool:
    return "/" in source or os.sep in source or source.lower().endswith(_FILES)
