"""RIDE: experts on one trunk, each with its own margin loss, pushed away from what the ensemble predicts on average.

Every expert minimises LDAM on all data plus a (negative) multiple of the divergence from the detached mean of the
experts' logits; late in training, class weights and a temperature per class come in together.
Paper: Wang et al. 2021, "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", arXiv:2010.01809.
Where paper and published code differ, the default is the published code and the paper's form an option.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.losses.counts import positive_counts
from experts.losses.cross_entropy import of_label
from experts.losses.effective_number import effective_number_weights
from experts.losses.ldam import check_same_scale, ldam_loss, ldam_margins
from experts.objective import MAX_EXPERTS, Objective, ObjectiveSettings, StepContext, num_images
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register


def class_temperatures(counts_C: Tensor, *, factor: float, norm: Literal["divide", "subtract"] = "divide") -> Tensor:
    """Return a temperature per class: 1 for the most frequent class, a little less for rare ones.

    With u_c = factor * C * p_c + 1 - factor and p the class frequencies: u / max u, or u + 1 - max u.

    Args:
        counts_C: training images per class, each at least 1.
        factor: gamma, no unit; published: 0.05 (CIFAR), 0.02 (ImageNet-LT), 0.015 (iNaturalist 2018).
        norm: "divide" as published code, "subtract" as the paper.

    Returns:
        float64 [C].

    Raises:
        ValueError: a class has no image, or "subtract" gives a temperature that is not positive.

    Source: arXiv:2010.01809, section 3; published code for "divide".
    """
    counts_C = positive_counts(counts_C)
    temperature_C = factor * len(counts_C) * counts_C / counts_C.sum() + 1 - factor
    if norm == "divide":
        return temperature_C / temperature_C.max()
    temperature_C = temperature_C + 1 - temperature_C.max()
    if temperature_C.min() <= 0:
        raise ValueError(
            f"objective.temp_norm = 'subtract' with objective.reweight_factor = {factor:g} gives class "
            f"{int(temperature_C.argmin())} the temperature {temperature_C.min():.3g}; it must be positive: "
            f"use a smaller factor or temp_norm = 'divide'"
        )
    return temperature_C


def ride_loss(
    logits_EBC: Tensor,
    labels_B: Tensor,
    *,
    margin_C: Tensor,
    weight_C: Tensor | None,
    temperature_C: Tensor | None,
    scale: float,
    diversity_factor: float,
    class_weight: Tensor,
    images: Tensor,
    diversity_reference: Literal["mean", "pairwise"] = "mean",
    base_on: Literal["individual", "published"] = "individual",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over experts of LDAM and of diversity_factor * mean(T)^2 * KL.

    Args:
        logits_EBC: scores z, already multiplied by the head's scale; half types are computed in float32.
        labels_B: class ids, int64, in [0, C).
        margin_C: LDAM margins, in units of a cosine.
        weight_C: class weights of the LDAM term; None, for ones, before re-weighting.
        temperature_C: T, divides the logits in the KL term; equal to the base temperature before re-weighting; None
            for ones.
        scale: the head's scale; multiplies the margins only.
        diversity_factor: lambda; negative pushes experts apart.
        class_weight: scalar, sum of weight_C[labels] over the global batch: denominator of the LDAM term.
        images: scalar, images of the global batch: denominator of the KL term, also after re-weighting.
        diversity_reference: see `divergence_from_mean` and `pairwise_divergence`.
        base_on: "individual": the LDAM term of expert k is of z_k. "published": the same, except that at
            diversity_factor = 0 the published code takes the mean logits for every expert.

    Returns:
        The loss (scalar, nats) and its terms [E], detached: `ldam` and `divergence` (KL before its factors).

    Source: arXiv:2010.01809, section 3, in the form of the published code (RIDELoss).
    Differs: where that code silently changes the LDAM term at lambda = 0, here only base_on = "published" does.
    """
    logits_EBC = at_least_float32(logits_EBC)
    base_EBC = logits_EBC
    if base_on == "published" and diversity_factor == 0:
        base_EBC = logits_EBC.mean(dim=0).expand_as(logits_EBC)
    ldam_E = ldam_loss(base_EBC, labels_B, margin_C=margin_C, scale=scale, denominator=class_weight, weight_C=weight_C)
    divergence = divergence_from_mean if diversity_reference == "mean" else pairwise_divergence
    kl_E = divergence(logits_EBC, temperature_C) / images
    loss_E = ldam_E + diversity_factor * _of_gradients(temperature_C) * kl_E
    return loss_E.sum(), {"ldam": ldam_E.detach(), "divergence": kl_E.detach()}


