"""Numbers of a recipe that change from epoch to epoch: a factor that falls from 1 to 0 while a metric loss hands over.

    weight: 0.5                                           # as always
    weight: {ramp: parabolic, start: 1, end: 0}           # over the stage, as BBN's alpha
    weight: {ramp: half_cosine, start: 1.1, end: 0.1, after_epoch: 30%}

In a step a ramp is a number on the device (experts/scalars.py), so that a replay has the number of its own moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from experts.progress import Progress
from experts.registry import Settings
from experts.scalars import Numbers, scalar_of_step

Shape = Literal["linear", "parabolic", "cosine", "half_cosine", "exponential", "step"]
"""With x from 0 to 1 and n epochs done: 1 - x; 1 - x^2; cos(pi x / 2); (1 + cos(pi x)) / 2; base^n; 1."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Ramp(Settings):
    """A number that goes from `start` to `end`, constant within an epoch. A plain number is one that stays."""

    ramp: Shape = "linear"
    """The curve, which falls from 1 to 0 on the way."""
    start: Finite
    """In the first epoch, no unit."""
    end: Finite
    """After the ramp, no unit. A linear ramp over the whole stage is one epoch short of it in the last one."""
    epochs: Annotated[int, Field(ge=1)] | None = None
    """Length of the ramp, or a percentage of the stage. Unset: the stage's."""
    after_epoch: Annotated[int, Field(ge=0)] | None = None
    """It has ended in epochs after this one (1-based), or after a percentage of the stage, however far it was."""
    base: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Factor per epoch of the shape "exponential", no unit."""

    @model_validator(mode="before")
    @classmethod
    def _number_that_stays(cls, value: Any) -> Any:
        if isinstance(value, Mapping | Ramp):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("needed a finite number, or a ramp, as {ramp: linear, start: 1, end: 0}")
        return {"ramp": "step", "start": value, "end": value}

    @model_validator(mode="after")
    def _that_ends(self) -> Ramp:
        if self.ramp == "step" and self.after_epoch is None and not self.stays:
            raise ValueError("after_epoch: not set; needed the last epoch before the step, or a percentage")
        if self.ramp != "exponential" and self.base != type(self).model_fields["base"].default:
            raise ValueError(f"base = {self.base:g}: ramp '{self.ramp}' has none; remove it, or set ramp=exponential")
        return self

    @model_serializer(mode="wrap")
    def _as_it_is_written(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.start if self.stays else handler(self)

    @property
    def stays(self) -> bool:
        """Whether it is one number all the time."""
        return self.start == self.end

    def at(self, progress: Progress) -> float:
        """Return the number of a moment."""
        if self.stays or (self.after_epoch is not None and progress.epoch > self.after_epoch):
            return self.end
        return self.end + (self.start - self.end) * self._left(progress.epoch - 1, self.epochs or progress.epochs)

    def _left(self, done: int, length: int) -> float:
        """Return what is left of the way after some epochs, from 1 to 0."""
        x = min(done / length, 1.0)
        if self.ramp == "exponential":
            return float(self.base**done)
        return {
            "linear": 1 - x,
            "parabolic": 1 - x**2,
            "cosine": math.cos(math.pi * x / 2),
            "half_cosine": (1 + math.cos(math.pi * x)) / 2,
            "step": 1.0,
        }[self.ramp]

    def times(self, value: Tensor, name: str, now: Progress, numbers: Numbers | None) -> Tensor:
        """Return the number times a value of this step.

        Args:
            value: of any shape, at least float32.
            name: of the number, its own in this step.
            now: the moment.
            numbers: of the step; None where no step will be replayed.
        """
        if self.stays:
            return value if self.start == 1 else self.start * value
        return scalar_of_step(numbers, name, self.at, now, value) * value


def _not_negative(ramp: Ramp) -> Ramp:
    if min(ramp.start, ramp.end) < 0:
        raise ValueError("needed 0 or more")
    return ramp


Weight = Annotated[Ramp, AfterValidator(_not_negative)]
"""A ramp, or a number that stays, of at least 0."""


def constant(value: float) -> Ramp:
    """Return a number that stays."""
    return Ramp.model_validate(value)
