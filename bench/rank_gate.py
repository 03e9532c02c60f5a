"""Times one adapted linear layer on a GPU, beside the frozen layer and PEFT's LoRA.

    python bench/rank_gate.py --out bench/results/rank_gate.csv [--cases main,up]
    python bench/rank_gate.py --compile --out bench/results/rank_gate_compiled.csv

Forward, and forward + backward (gradients of x and of all adapter weights), in bf16, weights of the
adapters in fp32 unless said otherwise. As called, where the host may be what is slow; a row of
eight such layers, each with an input of its own, as called and by the layer: a host that turns from
forward to backward after a single layer is slower than one that works through a model; and replayed
by a CUDA graph, which is the device's time alone. A round runs every system in a new order; medians
of rounds.
The figure that counts is the time over that of the frozen layer, as a ratio to PEFT's within a run.
`--compile`: all systems under torch.compile, one graph each. `--public`: experts of another package
beside ours (see `public_mixtures.py`).
"""

import argparse
import time

import torch
from common import (
    NaiveMixture,
    Path_,
    adapted,
    filled,
    graph_of,
    peak_mib,
    peft_lora,
    rounds_us,
    save,
)
from public_mixtures import eulerforge_layer
from torch import nn

import polyrank
from polyrank.ops.rank_gate import Epilogue, naive, rank_gate

# tokens, d_in, d_out, r, k
CASES = {
    "main": (8192, 4096, 4096, 64, 8),
    "up": (8192, 4096, 11008, 64, 8),
    "down": (8192, 11008, 4096, 64, 8),
    "half": (8192, 2048, 2048, 64, 8),
    "short": (2048, 4096, 4096, 64, 8),
    "tiny": (512, 2048, 2048, 64, 8),
    "r16": (8192, 4096, 4096, 16, 4),
    "r256": (8192, 4096, 4096, 256, 16),
}

# Layers of a row, and steps in a graph.
ROW, REPEATS = 8, 4
# The eager path and experts that are looked for on the host are not to be captured everywhere.
GRAPHED = ("base", "peft bf16", "peft fp32", "naive mixture", "smora", "lora")
COMPILED = ("base", "peft bf16", "naive mixture", "smora", "lora")


def gate():
    """Refuse to time kernels that are wrong."""
    rng = torch.Generator("cuda").manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=rng, device="cuda").bfloat16()

    y, x, A, rows, B = draw(300, 512), draw(300, 256), draw(64, 256), draw(64, 256), draw(512, 64)
    e = Epilogue(kind="linear", k=8)
    found = Path_("triton", lambda: rank_gate(y, x, A, rows, B, e, 2.0)[0])().float()
    expected = naive.rank_gate(*(t.float() for t in (y, x, A, rows, B)), e, 2.0)[0]
    error = float((found - expected).norm() / expected.norm())
    if not error < 1e-2:
        raise SystemExit(f"the kernels are wrong: relative error {error}; nothing was timed")


