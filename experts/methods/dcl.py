"""DCL, dynamic curriculum learning: from the training distribution to a balanced one, from metric loss to classifier.

In every batch classes are weighed so that they are seen as often as a target says, which goes from the training
distribution to equal shares. A triplet loss of rare classes, whose anchors are images that the network knows already,
counts much in the beginning and little later.

Shapes: E experts, B images of the whole batch, C classes, D features, k of the hardest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.auxiliaries.crl import hardest, mean_excess, minority_images, triplets_of
from experts.cases import Case
from experts.directions import directions
from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import negative_log_likelihood
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.ramps import Ramp, Weight
from experts.registry import register


def batch_ratios(labels_B: Tensor, log_train_C: Tensor, power: Tensor | float) -> Tensor:
    """Return for each image how often its class should be in the batch over how often it is, float64 [B].

    Both are relative to the least frequent class: the target is (n_c / min(n))^power, the batch has h_c / min(h) of
    the classes that it has.

    Args:
        labels_B: class ids of the whole batch.
        log_train_C: log(n_c / min(n)), float64.
        power: 1 for the training distribution, 0 for a balanced one.
    """
    count_C = (labels_B[:, None] == torch.arange(len(log_train_C), device=labels_B.device)).sum(dim=0)
    least = torch.where(count_C > 0, count_C, len(labels_B)).amin()
    current_C = count_C.clamp_min(1) / least.double()
    return ((power * log_train_C).exp() / current_C)[labels_B]


@register("objective", "dcl")
class DCL(Objective):
    """Sum over experts of the mean over images of w CE: w is the image's `batch_ratios`, or below 1 either 1 or 0.

    Source: Wang et al. 2019, arXiv:1901.06783, section 3 (DSL).
    Differs: no code is public. The batch is the whole one, on every placement.
    """

    class Config(ObjectiveSettings):
        name: Literal["dcl"] = "dcl"
        schedule: Weight = Ramp(ramp="half_cosine", start=1, end=0)
        """Power of the training distribution that is the target, no unit: from 1, as it is, to 0, balanced. The paper
        compares the shapes cosine, linear, exponential (with base 0.95) and half_cosine."""
        mean: Literal["images", "weights"] = "images"
        """Divisor of the weighted sum: the batch's images, those left out too, as published, or the sum of the weights,
        so that the loss does not shrink as images are left out."""

    whole_batch: ClassVar[bool] = True
    why_not_weighable: ClassVar[str] = ", as it weighs the classes of every batch itself"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"mean": "weights"},)
    log_train_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        counts_C = positive_counts(counts_C)
        self.register_buffer("log_train_C", (counts_C / counts_C.min()).log(), persistent=False)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the term `dcl`, [E]. See `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        power = now.scalar("power of the target", self.config.schedule.at, self.log_train_C)
        ratio_B = batch_ratios(labels_B, self.log_train_C, power)
        kept_B = now.extra.uniforms("images kept", 1)[:, 0] < ratio_B
        nll_EB = negative_log_likelihood(at_least_float32(logits_EBC), labels_B)
        weight_B = torch.where(ratio_B >= 1, ratio_B, kept_B.double()).to(nll_EB.dtype)
        divisor = now.denominators["images"] if self.config.mean == "images" else weight_B.sum().clamp_min(1)
        loss_E = (weight_B * nll_EB).sum(dim=1) / divisor
        return loss_E.sum(), {"dcl": loss_E.detach()}


def easy_anchors(score_BB: Tensor, right_B: Tensor, same_BB: Tensor, most: int) -> Tensor:
    """Return which images are among the surest of their class in the batch, and right, bool.

    Args:
        score_BB: of every column's image for the class of the row's.
        right_B: whether an image's own class has the highest score.
        same_BB: whether two images are of one class.
        most: surest images of a class.
    """
    own_B1, place_B = score_BB.diagonal()[:, None], torch.arange(len(right_B), device=right_B.device)
    surer_BB = (score_BB > own_B1) | ((score_BB == own_B1) & (place_B < place_B[:, None]))
    return right_B & ((surer_BB & same_BB).sum(dim=1) < most)


@register("auxiliary", "easy_anchors")
class EasyAnchors(Auxiliary):
    """The mean over triplets of max(0, margin + d(a, p) - d(a, n)), d the squared distance of directions of features.

    Anchors a are the surest images of the classes that are rare in the batch, if they are right; p are the least sure
    images of the class, n those of other classes that score most for it.

    Source: Wang et al. 2019, arXiv:1901.06783, section 3 (TEA).
    Differs: no code is public; numbers and distance are ours. What is rare is as in `crl`.
    """

    class Config(AuxiliarySettings):
        name: Literal["easy_anchors"] = "easy_anchors"
        share: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of a batch that rare classes have together at most."""
        anchors: Annotated[int, Field(ge=1)] = 5
        """Surest images of a class that may be anchors."""
        hardest: Annotated[int, Field(ge=1)] = 5
        """Positives, and negatives, for each anchor."""
        margin: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 0.5
        """Between squared distances of directions, no unit."""

    sees_logits: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config(share=1.0, margin=4.0)), Case(cls.Config(anchors=1, hardest=1, share=1.0, margin=4.0))]

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See the class."""
        config, labels_B = self.config, seen.labels_B
        assert seen.logits_BC is not None
        vectors_BD = directions(seen.embedded_VBd[0], dim=-1)
        distance_BB = 2 - 2 * vectors_BD @ vectors_BD.T
        same_BB = labels_B[:, None] == labels_B
        itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
        logits_BC = seen.logits_BC.detach()  # they choose images, and are not trained by it
        score_BB = logits_BC.softmax(dim=1)[:, labels_B].T
        easy_B = easy_anchors(score_BB, logits_BC.argmax(dim=1) == labels_B, same_BB, config.anchors)
        positive_Bk, is_positive_Bk = hardest(-score_BB, same_BB & ~itself_BB, config.hardest)
        negative_Bk, is_negative_Bk = hardest(score_BB, ~same_BB, config.hardest)
        anchor_B = easy_B & minority_images(labels_B, self.num_classes, config.share)
        valid = triplets_of(anchor_B, is_positive_Bk, is_negative_Bk)
        near_Bk, far_Bk = distance_BB.gather(1, positive_Bk), distance_BB.gather(1, negative_Bk)
        return mean_excess(near_Bk, far_Bk, valid, config.margin)
