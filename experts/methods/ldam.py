"""LDAM: margins that grow for rare classes; LDAM-DRW switches to class weights late in training.

Paper: Cao et al. 2019, "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", arXiv:1906.07413.
One expert is the published method; several are independent copies that share a trunk.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from experts.losses.cross_entropy import negative_log_likelihood
from experts.losses.effective_number import effective_number_weights
from experts.losses.ldam import check_same_scale, ldam_margins, with_margins
from experts.losses.per_image import PerImage
from experts.objective import ObjectiveSettings, StepContext
from experts.progress import Progress
from experts.registry import register


@register("objective", "ldam")
class LDAM(PerImage):
    """LDAM: cross-entropy with margins that grow for rare classes; LDAM-DRW re-weights it late in training.

    Source: Cao et al. 2019, arXiv:1906.07413, section 3.
    Differs: their epoch // 160 fails after 320 epochs; here the switch is one epoch. Logits come already scaled.
    """

    class Config(ObjectiveSettings):
        name: Literal["ldam"] = "ldam"
        max_margin: float = Field(0.5, ge=0, allow_inf_nan=False)
        """Margin of the rarest class, in units of a cosine; published 0.5 (CIFAR), 0.3 (ImageNet-LT)."""
        scale: float = Field(30.0, gt=0, allow_inf_nan=False)
        """Scale of the head's cosines; must equal head.scale (1 for a linear head)."""
        reweight_epoch: int | None = Field(None, ge=0)
        """Class weights apply in epochs after this one (1-based); published 160 of 200; null: never (plain LDAM)."""
        reweight_beta: float = Field(0.9999, ge=0, lt=1)
        """Beta of the effective number of images, no unit."""

        def check_head(self, head: Any) -> None:
            """See `check_same_scale`."""
            check_same_scale(self, head)

        @property
        def switches(self) -> dict[str, int]:
            """See `ObjectiveSettings.switches`."""
            return {} if self.reweight_epoch is None else {"reweight_epoch": self.reweight_epoch}

        def weighting_problem(self) -> str | None:
            """Return that it has weights of its own, if so. See `ObjectiveSettings.weighting_problem`."""
            if self.reweight_epoch is None:
                return None
            return f"objective '{self.name}' has its own; set objective.reweight_epoch=null, or class_weights=null"

    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"reweight_epoch": 1},)
    margin_C: Tensor
    weight_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        weight_C = effective_number_weights(counts_C, beta=config.reweight_beta)
        # Not persistent: they follow from config and counts, and an old checkpoint must not bring others.
        self.register_buffer("margin_C", ldam_margins(counts_C, max_margin=config.max_margin), persistent=False)
        self.register_buffer("weight_C", weight_C, persistent=False)

    def weights_at(self, progress: Progress) -> Tensor | None:
        """Return its own class weights after the switch, or those put on it. See `PerImage.weights_at`."""
        switch = self.config.reweight_epoch
        return self.weight_C if switch is not None and progress.epoch > switch else super().weights_at(progress)

    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """See `ldam_loss` and `PerImage.per_image`."""
        del now
        lowered_EBC = with_margins(logits_EBC, labels_B, self.margin_C, scale=self.config.scale)
        return negative_log_likelihood(lowered_EBC, labels_B)
