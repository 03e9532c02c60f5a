"""Times a whole training step of a Llama-shaped model on a GPU, beside the frozen base and PEFT.

    python bench/model_step.py --out bench/results/model_step.csv [--compile] [--losses 50]

Random weights from a config, bf16, all seven projections of a block adapted, fused AdamW,
next-token loss over 8 × 1024 random tokens; embeddings ask for a gradient, so that it passes
through every layer. Systems take turns within a round; medians of rounds. `--losses` compares
losses of that many steps by kernels, without them, and by the reference. Systems of
`public_mixtures.py` need packages.
"""

import argparse
import gc
import time

import torch
from common import Path_, adapted, filled, peft_lora, rounds_us, save
from public_mixtures import ACTIVE, EXPERTS, PUBLIC
from transformers import LlamaConfig, LlamaForCausalLM

import polyrank

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
             "tie_word_embeddings": True},
    "1.2b-4-layers": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                      "tie_word_embeddings": True},
    "7b-4-layers": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4,
                    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96},
}  # fmt: skip
SYSTEMS = {
    "base": (None, "auto"),
    "peft bf16": (False, "auto"),
    "peft fp32": (True, "auto"),
    "lora": ("lora", "auto"),
    "smora": ("smora", "auto"),
    "smora eager": ("smora", "eager"),
}
# Not among those that run by default: experts of several ranks, ours and those of others.
MIXTURES = {"mixlora": ("mixlora", "auto")} | {name: (name, "auto") for name in PUBLIC}


def llama(shape):
    """The model of a shape, frozen, the same weights every time."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    rng = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02, generator=rng)
    model.config.use_cache = False
    return model.requires_grad_(False)


def options_of(kind, args):
    """Ranks of a method of ours; experts share them, and charge nothing, as the others do not."""
    if kind == "mixlora":
        r = args.r // EXPERTS
        return {"r": r, "alpha": 2.0 * r, "experts": EXPERTS, "k": ACTIVE, "aux": 0.0}
    return {"r": args.r} | ({"k": args.k} if kind == "smora" else {})


def system(name, args):
    """Model, and the optimiser's groups or None."""
    kind, _ = (SYSTEMS | MIXTURES)[name]
    base = llama(args.shape)
    if kind is None:
        model, groups = base, None
    elif isinstance(kind, bool):
        model = peft_lora(base, args.r, TARGETS, wide=kind)
        groups = [p for p in model.parameters() if p.requires_grad]
    elif kind in PUBLIC:
        model = filled(PUBLIC[kind](base, args.r, TARGETS))
        groups = [p for p in model.parameters() if p.requires_grad]
    else:
        model = adapted(base, polyrank.method(kind, **options_of(kind, args)), TARGETS)
        groups = polyrank.parameter_groups(model, lr=1e-4)
    base.enable_input_require_grads()
    return model.train(), groups


def step_of(model, groups, ids, compiled):
    """A function that does one training step and returns its loss."""
    optimizer = None if groups is None else torch.optim.AdamW(groups, lr=1e-4, fused=True)
    if optimizer and "POLYRANK" in str(getattr(model, "peft_config", "")):
        polyrank.attach(optimizer, model)
    # One shape and one graph: a second of either would be timed as if it were the first.
    run = torch.compile(model, dynamic=False) if compiled else model

    def step():
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return step


def measure(names, args, compiled):
    """Milliseconds a step and peak MiB of each system; all of them are held at once."""
    vocabulary = SHAPES[args.shape]["vocab_size"]
    rng = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, vocabulary, (args.batch, args.tokens), device="cuda", generator=rng)
    steps, peaks = {}, {}
    for name in names:
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        path = (SYSTEMS | MIXTURES)[name][1]
        steps[name] = Path_(path, step_of(*system(name, args), ids, compiled))
        for _ in range(2):
            steps[name]()
        torch.cuda.synchronize()
        print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
        torch.cuda.reset_peak_memory_stats()
        steps[name]()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    took = rounds_us(steps, args.rounds, 2)
    rows = []
    for name in names:
        ms = took[name] / 1e3
        peft, default = took.get("peft bf16", 0) / 1e3, took.get("peft fp32", 0) / 1e3
        rows.append(
            {
                "shape": args.shape, "tokens": args.batch * args.tokens, "r": args.r, "k": args.k,
                "mode": "compiled" if compiled else "eager", "system": name, "ms": round(ms, 2),
                "over_peft_bf16": round(ms / peft, 3) if peft else "",
                "over_peft_fp32": round(ms / default, 3) if default else "",
                "peak_mib": round(peaks[name]),
            }
        )  # fmt: skip
        print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def losses(args):
    """Rows of how far losses by kernels lie from the eager path's, beside a control.

    The control is the reference, whose products are made in fp32: it sums in another order and
    rounds less often than the eager path, so that its distance is what bf16 noise amounts to.
    """
    vocabulary = min(512, SHAPES[args.shape]["vocab_size"])
    rng = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, vocabulary, (2, 512), device="cuda", generator=rng)
    rows = []
    for kind in ("lora", "smora"):
        found = {}
        for path in ("eager", "naive", "triton"):
            SYSTEMS[path] = (kind, path)
            step = Path_(path, step_of(*system(path, args), ids, False))
            found[path] = torch.stack([step().detach() for _ in range(args.losses)]).float()
            del step
            gc.collect()
        for path in ("naive", "triton"):
            gap = (found["eager"] - found[path]).abs()
            rows.append(
                {
                    "shape": args.shape, "steps": args.losses, "system": kind, "path": path,
                    "first": round(found[path][0].item(), 5),
                    "last": round(found[path][-1].item(), 5),
                    "last_eager": round(found["eager"][-1].item(), 5),
                    "largest_gap": round(gap.max().item(), 5),
                    "mean_gap": round(gap.mean().item(), 6),
                }
            )  # fmt: skip
            print(*(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main():
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="1.2b", choices=list(SHAPES))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    for name, default in {"r": 64, "k": 8, "batch": 8, "tokens": 1024, "rounds": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--losses", type=int, default=0)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = losses(args) if args.losses else measure(args.systems.split(","), args, args.compile)
    if args.out:
        save(args.out, rows)


if __name__ == "__main__":
    main()
