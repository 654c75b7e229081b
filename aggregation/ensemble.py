"""How the experts' logits become the ensemble's.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from experts.losses.precision import at_least_float32
from experts.registry import Settings, register


@register("aggregator", "mean_logits")
class MeanLogits:
    """Mean over experts of the logits: the normalised product of their probabilities. RIDE's rule.

    A call takes logits [E, B, C] and returns scores [B, C]: argmax gives the class, softmax the probabilities.
    """

    class Config(Settings):
        name: Literal["mean_logits"] = "mean_logits"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, logits_EBC: Tensor) -> Tensor:
        return at_least_float32(logits_EBC).mean(dim=0)


@register("aggregator", "mean_probabilities")
class MeanProbabilities:
    """Mean over experts of the probabilities, each expert one vote of weight 1.

    A call takes logits [E, B, C] and returns log-probabilities [B, C]: argmax gives the class, softmax (or exp) the
    probabilities. Computed as a log of a sum of exponentials, so that small probabilities do not become log 0.
    """

    class Config(Settings):
        name: Literal["mean_probabilities"] = "mean_probabilities"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, logits_EBC: Tensor) -> Tensor:
        log_p_EBC = at_least_float32(logits_EBC).log_softmax(dim=-1)
        return log_p_EBC.logsumexp(dim=0) - math.log(len(log_p_EBC))
