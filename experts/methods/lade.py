"""LADE: balanced softmax, and a bound that makes scores forget the training distribution.

Paper: Hong et al. 2021, "Disentangling Label Distribution for Long-tailed Visual Recognition", arXiv:2012.00321.
At test the log of the test distribution is added to the scores: nothing for a balanced test set, and for another one
what `expertail evaluate --weights known-prior` does.

Shapes: E experts, B images of the whole batch, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.binary import one_hot
from experts.losses.counts import log_prior
from experts.losses.cross_entropy import cross_entropy
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.registry import register


def lade_regulariser(
    logits_EBC: Tensor, labels_B: Tensor, *, log_prior_C: Tensor, penalty: float, ratio: Literal["column", "label"]
) -> Tensor:
    """Return -sum_c pi_c (a_c - b_c - penalty b_c^2) of every expert, [E]; for each class a Donsker-Varadhan bound.

    a_c is the mean of z_c over the batch's images of class c, 0 where it has none; b_c the log of the mean over all
    images of exp(z_c) times the ratio of the uniform to the training distribution.

    Args:
        logits_EBC: scores z of all images of the batch, at least float32.
        labels_B: class ids, int64, in [0, C).
        log_prior_C: log pi.
        penalty: lambda, no unit.
        ratio: the class that the ratio is taken of: the "column" c (code), or the image's own "label" (derivation).

    Source: Hong et al. 2021, arXiv:2012.00321, section 3.3, and published code.
    Differs: the code adds 1e-9 inside logs and 1e-8 to counts; we refuse empty classes. Same to 1e-6.
    """
    log_pi_C = log_prior_C.to(logits_EBC.dtype)
    target_BC = one_hot(labels_B, logits_EBC)
    mean_EC = (logits_EBC * target_BC).sum(dim=1) / target_BC.sum(dim=0).clamp_min(1)
    log_of = log_pi_C if ratio == "column" else log_pi_C[labels_B].unsqueeze(-1)
    weighted_EBC = logits_EBC - log_of - math.log(len(log_pi_C))
    bound_EC = weighted_EBC.logsumexp(dim=1) - math.log(len(labels_B))
    return -(log_pi_C.exp() * (mean_EC - bound_EC - penalty * bound_EC**2)).sum(dim=-1)


@register("objective", "lade")
class LADE(Objective):
    """Sum over experts of balanced softmax and alpha times the regulariser, over the whole batch. May be negative.

    Source: Hong et al. 2021, arXiv:2012.00321, section 3.3.
    """

    class Config(ObjectiveSettings):
        name: Literal["lade"] = "lade"
        alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
        """Weight of the regulariser, no unit; published 0.1 (CIFAR-100), 0.05 (ImageNet-LT, iNaturalist), 0.005
        (Places-LT)."""
        penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
        """lambda, weight of the squared bound, no unit; published 0.01 (CIFAR-100), 0.5 (ImageNet-LT, iNaturalist), 0.1
        (Places-LT, the survey)."""
        ratio: Literal["column", "label"] = "column"
        """Class that importance weights are taken of: each score's ("column", published code), or the image's own
        ("label", the paper's derivation)."""

    whole_batch: ClassVar[bool] = True
    why_not_weighable: ClassVar[str] = ", as it is no mean over images"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"penalty": 0.5, "ratio": "label"},)
    log_prior_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from the counts, and an old checkpoint must not bring another.
        self.register_buffer("log_prior_C", log_prior(counts_C), persistent=False)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss; terms `balanced_softmax` and `regulariser`, [E], before alpha. See `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        logits_EBC = at_least_float32(logits_EBC)
        config = self.config
        shifted_EBC = logits_EBC + self.log_prior_C.to(logits_EBC.dtype)
        loss_E = cross_entropy(shifted_EBC, labels_B, denominator=now.denominators["images"])
        extra_E = lade_regulariser(
            logits_EBC, labels_B, log_prior_C=self.log_prior_C, penalty=config.penalty, ratio=config.ratio
        )
        terms = {"balanced_softmax": loss_E.detach(), "regulariser": extra_E.detach()}
        return (loss_E + config.alpha * extra_E).sum(), terms
