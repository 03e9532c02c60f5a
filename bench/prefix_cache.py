"""Times training and evaluation with and without the kept prefix, paired: a round runs both.

    python bench/prefix_cache.py --out bench/results/prefix_cache.csv

all-MiniLM-L6-v2 (6 layers of width 384; random weights of that shape if the package is missing),
fp32, plain LoRA, 64 tokens a row, AdamW. A line is one place of the adapters and one kind of work:
"step" is a forward, a backward and an update of one batch; "score" a forward without gradients;
"epoch" all rows once in training and once in evaluation. The figure that counts is the ratio of a
round, time without by time with; its median and quartiles are printed and written, and beside them
whether all trained weights had the same bits at the end. "prefill" is what keeping one row took.

Of L layers of equal cost f, k of them adapted, a step costs (L + k) f without, since the backward
of a frozen matrix costs as much as its forward, and 2 k f with: at most 2 for 2 of 6, 3.5 for 1.
"""

import argparse
import csv
import datetime
import os
import platform
import random
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

import polyrank
from polyrank.engine.encoders import (
    ENCODER,
    MeanPooledClassifier,
    MeanPooledConfig,
    minilm_classifier,
)
from polyrank.engine.prefix import PrefixReader
from polyrank.engine.reading import Reader
from polyrank.frame import keyed
from polyrank.layers import grow_head

SIZES = {"rows": 128, "batch": 32, "tokens": 64, "r": 8, "rounds": 15}
LOGITS = frozenset({"logits"})
LINEAR = r"(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
# By name: which layers are adapted.
PLACES = {
    "last two, all linear": rf".*\.layer\.[45]\.{LINEAR}",
    "last two, query and value": r".*\.layer\.[45]\.attention\.self\.(query|value)",
    "last one, all linear": rf".*\.layer\.5\.{LINEAR}",
}


class Tokens(Reader):
    """Rows of ready tokens."""

    def collate(self, rows):
        """Stack them."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def inputs(self, batch):
        """Return the tokens and their mask."""
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def model(targets, r):
    """Return an adapted classifier of ten classes; the same at each call."""
    if find_spec(ENCODER):
        base, _ = minilm_classifier()
    else:
        torch.set_rng_state(keyed("bench", "base").get_state())
        options = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = MeanPooledClassifier(MeanPooledConfig(**options, **none, num_attention_heads=12))
    found = polyrank.adapt(base, polyrank.method("lora", r=r), targets, head="classifier", seed=1)
    grow_head(found, [f"class {number}" for number in range(10)], seed=1)
    return found


def data(count, tokens):
    """Return rows of random tokens, some of them padded."""
    rng = keyed("bench", "rows")
    ids = torch.randint(1000, 30000, (count, tokens), generator=rng)
    mask = (torch.arange(tokens) < torch.randint(tokens // 2, 2 * tokens, (count, 1))).long()
    labels = torch.randint(10, (count,), generator=rng)
    names = ("input_ids", "attention_mask", "labels")
    return [
        dict(zip(names, row, strict=True)) for row in zip(ids * mask, mask, labels, strict=True)
    ]


class System:
    """One model that trains, with or without the kept prefix."""

    def __init__(self, targets, rows, args, kept):
        self.model, self.rows, self.size = model(targets, args.r), rows, args.batch
        self.reader = Tokens()
        if kept:
            self.reader = PrefixReader(Tokens(), self.model, memory=2**34, limit=2**34)
            self.reader.prefill([rows])
            assert not self.reader.reason, self.reader.reason
        groups = polyrank.parameter_groups(self.model, lr=1e-3)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        polyrank.attach(self.optimizer, self.model)

    def batch(self, number):
        """Return one batch of the epoch's order."""
        places = [(number * self.size + i) % len(self.rows) for i in range(self.size)]
        return self.reader.collate([self.rows[i] for i in places])

    def step(self, batch):
        """Train on one batch."""
        out = self.reader.forward(self.model.train(), batch, LOGITS)
        (self.reader.loss()(out, batch) / self.size).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def score(self, batch):
        """Evaluate one batch."""
        self.reader.forward(self.model.eval(), batch, LOGITS)

    def epoch(self, batch):
        """Train on all rows once, and evaluate all of them."""
        for work in (self.step, self.score):
            for number in range(len(self.rows) // self.size):
                work(self.batch(number))

    def weights(self):
        """Return what trains."""
        return [p.detach() for p in polyrank.adapter_of(self.model).trained()]


def measure(targets, rows, args):
    """Return (seconds by work, system and round; whether bits are equal; seconds of prefill)."""
    order = random.Random(0)
    systems = {kept: System(targets, rows, args, kept) for kept in (False, True)}
    seconds = {}
    for work, rounds in (("step", args.rounds), ("score", args.rounds), ("epoch", args.epochs)):
        # The first forward of a kind runs in full.
        for number in range(-2 if work != "epoch" else 0, rounds):
            kinds = [False, True]
            order.shuffle(kinds)
            for kept in kinds:
                batch = systems[kept].batch(number)
                started = time.perf_counter()
                getattr(systems[kept], work)(batch)
                took = time.perf_counter() - started
                if number >= 0:
                    seconds.setdefault((work, kept), []).append(took)
    pairs = zip(systems[False].weights(), systems[True].weights(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    return seconds, equal, systems[True].reader.kept["seconds"]


def summary(place, rows, args):
    """Yield the lines of one place of the adapters."""
    seconds, equal, prefill = measure(PLACES[place], rows, args)
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    for work in dict.fromkeys(work for work, _ in seconds):
        without, kept = seconds[work, False], seconds[work, True]
        low, ratio, high = statistics.quantiles(
            [a / b for a, b in zip(without, kept, strict=True)], n=4
        )
        times = [1e3 * statistics.median(part) for part in (without, kept)]
        per_row = 1e3 * prefill / len(rows)
        print(
            f"{place:26} {work:6} {times[0]:8.1f} ms -> {times[1]:8.1f} ms   ratio {ratio:.2f} "
            f"[{low:.2f}, {high:.2f}]   equal bits: {equal}   prefill {per_row:.1f} ms a row"
        )
        yield [place, work, *times, low, ratio, high, len(kept), equal, per_row, load]


def main():
    """Measure, print medians and quartiles, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = data(args.rows, args.tokens)
    lines = [line for place in PLACES for line in summary(place, rows, args)]
    if args.out:
        words = [f"--{name} {getattr(args, name)}" for name in (*SIZES, "epochs", "threads")]
        about = {
            "model": "all-MiniLM-L6-v2" if find_spec(ENCODER) else "random weights",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {args.threads} threads",
            "torch": version("torch"),
            "transformers": version("transformers"),
            "command": " ".join(["python bench/prefix_cache.py", *words]),
        }
        names = [
            "adapters",
            "work",
            "without_ms",
            "with_ms",
            "ratio_q1",
            "ratio_median",
            "ratio_q3",
        ]
        aside = args.out.with_suffix(".part")
        with aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, "rounds", "equal_bits", "prefill_ms_a_row", "load", *about])
            writer.writerows([[*line, *about.values()] for line in lines])
        aside.replace(args.out)


if __name__ == "__main__":
    main()
