"""A second classifier on an expert's features, which learns beside the head and is not exported.

Shapes: B images of the whole batch, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.progress import Progress
from experts.registry import register


@register("auxiliary", "classifier")
class Classifier(Auxiliary):
    """Cross-entropy of a linear classifier of its own.

    In SSD it is the student's hard head: it learns the labels, the expert's head the teacher's soft labels. Both shape
    the features; the expert's head is the one that scores.

    Source: Li, Wang and Wu 2021, arXiv:2109.04075, section 3.3.
    """

    class Config(AuxiliarySettings):
        name: Literal["classifier"] = "classifier"

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = nn.Linear(num_features, self.num_classes)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the mean over images, nats."""
        return F.cross_entropy(seen.embedded_VBd[0], seen.labels_B)
