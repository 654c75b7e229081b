"""The base of all calibrations, and how one is put on a head.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from experts.precision import at_least_float32


class Calibration(nn.Module, ABC):
    """A head's scores to better ones, by numbers per class or image; built with its config, D and C.

    It is a part of the ensemble of its own, "calibration", with its own `freeze` and `lr_factors`: a stage can train it
    on top of class weights that stay as they are, whatever kind of head these belong to.
    """

    @abstractmethod
    def forward(self, scores_BC: Tensor, features_BD: Tensor) -> Tensor:
        """Return calibrated scores [B, C]. Leading axes beside B are allowed: a head that experts share has E."""


def put_on(head: nn.Module, calibration: Calibration) -> None:
    """Make a head return calibrated scores. Its own tensors keep their names; the others lie in `head.calibration`."""
    # A hook, not a wrapper: a wrapper would rename the head's tensors, and code that holds the head would miss it.
    head.calibration = calibration
    head.register_forward_hook(_calibrate)


def _calibrate(head: nn.Module, inputs: tuple[Tensor, ...], scores_BC: Tensor) -> Tensor:
    with torch.autocast(scores_BC.device.type, enabled=False):
        return head.calibration(at_least_float32(scores_BC), at_least_float32(inputs[0]))  # type: ignore[operator]
