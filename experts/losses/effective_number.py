"""Class weights by the effective number of images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experts.losses.counts import positive_counts


def effective_number_weights(counts_C: Tensor, *, beta: float) -> Tensor:
    """Return weights inverse to the effective number of images per class, (1 - beta^n) / (1 - beta), with sum C.

    Args:
        counts_C: training images n per class, each at least 1.
        beta: in [0, 1), no unit; 0 gives ones, towards 1 inverse frequency; published: 0.9999.

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image, or beta is out of range.

    Source: Cui et al. 2019, arXiv:1901.05555, sections 3 and 4, normalised as there (sum of the weights = C).
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta = {beta}: needs 0 <= beta < 1; published 0.9999")
    counts_C = positive_counts(counts_C)
    if beta == 0:  # log(0) below is an error; the effective number is then 1 for every class
        return torch.ones_like(counts_C)

    # 1 - beta^n loses half its digits where n (1 - beta) is small; expm1 does not.
    inverse_C = 1 / -torch.expm1(counts_C * math.log(beta))
    return len(counts_C) * inverse_C / inverse_C.sum()
