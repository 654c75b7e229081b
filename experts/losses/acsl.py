"""Adaptive class suppression: a class is pushed down only by images that the network takes for it now.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.binary import binary_cross_entropy, one_hot
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


def suppression_mask(logits_EBC: Tensor, target_BC: Tensor, *, threshold: float) -> Tensor:
    """Return 1 for every image's own class and for classes with sigmoid(z) >= threshold, else 0, [E, B, C].

    Source: Wang et al. 2021, arXiv:2104.00885, section 3.
    """
    return ((target_BC > 0) | (logits_EBC.detach().sigmoid() >= threshold)).to(logits_EBC.dtype)


@register("objective", "acsl")
class ACSL(PerImage):
    """Binary cross-entropy per class, summed over an image's own class and those whose score passes a threshold.

    Early in training hardly any score passes, and all drift upwards: it is for the classifier of a trained network.

    Source: Wang et al. 2021, arXiv:2104.00885.
    Differs: detection's rule for background images has no counterpart here.
    """

    class Config(ObjectiveSettings):
        name: Literal["acsl"] = "acsl"
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.7
        """xi, the sigmoid of a score from which a negative counts; published 0.7; 0 counts all."""

        @property
        def gives_probabilities(self) -> bool:
            """It asks a question per class."""
            return False

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"threshold": 0.2},)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `suppression_mask` and `PerImage.per_image`."""
        del now
        target_BC = one_hot(labels_B, logits_EBC)
        mask_EBC = suppression_mask(logits_EBC, target_BC, threshold=self.config.threshold)
        return (mask_EBC * binary_cross_entropy(logits_EBC, target_BC)).sum(dim=-1)
