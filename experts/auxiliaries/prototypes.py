"""Prototypical contrast: an image is pulled to the learnt direction of its class and pushed from those of all others.

Shapes: B images of the whole batch, C classes, d numbers of an embedding.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.auxiliaries.projection import Layers, Projection
from experts.progress import Progress
from experts.registry import register


def prototypical_contrast(vectors_Bd: Tensor, labels_B: Tensor, prototypes_Cd: Tensor, temperature: float) -> Tensor:
    """Return the mean over images of -log(exp(s_y) / sum over the other classes of exp(s_c)), nats.

    The own class is not in the sum, so the loss may be negative and has no lower bound but that of the cosines.

    Args:
        vectors_Bd, prototypes_Cd: directions, at least float32.
        labels_B: class ids.
        temperature: divides the cosines s, no unit.
    """
    score_BC = vectors_Bd @ prototypes_Cd.T / temperature
    own_BC = labels_B[:, None] == torch.arange(len(prototypes_Cd), device=labels_B.device)
    others_B = score_BC.masked_fill(own_BC, torch.finfo(score_BC.dtype).min).logsumexp(dim=1)
    return (others_B - torch.where(own_BC, score_BC, 0).sum(dim=1)).mean()


@register("auxiliary", "prototypes")
class Prototypes(Auxiliary):
    """`prototypical_contrast` with one learnt direction per class.

    Source: Wang et al. 2021, arXiv:2103.14267 (PSC).
    Differs: no code is public. Prototypes begin at random directions, and are made of length 1 wherever they are used,
    so that weight decay does not pull them to 0.
    """

    class Config(AuxiliarySettings):
        name: Literal["prototypes"] = "prototypes"
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
        """Divides the cosines, no unit; published 0.1 for CIFAR-100, 1 for CIFAR-10."""
        projection: Layers = "mlp"
        """Layers from features to embeddings; published "mlp"."""
        dim: Annotated[int, Field(ge=1)] = 128
        """Numbers of an embedding; published 128."""

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = Projection(config.projection, num_features, config.dim)
        self.prototypes_Cd = nn.Parameter(F.normalize(torch.randn(len(counts_C), config.dim), dim=1))

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `prototypical_contrast`."""
        vectors_Bd = seen.embedded_VBd[0]
        prototypes_Cd = F.normalize(seen.once(self.prototypes_Cd).to(vectors_Bd.dtype), dim=1)
        return prototypical_contrast(vectors_Bd, seen.labels_B, prototypes_Cd, self.config.temperature)
