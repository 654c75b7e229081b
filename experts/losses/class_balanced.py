"""The class-balanced loss: any of three losses, each image weighted by the effective number of images of its class.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.binary import one_hot
from experts.losses.class_weights import trained_with
from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.effective_number import effective_number_weights
from experts.losses.focal import sigmoid_focal
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


def softmax_bce(logits_EBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the binary cross-entropy of softmax probabilities, the mean over classes, nats [E, B].

    The survey's code computes this in place of a softmax loss.
    """
    log_p_EBC = logits_EBC.log_softmax(dim=-1)
    target_BC = one_hot(labels_B, logits_EBC)
    # Just below 1, where log(1 - p) is finite and has a slope.
    log_q_EBC = (-torch.expm1(log_p_EBC.clamp_max(-torch.finfo(log_p_EBC.dtype).eps))).log()
    return -(target_BC * log_p_EBC + (1 - target_BC) * log_q_EBC).mean(dim=-1)


@register("objective", "class_balanced")
class ClassBalanced(PerImage):
    """v_y times the loss of an image, v inverse to the effective number of images of its class, with sum C.

    The mean is over images, as in the paper; `class_weights` of a stage gives the weighted mean, and a later start, to
    any loss.

    Source: Cui et al. 2019, arXiv:1901.05555, section 4, and published code.
    """

    class Config(ObjectiveSettings):
        name: Literal["class_balanced"] = "class_balanced"
        form: Literal["softmax", "sigmoid", "focal", "softmax_bce"] = "softmax"
        """The loss that is weighted: cross-entropy, a sigmoid per class, its focal form, or, as the survey's code,
        binary cross-entropy on the softmax's probabilities."""
        beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
        """Beta of the effective number, no unit; published 0.9, 0.99, 0.999 and 0.9999, chosen for each data set."""
        gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
        """Power of the focal form, no unit; published 0.5, 1 and 2, chosen for each data set."""

        @property
        def gives_probabilities(self) -> bool:
            """Return whether the form is one of a softmax."""
            return self.form in ("softmax", "softmax_bce")

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the weighted training distribution. See `ObjectiveSettings.trained_log_prior`."""
            return trained_with(effective_number_weights(counts_C, beta=self.beta), log_share_C, num_experts)

    why_not_weighable: ClassVar[str] = " beside its own"
    weighable: ClassVar[bool] = False
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"form": "sigmoid"},
        {"form": "focal", "gamma": 0.5, "beta": 0.99},
        {"form": "softmax_bce", "beta": 0.9},
    )
    weight_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("weight_C", effective_number_weights(counts_C, beta=config.beta), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        form = self.config.form
        if form == "softmax":
            loss_EB = negative_log_likelihood(logits_EBC, labels_B)
        elif form == "softmax_bce":
            loss_EB = softmax_bce(logits_EBC, labels_B)
        else:
            gamma = self.config.gamma if form == "focal" else 0.0
            loss_EB = sigmoid_focal(logits_EBC, labels_B, gamma=gamma, detach=False)
        return self.weight_C.to(loss_EB.dtype)[labels_B] * loss_EB
