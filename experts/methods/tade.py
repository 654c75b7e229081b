"""TADE: three experts on one trunk, each made to expect another class distribution.

The first learns the training distribution, the second a uniform one, the third the training distribution reversed.
At test their mean is a balanced ensemble; for an unknown test distribution their weights can be learned without labels.
Paper: Zhang et al. 2022, "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition"
(SADE, in its first version TADE), arXiv:2107.09249.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import cross_entropy, negative_log_likelihood
from experts.losses.per_image import PerImage
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.registry import register


def inverse_counts(counts_C: Tensor, *, ties: Literal["flip", "stable"] = "flip") -> Tensor:
    """Return the counts in reverse order of rank: the rarest class gets the largest count, and so on.

    Args:
        counts_C: training images per class.
        ties: among classes of equal count, "flip" takes the larger class id as the rarer one, so that counts which
            fall with the class id are simply reversed; "stable" takes the smaller one.

    Returns:
        A permutation of the counts, [C], of the same type.

    Source: published code of arXiv:2107.09249.
    Differs: its two unstable sorts leave ties to the library. On a CPU they give "flip" except among classes 87 and 88
        of CIFAR-100-LT at ratio 100, and 87 to 90 at ratio 200.
    """
    # Stable: among equal counts the smaller id comes first. In falling order the larger id is then the rarer class, in
    # rising order the smaller one.
    order_C = torch.argsort(counts_C, descending=ties == "flip", stable=True)
    inverse_C = torch.empty_like(counts_C)
    inverse_C[order_C] = counts_C[order_C].flip(0)
    return inverse_C


def tade_offsets(
    counts_C: Tensor, *, tau: float = 2.0, ties: Literal["flip", "stable"] = "flip", log_guard: float = 1e-9
) -> Tensor:
    """Return the numbers added to each expert's scores in training: 0, log p, and log p - tau log q.

    p are the class frequencies, q the same numbers in reverse order of rank.

    Args:
        counts_C: training images per class, each at least 1.
        tau: strength of the reversal, no unit.
        ties: see `inverse_counts`.
        log_guard: added to p and q inside the logs.

    Returns:
        float64 [3, C], nats.

    Raises:
        ValueError: a class has no image.

    Source: published code of arXiv:2107.09249.
    """
    counts_C = positive_counts(counts_C)
    log_p_C = (counts_C / counts_C.sum() + log_guard).log()
    log_q_C = (inverse_counts(counts_C, ties=ties) / counts_C.sum() + log_guard).log()
    return torch.stack([torch.zeros_like(log_p_C), log_p_C, log_p_C - tau * log_q_C])


def tade_loss(
    logits_EBC: Tensor, labels_B: Tensor, *, offset_EC: Tensor, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over the three experts of the cross-entropy of their shifted scores.

    Args:
        logits_EBC: scores z, already multiplied by the head's scale; half types are computed in float32.
        labels_B: class ids, int64, in [0, C).
        offset_EC: see `tade_offsets`; not multiplied by the head's scale.
        images: scalar, images of the global batch.

    Returns:
        The loss (scalar, nats) and its terms, detached: `forward`, `balanced` and `inverse`.

    Source: arXiv:2107.09249, in the form of the published code (DiverseExpertLoss).
    """
    logits_EBC = at_least_float32(logits_EBC)
    shifted_EBC = logits_EBC + offset_EC.to(logits_EBC.dtype)[:, None]
    loss_E = cross_entropy(shifted_EBC, labels_B, denominator=images)
    return loss_E.sum(), dict(zip(("forward", "balanced", "inverse"), loss_E.detach(), strict=True))


@register("objective", "tade")
class TADE(Objective):
    """TADE's objective. Its experts must see the same images only because they share a trunk."""

    class Config(ObjectiveSettings):
        name: Literal["tade"] = "tade"
        tau: float = Field(2.0, ge=0, allow_inf_nan=False)
        """Strength of the third expert's reversal, no unit; published 2 (CIFAR-LT, ImageNet-LT), 1 (Places-LT, iNat);
        0 makes it a second balanced expert."""
        inverse: Literal["flip", "stable"] = "flip"
        """Which of two classes of equal count is the rarer: "flip" the larger class id, nearest to the published
        code; "stable" the smaller."""
        log_guard: float = Field(1e-9, ge=0, allow_inf_nan=False)
        """Added to frequencies inside logs, no unit; published 1e-9."""

        def offsets(self, counts_C: Tensor) -> Tensor:
            """See `tade_offsets`."""
            return tade_offsets(counts_C, tau=self.tau, ties=self.inverse, log_guard=self.log_guard)

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the training distribution less the offsets: only with its offsets is a score trained for it.

            See `ObjectiveSettings.trained_log_prior`.
            """
            return log_share_C - self.offsets(counts_C), ("train", "uniform", f"inverse (tau {self.tau:g})")

    num_experts_allowed: ClassVar[tuple[int, ...]] = (3,)
    roles: ClassVar[str] = "forward, balanced, inverse"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"tau": 1.0, "inverse": "stable", "log_guard": 0.0},)
    offset_EC: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("offset_EC", config.offsets(counts_C), persistent=False)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `tade_loss` and `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        return tade_loss(logits_EBC, labels_B, offset_EC=self.offset_EC, images=now.denominators["images"])


@register("objective", "inverse_softmax")
class InverseSoftmax(PerImage):
    """TADE's third loss alone: cross-entropy of z + log p - tau log q, which expects the reversed distribution.

    `per_expert` of `cross_entropy`, `balanced_softmax` and this one is TADE.

    Source: Zhang et al. 2022, arXiv:2107.09249, as `tade_offsets`.
    """

    class Config(ObjectiveSettings):
        name: Literal["inverse_softmax"] = "inverse_softmax"
        tau: float = Field(2.0, ge=0, allow_inf_nan=False)
        """Strength of the reversal, no unit; published 2 (CIFAR-LT, ImageNet-LT), 1 (Places-LT, iNat)."""
        inverse: Literal["flip", "stable"] = "flip"
        """Which of two classes of equal count is the rarer: "flip" the larger class id, "stable" the smaller."""

        def offset(self, counts_C: Tensor) -> Tensor:
            """Return log p - tau log q, [C]; see `tade_offsets`."""
            return tade_offsets(counts_C, tau=self.tau, ties=self.inverse, log_guard=0.0)[2]

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the training distribution less the offsets. See `ObjectiveSettings.trained_log_prior`."""
            row_C = log_share_C - self.offset(counts_C)
            return row_C.repeat(num_experts, 1), (f"inverse (tau {self.tau:g})",) * num_experts

    offset_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        self.register_buffer("offset_C", config.offset(counts_C), persistent=False)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        return negative_log_likelihood(logits_EBC + self.offset_C.to(logits_EBC.dtype), labels_B)
