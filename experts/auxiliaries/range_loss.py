"""Range loss: the largest distances within each class of a batch shrink, the smallest one between class centres grows.

Shapes: B images of the whole batch, C classes, D features, k largest distances, P = B^2 ordered pairs.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register

_FLOOR = 1e-6  # of a distance, as in published code, which takes the root of a square of at least 1e-12


def ranges(features_BD: Tensor, labels_B: Tensor, num_classes: int, largest: int) -> Tensor:
    """Return the harmonic mean of the k largest distances within each class, [C]; 0 for a class with fewer pairs."""
    distance_P = _distances(features_BD).flatten()
    pair_BB = (labels_B[:, None] == labels_B).triu(diagonal=1)
    class_P = torch.where(pair_BB, labels_B[:, None], num_classes).flatten()
    # By class, and within it from the largest on; stable, so that equal distances have one order everywhere.
    falling_P = distance_P.detach().argsort(descending=True, stable=True)
    order_P = falling_P[class_P[falling_P].argsort(stable=True)]

    count_C = (labels_B[:, None] == torch.arange(num_classes, device=labels_B.device)).sum(dim=0)
    pairs_C = count_C * (count_C - 1) // 2
    place_Ck = (pairs_C.cumsum(dim=0) - pairs_C)[:, None] + torch.arange(largest, device=labels_B.device)
    top_Ck = distance_P[order_P[place_Ck.clamp_max(len(order_P) - 1)]]
    return torch.where(pairs_C >= largest, largest / (1 / top_Ck).sum(dim=1), 0)


def smallest_gap(features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Return the smallest distance between two classes' mean features of the batch; infinite where it has one class."""
    same_BB = labels_B[:, None] == labels_B
    share_BB = same_BB.to(features_BD.dtype) / same_BB.sum(dim=1, keepdim=True)
    gap_BB = _distances(share_BB @ features_BD)  # of the centres of images' classes
    return gap_BB.masked_fill(same_BB, torch.inf).amin()


def _distances(x: Tensor) -> Tensor:
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(_FLOOR)


@register("auxiliary", "range")
class RangeLoss(Auxiliary):
    """within * sum of `ranges` + between * max(0, margin - `smallest_gap`), of the features.

    Source: Zhang et al. 2017, arXiv:1611.08976, and the code that Liu et al. 2019 (arXiv:1904.05160) compare with.
    Differs: a class with fewer than k pairs counts nothing; in that code it counts some 1e-6, without a gradient to
    speak of.
    """

    class Config(AuxiliarySettings):
        name: Literal["range"] = "range"
        largest: Annotated[int, Field(ge=1)] = 2
        """k, distances of each class; published 2."""
        margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
        """Between class centres, of the features' unit; published 0.1."""
        within: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
        """Factor of the ranges, no unit; published 0.5."""
        between: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
        """Factor of what the gap lacks to the margin, no unit; published 0.5."""

        @property
        def images(self) -> int:
            """Images of a class with k pairs: the least n with n (n - 1) / 2 >= k."""
            return next(n for n in range(2, self.largest + 2) if n * (n - 1) // 2 >= self.largest)

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why no class of a batch can have k pairs. See `AuxiliarySettings.batch_problem`."""
            del drop_last
            if batch_size >= self.images:
                return None
            return (
                f"largest = {self.largest}: needs {self.images} images of a class in a batch, found batch_size = "
                f"{batch_size}; set a smaller largest, or a larger batch_size"
            )

        def counts_problem(self, counts: list[int]) -> str | None:
            """Return why no class can ever have k pairs. See `AuxiliarySettings.counts_problem`."""
            if max(counts) >= self.images:
                return None
            return (
                f"auxiliary '{self.name}': largest = {self.largest} distances of a class are of {self.images} images, "
                f"and no class has more than {max(counts)}; set a smaller largest"
            )

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config()), Case(cls.Config(largest=1, margin=5.0))]

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See the class."""
        features_BD, labels_B, config = seen.embedded_VBd[0], seen.labels_B, self.config
        within = ranges(features_BD, labels_B, self.num_classes, config.largest).sum()
        return config.within * within + config.between * F.relu(config.margin - smallest_gap(features_BD, labels_B))
