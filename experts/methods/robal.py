"""RoBal: a cosine classifier with margins for frequent classes, and a prior in training and at test.

Paper: Wu et al. 2021, "Adversarial Robustness under Long-Tailed Distribution", arXiv:2104.02703. This is its clean
form: head, loss and the shift at test (`aggregation/robal.py`), without attacks. Accuracy says nothing of robustness.

Shapes: E experts, B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.directions import directions
from experts.heads.head import Head
from experts.losses.counts import log_prior, positive_counts
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.ldam import check_same_scale, with_margins
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.registry import Settings, register


def head_margins(counts_C: Tensor, *, base: float, strength: float, scale: float) -> Tensor:
    """Return margins base + strength log(n_c / n_min) / scale, in units of a cosine: larger for frequent classes.

    Args:
        counts_C: training images n per class, each at least 1; only their ratios count.
        base: m_0, of the rarest class.
        strength: tau_m, no unit; 0 gives all classes the same.
        scale: s of the head.

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image.

    Source: Wu et al. 2021, arXiv:2104.02703, section 4.2, and published code.
    """
    counts_C = positive_counts(counts_C)
    return base + strength * (counts_C / counts_C.min()).log() / scale


@register("objective", "robal")
class RoBal(PerImage):
    """Cross-entropy of s (u - m_y on the label) + tau_b log pi, u the head's cosines.

    Source: Wu et al. 2021, arXiv:2104.02703, section 4.2, and published code.
    Differs: that code changes the scores in place. Attacks are left out.
    """

    class Config(ObjectiveSettings):
        name: Literal["robal"] = "robal"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
        """s of the head's cosines; must equal head.scale; published 10."""
        base_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
        """m_0, the margin of the rarest class, in units of a cosine; published 0.1 (CIFAR-10), 0.2 (CIFAR-100)."""
        margin_strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
        """tau_m, how much larger the margins of frequent classes are, no unit; published 0 for clean training, 0.3 for
        robust."""
        prior_strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.2
        """tau_b, multiplies log pi in training, no unit; published 1.2 for clean training, 1.5 for robust."""

        def check_head(self, head: Any) -> None:
            """See `check_same_scale`."""
            check_same_scale(self, head)

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return pi^(1 - tau_b). See `ObjectiveSettings.trained_log_prior`."""
            del counts_C
            left = 1 - self.prior_strength
            word = "uniform" if left == 0 else "train" if left == 1 else f"train^{left:g}"
            return (left * log_share_C).repeat(num_experts, 1), (word,) * num_experts

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"margin_strength": 0.3, "prior_strength": 1.5},)
    margin_C: Tensor
    log_prior_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        margin_C = head_margins(counts_C, base=config.base_margin, strength=config.margin_strength, scale=config.scale)
        # Not persistent: they follow from config and counts, and an old checkpoint must not bring others.
        self.register_buffer("margin_C", margin_C, persistent=False)
        self.register_buffer("log_prior_C", log_prior(counts_C), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        prior_C = (self.config.prior_strength * self.log_prior_C).to(logits_EBC.dtype)
        logits_EBC = with_margins(logits_EBC, labels_B, self.margin_C, scale=self.config.scale)
        return negative_log_likelihood(logits_EBC + prior_C, labels_B)


@register("head", "robal_cosine")
class RoBalHead(Head):
    """Scores s f/|f| . w_c / (|w_c| + gamma), without bias; weight [D, C], a column per class.

    As the cosine head, but a column shorter than about gamma scores less: its length counts a little.

    Source: Wu et al. 2021, arXiv:2104.02703, section 4.2, and published code.
    """

    class Config(Settings):
        name: Literal["robal_cosine"] = "robal_cosine"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
        """s, the factor of the cosines, no unit; published 10; the objective needs the same number."""
        norm_offset: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1 / 32
        """gamma, added to the length of a class's weights; published 1/32, 1/16 (CIFAR-100, robust)."""

    class_axis: ClassVar[int] = 1

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.scale, self.norm_offset = config.scale, config.norm_offset
        # Uniform directions of length 1, as the cosine head's.
        self.weight = nn.Parameter(F.normalize(torch.rand(num_features, num_classes) * 2 - 1, dim=0))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            direction_BD = directions(at_least_float32(features_BD), dim=-1)
            weight_DC = self.weight.to(direction_BD.dtype)
            length_1C = weight_DC.norm(dim=0, keepdim=True).clamp_min(1e-12) + self.norm_offset
            return self.scale * (direction_BD @ (weight_DC / length_1C))

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}, classes={self.weight.shape[1]}, scale={self.scale:g}"
