"""Label-distribution-aware margins: rare classes must win by more.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import cross_entropy
from experts.precision import at_least_float32


def ldam_margins(counts_C: Tensor, *, max_margin: float) -> Tensor:
    """Return margins m_c = max_margin * n_c^(-1/4) / max_j n_j^(-1/4), in units of a cosine.

    Args:
        counts_C: training images n per class, each at least 1.
        max_margin: margin of the rarest class; published: 0.5 (CIFAR), 0.3 (ImageNet-LT).

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image.

    Source: Cao et al. 2019, arXiv:1906.07413, section 3; the constant is set by the largest margin as in their code.
    """
    margin_C = positive_counts(counts_C) ** -0.25
    return max_margin * margin_C / margin_C.max()


def ldam_loss(
    logits_EBC: Tensor,
    labels_B: Tensor,
    *,
    margin_C: Tensor,
    scale: float,
    denominator: Tensor,
    weight_C: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of each expert after lowering the label's score by its margin.

    Args:
        logits_EBC: scores z = scale * cosine, as a cosine head of that scale gives them; half types in float32.
        labels_B: class ids, int64, in [0, C).
        margin_C: m, in units of a cosine.
        scale: s of the head; z_y - s m_y is s (cos_y - m_y). It multiplies the margin only: the logits have it already.
        denominator: scalar over the global batch, see `cross_entropy`.
        weight_C: class weights, or None for ones.

    Returns:
        Nats per expert, [E].

    Source: Cao et al. 2019, arXiv:1906.07413, section 3.
    Differs: the paper's s (cos - m) is applied to unscaled cosines; here the head scales, which is the same number.
    """
    logits_EBC = with_margins(at_least_float32(logits_EBC), labels_B, margin_C, scale=scale)
    return cross_entropy(logits_EBC, labels_B, denominator=denominator, weight_C=weight_C)


def with_margins(logits_EBC: Tensor, labels_B: Tensor, margin_C: Tensor, *, scale: float) -> Tensor:
    """Return the scores with that of every image's own class lowered by `scale` times its margin, [E, B, C]."""
    shift_B = (-scale * margin_C).to(logits_EBC.dtype)[labels_B]
    index_EB1, shift_EB1 = (x_B.expand(len(logits_EBC), -1).unsqueeze(-1) for x_B in (labels_B, shift_B))
    return logits_EBC.scatter_add(-1, index_EB1, shift_EB1)


def check_same_scale(objective: Any, head: Any) -> None:
    """Refuse an objective whose margins have another scale than the head's cosines.

    Margins are in units of a cosine, so both must be scaled alike.

    Args:
        objective: config with a `scale`.
        head: config of the head.

    Raises:
        ValueError: the two scales differ.
    """
    if objective.scale != head.scale:
        fix = f"set both to the same number (published 30), here objective.scale = {head.scale:g}"
        if "scale" not in type(head).model_fields:  # its scale is 1 and cannot be set
            fix = f"set method.head.name = 'cosine', or objective.scale = {head.scale:g}"
        raise ValueError(
            f"objective.scale = {objective.scale:g}: objective '{objective.name}' multiplies its margins by it, but "
            f"head '{head.name}' has head.scale = {head.scale:g}; {fix}"
        )
