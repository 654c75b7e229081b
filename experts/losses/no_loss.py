"""No loss of the scores, for stages whose experts learn by their auxiliaries alone.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.registry import register


@register("objective", "no_loss")
class NoLoss(Objective):
    """Zero, with a gradient of zero for all scores."""

    class Config(ObjectiveSettings):
        name: Literal["no_loss"] = "no_loss"
        fits_classes: ClassVar[bool] = False

    silent: ClassVar[bool] = True

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        return 0.0 * at_least_float32(logits_EBC).sum(), {}
