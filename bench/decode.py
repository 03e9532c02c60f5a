"""Times unmerged adapters where tokens are few: one token, and a batch of many adapters.

    python bench/decode.py --out bench/results/decode.csv [--lanes 64]

A Llama-shaped model with random bf16 weights, no cache: a forward of one token (and of `--tokens`)
costs what its weights and its launches cost. `eager` is as a user calls it, `graph` replays a CUDA
graph, where launches cost nothing. The figure that counts is what an adapter adds to the base, as a
ratio to what PEFT's LoRA adds. `lanes`: every sample of a batch has its own adapter, by PEFT's
argument `adapter_names`; samples a second, as a ratio to PEFT's.
"""

import argparse

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
    return rows


def lanes(args):
    """Rows of a batch whose samples each have an adapter of their own."""
    from peft import LoraConfig, get_peft_model

    names = [f"lane{i}" for i in range(args.lanes)]
    ids = torch.zeros(args.lanes, args.lane_tokens, dtype=torch.long, device="cuda")
    rows, took = [], {}
    for kind in ("peft bf16", "lora", "smora"):
        base = llama(args.lane_shape)
        if kind == "peft bf16":
            given = LoraConfig(r=args.lane_r, target_modules=TARGETS)
            model = get_peft_model(base, given, adapter_name="lane0", autocast_adapter_dtype=False)
        else:
            options = {"k": min(args.k, args.lane_r)} if kind == "smora" else {}
            method = polyrank.method(kind, r=args.lane_r, **options)
            model = polyrank.adapt(base, method, target_modules=TARGETS, adapter_name="lane0")
            given = model.peft_config["lane0"]
        for name in names[1:]:
            model.add_adapter(name, given)
        model = filled(model).eval()

        def run(model=model):
            with torch.no_grad():
                return model(input_ids=ids, adapter_names=names).logits

        took[kind] = rounds_us({kind: run}, args.rounds, 2)[kind]
        rows.append(
            {"case": f"{args.lanes} adapters, {args.lane_tokens} tokens each, r {args.lane_r}",
             "mode": "lanes", "system": kind, "us": round(took[kind], 1), "extra_us": "",
             "extra_over_peft": round(took[kind] / took["peft bf16"], 3)}
        )  # fmt: skip
        print(*(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
        del model, run, base
        torch.cuda.empty_cache()
    return rows


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.2b")
    parser.add_argument("--lane-shape", default="1.2b-4-layers")
    parser.add_argument("--systems", default="base,peft bf16,peft fp32,lora,smora")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16])
    for name, default in {"r": 64, "k": 8, "rounds": 10, "lanes": 64, "lane_tokens": 1,
                          "lane_r": 16}.items():  # fmt: skip
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = single(args) if args.tokens else []
    torch.cuda.empty_cache()
    if args.lanes:
        rows += lanes(args)
    if args.out:
        save(args.out, rows)


if __name__ == "__main__":
    main()
