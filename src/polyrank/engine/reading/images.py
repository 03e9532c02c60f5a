"""Images and their classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyrank.engine.reading.base import Reader, origin
from polyrank.errors import ConfigError

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Makes what a model sees of a stored image, uint8 (height, width, channels) of any size.

    First the channels become as many as the model has: a grey image gets colours, a coloured one
    loses them. Then the model's own image processor does the rest; without one the image is resized
    to (height, width) whatever its shape, bilinear with the support that shrinking needs, and
    scaled to x/127.5 − 1. Both happen on the CPU, so that pixels do not depend on the device.

    Args:
        height: of the model's input, >= 1.
        width: of the model's input, >= 1.
        channels: of the model's input, >= 1.
        processor: an image processor of transformers, or None.
    """

    height: int
    width: int
    channels: int = 3
    processor: Any = None

    def __call__(self, image: np.ndarray) -> Tensor:
        """Return float32 (channels, height, width).

        Raises:
            ConfigError: if the image is no uint8 (height, width, channels), or has channels that
                the model has no use for.
        """
        if image.ndim != 3 or image.dtype != np.uint8:
            raise ConfigError(
                f"image: got {image.dtype} of shape {image.shape}, expected uint8 (height, width, "
                "channels); convert it, or give pixel_values that are ready"
            )
        image = self._coloured(image)
        if self.processor is None:
            return self._plain(image)
        # Images three pixels high would else be taken for channels first.
        found = self.processor(
            images=[image], return_tensors="np", input_data_format="channels_last"
        )
        return torch.from_numpy(np.asarray(found["pixel_values"][0], dtype=np.float32))

    def _coloured(self, image: np.ndarray) -> np.ndarray:
        has = image.shape[2]
        if has == self.channels:
            return image
        if has not in _MODES or self.channels not in _MODES:
            raise ConfigError(
                f"image: got {has} channels, expected {self.channels}; pass a model for such "
                "images, or convert them"
            )
        from PIL import Image

        made = Image.fromarray(image[:, :, 0] if has == 1 else image)
        found = np.asarray(made.convert(_MODES[self.channels]))
        return found if found.ndim == 3 else found[:, :, None]

    def _plain(self, image: np.ndarray) -> Tensor:
        from PIL import Image

        # Pillow resizes bytes by whole numbers: the same on every machine.
        size, way = (self.width, self.height), Image.Resampling.BILINEAR
        planes = [
            np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, way))
            for plane in np.moveaxis(image, 2, 0)
        ]
        return torch.from_numpy(np.stack(planes).astype(np.float32) / np.float32(127.5) - 1)


def pixels_for(model: nn.Module, processor: Any = None) -> Pixels | None:
    """Return what makes a model's pixels by its configuration; None if that names no image size.

    Args:
        model: a model with `config.image_size` and `config.num_channels`, perhaps in a
            `vision_config`.
        processor: its image processor, or None.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None)
    if size is None and processor is None:
        return None
    # A processor decides about the size, and about the channels that it normalises.
    height, width = (size, size) if isinstance(size, int) else tuple(size or (1, 1))
    means = getattr(processor, "image_mean", None)
    channels = getattr(config, "num_channels", None) or 3
    if isinstance(means, (list, tuple)):
        channels = len(means)
    return Pixels(height=height, width=width, channels=channels, processor=processor)


class ImageReader(Reader):
    """Rows with "pixel_values", float32 (channels, height, width), ready for their model.

    Or with "image", of which `pixels` makes them.

    Args:
        pixels: makes pixels of stored images; None if no row has any.
    """

    kinds = frozenset({"image-classification"})

    def __init__(self, pixels: Pixels | None = None) -> None:
        self.pixels = pixels

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make pixels and stack them.

        Raises:
            ConfigError: if rows have no image, or images of which no pixels can be made.
        """
        labels = torch.tensor([int(row["label"]) for row in rows], dtype=torch.int64)
        return {"pixel_values": stack(rows, self.pixels), "labels": labels, **origin(rows)}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the pixels."""
        return {"pixel_values": batch["pixel_values"]}


def stack(rows: Sequence[Mapping[str, Any]], pixels: Pixels | None) -> Tensor:
    """Return the pixels of all rows, (n, channels, height, width).

    Raises:
        ConfigError: if a row has none, or its image cannot be made into any.
    """
    found = []
    for row in rows:
        if "pixel_values" in row:
            found.append(torch.as_tensor(np.asarray(row["pixel_values"])))
        elif "image" not in row:
            raise ConfigError(
                f"row: got columns {sorted(row)}, expected 'image' or 'pixel_values'; give the "
                "stream one of them"
            )
        elif pixels is None:
            raise ConfigError(
                "row: got a stored image, but neither an image processor nor a model whose "
                "configuration has image_size; pass the model's processor"
            )
        else:
            found.append(pixels(row["image"]))
    shapes = {tuple(image.shape) for image in found}
    if len(shapes) > 1:
        raise ConfigError(
            f"pixel_values: got shapes {sorted(shapes)}, expected one for all rows; resize them, "
            "or give images of which the model's processor makes pixels"
        )
    return torch.stack(found)
