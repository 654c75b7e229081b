"""RSG: images of rare classes are made from their own features and from what sets frequent ones off their centres.

Each class has several centres on the trunk's output. The displacement of a frequent class's image from its nearest
centre, sent through a small convolution, is added to the map of a rare one, which keeps its label. The new map goes on
through the rest of the network beside those of the batch. Nothing of this is left at test.

Shapes: B images of the whole batch, G made for it, C classes, K centres of a class, c channels of a map of h x w
positions, X = c h w.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import AuxiliarySettings, Seen
from experts.auxiliaries.generator import Generator
from experts.auxiliaries.lent import parameters_of
from experts.cases import Case
from experts.data.transfer import to_device
from experts.progress import Progress
from experts.registry import register

_LEAST = 1e-12  # length of a vector that is divided by


def pairs(frequent_B: Tensor, strength: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pair images of frequent classes with those of rare ones, in the order of the batch.

    Every image of the smaller side comes s = max(1, floor(strength x larger / smaller)) times, each time with others.

    Args:
        frequent_B: whether an image's class is frequent.
        strength: 0 to 1.

    Returns:
        Places of both in the batch, int64 [B], and the number of pairs, a scalar; what comes after it means nothing.
    """
    order_B = torch.arange(len(frequent_B), device=frequent_B.device)
    many = frequent_B.sum()
    few = len(frequent_B) - many
    least, most = torch.minimum(many, few), torch.maximum(many, few)
    times = (most.double() * strength / least.clamp_min(1)).floor().clamp_min(1).long()
    frequent_first_B = frequent_B.logical_not().to(torch.int8).argsort(stable=True)
    rare_first_B = frequent_B.to(torch.int8).argsort(stable=True)
    return frequent_first_B[order_B % many.clamp_min(1)], rare_first_B[order_B % few.clamp_min(1)], least * times


class _Parts(nn.Module):
    """Parameters of a generator.

    Args:
        classes: C.
        channels: c.
        centres: K.
        width: channels of the network that compares two maps.
    """

    def __init__(self, classes: int, channels: int, centres: int, width: int) -> None:
        super().__init__()
        self.choice_CcK = nn.Parameter(torch.randn(classes, channels, centres))
        self.choice_bias_CK = nn.Parameter(torch.ones(classes, centres))
        self.centre_CKc = nn.Parameter(torch.zeros(classes, centres, channels))
        self.transfer = nn.Conv2d(channels, channels, 3, padding=1)
        self.first = nn.Conv2d(2 * channels, width, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Linear(width, 2)
        for layer in (self.transfer, self.first, self.second):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.normal_(self.last.weight)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)


Weights = Mapping[str, Tensor]


def choices(weights: Weights, mean_Bc: Tensor, labels_B: Tensor) -> Tensor:
    """Return the share of each centre of its class in an image, [B, K]."""
    scores_BK = (mean_Bc[:, :, None] * weights["choice_CcK"][labels_B]).sum(dim=1)
    return (scores_BK + weights["choice_bias_CK"][labels_B]).softmax(dim=1)


def displacements(weights: Weights, maps_Bchw: Tensor, labels_B: Tensor) -> Tensor:
    """Return maps less the centre that has most of them, [B, c, h, w]; centres and choices get no gradient."""
    fixed = {name: value.detach() for name, value in weights.items()}
    chosen_B = choices(fixed, maps_Bchw.mean(dim=(2, 3)), labels_B).argmax(dim=1)
    return maps_Bchw - fixed["centre_CKc"][labels_B, chosen_B][:, :, None, None]


def transferred(weights: Weights, maps_Bchw: Tensor) -> Tensor:
    """Return displacements after the convolution."""
    return F.conv2d(maps_Bchw, weights["transfer.weight"], weights["transfer.bias"], padding=1)


def compared(weights: Weights, first_Bchw: Tensor, second_Bchw: Tensor) -> Tensor:
    """Return scores [B, 2] for two maps being of different classes or of one."""
    x = F.conv2d(torch.cat([first_Bchw, second_Bchw], dim=1), weights["first.weight"], weights["first.bias"])
    x = F.conv2d(x.relu(), weights["second.weight"], weights["second.bias"], padding=1)
    return F.linear(x.mean(dim=(2, 3)), weights["last.weight"], weights["last.bias"])