def base_of(d, n):
    """A linear layer, the same every time."""
    rng = torch.Generator("cuda").manual_seed(1)
    layer = nn.Linear(d, n, bias=False, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.normal_(0, d**-0.5, generator=rng)
    return nn.Sequential(layer)


def row_systems(d, n, r, k):
    """The same for rows of layers."""
    targets = [str(i) for i in range(ROW)]

    def base():
        return Row(lambda: base_of(d, n))

    lora, smora = polyrank.method("lora", r=r), polyrank.method("smora", r=r, k=k)
    return {
        "base": (base(), "auto"),
        "peft bf16": (peft_lora(base(), r, targets, wide=False), "auto"),
        "peft fp32": (peft_lora(base(), r, targets, wide=True), "auto"),
        "smora eager": (adapted(base(), smora, targets), "eager"),
        "smora": (adapted(base(), smora, targets), "triton"),
        "lora eager": (adapted(base(), lora, targets), "eager"),
        "lora": (adapted(base(), lora, targets), "triton"),
    }


def systems(d, n, r, k, public=False):
    """Name → (model, POLYRANK_OPS)."""

    def base():
        return base_of(d, n)

    frozen = base().requires_grad_(False)
    lora, smora = polyrank.method("lora", r=r), polyrank.method("smora", r=r, k=k)
    found = {
        "base": (frozen, "auto"),
        "peft bf16": (peft_lora(base(), r, ["0"], wide=False), "auto"),
        "peft fp32": (peft_lora(base(), r, ["0"], wide=True), "auto"),
        "naive mixture": (filled(NaiveMixture(base()[0].requires_grad_(False), r, k)), "auto"),
        "smora eager": (adapted(base(), smora, ["0"]), "eager"),
        "smora": (adapted(base(), smora, ["0"]), "triton"),
        "lora eager": (adapted(base(), lora, ["0"]), "eager"),
        "lora": (adapted(base(), lora, ["0"]), "triton"),
    }
    if public:
        layer = eulerforge_layer(base()[0].requires_grad_(False), r)
        found["eulerforge"] = (filled(nn.Sequential(layer)), "auto")
    return found


def compiled(models):
    """The same, each to become one graph for one shape.

    A second graph, or a system that was given up and runs as Python, raises.
    """
    # Systems share code, and what was compiled for other cases counts against a limit.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return {
        name: (torch.compile(model, dynamic=False, fullgraph=True), path)
        for name, (model, path) in models.items()
        if name in COMPILED
    }


class Row(nn.Module):
    """Frozen layers beside one another."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make()[0].requires_grad_(False) for _ in range(ROW))

    def forward(self, xs):
        """Return each layer's output for its input."""
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def attach(models):
    """Give every model of ours an optimiser at hand.

    Without one a training forward waits for the device, to see whether weights changed.
    """
    for model, _ in models.values():
        if "POLYRANK" in str(getattr(model, "peft_config", "")):
            polyrank.attach(torch.optim.AdamW(polyrank.parameter_groups(model, lr=0.0)), model)


def forget(model):
    """A function that forgets which ranks were chosen, as an update does.

    A graph would else add to counts that lay in memory of before.
    """
    cores = [m for m in model.modules() if getattr(m, "counting", False)]

    def clear():
        for core in cores:
            core.taken()

    return clear


def step_of(model, xs, dy, backward):
    """A function that runs the model once, on one input after the other."""
    leaves, clear = [p for p in model.parameters() if p.requires_grad], forget(model)
    count = iter(range(10**9))

    def step():
        x = xs[next(count) % len(xs)]
        out = model(x)
        clear()
        if backward:
            out.backward(dy)
            x.grad = None
            for p in leaves:
                p.grad = None

    return step


def row_times(size, args):
    """Microseconds a layer of a training step over a row of layers, by system."""
    T, d, n, r, k = size
    models = row_systems(d, n, r, k)
    attach(models)
    xs = [torch.randn(T, d, device="cuda").bfloat16().requires_grad_() for _ in range(ROW)]
    dys = [torch.randn(T, n, device="cuda").bfloat16()] * ROW
    steps = {}
    for system, (model, path) in models.items():
        leaves = [*xs, *(p for p in model.train().parameters() if p.requires_grad)]

        clear = forget(model)

        def step(model=model, leaves=leaves, clear=clear):
            torch.autograd.backward(model(xs), dys)
            clear()
            for p in leaves:
                p.grad = None

        steps[system] = Path_(path, step)
    return {name: us / ROW for name, us in rounds_us(steps, args.rounds, 2).items()}


