r"""Measures device memory: of a training step of LoRA and LoRA-SB, and of gathering gradients.

    python bench/memory.py --out bench/results/memory.csv

A Llama-shaped model in bf16, all linear layers of its blocks adapted, next-token loss over random
tokens. `step`: the most that one whole training step with AdamW takes (`peak_mib`), and what is
held between steps. `gather`: the highest that a forward and backward reach which gather Σ dyᵀ x of
every layer, beside the same forward and backward whose sums are not made (`control`); a small
vocabulary, as the highest point would else be that of the logits, where nothing is gathered.
`largest_gradient_mib` is that of one layer, in fp32: the sums may take it and a sixteenth, for wide
copies of a few tokens.
"""

import argparse
import gc

import torch
from common import filled, save
from model_step import SHAPES, TARGETS, llama

import polyrank
from polyrank.layers import adapter_of, statistics

VOCABULARY = 512
MIB = 2**20


def _ids(args, vocabulary):
    rng = torch.Generator("cuda").manual_seed(1)
    return torch.randint(0, vocabulary, (args.batch, args.tokens), device="cuda", generator=rng)


def _peak(work):
    """What a piece of work reaches, in MiB, and what is held before it."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / MIB, held / MIB


def step(args, name, options):
    """Peak of a training step under a method."""
    ids = _ids(args, SHAPES[args.shape]["vocab_size"])
    base = llama(args.shape)
    model = polyrank.adapt(base, polyrank.method(name, r=args.r, **options), TARGETS, seed=0)
    if adapter_of(model).method.starting().wants:
        batches = [{"input_ids": ids[:1], "labels": ids[:1]}] * 2
        polyrank.initialise(model, batches, rate=1e-4)
    else:
        filled(model)
    base.enable_input_require_grads()
    model.train()
    optimizer = polyrank.optimizer(model, lr=1e-6)
    attachment = polyrank.attach(optimizer, model)

    def work():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        work()
    peak, held = _peak(work)
    attachment.detach()
    return {"what": "step", "system": name, "peak_mib": round(peak), "held_mib": round(held)}


def gather(args):
    """Peaks of one batch with and without its sums."""
    SHAPES["few words"] = SHAPES[args.shape] | {"vocab_size": VOCABULARY}
    model = polyrank.adapt(llama("few words"), polyrank.method("lora-ga", r=8), TARGETS, seed=0)
    found = adapter_of(model)
    ids = _ids(args, VOCABULARY)
    batches, start = [{"input_ids": ids, "labels": ids}], found.method.starting()
    largest = max(v.site.d_in * v.site.d_out for v in found.layers) * 4 / MIB

    def work():
        statistics.gather(model, batches, None, start)

    made, rows = statistics._Taker.backward, []
    for system in ("gathering", "control", "gathering", "control"):
        if system == "control":
            statistics._Taker.backward = lambda self, view, x, dy: None
            statistics._Taker.reduced = lambda self, views: {}
        else:
            statistics._Taker.backward, statistics._Taker.reduced = made, REDUCED
        peak, held = _peak(work)
        rows.append(
            {"what": "gather", "system": system, "peak_mib": round(peak, 1),
             "held_mib": round(held, 1)}
        )  # fmt: skip
    statistics._Taker.backward, statistics._Taker.reduced = made, REDUCED
    # The first pass of each brings libraries their own memory.
    return [row | {"largest_gradient_mib": round(largest, 1)} for row in rows[2:]]


REDUCED = statistics._Taker.reduced


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.2b", choices=list(SHAPES))
    for name, default in {"r": 64, "batch": 8, "tokens": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for name, options in (("lora", {}), ("lora-sb", {"rows": 2})):
        rows.append(step(args, name, options) | {"largest_gradient_mib": ""})
        gc.collect()
        torch.cuda.empty_cache()
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    rows += gather(args)
    for row in rows[2:]:
        print(*(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.out:
        save(args.out, rows)


if __name__ == "__main__":
    main()
