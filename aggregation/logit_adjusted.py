"""Correction of scores after training: the class frequencies that the experts have learnt are subtracted.

The correction inside the loss is `experts/losses/logit_adjustment.py`. A model needs one of the two, never both.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from aggregation.aggregator import Aggregator, AggregatorSettings, Outputs, check_probabilities
from experts.cases import Case
from experts.data.transfer import Constant
from experts.losses.counts import log_prior
from experts.objective import MAX_EXPERTS
from experts.precision import at_least_float32
from experts.registry import piece, register
from experts.tunable import Candidates, Tunable, tenths

Strength = Annotated[float | None, Field(ge=0, allow_inf_nan=False)]


class PriorSettings(AggregatorSettings):
    """Config of a rule that subtracts the training distribution."""

    name: str
    candidates: Candidates = tenths(20)
    """Strengths to choose from on the validation split, no unit."""

    def check_objective(self, objective: Any) -> None:
        """Refuse an objective whose experts do not learn the training distribution: there is nothing to subtract."""
        check_probabilities(self.name, objective)
        counts_C = torch.tensor([2, 1])
        numbers = range(1, MAX_EXPERTS + 1)
        num_experts = next(number for number in numbers if objective.number_problem(number) is None)
        _, learnt = objective.trained_log_prior(counts_C, log_prior(counts_C), num_experts)
        if set(learnt) != {"train"}:
            aims = ", ".join(dict.fromkeys(learnt))
            raise ValueError(
                f"aggregator '{self.name}' subtracts the training distribution, but with objective.name = "
                f"{objective.name} the experts learn: {aims}; set objective.name=cross_entropy, or "
                f"aggregator.name=mean_logits"
            )

    def check_head(self, head: Any) -> None:
        """Refuse a head whose scores are no log probabilities of the training distribution: fitted, or evened out."""
        cls = piece("head", head.name)
        if cls.fits or cls.evens:
            why = "is fitted" if cls.fits else "has taken away what frequent classes gained"
            raise ValueError(
                f"aggregator '{self.name}' subtracts log frequencies from scores that were trained, but head.name = "
                f"{head.name} {why}; set head.name=linear, or aggregator.name=mean_logits"
            )

    def check_class_weights(self, weights: Any) -> None:
        """Refuse class weights: with them the experts have learnt another distribution than that of the images."""
        if weights is not None:
            raise ValueError(
                f"aggregator '{self.name}' subtracts the training distribution, but with class_weights.rule = "
                f"{weights.rule} the experts learn another one; set class_weights=null, or aggregator.name=mean_logits"
            )

    def check_sampler(self, sampler: Any) -> None:
        """Refuse a sampler after which the experts have learnt another distribution than that of the training set."""
        if not piece("sampler", sampler.name).keeps_distribution:
            raise ValueError(
                f"aggregator '{self.name}' subtracts the training distribution, but with sampler.name = {sampler.name} "
                f"the heads have seen another one; set sampler.name=instance_balanced, or aggregator.name=mean_logits"
            )


class PriorCorrected(Aggregator, Tunable):
    """Mean over experts of the logits, less a strength times log pi, pi the classes' shares of the training images.

    Raises:
        ValueError: a class has no training image.
    """

    corrects_classes: ClassVar[str] = "the training distribution is subtracted"

    @classmethod
    def cases(cls, expert_names: tuple[str, ...]) -> list[Case]:
        """See `Aggregator.cases`."""
        del expert_names
        return [Case(cls.Config()), Case(cls.Config(**{cls.tuned_key: None}))]

    def __init__(self, config: Any, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        self.take_number(config)
        self._log_prior_C = Constant(log_prior(counts_C).cpu())

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_BC = at_least_float32(outputs.logits_EBC).mean(dim=0)
        return logits_BC - self.value * self._log_prior_C.on(logits_BC.device, logits_BC.dtype)


@register("aggregator", "logit_adjusted")
class LogitAdjusted(PriorCorrected):
    """Logit adjustment after training: z - tau log pi, for experts trained with plain cross-entropy.

    Source: Menon et al. 2021, arXiv:2007.07314.
    Differs: published code has log(pi^tau + 1e-12); we refuse empty classes. Same to 1e-12 / pi^tau.
    """

    class Config(PriorSettings):
        name: Literal["logit_adjusted"] = "logit_adjusted"
        tau: Strength = 1.0
        """Strength, no unit; published 1; null chooses it on the validation split."""

    tuned_key: ClassVar[str] = "tau"
    published: ClassVar[float] = 1.0
    origin: ClassVar[str] = "Menon et al. 2021, consistent for the class-averaged error"


@register("aggregator", "uno_ic")
class UnoIC(PriorCorrected):
    """UNO-IC's imbalance calibration, p^(1 - lam) r^lam with r the corrected p: log p - lam log pi, to a constant.

    So it is logit adjustment after training, and differs in how its strength is found: on a balanced validation set.

    Source: Tian et al. 2020, arXiv:2010.11820, and published code (for Places-LT).
    Differs: there a class without images can never be predicted; we refuse it.
    """

    class Config(PriorSettings):
        name: Literal["uno_ic"] = "uno_ic"
        lam: Strength = 1.3
        """Lambda, the exponent of the corrected probabilities, no unit; published 1.3 (Places-LT); null chooses it on
        the validation split, as the method has it."""

    tuned_key: ClassVar[str] = "lam"
    published: ClassVar[float] = 1.3
    origin: ClassVar[str] = "Tian et al. 2020, Places-LT"