def centre_loss(weights: Weights, maps_Bchw: Tensor, labels_B: Tensor) -> Tensor:
    """Return the mean squared distance of maps from the centres of their class, weighted by choice."""
    mean_Bc = maps_Bchw.mean(dim=(2, 3))
    # Around the mean, so that no map is ever repeated for every centre.
    within_B = (maps_Bchw - mean_Bc[:, :, None, None]).square().sum(dim=(1, 2, 3))
    gap_BK = (mean_Bc[:, None] - weights["centre_CKc"][labels_B]).square().sum(dim=2)
    distance_BK = within_B[:, None] + maps_Bchw[0, 0].numel() * gap_BK
    return (choices(weights, mean_Bc, labels_B) * distance_BK).sum(dim=1).mean()


def contrast_loss(weights: Weights, maps_Bchw: Tensor, labels_B: Tensor) -> Tensor:
    """Return cross-entropy for whether an image of the batch's first half and one of its second are of one class."""
    half = len(labels_B) // 2
    if not half:
        return maps_Bchw.new_zeros(())
    first, second = slice(0, half), slice(half, 2 * half)
    same = (labels_B[first] == labels_B[second]).long()
    return F.cross_entropy(compared(weights, maps_Bchw[first], maps_Bchw[second]), same)


def vector_loss(weights: Weights, maps_Bchw: Tensor, labels_B: Tensor, frequent_B: Tensor, settings: Any) -> Tensor:
    """Return the mean over pairs of what keeps a transferred displacement v' apart, long and along.

    It is cross-entropy for v' not being of the class of the image that it is from, under a comparison that does not
    learn by it; | |v'| - |v| |; and | a b - 1 |, a the rare image's own displacement and b = v', both of length 1.
    Published code cuts maps into vectors of c numbers as they lie in memory, across channels and positions, and sums
    the last term over the products of single numbers; `form="paper"` takes the vector of each position and the cosine.
    """
    at_frequent_B, at_rare_B, count = pairs(frequent_B, settings.strength)
    apart_Bchw = displacements(weights, maps_Bchw, labels_B)
    given = apart_Bchw[at_frequent_B]
    made = transferred(weights, given)
    fixed = {name: value.detach() for name, value in weights.items()}
    scores_B2 = compared(fixed, maps_Bchw[at_frequent_B], made)
    loss_B = scores_B2.logsumexp(dim=1) - scores_B2[:, 0]

    given_BVc, made_BVc, own_BVc = (_vectors(x, settings.form) for x in (given, made, apart_Bchw[at_rare_B]))
    loss_B = loss_B + (_lengths(made_BVc) - _lengths(given_BVc)).abs().flatten(1).sum(dim=1)
    products_BVc = own_BVc / _lengths(own_BVc) * (made_BVc / _lengths(made_BVc))
    along = products_BVc if settings.form == "published" else products_BVc.sum(dim=2)
    loss_B = loss_B + (along - 1).abs().flatten(1).sum(dim=1)
    valid_B = torch.arange(len(loss_B), device=loss_B.device) < count
    return torch.where(valid_B, loss_B, 0).sum() / count.clamp_min(1)


def _vectors(maps_Bchw: Tensor, form: str) -> Tensor:
    """Return the vectors of maps, [B, h w, c]."""
    batch, channels = maps_Bchw.shape[:2]
    if form == "published":
        return maps_Bchw.reshape(batch, -1, channels)
    return maps_Bchw.flatten(2).transpose(1, 2)


def _lengths(vectors_BVc: Tensor) -> Tensor:
    # Of a sum that is never 0: at a vector of zeros a norm has no gradient.
    return vectors_BVc.square().sum(dim=2, keepdim=True).clamp_min(_LEAST**2).sqrt()