def measure(name, args):
    """Rows of one case."""
    T, d, n, r, k = CASES[name]
    models = systems(d, n, r, k, args.public)
    xs = [torch.randn(T, d, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
    dy = torch.randn(T, n, device="cuda").bfloat16()
    attach(models)
    if args.compile:
        models = compiled(models)
    times = {}
    for backward in (False, True):
        steps = {}
        for system, (model, path) in models.items():
            model.train()
            steps[system] = Path_(path, step_of(model, xs, dy, backward))
            start = time.perf_counter()
            steps[system]()
            torch.cuda.synchronize()
            if args.compile:
                print(f"{name:6} {system:20} compiled in {time.perf_counter() - start:.1f} s")
        times[backward] = rounds_us(steps, args.rounds, args.inner)
    peaks = {system: peak_mib(step) for system, step in steps.items()}
    graphs = {system: graph_of(steps[system], REPEATS) for system in GRAPHED if system in steps}
    none = dict.fromkeys(steps, float("nan"))
    device = none | {s: us / REPEATS for s, us in rounds_us(graphs, args.rounds, 2).items()}
    del graphs
    in_row = none if args.compile else none | row_times(CASES[name], args)
    if args.profile:
        profile(steps["smora"])
    found = {"forward": times[False], "step": times[True], "device": device, "row": in_row}
    about = dict(
        zip(("case", "tokens", "d_in", "d_out", "r", "k"), (name, *CASES[name]), strict=True)
    )
    about["mode"] = "compiled" if args.compile else "eager"
    return [row_of(system, found, peaks, about) for system in models]


def row_of(system, times, peaks, about):
    """A row of the table: times, what they are over the frozen layer's, and that as PEFT's is."""
    row = about | {"system": system, "forward_us": round(times["forward"][system], 1)}
    for what, prefix in (("step", ""), ("device", "device_"), ("row", "row_")):
        base, peft, own = (times[what][name] for name in ("base", "peft bf16", system))
        row[f"{what}_us"] = round(own, 1)
        row[f"{prefix}extra_us"] = round(own - base, 1)
        row[f"{prefix}extra_over_peft"] = round((own - base) / (peft - base), 3)
    row["peak_extra_mib"] = round(peaks[system] - peaks["base"], 1)
    print(
        "{case:6} {mode} {system:14} fwd {forward_us:7.1f}  step {step_us:7.1f}"
        "  extra {extra_us:6.1f}  /peft {extra_over_peft:5.2f}"
        "  device {device_us:6.1f} +{device_extra_us:6.1f}  /peft {device_extra_over_peft:5.3f}"
        "  row {row_us:6.1f}  /peft {row_extra_over_peft:5.3f}"
        "  mem {peak_extra_mib:6.1f}".format(**row),
        flush=True,
    )
    return row


def profile(step):
    """Print the GPU's kernels of one step, in their order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    for event in events[-(len(events) // 3) :]:
        print(f"   {event.time_range.elapsed_us():7.1f} us  {event.name[:90]}")


def host(args):
    """Print what the host does in a step on so few tokens that the device has nothing to do."""
    import cProfile
    import pstats

    x = [torch.randn(64, 512, device="cuda").bfloat16().requires_grad_()]
    dy = torch.randn(64, 512, device="cuda").bfloat16()
    a, b, W = (torch.randn(512, 512, device="cuda").bfloat16() for _ in range(3))
    products = {
        "mm": lambda: torch.mm(a, W),
        "mm, out": lambda: torch.mm(a, W, out=b),
        "addmm_": lambda: b.addmm_(a, W),
        "addmm, out": lambda: torch.addmm(b, a, W, out=b),
        "baddbmm_": lambda: b[None].baddbmm_(a[None], W[None]),
        "new_empty": lambda: a.new_empty(512, 64),
        "event": lambda: torch.cuda.current_stream().record_event(),
    }
    for name, us in rounds_us(products, 10, 100).items():
        print(f"host {name:16} {us:7.1f} us")
    models = systems(512, 512, 64, 8)
    attach(models)
    for system, (model, path) in models.items():
        step = Path_(path, step_of(model.train(), x, dy, True))
        took = rounds_us({system: step}, 10, 50)[system]
        print(f"host {system:16} {took:7.1f} us a step")
        if system == "smora":
            found = cProfile.Profile()
            found.runcall(lambda step=step: [step() for _ in range(300)])
            pstats.Stats(found).sort_stats("tottime").print_stats(28)


def main():
    """Measure all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--inner", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    gate()
    if args.host:
        host(args)
        return
    rows = []
    for name in args.cases.split(","):
        rows += measure(name, args)
        torch.cuda.empty_cache()
        if args.out:
            save(args.out, rows)


if __name__ == "__main__":
    main()
