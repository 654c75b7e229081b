"""Terms by which an ensemble learns from a frozen teacher beside its own objective: pieces of kind "distillation".

The teacher is any trained ensemble; it comes as its aggregated scores of the same augmented images.
Shapes: E experts, B images of this piece of the batch, C classes, S student scores (1 or E).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from experts.objective import num_images
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import Settings, register

Repeat = Literal["num_experts"] | Annotated[int, Field(ge=1)]


def distillation_loss(student_SBC: Tensor, teacher_BC: Tensor, *, temperature: float, images: Tensor) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)) of each student score, summed over images / `images`.

    Args:
        student_SBC: scores; half types are computed in float32.
        teacher_BC: scores or log-probabilities; no gradient goes to them.
        temperature: T, no unit.
        images: scalar, images of the global batch.

    Returns:
        Nats per student score, [S].

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    student_SBC = at_least_float32(student_SBC)
    log_p_SBC = (student_SBC / temperature).log_softmax(dim=-1)
    log_q_BC = (teacher_BC.detach().to(student_SBC.dtype) / temperature).log_softmax(dim=-1)
    kl_S = (log_q_BC.exp() * (log_q_BC - log_p_SBC)).sum(dim=(-2, -1)) / images
    # T^2 undoes the factor 1 / T^2 that a temperature puts on gradients.
    return temperature**2 * kl_S


class DistillationSettings(Settings):
    """Base of the configs of distillations."""

    temperature: float = Field(1.5, gt=0, allow_inf_nan=False)
    """T, divides student's and teacher's scores, no unit; published 1.5 (RIDE)."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Weight of the distillation term, no unit; published 1."""
    repeat: Repeat = 1
    """How often objective and distillation are counted: once, or "num_experts" times, which acts as a larger learning
    rate."""
    teacher: str | None = None
    """Name of the teacher where the stage has several."""


