"""OLTR: a memory of class centres enriches the features of rare classes, and keeps images of no class near the origin.

A first stage trains a plain network. A second one adds attention to its last map, and a head with a memory: one centre
per class, which begins as the mean feature of the class and follows it by a loss of its own.

    image -> map -> ModulatedAttention -> mean -> v -> MetaEmbeddingHead(v, centres) -> scores
                                               v -> CentroidMargin(v, centres): the loss that moves the centres

Source: Liu et al. 2019, arXiv:1904.05160, section 3, and published code.

Shapes: B images, D features, C classes; a map of D channels, S = H x W positions.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from experts.attention.attention import Attention
from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen, class_sums, empty_class_problem
from experts.directions import directions
from experts.heads.head import Head, Passes, Total
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import Settings, register

_LEAST_DISTANCE = 1e-6  # of a feature from its nearest centre


@register("attention", "modulated")
class ModulatedAttention(Attention):
    """Attention from every position to all others, added as strongly as the whole map says for that position.

    With r the output of a non-local block and a = softmax over positions of a linear layer of the whole map, the
    result is x + a r. The block's last layer begins at zero, and so the result at x.

    Differs: published code has it in the second stage alone. Ours is there in the first stage too, which freezes it and
    is the same without it.
    """

    class Config(Settings):
        name: Literal["modulated"] = "modulated"

    def __init__(self, config: Config, channels: int, side: int) -> None:
        super().__init__()
        inner = max(1, channels // 2)
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.g = nn.Conv2d(channels, inner, 1)
        self.back = nn.Conv2d(inner, channels, 1, bias=False)
        nn.init.zeros_(self.back.weight)
        self.where = nn.Linear(channels * side * side, side * side)

    def forward(self, map_BDHW: Tensor) -> Tensor:
        query_BdS, key_BdS, value_BdS = (layer(map_BDHW).flatten(2) for layer in (self.theta, self.phi, self.g))
        share_BSS = (query_BdS.transpose(1, 2) @ key_BdS).softmax(dim=-1)
        gathered_BdHW = (value_BdS @ share_BSS.transpose(1, 2)).unflatten(2, map_BDHW.shape[2:])
        strength_B1HW = self.where(map_BDHW.flatten(1)).softmax(dim=-1).unflatten(1, (1, *map_BDHW.shape[2:]))
        return map_BDHW + strength_B1HW * self.back(gathered_BdHW)


class Memory(nn.Module):
    """One centre per class, [C, D]; drawn at random until they are fitted."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.centre_CD = nn.Parameter(torch.randn(num_classes, num_features))


@register("head", "meta_embedding")
class MetaEmbeddingHead(Head):
    """Cosine scores of v + e m, divided by the distance of v from the nearest centre.

    The memory feature m is the mean of the centres under a softmax of a linear layer, which continues the first stage's
    classifier; the selector e = tanh of another linear layer says how much of it each feature takes. The sum is
    multiplied by 10 over the distance ("reachability"), so that a feature far from all centres comes to lie near the
    origin. The cosine classifier squashes lengths: x / (1 + |x|), times the scale. Cross-entropy does not reach the
    centres.

    Differs: published code divides by a distance of 0 where a feature is a centre; ours takes 1e-6. There, and for
    features of length 0, it has NaN.
    """

    class Config(Settings):
        name: Literal["meta_embedding"] = "meta_embedding"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
        """Factor of the cosines, no unit; published 16."""
        reach: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
        """Distance from the nearest centre at which a feature keeps its length, in the features' unit; published 10."""

    class_vectors: ClassVar[str] = "class_weight"
    continues: ClassVar[tuple[str, ...]] = ("linear",)
    adds: ClassVar[tuple[str, ...]] = ("selector_weight", "selector_bias", "class_weight", "memory")
    own_per_expert: ClassVar[bool] = True
    fits_first: ClassVar[bool] = True
    has_memory: ClassVar[bool] = True

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        self.scale, self.reach = config.scale, config.reach
        bound = num_features**-0.5

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        self.weight, self.bias = drawn(num_classes, num_features), drawn(num_classes)  # as the linear head calls them
        self.selector_weight, self.selector_bias = drawn(num_features, num_features), drawn(num_features)
        self.class_weight = drawn(num_classes, num_features)
        self.memory = Memory(num_features, num_classes)

    def forward(self, features_BD: Tensor) -> Tensor:
        with torch.autocast(features_BD.device.type, enabled=False):
            features_BD = at_least_float32(features_BD)
            kind = features_BD.dtype
            whole_BD = features_BD + self.infused(features_BD)
            # Of the differences: a product of matrices would round small distances between long vectors.
            distance_BC = torch.cdist(
                features_BD, self.memory.centre_CD.detach().to(kind), compute_mode="donot_use_mm_for_euclid_dist"
            )
            nearest_B1 = distance_BC.amin(dim=1, keepdim=True).clamp_min(_LEAST_DISTANCE)
            whole_BD = self.reach / nearest_B1 * whole_BD
            squashed_BD = whole_BD / (1 + torch.linalg.vector_norm(whole_BD, dim=1, keepdim=True))
            return self.scale * squashed_BD @ directions(self.class_weight.to(kind), dim=1).T

    def infused(self, features_BD: Tensor) -> Tensor:
        """Return what the memory adds to features, before their reachability."""
        kind = features_BD.dtype
        share_BC = F.linear(features_BD, self.weight.to(kind), self.bias.to(kind)).softmax(dim=1)
        selector_BD = F.linear(features_BD, self.selector_weight.to(kind), self.selector_bias.to(kind)).tanh()
        return selector_BD * (share_BC @ self.memory.centre_CD.detach().to(kind))

    def fit(self, features: Passes, total: Total) -> None:
        """Put every centre at the mean feature of its class. See `Head.fit`."""
        classes, width = self.memory.centre_CD.shape
        sums_CX = torch.zeros(classes, width + 1, dtype=torch.float64, device=self.memory.centre_CD.device)
        for features_BD, labels_B in features():
            sums_CX += class_sums(features_BD.detach(), labels_B, classes)
        sums_CX = total(sums_CX)
        if problem := empty_class_problem("meta_embedding", sums_CX[:, -1].long().tolist()):
            raise ValueError(problem.replace("auxiliary", "head", 1))
        with torch.no_grad():
            self.memory.centre_CD.copy_(sums_CX[:, :-1] / sums_CX[:, -1:])

    def extra_repr(self) -> str:
        classes, features = self.weight.shape
        return f"features={features}, classes={classes}, scale={self.scale:g}, reach={self.reach:g}"


