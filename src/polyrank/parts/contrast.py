"""Losses of models that compare images with the texts of all classes."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from polyrank.errors import ConfigError
from polyrank.frame import Adapter, Loss, Out, Workshop
from polyrank.layers.views import wide
from polyrank.parts.distil import classes_of, refuse_strangers

# The modules of CLIP and its kin that no image passes.
TEXT_TOWER = re.compile(r"(^|\.)text_(model|projection)(\.|$)")


def texts_to_images(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over all C classes c of −Σ_n [y_n = c] log softmax over n of z_{n, c}.

    Each text looks for its images among those of the batch. A class without an image adds 0 and
    counts in the mean; one with several is not normalised.

    Args:
        logits: z (n, C), the scaled cosines of images and the texts of all classes seen.
        labels: (n,) columns of z.
    """
    return -wide(logits).log_softmax(0).gather(1, labels[:, None]).sum() / logits.shape[1]


class TextLoss(Loss):
    """`texts_to_images` of current rows: a sum over images, so micro-batches add up.

    Each text looks among the images of one micro-batch of one process. With n/m images instead of
    n a term is smaller by about log m, which only a larger micro-batch mends.
    """

    needs = frozenset({"logits", "texts"})
    role = "train"
    per = "update"
    batchwise = True

    def bind(self, adapter: Adapter, workshop: Workshop | None) -> None:
        """Learn the classes of the task.

        Raises:
            ConfigError: if it has none, or the image tower is not adapted.
        """
        paths = [layer.site.path for layer in adapter.layers]
        if all(TEXT_TOWER.search(path) for path in paths):
            raise ConfigError(
                f"symmetric: got an adapter of the text tower alone ({paths[0]} is the first of "
                f"{len(paths)} layers), where the published loss has no such half; leave symmetric "
                "out, or adapt the image tower too"
            )
        self.classes = torch.tensor(classes_of(workshop))

    def __call__(self, out: Out, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean over classes.

        Raises:
            ConfigError: if a label lies outside the task.
        """
        assert out.logits is not None
        labels = batch["labels"]
        refuse_strangers(torch.isin(labels, self.classes.to(labels.device)), "symmetric")
        return texts_to_images(out.logits, labels)
