"""What FFN experts cost on a CPU, beside a loop over experts and beside plain LoRA.

    python bench/mixlora_cost.py --out bench/results/mixlora_cost.csv

One FFN of gate, up and down (d, 11/4 d), forward and backward to the input and all trained weights,
fp32, no losses of the router. "loop": every expert takes the tokens that chose it out of x, runs
its three layers with its own LoRA, and adds its share, as one would first write it; the updates of
the layers are read from mixlora, so that both compute the same. "lora": plain LoRA of r ranks.
Rounds are paired: each runs all, in a new order, and every system's shortest round counts, as the
machine is shared; `ratio` is that to plain LoRA within a round, as median and quartiles.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import polyrank
from polyrank.frame import keyed
from polyrank.parts.experts import Mixed


class Block(nn.Module):
    """A transformer block that is an FFN behind a norm."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=d * 11 // 4))

    def forward(self, x):
        """Return the FFN of the normalised input."""
        return self.mlp(self.norm(x))


class Net(nn.Module):
    """One block in a list, where adapters look for it."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(d)])

    def forward(self, x):
        """Return the block's output."""
        return self.layers[0](x)


def adapted(d: int, method: str, **options) -> nn.Module:
    """Return the net under a method, with values in B."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed("mixlora_cost", d).get_state())
        net = Net(d)
    model = polyrank.adapt(net, polyrank.method(method, **options), "all-linear", seed=0)
    with torch.no_grad():
        for number, layer in enumerate(polyrank.adapter_of(model).layers):
            layer.B.copy_(torch.randn(layer.B.shape, generator=keyed("B", number)) / d)
    return model.train()


class Loop(nn.Module):
    """The same mixture, expert after expert."""

    def __init__(self, model: nn.Module, k: int) -> None:
        super().__init__()
        self.model, self.k = model, k
        self.mlp = model.get_base_model().layers[0].mlp
        blocks = polyrank.adapter_of(model).blocks
        self.router = next(b for b in blocks if isinstance(b, Mixed)).router

    def expert(self, number: int, layer: nn.Module, x):
        """Return (W + s B_e A_e) x."""
        view = layer.views["default"]
        ranks = slice(number * view.site.r, (number + 1) * view.site.r)
        update = F.linear(F.linear(x, view.A[ranks]), view.B[:, ranks])
        return layer.base_layer(x) + view.scale * update

    def forward(self, x):
        """Return Σ_e ω_e E_e(x)."""
        x = self.model.get_base_model().layers[0].norm(x)
        y, mlp = torch.zeros_like(x), self.mlp
        weights, chosen = F.linear(x, self.router).topk(self.k)
        weights = weights.softmax(-1)
        for number in range(len(self.router)):
            rows, slot = (chosen == number).nonzero(as_tuple=True)
            part = x[rows]
            a = mlp.act_fn(self.expert(number, mlp.gate_proj, part))
            a = a * self.expert(number, mlp.up_proj, part)
            a = self.expert(number, mlp.down_proj, a) * weights[rows, slot, None]
            y = y.index_add(0, rows, a)
        return y


def timed(model: nn.Module, x) -> float:
    """Return the milliseconds of one forward and backward."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    model(x).sum().backward()
    return 1000 * (time.perf_counter() - started)


def rows_for(d: int, given: argparse.Namespace) -> list[dict]:
    """Measure all systems at one width."""
    experts, k, r = given.experts, given.k, given.r
    mixed = adapted(d, "mixlora", r=r, experts=experts, k=k, aux=0.0)
    systems = {
        "lora": adapted(d, "lora", r=r),
        "mixlora": mixed,
        "loop": Loop(mixed, k),
    }
    x = torch.randn(given.tokens, d, generator=keyed("x", d), requires_grad=True)
    with torch.no_grad():
        gap = (systems["loop"](x) - mixed(x)).abs().max() / mixed(x).abs().max()
    assert gap < 1e-4, f"the systems differ by {gap:.1e}"
    times: dict[str, list[float]] = {name: [] for name in systems}
    order = list(systems)
    for number in range(given.rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            took = timed(systems[name], x)
            # The first round warms up.
            times[name] += [took] if number else []
    found = []
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["lora"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found.append(
            {
                "d": d,
                "system": name,
                "experts": experts if name != "lora" else 1,
                "k": k if name != "lora" else 1,
                "r": r,
                "ms": round(min(values), 2),
                "ratio_q1": round(low, 3),
                "ratio": round(middle, 3),
                "ratio_q3": round(high, 3),
                "rounds": given.rounds,
                "tokens": given.tokens,
                "torch": version("torch"),
                "machine": f"{platform.machine()}, 1 thread",
                "date": datetime.date.today().isoformat(),
            }
        )
    return found


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rows = [row for d in given.widths for row in rows_for(d, given)]
    with given.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row["d"], row["system"], row["ms"], row["ratio"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
