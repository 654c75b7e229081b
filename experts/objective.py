"""What every objective of an ensemble has in common.

Shapes: E experts, B images of this piece of the batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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

    @property
    def teacher_names(self) -> tuple[str, ...] | None:
        """The teachers that the objective learns from, all of them needed; None where it asks for none by name."""
        return None


@dataclass(frozen=True)
class Given:
    """What a stage gives some objectives beside logits and labels.

    Attributes:
        teachers: scores [B, C_t] of frozen teachers by name, without gradient; a teacher may know fewer classes.
        positions_B: rows of the training set that the images are, int64.
    """

    teachers: Mapping[str, Tensor] = field(default_factory=dict)
    positions_B: Tensor | None = None


NOTHING = Given()


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
    label_sets: ClassVar[int] = 1
    """2 where labels are [2, B], of the two batches of a pair; denominators still count pairs once."""
    extra_outputs: ClassVar[int] = 0
    """Outputs of an expert beyond its C scores, which come first."""
    num_experts_allowed: ClassVar[tuple[int, ...] | None] = None
    """Numbers of experts that it takes, where not every one from 1 to 8."""
    prepares: ClassVar[bool] = False
    """Whether `prepare` has something to do, which needs teachers and a validation split."""
    observes: ClassVar[bool] = False
    """Whether `observe` has something to do, which needs a validation split."""
    teacher_classes: Mapping[str, Any]
    """Class ids that a teacher knows, by its name, int64 [C_t]; teachers not named know all."""

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
        self.teacher_classes = {}

    @abstractmethod
    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """This piece's share of what the loss is divided by: float64 scalars, to be summed over all pieces."""

    @abstractmethod
    def forward(
        self,
        logits_EBC: Tensor,
        labels_B: Tensor,
        denominators: dict[str, Tensor],
        progress: Progress,
        given: Given = NOTHING,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This piece's share of the loss.

        Args:
            logits_EBC: scores, any float type; half types are computed in float32.
            labels_B: class ids, int64, in [0, C).
            denominators: the sums over the global batch.
            progress: where training stands; everything that changes with time follows from it.
            given: teachers' scores and rows of the training set, for objectives that ask for them.

        Returns:
            The loss (scalar, nats) and its terms, detached, each a scalar or [E] with one value per expert.
        """

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """What each expert's learning rate is multiplied with; the trunk's and shared heads' never is."""
        return (1.0,) * self.num_experts

    def prepare(self, batches: Callable[[str], Iterable[tuple[Given, Tensor]]]) -> None:
        """Look at the data, once before the first step of a stage.

        Args:
            batches: for "train" and "val", all images of the split as they are evaluated, in any order: the teachers'
                scores (with `positions_B` for "train") and the labels [B].
        """

    def observe(self, per_class_top1: Sequence[float | None]) -> None:
        """Take note of how the ensemble does on the validation split.

        Args:
            per_class_top1: fractions, one a class; None where the split has no image of a class.
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
        rows = tuple(labels_B.shape) if self.label_sets == 1 else tuple(labels_B.shape[1:])
        outputs = self.num_classes + self.extra_outputs
        sets_fit = labels_B.ndim == 1 if self.label_sets == 1 else labels_B.shape[:1] == (self.label_sets,)
        if not sets_fit or tuple(logits_EBC.shape[1:]) != (*rows, outputs):
            raise ValueError(
                f"objective '{name}': logits {tuple(logits_EBC.shape)} and labels {tuple(labels_B.shape)} do not fit; "
                f"needed [{self.num_experts}, B, {outputs}] and [{'' if self.label_sets == 1 else '2, '}B]"
            )


def num_images(labels_B: Tensor) -> Tensor:
    """Number of images as a float64 scalar on the labels' device."""
    # A fill, not a copy from the host, which would make an accelerator wait.
    return torch.full((), float(len(labels_B)), dtype=torch.float64, device=labels_B.device)


def check_same_scale(objective: Any, head: Any) -> None:
    """A margin is meant in units of a cosine: the objective must multiply it with the scale that the head applies.

    Raises:
        ValueError: the two scales differ.
    """
    if objective.scale != head.scale:
        fix = (
            "set method.head.name = 'cosine', or objective.scale = 1"
            if head.name == "linear"
            else f"set both to the same number (published 30), here objective.scale = {head.scale:g}"
        )
        raise ValueError(
            f"objective.scale = {objective.scale:g}: objective '{objective.name}' multiplies its margins with it, but "
            f"head '{head.name}' has head.scale = {head.scale:g}; {fix}"
        )
