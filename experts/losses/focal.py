"""Focal loss: images that are scored well count less.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from experts.losses.binary import binary_cross_entropy, focal_factor, one_hot
from experts.losses.cross_entropy import minus_of_label
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


def softmax_focal(logits_EBC: Tensor, labels_B: Tensor, *, gamma: float, detach: bool) -> Tensor:
    """Return (1 - p_y)^gamma (-log p_y), p = softmax(z), nats [E, B].

    Args:
        logits_EBC: scores z, at least float32.
        labels_B: class ids, int64, in [0, C).
        gamma: no unit; 0 is cross-entropy.
        detach: hold the factor constant in the gradient.

    Source: Lin et al. 2017, arXiv:1708.02002, Eq. 4, with a softmax.
    """
    # log(1 - p_y) from the other classes' scores: 1 - p_y itself is 0 in float32 for p_y near 1, and its power has no
    # slope there.
    log_p_EBC = logits_EBC.log_softmax(dim=-1)
    index_EB1 = labels_B.expand(len(logits_EBC), -1).unsqueeze(-1)
    log_rest_EB = log_p_EBC.scatter(-1, index_EB1, -float("inf")).logsumexp(dim=-1)
    factor_EB = (gamma * log_rest_EB).exp()
    return (factor_EB.detach() if detach else factor_EB) * minus_of_label(log_p_EBC, labels_B)


def sigmoid_focal(
    logits_EBC: Tensor, labels_B: Tensor, *, gamma: float, detach: bool, alpha: float | None = None
) -> Tensor:
    """Return the sum over classes of alpha_t (1 - p_t)^gamma (-log p_t), p_t of the sigmoid, nats [E, B].

    Args:
        logits_EBC, labels_B, gamma, detach: as `softmax_focal`.
        alpha: weight of the image's own class, the others' is 1 - alpha; None: both 1.

    Source: Lin et al. 2017, arXiv:1708.02002, Eq. 5; published code of Cui et al. 2019 for None.
    """
    target_BC = one_hot(labels_B, logits_EBC)
    factor_EBC = focal_factor(logits_EBC.detach() if detach else logits_EBC, target_BC, gamma)
    if alpha is not None:
        factor_EBC = factor_EBC * (alpha * target_BC + (1 - alpha) * (1 - target_BC))
    return (factor_EBC * binary_cross_entropy(logits_EBC, target_BC)).sum(dim=-1)


@register("objective", "focal")
class Focal(PerImage):
    """Focal loss, of a softmax or of a sigmoid per class.

    Source: Lin et al. 2017, arXiv:1708.02002, section 3.
    Differs: the paper differentiates the factor, the survey's code (arXiv:2110.04596) and its row hold it constant;
    `detach` says which. LDAM-DRW's code takes class weights into the probability, p = exp(-w CE); ours does not.
    """

    class Config(ObjectiveSettings):
        name: Literal["focal"] = "focal"
        form: Literal["softmax", "sigmoid"] = "softmax"
        """Form of the probability: a softmax over classes, as the long-tailed codes have it, or a sigmoid per class,
        as the paper has it for detection."""
        gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
        """Power of 1 - p, no unit; published 3 (the survey), 2 (detection), 1 (LDAM's code); 0 weights nothing."""
        detach: bool = True
        """Whether the factor is held constant in the gradient: true in the survey's code, false in the paper."""
        alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
        """Sigmoid form only: weight of an image's own class, that of the others is 1 - alpha; published 0.25 for
        detection; null: 1 for all."""

        @property
        def gives_probabilities(self) -> bool:
            """Whether its form is that of a softmax."""
            return self.form == "softmax"

        @model_validator(mode="after")
        def _alpha_is_of_the_sigmoid(self) -> Focal.Config:
            if self.alpha is not None and self.form != "sigmoid":
                raise ValueError(f"alpha = {self.alpha:g}: form = softmax has none; set alpha=null, or form=sigmoid")
            return self

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the training distribution: no class counts more. See `ObjectiveSettings.trained_log_prior`."""
            del counts_C
            return log_share_C.repeat(num_experts, 1), ("train",) * num_experts

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"gamma": 1.0, "detach": False},
        {"gamma": 0.5, "detach": False},
        {"form": "sigmoid", "gamma": 2.0, "alpha": 0.25},
        {"form": "sigmoid", "gamma": 1.0, "detach": False},
    )

    @property
    def detached(self) -> str:
        """The factor, where it is held constant."""
        return "the factor (1 - p)^gamma" if self.config.detach and self.config.gamma else ""

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `softmax_focal`, `sigmoid_focal` and `PerImage.per_image`."""
        del now
        config = self.config
        if config.form == "softmax":
            return softmax_focal(logits_EBC, labels_B, gamma=config.gamma, detach=config.detach)
        return sigmoid_focal(logits_EBC, labels_B, gamma=config.gamma, detach=config.detach, alpha=config.alpha)