class _Attract(torch.autograd.Function):
    """Half the mean squared distance from the own centre; to a centre, the published gradient.

    That is the sum over its images of their differences, divided by B and by one more than their number: a class with
    many images in the batch does not move its centre further than one with few.
    """

    @staticmethod
    def forward(ctx: Any, features_BD: Tensor, centre_CD: Tensor, member_BC: Tensor) -> Tensor:
        # A product, because adding rows by index is not deterministic on a GPU.
        difference_BD = features_BD - member_BC @ centre_CD
        ctx.save_for_backward(difference_BD, member_BC)
        return difference_BD.square().sum() / 2 / len(features_BD)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        difference_BD, member_BC = ctx.saved_tensors
        pull_BD = grads[0] * difference_BD / len(difference_BD)
        return pull_BD, -(member_BC.T @ pull_BD) / (1 + member_BC.sum(dim=0))[:, None], None


def centroid_loss(
    features_BD: Tensor, labels_B: Tensor, centre_CD: Tensor, *, margin: float = 10.0, repel: float = 0.01
) -> Tensor:
    """Return the loss that pulls features and their class's centre together, and pushes them from other centres.

    The second part is max(0, margin - the mean over images and *all* classes of the squared distance), in which the
    own class counts 0. Its gradients are those of the formula; see `_Attract` for the first part.

    Args:
        features_BD, labels_B: of the batch.
        centre_CD: of the classes.
        margin: squared distance from which on nothing is pushed; published 10.
        repel: factor of the second part, no unit; published 0.01.

    Source: Liu et al. 2019, arXiv:1904.05160, section 3.3, and published code.
    Differs: published code cuts the second part at 1e6, which a margin below it never reaches.
    """
    other_BC = labels_B[:, None] != torch.arange(len(centre_CD), device=labels_B.device)
    squares_BC = features_BD.square().sum(dim=1)[:, None] + centre_CD.square().sum(dim=1)
    squares_BC = squares_BC - 2 * features_BD @ centre_CD.T
    pushed = (margin - (other_BC * squares_BC).mean()).clamp_min(0)
    attract: Tensor = _Attract.apply(features_BD, centre_CD, (~other_BC).to(features_BD.dtype))
    return attract + repel * pushed


@register("auxiliary", "centroid_margin")
class CentroidMargin(Auxiliary):
    """`centroid_loss` of the features and the centres in the memory of the expert's head.

    Differs: published centres have an optimiser of their own, with the network's momentum and weight decay and a
    tenth of the classifier's learning rate: `lr_factors: {memory: 0.1}`.
    """

    class Config(AuxiliarySettings):
        name: Literal["centroid_margin"] = "centroid_margin"
        margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
        """Squared distance, in the features' unit squared; published 10."""
        repel: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
        """Factor of what pushes features from other classes' centres, no unit; published 0.01."""

    head: ClassVar[str | None] = "meta_embedding"

    def meet(self, head: Any) -> None:
        """Know the head's memory without owning it: a parameter belongs to one module."""
        self._memory: tuple[Memory, ...] = (head.memory,)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `centroid_loss`."""
        features_BD = seen.embedded_VBd[0]
        centre_CD = seen.once(self._memory[0].centre_CD).to(features_BD.dtype)
        settings = self.config
        return centroid_loss(features_BD, seen.labels_B, centre_CD, margin=settings.margin, repel=settings.repel)
