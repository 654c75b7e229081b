"""What every objective of an ensemble has in common.

Shapes: E experts, B images of this piece of the batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experts.progress import Progress
from experts.registry import Settings

MAX_EXPERTS = 8


class ObjectiveSettings(Settings):
    """Base of the objectives' configs."""

    def check_head(self, head: Any) -> None:
        """Refuse a head that the objective cannot work with; most objectives take any.

        Args:
            head: config of the head; its `scale` is what the head multiplies its scores with (1 for a linear head).

        Raises:
            ValueError: names both keys, `objective.<key>` and `head.<key>`, and what to set.
        """


class Objective(nn.Module, ABC):
    """The loss of the whole ensemble, in a form that adds up over the pieces of a batch.

    A worker sees a piece of the global batch, possibly an empty one. It asks for `denominators` of its own labels,
    these are summed over all pieces, and `forward` divides the piece's numerators by the sums. The losses, gradients
    and terms of the pieces then add up to those of the whole batch. Logits of experts that live elsewhere come in
    detached: the value is still the whole loss, and the gradient exactly the loss's for the attached slots.

    Args:
        config: the `Config` of the class.
        counts_C: training images per class, int64.
        num_experts: E, 1 to 8.
    """

    couples: ClassVar[bool]
    """Whether an expert's gradient depends on the other experts' logits."""

    def __init__(self, config: Any, counts_C: Tensor, num_experts: int) -> None:
        super().__init__()
        if not 1 <= num_experts <= MAX_EXPERTS:
            raise ValueError(
                f"objective '{config.name}': method.num_experts = {num_experts}; it takes 1 to {MAX_EXPERTS} experts"
            )
        if counts_C.ndim != 1 or len(counts_C) < 2:
            raise ValueError(
                f"objective '{config.name}': needs training images per class for 2 or more classes, "
                f"got counts of shape {tuple(counts_C.shape)}"
            )
        self.config = config
        self.num_experts = num_experts
        self.num_classes = len(counts_C)

    @abstractmethod
    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """This piece's share of what the loss is divided by: float64 scalars, to be summed over all pieces."""

    @abstractmethod
    def forward(
        self, logits_EBC: Tensor, labels_B: Tensor, denominators: dict[str, Tensor], progress: Progress
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This piece's share of the loss.

        Args:
            logits_EBC: scores, any float type; half types are computed in float32.
            labels_B: class ids, int64, in [0, C).
            denominators: the sums over the global batch.
            progress: where training stands; everything that changes with time follows from it.

        Returns:
            The loss (scalar, nats) and its terms, detached, each a scalar or [E] with one value per expert.
        """

    def check_shapes(self, logits_EBC: Tensor, labels_B: Tensor) -> None:
        """Refuse logits and labels that do not belong together.

        Raises:
            ValueError: logits are not [num_experts, B, num_classes], or labels are not [B].
        """
        name = self.config.name
        if logits_EBC.ndim != 3 or len(logits_EBC) != self.num_experts:
            raise ValueError(
                f"objective '{name}': built for method.num_experts = {self.num_experts}, got logits of shape "
                f"{tuple(logits_EBC.shape)}; needed [{self.num_experts}, images, {self.num_classes}]"
            )
        if labels_B.ndim != 1 or logits_EBC.shape[1:] != (len(labels_B), self.num_classes):
            raise ValueError(
                f"objective '{name}': logits {tuple(logits_EBC.shape)} and labels {tuple(labels_B.shape)} do not fit; "
                f"needed [{self.num_experts}, B, {self.num_classes}] and [B]"
            )


def num_images(labels_B: Tensor) -> Tensor:
    """Number of images as a float64 scalar on the labels' device."""
    # A fill, not a copy from the host, which would make an accelerator wait.
    return torch.full((), float(len(labels_B)), dtype=torch.float64, device=labels_B.device)
