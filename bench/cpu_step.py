"""Times one training step of adapters on the CPU, paired: a round runs all, in a new order.

    python bench/cpu_step.py --out bench/results/cpu_step.csv

A Llama-shaped model from a config, fp32, all linear layers adapted, AdamW, next-token loss. The
figure that counts is the ratio to PEFT's LoRA of equal rank within a round; its median and
quartiles over rounds are printed and written.
"""

import argparse
import csv
import datetime
import itertools
import platform
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import polyrank
from polyrank.frame import keyed

VOCABULARY = 512
SIZES = {"d": 512, "layers": 2, "r": 64, "k": 8, "batch": 4, "tokens": 256, "rounds": 30}


def base(d, layers):
    """Return the frozen model, the same for every adapter."""
    torch.set_rng_state(keyed("bench", "base").get_state())
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=d,
        intermediate_size=int(2.75 * d),
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def systems(d, layers, r, k):
    """Yield name, model and optimiser of everything that is compared."""
    plain = base(d, layers)
    lora = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear")
    peft_model = get_peft_model(plain, lora)
    yield "peft-lora", peft_model, [p for p in peft_model.parameters() if p.requires_grad]
    for name, method in {
        "lora": polyrank.method("lora", r=r),
        "smora": polyrank.method("smora", r=r, k=k),
    }.items():
        model = polyrank.adapt(base(d, layers), method)
        yield name, model, polyrank.parameter_groups(model, lr=1e-4)


def step_of(model, parameters, ids):
    """Return a function that does one training step, its rules included."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.train()
    if not hasattr(model, "peft_config") or "POLYRANK" in str(
        model.peft_config["default"].peft_type
    ):
        polyrank.attach(optimizer, model)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args):
    """Return rows of (name, round, milliseconds, ratio to PEFT's LoRA)."""
    ids = torch.randint(0, VOCABULARY, (args.batch, args.tokens))
    steps = {n: step_of(m, p, ids) for n, m, p in systems(args.d, args.layers, args.r, args.k)}
    order = random.Random(0)
    for step in itertools.chain.from_iterable([steps.values()] * 2):
        step()
    rows = []
    for number in range(args.rounds):
        names = list(steps)
        order.shuffle(names)
        took = {}
        for name in names:
            started = time.perf_counter()
            steps[name]()
            took[name] = 1e3 * (time.perf_counter() - started)
        rows += [(n, number, took[n], took[n] / took["peft-lora"]) for n in steps]
    return rows


def main():
    """Measure, print medians and quartiles, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    summary = []
    for name in dict.fromkeys(row[0] for row in rows):
        took = statistics.median(row[2] for row in rows if row[0] == name)
        low, ratio, high = statistics.quantiles([row[3] for row in rows if row[0] == name], n=4)
        summary.append((name, took, low, ratio, high))
        print(f"{name:10} {took:8.1f} ms   ratio {ratio:.3f}  [{low:.3f}, {high:.3f}]")
    if args.out:
        words = [f"--{name} {getattr(args, name)}" for name in (*SIZES, "threads")]
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {args.threads} threads",
            "torch": version("torch"),
            "peft": version("peft"),
            "command": " ".join(["python bench/cpu_step.py", *words]),
        }
        aside = args.out.with_suffix(".part")
        with aside.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ["system", "median_ms", "ratio_q1", "ratio_median", "ratio_q3", "rounds", *about]
            )
            writer.writerows([[*row, args.rounds, *about.values()] for row in summary])
        aside.replace(args.out)


if __name__ == "__main__":
    main()