class Distillation(ABC):
    """Adds a teacher's term to a stage's loss. Built with its config.

    Like an objective, it works on a piece of the batch and divides by denominators of the global batch, so that losses
    and terms of the pieces add up to those of the whole.
    """

    capturable: bool = True
    """As `Objective.capturable`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def student_scores(self, logits_EBC: Tensor) -> Tensor:
        """Return the scores that are compared with the teacher's, [S, B, C]."""

    def denominators(self, labels_B: Tensor) -> dict[str, Tensor]:
        """Return `images`, a float64 scalar that adds up over pieces of a batch. Labels are [B], or [2, B] of pairs."""
        return {"images": num_images(labels_B)}

    def phase(self, progress: Progress) -> Hashable:
        """Return a value that changes whenever the term is made of other operations or Python numbers.

        While it stays the same, operations that were captured once are right for every moment, as for
        `Objective.phase`. By default it never changes.
        """
        del progress
        return ()

    def __call__(
        self,
        loss: Tensor,
        logits_EBC: Tensor,
        teachers: Mapping[str, Tensor],
        denominators: Mapping[str, Tensor],
        progress: Progress,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the stage's whole loss.

        Args:
            loss: this piece's share of the objective.
            logits_EBC: scores of all experts.
            teachers: scores [B, C] by name.
            denominators: sums over the global batch.
            progress: where training stands.

        Returns:
            repeat * `together` of loss and weight * sum of `distillation_loss`, and the term `distillation`, detached:
            the mean per image before weight and repeat, a scalar where one score is compared, else [E].

        Raises:
            ValueError: no teacher, several and none chosen, one of that name missing, or scores that do not fit.
        """
        teacher_BC = self._chosen(teachers)
        if logits_EBC.ndim != 3 or teacher_BC.shape != logits_EBC.shape[1:]:
            raise ValueError(
                f"distillation '{self.name}': the teacher scores {tuple(teacher_BC.shape)} (images, classes), the "
                f"student {tuple(logits_EBC.shape)} (experts, images, classes); needed the same images and classes: "
                f"choose a teacher of the same data set"
            )
        config = self.config
        kd_S = distillation_loss(
            self.student_scores(at_least_float32(logits_EBC)),
            self.teacher_scores(at_least_float32(teacher_BC)),
            temperature=config.temperature,
            images=denominators["images"],
        )
        repeat = len(logits_EBC) if config.repeat == "num_experts" else config.repeat
        # A term of shape [E] is reported expert by expert; a score that all experts share has one number.
        term = kd_S.detach() if len(kd_S) == len(logits_EBC) else kd_S.detach().sum()
        return repeat * self.together(loss, config.weight * kd_S.sum()), {"distillation": term}

    def teacher_scores(self, teacher_BC: Tensor) -> Tensor:
        """Return the teacher's scores as they are compared, [B, C]: by default unchanged."""
        return teacher_BC

    def together(self, loss: Tensor, distillation: Tensor) -> Tensor:
        """Return the stage's loss from that of the objective and the weighted term: by default their sum."""
        return loss + distillation

    @property
    def name(self) -> str:
        """The registered name."""
        return str(getattr(self.config, "name", type(self).__name__))

    def _chosen(self, teachers: Mapping[str, Tensor]) -> Tensor:
        wanted = self.config.teacher
        if wanted is None and len(teachers) == 1:
            return next(iter(teachers.values()))
        if wanted is None or wanted not in teachers:
            raise ValueError(
                f"distillation '{self.name}': distillation.teacher = {wanted}, the stage has teachers "
                f"{', '.join(teachers) or 'none'}; set teachers.<name>.run, and distillation.teacher to a name"
            )
        return teachers[wanted]


@register("distillation", "mean_logits")
class MeanLogits(Distillation):
    """The mean of the experts' logits follows the teacher, as in RIDE; with a single expert, its own logits do.

    Source: published code of Wang et al. 2021, arXiv:2010.01809 (RIDELossWithDistill).
    """

    class Config(DistillationSettings):
        name: Literal["mean_logits"] = "mean_logits"
        repeat: Repeat = "num_experts"
        """See `DistillationSettings`; the published loop over experts adds the same objective and term each time."""

    def student_scores(self, logits_EBC: Tensor) -> Tensor:
        """Return the mean over experts, [1, B, C]."""
        return logits_EBC.mean(dim=0, keepdim=True)


@register("distillation", "sum_logits")
class SumLogits(Distillation):
    """The sum of the experts' logits follows the teacher, where each gives a part of one score: BBN, ResLT."""

    class Config(DistillationSettings):
        name: Literal["sum_logits"] = "sum_logits"

    def student_scores(self, logits_EBC: Tensor) -> Tensor:
        """Return the sum over experts, [1, B, C]."""
        return logits_EBC.sum(dim=0, keepdim=True)


@register("distillation", "each_expert")
class EachExpert(Distillation):
    """Every expert follows the teacher by itself; the terms add up."""

    class Config(DistillationSettings):
        name: Literal["each_expert"] = "each_expert"

    def student_scores(self, logits_EBC: Tensor) -> Tensor:
        """Return the scores as they are, [E, B, C]."""
        return logits_EBC


@register("distillation", "dive")
class DiVE(EachExpert):
    """DiVE: every expert learns from a class-balanced teacher, flattened further, and less from its own objective.

    (1 - alpha) objective + alpha T^2 KL(softmax(t / T)^p, normalised || softmax(z / T)). The power on the teacher's
    probabilities is a temperature T / p for the teacher alone. The objective and the teacher's are balanced softmax.

    Source: He et al. 2021, arXiv:2103.15042, section 3; form of the losses as a re-implementation that was read has it.
    """

    class Config(DistillationSettings):
        name: Literal["dive"] = "dive"
        temperature: float = Field(3.0, gt=0, allow_inf_nan=False)
        """T, divides student's and teacher's scores, no unit; published 3."""
        alpha: float = Field(0.5, ge=0, le=1)
        """Share of the distillation term; the objective has the rest; published 0.5."""
        power: float = Field(0.5, gt=0, le=1)
        """p of the teacher's probabilities, no unit; published 0.5, or 1 where the teacher is flat enough."""

    def teacher_scores(self, teacher_BC: Tensor) -> Tensor:
        """Return p t, whose softmax at T is the normalised power p of that of t."""
        return self.config.power * teacher_BC

    def together(self, loss: Tensor, distillation: Tensor) -> Tensor:
        """Return (1 - alpha) loss + alpha distillation."""
        return (1 - self.config.alpha) * loss + self.config.alpha * distillation