@register("auxiliary", "rsg")
class RSG(Generator):
    """Images of rare classes made on the trunk's output, and the losses of what makes them.

    Until `after_epoch` it learns centres, and to compare maps; then it makes images, whose loss is the objective's. The
    network gets no gradient through it. Where the trunk ends is where it acts: published behind the last stage but one
    (`backbone.split=last_stage`).

    Source: Wang et al. 2021, CVPR, arXiv:2106.09859, and published code.
    Differs: published code needs batches of even size; ours leaves out the last image of an odd one where it compares
    the halves. From `after_epoch` on the comparison is frozen there, and decays by weight_decay here.
    """

    class Config(AuxiliarySettings):
        name: Literal["rsg"] = "rsg"
        after_epoch: Annotated[int, Field(ge=0)] = 160
        """Epoch (1-based) after which images are made; published 80% of the epochs."""
        head_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
        """Share of classes, the largest ones, that count as frequent, at least one; published 0.2, for CIFAR-10 0.3."""
        strength: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Images made for each pair that could be; published 1."""
        centres: Annotated[int, Field(ge=1)] = 15
        """K, centres of a class; published 15."""
        width: Annotated[int, Field(ge=1)] = 256
        """Channels of the network that compares two maps; published 256."""
        centre_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
        """Factor of `centre_loss` and `contrast_loss`; published 0.1."""
        vector_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
        """Factor of `vector_loss`; published 0.01."""
        form: Literal["published", "paper"] = "published"
        """Vectors of `vector_loss`; see there."""

    frequent_C: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        small = cls.Config(centres=2, width=3, after_epoch=0, head_share=0.3)
        return [Case(small.model_copy(update={"after_epoch": 5})), Case(small.model_copy(update={"form": "paper"}))]

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.parts = _Parts(self.num_classes, num_features, config.centres, config.width)
        # Down from the largest; of classes of one size the first.
        largest_C = counts_C.argsort(descending=True, stable=True)[: max(1, int(config.head_share * len(counts_C)))]
        frequent_C = torch.zeros(len(counts_C), dtype=torch.bool)
        frequent_C[largest_C] = True
        self._frequent = frequent_C.clone()  # in main memory, for the host
        self.register_buffer("frequent_C", frequent_C, persistent=False)

    def phase(self, progress: Progress) -> bool:
        """See `Auxiliary.phase`."""
        return self._makes(progress)

    def _makes(self, now: Progress) -> bool:
        return now.epoch > int(self.config.after_epoch)

    def _maps(self, rows_BX: Tensor) -> Tensor:
        positions = rows_BX.shape[1] // self.num_features
        side = round(positions**0.5)  # images are squares, and so are maps
        return rows_BX.view(len(rows_BX), self.num_features, side, side)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the weighted sum of its losses."""
        weights = {name: seen.once(value) for name, value in parameters_of(self.parts).items()}
        maps_Bchw, labels_B = self._maps(seen.embedded_VBd[0]), seen.labels_B
        centred = centre_loss(weights, maps_Bchw, labels_B)
        if not self._makes(now):
            return self.config.centre_weight * (centred + contrast_loss(weights, maps_Bchw, labels_B))
        vectors = vector_loss(weights, maps_Bchw, labels_B, self.frequent_C[labels_B], self.config)
        return self.config.centre_weight * centred + self.config.vector_weight * vectors

    def made_labels(self, labels_B: np.ndarray, now: Progress) -> np.ndarray:
        """Return the labels of the rare images of all pairs."""
        _, at_rare = self._pairs(labels_B, now)
        return labels_B[at_rare]

    def make(self, rows_BX: Tensor, labels_B: np.ndarray, now: Progress, own: slice) -> Tensor:
        """Return rare images' maps with the transferred displacements of frequent ones."""
        frequent, rare = (at[own] for at in self._pairs(labels_B, now))
        at_frequent, at_rare, labels = (to_device(x, rows_BX.device) for x in (frequent, rare, labels_B[frequent]))
        weights, maps = parameters_of(self.parts), self._maps(rows_BX)
        moved = transferred(weights, displacements(weights, maps[at_frequent], labels))
        return (maps[at_rare] + moved).flatten(1)

    def _pairs(self, labels_B: np.ndarray, now: Progress) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of frequent and of rare images of all pairs, in main memory."""
        if not self._makes(now):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        at_frequent_B, at_rare_B, count = pairs(self._frequent[torch.from_numpy(labels_B)], self.config.strength)
        number = int(count)
        return at_frequent_B[:number].numpy(), at_rare_B[:number].numpy()
