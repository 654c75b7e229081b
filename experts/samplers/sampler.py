"""The base of all samplers.

The draws of an epoch are a pure function of (progress, source_key). Published cyclic samplers keep their cycles from
one epoch to the next. Ours start new cycles every epoch: this differs by one partial cycle per class and epoch, and a
resumed run needs no state of the sampler.

Shapes: C classes, N images; positions are rows of the training set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from experts.data.keyed_random import key, permutation, uniforms
from experts.progress import Progress
from experts.samplers.draws import weighted_draws


class Sampler:
    """Holds the labels of the training images, and refuses a class without any."""

    keeps_distribution: ClassVar[bool] = False
    """Whether classes are drawn as often as the training set has images of them."""

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        self.labels = labels
        self.counts_C = np.bincount(labels, minlength=num_classes)
        if not len(labels) or not self.counts_C.all():
            raise ValueError(
                f"a sampler needs at least 1 image of every class, found "
                f"{self.counts_C.tolist() if num_classes <= 20 else self.counts_C.min()}"
            )

    @property
    def draws_per_epoch(self) -> int:
        """Draws per epoch; N unless the sampler says otherwise."""
        return len(self.labels)


class WeightedSampler(Sampler):
    """Draws images with replacement; the weight of an image depends on its class alone."""

    weights_C: np.ndarray

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Return the probability of each class at a draw, float64 [C]."""
        del progress
        mass_C = self.counts_C * self.weights_C
        return mass_C / mass_C.sum()

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [draws_per_epoch]."""
        del progress
        return weighted_draws(self.weights_C[self.labels], uniforms(source_key, 0, self.draws_per_epoch, 1)[:, 0])


class PartSampler(Sampler, ABC):
    """Shows a part of the training images, each of them once per epoch, in random order."""

    kept_C: np.ndarray
    """Images of each class in an epoch, int64 [C]; a class may have none."""

    @property
    def draws_per_epoch(self) -> int:
        """Draws per epoch: the images of the part."""
        return int(self.kept_C.sum())

    def class_probabilities(self, progress: Progress) -> np.ndarray:
        """Return the probability of each class at a draw, float64 [C]."""
        del progress
        return self.kept_C / self.kept_C.sum()

    @abstractmethod
    def chosen(self, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in any order, int64 [draws_per_epoch]."""

    def draw(self, progress: Progress, source_key: int) -> np.ndarray:
        """Return the positions of the epoch's images in order, int64 [draws_per_epoch]."""
        del progress
        return self.chosen(source_key)[permutation(key(source_key, "order"), self.draws_per_epoch)]
