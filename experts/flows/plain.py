"""The flow of most methods: every expert scores every image.

Shapes: E experts, e of them held here, B images of one replica, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from experts.batches import Batch
from experts.cases import Case
from experts.flow import Flow, FlowSettings, Network, through_shared_head
from experts.losses.cross_entropy import CrossEntropy
from experts.progress import Progress
from experts.registry import register
from experts.side_by_side import side_by_side


@register("flow", "plain")
class Plain(Flow):
    """Every expert scores every image of the batch."""

    class Config(FlowSettings):
        name: Literal["plain"] = "plain"

    takes_features: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        loss = CrossEntropy.Config()
        return [Case(cls.Config(), objective=loss), Case(cls.Config(), objective=loss, shared_head=True)]

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `Flow.__call__`."""
        features = batch.features
        h = network.trunk(lambda trunk: trunk(batch.images_B3HW)) if features is None else None

        def scores_of(experts: Any) -> Tensor:
            if features is None:
                return torch.stack(side_by_side(lambda expert: expert(h), experts.values()))
            return torch.stack(side_by_side(lambda expert, f: expert.head(f), experts.values(), features))

        scores = network.experts(scores_of)
        return gather(through_shared_head(network, scores))
