"""The nearest class mean: a class is the mean of its training features.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.cases import Case
from experts.directions import directions
from experts.heads.head import Head, Passes, Total
from experts.precision import at_least_float32
from experts.registry import Settings, register


@register("head", "ncm")
class NearestClassMean(Head):
    """Scores an image by its distance to the mean feature of every class. Nothing is trained: `fit` finds the means.

    Before means and distances, features are left as they are ("un"), brought to length 1 ("l2n"), or centred by the
    mean over all training images and then brought to length 1 ("cl2n"). The means of vectors of length 1 are shorter
    than 1 and stay so. Scores are computed outside autocast: half types would round differences of squares away.

    Source: Kang et al. 2020, arXiv:1910.09217, section 4.2, with the feature and distance types of their code.
    Differs: a feature vector of zeros stays zero, where their code divides by 0.
    """

    class Config(Settings):
        name: Literal["ncm"] = "ncm"
        scale: ClassVar[float] = 1.0
        features: Literal["un", "l2n", "cl2n"] = "cl2n"
        """Published: all three; cl2n is the best."""
        match: Literal["euclidean", "cosine"] = "euclidean"
        """euclidean: minus the squared distance; cosine: the inner product divided by D, as published code has it: not
        a cosine, because the means are not of length 1."""

    own_per_expert: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    mean_CD: Tensor
    mean_D: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Head.cases`."""
        kinds: tuple[Literal["un", "l2n", "cl2n"], ...] = ("un", "l2n", "cl2n")
        return [Case(cls.Config(features=k)) for k in kinds] + [Case(cls.Config(match="cosine"))]

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.config = config
        # Buffers, so that checkpoints and exports hold them. Before `fit`, all classes score alike.
        self.register_buffer("mean_CD", torch.zeros(num_classes, num_features))
        self.register_buffer("mean_D", torch.zeros(num_features))

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            features_BD = at_least_float32(features_BD)
            query_BD = self._normalised(features_BD, self.mean_D.to(features_BD.dtype))
            mean_CD = self.mean_CD.to(features_BD.dtype)
            product_BC = F.linear(query_BD, mean_CD)
            if self.config.match == "cosine":
                return product_BC / mean_CD.shape[1]
            return 2 * product_BC - query_BD.square().sum(dim=-1, keepdim=True) - mean_CD.square().sum(dim=1)

    def fit(self, features: Passes, total: Total) -> None:
        """See `Head.fit`. Passes once, twice for cl2n. Sums are float64, so that shares do not show in the means."""
        mean_D = torch.zeros_like(self.mean_D, dtype=torch.float64)
        if self.config.features == "cl2n":
            sums_CD, counts_C = self._sums(features, total, lambda features_BD: features_BD)
            mean_D = sums_CD.sum(dim=0) / counts_C.sum()
        sums_CD, counts_C = self._sums(features, total, lambda features_BD: self._normalised(features_BD, mean_D))
        # Last, so that a `fit` that is stopped leaves the head as it was.
        self.mean_D.copy_(mean_D)
        self.mean_CD.copy_(sums_CD / counts_C[:, None])

    def extra_repr(self) -> str:
        classes, features = self.mean_CD.shape
        return f"features={features}, classes={classes}, {self.config.features}, {self.config.match}"

    def _normalised(self, features_BD: Tensor, mean_D: Tensor) -> Tensor:
        if self.config.features == "un":
            return features_BD
        return directions(features_BD - mean_D, dim=-1)  # without cl2n the mean is zero

    def _sums(self, features: Passes, total: Total, transform: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sums [C, D] of transformed features over all replicas, and the images per class [C]."""
        classes, width = self.mean_CD.shape
        # One tensor for both: one exchange instead of two.
        sums_CX = torch.zeros(classes, width + 1, dtype=torch.float64, device=self.mean_CD.device)
        for features_BD, labels_B in features():
            values_BD = transform(features_BD.detach().to(sums_CX))
            ones_B1 = torch.ones_like(values_BD[:, :1])
            # A product, because adding rows by index is not deterministic on a GPU.
            sums_CX += F.one_hot(labels_B, classes).T.to(sums_CX) @ torch.cat([values_BD, ones_B1], dim=1)
        sums_CX = total(sums_CX)
        empty = [c for c, images in enumerate(sums_CX[:, width].tolist()) if not images]
        if empty:
            raise ValueError(
                f"head 'ncm': {len(empty)} of {classes} classes have no training image: class "
                f"{', '.join(map(str, empty))}; needed at least 1 of each, whose features are the class"
            )
        return sums_CX[:, :width], sums_CX[:, width]
