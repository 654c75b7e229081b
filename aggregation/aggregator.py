"""Rules that combine the experts' outputs into the ensemble's: pieces of kind "aggregator".

Shapes: E experts, B images, C classes, K numbers per expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from experts.cases import Case
from experts.class_groups import GroupRule
from experts.data.transfer import Constant
from experts.precision import at_least_float32
from experts.registry import Settings, register


@dataclass(frozen=True)
class Outputs:
    """Outputs of all experts for some images.

    Attributes:
        logits_EBC: scores.
        numbers_EK: `Aggregator.describe` of every expert; K may be 0.
        gates_EB: a router's score for asking the next expert after expert k (a probability above 1/2 is a score above
            0); the last row means nothing. None without a router.
    """

    logits_EBC: Tensor
    numbers_EK: Tensor | None = None
    gates_EB: Tensor | None = None


class AggregatorSettings(Settings):
    """Base of the aggregators' configs; most rules take any head, objective and experts."""

    def check_head(self, head: Any) -> None:
        """Refuse a head, by its config, that the rule cannot work with.

        Raises:
            ValueError: names the key, what was found and what was needed.
        """

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective, by its config, whose experts learn other classes than the rule assumes.

        Raises:
            ValueError: names both keys and what to set.
        """

    def check_class_weights(self, weights: Any) -> None:
        """Refuse class weights, by their config or None, with which the heads learnt another distribution than the rule
        assumes.

        Raises:
            ValueError: names both keys and what to set.
        """

    def check_sampler(self, sampler: Any) -> None:
        """Refuse a sampler, by its config, that showed the heads another class distribution than the rule assumes.

        Raises:
            ValueError: names the key, what was found and what was needed.
        """

    @property
    def group_rule(self) -> GroupRule | None:
        """The rule that cuts the classes into groups for the experts: the field `groups`, if there is one."""
        return getattr(self, "groups", None)

    def check_experts(self, names: Sequence[str]) -> None:
        """Refuse an ensemble of other experts than the rule is for.

        Raises:
            ValueError: names the key, what was found and what was needed.
        """


def check_probabilities(rule: str, objective: Any) -> None:
    """Refuse an objective, by its config, whose scores only rank, for a rule that reads them as log probabilities.

    Raises:
        ValueError: names both keys and what to set.
    """
    if not objective.gives_probabilities:
        raise ValueError(
            f"aggregator '{rule}' reads scores as log probabilities, but those of objective.name = {objective.name} "
            f"only rank, since it asks one question for each class; set aggregator.name=mean_logits, or a loss with a "
            f"softmax"
        )


class Aggregator(ABC):
    """One rule. Built with the training images per class, int64 [C], and the experts' names."""

    needs_router: ClassVar[bool] = False
    """Whether it reads a router's scores, which a stage must have trained."""
    order_matters: ClassVar[str] = ""
    """Why an expert's place or name matters to the rule; empty where it does not."""
    agreement_adds: ClassVar[str] = ""
    """Why experts that agree are surer together than each alone; empty where they are not."""
    undecided: ClassVar[str] = ""
    """Message for images where `experts_used` is NaN; empty where it never is."""
    corrects_classes: ClassVar[str] = ""
    """Why the scores of even a single expert change, by a number per class; empty where they do not."""
    Config: ClassVar[Any]

    @classmethod
    def cases(cls, expert_names: tuple[str, ...]) -> list[Case]:
        """Return what the contract tests try with experts of these names."""
        del expert_names
        return [Case(cls.Config())]

    def __init__(self, config: Any, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        self.config = config
        self.expert_names = expert_names

    def describe(self, expert: nn.Module) -> Tensor:
        """Return numbers of one expert's weights that the rule needs, float [K]; none by default.

        They lie on the expert's device: workers exchange them, and NCCL takes tensors of a GPU alone.
        """
        return torch.zeros(0, device=next((p.device for p in expert.parameters()), None))

    def check(self, numbers_EK: Tensor) -> None:
        """Look at the numbers of the experts before the first of their outputs come; most rules have no need to.

        A rule that does waits for the device here, once, and not in every batch.

        Raises:
            ValueError: the rule cannot be applied with such numbers.
        """
        del numbers_EK

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Tensor:
        """Return the ensemble's scores [B, C]: argmax gives the class, softmax the probabilities.

        No value is read here, so that the host never waits. Where there is no sound answer the scores are not finite.
        """

    def members(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return scores [B, C] to be measured, by name: "ensemble" first, then those to compare it with."""
        return {"ensemble": self(outputs)}

    def experts_used(self, outputs: Outputs) -> Tensor | None:
        """Return how many experts scored each image, [B]; NaN where that is not known, None where all always do."""
        return None


@register("aggregator", "mean_logits")
class MeanLogits(Aggregator):
    """Mean over experts of the logits: the normalised product of their probabilities. RIDE's rule."""

    class Config(AggregatorSettings):
        name: Literal["mean_logits"] = "mean_logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).mean(dim=0)


@register("aggregator", "sum_logits")
class SumLogits(Aggregator):
    """Sum over experts of the logits, where each gives a part of one score: BBN's halves, ResLT's branches."""

    class Config(AggregatorSettings):
        name: Literal["sum_logits"] = "sum_logits"

    agreement_adds: ClassVar[str] = "experts give parts of one score"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).sum(dim=0)


@register("aggregator", "mean_probabilities")
class MeanProbabilities(Aggregator):
    """Mean over experts of the probabilities, each expert one vote of weight 1.

    Computed as a log of a sum of exponentials, so that small probabilities do not become log 0.
    """

    class Config(AggregatorSettings):
        name: Literal["mean_probabilities"] = "mean_probabilities"

        def check_objective(self, objective: Any) -> None:
            """Refuse an objective whose scores are no log probabilities."""
            check_probabilities(self.name, objective)

    def __call__(self, outputs: Outputs) -> Tensor:
        """Return log-probabilities; see `Aggregator.__call__`."""
        log_p_EBC = at_least_float32(outputs.logits_EBC).log_softmax(dim=-1)
        # log of the mean: the sum less log E.
        return log_p_EBC.logsumexp(dim=0) - math.log(len(log_p_EBC))


@register("aggregator", "weighted")
class Weighted(Aggregator):
    """Sum over experts of weight times logits, one weight for each expert. TADE's rule at test time.

    Source: Zhang et al. 2022, arXiv:2107.09249; the weights learned there are any point of the simplex.

    Raises:
        ValueError: a weight is negative, they do not sum to 1, or they are not of exactly the ensemble's experts.
    """

    class Config(AggregatorSettings):
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
            total = math.fsum(weights.values())  # exact, so that the order of the experts cannot decide
            if abs(total - 1) > 1e-6:
                divided = "; divide each by their sum" if total > 0 else ""
                raise ValueError(f"weights {shown}: they sum to {total:.8g}, needed 1 (within 1e-6){divided}")
            return weights

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble of other experts than there are weights for."""
            if set(self.weights) != set(names):
                raise ValueError(
                    f"method.aggregator.weights: found weights of {', '.join(self.weights)}; needed one for each of "
                    f"{', '.join(names)} and no other expert"
                )

    order_matters: ClassVar[str] = "every expert has its own weight"

    @classmethod
    def cases(cls, expert_names: tuple[str, ...]) -> list[Case]:
        """See `Aggregator.cases`; the weights differ, and most are no powers of 2, so that rounding shows."""
        total = sum(range(len(expert_names) + 1))
        return [Case(cls.Config(weights={name: (k + 1) / total for k, name in enumerate(expert_names)}))]

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        # Named in the config, in the order of the logits here.
        self._weights_E = Constant(torch.tensor([config.weights[name] for name in expert_names], dtype=torch.float64))

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_EBC = at_least_float32(outputs.logits_EBC)
        weights_E = self._weights_E.on(logits_EBC.device, logits_EBC.dtype)
        return torch.einsum("e,ebc->bc", weights_E, logits_EBC)


@register("aggregator", "only")
class Only(Aggregator):
    """The logits of one expert: LFME's student, whose teachers are left out at test time.

    Raises:
        ValueError: the ensemble has no expert of that name.
    """

    class Config(AggregatorSettings):
        name: Literal["only"] = "only"
        expert: str
        """Name of the expert that answers."""

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble without that expert."""
            if self.expert not in names:
                raise ValueError(
                    f"method.aggregator.expert = {self.expert}: no such expert; needed one of {', '.join(names)}"
                )

    order_matters: ClassVar[str] = "the answer is one expert's, found by its name"

    @classmethod
    def cases(cls, expert_names: tuple[str, ...]) -> list[Case]:
        """See `Aggregator.cases`."""
        return [Case(cls.Config(expert=expert_names[-1]))]

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        self._position = expert_names.index(config.expert)

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC[self._position])
