"""Score by ranks: one training that selects ranks, beside LoRAs that are trained at fixed ranks.

All tasks of the digits stream are trained on at once. Every LoRA has as many updates as the stages
of the other method together.

python bench/ranks.py --method sora --out bench/results/ranks-sora.csv \
    --picture docs/images/ranks-sora.png
"""

from __future__ import annotations

import argparse
import copy
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib as mpl
import torch

import polyrank as pr
from polyrank import engine
from polyrank.engine.reading import ImageReader
from polyrank.layers import truncate
from polyrank.streams import digits

mpl.use("Agg")
from matplotlib import pyplot as plt

RANKS = (1, 2, 4, 8)
# Passes over the 616 rows, 20 updates each: the first stage, and four later ones of 80 updates.
EPOCHS, LATER, BUDGET = 6, 4, 80


class Point(NamedTuple):
    """One model: what it is, how many ranks a layer has on average, and its score."""

    system: str
    point: str
    seed: int
    ranks: float
    parameters: int
    accuracy: float
    seconds: float


def trained(
    method: Any, seed: int, epochs: int = EPOCHS
) -> tuple[Any, list[dict[str, Any]], list[int]]:
    """Return the model, the entries of everything that is evaluated, and d_in + d_out by layer."""
    with tempfile.TemporaryDirectory() as scratch:
        result = engine.run(
            None,
            "digits",
            method,
            strategies=[pr.method("joint")],
            references=[],
            train={"epochs": epochs},
            seed=seed,
            progress=False,
            out=Path(scratch) / "run",
        )
    sites = [layer.site for layer in pr.adapter_of(result.model).layers]
    entries = list(result.results["systems"])
    return result.model, entries, [site.d_in + site.d_out for site in sites]


def accuracy(entry: dict[str, Any]) -> float:
    """Return the mean accuracy over tasks, all classes competing."""
    return float(entry["metrics"]["unrestricted"]["average_accuracy"])


def lora(seed: int, epochs: int) -> Iterator[Point]:
    """Train a LoRA at every rank."""
    for r in RANKS:
        _, (entry,), widths = trained(pr.method("lora", r=r), seed, epochs)
        size, seconds = r * sum(widths), entry["seconds"]
        yield Point("lora", f"r={r}", seed, r, size, accuracy(entry), seconds)


def sora(seed: int) -> Iterator[Point]:
    """Train once, in stages; every stage is a point."""
    stages = {"schedule": "linear", "xi_max": 3e-3, "stages": LATER + 1, "stage_steps": BUDGET}
    method = pr.method("sora", r=8, xi=0.0, **stages)
    _, entries, widths = trained(method, seed)
    figure = entries[0]["figures"][0]
    columns = list(zip(*figure["values"], strict=True))
    kept = {f"stage-{number}": counts for number, counts in enumerate(columns)}
    last = f"stage-{len(columns) - 1}"
    for entry in entries:
        name = entry.get("deploy") or last
        counts = kept[name]
        size = int(sum(n * width for n, width in zip(counts, widths, strict=True)))
        yield Point("sora", name, seed, mean(counts), size, accuracy(entry), entry["seconds"])


def dylora(seed: int) -> Iterator[Point]:
    """Train once, in both modes, and evaluate every rank; cut a LoRA of 8 ranks beside it."""
    for mode in ("full", "frozen"):
        method = pr.method("dylora", r=8, mode=mode, evaluate=list(RANKS))
        _, entries, widths = trained(method, seed)
        for entry in entries:
            b = int(entry["deploy"].removeprefix("rank "))
            size, seconds = b * sum(widths), entry["seconds"]
            yield Point(f"dylora, {mode}", f"b={b}", seed, b, size, accuracy(entry), seconds)
    model, (entry,), widths = trained(pr.method("lora", r=8), seed)
    stream, reader = digits(seed), ImageReader()
    for task in stream:
        reader.see(task)
    for b in RANKS:
        part = copy.deepcopy(model)
        truncate(part, b)
        scores = [reader.score(part, task, task.data["test"], 256).unrestricted for task in stream]
        size, seconds = b * sum(widths), entry["seconds"]
        yield Point("lora, cut", f"b={b}", seed, b, size, mean(scores), seconds)


# What is measured, and how long the LoRAs beside it train: as long as it does.
METHODS = {"dylora": (dylora, EPOCHS), "sora": (sora, EPOCHS + LATER * BUDGET // 20)}


def draw(points: list[Point], path: Path) -> None:
    """Draw the score over the parameters: points for seeds, a line through their means."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for system in dict.fromkeys(point.system for point in points):
        mine = [point for point in points if point.system == system]
        names = dict.fromkeys(point.point for point in mine)
        groups = [[point for point in mine if point.point == name] for name in names]
        groups.sort(key=lambda group: mean(point.parameters for point in group))
        middle = [
            [mean(getattr(p, key) for p in g) for g in groups] for key in ("parameters", "accuracy")
        ]
        (line,) = axes.plot(*middle, marker="o", label=system)
        axes.scatter(
            [p.parameters for p in mine], [p.accuracy for p in mine], s=9, alpha=0.5,
            color=line.get_color(),
        )  # fmt: skip
    axes.set(
        xscale="log", xlabel="parameters of the kept ranks", ylabel="accuracy, all tasks at once"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure, epochs = METHODS[given.method]
    points = [p for seed in given.seeds for p in (*measure(seed), *lora(seed, epochs))]
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Point._fields)
        for p in points:
            writer.writerow(
                [*p[:3], f"{p.ranks:.3f}", p.parameters, f"{p.accuracy:.4f}", f"{p.seconds:.1f}"]
            )
    if given.picture is not None:
        draw(points, given.picture)


if __name__ == "__main__":
    main()
