"""GCL: noise on the cosines, larger for rarer classes, so that rare features get a wider cloud.

A first stage learns everything with noise and cross-entropy, a second one the classifier alone, class-balanced, with
noise, a margin and a focal factor. No noise at test.
Paper: Li, Cheung and Lu 2022, "Long-tailed Visual Recognition via Gaussian Clouded Logit Adjustment", CVPR.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.focal import softmax_focal
from experts.losses.ldam import check_same_scale, with_margins
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register

_DEVIATION = 1 / 3


def cloud_sizes(counts_C: Tensor) -> Tensor:
    """Return delta_c = log(n_max / n_c) / log(n_max / n_min), 0 for the most frequent class, 1 for the rarest.

    Args:
        counts_C: training images n per class, each at least 1; only their ratios count.

    Returns:
        float64 [C]; zeros where all counts are equal, where published code divides 0 by 0.

    Raises:
        ValueError: a class has no image.

    Source: Li et al. 2022, CVPR, section 3.3, and published code.
    """
    counts_C = positive_counts(counts_C)
    ratio_C = (counts_C.max() / counts_C).log()
    return ratio_C / ratio_C.max() if ratio_C.max() > 0 else torch.zeros_like(ratio_C)


def half_normal(uniforms_BC: Tensor) -> Tensor:
    """Return |eps|, eps of a normal distribution with deviation 1/3, cut to [-1, 1], from uniform draws in [0, 1)."""
    return (_DEVIATION * torch.special.ndtri(uniforms_BC)).clamp(-1, 1).abs()


@register("objective", "gcl")
class GCL(PerImage):
    """Cross-entropy, or its focal form, of s (u - strength |eps| delta - m on the label), u the head's cosines.

    The noise lowers every class's score, the label's too; eps is drawn for every image, class and expert. With mixup
    the two labels of an image have draws of their own, as published.

    Source: Li et al. 2022, CVPR, and published code. The focal factor has no gradient, there and here.
    """

    class Config(ObjectiveSettings):
        name: Literal["gcl"] = "gcl"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
        """s of the head's cosines; must equal head.scale; published 30, second stage 20 (CIFAR), 15 (Places-LT)."""
        strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
        """Strength of the noise, in units of a cosine; published 0.5 (CIFAR), 1 (Places-LT)."""
        margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
        """m, off the label's cosine; published 0, in the second stage 0.1."""
        gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
        """Power of the focal factor, no unit; published 0, which is cross-entropy, in the second stage 1."""

        def check_head(self, head: Any) -> None:
            """See `check_same_scale`."""
            check_same_scale(self, head)

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"margin": 0.1, "gamma": 1.0},)
    cloud_C: Tensor
    margin_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        cloud_C = cloud_sizes(counts_C)
        # Not persistent: they follow from config and counts, and an old checkpoint must not bring others.
        self.register_buffer("cloud_C", cloud_C, persistent=False)
        self.register_buffer("margin_C", torch.full_like(cloud_C, config.margin), persistent=False)

    @property
    def detached(self) -> str:
        """The focal factor."""
        return "the factor (1 - p)^gamma" if self.config.gamma else ""

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `half_normal` and `PerImage.per_image`."""
        config, classes = self.config, logits_EBC.shape[-1]
        drawn = [half_normal(now.extra.uniforms(f"noise/{expert}", classes)) for expert in range(len(logits_EBC))]
        noise_EBC = (config.scale * config.strength * torch.stack(drawn) * self.cloud_C).to(logits_EBC.dtype)
        clouded_EBC = with_margins(logits_EBC - noise_EBC, labels_B, self.margin_C, scale=config.scale)
        if config.gamma:
            return softmax_focal(clouded_EBC, labels_B, gamma=config.gamma, detach=True)
        return negative_log_likelihood(clouded_EBC, labels_B)
