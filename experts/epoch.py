"""The draws of an epoch of training, row by row, made before its first step: images, labels, who is mixed with whom.

The device gets what every step needs once per epoch. A batch takes slices, so no step has anything of this to copy.

Shapes: N rows of the epoch, of all replicas and steps in order; T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.data.transfer import to_device
from experts.mixing.mixing import Blend, Mixing, Step
from experts.progress import Progress


class Stream:
    """The positions that a sampler draws, epoch by epoch, and the keys of what is random about their images.

    Args:
        sampler: a built piece of kind "sampler".
        key_of: takes an epoch and words to a key, which no other stream has.
        draws: per epoch. A sampler that draws fewer draws again, with other keys; what is beyond is left out.
    """

    def __init__(self, sampler: Any, key_of: Callable[[int, str], int], draws: int) -> None:
        self.sampler = sampler
        self.key_of = key_of
        self.draws = draws
        self._cached: tuple[int, np.ndarray] | None = None  # of the current epoch, which every step reads

    def positions(self, start: Progress) -> np.ndarray:
        """Return the epoch's positions in the store, int64 [draws].

        Args:
            start: the moment of the epoch's first step. An epoch is drawn as a whole, so it depends on no other.
        """
        if self._cached is None or self._cached[0] != start.epoch:
            rounds = -(-self.draws // self.sampler.draws_per_epoch)
            names = ["draws", *(f"draws/{more}" for more in range(1, rounds))]
            drawn = [self.sampler.draw(start, self.key_of(start.epoch, name)) for name in names]
            self._cached = start.epoch, np.concatenate(drawn)[: self.draws]
        return self._cached[1]


@dataclass(frozen=True)
class Mixes:
    """The mixing of an epoch's steps.

    Attributes:
        blends: of each step; None where it is not mixed.
        first: the first set of labels, int64 [N], in main memory.
        host_labels, labels_N: the second set, in main memory and on the device; without meaning in steps that are not
            mixed.
        share_T, rest_T: weights of the two sets, float.
    """

    blends: tuple[Blend | None, ...]
    first: np.ndarray
    host_labels: np.ndarray
    labels_N: Tensor
    share_T: Tensor
    rest_T: Tensor


@dataclass(frozen=True)
class Epoch:
    """The draws of one epoch.

    Attributes:
        number: counted from 1.
        host_labels, labels_N: int64, in main memory and on the device; the first set where images are mixed.
        positions_N: of the images in the store, int64.
        second_N: of those that a mixing's own stream draws; None where there is none.
        mixes: None where nothing is mixed.
        told_N: by the name of an augmentation, what it has drawn for the first view; see `Piece.told`.
    """

    number: int
    host_labels: np.ndarray
    labels_N: Tensor
    positions_N: Tensor
    second_N: Tensor | None
    mixes: Mixes | None
    told_N: Mapping[str, Tensor] = field(default_factory=dict)

    def blend(self, step: int) -> Blend | None:
        """Return how a step is mixed; None where it is not."""
        return None if self.mixes is None else self.mixes.blends[step]


def draw_mixes(
    mixing: Mixing,
    whole: Step,
    steps: Sequence[slice],
    device: torch.device,
    dtype: torch.dtype,
) -> Mixes:
    """Draw how every step of an epoch is mixed.

    Args:
        mixing: that draws.
        whole: the epoch as if it were one step, its first.
        steps: rows of each step.
        device, dtype: of the images.
    """
    blends = tuple(mixing.blend(_step_of(whole, number, rows)) for number, rows in enumerate(steps))
    first, second = whole.labels_B.copy(), whole.labels_B.copy()
    for rows, blend in zip(steps, blends, strict=True):
        if blend is not None:
            first[rows], second[rows] = blend.first_B, blend.second_B
    share_T = np.array([1.0 if blend is None else blend.share for blend in blends])
    return Mixes(
        blends,
        first,
        second,
        to_device(second, device),
        to_device(share_T, device, dtype),
        to_device(1 - share_T, device, dtype),  # in double before: 1 less a rounded share is another number
    )


def _step_of(whole: Step, number: int, rows: slice) -> Step:
    second_B = None if whole.second_B is None else whole.second_B[rows]
    return replace(whole, labels_B=whole.labels_B[rows], second_B=second_B, now=replace(whole.now, step=number))


def joined(values: Tensor, rows: Sequence[slice]) -> Tensor:
    """Return some rows one after the other; a view if they are one slice."""
    return values[rows[0]] if len(rows) == 1 else torch.cat([values[part] for part in rows])


def merged(rows: Sequence[slice]) -> list[slice]:
    """Return the same rows in as few slices as possible."""
    found: list[slice] = []
    for part in rows:
        if found and found[-1].stop == part.start:
            found[-1] = slice(found[-1].start, part.stop)
        else:
            found.append(part)
    return found
