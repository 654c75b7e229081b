"""The base of all objectives: the losses of a whole ensemble.

Shapes: E experts, B images of this piece of the batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experts.cases import Case
from experts.class_groups import GroupRule
from experts.progress import Progress
from experts.registry import Settings, piece, registered_name
from experts.scalars import Numbers, scalar_of_step

MAX_EXPERTS = 8


class ObjectiveSettings(Settings):
    """Base of the objectives' configs, with what follows from a config before any data is read."""

    name: str
    fits_classes: ClassVar[bool] = True
    """False for a loss that says nothing of an image's class, so that `trained_log_prior` means nothing."""

    @property
    def gives_probabilities(self) -> bool:
        """Whether a softmax of the scores is what the loss trains. False for binary losses, whose scores only rank."""
        return True

    def number_problem(self, num_experts: int) -> str | None:
        """Return why the objective does not take so many experts, and what to set; None where it does."""
        problem: str | None = piece("objective", self.name).number_problem(num_experts)
        return problem

    @property
    def whole_batch(self) -> bool:
        """Whether the loss needs all images of the global batch at once."""
        return bool(piece("objective", self.name).whole_batch)

    @property
    def takes_mixed(self) -> bool:
        """Whether images may be mixed; see `Objective.takes_mixed`."""
        return bool(piece("objective", self.name).takes_mixed)

    def weighting_problem(self) -> str | None:
        """Return why class weights cannot be put on the objective, and what to set; None where they can."""
        cls = piece("objective", self.name)
        if cls.weighable:
            return None
        return f"objective '{self.name}' takes no class weights{cls.why_not_weighable}; leave class_weights out"

    @property
    def prepares(self) -> bool:
        """Whether `Objective.prepare` has something to do, which needs teachers and a validation split."""
        return bool(piece("objective", self.name).prepares)

    @property
    def observes(self) -> bool:
        """Whether `Objective.observe` has something to do, which needs a validation split."""
        return bool(piece("objective", self.name).observes)

    def check_head(self, head: Any) -> None:
        """Refuse a head that the objective cannot work with; most objectives take any.

        Args:
            head: config of the head; its `scale` is the factor of the head's scores (1 for a linear head).

        Raises:
            ValueError: names both keys, `objective.<key>` and `head.<key>`, and what to set.
        """

    @property
    def teacher_names(self) -> tuple[str, ...] | None:
        """Names of the teachers that the objective needs, all of them; None where it asks for none by name."""
        return None

    @property
    def group_rule(self) -> GroupRule | None:
        """The rule that cuts the classes into groups for experts or teachers: the field `groups`, if there is one."""
        return getattr(self, "groups", None)

    @property
    def switches(self) -> Mapping[str, int]:
        """Epochs (1-based) after which the loss changes for good, by the key of the config that sets them."""
        return {}

    def trained_log_prior(
        self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Return the class distribution that each expert's softmax is trained for.

        Most objectives aim at a balanced test set, so the base class returns the uniform distribution.

        Args:
            counts_C: training images per class.
            log_share_C: logs of each class's share of the training images, float64.
            num_experts: E.

        Returns:
            Its logs, float64 [E, C], up to a constant per expert, and a short name of it for each expert.
        """
        del counts_C
        return torch.zeros_like(log_share_C).repeat(num_experts, 1), ("uniform",) * num_experts


@dataclass(frozen=True)
class ExtraInputs:
    """Inputs beside logits and labels that only some objectives read.

    Attributes:
        teachers: scores [B, C_t] of frozen teachers by name, without gradient; a teacher may know fewer classes.
        positions_B: rows of the training set that the images are, int64.
        draws: takes the name of a quantity and a width to uniform numbers in [0, 1), float64 [B, width], the same for
            an image on every placement and after a resume; None where a loss is not evaluated in a training step.
        numbers: makes other numbers of the step, for `StepContext.scalar`; None where no step will be replayed.
    """

    teachers: Mapping[str, Tensor] = field(default_factory=dict)
    positions_B: Tensor | None = None
    draws: Callable[[str, int], Tensor] | None = None
    numbers: Numbers | None = None

    def uniforms(self, what: str, width: int) -> Tensor:
        """Return uniform numbers in [0, 1) for every image, float64 [B, width].

        Args:
            what: name of the quantity that is drawn; another name gives other numbers.
            width: numbers for each image.

        Raises:
            ValueError: this is no training step.
        """
        if self.draws is None:
            raise ValueError(f"the objective draws {what} for every image, and only a training step has draws to give")
        return self.draws(what, width)

    def within(self, part: str) -> ExtraInputs:
        """Return the same for a part of an objective, whose quantities have names, and so numbers, of their own."""
        draws, numbers = self.draws, self.numbers
        return replace(
            self,
            draws=None if draws is None else lambda what, width: draws(f"{part}.{what}", width),
            numbers=None if numbers is None else lambda name, make: numbers(f"{part}.{name}", make),
        )


@dataclass(frozen=True)
class StepContext:
    """Everything beside logits and labels that an objective may read in one step.

    Attributes:
        denominators: of the objective, summed over the global batch.
        progress: where training stands; everything that changes with time follows from it.
        extra: teachers' scores and rows of the training set, for objectives that need them.
    """

    denominators: Mapping[str, Tensor]
    progress: Progress
    extra: ExtraInputs = field(default_factory=ExtraInputs)

    def scalar(self, name: str, value: Callable[[Progress], float], like: Tensor) -> Tensor:
        """Return a number that changes with time, 0-dim, to multiply a tensor like `like` by.

        For what may change from step to step or from epoch to epoch. What has a few values, each for many epochs, is a
        Python number and in `Objective.phase`.

        Args:
            name: of the number, its own in this objective.
            value: takes the moment to the number, and depends on nothing else that changes.
            like: gives device and type.
        """
        return scalar_of_step(self.extra.numbers, name, value, self.progress, like)


class Objective(nn.Module, ABC):
    """The loss of the whole ensemble, in a form that adds up over the pieces of a batch.

    A worker sees a piece of the global batch, possibly an empty one. It asks for `denominators` of the global batch's
    labels, and `forward` divides the piece's numerators by them. The losses, gradients and terms of the pieces then add
    up to those of the whole batch, unless it is `whole_batch`. Logits of experts that live elsewhere come in detached:
    the value is still the whole loss, and the attached slots get exactly the gradient of the whole loss.

    Args:
        config: the `Config` of the class.
        counts_C: training images per class, int64.
        num_experts: E, one of `num_experts_allowed`.

    Raises:
        ValueError: another number of experts, or counts that are not a list of 2 or more classes.
    """

    Config: ClassVar[Any]
    num_experts_allowed: ClassVar[tuple[int, ...]] = tuple(range(1, MAX_EXPERTS + 1))
    """Numbers of experts that it takes."""
    roles: ClassVar[str] = ""
    """The experts' parts in the method, for the message that refuses another number of them."""
    flow: ClassVar[str | None] = None
    """The one flow whose outputs the loss is meant for; None: any flow that takes the objective."""
    label_sets: ClassVar[int] = 1
    """2 where labels are [2, B], of the two batches of a pair; denominators still count pairs once."""
    extra_outputs: ClassVar[int] = 0
    """Outputs of an expert beyond its C scores, which come first."""
    prepares: ClassVar[bool] = False
    """Whether `prepare` has something to do; read it from the config, as it may depend on that."""
    observes: ClassVar[bool] = False
    """Whether `observe` has something to do; read it from the config, as it may depend on that."""
    weighable: ClassVar[bool] = False
    """Whether `weigh` may put class weights on it."""
    why_not_weighable: ClassVar[str] = ""
    """Where it takes none: why, as the end of that sentence."""
    whole_batch: ClassVar[bool] = False
    """Whether `forward` needs all images of the global batch at once; it then gets them on every replica, in the order
    of the batch, the other replicas' rows detached. Read it from the config, as it may depend on that."""
    silent: ClassVar[bool] = False
    """Whether it is always zero, for stages in which auxiliaries alone train the experts."""
    takes_mixed: ClassVar[bool] = True
    """False where it knows images by their rows of the training set: a mixed image has the labels of two, and one row.
    Read it from the config, as it may depend on that."""
    last_expert_learns: ClassVar[bool] = True
    """False where the loss ignores whatever the last expert alone computes."""
    capturable: bool = True
    """Whether shapes follow from shapes alone, so that its operations can be captured once and replayed. False where
    they follow values: such a loss runs operation by operation."""
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Settings beside the defaults that take another path through the code, for `cases`."""
    teacher_classes: Mapping[str, Any]
    """Class ids that a teacher knows, by its name, int64 [C_t]; teachers not named know all."""

    def __init__(self, config: Any, counts_C: Tensor, num_experts: int) -> None:
        super().__init__()
        problem = config.number_problem(num_experts)
        if problem is not None:
            raise ValueError(problem)
        if counts_C.ndim != 1 or len(counts_C) < 2:
            raise ValueError(
                f"objective '{config.name}': needs training images per class for 2 or more classes, "
                f"got counts of shape {tuple(counts_C.shape)}"
            )
        self.config = config
        self.num_experts = num_experts
        self.num_classes = len(counts_C)
        self.teacher_classes = {}

    @classmethod
    def number_problem(cls, num_experts: int) -> str | None:
        """Return why the objective does not take so many experts, and what to set; None where it does."""
        allowed = cls.num_experts_allowed
        if num_experts in allowed:
            return None
        least, most = min(allowed), max(allowed)
        consecutive = len(allowed) > 2 and set(allowed) == set(range(least, most + 1))
        takes = f"{least} to {most}" if consecutive else " or ".join(map(str, allowed))
        roles = f" ({cls.roles})" if cls.roles else ""
        nearest = min(allowed, key=lambda number: abs(number - num_experts))
        return (
            f"objective '{registered_name(cls)}': method.num_experts = {num_experts}; it takes {takes}{roles}; "
            f"set method.num_experts={nearest}"
        )

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults and every variant, at up to three numbers of experts."""
        allowed = cls.num_experts_allowed
        # Of a long range, two numbers are enough: the smallest, and one that makes sums over experts visible.
        numbers = allowed if len(allowed) <= 3 else (allowed[0], allowed[2])
        return [Case(cls.Config(**settings), number) for settings in ({}, *cls.variants) for number in numbers]

    @property
    def detached(self) -> str:
        """The quantity that the loss holds constant while it differentiates, so that its gradient is not that of its
        value; "" where there is none."""
        return ""

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return what the loss is divided by: float64 scalars that add up over the pieces of a batch.

        By default `images`, the number of images, or of pairs where labels are [2, B].
        """
        del progress
        return {"images": num_images(labels_B)}

    def phase(self, progress: Progress) -> Hashable:
        """Return a value that changes whenever loss or denominators are made of other operations or Python numbers.

        While it stays the same, operations that were captured once are right for every moment: nothing of what they
        read but tensors, `StepContext.scalar` and draws has changed. By default it is which of the config's `switches`
        are behind.
        """
        return tuple(progress.epoch > last for last in self.config.switches.values())

    @abstractmethod
    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this piece's share of the loss.

        Args:
            logits_EBC: scores, any float type; half types are computed in float32.
            labels_B: class ids, int64, in [0, C).
            now: denominators, progress, and inputs that only some objectives use.

        Returns:
            The loss (scalar, nats) and its terms, detached, each a scalar or [E] with one value per expert.
        """

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """Factors of the experts' learning rates; the trunk and shared heads have none."""
        return (1.0,) * self.num_experts

    def weigh(self, weights: Any, counts_C: Tensor) -> None:
        """Put class weights on the loss of every image, before the first step.

        Args:
            weights: rule, epoch after which they apply, and what the sum is divided by: a `ClassWeights`.
            counts_C: training images per class, each at least 1.

        Raises:
            ValueError: the objective takes no class weights, or a class has no image.
        """
        del weights, counts_C
        raise ValueError(self.config.weighting_problem())

    def prepare(self, batches: Callable[[str], Iterable[tuple[ExtraInputs, Tensor]]]) -> None:
        """Pass over the data once, before the first step of a stage.

        Args:
            batches: for "train" and "val", all images of the split as they are evaluated, in any order: the teachers'
                scores (with `positions_B` for "train") and the labels [B].
        """

    def assume_prepared(self) -> None:
        """Act as if `prepare` had run, without its results, so that a plan can try a step without any data."""

    def observe(self, per_class_top1: Sequence[float | None]) -> None:
        """Record the ensemble's accuracy on the validation split.

        Args:
            per_class_top1: fractions, one per class; None where the split has no image of a class.
        """

    def check_shapes(self, logits_EBC: Tensor, labels_B: Tensor) -> None:
        """Refuse logits and labels that do not belong together.

        Raises:
            ValueError: logits are not [num_experts, B, num_classes + extra_outputs], or labels are not [B] ([2, B] with
                two label sets).
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
    """Return the number of images, or of pairs, as a float64 scalar on the labels' device; labels are [B] or [2, B]."""
    # A fill, not a copy from the host, which would make an accelerator wait.
    return torch.full((), float(labels_B.shape[-1]), dtype=torch.float64, device=labels_B.device)
