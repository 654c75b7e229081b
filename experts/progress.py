"""The moment of training: the only time that schedules, samplers and objectives may depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A moment of a stage.

    Attributes:
        epoch: counted from 1.
        epochs: of the whole stage.
        step: optimiser steps already done in this epoch, counted from 0.
        steps_per_epoch: at least 1.
    """

    epoch: int
    epochs: int
    step: int = 0
    steps_per_epoch: int = 1
