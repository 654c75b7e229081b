"""Numbers that the host makes for a step: random draws, the same on every placement and after a resume.

A quantity is made from the moment of the step alone. So a step that is replayed, with the numbers of another moment in
the same place on the device, asks for nothing that its first run did not ask for.

Shapes: b images of one replica or of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from experts.data.keyed_random import uniforms
from experts.data.transfer import to_device


@dataclass(frozen=True)
class Moment:
    """All that numbers of a step may depend on.

    Attributes:
        epoch: counted from 1.
        step: counted from 0 in the epoch.
        first_row, images: rows of the epoch that this replica has in the step.
        batch_first_row, batch_images: rows that the whole batch has.
    """

    epoch: int
    step: int
    first_row: int = 0
    images: int = 0
    batch_first_row: int = 0
    batch_images: int = 0


Make = Callable[[Moment], np.ndarray]
Held = dict[str, tuple[Make, Tensor]]


class StepDraws:
    """Makes a step's numbers and sends them to the device.

    A step that is to be replayed (graphs.py) asks once. Its quantities are then held in tensors of their own, which are
    filled again before every replay.

    Args:
        key_of: takes words and numbers to a key; it knows seed and stage.
        device: where the numbers go.
    """

    def __init__(self, key_of: Callable[..., int], device: torch.device | str = "cpu") -> None:
        self.key_of = key_of
        self.device = torch.device(device)
        self._moment = Moment(1, 0)
        self._asked: dict[str, Make] = {}
        self._static: Held | None = None

    def begin(self, moment: Moment) -> None:
        """Begin a step: later calls make the numbers of this moment."""
        self._moment, self._asked = moment, {}

    def __call__(self, name: str, make: Make) -> Tensor:
        """Return a quantity of this step, on the device.

        Args:
            name: of the quantity; another one in the same step needs another name.
            make: makes it from the moment, and from nothing else that changes.
        """
        assert name not in self._asked, f"{name} is drawn twice in one step"
        self._asked[name] = make
        if self._static is None:
            return self._send(make)
        if name not in self._static:  # sending it now would leave the numbers of this step in every replay
            raise ValueError(f"{name} is drawn in some steps only; needed the same draws in every step of a kind")
        return self._static[name][1]

    def _send(self, make: Make) -> Tensor:
        return to_device(make(self._moment), self.device)

    def hold(self) -> Held:
        """Return what the current step has asked for, each quantity in a tensor of its own."""
        return {name: (make, self._send(make).clone()) for name, make in self._asked.items()}

    def refill(self, held: Held) -> None:
        """Fill held tensors with the numbers of the moment that has begun."""
        for make, tensor in held.values():
            tensor.copy_(self._send(make), non_blocking=True)

    @contextmanager
    def handing_out(self, held: Held) -> Iterator[None]:
        """Hand out held tensors while this lasts, instead of new ones, to a step that asks from the start again."""
        self._static, self._asked = held, {}
        try:
            yield
        finally:
            self._static = None

    def of_labels(self, label_set: int) -> Callable[[str, Make], Tensor]:
        """Return the same for a set of labels, whose quantities have names of their own."""
        return lambda name, make: self(f"{name}/{label_set}", make)

    def of_rows(
        self, label_set: int = 0, *, whole: bool = False, made: slice = slice(0, 0)
    ) -> Callable[[str, int], Tensor]:
        """Return a function that takes the name of a quantity and a width to uniform numbers, float64 [b, width].

        They lie in [0, 1), and are keyed by the image's row in the epoch.

        Args:
            label_set: 1 for the labels of the images that are blended in; a loss with draws has others for them.
            whole: for the images of the whole batch, in its order, and not for this replica's alone.
            made: further rows, of those images that auxiliaries make for the batch, at most as many as it has.
        """

        def drawn(what: str, width: int) -> Tensor:
            def make(moment: Moment) -> np.ndarray:
                rows = (moment.batch_first_row, moment.batch_images) if whole else (moment.first_row, moment.images)
                own = uniforms(self.key_of(moment.epoch, "objective", what, label_set), *rows, width)
                first, count = moment.batch_first_row + made.start, made.stop - made.start
                more = uniforms(self.key_of(moment.epoch, "objective", what, label_set, "made"), first, count, width)
                return np.concatenate([own, more]) if count else own

            return self(f"{what}/{width}/{label_set}", make)

        return drawn
