"""report.html: one self-contained file without scripts, for screens of any width, light or dark."""

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined

from polyrank.reports import words
from polyrank.reports.view import View

# The curve's drawing area, in units of its view box.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460, 270, 34, 16, 12, 34
_COLOURS = 6
# Ranks of the picture of load are painted in the accent, the opacity is the load.
_ACCENT = (22, 136, 140)


@dataclass(frozen=True)
class Line:
    """One system's curve in the view box; gaps split it into several paths."""

    label: str
    role: str
    colour: int
    paths: list[str]
    points: list[tuple[float, float, str]]
    last: float


def render(view: View) -> str:
    """The whole page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        fraction=words.fraction,
        short=words.short,
        clipped=words.clipped,
        whole=words.whole,
        seconds=words.seconds,
        formula=words.formula,
        nan=lambda value: value is None or math.isnan(value),
        flat=flat,
        strip=strip,
        trimmed=words.trimmed,
        highest=highest,
        brief=brief,
    )
    folder = resources.files("polyrank.reports") / "templates"
    style = (folder / "report.css").read_text(encoding="utf-8")
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(view=view, style=style, chart=chart(view))


def chart(view: View) -> dict[str, Any]:
    """Coordinates of the average accuracy after each task, one line per system."""
    count = len(view.tasks)

    def x(i: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + inner * ((i + 0.5) / count if count < 3 else i / (count - 1))

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value)

    lines = []
    for n, system in enumerate(view.systems):
        known = [(i, a) for i, a in enumerate(system.curve) if not math.isnan(a)]
        runs: list[list[tuple[int, float]]] = []
        for i, a in known:
            if not runs or runs[-1][-1][0] != i - 1:
                runs.append([])
            runs[-1].append((i, a))
        paths = ["M" + " L".join(f"{x(i):.1f},{y(a):.1f}" for i, a in run) for run in runs]
        points = [
            (x(i), y(a), f"{system.label}, after {view.tasks[i]}: {words.fraction(a)}")
            for i, a in known
        ]
        last = system.curve[-1]
        lines.append(Line(system.label, system.role, n % _COLOURS, paths, points, last))
    step = max(1, math.ceil(count / (8 if max(map(len, view.tasks)) < 8 else 4)))
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "base": _HEIGHT - _BOTTOM,
        "grid": [(y(v), f"{v:.2f}".rstrip("0").rstrip(".")) for v in (0, 0.25, 0.5, 0.75, 1)],
        "ticks": [(x(i), view.tasks[i], _anchor(i, count)) for i in range(0, count, step)],
        "lines": [asdict(line) for line in lines],
        "legend": sorted(
            (asdict(line) for line in lines),
            key=lambda line: -math.inf if math.isnan(line["last"]) else line["last"],
            reverse=True,
        ),
    }


def _anchor(i: int, count: int) -> str:
    # Labels at the edges stay inside the picture.
    if count < 3 or 0 < i < count - 1:
        return "middle"
    return "start" if i == 0 else "end"


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """A nested configuration as (dotted name, text) lines."""
    if isinstance(value, Mapping):
        return [
            line
            for key, item in value.items()
            for line in flat(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        return [line for i, item in enumerate(value) for line in flat(item, f"{name}[{i}]")]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(map(str, value)) or "none")]
    return [(name, "–" if value is None else str(value))]


def brief(stream: Mapping[str, Any]) -> dict[str, Any]:
    """The stream's facts, its tasks as one line each."""
    facts = {key: value for key, value in stream.items() if key != "tasks"}
    for task in stream.get("tasks", ()):
        sizes = " / ".join(f"{task[key]} {key[2:]}" for key in task if key.startswith("n_"))
        facts[f"task {task['name']}"] = sizes
    return facts


def highest(load: Sequence[Sequence[Sequence[float]]]) -> float:
    """The largest load of any rank, layer and task; 0 if none was measured."""
    values = [v for task in load for layer in task for v in layer if not math.isnan(v)]
    return max(values, default=0.0)


def strip(load: Sequence[float], highest: float) -> str:
    """One pixel per rank as a PNG data address; opaque where the load is `highest`."""
    opacity = [0 if math.isnan(v) or highest <= 0 else round(255 * v / highest) for v in load]
    pixels = b"".join(bytes((*_ACCENT, a)) for a in opacity)
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode()


def _png(row: bytes) -> bytes:
    """One row of pixels, four bytes each."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    # 8 bits a channel, colour with alpha; a row begins with its filter, 0 for none.
    header = struct.pack(">IIBBBBB", len(row) // 4, 1, 8, 6, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row, 9))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")
