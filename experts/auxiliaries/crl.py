"""CRL, class rectification: hard triplets of the classes that are rare in a batch, beside any objective.

Shapes: B images of the whole batch, C classes, D features, k of the hardest.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register

Level = Literal["class", "instance"]


def minority_images(labels_B: Tensor, num_classes: int, share: float) -> Tensor:
    """Return which images are of a class that is rare in the batch and has another image there, bool.

    From the rarest class on, by count and then by id, classes are rare while all of them together have at most a share
    of the batch.
    """
    count_C = (labels_B[:, None] == torch.arange(num_classes, device=labels_B.device)).sum(dim=0)
    order_C = count_C.argsort(stable=True)
    rare_C = count_C[order_C].cumsum(dim=0) <= share * len(labels_B)
    return (rare_C[order_C.argsort(stable=True)] & (count_C > 1))[labels_B]


def hardest(hardness_BB: Tensor, allowed_BB: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return places of the hardest of the allowed images for each image, [B, k], and which of them are allowed.

    Of equally hard ones the first counts. k is `most`, or B if there are not so many images.
    """
    ranked_BB = hardness_BB.detach().masked_fill(~allowed_BB, -torch.inf).sort(dim=1, descending=True, stable=True)
    place_Bk = ranked_BB.indices[:, :most]
    return place_Bk, allowed_BB.gather(1, place_Bk)


def mean_excess(near_Bk: Tensor, far_Bl: Tensor, valid_Bkl: Tensor, margin: float) -> Tensor:
    """Return the mean over valid triplets of max(0, margin + near - far); 0 where there is none."""
    excess_Bkl = F.relu(margin + near_Bk[:, :, None] - far_Bl[:, None])
    return torch.where(valid_Bkl, excess_Bkl, 0).sum() / valid_Bkl.sum().clamp_min(1)


def triplets_of(anchor_B: Tensor, positive_Bk: Tensor, negative_Bl: Tensor) -> Tensor:
    """Return which triplets are valid, [B, k, l]."""
    return anchor_B[:, None, None] & positive_Bk[:, :, None] & negative_Bl[:, None]


def rectification(
    features_BD: Tensor, logits_BC: Tensor, labels_B: Tensor, *, level: Level, share: float, most: int, margin: float
) -> Tensor:
    """Return the mean over triplets of max(0, margin + d(a, p) - d(a, n)); anchors a are all images of rare classes.

    Args:
        features_BD, logits_BC: at least float32.
        labels_B: class ids.
        level: "class": with s the softmax of a's class, p have the lowest and n the highest s, d(a, p) = |s_a - s_p|,
            d(a, n) = s_a - s_n. "instance": p are the farthest and n the nearest by d, the distance of features.
        share: of the batch that rare classes may have.
        most: positives and negatives for each anchor.
        margin: no unit, or the features'.
    """
    same_BB = labels_B[:, None] == labels_B
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    if level == "class":
        score_BB = logits_BC.softmax(dim=1)[:, labels_B].T  # of every column's image for the class of the row's
        hard_positive_BB, hard_negative_BB = -score_BB, score_BB
        own_B1 = score_BB.diagonal()[:, None]
        near_BB, far_BB = (own_B1 - score_BB).abs(), own_B1 - score_BB
    else:
        near_BB = far_BB = torch.cdist(features_BD, features_BD, compute_mode="donot_use_mm_for_euclid_dist")
        hard_positive_BB, hard_negative_BB = near_BB, -near_BB
    positive_Bk, is_positive_Bk = hardest(hard_positive_BB, same_BB & ~itself_BB, most)
    negative_Bk, is_negative_Bk = hardest(hard_negative_BB, ~same_BB, most)
    anchor_B = minority_images(labels_B, logits_BC.shape[1], share)
    valid = triplets_of(anchor_B, is_positive_Bk, is_negative_Bk)
    return mean_excess(near_BB.gather(1, positive_Bk), far_BB.gather(1, negative_Bk), valid, margin)


def imbalance(counts: list[int]) -> float:
    """Return the share of a balanced set that the training images lack, 1 - N / (C max(n))."""
    return 1 - sum(counts) / (len(counts) * max(counts))


@register("auxiliary", "crl")
class CRL(Auxiliary):
    """`rectification`, weighed by how imbalanced the training images are.

    With alpha = strength * imbalance the paper's loss is alpha CRL + (1 - alpha) CE. Here the objective keeps its
    weight of 1 and CRL has alpha / (1 - alpha), so that the whole is the paper's over 1 - alpha, for any objective.

    Source: Dong et al. 2017 (ICCV); 2018, arXiv:1804.10851.
    Differs: no code was at hand. An anchor's positives are the hardest of its class but itself; published ones are the
    hardest of the class. Its contrastive and histogram forms are left out.
    """

    class Config(AuxiliarySettings):
        name: Literal["crl"] = "crl"
        level: Level = "class"
        """Hardness and distances by the scores of the class, or by the features of images."""
        share: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of a batch that rare classes have together at most; published 0.5."""
        hardest: Annotated[int, Field(ge=1)] = 25
        """Positives, and negatives, for each anchor; published 25, not confirmed by a source we could read."""
        margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
        """Between differences of scores, no unit, or between distances of features; published 0.5 for scores."""
        strength: Annotated[float, Field(gt=0, le=1)] = 0.5
        """alpha over the imbalance, no unit; published: chosen on validation images."""

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why no class of a batch can be rare. See `AuxiliarySettings.batch_problem`."""
            del drop_last
            if self.share * batch_size >= 2:
                return None
            return (
                f"share = {self.share:g}: rare classes have at most {self.share * batch_size:g} images of a batch of "
                f"{batch_size}; needed 2, an anchor and its positive; set a larger share, or batch_size"
            )

    sees_logits: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config(hardest=2)), Case(cls.Config(level="instance", share=1.0, margin=2.0))]

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        alpha = config.strength * imbalance(counts_C.tolist())
        self.factor = alpha / (1 - alpha)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return alpha / (1 - alpha) times `rectification`."""
        config = self.config
        assert seen.logits_BC is not None
        return self.factor * rectification(
            seen.embedded_VBd[0],
            seen.logits_BC,
            seen.labels_B,
            level=config.level,
            share=config.share,
            most=config.hardest,
            margin=config.margin,
        )
