"""Test sets with other class distributions: long-tailed as in training, reversed, or unchanged.

`forward-50` keeps few images of the classes that are rare in training, `backward-50` few of those that are frequent;
50 is the ratio of the largest to the smallest class. `uniform` is the whole test set.

Source: Hong et al. 2021 (LADE), arXiv:2012.00321; Zhang et al. 2022 (TADE, SADE), arXiv:2107.09249.

Shapes: N images of the whole test set, C classes.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experts.data.imbalance import long_tailed_counts, shuffled_pools

RATIOS = (50, 25, 10, 5, 2)
"""Published ratios."""
RATIOS_BY_DATASET = {"inat18": (3, 2)}
"""Other published ratios, by data set: iNaturalist's test set has 3 images per class."""
KINDS = ("forward", "backward", "uniform")


@dataclass(frozen=True)
class Distribution:
    """A class distribution to test on.

    Attributes:
        kind: classes that are frequent in training are frequent ("forward") or rare ("backward") in the test set.
        ratio: size of the largest class over that of the smallest, above 1; 1 for uniform.
    """

    kind: Literal["forward", "backward", "uniform"]
    ratio: float = 1.0

    @property
    def name(self) -> str:
        """The name as on the command line, e.g. "backward-50"."""
        return self.kind if self.kind == "uniform" else f"{self.kind}-{self.ratio:g}"

    @property
    def shift(self) -> float:
        """A key that sorts from the most forward (negative) to the most backward (positive)."""
        return math.log(self.ratio) * (1 if self.kind == "backward" else -1)


UNIFORM = Distribution("uniform")


def parse_distribution(text: str) -> Distribution:
    """Return a distribution by its name.

    Raises:
        ValueError: not `uniform`, `forward-<ratio>` or `backward-<ratio>` with a ratio above 1.
    """
    kind, dash, number = text.partition("-")
    if text == "uniform":
        return UNIFORM
    needed = "needed uniform, forward-<ratio> or backward-<ratio>, e.g. backward-50"
    if kind not in ("forward", "backward") or not dash:
        near = difflib.get_close_matches(kind, KINDS, 1)
        hint = f"; did you mean {near[0]}{dash}{number}?" if near and near[0] != kind else ""
        raise ValueError(f"--distribution {text}: {needed}{hint}")
    try:
        ratio = float(number)
    except ValueError:
        ratio = math.nan
    if not (1 < ratio < math.inf):
        raise ValueError(f"--distribution {text}: found ratio '{number}'; {needed}, with a ratio above 1")
    return Distribution("forward" if kind == "forward" else "backward", ratio)


def published_distributions(dataset: str) -> list[Distribution]:
    """Return the distributions of the published tables, from the most forward over uniform to the most backward."""
    ratios = RATIOS_BY_DATASET.get(dataset, RATIOS)
    forward = [Distribution("forward", ratio) for ratio in ratios]
    return [*forward, UNIFORM, *(Distribution("backward", ratio) for ratio in reversed(ratios))]


def distribution_counts(distribution: Distribution, train_counts_C: np.ndarray, found_C: np.ndarray) -> np.ndarray:
    """Return test images per class, int64 [C].

    Rule: n_i = int(n_max * (1 / ratio) ** (i / (C - 1))), truncated, i the rank of a class by falling number of
    TRAINING images, ties by class id (backward: by rising number); n_max the smallest class of the whole test set.

    Args:
        train_counts_C: training images per class.
        found_C: images per class of the whole test set.

    Raises:
        ValueError: a class would be left without an image; names it and the largest ratio at which none is.

    Source: published totals of CIFAR-100, ImageNet-LT, Places-LT and (ratio 2) iNaturalist are met exactly.
    Differs: the published list of iNaturalist's forward-3 has 3 images of 2 classes, the rule gives them to 1.
    """
    if distribution.kind == "uniform":
        return np.asarray(found_C, np.int64)
    num_classes, smallest = len(found_C), int(np.min(found_C))
    # Ranked by TRAINING counts, whatever the test set has: the shift is relative to the training distribution.
    profile = long_tailed_counts(num_classes, smallest, distribution.ratio)
    order = np.argsort(-np.asarray(train_counts_C, np.int64), kind="stable")
    if distribution.kind == "backward":
        order = order[::-1]
    counts_C = np.empty(num_classes, np.int64)
    counts_C[order] = profile
    empty = np.flatnonzero(counts_C == 0)
    if len(empty):
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        # By trial, not by division: 1 / ratio in float64 can truncate a count of exactly 1 to 0.
        fits = next((ratio for ratio in range(smallest, 1, -1) if int(smallest * (1.0 / ratio))), None)
        remedy = f"use a ratio of at most {fits}" if fits else "use uniform, or a test set with more images"
        raise ValueError(
            f"--distribution {distribution.name}: class {empty[0]}{more} would have no test image: the smallest class "
            f"of the test set has {smallest}, and the rarest class here gets 1/{distribution.ratio:g} of it; {remedy}"
        )
    return counts_C


def distribution_positions(distribution: Distribution, labels_N: np.ndarray, train_counts_C: np.ndarray) -> np.ndarray:
    """Return the images of the test set that make the distribution: positions in ascending order, int64.

    Rule: as for training images, each class's positions are shuffled (`shuffled_pools`) and the first n_i are kept. So
    larger sets of one kind contain the smaller ones.

    Raises:
        ValueError: a class would be left without an image (`distribution_counts`).
    """
    num_classes = len(train_counts_C)
    counts_C = distribution_counts(distribution, train_counts_C, np.bincount(labels_N, minlength=num_classes))
    pools = shuffled_pools(labels_N, num_classes)
    return np.sort(np.concatenate([pool[:count] for pool, count in zip(pools, counts_C, strict=True)]))
