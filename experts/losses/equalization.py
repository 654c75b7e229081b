"""Equalization loss: images of other classes often do not push a rare class down.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.binary import binary_cross_entropy, one_hot
from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


def rare_classes(counts_C: Tensor, threshold: float | None) -> Tensor:
    """Return which classes have a share of the images of at most `threshold`; None: of at most 1 / 2C. Bool [C].

    Raises:
        ValueError: a class has no image.
    """
    counts_C = positive_counts(counts_C)
    bound = 1 / (2 * len(counts_C)) if threshold is None else threshold
    return counts_C / counts_C.sum() <= bound


def left_out(rare_C: Tensor, labels_B: Tensor, uniforms_BC: Tensor, *, gamma: float) -> Tensor:
    """Return which classes an image does not count: rare ones, not its own, where the draw is at most gamma. [B, C].

    Source: Tan et al. 2020, arXiv:2003.05176, and the survey's code, which draws for every image and class.
    """
    own_BC = one_hot(labels_B, uniforms_BC[None]).bool()
    return rare_C & ~own_BC & (uniforms_BC <= gamma)


@register("objective", "esql")
class SoftmaxEqualization(PerImage):
    """Equalization loss in its softmax form: -log of exp(z_y) over the sum of the classes that count.

    A rare class that is not the image's own is left out of the sum with probability gamma, drawn for every image, class
    and expert.

    Source: Tan et al. 2020, arXiv:2003.05176, section 3.3.
    Differs: removed classes have the score -infinity, -1e7 in the survey's code. Which classes are rare is, unless a
    threshold is set, our rule: at most half the mean share; the published thresholds are 0.43 of it (ImageNet-LT) and
    0.3 (CIFAR-100).
    """

    class Config(ObjectiveSettings):
        name: Literal["esql"] = "esql"
        form: Literal["softmax", "sigmoid"] = "softmax"
        """"softmax" draws as above; "sigmoid" is the detection form: one question per class, rare negatives never
        count, nothing is drawn."""
        gamma: Annotated[float, Field(ge=0, le=1)] = 0.9
        """Probability with which a rare class is left out; published 0.9 (the survey), 0.95 (CIFAR-100)."""
        threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
        """Share of the images up to which a class is rare; published 4.3e-4 (ImageNet-LT), 3e-3 (CIFAR-100); null: half
        the mean share, 1 / 2C. 0 makes no class rare."""

        @property
        def gives_probabilities(self) -> bool:
            """Whether its form is that of a softmax."""
            return self.form == "softmax"

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"gamma": 1.0, "threshold": 0.2},
        {"form": "sigmoid", "threshold": 0.2},
    )
    rare_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("rare_C", rare_classes(counts_C, config.threshold), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `left_out` and `PerImage.per_image`."""
        if self.config.form == "sigmoid":
            target_BC = one_hot(labels_B, logits_EBC)
            counts_BC = 1 - self.rare_C.to(target_BC.dtype) * (1 - target_BC)
            return (counts_BC * binary_cross_entropy(logits_EBC, target_BC)).sum(dim=-1)
        masks = []
        for expert in range(len(logits_EBC)):
            drawn_BC = now.extra.uniforms(f"mask/{expert}", logits_EBC.shape[-1])
            masks.append(left_out(self.rare_C, labels_B, drawn_BC, gamma=self.config.gamma))
        return negative_log_likelihood(logits_EBC.masked_fill(torch.stack(masks), -float("inf")), labels_B)
