"""Cross-entropy of every expert, with or without class weights.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.registry import register


def of_label(values_EBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the value of every image's own class, [E, B].

    Raises:
        RuntimeError: a label outside [0, C), from the look-up.
    """
    return values_EBC.gather(-1, labels_B.expand(len(values_EBC), -1).unsqueeze(-1)).squeeze(-1)


def negative_log_likelihood(logits_EBC: Tensor, labels_B: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """Return -log softmax(z)_y of every expert and image, nats [E, B], times the weight of its class.

    Raises:
        IndexError: a label outside [0, C).
    """
    return minus_of_label(logits_EBC.log_softmax(dim=-1), labels_B, weight_C)


_NONE = -(2**31)  # no label: those are 0 or more


def minus_of_label(values_EBC: Tensor, labels_B: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """Return -w_y times the value of every image's own class y, [E, B]; w is 1 without weights.

    Raises:
        IndexError: a label outside [0, C).
    """
    num_experts = len(values_EBC)
    # torch's own loss, given logarithms: one operation each way, where a look-up, a product and a sign would be seven.
    # -100 would mean a label to leave out; no label does here.
    found = F.nll_loss(
        values_EBC.flatten(0, 1),
        labels_B.expand(num_experts, -1).flatten(),
        None if weight_C is None else weight_C.to(values_EBC.dtype),
        ignore_index=_NONE,
        reduction="none",
    )
    return found.view(num_experts, -1)


def cross_entropy(
    logits_EBC: Tensor, labels_B: Tensor, *, denominator: Tensor, weight_C: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy of each expert: sum_b w_{y_b} (logsumexp_c z_bc - z_{b,y_b}) / denominator.

    Args:
        logits_EBC: scores z, any float type; half types are computed in float32.
        labels_B: class ids, int64, in [0, C).
        denominator: scalar, over the global batch: the number of images or, with weights, the sum of w_{y_b}, which
            makes a weighted mean.
        weight_C: w, or None for ones.

    Returns:
        Nats per expert, [E]; 0 with zero gradient where B = 0.

    Raises:
        IndexError: a label outside [0, C).

    Source: the usual definition; weighted mean as torch.nn.CrossEntropyLoss(weight) and the long-tailed codes have it.
    """
    nll_EB = negative_log_likelihood(at_least_float32(logits_EBC), labels_B, weight_C)
    # A sum, not a mean: replicas hold pieces of unequal size, and only the global denominator lets them add up.
    return nll_EB.sum(dim=-1) / denominator


@register("objective", "cross_entropy")
class CrossEntropy(PerImage):
    """Plain cross-entropy ("softmax"), no prior anywhere: the baseline."""

    class Config(ObjectiveSettings):
        name: Literal["cross_entropy"] = "cross_entropy"

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the training distribution for every expert. See `ObjectiveSettings.trained_log_prior`."""
            del counts_C
            return log_share_C.repeat(num_experts, 1), ("train",) * num_experts

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `PerImage.per_image`."""
        del now
        return negative_log_likelihood(logits_EBC, labels_B)
