"""A stream and a base small enough to be run in a test: real digits, few of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from polyrank.streams import Stream, digits


def few_digits(rows: int = 24, tasks: int = 3, **options: Any) -> Stream:
    """Return the digits stream with so many training rows a task and twelve test rows."""
    whole = digits(tasks=tasks, **options)
    cut = []
    for task in whole:
        sizes = {"train": rows, "validation": 8, "test": 12}
        data: dict[str, Any] = {
            role: task.data[role].take(range(min(size, len(task.data[role]))))  # type: ignore[attr-defined]
            for role, size in sizes.items()
            if role in task.data
        }
        cut.append(replace(task, data=data))
    return replace(whole, tasks=tuple(cut), general=None)


def tiny_vit(classes: int = 4, seed: int = 0) -> ViTForImageClassification:
    """Return an untrained vision transformer of two layers of width 16 for digits."""
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config.num_labels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # noqa: TID251 - a test's own model, the generator is put back
        return ViTForImageClassification(config).eval()
