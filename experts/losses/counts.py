"""Training images per class, as losses need them."""

from __future__ import annotations

import torch
from torch import Tensor


def positive_counts(counts_C: Tensor) -> Tensor:
    """Return counts in float64; refuse a class without an image, whose weight and margin would be infinite.

    Raises:
        ValueError: a class has no training image; names the first such classes.
    """
    empty = torch.nonzero(counts_C < 1).flatten().tolist()
    if empty:
        named = ", ".join(map(str, empty[:5])) + (" ..." if len(empty) > 5 else "")
        raise ValueError(
            f"{len(empty)} of {len(counts_C)} classes have no training image (class {named}); "
            f"every class needs at least 1: add images or leave the class out"
        )
    return counts_C.to(torch.float64)


def log_prior(counts_C: Tensor) -> Tensor:
    """Return log pi, the logs of each class's share of the training images, float64 [C].

    Raises:
        ValueError: a class has no training image.
    """
    counts_C = positive_counts(counts_C)
    return counts_C.log() - counts_C.sum().log()
