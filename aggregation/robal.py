"""RoBal's shift at test: a little of the training distribution is subtracted beside what the loss has corrected.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from aggregation.logit_adjusted import PriorCorrected, PriorSettings
from experts.registry import register


@register("aggregator", "robal")
class RoBalShift(PriorCorrected):
    """Mean over experts of the scores, less tau_p log pi, for experts trained with RoBal's loss or any other.

    Unlike logit adjustment it is no correction of the whole prior: RoBal's loss has added tau_b log pi already. Both
    numbers are the paper's.

    Source: Wu et al. 2021, arXiv:2104.02703, section 4.2, and published code.
    """

    class Config(PriorSettings):
        name: Literal["robal"] = "robal"
        tau: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = 0.1
        """tau_p, strength, no unit; published 0.1 (CIFAR-10, clean); null chooses it on the validation split."""

        def check_objective(self, objective: Any) -> None:
            """Take any objective: the strength is a number of the method, not a correction of what was learnt."""

        def check_class_weights(self, weights: Any) -> None:
            """Take any, likewise."""

        def check_sampler(self, sampler: Any) -> None:
            """Take any, likewise."""

    tuned_key: ClassVar[str] = "tau"
    published: ClassVar[float] = 0.1
    origin: ClassVar[str] = "Wu et al. 2021, CIFAR-10-LT without attacks"
