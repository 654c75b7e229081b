"""Numbers that change with time, for losses and flows: on the device, and right in a step that is replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from experts.draws import Make, Moment
from experts.progress import Progress

Numbers = Callable[[str, Make], Tensor]
"""Takes the name of a quantity of the step and a function that makes it to the quantity, as `StepDraws` does."""


def scalar_of_step(
    numbers: Numbers | None, name: str, value: Callable[[Progress], float], progress: Progress, like: Tensor
) -> Tensor:
    """Return a number of this step, 0-dim, on the device of `like`.

    A Python number would be a constant of a captured graph; this one is made again before every replay.

    Args:
        numbers: of the step; None where no step will be replayed.
        name: of the number, its own in this step.
        value: takes the moment of training to the number, and depends on nothing else that changes.
        progress: the moment.
        like: what the number will be multiplied by. The number is float64 if it is, else float32, and is rounded once,
            as a Python number would be.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if numbers is None:
        return torch.full((), value(progress), dtype=dtype, device=like.device)

    def make(moment: Moment) -> np.ndarray:
        at = replace(progress, epoch=moment.epoch, step=moment.step)
        return np.asarray(value(at), dtype=np.float64 if dtype == torch.float64 else np.float32)

    return numbers(name, make)
