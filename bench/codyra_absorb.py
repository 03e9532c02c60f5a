"""What ten absorbed updates lose in the storage type of the base.

    python bench/codyra_absorb.py --out bench/results/codyra_absorb.csv

Three sets of ten updates: those that codyra trained on ten tasks of digits (the five of
`domains="blocks"`, twice), the same scaled to a hundredth of the base's norm each, and random ones
of rank 8 and summed norm 3.2 in the layers of CLIP ViT-B/16's image tower, whose weights are drawn
with a standard deviation of 0.02. Each is absorbed by `polyrank.layers.absorb` into the base in
fp32 and in bf16. Loss: ‖(W_n − W_0) − Σ Δ_t‖ / ‖Σ Δ_t‖ over all adapted layers together, W_0 as the
type stores it; Frobenius norms, in fp64.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTForImageClassification

import polyrank as pr
from polyrank.frame import keyed
from polyrank.io.adapters import read_saved
from polyrank.layers import absorb
from polyrank.streams import digits

TASKS, RANKS = 10, 16
TRAIN = {"epochs": 30, "lr": 1e-3}
SUFFIX = ".lora_A.weight"
HERE = {
    "machine": platform.machine(),
    "torch": torch.__version__,
    "date": datetime.date.today().isoformat(),
}
Factors = dict[str, tuple[Tensor, Tensor]]


def ten_tasks():
    """Return the five block domains, twice."""
    stream = digits(domains="blocks", tasks=5)
    more = [
        replace(task, index=5 + i, name=f"{task.name}-again") for i, task in enumerate(stream.tasks)
    ]
    return replace(stream, tasks=(*stream.tasks, *more), general=None)


def trained(folder: Path) -> tuple[nn.Module, list[Factors]]:
    """Return the digits base and the update of every task, as codyra exported it."""
    done = pr.run(
        None, ten_tasks(), pr.method("codyra"), references=[], train=TRAIN, out=folder,
        progress=False,
    )  # fmt: skip
    found = []
    for path in done.system()["exports"].values():
        tensors = read_saved(done.path / path).tensors
        paths = [k.removesuffix(SUFFIX) for k in tensors if k.endswith(SUFFIX)]
        found.append(
            {
                key.removeprefix("base_model.model."): (
                    tensors[key + SUFFIX],
                    tensors[f"{key}.lora_B.weight"],
                )
                for key in paths
            }
        )
    return ViTForImageClassification.from_pretrained(done.path / "base"), found


def random_clip() -> tuple[nn.Module, list[Factors]]:
    """Return an image tower of CLIP's shapes with random weights, and ten random updates."""
    with torch.random.fork_rng():
        torch.set_rng_state(keyed("bench", "clip").get_state())
        model = CLIPVisionModel(CLIPVisionConfig(patch_size=16))
    rng, found = keyed("bench", "updates"), []
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for module in linear.values():
        module.weight.data.normal_(0, 0.02, generator=rng)
    for _ in range(TASKS):
        update = {
            name: (
                torch.randn(8, m.in_features, generator=rng),
                torch.randn(m.out_features, 8, generator=rng),
            )
            for name, m in linear.items()
        }
        size = norm([B @ A for A, B in update.values()])
        found.append({name: (A, B * (3.22 / size)) for name, (A, B) in update.items()})
    return model, found


def norm(parts: list[Tensor]) -> float:
    """Return the Frobenius norm of all of them together."""
    return float(torch.stack([p.double().square().sum() for p in parts]).sum().sqrt())


def absorbed(base: nn.Module, updates: list[Factors], dtype: torch.dtype) -> Iterator[dict]:
    """Absorb the updates one after the other; yield the loss after each."""
    names = {name for update in updates for name in update}
    targets = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n in names]
    method = pr.method("lora", r=RANKS, scaling=1.0)
    model = pr.adapt(base.to(dtype), method, targets, autocast_adapter_dtype=True)
    layers = {v.site.path: v for v in pr.adapter_of(model).layers}
    first = {name: v.module.dense_weight().double().clone() for name, v in layers.items()}
    asked = {name: torch.zeros_like(weight) for name, weight in first.items()}
    for count, update in enumerate(updates, 1):
        with torch.no_grad():
            for name, view in layers.items():
                view.A.zero_()
                view.B.zero_()
                if name in update:
                    A, B = update[name]
                    view.A[: len(A)] = A
                    view.B[:, : len(A)] = B
                    asked[name] += B.double() @ A.double()
        absorb(model, lossy=True)
        gaps = {
            name: view.module.dense_weight().double() - first[name] - asked[name]
            for name, view in layers.items()
        }
        wanted = list(asked.values())
        worst = max(
            float(gap.norm() / asked[name].norm())
            for name, gap in gaps.items()
            if asked[name].any()
        )
        figures = {
            "base_norm": norm(list(first.values())),
            "summed_update_norm": norm(wanted),
            "loss": norm(list(gaps.values())) / norm(wanted),
            "worst_layer": worst,
        }
        yield {"absorbed": count, **{k: f"{v:.3g}" for k, v in figures.items()}}


def main(out: Path) -> None:
    """Write the table and print its last rows."""
    with tempfile.TemporaryDirectory() as scratch:
        base, updates = trained(Path(scratch) / "run")
        folder = Path(scratch) / "base"
        base.save_pretrained(folder)
        sets = [("digits, as trained", base, updates)]
        sizes = [norm([B @ A for A, B in update.values()]) for update in updates]
        whole = norm([base.get_submodule(name).weight.detach() for name in updates[0]])
        scaled = [
            {name: (A, B * (whole / 100 / size)) for name, (A, B) in update.items()}
            for update, size in zip(updates, sizes, strict=True)
        ]
        sets.append(("digits, each 1 % of the base", base, scaled))
        sets.append(("random, CLIP ViT-B/16 image tower", *random_clip()))
        rows = []
        for name, model, found in sets:
            mean = sum(norm([B @ A for A, B in u.values()]) for u in found) / len(found)
            kept = sum(len(A) for u in found for A, _ in u.values()) / sum(map(len, found))
            state = {k: v.clone() for k, v in model.state_dict().items()}
            for dtype in (torch.float32, torch.bfloat16):
                fresh = type(model)(model.config)
                fresh.load_state_dict(state)
                about = {
                    "updates": name,
                    "base": str(dtype).removeprefix("torch."),
                    "mean_rank": round(kept, 2),
                    "mean_update_norm": f"{mean:.4g}",
                }
                rows += [{**about, **row, **HERE} for row in absorbed(fresh, found, dtype)]
                print(rows[-1])
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if row["absorbed"] in (1, 5, TASKS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    main(given.out)
