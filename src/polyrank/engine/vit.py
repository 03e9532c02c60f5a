"""The small vision transformer that streams of small images come with, trained on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from polyrank.engine.data import TaskRows, batches
from polyrank.engine.progress import Watch
from polyrank.engine.reading import ImageReader
from polyrank.errors import ConfigError, RunError
from polyrank.frame import keyed, seed_of
from polyrank.io.cache import cached
from polyrank.streams import Stream, Task
from polyrank.streams.data import fingerprint_of

EPOCHS, BATCH, RATE = 40, 32, 1e-3
READER = ImageReader()


def small_vit(classes: int, image: int = 8, channels: int = 1) -> ViTForImageClassification:
    """Return an untrained vision transformer of about 0.14 M weights.

    It has 4 layers of width 64 and patches of 2 × 2.
    """
    config = ViTConfig(
        image_size=image,
        patch_size=2,
        num_channels=channels,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    config.num_labels = classes
    return ViTForImageClassification(config)


def pretraining(stream: Stream) -> Task:
    """Return the task that a small model is trained on.

    Raises:
        ConfigError: if the stream brings none.
    """
    if stream.pretraining is None:
        raise ConfigError(
            f"model: stream {stream.name!r} brings no data to train one on; pass --model or a model"
        )
    return stream.pretraining


def steps(rows: int) -> int:
    """Return how many updates `pretrain` makes on so many rows."""
    return EPOCHS * -(-rows // BATCH)


def pretrain(stream: Stream, seed: int, watch: Watch = lambda event, fields: None) -> nn.Module:
    """Train a small model on the stream's pretraining task, on this machine, keyed by the seed.

    Raises:
        ConfigError: if the stream brings no pretraining data.
    """
    task = pretraining(stream)
    rows = TaskRows([task.data["train"]])
    total = steps(len(rows))
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(keyed("base", seed).get_state())
        model = small_vit(len(task.classes)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total)
        for epoch in range(EPOCHS):
            key = seed_of(seed, "base", epoch)
            for batch in batches(rows, BATCH, READER.collate, seed=key):
                logits = model(pixel_values=batch["pixel_values"]).logits
                loss = F.cross_entropy(logits, batch["labels"])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            done = (epoch + 1) * total // EPOCHS
            watch("step", {"step": done, "loss": float(loss.detach())})
    if not torch.isfinite(loss.detach()):
        raise RunError("base: training diverged; report this with your torch version")
    return model.eval()


def accuracy(model: nn.Module, rows: Any, size: int = 256) -> float:
    """Return the share of rows that a plain classifier gets right."""
    right = 0
    with torch.no_grad():
        for batch in batches(rows, size, READER.collate):
            logits = model(pixel_values=batch["pixel_values"]).logits
            right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def trained_vit(stream: Stream, seed: int, watch: Watch) -> nn.Module:
    """Return the small model for a stream, trained on this machine the first time it is asked for.

    Raises:
        ConfigError: if the stream brings no pretraining data.
    """
    started = time.perf_counter()
    task = pretraining(stream)
    key = {
        "rows": fingerprint_of(task.data["train"]),
        "seed": seed,
        "training": [EPOCHS, BATCH, RATE],
        "torch": torch.__version__,
    }

    def make(folder: Path) -> None:
        total = steps(len(task.data["train"]))
        watch("phase", {"system": "base", "task": task.name, "phase": "base", "total": total})
        with quiet():
            cast("Any", pretrain(stream, seed, watch)).save_pretrained(str(folder))

    folder = cached("vit", key, make)
    with quiet():
        model = ViTForImageClassification.from_pretrained(str(folder)).eval()
    fields = {"system": "base", "task": task.name, "accuracy": accuracy(model, task.data["test"])}
    watch("pretrain", {**fields, "seconds": time.perf_counter() - started})
    return cast("nn.Module", model)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
