"""Stored images: one size, the model's channels, the same pixels every time."""

import numpy as np
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from polyrank.engine.reading import ImageReader, Pixels
from polyrank.engine.reading.images import pixels_for
from polyrank.errors import ConfigError
from polyrank.testing import MODELS, assert_close


def photo(seed=0, shape=(5, 7, 3)):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def test_an_image_of_the_right_size_is_only_scaled():
    image = photo(shape=(4, 6, 3))
    found = Pixels(height=4, width=6)(image)
    assert found.dtype == torch.float32
    expected = (image / 255 - 0.5) / 0.5
    assert_close(found, expected.transpose(2, 0, 1), dtype=torch.float32)
    assert Pixels(height=1, width=1, channels=1)(np.zeros((1, 1, 1), np.uint8)).item() == -1.0
    assert Pixels(height=1, width=1, channels=1)(np.full((1, 1, 1), 255, np.uint8)).item() == 1.0


def test_resizing_averages_and_keeps_directions():
    image = np.zeros((4, 8, 1), np.uint8)
    image[:2] = 200
    found = Pixels(height=2, width=2, channels=1)(image)[0]
    assert found[0, 0] == found[0, 1] > found[1, 0] == found[1, 1]
    # Shrinking reads all pixels, not a few of them.
    fine = np.indices((16, 16)).sum(0, keepdims=True).transpose(1, 2, 0) % 2 * 255
    found = Pixels(height=2, width=2, channels=1)(fine.astype(np.uint8))
    assert found.abs().max() < 0.01


@pytest.mark.parametrize("have", [1, 2, 3, 4])
@pytest.mark.parametrize("want", [1, 3, 4])
def test_channels_become_those_of_the_model(have, want):
    found = Pixels(height=3, width=3, channels=want)(photo(shape=(5, 7, have)))
    assert found.shape == (want, 3, 3)
    if (have, want) == (1, 3):
        assert torch.equal(found[0], found[1])


def test_images_of_other_kinds_are_refused():
    seven = Pixels(height=3, width=3, channels=7)
    assert seven(photo(shape=(5, 7, 7))).shape == (7, 3, 3)
    with pytest.raises(ConfigError, match="got 3 channels, expected 7"):
        seven(photo())
    with pytest.raises(ConfigError, match=r"got float64 of shape \(5, 7, 3\), expected uint8"):
        Pixels(height=3, width=3)(photo().astype(float))
    with pytest.raises(ConfigError, match=r"shape \(5, 7\), expected uint8 \(height"):
        Pixels(height=3, width=3)(photo()[:, :, 0])


def test_the_processor_of_the_model_goes_first():
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.9, 0.8, 0.7]
    )
    image = photo(shape=(3, 9, 3))
    found = Pixels(height=1, width=1, processor=processor)(image)
    expected = processor(images=[image], return_tensors="np", input_data_format="channels_last")
    assert np.array_equal(found.numpy(), expected["pixel_values"][0])
    assert not torch.equal(found, Pixels(height=8, width=8)(image))
    grey = Pixels(height=1, width=1, processor=processor)(photo(shape=(4, 4, 1)))
    assert grey.shape == (3, 8, 8)


def test_the_configuration_says_what_a_model_sees():
    vit, clip = MODELS["vit"].build(), MODELS["clip"].build()
    assert pixels_for(vit) == Pixels(height=8, width=8, channels=1)
    assert pixels_for(clip) == Pixels(height=8, width=8, channels=1)
    vit.config.image_size = (6, 4)
    assert pixels_for(vit) == Pixels(height=6, width=4, channels=1)
    assert pixels_for(MODELS["bert"].build()) is None
    assert pixels_for(torch.nn.Linear(1, 1)) is None


def test_rows_of_different_sizes_make_one_batch():
    reader = ImageReader(pixels_for(MODELS["vit"].build()))
    rows = [{"image": photo(i, (3 + i, 9 - i, 3)), "label": i} for i in range(3)]
    batch = reader.collate(rows)
    assert batch["pixel_values"].shape == (3, 1, 8, 8)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert torch.equal(batch["pixel_values"], reader.collate(rows)["pixel_values"])
    for row, pixels in zip(rows, batch["pixel_values"], strict=True):
        assert torch.equal(reader.collate([row])["pixel_values"][0], pixels)


def test_rows_without_usable_images_are_named():
    row = {"image": photo(), "label": 0}
    with pytest.raises(ConfigError, match="neither an image processor nor a model"):
        ImageReader().collate([row])
    with pytest.raises(ConfigError, match=r"got columns \['label', 'text'\], expected 'image'"):
        ImageReader().collate([{"text": "a", "label": 0}])
    pair = [{"pixel_values": np.zeros((1, n, 3), np.float32), "label": 0} for n in (2, 3)]
    with pytest.raises(ConfigError, match=r"got shapes \[\(1, 2, 3\), \(1, 3, 3\)\]"):
        ImageReader().collate(pair)