def divergence_from_mean(logits_EBC: Tensor, temperature_C: Tensor | None) -> Tensor:
    """Return the sum over images of KL(softmax(mean logits / T) || softmax(z_k / T)) for every expert k, [E].

    T is 1 where there is none.

    The mean is detached, as published. That saves work and changes nothing in the sum over experts: softmax(mean) is
    where the sum of these divergences is least, so its gradient through the mean is zero.
    """
    log_p_EBC = _tempered(logits_EBC, temperature_C).log_softmax(dim=-1)
    log_q_BC = _tempered(logits_EBC.detach().mean(dim=0), temperature_C).log_softmax(dim=-1)
    return (log_q_BC.exp() * (log_q_BC - log_p_EBC)).sum(dim=(-2, -1))


def pairwise_divergence(logits_EBC: Tensor, temperature_C: Tensor | None) -> Tensor:
    """Return the sum over images of the mean over j != k of KL(softmax(z_k / T) || softmax(z_j / T)), [E].

    Gradients reach both experts of a pair. A single expert has no pair: 0. T is 1 where there is none.
    """
    log_p_EBC = _tempered(logits_EBC, temperature_C).log_softmax(dim=-1)
    # The mean over j of log p_k - log p_j needs only the sum of all log p_j, not E^2 pairs.
    num_experts = len(log_p_EBC)
    # The pair (k, k) contributes zero, so the sum over all j is the sum over the others.
    gap_EBC = (num_experts * log_p_EBC - log_p_EBC.sum(dim=0)) / max(num_experts - 1, 1)
    return (log_p_EBC.exp() * gap_EBC).sum(dim=(-2, -1))


def temperatures_at(late: bool, class_C: Tensor, base: float, dtype: torch.dtype) -> Tensor | None:
    """Return the temperatures in use, [C]; None where all are 1, which spares the division.

    Args:
        late: whether the class temperatures apply.
        class_C: class temperatures.
        base: multiplies them, or stands for all classes before.
        dtype: of the result.
    """
    if late:
        return (class_C if base == 1 else base * class_C).to(dtype)
    return None if base == 1 else torch.full_like(class_C, base, dtype=dtype)


def _tempered(logits: Tensor, temperature_C: Tensor | None) -> Tensor:
    return logits if temperature_C is None else logits / temperature_C


def _of_gradients(temperature_C: Tensor | None) -> Tensor | float:
    """Return mean(T)^2. It undoes the factor 1 / T^2 that a temperature puts on gradients; T differs by class."""
    return 1.0 if temperature_C is None else temperature_C.mean() ** 2


@register("objective", "ride")
class RIDE(Objective):
    """RIDE's objective with its switch to class weights and temperatures. Its experts must see the same images."""

    class Config(ObjectiveSettings):
        name: Literal["ride"] = "ride"
        diversity_factor: float = Field(-0.2, allow_inf_nan=False)
        """Lambda, no unit; negative pushes experts apart; published -0.45 (CIFAR-100), -0.2 (ImageNet-LT, iNat)."""
        max_margin: float = Field(0.5, ge=0, allow_inf_nan=False)
        """LDAM margin of the rarest class, in units of a cosine."""
        scale: float = Field(30.0, gt=0, allow_inf_nan=False)
        """Scale of the head's cosines; multiplies the margins; must equal head.scale (linear: 1)."""
        reweight_epoch: int | None = Field(None, ge=0)
        """Class weights and temperatures apply in epochs after this one (1-based); published 160 of 200 (CIFAR), 80
        of 100 (ImageNet-LT, iNat); null: never."""
        reweight_beta: float = Field(0.9999, ge=0, lt=1)
        """Beta of the effective number of images, no unit."""
        reweight_factor: float = Field(0.05, ge=0, lt=1)
        """Gamma of the class temperatures, no unit; published 0.05 (CIFAR), 0.02 (ImageNet-LT), 0.015 (iNat)."""
        base_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
        """Temperature of the diversity term before the class temperatures, no unit."""
        temp_norm: Literal["divide", "subtract"] = "divide"
        """How class temperatures are brought to at most 1: "divide" by the largest (code), "subtract" (paper)."""
        diversity_reference: Literal["mean", "pairwise"] = "mean"
        """Experts are pushed away from the detached "mean" of all (code), or from each other expert (paper)."""
        base_on: Literal["individual", "published"] = "individual"
        """At diversity_factor = 0 only: "individual" keeps each expert's own LDAM loss, an honest ablation;
        "published" takes that of the mean logits, E times, as the published code does."""

        def check_head(self, head: Any) -> None:
            """See `check_same_scale`."""
            check_same_scale(self, head)

        @property
        def switches(self) -> dict[str, int]:
            """See `ObjectiveSettings.switches`."""
            return {} if self.reweight_epoch is None else {"reweight_epoch": self.reweight_epoch}

    why_not_weighable: ClassVar[str] = " beside its own (objective.reweight_epoch)"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"reweight_epoch": 1},
        {"reweight_epoch": 1, "temp_norm": "subtract", "base_temperature": 2.0},
        {"reweight_epoch": 0, "diversity_reference": "pairwise"},
        {"diversity_factor": 0.0, "base_on": "published"},
        {"diversity_factor": 0.0},
    )
    margin_C: Tensor
    weight_C: Tensor
    temperature_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        margin_C = ldam_margins(counts_C, max_margin=config.max_margin)
        weight_C = effective_number_weights(counts_C, beta=config.reweight_beta)
        temperature_C = class_temperatures(counts_C, factor=config.reweight_factor, norm=config.temp_norm)

        # Not persistent: they follow from config and counts, and an old checkpoint must not bring others.
        self.register_buffer("margin_C", margin_C, persistent=False)
        self.register_buffer("weight_C", weight_C, persistent=False)
        self.register_buffer("temperature_C", temperature_C, persistent=False)

    def reweighting(self, progress: Progress) -> bool:
        """Return whether this epoch comes after the switch."""
        return self.config.reweight_epoch is not None and progress.epoch > self.config.reweight_epoch

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return `images`, and `class_weight`: the sum of the labels' weights, before the switch their number."""
        images = num_images(labels_B)
        late = self.reweighting(progress)
        class_weight = self.weight_C[labels_B].sum(dtype=torch.float64) if late else images
        return {"images": images, "class_weight": class_weight}

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ride_loss` and `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        logits_EBC = at_least_float32(logits_EBC)
        late, config = self.reweighting(now.progress), self.config
        return ride_loss(
            logits_EBC,
            labels_B,
            margin_C=self.margin_C,
            weight_C=self.weight_C if late else None,
            temperature_C=temperatures_at(late, self.temperature_C, config.base_temperature, logits_EBC.dtype),
            scale=config.scale,
            diversity_factor=config.diversity_factor,
            class_weight=now.denominators["class_weight"],
            images=now.denominators["images"],
            diversity_reference=config.diversity_reference,
            base_on=config.base_on,
        )


