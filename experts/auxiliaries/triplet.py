"""The triplet loss: an image is nearer to one of its class than to one of another class, by a margin.

Shapes: B images of the whole batch, d numbers of an embedding; a, p, n: anchors, positives and negatives, all B.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.cases import Case
from experts.directions import directions
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register

Mining = Literal["all", "hardest"]


def triplet_loss(vectors_Bd: Tensor, labels_B: Tensor, margin: float, mining: Mining = "all") -> Tensor:
    """Return the mean over triplets of max(0, d(a, p) - d(a, n) + margin), d the squared distance.

    An anchor without a positive or without a negative is left out.

    Args:
        vectors_Bd: directions.
        labels_B: class ids.
        margin: between squared distances of directions, which are at most 4.
        mining: all triplets of the batch, or one for each anchor: its farthest positive and nearest negative.
    """
    distance_BB = 2 - 2 * vectors_Bd @ vectors_Bd.T
    same_BB = labels_B[:, None] == labels_B[None]
    itself_BB = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    positive_BB, negative_BB = same_BB & ~itself_BB, ~same_BB
    if mining == "hardest":
        # Squared distances lie in [0, 4], so -1 and 5 are never chosen where there is another.
        farthest_B = torch.where(positive_BB, distance_BB, -1).amax(dim=1)
        nearest_B = torch.where(negative_BB, distance_BB, 5).amin(dim=1)
        valid = positive_BB.any(dim=1) & negative_BB.any(dim=1)
        excess = F.relu(farthest_B - nearest_B + margin)
    else:
        valid = positive_BB[:, :, None] & negative_BB[:, None]
        excess = F.relu(distance_BB[:, :, None] - distance_BB[:, None] + margin)
    return torch.where(valid, excess, 0).sum() / valid.sum().clamp_min(1)


class _Directions(nn.Module):
    """Features to directions; nothing in it learns."""

    def forward(self, features_BD: Tensor) -> Tensor:
        return directions(at_least_float32(features_BD), dim=-1)


@register("auxiliary", "triplet")
class Triplet(Auxiliary):
    """The triplet loss on directions of the features.

    Source: Schroff et al. 2015, arXiv:1503.03832, Eq. 3.
    Differs: triplets are of the whole batch; published ones come from batches of thousands of images with mining of
    semi-hard negatives. "all" keeps B^3 numbers.
    """

    class Config(AuxiliarySettings):
        name: Literal["triplet"] = "triplet"
        margin: Annotated[float, Field(gt=0, le=4, allow_inf_nan=False)] = 0.2
        """Between squared distances of directions, no unit; published 0.2."""
        mining: Mining = "all"
        """All triplets of the batch, or for each anchor its farthest positive and nearest negative."""

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config()), Case(cls.Config(mining="hardest", margin=0.5))]

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = _Directions()

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `triplet_loss`."""
        return triplet_loss(seen.embedded_VBd[0], seen.labels_B, self.config.margin, self.config.mining)
