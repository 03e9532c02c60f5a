"""Times unmerged adapters where tokens are few: one token, and a batch of many adapters.

    python bench/decode.py --out bench/results/decode.csv
    python bench/decode.py --tokens --lanes 64 --out bench/results/lanes.csv

A Llama-shaped model with random bf16 weights, no cache: a forward of one token (and of `--tokens`)
costs what its weights and its launches cost. `eager` is as a user calls it, `graph` replays a CUDA
graph, where launches cost nothing. The figure that counts is what an adapter adds to the base, as a
ratio to what PEFT's LoRA adds. `lanes`: every sample of a batch has its own adapter, by PEFT's
argument `adapter_names`; the time of a forward, as a ratio to PEFT's, and what it took to make the
adapters. Rows are written as they come.
"""

import argparse
import gc
import time

import torch
from common import Path_, filled, median_graph_us, rounds_us, save
from model_step import SYSTEMS, TARGETS, llama, system

import polyrank


def single(args):
    """Rows of one token under one adapter."""
    rows = []
    names = args.systems.split(",")
    models = {name: system(name, args)[0].eval() for name in names}
    for tokens in args.tokens:
        ids = torch.zeros(1, tokens, dtype=torch.long, device="cuda")

        def run(model, ids=ids):
            with torch.no_grad():
                return model(input_ids=ids).logits

        steps = {n: Path_(SYSTEMS[n][1], lambda m=m: run(m)) for n, m in models.items()}
        for mode in ("eager", "graph"):
            if mode == "eager":
                took = rounds_us(steps, args.rounds, 5)
            else:
                took = {name: median_graph_us(step) for name, step in steps.items()}
            for name, us in took.items():
                extra = us - took["base"]
                ratio = extra / (took["peft bf16"] - took["base"])
                rows.append(
                    {"case": f"{tokens} tokens", "mode": mode, "system": name,
                     "us": round(us, 1), "extra_us": round(extra, 1),
                     "extra_over_peft": round(ratio, 3)}
                )  # fmt: skip
                print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        if args.out:
            save(args.out, rows)
    return rows


def many(kind, args):
    """A model with an adapter for each lane."""
    from peft import LoraConfig, get_peft_model

    base, first = llama(args.lane_shape), "lane0"
    if kind == "peft bf16":
        given = LoraConfig(r=args.lane_r, lora_alpha=2 * args.lane_r, target_modules=TARGETS)
        model = get_peft_model(base, given, adapter_name=first, autocast_adapter_dtype=False)
    else:
        options = {"k": min(args.k, args.lane_r)} if kind == "smora" else {}
        method = polyrank.method(kind, r=args.lane_r, **options)
        model = polyrank.adapt(base, method, target_modules=TARGETS, adapter_name=first)
        given = model.peft_config[first]
    for i in range(1, args.lanes):
        model.add_adapter(f"lane{i}", given, autocast_adapter_dtype=kind != "peft bf16")
    return filled(model, ".lane").eval()


def lanes(args):
    """Rows of a batch whose samples each have an adapter of their own."""
    names = [f"lane{i}" for i in range(args.lanes)]
    ids = torch.zeros(args.lanes, args.lane_tokens, dtype=torch.long, device="cuda")
    rows, peft = [], None
    for kind in args.lane_systems.split(","):
        start = time.perf_counter()
        # Each adapter walks over the modules of all before it; so would the collector, in vain.
        gc.disable()
        model = many(kind, args)
        gc.enable()
        seconds = time.perf_counter() - start

        def run(model=model):
            with torch.no_grad():
                return model(input_ids=ids, adapter_names=names).logits

        # A forward of PEFT's takes half a second, and a median of few rounds is as good.
        rounds = min(args.rounds, 3) if kind == "peft bf16" else args.rounds
        us = rounds_us({kind: run}, rounds, 2)[kind]
        peft = us if kind == "peft bf16" else peft
        rows.append(
            {"case": f"{args.lanes} adapters, {args.lane_tokens} tokens each, r {args.lane_r}",
             "mode": "lanes", "system": kind, "us": round(us, 1), "extra_us": "",
             "extra_over_peft": round(us / peft, 3) if peft else "",
             "setup_seconds": round(seconds, 1)}
        )  # fmt: skip
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        if args.out:
            save(args.out, rows)
        del model, run
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.2b")
    parser.add_argument("--lane-shape", default="1.2b-4-layers")
    parser.add_argument("--systems", default="base,peft bf16,peft fp32,lora,smora")
    parser.add_argument("--lane-systems", default="peft bf16,lora,smora")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16])
    for name, default in {"r": 64, "k": 8, "rounds": 10, "lanes": 0, "lane_tokens": 1,
                          "lane_r": 16}.items():  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    if bool(args.tokens) == bool(args.lanes):
        parser.error("one table at a time: --tokens 1 16, or --tokens --lanes 64")
    if args.tokens:
        single(args)
    else:
        lanes(args)


if __name__ == "__main__":
    main()
