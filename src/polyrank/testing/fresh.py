"""What a saved adapter is worth: another process loads it and must give the same bits.

Many adapters share one process, since starting it costs more than loading them. Run as
`python -m polyrank.testing.fresh FOLDER`, this module is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from polyrank.frame import load_file as load_method_file
from polyrank.frame import method
from polyrank.testing.cases import Case
from polyrank.testing.models import MODELS

SECONDS = 600


def fresh_problems(cases: Iterable[Case]) -> dict[str, str]:
    """Train, save and load each case in a fresh process; return what went wrong, "" if nothing."""
    with tempfile.TemporaryDirectory(prefix="polyrank-fresh-") as folder:
        root = Path(folder)
        problems = {str(case): _told(write, case, root / str(case)) for case in cases}
        return {**problems, **_load_all(root)} if problems else {}


def _told(act: Callable[..., str], *args: Any) -> str:
    try:
        return act(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def write(case: Case, folder: Path) -> str:
    """Train a case a little, save it with its answer to one batch; return ""."""
    model = case.build()
    case.train(model)
    folder.mkdir(parents=True)
    model.save_pretrained(str(folder / "adapter"))
    found = {"answer": case.answer(model)}
    if (condition := case.conditions()) is not None:
        found["condition"] = condition
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "answer.safetensors")
    about = {
        "model": case.tiny.name,
        "name": case.method.name,
        "options": case.method.options(),
        "index": case.index,
        "file": case.file(),
        "threads": torch.get_num_threads(),
    }
    (folder / "case.json").write_text(json.dumps(about), encoding="utf-8")
    return ""


def _load_all(root: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "polyrank.testing.fresh", str(root)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if done.returncode or not (root / "problems.json").is_file():
        raise AssertionError(f"the fresh process failed:\n{done.stderr[-4000:]}")
    found: dict[str, str] = json.loads((root / "problems.json").read_text(encoding="utf-8"))
    return found


def read(folder: Path) -> str:
    """Load one saved case and compare its answer; return what differs, or ""."""
    about = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    torch.set_num_threads(about["threads"])
    if about["file"]:
        load_method_file(about["file"])
    tiny = MODELS[about["model"]]
    tensors = load_file(folder / "answer.safetensors")
    condition = tensors.get("condition")
    case = Case(
        method(about["name"], **about["options"]),
        about["index"],
        tiny,
        None if condition is None else lambda _: condition,
    )
    model = PeftModel.from_pretrained(tiny.build(), folder / "adapter").eval()
    found = case.answer(model)
    if torch.equal(found, tensors["answer"]):
        return ""
    worst = float((found - tensors["answer"]).abs().max())
    return f"the loaded adapter answers differently, by up to {worst:.3g}"


def main(root: Path) -> None:
    """Read every case below a folder and write problems.json there."""
    folders = sorted(path.parent for path in root.glob("*/case.json"))
    problems = {folder.name: _told(read, folder) for folder in folders}
    (root / "problems.json").write_text(json.dumps(problems), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
