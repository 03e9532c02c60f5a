"""What the copy of a bank costs: frozen and live ranks joined at every forward, or kept in one.

    python bench/bank_copy.py --out bench/results/bank_copy.csv

A layer with frozen ranks reads torch.cat([bank, live]) of both factors. The other road keeps one
buffer of all ranks, of which the live ones are a slice: forward and backward of the operator are
the same, and nothing is copied. Prediction before measuring, for 1024 tokens, R ranks, width d in
and out: the copies move 4 R d numbers forwards, of 4 bytes, at some 10 GB/s, 1.6 R d ns; the
operator does 12 · 1024 R d operations forwards and backwards (frozen ranks give no gradient to
factors, so 8 + 4 r / R) at some 50 GFLOP/s, 170 R d ns: the copies are about one per cent of it,
and less beside the base layer, whatever d and R.

Rounds are paired: each times both, in turn first. Of every road the shortest round counts, as the
machine is shared; the saving is that of a pair, as median and quartiles; `copy` is the joining
alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from polyrank.frame import keyed
from polyrank.ops.rank_gate import Epilogue, rank_gate

R_LIVE, RANKS, TOKENS, WIDTHS = 16, 160, 1024, (64, 512, 2048)
GATE = Epilogue(kind="self", k=16, tau=0.01)


class Shared(torch.autograd.Function):
    """Hands out a buffer without a copy; its gradient's live part belongs to the live ranks."""

    @staticmethod
    def forward(ctx, live: Tensor, buffer: Tensor, dim: int) -> Tensor:
        """Return the whole buffer."""
        ctx.place = (dim, buffer.shape[dim] - live.shape[dim], live.shape[dim])
        return buffer.view_as(buffer)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Return the live part."""
        return grad.narrow(*ctx.place), None, None


def roads(d: int):
    """Return both roads as functions of the same values, and the frozen layer's own."""
    rng = keyed("bank_copy", d)
    draw = lambda *shape: torch.randn(*shape, generator=rng) / d**0.5  # noqa: E731
    x, W = draw(TOKENS, d).requires_grad_(), draw(d, d)
    A, B = draw(RANKS, d), draw(d, RANKS)
    bank = RANKS - R_LIVE
    live = [A[bank:].clone().requires_grad_(), B[:, bank:].clone().requires_grad_()]
    old = [A[:bank].clone(), B[:, :bank].clone()]

    def step(factors) -> list[Tensor]:
        y = x @ W.T
        if factors is not None:
            y = rank_gate(y, x, *factors()[:1], None, factors()[1], GATE, 1.0, bank)[0]
        return list(torch.autograd.grad(y.sum(), [x, *(live if factors is not None else [])]))

    def joined() -> tuple[Tensor, Tensor]:
        return torch.cat([old[0], live[0]]), torch.cat([old[1], live[1]], dim=1)

    def kept() -> tuple[Tensor, Tensor]:
        return Shared.apply(live[0], A, 0), Shared.apply(live[1], B, 1)

    def once(make):
        def run() -> list[Tensor]:
            pair = make()
            return step(lambda: pair)

        return run

    return {
        "joined": once(joined),
        "kept": once(kept),
        "frozen": lambda: step(None),
        "copy": lambda: list(joined()),
    }


def measure(d: int, rounds: int):
    """Return shortest times in ms and the quartiles of the saving in per cent."""
    made = roads(d)
    for ours, theirs in zip(made["joined"](), made["kept"](), strict=True):
        assert torch.equal(ours, theirs)
    took: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 3):
        for name in sorted(made, reverse=bool(number % 2)):
            started = time.perf_counter()
            made[name]()
            if number >= 3:
                took[name].append(1e3 * (time.perf_counter() - started))
    pairs = zip(took["joined"], took["kept"], strict=True)
    saved = statistics.quantiles([100 * (1 - b / a) for a, b in pairs], n=4)
    return {name: min(values) for name, values in took.items()}, saved


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "rounds": args.rounds,
        "torch": version("torch"),
        "machine": f"{platform.machine()}, 1 thread",
        "date": datetime.date.today().isoformat(),
        "command": f"python bench/bank_copy.py --rounds {args.rounds}",
    }
    rows = []
    for d in WIDTHS:
        took, (low, middle, high) = measure(d, args.rounds)
        row = {
            "d": d, "ranks": RANKS, "live": R_LIVE, "tokens": TOKENS,
            **{f"{name}_ms": round(value, 3) for name, value in took.items()},
            "copy_percent": round(100 * took["copy"] / took["joined"], 2),
            "saved_percent_q1": round(low, 2), "saved_percent": round(middle, 2),
            "saved_percent_q3": round(high, 2), **about,
        }  # fmt: skip
        rows.append(row)
        print({key: row[key] for key in row if key not in about})
    if args.out:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
