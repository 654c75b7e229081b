"""The base of losses that are a mean over images, which class weights may weigh.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor

from experts.losses.class_weights import ClassWeights
from experts.objective import Objective, StepContext, num_images
from experts.precision import at_least_float32
from experts.progress import Progress


class PerImage(Objective):
    """Sum over experts of the mean over images of `per_image`; with class weights, of their weighted mean.

    Its one term is named as the objective, [E].
    """

    weighable: ClassVar[bool] = True
    class_weight_C: Tensor | None
    class_weights: ClassWeights | None

    def __init__(self, config: Any, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        self.class_weights = None
        self.register_buffer("class_weight_C", None, persistent=False)

    @abstractmethod
    def per_image(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> Tensor:
        """Return every expert's loss of every image, before class weights, nats [E, B].

        Args:
            logits_EBC: scores, at least float32.
            labels_B, now: as `Objective.forward`.
        """

    def weigh(self, weights: ClassWeights, counts_C: Tensor) -> None:
        """See `Objective.weigh`."""
        if problem := self.config.weighting_problem():
            raise ValueError(problem)
        self.class_weights, self.class_weight_C = weights, weights.of(counts_C)

    def weights_at(self, progress: Progress) -> Tensor | None:
        """Return the class weights of this epoch, [C]; None while all images count alike."""
        applies = self.class_weights is not None and self.class_weights.apply_in(progress.epoch)
        return self.class_weight_C if applies else None

    def phase(self, progress: Progress) -> Hashable:
        """Return also whether class weights apply. See `Objective.phase`."""
        return super().phase(progress), self.weights_at(progress) is not None

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return `images`, or `class_weight`, the sum of the labels' weights, where the mean is a weighted one."""
        weight_C = self.weights_at(progress)
        if weight_C is None or self._denominator(progress) == "images":
            return {"images": num_images(labels_B)}
        return {"class_weight": weight_C[labels_B].sum(dtype=torch.float64)}

    def _denominator(self, progress: Progress) -> str:
        """Return the name of what this epoch's sum is divided by."""
        per_image = self.class_weights is not None and self.class_weights.mean == "images"
        return "images" if per_image or self.weights_at(progress) is None else "class_weight"

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `per_image` and `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        loss_EB = self.per_image(at_least_float32(logits_EBC), labels_B, now)
        weight_C = self.weights_at(now.progress)
        if weight_C is not None:
            loss_EB = loss_EB * weight_C.to(loss_EB.dtype)[labels_B]
        denominator = now.denominators[self._denominator(now.progress)]
        # A sum, not a mean: replicas hold pieces of unequal size, and only the global denominator lets them add up.
        loss_E = loss_EB.sum(dim=-1) / denominator
        return loss_E.sum(), {self.config.name: loss_E.detach()}
