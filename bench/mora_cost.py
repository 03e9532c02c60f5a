"""What mora costs on a CPU: time against the number of ranks, and beside as many separate LoRAs.

    python bench/mora_cost.py --out bench/results/mora_cost.csv

One linear layer, forward and backward to the input and the live ranks, fp32. "ranks": a bank of
R ranks of which 16 are live. "loras": ten LoRAs of PEFT of 16 ranks each, all active together, the
last one trained, beside mora with the same 160 ranks. Rounds are paired: each runs all, in a new
order. Of every system the shortest round counts, as the machine is shared, less the frozen layer
in the same measure; `ratio` is that to PEFT's ten within a round, as median and quartiles.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import polyrank
from polyrank.frame import keyed
from polyrank.layers import append

LIVE, TASKS, SIZES = 16, 10, (16, 32, 64, 96, 128, 160)


class Layer(nn.Module):
    """One linear layer."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d, d)

    def forward(self, x):
        """Return W x + b."""
        return self.layer(x)


def base(d: int) -> nn.Module:
    """Return the layer, the same for all, its weight frozen."""
    torch.set_rng_state(keyed("mora_cost", d).get_state())
    return Layer(d).requires_grad_(False)


def bank(d: int, ranks: int) -> nn.Module:
    """Return mora with so many ranks, the last of them live, all with values."""
    method = polyrank.method("mora", preset="x-tail", r=LIVE)
    model = polyrank.adapt(base(d), method, ["layer"], seed=0)
    for number in range(ranks // LIVE):
        if number:
            append(model, LIVE, seed=number)
        with torch.no_grad():
            layer = polyrank.adapter_of(model).layers[0]
            layer.B.copy_(torch.randn(layer.B.shape, generator=keyed("values", number)))
    return model.train()


def loras(d: int) -> nn.Module:
    """Return ten LoRAs of PEFT, all active, the last one trained."""
    config = LoraConfig(r=LIVE, target_modules=["layer"], init_lora_weights=False)
    model = get_peft_model(base(d), config, adapter_name="0")
    for number in range(1, TASKS):
        model.add_adapter(str(number), config)
    model.base_model.set_adapter([str(number) for number in range(TASKS)])
    for name, param in model.named_parameters():
        param.requires_grad_(f".{TASKS - 1}." in name)
    return model.train()


def step_of(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return one forward and backward."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        torch.autograd.grad(model(x).sum(), [x, *trained])

    return step


def measure(d: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of every round by system."""
    x = torch.randn(tokens, d, generator=keyed("inputs", d)).requires_grad_()
    models = {f"ranks-{ranks}": bank(d, ranks) for ranks in SIZES}
    models = {"frozen": base(d), "loras": loras(d), **models}
    steps = {name: step_of(model, x) for name, model in models.items()}
    order, took = random.Random(0), {name: [] for name in steps}
    for number in range(rounds + 2):
        names = list(steps)
        order.shuffle(names)
        for name in names:
            started = time.perf_counter()
            steps[name]()
            if number >= 2:
                took[name].append(1e3 * (time.perf_counter() - started))
    return took


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Adapter .* was active")
    about = {
        "rounds": args.rounds,
        "tokens": args.tokens,
        "torch": version("torch"),
        "peft": version("peft"),
        "machine": f"{platform.machine()}, 1 thread",
        "date": datetime.date.today().isoformat(),
        "command": f"python bench/mora_cost.py --rounds {args.rounds}",
    }
    rows = []
    for d in args.widths:
        took = measure(d, args.tokens, args.rounds)
        frozen = min(took["frozen"])
        for name, values in took.items():
            pairs = zip(values, took["loras"], strict=True)
            low, ratio, high = statistics.quantiles([a / b for a, b in pairs], n=4)
            ranks = int(name.split("-")[1]) if "-" in name else TASKS * LIVE * (name == "loras")
            extra = min(values) - frozen
            rows.append(
                {
                    "d": d,
                    "system": name.split("-")[0],
                    "ranks": ranks,
                    "ms": round(min(values), 2),
                    "extra_ms": round(extra, 2),
                    "extra_ms_per_rank": round(extra / ranks, 4) if ranks else "",
                    "ratio_q1": round(low, 3),
                    "ratio": round(ratio, 3),
                    "ratio_q3": round(high, 3),
                    **about,
                }
            )
            print({key: rows[-1][key] for key in rows[-1] if key not in about})
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
