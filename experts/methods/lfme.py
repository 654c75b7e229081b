"""LFME: a student learns from data and from three frozen experts, each of which knows one group of classes.

Experts of the many, medium and few classes are trained by plain cross-entropy, each on the images of its group alone.
The student follows each of them on that group's scores, less and less as it nears the expert's accuracy. Images that
the experts find hard come in gradually.
Paper: Xiang et al. 2020, "Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed
Classification", arXiv:2001.01536. Where paper and published code differ, the default is the published code.

Shapes: B images, C classes, T teachers (one per group), C_t classes of a group, N training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.class_groups import GroupRule, split_classes
from experts.objective import ExtraInputs, Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register

TEACHERS = ("many", "medium", "few")
"""Names of the teachers, which are those of the groups, head to tail."""


def teacher_weights(student_T: Tensor, teacher_T: Tensor, *, alpha: float) -> Tensor:
    """Return the weight of each teacher's term: 1 while the student is far behind, falling to 0 where it draws level.

    1 where s < alpha a, else max(0, (a - s) / (a (1 - alpha))); 0 where a = 0, as there is nothing to learn.

    Args:
        student_T: s, the student's accuracy on each group, among all classes, a fraction.
        teacher_T: a, each teacher's accuracy on its group, among the group's classes, a fraction.
        alpha: share of the teacher's accuracy at which its weight begins to fall, in [0, 1).

    Source: arXiv:2001.01536, section 3.4 (self-paced expert selection).
    """
    gap_T = (teacher_T - student_T) / (teacher_T * (1 - alpha)).where(teacher_T > 0, 1)
    return gap_T.clamp(0, 1).where(teacher_T > 0, 0)


def scaled_confidences(confidence_N: Tensor, labels_N: Tensor, lowest_C: Tensor) -> Tensor:
    """Return the confidences scaled, class by class, to the range from the class's lowest value to 1.

    With p an image's confidence: (p - min) / (max - min) * (1 - lowest) + lowest; 1 where all of a class are equal.

    Args:
        confidence_N: probability of the true class, by the teacher of its group.
        labels_N: class ids, int64.
        lowest_C: theta, in (0, 1].

    Returns:
        u, in the type of the confidences, [N].

    Source: published code of arXiv:2001.01536. Differs: there a class with equal confidences divides by 0.
    """
    # Sorted by class, and by confidence within each: a GPU repeats that to the bit, as it does not `scatter_reduce`.
    order_N = confidence_N.argsort()
    order_N = order_N[labels_N[order_N].argsort(stable=True)]
    classes_C = torch.arange(len(lowest_C), device=labels_N.device)
    first_C = torch.searchsorted(labels_N[order_N], classes_C)
    last_C = torch.searchsorted(labels_N[order_N], classes_C, right=True) - 1
    least_N, most_N = confidence_N[order_N[first_C[labels_N]]], confidence_N[order_N[last_C[labels_N]]]
    lowest_N = lowest_C.to(confidence_N)[labels_N]
    range_N = most_N - least_N
    scaled_N = (confidence_N - least_N) / range_N.where(range_N > 0, 1) * (1 - lowest_N) + lowest_N
    return scaled_N.where(range_N > 0, 1)


def instance_share(progress: Progress, *, clamp: bool) -> float:
    """Return e / (half the epochs), at epoch e counted from 1: the way to where all images count alike.

    Args:
        progress: where training stands.
        clamp: stay at 1 from half-way on. Unset, it goes on to 2, as in the published code.
    """
    share = progress.epoch / (progress.epochs / 2)
    return min(share, 1.0) if clamp else share


def instance_factors(u_B: Tensor, share: Tensor | float) -> Tensor:
    """Return v = u + (1 - u) share; u are scaled confidences, for the share see `instance_share`."""
    return u_B + (1 - u_B) * share


def lfme_loss(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    teacher_scores: Sequence[Tensor],
    groups: Sequence[Tensor],
    weight_T: Tensor,
    factor_B: Tensor,
    temperature: float,
    images: Tensor,
    instance_on: Literal["logits", "loss"] = "logits",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return cross-entropy plus, for each teacher, w KL(softmax(t / T) || softmax(z / T over the group's classes)).

    Args:
        logits_BC: the student's scores; half types are computed in float32.
        labels_B: class ids, int64, in [0, C).
        teacher_scores: t, [B, C_t] each; every image counts, whatever its class.
        groups: class ids [C_t] of each teacher, in the order of its scores.
        weight_T: w.
        factor_B: v of each image.
        temperature: T of the KL terms, which are not multiplied by T^2.
        images: scalar, images of the global batch.
        instance_on: what v multiplies: "logits", all of an image's, in every term; or "loss", its cross-entropy.

    Returns:
        The loss (scalar, nats), the cross-entropy (scalar) and each teacher's KL before its weight [T].

    Source: arXiv:2001.01536, section 3; the published code for "logits".
    Differs: the paper weights the loss of an image by v, the published code multiplies its logits.
    """
    z_BC = at_least_float32(logits_BC)
    factor_B = factor_B.to(z_BC.dtype)
    images = images.to(z_BC.dtype)
    if instance_on == "logits":
        z_BC = factor_B[:, None] * z_BC
    nll_B = -z_BC.log_softmax(dim=-1).gather(1, labels_B[:, None]).squeeze(1)
    if instance_on == "loss":
        nll_B = factor_B * nll_B
    kl = []
    for scores_BCt, group in zip(teacher_scores, groups, strict=True):
        log_q = (scores_BCt.detach().to(z_BC.dtype) / temperature).log_softmax(dim=-1)
        log_p = (z_BC[:, group] / temperature).log_softmax(dim=-1)
        kl.append((log_q.exp() * (log_q - log_p)).sum())
    ce, kl_T = nll_B.sum() / images, torch.stack(kl) / images
    return ce + (weight_T.to(z_BC.dtype) * kl_T).sum(), ce, kl_T


