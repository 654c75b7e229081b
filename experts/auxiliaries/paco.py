"""Parametric contrastive learning (PaCo): class scores and a queue of keys in one softmax.

Shapes: B images of the whole batch, C classes, K entries of the queue, U = 2 B + K vectors to contrast with (B + K
without keys), d numbers of an embedding.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Momentum, Seen
from experts.auxiliaries.projection import Layers, Projection
from experts.auxiliaries.queue import EMPTY, Queue, queue_problem
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register

_LEAST_SHARE = 1e-9  # added inside the logarithm, as published


@register("auxiliary", "paco")
class PaCo(Auxiliary):
    """Cross-entropy of an image with its class's score and with the vectors of its class, in one softmax over all.

    The rows of the expert's head are the parametric centres. With shares pi of the classes, an image's scores are
    z + log(pi + 1e-9) for the classes, and q . u / T for the vectors u of a contrast set: all other queries of the
    batch, the keys of the second view, and the queue. Its targets are `beta` on its class and `alpha` on each vector of
    its class, divided by their sum. The objective of the stage should be nothing else: see `configs/method/paco.yaml`.

    Source: Cui et al. 2021, arXiv:2107.12028, Eq. 5, and published code.
    Differs: the published queue begins with random directions and labels; ours counts nothing until it is filled.
    Replicas share BatchNorm's statistics; published ones shuffle images between them.
    """

    class Config(AuxiliarySettings):
        name: Literal["paco"] = "paco"
        alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
        """Weight of each vector of the image's class; published 0.05, for CIFAR-100 0.01."""
        beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
        """Weight of the image's class; published 1."""
        gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
        """Factor of the vectors in the sum of the softmax; published 1."""
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.2
        """T, divides the cosines; published 0.2, for ResNeXt 0.07, for CIFAR-100 0.05."""
        queue_size: Annotated[int, Field(ge=1)] = 8192
        """K, at least a batch; published 8192, for CIFAR-100 1024."""
        momentum: Momentum = 0.999
        """m of the network's copy that makes the keys, in a step; published 0.999."""
        projection: Layers = "mlp_batchnorm"
        """Layers from features to embeddings; published "mlp_batchnorm"."""
        dim: Annotated[int, Field(ge=1)] = 128
        """Numbers of an embedding; published 128, for CIFAR-100 32."""
        keys: bool = True
        """Whether the batch's own keys are in the contrast set. False is GPaCo."""

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why the queue does not go with the batch. See `AuxiliarySettings.batch_problem`."""
            del drop_last  # a partial batch pushes what it has
            return queue_problem(self.name, self.queue_size, batch_size)

    views: ClassVar[int] = 2
    sees_logits: ClassVar[bool] = True
    log_share_C: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        small = cls.Config(queue_size=14, dim=4)
        return [Case(small), Case(small.model_copy(update={"keys": False, "gamma": 0.5, "projection": "linear"}))]

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = Projection(config.projection, num_features, config.dim)
        self.queue = Queue(config.queue_size, config.dim)
        shares_C = counts_C.double() / counts_C.sum()
        self.register_buffer("log_share_C", (shares_C + _LEAST_SHARE).log(), persistent=False)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the mean over images, nats."""
        config, queries_Bd, labels_B = self.config, seen.embedded_VBd[0], seen.labels_B
        assert seen.keys_Bd is not None and seen.logits_BC is not None
        own = [(queries_Bd, labels_B), (seen.keys_Bd, labels_B)] if config.keys else [(queries_Bd, labels_B)]
        parts = [*own, (self.queue.keys_Kd.to(queries_Bd.dtype), self.queue.labels_K)]
        vectors_Ud, labels_U = torch.cat([v for v, _ in parts]), torch.cat([y for _, y in parts])

        place_U = torch.arange(len(labels_U), device=labels_B.device)
        left_out_BU = (place_U == place_U[: len(labels_B), None]) | (
            labels_U == EMPTY
        )  # itself, and what is not filled
        target_BU = config.alpha * ((labels_U == labels_B[:, None]) & ~left_out_BU).to(queries_Bd.dtype)
        class_C = torch.arange(self.num_classes, device=labels_B.device)
        target_BC = config.beta * (class_C == labels_B[:, None]).to(queries_Bd.dtype)

        scores_BC = seen.logits_BC + self.log_share_C.to(seen.logits_BC.dtype)
        scores_BU = queries_Bd @ vectors_Ud.T / config.temperature
        # The least finite number counts nothing in the sum, and 0 times it is 0.
        counted_BU = scores_BU.masked_fill(left_out_BU, torch.finfo(scores_BU.dtype).min)
        counted_BU = counted_BU + math.log(config.gamma)
        total_B = torch.cat([scores_BC, counted_BU], dim=1).logsumexp(dim=1)
        weight_B = target_BC.sum(dim=1) + target_BU.sum(dim=1)
        along_B = (target_BC * scores_BC).sum(dim=1) + (target_BU * scores_BU).sum(dim=1)
        return (total_B - along_B / weight_B).mean()

    def update(self, seen: Seen, lr: float, ok: Tensor) -> None:
        """Push the keys of the batch."""
        assert seen.keys_Bd is not None
        self.queue.push(seen.keys_Bd, seen.labels_B, ok)