@register("objective", "expert_divergence")
class Divergence(Objective):
    """RIDE's second term alone: mean(T)^2 KL of every expert from the experts' mean, to be weighted negatively.

    `sum` of `ldam` and this one, weighted by RIDE's diversity factor, is RIDE; of another loss and this one, that loss
    on diverse experts.

    Source: Wang et al. 2021, arXiv:2010.01809, section 3, as `ride_loss`.
    """

    class Config(ObjectiveSettings):
        name: Literal["expert_divergence"] = "expert_divergence"
        fits_classes: ClassVar[bool] = False
        reweight_epoch: int | None = Field(None, ge=0)
        """Class temperatures apply in epochs after this one (1-based); published 160 of 200 (CIFAR); null: never."""
        reweight_factor: float = Field(0.05, ge=0, lt=1)
        """Gamma of the class temperatures, no unit; published 0.05 (CIFAR), 0.02 (ImageNet-LT), 0.015 (iNat)."""
        base_temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
        """Temperature before the class temperatures, no unit."""
        temp_norm: Literal["divide", "subtract"] = "divide"
        """How class temperatures are brought to at most 1: "divide" by the largest (code), "subtract" (paper)."""
        reference: Literal["mean", "pairwise"] = "mean"
        """What experts are compared with: the detached "mean" of all (code), or each other expert (paper)."""

        @property
        def switches(self) -> dict[str, int]:
            """See `ObjectiveSettings.switches`."""
            return {} if self.reweight_epoch is None else {"reweight_epoch": self.reweight_epoch}

    num_experts_allowed: ClassVar[tuple[int, ...]] = tuple(range(2, MAX_EXPERTS + 1))
    why_not_weighable: ClassVar[str] = ", as it does not count by class"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"reweight_epoch": 1, "temp_norm": "subtract", "base_temperature": 2.0},
        {"reweight_epoch": 0, "reference": "pairwise"},
    )
    temperature_C: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        temperature_C = class_temperatures(counts_C, factor=config.reweight_factor, norm=config.temp_norm)
        self.register_buffer("temperature_C", temperature_C, persistent=False)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over experts; the term `divergence` [E] is without the factor mean(T)^2, as RIDE's is."""
        self.check_shapes(logits_EBC, labels_B)
        logits_EBC = at_least_float32(logits_EBC)
        config = self.config
        late = config.reweight_epoch is not None and now.progress.epoch > config.reweight_epoch
        temperature_C = temperatures_at(late, self.temperature_C, config.base_temperature, logits_EBC.dtype)
        divergence = divergence_from_mean if config.reference == "mean" else pairwise_divergence
        of_label(logits_EBC, labels_B)  # not read; but a label out of range is an error of every objective
        kl_E = divergence(logits_EBC, temperature_C) / now.denominators["images"]
        return (_of_gradients(temperature_C) * kl_E).sum(), {"divergence": kl_E.detach()}