@register("objective", "lfme")
class LFME(Objective):
    """The student's objective. `prepare` must be called before the first step, `observe` after each validation.

    Their results are part of the module's state: `instance_u_N`, `teacher_accuracy_T` and `student_accuracy_T`.
    """

    class Config(ObjectiveSettings):
        name: Literal["lfme"] = "lfme"
        groups: GroupRule = GroupRule(rule="count", many_above=99, few_below=21)
        """The classes that each teacher knows, by the rule that it was trained with. Published: many has 100 images or
        more, few has 20 or fewer."""
        temperature: float = Field(2.0, gt=0, allow_inf_nan=False)
        """T of the teachers' terms, no unit; published 2."""
        alpha: float = Field(0.3, ge=0, lt=1)
        """Share of a teacher's accuracy at which its weight begins to fall, no unit; published 0.3."""
        instance_on: Literal["logits", "loss"] = "logits"
        """The factor of an image multiplies its "logits" (code) or its cross-entropy "loss" (paper)."""
        clamp: bool = False
        """Keep the factors of images at 1 in the second half of training, where published code lets them grow on."""
        mean_shots: tuple[float, float, float] | None = None
        """Training images per class in many, medium and few, which say how far images are held back; published
        230, 53, 12 (ImageNet-LT). Unset: the groups' own means, rounded."""

        @property
        def teacher_names(self) -> tuple[str, ...]:
            """Names of the groups: a stage needs a teacher for each."""
            return TEACHERS

    prepares: ClassVar[bool] = True
    observes: ClassVar[bool] = True
    takes_mixed: ClassVar[bool] = False
    num_experts_allowed: ClassVar[tuple[int, ...]] = (1,)
    roles: ClassVar[str] = "the student"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"instance_on": "loss", "clamp": True},)
    lowest_C: Tensor
    instance_u_N: Tensor
    teacher_accuracy_T: Tensor
    student_accuracy_T: Tensor
    prepared: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        counts = counts_C.cpu()
        self.teacher_classes = dict(zip(TEACHERS, split_classes(counts, len(TEACHERS), config.groups), strict=True))
        """Class ids of each teacher's scores, in their order."""
        groups = [torch.from_numpy(ids) for ids in self.teacher_classes.values()]
        shots = config.mean_shots or tuple(round(float(counts[ids].double().mean())) for ids in groups)
        if not 0 < shots[-1] <= min(shots):
            raise ValueError(
                f"objective.mean_shots = {shots}: needed positive numbers of many, medium and few, the last smallest"
            )

        # Not persistent: these follow from config and counts, and an old checkpoint must not bring others.
        lowest_C = torch.zeros(len(counts), dtype=torch.float64)
        for t, ids in enumerate(groups):
            lowest_C[ids] = shots[-1] / shots[t]
            self.register_buffer(f"classes_{TEACHERS[t]}", ids, persistent=False)
        self.register_buffer("lowest_C", lowest_C, persistent=False)
        # Persistent: these are measured, and a resumed run goes on with what was measured.
        self.register_buffer("instance_u_N", torch.ones(int(counts.sum()), dtype=torch.float64))
        self.register_buffer("teacher_accuracy_T", torch.zeros(len(TEACHERS), dtype=torch.float64))
        self.register_buffer("student_accuracy_T", torch.zeros(len(TEACHERS), dtype=torch.float64))
        self.register_buffer("prepared", torch.zeros((), dtype=torch.bool))
        self._known_prepared = False  # a copy of `prepared` that costs no wait for the device
        self.register_load_state_dict_post_hook(_note_prepared)

    def groups(self) -> list[Tensor]:
        """Return the class ids of each teacher, on the module's device."""
        return [getattr(self, f"classes_{name}") for name in TEACHERS]

    # Before training and between epochs

    @torch.no_grad()
    def prepare(self, batches: Callable[[str], Iterable[tuple[ExtraInputs, Tensor]]]) -> None:
        """Measure the teachers: their confidence in each training image and their accuracy on validation images.

        Args:
            batches: for "train" and "val", all images of the split as they are evaluated, in any order: the teachers'
                scores (with `positions_B` for "train") and the labels [B].

        Raises:
            ValueError: a training image is missing or comes twice, a group has no validation image, or teachers are
                missing or of other classes.
        """
        confidence_N = torch.full_like(self.instance_u_N, torch.nan)  # NaN marks an image that no batch has had
        labels_N = torch.zeros(len(confidence_N), dtype=torch.int64, device=confidence_N.device)
        total = 0
        for extra, labels_B in batches("train"):
            rows_B = self._rows(extra)
            confidence_N[rows_B] = self._true_class(extra, labels_B)[0].to(confidence_N)
            labels_N[rows_B] = labels_B.to(labels_N.device)
            total += len(labels_B)
        missing = int(confidence_N.isnan().sum())
        if missing or total != len(confidence_N):
            raise ValueError(
                f"objective 'lfme': got {total} training images, {missing} of {len(confidence_N)} were not among them; "
                f"needed the whole training set once, with finite scores of every teacher"
            )

        right_C = torch.zeros(self.num_classes, dtype=torch.float64, device=confidence_N.device)
        size_C = torch.zeros_like(right_C)
        for extra, labels_B in batches("val"):
            correct_B = self._true_class(extra, labels_B)[1]
            right_C.index_add_(0, labels_B.to(right_C.device), correct_B.to(right_C))
            size_C.index_add_(0, labels_B.to(right_C.device), torch.ones_like(correct_B).to(right_C))

        accuracy_C = [r / n if n else None for r, n in zip(right_C.tolist(), size_C.tolist(), strict=True)]
        self.teacher_accuracy_T.copy_(self._group_means(accuracy_C))
        self.instance_u_N.copy_(scaled_confidences(confidence_N, labels_N, self.lowest_C))
        self.student_accuracy_T.zero_()
        self.assume_prepared()

    def assume_prepared(self) -> None:
        """See `Objective.assume_prepared`."""
        self.prepared.fill_(True)
        self._known_prepared = True

    def observe(self, per_class_top1: Sequence[float | None]) -> None:
        """Record the student's accuracy on the validation split, which sets the weights of its teachers.

        Args:
            per_class_top1: fractions, one per class; None where the split has no image of a class.

        Raises:
            ValueError: not one number per class, a number outside [0, 1], or a group without a validation image.
        """
        if len(per_class_top1) != self.num_classes or any(v is not None and not 0 <= v <= 1 for v in per_class_top1):
            raise ValueError(
                f"objective 'lfme': needed {self.num_classes} accuracies between 0 and 1, one for each class, got "
                f"{len(per_class_top1)}: {list(per_class_top1)[:5]} ..."
            )
        self.student_accuracy_T.copy_(self._group_means(per_class_top1))

    def _group_means(self, values_C: Sequence[float | None]) -> Tensor:
        means = []
        for name, ids in self.teacher_classes.items():
            known = [value for value in (values_C[c] for c in ids.tolist()) if value is not None]
            if not known:
                raise ValueError(
                    f"objective 'lfme': the validation split has no image of the {len(ids)} '{name}' classes, whose "
                    f"accuracy sets a teacher's weight; set dataset.val_per_class to 1 or more, or other "
                    f"objective.groups"
                )
            means.append(sum(known) / len(known))
        return torch.tensor(means, dtype=torch.float64)

    def _true_class(self, extra: ExtraInputs, labels_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the true class's probability by the teacher of each image's group, and whether it is the largest."""
        scores = self._teacher_scores(extra.teachers, len(labels_B))
        probability_B = torch.zeros(len(labels_B), dtype=torch.float64, device=labels_B.device)
        correct_B = torch.zeros_like(probability_B, dtype=torch.bool)
        for scores_BCt, group in zip(scores, self.groups(), strict=True):
            place_B = (labels_B[:, None] == group.to(labels_B.device)).long()  # one-hot, or zeros
            own_B, place_B = place_B.any(dim=1), place_B.argmax(dim=1)
            p_B = scores_BCt.double().softmax(dim=1).gather(1, place_B[:, None]).squeeze(1)
            probability_B = torch.where(own_B, p_B, probability_B)
            correct_B = torch.where(own_B, scores_BCt.argmax(dim=1) == place_B, correct_B)
        return probability_B, correct_B

    # The loss

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `lfme_loss` and `Objective.forward`.

        Returns:
            The loss and its terms, scalars: `cross_entropy`; for each teacher `kl_<name>` and `weight_<name>`; and
            `instance_factor`, the mean over images.

        Raises:
            ValueError: shapes that do not fit, a teacher missing, no positions, or `prepare` was not called.
        """
        self.check_shapes(logits_EBC, labels_B)
        self._check_prepared()
        config = self.config
        scores = self._teacher_scores(now.extra.teachers, len(labels_B))
        u_B = self.instance_u_N[self._rows(now.extra)]
        share = now.scalar("instance share", lambda at: instance_share(at, clamp=config.clamp), u_B)
        factor_B = instance_factors(u_B, share)
        weight_T = teacher_weights(self.student_accuracy_T, self.teacher_accuracy_T, alpha=config.alpha)
        images = now.denominators["images"]
        loss, ce, kl_T = lfme_loss(
            logits_EBC[0],
            labels_B,
            teacher_scores=scores,
            groups=self.groups(),
            weight_T=weight_T,
            factor_B=factor_B,
            temperature=config.temperature,
            images=images,
            instance_on=config.instance_on,
        )
        share = (len(labels_B) / images).to(loss.dtype)  # so that terms of the pieces of a batch add up
        terms = {"cross_entropy": ce.detach(), "instance_factor": (factor_B.sum() / images).to(loss.dtype)}
        for t, name in enumerate(TEACHERS):
            terms |= {f"kl_{name}": kl_T[t].detach(), f"weight_{name}": weight_T[t].to(loss.dtype) * share}
        return loss, terms

    def _check_prepared(self) -> None:
        if not self._known_prepared:
            raise ValueError(
                "objective 'lfme': the teachers have not been asked yet; call `prepare` before the first step, or load "
                "the state of a run"
            )

    def _rows(self, extra: ExtraInputs) -> Tensor:
        if extra.positions_B is None:
            raise ValueError("objective 'lfme' needs to know which training images a batch has; got no positions")
        return extra.positions_B.to(self.instance_u_N.device)

    def _teacher_scores(self, teachers: Mapping[str, Tensor], images: int) -> list[Tensor]:
        found = {name: tuple(scores.shape) for name, scores in teachers.items()}
        needed: dict[str, Any] = {name: (images, len(ids)) for name, ids in self.teacher_classes.items()}
        if any(found.get(name) != shape for name, shape in needed.items()):
            raise ValueError(
                f"objective 'lfme': teachers' scores are {found or 'missing'}; needed {needed} (images, classes): set "
                f"teachers.many, .medium and .few to experts trained with the same groups"
            )
        return [teachers[name] for name in TEACHERS]


def _note_prepared(objective: Any, _: Any) -> None:
    """Read from a state that was loaded whether the teachers have been asked."""
    objective._known_prepared = bool(objective.prepared)
