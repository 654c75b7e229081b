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
    """Every expert scores every image of the batch.

    Where auxiliaries ask for several views of an image, all go through trunk and features as one batch. The head, and
    so the objective, sees the first view alone.
    """

    class Config(FlowSettings):
        name: Literal["plain"] = "plain"

    learns: ClassVar[frozenset[str]] = Flow.learns | {"auxiliaries"}
    takes_auxiliaries: ClassVar[bool] = True
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
        given = batch.features
        h: Any = network.trunk(lambda trunk: trunk(_images(batch, network.views))) if given is None else None
        made = network.made(h, batch, progress) if given is None else ()

        def found_by(expert: Any, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
            features = expert.features(h if more is None else torch.cat([h, more]))
            return features, expert.head(_scored(features, len(batch.labels_B), network.views))

        def of_experts(experts: Any) -> tuple[list[Tensor], Tensor]:
            if given is None:
                found = side_by_side(found_by, experts.values(), *([made] if made else []))
                return [features for features, _ in found], torch.stack([scores for _, scores in found])
            scores = side_by_side(lambda expert, features: expert.head(features), experts.values(), given)
            return list(given), torch.stack(scores)

        features, scores = network.experts(of_experts)
        scores = through_shared_head(network, scores)
        network.show(features, scores)
        return gather(scores)


def _scored(features: Tensor, images: int, views: int) -> Tensor:
    """Return the features of the first view, and of images below all views."""
    if views == 1:
        return features
    return torch.cat([features[:images], features[views * images :]])


def _images(batch: Batch, views: int) -> Tensor:
    """Return so many views of a batch's images, one under the other."""
    if views == 1:
        return batch.images_B3HW
    return torch.cat([batch.images_B3HW, *batch.views[: views - 1]])
