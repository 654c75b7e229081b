"""Momentum contrast (MoCo): an image's two views find each other among the keys of many others.

Shapes: B images of the whole batch, K entries of the queue, d numbers of an embedding.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Momentum, Seen
from experts.auxiliaries.projection import Layers, Projection
from experts.auxiliaries.queue import EMPTY, Queue, queue_problem
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register


def info_nce(queries_Bd: Tensor, keys_Bd: Tensor, queue_Kd: Tensor, left_out_BK: Tensor, temperature: float) -> Tensor:
    """Return the mean over images of -log softmax of the own key's score, among those of own key and queue, nats.

    Args:
        queries_Bd: directions, at least float32.
        keys_Bd: those of the same images' other view, without gradient.
        queue_Kd: those of other images.
        left_out_BK: entries that do not count for an image.
        temperature: divides the cosines, no unit.
    """
    own_B = (queries_Bd * keys_Bd).sum(dim=1) / temperature
    others_BK = queries_Bd @ queue_Kd.T / temperature
    # The least finite number, not -inf: where nothing counts, an infinite score would have no gradient.
    counted_BK = others_BK.masked_fill(left_out_BK, torch.finfo(others_BK.dtype).min)
    return (torch.cat([own_B[:, None], counted_BK], dim=1).logsumexp(dim=1) - own_B).mean()


@register("auxiliary", "moco")
class MoCo(Auxiliary):
    """`info_nce` of the first view against the momentum copy's key of the second, and a queue of earlier keys.

    It needs no labels, unless keys of the image's own class are to be left out (`spare_own_class`, as SSD has it).
    Alone, beside objective `no_loss`, it trains a network before another stage: see `configs/method/ssp_moco.yaml`.

    Source: He et al. 2020, arXiv:1911.05722, and Chen et al. 2020, arXiv:2003.04297 (MoCo v2), with published code; as
    pre-training Yang and Xu 2020, arXiv:2006.07529; without keys of the own class Li, Wang and Wu 2021,
    arXiv:2109.04075.
    Differs: a published queue begins with random directions (in SSD's code of class 0); ours counts nothing until it is
    filled. Replicas share BatchNorm's statistics; published ones shuffle images between them.
    """

    class Config(AuxiliarySettings):
        name: Literal["moco"] = "moco"
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
        """T, divides the cosines, no unit; published 0.2 (MoCo v2, SSD)."""
        queue_size: Annotated[int, Field(ge=1)] = 65536
        """K, at least a batch; published 65536, in SSD 115712."""
        momentum: Momentum = 0.999
        """m of the network's copy that makes the keys, in a step; published 0.999."""
        projection: Layers = "mlp"
        """Layers from features to embeddings; published "mlp"."""
        dim: Annotated[int, Field(ge=1)] = 128
        """Numbers of an embedding; published 128."""
        spare_own_class: bool = False
        """Whether keys of the image's own class in the queue do not count; published true in SSD alone."""

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why the queue does not go with the batch. See `AuxiliarySettings.batch_problem`."""
            del drop_last  # a partial batch pushes what it has
            return queue_problem(self.name, self.queue_size, batch_size)

    views: ClassVar[int] = 2

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        small = cls.Config(queue_size=14, dim=4)
        return [Case(small), Case(small.model_copy(update={"spare_own_class": True, "projection": "linear"}))]

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = Projection(config.projection, num_features, config.dim)
        self.queue = Queue(config.queue_size, config.dim)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `info_nce`."""
        queries_Bd, labels_K = seen.embedded_VBd[0], self.queue.labels_K
        assert seen.keys_Bd is not None
        left_out_BK = (labels_K == EMPTY).expand(len(queries_Bd), -1)
        if self.config.spare_own_class:
            left_out_BK = left_out_BK | (labels_K == seen.labels_B[:, None])
        queue_Kd = self.queue.keys_Kd.to(queries_Bd.dtype)
        return info_nce(queries_Bd, seen.keys_Bd, queue_Kd, left_out_BK, self.config.temperature)

    def update(self, seen: Seen, lr: float, ok: Tensor) -> None:
        """Push the keys of the batch."""
        assert seen.keys_Bd is not None
        self.queue.push(seen.keys_Bd, seen.labels_B, ok)
