"""The robust loss of DRO-LT: the worst centre of a class within a radius of its estimate.

Shapes: B images of the whole batch, C classes, D features.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen, class_sums, empty_class_problem
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register


def robust_loss(
    features_BD: Tensor,
    labels_B: Tensor,
    centres_CD: Tensor,
    radius_B: Tensor,
    *,
    temperature: float = 1.0,
    base_temperature: float = 1.0,
    weight_C: Tensor | None = None,
) -> Tensor:
    """Return minus the mean over classes of their images' mean log probability under the worst centres.

    A class's probability of an image is a softmax over the *images* of minus the distance from its centre. Its own
    images count as further away by its radius.

    Args:
        features_BD, labels_B: of the batch.
        centres_CD: estimates, without gradient.
        radius_B: of the ball that the true centre of each image's class lies in, of the features' unit.
        temperature, base_temperature: no unit; the loss is multiplied by the first over the second.
        weight_C: of the classes, all of which divide the sum. None: each class counts 1, and those of the batch divide.
    """
    member_CB = _members(labels_B, len(centres_CD), features_BD)
    # Of the differences: a product of matrices would round small distances between long vectors.
    distance_CB = torch.cdist(centres_CD, features_BD, compute_mode="donot_use_mm_for_euclid_dist")
    log_p_CB = ((-distance_CB - member_CB * radius_B) / temperature).log_softmax(dim=1)
    images_C = member_CB.sum(dim=1)
    log_p_C = (member_CB * log_p_CB).sum(dim=1) / images_C.clamp_min(1)
    factor = -temperature / base_temperature
    if weight_C is None:
        return factor * log_p_C.sum() / (images_C > 0).sum()
    return factor * (weight_C * log_p_C).sum() / weight_C.sum()


def _members(labels_B: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return 1 where an image is of a class, else 0, [C, B]."""
    return (torch.arange(classes, device=labels_B.device)[:, None] == labels_B).to(like.dtype)


@register("auxiliary", "dro_lt")
class DroLT(Auxiliary):
    """`robust_loss` of the features, with class means of all training images and learnt radii.

    Source: Samuel and Chechik 2021, arXiv:2104.03066, section 4, and published code.
    Differs: published means are of images that are re-sampled and augmented as in training; ours are of all training
    images as they are evaluated. Unless a batch is sorted by class, published code gives an image the radius of another
    image's class: the k-th image in the order of classes that of the k-th image's; ours gives each that of its own. A
    radius may become negative, as published.
    """

    class Config(AuxiliarySettings):
        name: Literal["dro_lt"] = "dro_lt"
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
        """T, no unit; published 1."""
        base_temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
        """The loss is multiplied by T over it; published 1."""
        radius: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
        """Radius of every class before the first step, in the features' unit; published 1."""
        weighted: bool = False
        """Whether classes count by their training images over those of the largest class; published false."""

        def counts_problem(self, counts: list[int]) -> str | None:
            """Return which classes have no mean. See `AuxiliarySettings.counts_problem`."""
            return empty_class_problem(self.name, counts)

    mean_CD: Tensor
    weight_C: Tensor | None

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config()), Case(cls.Config(weighted=True, temperature=0.5))]

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.radius_C = nn.Parameter(torch.full((len(counts_C),), config.radius))
        self.register_buffer("mean_CD", torch.zeros(len(counts_C), num_features))
        weight_C = counts_C.double() / counts_C.max() if config.weighted else None
        self.register_buffer("weight_C", weight_C, persistent=False)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `robust_loss`."""
        features_BD = seen.embedded_VBd[0]
        radius_C = seen.once(self.radius_C).to(features_BD.dtype)
        return robust_loss(
            features_BD,
            seen.labels_B,
            self.mean_CD.to(features_BD.dtype),
            (radius_C[:, None] * _members(seen.labels_B, self.num_classes, features_BD)).sum(dim=0),
            temperature=self.config.temperature,
            base_temperature=self.config.base_temperature,
            weight_C=None if self.weight_C is None else self.weight_C.to(features_BD.dtype),
        )

    def looks(self, now: Progress) -> bool:
        """Return true: means follow the features of every epoch."""
        return True

    def statistics(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """See `class_sums`."""
        return class_sums(features_BD, labels_B, self.num_classes)

    def before_epoch(self, sums: Tensor, now: Progress) -> None:
        """Keep the means of the classes."""
        self.mean_CD.copy_(sums[:, :-1] / sums[:, -1:])
