"""The base of all heads.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from experts.cases import Case

Passes = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Each call passes once over this replica's share of the training images, in evaluation mode and without augmentation:
features [B, D] and labels [B], in batches. A share may be empty."""
Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the replicas, which must all call it equally often, with tensors of the same shape and type."""


class Head(nn.Module):
    """Features [B, D] to scores [B, C]; built with its config, D, C and the expert's place among all, from 0.

    The config has `scale`, the factor of the scores: a field, or 1 as a constant of the class.
    """

    Config: ClassVar[Any]
    flow: ClassVar[str | None] = None
    """The one flow that it works with; None: any."""
    continues: ClassVar[tuple[str, ...]] = ()
    """Names of other heads whose tensors it takes over as they are, under the same names."""
    own_per_expert: ClassVar[bool] = False
    """Whether it must be each expert's own, and cannot be one head that all experts share."""
    evens: ClassVar[bool] = False
    """Whether it takes away, in evaluation, what frequent classes have gained in training."""
    fits: ClassVar[bool] = False
    """Whether `fit` must see all training images before the scores mean anything."""
    fits_first: ClassVar[bool] = False
    """Whether `fit` must see all training images when a stage with steps gives experts this head, which goes on to
    learn by steps. What `fit` writes may be parameters then."""
    has_memory: ClassVar[bool] = False
    """Whether it has a module `memory`, a part of the ensemble with its own `freeze` and `lr_factors`, which an
    auxiliary trains."""
    adds: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors, or of modules that hold them, that heads which it continues lack; they begin new."""
    follows: ClassVar[bool] = False
    """Whether `follow` must be called after every step of a stage in which the head learns; needs a flow that shows
    features, as flow 'plain' does."""

    class_vectors: ClassVar[str] = "weight"
    """Name of the tensor with a vector per class that features are compared with, where it has one."""
    class_axis: ClassVar[int] = 0
    """The axis of that tensor that counts classes."""

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults, unless a head has more ways."""
        return [Case(cls.Config())]

    def fit(self, features: Passes, total: Total) -> None:
        """Learn without gradients from the features of all training images. A head that `fits` overrides it.

        Args:
            features: passes over this replica's share of the training images.
            total: sums over the replicas.

        Raises:
            ValueError: a class has no image in any share; names the class ids.
        """

    def follow(self, mean_D: Tensor, lr: float, ok: Tensor) -> None:
        """Write to the buffers what a step has brought, without gradients. A head that `follows` overrides it.

        What it writes is part of the model, and is exported with it. Auxiliaries are for what is not.

        Args:
            mean_D: mean of the features of the whole batch, at least float32.
            lr: base learning rate of the step.
            ok: bool scalar on the device. Where it is false the step was not finite, and no buffer may change.
        """
