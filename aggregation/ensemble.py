"""How the experts' outputs become the ensemble's: pieces of kind "aggregator".

Shapes: E experts, B images, C classes, K numbers an expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from experts.losses.precision import at_least_float32
from experts.registry import Settings, register


@dataclass(frozen=True)
class Outputs:
    """What all experts say of some images.

    Attributes:
        logits_EBC: scores.
        numbers_EK: what `Aggregator.describe` said of every expert; K may be 0.
        gates_EB: a router's score for asking the next expert after expert k (a probability above 1/2 is a score above
            0); the last row means nothing. None without a router.
    """

    logits_EBC: Tensor
    numbers_EK: Tensor | None = None
    gates_EB: Tensor | None = None


class Aggregator(ABC):
    """One rule. Built with the training images per class, int64 [C], and the experts' names."""

    def __init__(self, config: Any, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        self.config = config
        self.expert_names = expert_names

    def describe(self, expert: nn.Module) -> Tensor:
        """Numbers of one expert's weights that the rule needs, float [K]; none by default."""
        return torch.zeros(0)

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Tensor:
        """The ensemble's scores [B, C]: argmax gives the class, softmax the probabilities."""

    def members(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scores [B, C] to be measured by name: "ensemble" first, then what it should be compared with."""
        return {"ensemble": self(outputs)}

    def experts_used(self, outputs: Outputs) -> Tensor | None:
        """How many experts each image was shown to, [B]; None where it is always all."""
        return None


@register("aggregator", "mean_logits")
class MeanLogits(Aggregator):
    """Mean over experts of the logits: the normalised product of their probabilities. RIDE's rule."""

    class Config(Settings):
        name: Literal["mean_logits"] = "mean_logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).mean(dim=0)


@register("aggregator", "sum_logits")
class SumLogits(Aggregator):
    """Sum over experts of the logits, where each gives a part of one score: BBN's halves, ResLT's branches."""

    class Config(Settings):
        name: Literal["sum_logits"] = "sum_logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).sum(dim=0)


@register("aggregator", "mean_probabilities")
class MeanProbabilities(Aggregator):
    """Mean over experts of the probabilities, each expert one vote of weight 1.

    Computed as a log of a sum of exponentials, so that small probabilities do not become log 0.
    """

    class Config(Settings):
        name: Literal["mean_probabilities"] = "mean_probabilities"

    def __call__(self, outputs: Outputs) -> Tensor:
        """Log-probabilities; see `Aggregator.__call__`."""
        log_p_EBC = at_least_float32(outputs.logits_EBC).log_softmax(dim=-1)
        return log_p_EBC.logsumexp(dim=0) - math.log(len(log_p_EBC))
