"""Memory of the process over a stream of fifteen tasks, beside the growth of the bank.

    python bench/leak.py --out bench/results/leak.csv

A vision transformer of two layers learns five form blocks of digits again and again with mora,
whose bank grows by r ranks a task. At the end of every task, after a garbage collection and after
the allocator has given back what it can, the resident size of the process and the bytes of all
banks are noted. Without a leak the former grows as the latter does; `tests/methods` holds the count
of live tensors to that within 2 %, which the resident size, kept in pages by the allocator and by
libraries, cannot show as sharply. The first tasks fill caches: growth counts from task 3 on. In the
table at r = 64 it is within 2 % of the bank's up to task 9; then the process takes 1.3 MB once, and
3 % more than the bank from there on.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import os
import platform
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import torch
from transformers import ViTConfig, ViTForImageClassification

import polyrank
from polyrank import engine
from polyrank.frame import Boundary, keyed
from polyrank.parts.boundaries import Aside
from polyrank.streams import digits

TASKS, SETTLED = 15, 3


def resident() -> int:
    """Return the resident bytes of this process, after all that can go has gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class Watched(polyrank.Strategy):
    """Notes (resident bytes, bytes of the banks) at the end of every task."""

    name = "watched"
    notes: ClassVar = []

    def boundary(self) -> Boundary:
        """Look before the method closes the task."""

        class Note(Aside):
            def finish(self, task, workshop, state) -> None:
                parts = [p for layer in workshop.adapter.layers for p in layer.bank or ()]
                held = sum(p.untyped_storage().nbytes() for p in parts)
                Watched.notes.append((resident(), held))

        return Note()


def base(width: int) -> ViTForImageClassification:
    """Return an untrained model for digits."""
    torch.set_rng_state(keyed("leak").get_state())
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=width,
        intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def main() -> None:
    """Run, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Freed blocks go back to the system at once, or the heap's holes would count as memory.
    ctypes.CDLL(None).mallopt(-3, 64 * 1024)
    whole = digits(tasks=5, domains="blocks")
    short = [{role: rows.take(range(64)) for role, rows in task.data.items()} for task in whole]
    tasks = tuple(
        replace(whole[n % 5], index=n, name=f"{n}", domain=f"{n}", data=short[n % 5])
        for n in range(TASKS)
    )
    with tempfile.TemporaryDirectory() as scratch:
        engine.run(
            base(args.width),
            replace(whole, tasks=tasks, general=None),
            polyrank.method("mora", r=args.r),
            strategies=[Watched()],
            train={"epochs": 1, "batch_size": 64, "lr": 1e-3},
            references=[],
            out=Path(scratch) / "run",
            progress=False,
        )
    about = {
        "r": args.r,
        "width": args.width,
        "torch": version("torch"),
        "machine": f"{platform.machine()}, 1 thread",
        "date": datetime.date.today().isoformat(),
        "command": f"python bench/leak.py --r {args.r} --width {args.width}",
    }
    first = Watched.notes[SETTLED - 1]
    rows = []
    for number, (size, bank) in enumerate(Watched.notes, 1):
        grown = {"grown_mb": "", "bank_grown_mb": ""}
        if number > SETTLED:
            grown = {
                "grown_mb": round((size - first[0]) / 1e6, 2),
                "bank_grown_mb": round((bank - first[1]) / 1e6, 2),
            }
        row = {"task": number, "resident_mb": round(size / 1e6, 2), "bank_mb": round(bank / 1e6, 2)}
        rows.append({**row, **grown, **about})
        print(row | grown)
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
