"""Kill runs and continue them: are final weights and matrices those of an uninterrupted run?

Each system runs once in peace. Then it is killed by SIGKILL, again and again, at random instants
and inside a save, a boundary and a job, and continued by the same call, until so many kills have
landed; a last call finishes it. Weights (SHA-256 of the saved adapter) and both matrices must be
equal. Children are forked from one process that has imported everything, so that kills land in the
run and not in imports.

    python bench/resume.py --kills 20 --out bench/results/resume.csv
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers

import polyrank as pr
from polyrank import engine
from polyrank.engine import course, machine
from polyrank.streams import digits
from polyrank.testing.streams import few_digits, tiny_vit

SYSTEMS = {
    "sequential": ("lora", {"r": 4}, ["sequential"]),
    "smora": ("smora", {"r": 8, "k": 2}, []),
    "replay": ("lora", {"r": 4}, ["replay"]),
    "ewc": ("lora", {"r": 4}, ["ewc"]),
    "olora": ("olora", {"r": 4}, []),
}
PLACES = ("save", "rename", "boundary", "job")


def go(name: str, out: Path, small: bool) -> None:
    """Make a run, or continue it."""
    method, options, strategies = SYSTEMS[name]
    stream = few_digits(rows=16, tasks=2) if small else digits()
    engine.run(
        tiny_vit() if small else tiny_vit(seed=1),
        stream,
        pr.method(method, **options),
        strategies=strategies,
        references=[],
        train={"epochs": 2 if small else 4, "batch_size": 8 if small else 32, "lr": 5e-3},
        save_every=2,
        out=out,
        progress=False,
    )


def die() -> None:
    """End this process as a kill from outside would."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(place: str, calls: int) -> None:
    """Let this process be killed at the n-th call of a place."""
    left = calls

    def counted(inner: Callable, before: bool) -> Callable:
        def wrapped(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0 and before:
                die()
            found = inner(*args, **kwargs)
            if left == 0:
                die()
            return found

        return wrapped

    if place == "save":
        # Between the two files of a checkpoint.
        from polyrank.io import checkpoints

        checkpoints.write_bytes = counted(checkpoints.write_bytes, before=False)
    elif place == "rename":
        machine.Checkpoints._clear_aside = counted(machine.Checkpoints._clear_aside, before=False)
        os.replace = counted(os.replace, before=True)
    elif place == "boundary":
        course.Course._close = counted(course.Course._close, before=calls % 2 == 0)
    else:
        pause = course.Course._job
        course.Course._job = lambda self, job, w, state: pause(self, _dying(job, calls), w, state)


def _dying(job, calls: int):
    left, step = calls, job.step

    def stepped(workshop, state):
        nonlocal left
        left -= 1
        if left == 0:
            die()
        return step(workshop, state)

    job.step = stepped
    return job


def child(work: Callable[[], None], wait: float | None) -> int:
    """Run in a fork, killed after so many seconds; return the exit status, negative for kills."""
    number = os.fork()
    if number == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    deadline = None if wait is None else time.monotonic() + wait
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(number, signal.SIGKILL)
            _, status = os.waitpid(number, 0)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)


def digest(folder: Path) -> str:
    """Checksum of the saved weights and of both matrices."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("adapters/*/*.safetensors")):
        found.update(path.read_bytes())
    for system in json.loads((folder / "results.json").read_text())["systems"]:
        kept = [system[key] for key in ("restricted", "unrestricted", "extra_samples")]
        found.update(json.dumps(kept).encode())
    return found.hexdigest()


def trial(name: str, kills: int, small: bool, scratch: Path) -> dict:
    """Run a system in peace and under fire; return a row of the table."""
    rng = random.Random(name)
    started = time.monotonic()
    assert child(lambda: go(name, scratch / "whole", small), None) == 0
    seconds = time.monotonic() - started
    landed, calls, kinds = 0, 0, dict.fromkeys((*PLACES, "instant"), 0)
    places = [p for p in PLACES if p != "job" or name == "ewc"]
    while landed < kills:
        out = scratch / f"cut-{calls}"
        # A run that was killed is continued and killed again, in another folder once it is done.
        while landed < kills:
            place = rng.choice([*places, "instant", "instant", "instant"])
            count = rng.randrange(1, {"boundary": 4, "job": 4}.get(place, 9))

            def work(place: str = place, count: int = count, out: Path = out) -> None:
                if place != "instant":
                    dying_at(place, count)
                go(name, out, small)

            wait = rng.uniform(0.02, seconds) if place == "instant" else None
            status = child(work, wait)
            calls += 1
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"{name}: ended with {status}"
            landed, kinds[place] = landed + 1, kinds[place] + 1
        assert child(lambda out=out: go(name, out, small), None) == 0
        if digest(out) != digest(scratch / "whole"):
            return {"system": name, "kills": landed, **kinds, "equal": False}
    return {"system": name, "kills": landed, **kinds, "equal": True}


def main() -> None:
    """Measure and write the table; exit 1 if any system differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS))
    parser.add_argument("--small", action="store_true", help="two tasks of 16 rows")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.systems:
        with tempfile.TemporaryDirectory() as scratch:
            row = trial(name, given.kills, given.small, Path(scratch))
        facts = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "date": date.today().isoformat(),
            "command": f"python bench/resume.py --kills {given.kills}",
        }
        rows.append({**row, **facts})
        print(row)
    if given.out:
        with open(given.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(not all(row["equal"] for row in rows))


if __name__ == "__main__":
    main()
