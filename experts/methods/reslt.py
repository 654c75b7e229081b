"""ResLT: branches of one network that specialise on ever rarer classes and whose scores are summed.

The first branch learns from all classes, the second from medium and few, the third from few; a second loss of the sum
ties them together. Everything but a small branch is shared, the classifier too.
Paper: Cui et al. 2023, "ResLT: Residual Learning for Long-Tailed Recognition", arXiv:2101.10633.

Shapes: E branches (experts), B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.class_groups import GroupRule, nested_targets
from experts.losses.cross_entropy import cross_entropy
from experts.objective import Objective, ObjectiveSettings, StepContext, num_images
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register


def guarded_nll(logits_EBC: Tensor, labels_B: Tensor, guard: float) -> Tensor:
    """Return -log(softmax(z)_y + guard) for every expert and image, [E, B], nats; at most -log(guard).

    Source: published code of arXiv:2101.10633 (crossEntropy), where the guard is 1e-7.
    """
    log_p_EBC = at_least_float32(logits_EBC).log_softmax(dim=-1)
    index_EB1 = labels_B.expand(len(logits_EBC), -1).unsqueeze(-1)
    log_p_EB = log_p_EBC.gather(-1, index_EB1).squeeze(-1)
    # log(p + guard) without leaving logarithms, in which a tiny p would be lost.
    return -torch.logaddexp(log_p_EB, torch.full_like(log_p_EB, math.log(guard) if guard else -math.inf))


def reslt_loss(
    logits_EBC: Tensor,
    labels_B: Tensor,
    *,
    targets_EC: Tensor,
    beta: float,
    log_guard: float,
    fused: Literal["exact", "guarded"],
    images: Tensor,
    branch_images: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return beta times the branches' own loss plus (1 - beta) times the loss of the summed scores.

    Args:
        logits_EBC: scores of the branches; half types are computed in float32.
        labels_B: class ids, int64, in [0, C).
        targets_EC: classes that a branch learns from, bool.
        beta: weight of the branches' own losses, in [0, 1].
        log_guard: added to the label's probability inside the log of the branches' losses.
        fused: whether the loss of the sum is the "exact" cross-entropy or has the same guard.
        images: scalar, images of the global batch: denominator of the fused loss.
        branch_images: scalar, images of the global batch that a branch learns from, summed over branches: the one
            denominator of all branches' losses.

    Returns:
        The loss (scalar, nats) and its terms before their weights, detached: `independent` [E] and `fused`.

    Source: arXiv:2101.10633, in the form of the published code, whose guard is 1e-7 in the branches' losses, and in
        the fused loss for ImageNet-LT only.
    """
    logits_EBC = at_least_float32(logits_EBC)
    nll_EB = guarded_nll(logits_EBC, labels_B, log_guard)
    learns_EB = targets_EC[:, labels_B].to(nll_EB.dtype)
    # One denominator for all branches: a branch weighs as much as it has images.
    independent_E = (learns_EB * nll_EB).sum(dim=-1) / branch_images

    sum_1BC = logits_EBC.sum(dim=0, keepdim=True)
    if fused == "exact":
        fused_loss = cross_entropy(sum_1BC, labels_B, denominator=images).squeeze(0)
    else:
        fused_loss = guarded_nll(sum_1BC, labels_B, log_guard).sum() / images.to(nll_EB.dtype)
    loss = beta * independent_E.sum() + (1 - beta) * fused_loss
    return loss, {"independent": independent_E.detach(), "fused": fused_loss.detach()}


@register("objective", "reslt")
class ResLT(Objective):
    """ResLT's objective, of three branches, or of two as published for iNaturalist. All see the same images."""

    class Config(ObjectiveSettings):
        name: Literal["reslt"] = "reslt"
        beta: float = Field(0.995, ge=0, le=1)
        """Weight of the branches' own losses, no unit; published CIFAR-100-LT 0.995, 0.99, 0.72 (ratio 100, 50, 10),
        CIFAR-10-LT 0.998, 0.998, 0.96, ImageNet-LT 0.99, iNat 0.85. The paper calls it alpha."""
        log_guard: float = Field(1e-7, ge=0, lt=1)
        """Added to probabilities inside logs, no unit; published 1e-7; 0: exact cross-entropy."""
        fused: Literal["exact", "guarded"] = "exact"
        """The loss of the summed scores: "exact" cross-entropy (published for CIFAR and iNat), or "guarded" by
        log_guard as the branches' (published for ImageNet-LT)."""
        groups: GroupRule = GroupRule()
        """Classes of the branches; with two branches and rule "count", the second learns medium and few."""

    num_experts_allowed: ClassVar[tuple[int, ...]] = (3, 2)
    roles: ClassVar[str] = "branches for all classes, for medium and few, and with 3 for few alone"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"beta": 0.5, "fused": "guarded"},
        {"log_guard": 0.0, "groups": {"rule": "equal"}},
    )
    targets_EC: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("targets_EC", nested_targets(counts_C, num_experts, config.groups), persistent=False)

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return `images`, and `branch_images`: the number of branches that learn from an image, summed over images."""
        branch_images = self.targets_EC[:, labels_B].sum(dtype=torch.float64)
        return {"images": num_images(labels_B), "branch_images": branch_images}

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `reslt_loss` and `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        config = self.config
        return reslt_loss(
            logits_EBC,
            labels_B,
            targets_EC=self.targets_EC,
            beta=config.beta,
            log_guard=config.log_guard,
            fused=config.fused,
            images=now.denominators["images"],
            branch_images=now.denominators["branch_images"],
        )
