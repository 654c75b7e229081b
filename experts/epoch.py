"""The draws of an epoch of training, row by row, made before its first step: images, labels, who is blended with whom.

The device gets all of it once per epoch. A batch takes slices, so no step has anything of this to copy.

Shapes: N rows of the epoch, of all replicas and steps in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experts.data.keyed_random import KeyedRandom, permutation
from experts.data.transfer import to_device


@dataclass(frozen=True)
class Pairs:
    """Blends of images with others of the same step (mixup).

    Attributes:
        host_labels, labels_N: of the partners, int64, in main memory and on the device.
        partner_N: rows of the partners in the epoch, int64.
        share_N, rest_N: weights of the image and of its partner, float; equal within a step.
    """

    host_labels: np.ndarray
    labels_N: Tensor
    partner_N: Tensor
    share_N: Tensor
    rest_N: Tensor


@dataclass(frozen=True)
class Epoch:
    """The draws of one epoch.

    Attributes:
        number: counted from 1.
        host_labels, labels_N: int64, in main memory and on the device.
        positions_N: of the images in the store, int64.
        pairs: None where nothing is blended.
    """

    number: int
    host_labels: np.ndarray
    labels_N: Tensor
    positions_N: Tensor
    pairs: Pairs | None


def draw_pairs(
    labels: np.ndarray,
    steps: Sequence[slice],
    alpha: float,
    key_of: Callable[[str], int],
    device: torch.device,
    dtype: torch.dtype,
) -> Pairs:
    """Draw a partner for every row, of the same step, and for every step a share from Beta(alpha, alpha).

    Args:
        labels: of the epoch, int64 [N].
        steps: rows of each step.
        key_of: takes a name to the key of its draws. It knows nothing of replicas, so that all blend the same pairs.
        device, dtype: of the images.
    """
    sizes = [rows.stop - rows.start for rows in steps]
    partners, shares = [], []
    for step, (rows, size) in enumerate(zip(steps, sizes, strict=True)):
        partners.append(rows.start + permutation(key_of(f"mixup order/{step}"), size))
        shares.append(KeyedRandom(key_of(f"mixup share/{step}")).betavariate(alpha, alpha))
    partner_N, share_N = np.concatenate(partners), np.repeat(shares, sizes)
    return Pairs(
        labels[partner_N],
        to_device(labels[partner_N], device),
        to_device(partner_N, device),
        to_device(share_N, device, dtype),
        to_device(1 - share_N, device, dtype),  # in double before: 1 less a rounded share is another number
    )


def joined(values: Tensor, rows: Sequence[slice]) -> Tensor:
    """Return some rows one after the other; a view if they are one slice."""
    return values[rows[0]] if len(rows) == 1 else torch.cat([values[part] for part in rows])
