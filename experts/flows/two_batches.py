"""A flow for methods whose features and classifier learn from differently sampled images.

Shapes: E experts, e of them held here, V views, B images of one replica, C classes, D features.
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


@register("flow", "two_batches")
class TwoBatches(Flow):
    """Auxiliaries see the batch, in all its views; the objective sees the scores and labels of its partner.

    All images go through trunk and features as one batch, so BatchNorm normalises both alike.
    """

    class Config(FlowSettings):
        name: Literal["two_batches"] = "two_batches"

    learns: ClassVar[frozenset[str]] = Flow.learns | {"auxiliaries"}
    needs_partner: ClassVar[bool] = True
    scores_partner: ClassVar[bool] = True
    takes_auxiliaries: ClassVar[bool] = True

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        loss = CrossEntropy.Config()
        return [Case(cls.Config(), objective=loss), Case(cls.Config(), objective=loss, shared_head=True)]

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `Flow.__call__`."""
        assert batch.partner is not None
        images, own = len(batch.labels_B), network.views * len(batch.labels_B)
        views = [batch.images_B3HW, *batch.views[: network.views - 1], batch.partner.images_B3HW]
        h = network.trunk(lambda trunk: trunk(torch.cat(views)))

        def found_by(expert: Any) -> tuple[Tensor, Tensor]:
            features = expert.features(h)
            return features[:own], expert.head(torch.cat([features[:images], features[own:]]))

        def of_experts(experts: Any) -> tuple[list[Tensor], Tensor]:
            found = side_by_side(found_by, experts.values())
            return [features for features, _ in found], torch.stack([scores for _, scores in found])

        features, both = network.experts(of_experts)
        both = through_shared_head(network, both)
        network.show(features, both[:, :images])
        return gather(both[:, images:])
