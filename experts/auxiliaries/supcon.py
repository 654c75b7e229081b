"""Supervised contrast: images of one class are pulled together, all others pushed apart.

Shapes: V views, B images of the whole batch, A = V B vectors, d numbers of an embedding.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.auxiliaries.projection import Layers, Projection
from experts.progress import Progress
from experts.registry import register


def supervised_contrast(vectors_Ad: Tensor, labels_A: Tensor, temperature: float) -> Tensor:
    """Return the mean over anchors of the mean over their positives of -log softmax, nats.

    An anchor's positives are the other vectors of its class; the softmax is over all others. Anchors without a
    positive are left out.

    Args:
        vectors_Ad: directions, at least float32.
        labels_A: class ids.
        temperature: divides the cosines, no unit.
    """
    itself_AA = torch.eye(len(labels_A), dtype=torch.bool, device=labels_A.device)
    positive_AA = (labels_A[:, None] == labels_A[None]) & ~itself_AA
    scores_AA = vectors_Ad @ vectors_Ad.T / temperature
    # The least finite number, not -inf: the sum over the others of a lone vector would have no gradient.
    others_AA = scores_AA.masked_fill(itself_AA, torch.finfo(scores_AA.dtype).min)
    others_A1 = others_AA.logsumexp(dim=1, keepdim=True)
    loss_AA = torch.where(positive_AA, others_A1 - scores_AA, 0)
    positives_A = positive_AA.sum(dim=1)
    loss_A = loss_AA.sum(dim=1) / positives_A.clamp_min(1)
    return loss_A.sum() / (positives_A > 0).sum().clamp_min(1)


@register("auxiliary", "supcon")
class SupCon(Auxiliary):
    """Supervised contrast of two views of every image, on directions of a projection.

    Source: Khosla et al. 2020, arXiv:2004.11362, Eq. 2 (`L_out`).
    Differs: published code multiplies the loss by the temperature over 0.07, a constant; we leave it to `weight`.
    """

    class Config(AuxiliarySettings):
        name: Literal["supcon"] = "supcon"
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
        """Divides the cosines, no unit; published 0.1."""
        projection: Layers = "mlp"
        """Layers from features to embeddings; published "mlp"."""
        dim: Annotated[int, Field(ge=1)] = 128
        """Numbers of an embedding; published 128."""

    views: ClassVar[int] = 2

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = Projection(config.projection, num_features, config.dim)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `supervised_contrast`."""
        labels_A = seen.labels_B.repeat(len(seen.embedded_VBd))
        return supervised_contrast(seen.embedded_VBd.flatten(0, 1), labels_A, self.config.temperature)
