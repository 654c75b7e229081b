"""How the experts' outputs become the ensemble's: pieces of kind "aggregator".

Shapes: E experts, B images, C classes, K numbers an expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from experts.precision import at_least_float32
from experts.registry import Settings, register

ALL_EXPERTS = "all experts"
"""A router's second member: what the ensemble would say if every image went to every expert."""


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


@register("aggregator", "weighted")
class Weighted(Aggregator):
    """Sum over experts of weight times logits, one weight for each expert. TADE's rule at test time.

    Source: Zhang et al. 2022, arXiv:2107.09249; the weights learned there are any point of the simplex.

    Raises:
        ValueError: a weight is negative, they do not sum to 1, or they are not of exactly the ensemble's experts.
    """

    class Config(Settings):
        name: Literal["weighted"] = "weighted"
        weights: dict[str, float]
        """Share of each expert by name, no unit: 0 or more, together 1."""

        @field_validator("weights")
        @classmethod
        def _on_the_simplex(cls, weights: dict[str, float]) -> dict[str, float]:
            shown = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
            wrong = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
            if wrong:
                raise ValueError(f"weights {shown}: {', '.join(wrong)} must be a number of 0 or more")
            total = math.fsum(weights.values())
            if abs(total - 1) > 1e-6:
                divided = "; divide each by their sum" if total > 0 else ""
                raise ValueError(f"weights {shown}: they sum to {total:.8g}, needed 1 (within 1e-6){divided}")
            return weights

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble of other experts than there are weights for.

            Raises:
                ValueError: names the key, what was found and what was needed.
            """
            if set(self.weights) != set(names):
                raise ValueError(
                    f"method.aggregator.weights: found weights of {', '.join(self.weights)}; needed one for each of "
                    f"{', '.join(names)} and nobody else"
                )

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        self._weights = [config.weights[name] for name in expert_names]

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_EBC = at_least_float32(outputs.logits_EBC)
        return torch.einsum("e,ebc->bc", logits_EBC.new_tensor(self._weights), logits_EBC)


@register("aggregator", "only")
class Only(Aggregator):
    """The logits of one expert: LFME's student, whose teachers are left out at test time.

    Raises:
        ValueError: the ensemble has no expert of that name.
    """

    class Config(Settings):
        name: Literal["only"] = "only"
        expert: str
        """Name of the expert that answers."""

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble without that expert.

            Raises:
                ValueError: names the key, what was found and what was needed.
            """
            if self.expert not in names:
                raise ValueError(
                    f"method.aggregator.expert = {self.expert}: no such expert; needed one of {', '.join(names)}"
                )

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        self._position = expert_names.index(config.expert)

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC[self._position])
