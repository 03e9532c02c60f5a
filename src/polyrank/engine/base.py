"""Base models: one's own, one from disk, or a small one made from a stream's pretraining data."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging

from polyrank.engine.data import TaskRows, batches
from polyrank.engine.progress import Watch
from polyrank.errors import ConfigError, RunError
from polyrank.frame import keyed, seed_of
from polyrank.streams import Stream, Task

# Where the classifier of an image or sequence model sits, most common name first.
CLASSIFIERS = ("classifier", "score", "fc", "head")
EPOCHS, BATCH, RATE = 40, 32, 1e-3


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
            for batch in batches(rows, BATCH, seed=seed_of(seed, "base", epoch)):
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
        for batch in batches(rows, size):
            logits = model(pixel_values=batch["pixel_values"]).logits
            right += int((logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)


def load_base(path: str, stream: Stream) -> nn.Module:
    """Load an image classifier from a folder or a hub id and try it on one row of the stream.

    Raises:
        ConfigError: if it cannot be loaded, or does not take the stream's images.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        try:
            model = AutoModelForImageClassification.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            where = (
                "a folder"
                if Path(path).exists()
                else "neither a folder here nor a hub id that can be reached"
            )
            raise ConfigError(
                f"model: cannot load {path!r} ({where}): {str(error).splitlines()[0]}; "
                "pass a folder that save_pretrained wrote, or leave --model out for the embedded "
                "base"
            ) from error
    try_base(model, stream)
    return cast("nn.Module", model.eval())


def try_base(model: nn.Module, stream: Stream) -> str:
    """Run one row through a model and return the path of its classifier.

    Raises:
        ConfigError: if the model does not take the row or has no classifier that can grow.
    """
    batch = next(batches(stream[0].data["train"], 1))
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(pixel_values=batch["pixel_values"].to(device))
    except (ValueError, RuntimeError, TypeError) as error:
        shape = tuple(batch["pixel_values"].shape[1:])
        raise ConfigError(
            f"model: {type(model).__name__} does not take images of shape {shape} from stream "
            f"{stream.name!r} ({str(error).splitlines()[0]}); pass a model made for them, or leave "
            "it out for the embedded base"
        ) from error
    for name in CLASSIFIERS:
        with contextlib.suppress(AttributeError):
            if isinstance(model.get_submodule(name), nn.Linear):
                return name
    raise ConfigError(
        f"model: {type(model).__name__} has no linear classifier under {', '.join(CLASSIFIERS)}; "
        "pass a model for image classification"
    )


def describe(model: nn.Module, source: str) -> dict[str, Any]:
    """Return what identifies a base model in run.json."""
    config = getattr(model, "config", None)
    return {
        "source": source,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "type": getattr(config, "model_type", None),
    }


def save(model: nn.Module, folder: Path) -> None:
    """Write a base model, so that adapters of the run can be loaded onto it again."""
    if isinstance(model, PreTrainedModel):
        aside = folder.with_name(folder.name + ".part")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            model.save_pretrained(str(aside))
        finally:
            if shown:
                logging.enable_progress_bar()
        aside.replace(folder)
