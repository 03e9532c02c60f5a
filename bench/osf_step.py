r"""OSF on a Llama shape: set-up, time of a training step, and what leaks into the protected part.

    python bench/osf_step.py --shape tiny --out osf_tiny.csv
    python bench/osf_step.py --shape 1.2b --device cuda --dtype bfloat16 --batch 8 --tokens 1024 \
        --drivers gram gesvdj gesvda --out bench/results/osf_step_gpu.csv

Weights are normal draws, all linear layers of the blocks are adapted, half of each one's singular
values is protected. Rows of two kinds:

`decompose`: a driver of `parts.subspaces.decompose`. Seconds are those of one matrix of each shape
times their number, and `defect` is max|QᵀQ − I| over both sides of all shapes; 1e-6 is what the
method promises in fp32. `set-up` is the whole adapter as it is made, with the default driver.

`step`: a whole update of AdamW over random tokens, and its part behind backward (rules and
optimiser). `leak` is ‖U_hᵀΔW‖ / ‖ΔW‖ or ‖ΔW V_hᵀ‖ / ‖ΔW‖ after `updates` updates at `rate`, the
larger one over the layers of the first block; `full` trains the base weights themselves and
protects nothing. On a CPU times are processor time.
"""

import argparse
import csv
import datetime
import gc
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import polyrank
from polyrank.frame import keyed
from polyrank.layers.precision import exact
from polyrank.parts import subspaces

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
             "tie_word_embeddings": True},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The method's options by system; "full" is the base itself.
SYSTEMS = {
    "osf fp32": {"precision": "fp32"},
    "osf tf32": {"precision": "tf32"},
    "osf grads only": {"precision": "tf32", "reproject": False},
    "osf core": {"parametrisation": "core"},
    "full": None,
}
NUMBERS = {"batch": 2, "tokens": 32, "updates": 20, "warm": 5}
HEAD = ["kind", "name", "seconds", "step_ms", "update_ms", "leak", "defect", "trained", "peak_mib"]


class Clock:
    """Waits for the device and tells the time; processor time on a CPU."""

    def __init__(self, device):
        self.cuda = device.startswith("cuda")

    def __call__(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() if self.cuda else time.process_time()


class Remembered:
    """Decomposes every weight once for all systems, which start from the same base."""

    def __init__(self):
        self.known, self.real = {}, subspaces.decompose

    def __call__(self, W, driver="auto"):
        key = (*W.shape, float(W.double().sum()), float(W[0, 0]))
        if key not in self.known:
            self.known[key] = self.real(W, driver)
        return self.known[key]


def base_of(args):
    """Return the model with normal weights, the same for every system."""
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=4096)
    with torch.device(args.device):
        torch.set_rng_state(keyed("osf step", "base").get_state())
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
        draw = torch.Generator(args.device).manual_seed(0)
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in TARGETS:
                W = module.weight.data
                W.copy_(torch.randn(W.shape, generator=draw, device=W.device) / W.shape[1] ** 0.5)
    model.config.use_cache = False
    return model.requires_grad_(False)


def targets_of(model):
    """Return the adapted base layers by path."""
    found = {n: m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS}
    return {n: getattr(m, "base_layer", m) for n, m in found.items()}


def decomposed(args, model, clock):
    """Yield a row for each driver: seconds for all layers, from one matrix of each shape."""
    shapes = {}
    for layer in targets_of(model).values():
        shapes.setdefault(tuple(layer.weight.shape), []).append(layer.weight)
    for driver in args.drivers:
        total, defect = 0.0, 0.0
        for shape, weights in shapes.items():
            # Once beforehand, so that libraries are loaded; a small matrix is enough for that.
            subspaces.decompose(torch.randn(shape, device=args.device)[:64, :64], driver)
            with exact(weights[0].device.type):
                begun = clock()
                U, _, V = subspaces.decompose(weights[0].float(), driver)
                total += (clock() - begun) * len(weights)
            one = torch.eye(min(shape), dtype=torch.float64, device=U.device)
            for Q in (U.mT.double(), V.double()):
                defect = max(defect, float((Q @ Q.mT - one).abs().max()))
        print(f"decompose {driver:8} {total:8.2f} s   defect {defect:.1e}", flush=True)
        yield {"kind": "decompose", "name": driver, "seconds": total, "defect": defect}


