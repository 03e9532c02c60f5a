"""CoDyRA beside sequential LoRA on digits, task after task, trained as its recipe does.

With its thresholds and without, at two learning rates, and with the loss among a task's own
classes; how many ranks stay, and how many their draw alone would leave.

python bench/codyra_digits.py --out bench/results/codyra_digits.csv
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine.recipe import read

RATES = (1e-3, 3e-3)
FIELDS = (
    "system", "rate", "seed", "accuracy", "forgetting", "own_accuracy", "own_forgetting",
    "kept_ranks", "drawn_ranks", "seconds",
)  # fmt: skip


def systems(options: dict[str, Any]) -> dict[str, tuple[Any, list[Any]]]:
    """Return what is compared: method and strategies."""
    codyra, free = pr.method("codyra", **options), {**options, "kappa_max": 0.0}
    return {
        "codyra": (codyra, []),
        "codyra without thresholds": (pr.method("codyra", **free), []),
        "codyra + masked": (codyra, [pr.method("masked")]),
        "sequential lora": (pr.method("lora", r=options["r"]), [pr.method("sequential")]),
        "sequential lora + masked": (pr.method("lora", r=options["r"]), [pr.method("masked")]),
    }


def measured(method: Any, strategies: list[Any], train: dict[str, Any], seed: int) -> list[str]:
    """Train through the stream once; return the figures of one row."""
    with tempfile.TemporaryDirectory() as scratch:
        result = engine.run(
            None, "digits", method, strategies=strategies, references=[], train=train, seed=seed,
            progress=False, out=Path(scratch) / "run",
        )  # fmt: skip
    entry = result.system()
    all_classes, own = (entry["metrics"][key] for key in ("unrestricted", "restricted"))
    scores = [
        part[key] for part in (all_classes, own) for key in ("average_accuracy", "forgetting")
    ]
    means = [figure["values"][-1] for figure in entry.get("figures", [])][:1]
    ranks = [mean(row[side::2]) for row in means for side in (0, 1)] or [method.r, ""]
    shown = [f"{n:.2f}" if isinstance(n, float) else str(n) for n in ranks]
    return [*(f"{score:.4f}" for score in scores), *shown, f"{entry['seconds']:.1f}"]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = read(Path(pr.__file__).parent / "recipes" / "codyra.yaml")
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        for seed in given.seeds:
            for rate in RATES:
                for name, (method, strategies) in systems(found.options).items():
                    row = measured(method, strategies, {**found.train, "lr": rate}, seed)
                    writer.writerow([name, rate, seed, *row])
                    file.flush()


if __name__ == "__main__":
    main()
