"""What the GPU benchmarks share: systems under test, timing in rounds, tables with their origin."""

import csv
import datetime
import os
import platform
import random
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import polyrank
from polyrank.frame import seed_of


class NaiveMixture(nn.Module):
    """A mixture of single ranks as one would first write it: five passes over (tokens, ranks)."""

    def __init__(self, base, r, k):
        super().__init__()
        d, n = base.in_features, base.out_features
        make = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.base, self.k = base, k
        self.A = nn.Parameter(torch.randn(r, d, **make) / d**0.5)
        self.B = nn.Parameter(torch.randn(n, r, **make) / r)
        self.router = nn.Parameter(torch.randn(r, d, **make) / d**0.5)

    def forward(self, x):
        """Return the base output plus the k best ranks, weighed by a router."""
        h, z = F.linear(x, self.A), F.linear(x, self.router)
        v, index = z.float().sigmoid().topk(self.k, dim=-1)
        v = self.k * v / v.sum(-1, keepdim=True)
        g = torch.zeros_like(z, dtype=torch.float32).scatter(-1, index, v)
        return self.base(x) + F.linear((g * h).to(x.dtype), self.B) * 2.0


def filled(model, named=""):
    """The model with values in every factor that starts at zero: zeros would run faster.

    Factors are the parameters that are trained or, if given, those with `named` in their names.
    """
    found = [p for n, p in model.named_parameters() if (named in n if named else p.requires_grad)]
    if not found:
        raise SystemExit("no parameter to fill: the wrong model is measured")
    device = found[0].device
    # Drawn where they lie, and asked for all at once: many adapters are thousands of tensors.
    rng = torch.Generator(device).manual_seed(seed_of("bench", "B"))
    with torch.no_grad():
        alive = torch.stack([p.any() for p in found]).tolist()
        for p, kept in zip(found, alive, strict=True):
            if not kept:
                drawn = torch.randn(p.shape, generator=rng, device=device)
                p.copy_(drawn / p.shape[-1] ** 0.5)
    return model


def adapted(base, method, targets):
    """The base under one of our methods."""
    return filled(polyrank.adapt(base, method, target_modules=targets, seed=0))


def peft_lora(base, r, targets, *, wide):
    """The base under PEFT's LoRA, with fp32 adapters (its default) or in the dtype of the base."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets)
    return filled(get_peft_model(base, lora, autocast_adapter_dtype=wide))


class Path_:
    """Runs a function with POLYRANK_OPS set."""

    def __init__(self, path, function):
        self.path, self.function = path, function

    def __call__(self):
        before = os.environ.get("POLYRANK_OPS")
        os.environ["POLYRANK_OPS"] = self.path
        try:
            return self.function()
        finally:
            if before is None:
                del os.environ["POLYRANK_OPS"]
            else:
                os.environ["POLYRANK_OPS"] = before


def rounds_us(steps, rounds, inner):
    """Median time of each step in microseconds; a round runs all of them, in a new order."""
    for step in steps.values():
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    order, took = random.Random(0), {name: [] for name in steps}
    for _ in range(rounds):
        names = list(steps)
        order.shuffle(names)
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            steps[name]()
            start.record()
            for _ in range(inner):
                steps[name]()
            end.record()
            end.synchronize()
            took[name].append(start.elapsed_time(end) * 1e3 / inner)
    return {name: statistics.median(times) for name, times in took.items()}


def graph_of(work, repeats=1):
    """A function that replays a CUDA graph of `repeats` times the work."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                work()
    return graph.replay


def median_graph_us(work, replays=20):
    """Median time of a CUDA graph that does the work, in microseconds."""
    replay, times = graph_of(work), []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


def peak_mib(step):
    """Memory that one step needs above what stood before, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def origin():
    """Where and how figures came about."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "peft": version("peft"),
        "python": platform.python_version(),
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
    }


def save(path, rows):
    """Write rows (dicts with the same keys) with their origin."""
    about = origin()
    aside = Path(path).with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows([row | about for row in rows])
    aside.replace(path)
