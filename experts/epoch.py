"""The draws of an epoch of training, row by row, made before its first step: images, labels, who is blended with whom.

The device gets all of it once per epoch. A batch takes slices, so no step has anything of this to copy.

Shapes: N rows of the epoch, of all replicas and steps in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from experts.data.transfer import to_device
from experts.mixing.mixing import Mixing, Step
from experts.progress import Progress


@dataclass(frozen=True)
class Pairs:
    """Blends of images with others of the same step.

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
    mixing: Mixing,
    labels: np.ndarray,
    steps: Sequence[slice],
    start: Progress,
    key_of: Callable[[str], int],
    device: torch.device,
    dtype: torch.dtype,
) -> Pairs:
    """Draw how every step of an epoch is mixed.

    Args:
        mixing: that draws.
        labels: of the epoch, int64 [N].
        steps: rows of each step.
        start: the moment of the epoch's first step.
        key_of: takes a name to the key of its draws. It knows nothing of replicas, so that all blend the same pairs.
        device, dtype: of the images.
    """
    sizes = [rows.stop - rows.start for rows in steps]
    blends = [mixing.blend(Step(labels[rows], replace(start, step=step), key_of)) for step, rows in enumerate(steps)]
    host_labels = np.concatenate([blend.second_B for blend in blends])
    partner_N = np.concatenate([rows.start + blend.order_B for rows, blend in zip(steps, blends, strict=True)])
    share_N = np.repeat([blend.share for blend in blends], sizes)
    return Pairs(
        host_labels,
        to_device(host_labels, device),
        to_device(partner_N, device),
        to_device(share_N, device, dtype),
        to_device(1 - share_N, device, dtype),  # in double before: 1 less a rounded share is another number
    )


def joined(values: Tensor, rows: Sequence[slice]) -> Tensor:
    """Return some rows one after the other; a view if they are one slice."""
    return values[rows[0]] if len(rows) == 1 else torch.cat([values[part] for part in rows])
