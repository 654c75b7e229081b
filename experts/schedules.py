"""Learning-rate schedules: a factor on the base rate as a pure function of where training stands.

Factors are of the base rate and never cumulative, so resuming needs no state. Warm-up of w units starts at
`warmup_start` and grows linearly: the n-th unit (from 1) has warmup_start + (1 - warmup_start) n / w.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from experts.progress import Progress
from experts.registry import Settings, register


def warmup_factor(n: int, length: int, start: float) -> float:
    """Return the factor of the n-th unit (from 1) of a warm-up, n <= length."""
    return start + (1 - start) * n / length


class Milestone(Settings):
    """From the epoch after `after_epoch` on, the rate is `factor` times the base rate."""

    after_epoch: int = Field(ge=0)
    """Last epoch (1-based) with the old rate."""
    factor: float = Field(ge=0, allow_inf_nan=False)
    """A factor of the base rate, not of the rate before: x0.01 twice is written 0.01 and 0.0001."""


class ScheduleSettings(Settings):
    """Base of the learning-rate schedules' configs."""

    @property
    def drops(self) -> tuple[int, ...]:
        """Epochs (1-based) after which the rate changes at once."""
        return ()

    @property
    def warm_up(self) -> int:
        """Epoch (1-based) in which a warm-up first has the whole rate; 0 without one, and where it always fits."""
        return 0


@register("lr_schedule", "steps")
class Steps:
    """Constant, with a warm-up and drops at given epochs; without either, a constant rate.

    Source: published codes; RIDE and LDAM on CIFAR: warm-up 5, 0.01 after 160, 0.0001 after 180; GCL, MiSLAS and H2T:
    0.1 and 0.01 there; TDE and LADE: warm-up 5 from 1/3, 0.01 after 119, 0.0001 after 159.
    """

    class Config(ScheduleSettings):
        name: Literal["steps"] = "steps"
        warmup_epochs: int = Field(0, ge=0)
        """Epochs of linear warm-up, stepped per epoch; the last of them has the full rate."""
        warmup_start: float = Field(0.0, ge=0, le=1)
        """Factor of the base rate from which the warm-up rises, one epoch before the first."""
        milestones: tuple[Milestone, ...] = ()
        """Drops, by increasing epoch."""

        @model_validator(mode="after")
        def _in_order(self) -> Steps.Config:
            after = [milestone.after_epoch for milestone in self.milestones]
            if after != sorted(set(after)):
                raise ValueError(f"milestones: after_epoch = {after}; must increase from one to the next")
            if after and after[0] < self.warmup_epochs:
                raise ValueError(
                    f"milestones: the first comes after epoch {after[0]}, inside the warm-up of "
                    f"{self.warmup_epochs} epochs; move it to {self.warmup_epochs} or later, or shorten warmup_epochs"
                )
            return self

        @property
        def warm_up(self) -> int:
            """See `ScheduleSettings.warm_up`."""
            return self.warmup_epochs

        @property
        def drops(self) -> tuple[int, ...]:
            """See `ScheduleSettings.drops`."""
            return tuple(milestone.after_epoch for milestone in self.milestones)

    def __init__(self, config: Config) -> None:
        self.config = config

    def factor(self, progress: Progress) -> float:
        """Return the factor of the base rate, the same for all steps of an epoch."""
        if progress.epoch <= self.config.warmup_epochs:
            return warmup_factor(progress.epoch, self.config.warmup_epochs, self.config.warmup_start)
        # Milestones are sorted and their factors are of the base rate, so the last one passed is the whole answer.
        passed = [m.factor for m in self.config.milestones if progress.epoch > m.after_epoch]
        return passed[-1] if passed else 1.0


@register("lr_schedule", "cosine")
class Cosine:
    """Half a cosine from 1 to 0 over the stage, after an optional warm-up.

    In units n = 1 .. N and with a warm-up of w: (1 + cos(pi (n - w) / (N + b - w))) / 2 if stepped "before" the unit,
    with n - 1 for n if "after" it; b is `beyond`, usually 0.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. 5 without restarts. Stepped before: Kang et al. 2020
    (arXiv:1910.09217) and the survey's code; after: MiSLAS, H2T and RIDE's router stage. Unit "step": BALMS. One unit
    beyond the end: ResLT on ImageNet-LT.
    """

    class Config(ScheduleSettings):
        name: Literal["cosine"] = "cosine"
        unit: Literal["epoch", "step"] = "epoch"
        """Whether the rate changes per epoch or per optimiser step."""
        stepped: Literal["before", "after"] = "after"
        """"after": the first unit after warm-up has the full rate; "before": the last unit has rate 0 and trains
        nothing but BatchNorm's statistics, as some published runs do."""
        beyond: int = Field(0, ge=0)
        """Units after the end of the stage at which the cosine reaches 0."""
        warmup: int = Field(0, ge=0)
        """Length of the linear warm-up, in units."""
        warmup_start: float = Field(0.0, ge=0, le=1)
        """Factor of the base rate from which the warm-up rises, one unit before the first."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def factor(self, progress: Progress) -> float:
        """Return the factor of the base rate.

        Raises:
            ValueError: the warm-up is not shorter than the stage.
        """
        config = self.config
        n, total = progress.epoch, progress.epochs
        if config.unit == "step":
            n = (progress.epoch - 1) * progress.steps_per_epoch + progress.step + 1
            total = progress.epochs * progress.steps_per_epoch
        if config.warmup >= total:
            raise ValueError(
                f"lr_schedule.warmup = {config.warmup} {config.unit}s, but the stage has {total}; "
                f"use a shorter warm-up or more epochs"
            )
        if n <= config.warmup:
            return warmup_factor(n, config.warmup, config.warmup_start)
        # "after": the rate of the n-th unit was set when n - 1 units were done.
        done = n - config.warmup - (config.stepped == "after")
        return (1 + math.cos(math.pi * done / (total + config.beyond - config.warmup))) / 2
