"""What the engine costs over transformers' Trainer used by hand: the same tasks, updates, scores.

By hand: one adapted model; for each task the head grows, a fresh `polyrank.Trainer` trains, every
task seen is scored. The engine does that and writes folder, events, checkpoints, adapter.

    python bench/engine_overhead.py --rounds 11 --out bench/results/engine_overhead.csv
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

import polyrank as pr
from polyrank import engine
from polyrank.engine.data import TaskRows
from polyrank.engine.reading import ImageReader
from polyrank.engine.vit import small_vit
from polyrank.layers import grow_head
from polyrank.streams import digits

EPOCHS, BATCH, RATE = 15, 32, 3e-3


def loss_of(outputs, labels, num_items_in_batch=None):
    """Mean cross-entropy over the rows of an update."""
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    logits = outputs["logits"].float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count


def by_hand(base, stream) -> float:
    """Train and score with Trainer alone; return the last score."""
    reader = ImageReader()
    model = pr.adapt(copy.deepcopy(base), pr.method("lora", r=8), head="classifier")
    score = 0.0
    for number, task in enumerate(stream):
        grow_head(model, task.labels)
        rows = TaskRows([task.data["train"]])
        with tempfile.TemporaryDirectory() as scratch:
            trainer = pr.Trainer(
                model=model,
                args=TrainingArguments(
                    output_dir=scratch,
                    num_train_epochs=EPOCHS,
                    per_device_train_batch_size=BATCH,
                    learning_rate=RATE,
                    logging_steps=5,
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    remove_unused_columns=False,
                ),
                train_dataset=rows,
                data_collator=reader.collate,
                compute_loss_func=loss_of,
            )
            trainer.pop_callback(PrinterCallback)
            trainer.train()
        model.eval()
        for seen in list(stream)[: number + 1]:
            score = reader.score(model, seen, seen.data["test"], 256).unrestricted
    return score


def by_engine(base, stream) -> float:
    """The same by the engine."""
    with tempfile.TemporaryDirectory() as scratch:
        result = engine.run(
            base,
            stream,
            pr.method("lora", r=8),
            references=[],
            train={"epochs": EPOCHS, "batch_size": BATCH, "lr": RATE},
            out=Path(scratch) / "run",
            progress=False,
        )
    return float(result.matrix[-1, -1])


def main() -> None:
    """Measure in alternating order and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)  # noqa: TID251 - the base of both sides, drawn once
    base, stream = small_vit(4).eval(), digits()
    ratios = []
    for number in range(given.rounds + 1):
        took = {}
        for work in (by_hand, by_engine) if number % 2 else (by_engine, by_hand):
            started = time.process_time()
            work(base, stream)
            took[work.__name__] = time.process_time() - started
        # The first round warms up.
        if number:
            ratios.append(took["by_engine"] / took["by_hand"])
            print(number, {k: round(v, 3) for k, v in took.items()}, round(ratios[-1], 4))
    quartiles = statistics.quantiles(ratios, n=4)
    row = {
        "ratio": round(statistics.median(ratios), 4),
        "quartile_1": round(quartiles[0], 4),
        "quartile_3": round(quartiles[2], 4),
        "rounds": given.rounds,
        "clock": "process CPU seconds",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "date": date.today().isoformat(),
        "command": f"python bench/engine_overhead.py --rounds {given.rounds}",
    }
    print(row)
    if given.out:
        with open(given.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
