"""Starts from data on one of several processes; test_starts.py runs it once per rank."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import polyrank as pr
from polyrank.errors import ConfigError, RunError
from polyrank.layers import adapter_of
from polyrank.testing import MODELS

METHODS = {
    "ga": ("lora-ga", {"r": 1, "direction": "random"}),
    "sb": ("lora-sb", {"r": 2, "rows": 10, "eta": 0.01}),
    # All of them on the first process.
    "few": ("lora-sb", {"r": 2, "rows": 1, "eta": 0.01}),
}


def started(name, rank, world):
    """A model that was started from this rank's share of four batches."""
    method, options = METHODS[name]
    tiny = MODELS["bert"]
    model = pr.adapt(tiny.build(torch.float64), pr.method(method, **options), seed=1).double()
    # Five rows a rank, or ten alone: a batch of three and what is left of the next one.
    batches = [tiny.inputs(seed, torch.float64) for seed in range(4)]
    if method == "lora-sb":
        rows = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        share = {key: value[rank * 5 :] for key, value in rows.items()}
        batches = [{key: value[i : i + 3] for key, value in share.items()} for i in (0, 3, 6, 9)]
        batches = [batch for batch in batches if len(batch["labels"])]
    else:
        batches = batches[rank::world]
    pr.initialise(model, batches)
    return model


def refused(rank):
    """What a rank says that saw no batch, and one that did."""
    tiny = MODELS["bert"]
    model = pr.adapt(tiny.build(), pr.method("lora-ga", r=1), seed=1)
    try:
        pr.initialise(model, [tiny.inputs(0)] if rank else [])
    except ConfigError as error:
        return str(error)
    return ""


def stopped(rank):
    """What a rank says whose loss raises, and one whose own does not."""
    tiny = MODELS["bert"]
    model = pr.adapt(tiny.build(), pr.method("lora-ga", r=1), seed=1)

    def loss(model, batch):
        if rank:
            raise ValueError("no loss today")
        return model(**batch).loss

    try:
        pr.initialise(model, [tiny.inputs(0)], loss)
    except (RunError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder, rank, world):
    """Write what this rank started with."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    for name in METHODS:
        found = {}
        for view in adapter_of(started(name, rank, world)).layers:
            found[f"{view.site.path}.A"] = view.A.detach().clone()
            found[f"{view.site.path}.B"] = view.B.detach().clone()
            for key, value in view.core.named_parameters():
                found[f"{view.site.path}.core.{key}"] = value.detach().clone()
            if view.shadow is not None:
                found[f"{view.site.path}.B0"] = view.shadow[1].clone()
        save_file(found, str(folder / f"{world}-{rank}-{name}.safetensors"))
    if world > 1:
        (folder / f"{rank}.json").write_text(json.dumps([refused(rank), stopped(rank)]))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
