"""Writes the parts of README.md that the code knows: the catalogue, between its marks.

python tools/readme.py          rewrite them
python tools/readme.py --check  exit with 1 if they are out of date
"""

import inspect
import re
import sys
from pathlib import Path

from polyrank import frame

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- catalogue -->", "<!-- end of catalogue -->"


def entries():
    """Return the registered classes, methods first, then strategies."""
    found = [frame.get(name) for name in frame.names()]
    shipped = [cls for cls in found if cls.__module__.startswith("polyrank.")]
    return sorted(shipped, key=lambda cls: (cls.kind != "method", cls.name))


def lines_of(cls):
    """Return the headings of a method's file: name to text on one line."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    found = {"": text.split("\n")[0]}
    for match in re.finditer(r"^([A-Z][a-z ]+): (.*?)(?=^[A-Z][a-z ]+: |\Z)", text, re.M | re.S):
        found[match[1]] = " ".join(match[2].split())
    return found


def catalogue():
    """Return the table in Markdown."""
    rows = ["| name | what it is | merges | status |", "|---|---|---|---|"]
    for cls in entries():
        text = lines_of(cls)
        what = text[""].partition(": ")[2].rstrip(".")
        status = text.get("Status", "unstated").rstrip(".")
        merges = (
            "–" if cls.kind == "strategy" else ", ".join(sorted({s.merges for s in cls.samples()}))
        )
        rows.append(f"| `{cls.name}` ({cls.kind}) | {what} | {merges} | {status} |")
    return "\n".join(rows)


def rendered(text):
    """Return the README with a fresh catalogue."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"README.md: the marks {BEGIN} and {END} are missing; put them back")
    return f"{before}{BEGIN}\n{catalogue()}\n{END}{after}"


def main():
    """Rewrite or check."""
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if "--check" in sys.argv and new != old:
        raise SystemExit("README.md: the catalogue is out of date; run `python tools/readme.py`")
    if "--check" not in sys.argv:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
