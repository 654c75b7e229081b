"""Seesaw loss: a class is pushed down less by images of more frequent classes, and more where it wrongly wins.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import negative_log_likelihood, of_label
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.registry import register


def seesaw_log_factors(
    logits_EBC: Tensor, labels_B: Tensor, *, log_counts_C: Tensor, p: float, q: float, floor: float
) -> Tensor:
    """Return log S of every class against every image's own, without gradient, [E, B, C]; 0 for the own class.

    S_ij = min(1, N_j / N_i)^p max(1, sigma_j / max(sigma_i, floor))^q, with sigma = softmax(z) and i the image's class.

    Args:
        logits_EBC: scores z, at least float32.
        labels_B: class ids, int64, in [0, C).
        log_counts_C: log N.
        p: strength of the mitigation by counts, no unit.
        q: strength of the compensation of mistakes, no unit.
        floor: least probability of the own class in the compensation.

    Source: Wang et al. 2021, arXiv:2008.10032, section 3.
    """
    log_n_C = log_counts_C.to(logits_EBC.dtype)
    mitigation_BC = p * (log_n_C - log_n_C[labels_B].unsqueeze(-1)).clamp_max(0)
    sigma_EBC = logits_EBC.detach().softmax(dim=-1)
    own_EB1 = of_label(sigma_EBC, labels_B).clamp_min(floor).unsqueeze(-1)
    compensation_EBC = q * (sigma_EBC / own_EB1).clamp_min(1).log()
    index_EB1 = labels_B.expand(len(logits_EBC), -1).unsqueeze(-1)
    return (mitigation_BC + compensation_EBC).scatter(-1, index_EB1, 0.0)


@register("objective", "seesaw")
class Seesaw(PerImage):
    """Cross-entropy of z + log S, S the seesaw's pairwise factors, which have no gradient.

    Source: Wang et al. 2021, arXiv:2008.10032.
    Differs: the published code counts the images that it has seen; here N is the training set's counts, which every
    worker knows from the first step on. So the sampler must keep the training distribution. Its head for "any object"
    is for detection and left out.
    """

    class Config(ObjectiveSettings):
        name: Literal["seesaw"] = "seesaw"
        p: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.8
        """Strength of the mitigation: how much less a rarer class is pushed down, no unit; published 0.8."""
        q: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
        """Strength of the compensation: how much more a wrongly winning class is pushed down, no unit; published 2."""
        floor: Annotated[float, Field(gt=0, le=1)] = 0.01
        """Least probability of the image's own class in the compensation; published 0.01."""

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"q": 0.0}, {"p": 0.0})
    log_counts_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from the counts, and an old checkpoint must not bring another.
        self.register_buffer("log_counts_C", positive_counts(counts_C).log(), persistent=False)

    @property
    def detached(self) -> str:
        """The compensation, which depends on the scores; the mitigation does not."""
        return "the compensation factor" if self.config.q else ""

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `seesaw_log_factors` and `PerImage.per_image`."""
        del now
        config = self.config
        log_s_EBC = seesaw_log_factors(
            logits_EBC, labels_B, log_counts_C=self.log_counts_C, p=config.p, q=config.q, floor=config.floor
        )
        return negative_log_likelihood(logits_EBC + log_s_EBC, labels_B)
