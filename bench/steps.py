r"""Times a training step of AltLoRA, AltLoRA+ and ALLoRA against LoRA with AdamW, in paired rounds.

    python bench/steps.py --out bench/results/steps_cpu.csv
    python bench/steps.py --shape 1.2b --device cuda --dtype bfloat16 --batch 8 --tokens 1024 \
        --out bench/results/steps_gpu.csv

A Llama-shaped model from a config, all linear layers of its blocks adapted, next-token loss over
random tokens. A round runs every system once, in a new order; the figure that counts is the ratio
to AdamW's LoRA within a round, with its median and quartiles. `update` is the time of the rules and
the optimiser alone. On a CPU all times are processor time, to which other work on the machine adds
little; on a GPU `peak_mib` is what a step takes beyond what is held between steps.
"""

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
from transformers import LlamaConfig, LlamaForCausalLM

import polyrank
from polyrank.frame import keyed

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2,
              "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 512},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
             "tie_word_embeddings": True},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SYSTEMS = {
    "lora": ("lora", {}),
    "altlora": ("altlora", {}),
    "altlora+": ("altlora", {"plus": True}),
    "allora": ("allora", {}),
}
NUMBERS = {"r": 64, "batch": 4, "tokens": 256, "rounds": 30}


class System:
    """One adapted model with its optimiser."""

    def __init__(self, base, name, r, fused):
        method, options = SYSTEMS[name]
        made = polyrank.method(method, r=r, **options)
        self.model = polyrank.adapt(base, made, TARGETS, seed=0)
        rng = keyed("steps", "B")
        with torch.no_grad():
            for layer in polyrank.adapter_of(self.model).layers:
                # Zeros would run faster, and a Gram matrix of zeros is no case of training.
                layer.B.copy_(torch.randn(layer.B.shape, generator=rng) / layer.B.shape[1])
        options = {"fused": True} if fused else {}
        self.optimizer = polyrank.optimizer(self.model, lr=1e-6, **options)
        self.attachment = polyrank.attach(self.optimizer, self.model)

    def step(self, ids, wait, clock):
        """Do one training step; returns its milliseconds, and those of the update among them."""
        self.model.train()
        wait()
        started = clock()
        self.model(input_ids=ids, labels=ids).loss.backward()
        wait()
        middle = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        wait()
        ended = clock()
        return 1e3 * (ended - started), 1e3 * (ended - middle)


def base_of(args):
    """Return the frozen model, the same for every system."""
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=4096)
    torch.set_rng_state(keyed("steps", "base").get_state())
    with torch.device(args.device):
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, args.dtype))
    model.config.use_cache = False
    return model.requires_grad_(False)


def measure(args):
    """Return rows of (name, milliseconds, update milliseconds, ratio to lora, peak MiB)."""
    cuda = args.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    clock = time.perf_counter if cuda else time.process_time
    vocabulary = SHAPES[args.shape]["vocab_size"]
    ids = torch.randint(0, vocabulary, (args.batch, args.tokens), generator=keyed("steps", "ids"))
    ids = ids.to(args.device)
    systems, peaks = {}, {}
    for name in SYSTEMS:
        systems[name] = System(base_of(args), name, args.r, cuda)
        for _ in range(2):
            systems[name].step(ids, wait, clock)
    order, rows = random.Random(0), []
    for _ in range(args.rounds):
        names = list(systems)
        order.shuffle(names)
        took = {}
        for name in names:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            took[name] = systems[name].step(ids, wait, clock)
            if cuda:
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
        rows += [(n, *took[n], took[n][0] / took["lora"][0], peaks.get(n)) for n in systems]
    return rows


def main():
    """Measure, print medians and quartiles, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, summary = measure(args), []
    for name in SYSTEMS:
        mine = [row for row in rows if row[0] == name]
        took, update = (statistics.median(row[n] for row in mine) for n in (1, 2))
        low, ratio, high = statistics.quantiles([row[3] for row in mine], n=4)
        summary.append((name, took, update, low, ratio, high, mine[-1][4]))
        print(
            f"{name:10} {took:8.1f} ms   update {update:6.2f} ms   ratio {ratio:.3f}  "
            f"[{low:.3f}, {high:.3f}]"
        )
    if args.out:
        write(args, summary)


def write(args, summary):
    """Write the table with its origin, aside and renamed."""
    kind = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    words = [f"--{n} {getattr(args, n)}" for n in (*NUMBERS, "shape", "device", "dtype", "threads")]
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{kind}, {args.threads} threads",
        "torch": version("torch"),
        "command": " ".join(["python bench/steps.py", *words]),
    }
    head = ["system", "median_ms", "update_ms", "ratio_q1", "ratio_median", "ratio_q3", "peak_mib"]
    aside = args.out.with_suffix(".part")
    with aside.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*head, "rounds", *about])
        writer.writerows([[*row, args.rounds, *about.values()] for row in summary])
    aside.replace(args.out)


if __name__ == "__main__":
    main()
