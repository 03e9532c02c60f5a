"""How long one adapted linear layer takes, beside the frozen layer and PEFT's LoRA."""

import csv
import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from polyrank.engine.attachment import attach
from polyrank.frame import keyed, method
from polyrank.layers import adapt, parameter_groups

WARM = 3


def layer_times(
    size: int, tokens: int, r: int, k: int, rounds: int, device: str
) -> list[dict[str, str | float]]:
    """Median times of a step of every system, in microseconds; systems take turns in a round.

    Args:
        size: inputs and outputs of the layer.
        tokens: rows of x.
        r: ranks of every adapter.
        k: active ranks of smora.
        rounds: how many times every system is timed.
        device: "cpu" (fp32) or "cuda" (bf16).
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rng = keyed("bench", size, tokens)
    x = torch.randn(tokens, size, generator=rng).to(device, dtype).requires_grad_()
    dy = torch.randn(tokens, size, generator=rng).to(device, dtype)
    models = _systems(size, r, k, device, dtype)
    times: dict[str, list[list[float]]] = {name: [[], []] for name in models}
    order = random.Random(0)
    for turn in range(WARM + rounds):
        names = list(models)
        order.shuffle(names)
        for name in names:
            found = _step(models[name], x, dy, device)
            if turn >= WARM:
                for held, took in zip(times[name], found, strict=True):
                    held.append(took)
    return _rows(times, device)


def _systems(
    size: int, r: int, k: int, device: str, dtype: torch.dtype
) -> dict[str, Callable[[Tensor], Tensor]]:
    from peft import LoraConfig, get_peft_model

    def base() -> nn.Module:
        return nn.Sequential(nn.Linear(size, size, bias=False)).to(device, dtype)

    found: dict[str, nn.Module] = {"frozen layer": base().requires_grad_(False)}
    lora = LoraConfig(r=r, target_modules=["0"])
    found["PEFT LoRA"] = get_peft_model(base(), lora, autocast_adapter_dtype=False)
    for each in (method("lora", r=r), method("smora", r=r, k=k)):
        adapted: nn.Module = adapt(base(), each, target_modules=["0"], seed=0)
        attach(torch.optim.AdamW(parameter_groups(adapted, lr=0.0)), adapted)
        found[each.name] = adapted
    rng = keyed("bench", "factors")
    with torch.no_grad():
        for model in found.values():
            for p in model.parameters():
                # Zeros would run faster than numbers.
                if p.requires_grad and not p.any():
                    p.copy_(torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5)
    return {name: model.train() for name, model in found.items()}


def _step(
    model: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, device: str
) -> tuple[float, float]:
    """Microseconds of a forward, and of it with its backward."""
    started = _now(device)
    out = model(x)
    forward = _now(device) - started
    out.backward(dy)
    step = _now(device) - started
    x.grad = None
    if isinstance(model, nn.Module):
        model.zero_grad()
    return forward * 1e6, step * 1e6


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _rows(times: dict[str, list[list[float]]], device: str) -> list[dict[str, str | float]]:
    middle = {n: [statistics.median(part) for part in both] for n, both in times.items()}
    frozen, peft = middle["frozen layer"][1], middle["PEFT LoRA"][1]
    cuda = device == "cuda"
    about: dict[str, str | float] = {
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "date": datetime.date.today().isoformat(),
    }
    rows = []
    for name, (forward, step) in middle.items():
        extra = step - frozen
        ratio = round(extra / (peft - frozen), 3) if peft > frozen else float("nan")
        row: dict[str, str | float] = {"system": name, "forward_us": round(forward, 1)}
        row |= {"step_us": round(step, 1), "extra_us": round(extra, 1), "extra_over_peft": ratio}
        rows.append(row | about)
    return rows


def write_table(path: Path, rows: list[dict[str, str | float]]) -> None:
    """Write rows as CSV, aside first."""
    aside = path.with_suffix(".part")
    with aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)