class System:
    """One model with its optimiser, rules attached."""

    def __init__(self, args, name, base, clock):
        self.name, self.clock, self.args = name, clock, args
        fused = {"fused": True} if clock.cuda else {}
        self.before, options = {}, SYSTEMS[name]
        if options is None:
            self.model = base
            layers = targets_of(base)
            for layer in layers.values():
                layer.weight.requires_grad_(True)
            first = [n for n in layers if ".0." in n]
            self.before = {n: layers[n].weight.detach().clone() for n in first}
            params = [layer.weight for layer in layers.values()]
            self.optimizer = torch.optim.AdamW(params, lr=args.rate, weight_decay=0.0, **fused)
        else:
            begun = clock()
            made = polyrank.method("osf", effective_rank=0.5, **options)
            self.model = polyrank.adapt(base, made, TARGETS, seed=0)
            self.seconds = clock() - begun
            self.optimizer = polyrank.optimizer(self.model, lr=args.rate, **fused)
            self.attachment = polyrank.attach(self.optimizer, self.model)
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self, ids):
        """Do one update; return its milliseconds, and those behind backward."""
        self.model.train()
        begun = self.clock()
        self.model(input_ids=ids, labels=ids).loss.backward()
        middle = self.clock()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ended = self.clock()
        return 1e3 * (ended - begun), 1e3 * (ended - middle)

    def changes(self):
        """Yield (W, ΔW) of the first block's layers in fp64, W as it was."""
        if self.before:
            layers = targets_of(self.model)
            for name, W in self.before.items():
                yield W.double(), layers[name].weight.detach().double() - W.double()
            return
        for view in polyrank.adapter_of(self.model).layers:
            if ".0." in view.site.path:
                A, B = view.A.detach().double(), view.B.detach().double()
                change = B @ view.core.delta().detach().double() @ A
                if view.shadow is not None:
                    A0, B0, S0 = (t.double() for t in view.shadow)
                    change = change - (B0 * S0) @ A0
                yield view.weight().double(), change

    @torch.no_grad()
    def leak(self, remembered):
        """Return the largest share of a change that lies in what is protected."""
        worst = 0.0
        for W, change in self.changes():
            U, _, V = remembered(W.float())
            k = min(W.shape) // 2
            size = torch.linalg.norm(change)
            for inside in (U[:, :k].mT.double() @ change, change @ V[:k].mT.double()):
                worst = max(worst, float(torch.linalg.norm(inside) / size))
        return worst


def stepped(args, name, remembered, clock):
    """Return rows of one system: its step, and its set-up if it has decomposed anything itself."""
    fresh = len(remembered.known)
    system = System(args, name, base_of(args), clock)
    rows, peak = [], None
    if SYSTEMS[name] is not None and len(remembered.known) > fresh:
        rows.append({"kind": "set-up", "name": "gram", "seconds": system.seconds})
        print(f"set-up {system.seconds:.2f} s for {len(remembered.known) - fresh} layers")
    vocabulary = SHAPES[args.shape]["vocab_size"]
    draw, took = keyed("osf step", "ids"), []
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.updates):
        ids = torch.randint(0, vocabulary, (args.batch, args.tokens), generator=draw)
        took.append(system.step(ids.to(args.device)))
    if clock.cuda:
        peak = torch.cuda.max_memory_allocated() / 2**20
    whole, update = (statistics.median(times) for times in zip(*took[args.warm :], strict=True))
    leak = system.leak(remembered)
    print(
        f"step {name:15} {whole:8.1f} ms   update {update:7.1f} ms   leak {leak:.1e}   "
        f"{system.trained / 1e6:.1f} M trained",
        flush=True,
    )
    rows.append({"kind": "step", "name": name, "step_ms": whole, "update_ms": update, "leak": leak,
                 "trained": system.trained, "peak_mib": peak})  # fmt: skip
    return rows


def main():
    """Measure, print, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drivers", nargs="*", choices=subspaces.DRIVERS, default=["gram", "svd"])
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock, remembered = Clock(args.device), Remembered()
    rows = []
    for row in decomposed(args, base_of(args), clock):
        rows.append(row)
        write(args, rows)
    subspaces.decompose = remembered
    for name in args.systems:
        rows += stepped(args, name, remembered, clock)
        # What is measured stands, should a later system not fit into the device or the time.
        write(args, rows)
        gc.collect()
        if clock.cuda:
            torch.cuda.empty_cache()


def write(args, rows):
    """Write the table with its origin, aside and renamed; nothing without a file."""
    if not args.out:
        return
    kind = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    words = [f"--{n} {getattr(args, n)}" for n in (*NUMBERS, "rate", "shape", "device", "dtype")]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{kind}, {args.threads} threads",
        "torch": version("torch"),
        "command": " ".join(["python bench/osf_step.py", *words]),
    }
    aside = args.out.with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*HEAD, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows([{**row, **about} for row in rows])
    aside.replace(args.out)


if __name__ == "__main__":
    main()
