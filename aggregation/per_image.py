"""Numbers of every image of a split, by name. Those of batches stay on the device until all are read with one wait.

Shapes: N images of a split, B images of one batch, K names, M members, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LABELS = "labels"


@dataclass(frozen=True)
class MemberScores:
    """Scores of members for the same images, in float64, with all that several measures need of them.

    Attributes:
        names: of the members.
        logits_MBC: logits or log-probabilities.
        log_p_MBC: log-probabilities.
        prediction_MB: classes with the largest scores, the first of equals.
        finite_MB: whether all scores of an image are finite.
    """

    names: tuple[str, ...]
    logits_MBC: Tensor
    log_p_MBC: Tensor
    prediction_MB: Tensor
    finite_MB: Tensor

    @classmethod
    def stacked(cls, member_logits: Mapping[str, Tensor]) -> MemberScores:
        """Take scores [B, C] of one member or more, by name, all of one shape."""
        logits_MBC = torch.stack([logits_BC.detach() for logits_BC in member_logits.values()]).double()
        largest_MB, prediction_MB = _largest(logits_MBC)
        # NaN counts as largest and smallest, and infinity less anything is not finite.
        finite_MB = (largest_MB - logits_MBC.amin(dim=2)).isfinite()
        return cls(tuple(member_logits), logits_MBC, logits_MBC.log_softmax(dim=2), prediction_MB, finite_MB)

    def only(self, names: tuple[str, ...]) -> MemberScores:
        """Return members that follow one another here, without a copy."""
        first = self.names.index(names[0])
        part = slice(first, first + len(names))
        assert self.names[part] == names, (names, self.names)
        return MemberScores(
            names, self.logits_MBC[part], self.log_p_MBC[part], self.prediction_MB[part], self.finite_MB[part]
        )


def _largest(logits_MBC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest scores and their classes, the first of equals; NaN counts as largest."""
    if logits_MBC.device.type != "cpu":
        return logits_MBC.max(dim=2)
    # On a CPU torch takes five times as long as NumPy to find the place of a maximum.
    prediction_MB = torch.from_numpy(logits_MBC.numpy().argmax(axis=2))
    return logits_MBC.gather(2, prediction_MB[..., None])[..., 0], prediction_MB


class PerImage(ABC):
    """A table with a row per name and a column per image, one of the rows for labels.

    Columns come from batches, as tensors that are not read yet, and from other pieces of the split. What a check of
    their values finds is raised where they are read.
    """

    stored: ClassVar[Mapping[str, Any]] = {}
    """The type of a row, by its name or what follows the last "/" in it; others are float64."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._num_classes = 0
        self._unread: list[Tensor] = []  # [K, B] float64 each, rows in the order of the names
        self._read: list[dict[str, NDArray[Any]]] = []

    @property
    def num_images(self) -> int:
        """N so far."""
        return sum(rows_KB.shape[1] for rows_KB in self._unread) + sum(len(piece[LABELS]) for piece in self._read)

    def merge(self, other: Self) -> None:
        """Add the images of another piece of the same split.

        Raises:
            ValueError: the other piece has other rows, or as `state`.
        """
        read([other])
        if other._names:
            self._accept(other._names)
            self._read += other._read

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays by name, to send to another process.

        Raises:
            ValueError: a label is not a class, or a number is not finite.
        """
        read([self])
        if not self._names:
            return {LABELS: np.empty(0, np.int64)}
        return {name: np.concatenate([piece[name] for piece in self._read]) for name in self._names}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild the object that `state` was taken from."""
        table = cls()
        if len(arrays) > 1:  # labels alone are those of a piece without a batch
            table._accept(tuple(arrays))
            table._read.append(dict(arrays))
        return table

    def _append(self, names: tuple[str, ...], rows_KB: Tensor, num_classes: int) -> None:
        """Add a batch: float64 numbers on the device, and the number of classes that its labels must keep to."""
        self._accept(names)
        if names != self._names:
            rows_KB = torch.stack([rows_KB[names.index(name)] for name in self._names])
        self._unread.append(rows_KB)
        self._num_classes = num_classes

    def _accept(self, names: tuple[str, ...]) -> None:
        if self._names and set(names) != set(self._names):
            raise ValueError(self._misfit(names))
        self._names = self._names or names

    def _take(self, rows_KN: NDArray[np.float64]) -> None:
        """Keep all that was unread, once it is on the host and sound."""
        piece = {}
        for name, numbers_N in zip(self._names, rows_KN, strict=True):
            piece[name] = numbers_N.astype(self.stored.get(name.rsplit("/", 1)[-1], np.float64), copy=False)
        self._check(piece, self._num_classes)
        self._read.append(piece)
        self._unread.clear()

    @abstractmethod
    def _misfit(self, names: tuple[str, ...]) -> str:
        """Return the message for a piece with other rows."""

    @abstractmethod
    def _check(self, piece: Mapping[str, NDArray[Any]], num_classes: int) -> None:
        """Raise ValueError for what only the values show."""


def read(tables: Iterable[PerImage]) -> None:
    """Bring to the host what several tables hold on one device, with a single wait.

    Raises:
        ValueError: as `PerImage.state`.
    """
    waiting = [table for table in tables if table._unread]
    if not waiting:
        return
    blocks = [torch.cat(table._unread, dim=1) for table in waiting]
    numbers = torch.cat([rows_KN.flatten() for rows_KN in blocks]).cpu()
    for table, block, part in zip(waiting, blocks, numbers.split([b.numel() for b in blocks]), strict=True):
        table._take(part.view(block.shape).numpy())
