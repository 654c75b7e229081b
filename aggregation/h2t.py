"""H2T: heads learn from features of class-balanced images, with some channels taken from instance-balanced images.

It is a second stage for any trained ensemble, its host. Only the heads learn; every expert draws its own channels.
Paper: Li et al. 2024, "Feature Fusion from Head to Tail for Long-Tailed Visual Recognition", arXiv:2306.06963.
The published code has no working recipe for several experts; fusion per expert follows the paper's description.

Shapes: E experts, e of them held here, B images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from experts.batches import Batch
from experts.cases import Case
from experts.data.keyed_random import permutation
from experts.draws import Moment
from experts.flow import Flow, FlowSettings, Network, through_shared_head
from experts.losses.cross_entropy import CrossEntropy, cross_entropy
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register
from experts.side_by_side import side_by_side


def fuse(receiver_BD: Tensor, donor_BD: Tensor, ratio: float, permutation_D: Tensor) -> Tensor:
    """Replace some channels of the receivers by those of the donors, the same channels in every row.

    A swap of whole channels before mean pooling is the same swap of entries of the pooled features, so both forms do.

    Args:
        receiver_BD: features [B, D], or maps [B, D, H, W]; left as they are.
        donor_BD: of the same shape.
        ratio: share of the channels that the donor gives, in [0, 1]; int(ratio * D) of them, cut off, not rounded.
        permutation_D: an order of 0 .. D - 1, int64; its first entries are the donor's channels.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: shapes that do not fit, or a ratio outside [0, 1].

    Source: arXiv:2306.06963, section 3.2; the rounding as in the published code.
    """
    if receiver_BD.shape != donor_BD.shape or receiver_BD.shape[1:2] != permutation_D.shape:
        raise ValueError(
            f"fusion needs receivers and donors of one shape [B, D, ...] and an order of D channels, got "
            f"{tuple(receiver_BD.shape)}, {tuple(donor_BD.shape)} and {tuple(permutation_D.shape)}"
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"flow.ratio = {ratio:g}: the donor's share of the channels must lie in 0 to 1")
    donated_n = permutation_D[: int(ratio * len(permutation_D))]
    fused_BD = receiver_BD.clone()  # the caller's features stay as they are
    fused_BD[:, donated_n] = donor_BD[:, donated_n]
    return fused_BD


@register("objective", "mean_cross_entropy")
class MeanCrossEntropy(Objective):
    """Cross-entropy of the mean of the experts' logits. H2T's other loss; "cross_entropy" is its default.

    Source: published code of H2T, which has a criterion of the classifier's output, the mean over its heads.
    """

    class Config(ObjectiveSettings):
        name: Literal["mean_cross_entropy"] = "mean_cross_entropy"

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean per image, and the term `cross_entropy`, a scalar. See `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        mean_1BC = at_least_float32(logits_EBC).mean(dim=0, keepdim=True)
        loss = cross_entropy(mean_1BC, labels_B, denominator=now.denominators["images"])[0]
        return loss, {"cross_entropy": loss.detach()}


@register("flow", "h2t")
class H2T(Flow):
    """The batch receives, its partner gives; labels are the receiver's. Only heads learn.

    Receivers go first through the trunk and through each expert's features, then donors: with BatchNorm in train mode
    (`frozen_batchnorm: train`, as published), running statistics move in this order.
    """

    class Config(FlowSettings):
        name: Literal["h2t"] = "h2t"
        ratio: Annotated[float, Field(ge=0, le=1)] = 0.25
        """Share of the channels that come from the donor, no unit; published 0.25 (CIFAR-100-LT)."""

    learns: ClassVar[frozenset[str]] = frozenset({"heads", "memory", "calibration"})
    needs_partner: ClassVar[bool] = True
    takes_features: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        shared = Case(cls.Config(ratio=0.5), objective=MeanCrossEntropy.Config(), shared_head=True)
        return [Case(cls.Config(), objective=CrossEntropy.Config()), shared]

    def channels(self, expert: str, num_features: int, moment: Moment) -> np.ndarray:
        """Return a step's order of an expert's channels, int64 [D]; every replica draws the same."""
        # Keyed by expert and step: replicas swap the same channels, and a resumed run the same as before.
        return permutation(self.draws("h2t channels", expert, moment.epoch, moment.step), num_features)

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `Flow.__call__`.

        Raises:
            ValueError: the batch has no partner.
        """
        donor = batch.partner
        if donor is None:
            raise ValueError("flow 'h2t': batches have no partner; set partner_sampler.name=instance_balanced")
        known = None
        if batch.features is not None and donor.features is not None:
            known = list(zip(batch.features, donor.features, strict=True))
        else:
            with torch.no_grad():  # frozen up to the features: no graph, and none of its memory
                receiver_h, donor_h = network.trunk(lambda trunk: (trunk(batch.images_B3HW), trunk(donor.images_B3HW)))

        def score(expert: Any, name: str, place: int) -> Tensor:
            if known is not None:
                receiver_BD, donor_BD = known[place]
            else:
                with torch.no_grad():
                    receiver_BD, donor_BD = expert.features(receiver_h), expert.features(donor_h)
            order_D = network.draws(f"channels of {name}", partial(self.channels, name, receiver_BD.shape[1]))
            scores: Tensor = expert.head(fuse(receiver_BD, donor_BD, self.config.ratio, order_D))
            return scores

        def heads(experts: Any) -> Tensor:
            return torch.stack(side_by_side(score, experts.values(), experts, range(len(experts))))

        return gather(through_shared_head(network, network.experts(heads)))
