"""Numbers and formulas as text."""

import math
from collections.abc import Sequence


def fraction(value: float | None, digits: int = 3, missing: str = "–") -> str:
    """0.842, with a true minus sign; `missing` for NaN and None."""
    if value is None or math.isnan(value):
        return missing
    # Rounding first, so that no "−0.000" is printed.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def short(value: float) -> str:
    """Two digits for a cell: .84, 1, 0; empty for NaN."""
    if math.isnan(value):
        return ""
    text = f"{value:.2f}"
    return {"1.00": "1", "0.00": "0"}.get(text, text.removeprefix("0"))


def clipped(text: str, length: int) -> str:
    """The text, cut to `length` letters with an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def trimmed(paths: Sequence[str]) -> list[str]:
    """Layer paths without what all of them share at the front, but for one part of it.

    What has no dots, such as a row of means, is no path and stays as it is.
    """
    split = [path.split(".") for path in paths if "." in path]
    shared = 0
    while len(split) > 1 and all(
        len(parts) > shared + 1 and parts[shared] == split[0][shared] for parts in split
    ):
        shared += 1
    first = max(0, shared - 1)
    return [".".join(path.split(".")[first:]) if "." in path else path for path in paths]


def whole(value: int | None) -> str:
    """12 345 with thin spaces between thousands."""
    return "–" if value is None else f"{value:,}".replace(",", "\u2009")


def seconds(value: float | None) -> str:
    """A duration: 3.2 s, 2 min 05 s, 1 h 20 min."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60:02d} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60:02d} min"


def formula(text: str) -> list[tuple[str, str]]:
    """Split `AA_k = (1/k) Σ_{j≤k} a_{k,j}` into (text, place), place "", "sub" or "sup"."""
    parts, plain, i = [], "", 0
    while i < len(text):
        if text[i] not in "_^":
            plain += text[i]
            i += 1
            continue
        place = "sub" if text[i] == "_" else "sup"
        inner, i = _argument(text, i + 1)
        parts += [(plain, ""), (inner, place)]
        plain = ""
    return [part for part in [*parts, (plain, "")] if part[0]]


def _argument(text: str, start: int) -> tuple[str, int]:
    if text[start : start + 1] == "{":
        depth, end = 1, start + 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        return text[start + 1 : end - 1], end
    end = start
    while end < len(text) and text[end].isalnum():
        end += 1
    return text[start:end], end
