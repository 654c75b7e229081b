"""Intervals of differences: Student's t over seeds, and a bootstrap over classes and test images. NumPy, float64.

They answer two questions. The interval over seeds holds the mean difference that more seeds would give on the same
test images. The bootstrap holds the difference that these very models would have on other test images, and, in groups
of many classes, on other classes of the kind.

Letters: N test images, C classes, R compared rows, D draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS = 2000
FEWEST_CLASSES = 20
"""Classes that a group needs to be drawn again. Fewer cannot stand for a population: the percentiles of 2 or 5 drawn
classes are far too narrow, or no interval at all."""
_EQUAL = 1e-9  # of accuracies, as fractions: what rounding leaves of a difference of 0
_BLOCK = 4_000_000  # numbers of one piece of the draws: 32 MB


class Interval(NamedTuple):
    """An estimate and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean, and the sample standard deviation (n - 1); None of no value, and of fewer than two."""
    if not values:
        return None, None
    found = np.asarray(values, dtype=np.float64)
    return float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else None


@functools.cache
def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """Return t such that a Student variable lies in [-t, t] with this probability.

    Source: the finite series for whole degrees of freedom, Abramowitz and Stegun 1964, 26.7.3 and 26.7.4; bisection.
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _student_within(t: float, freedom: int) -> float:
    """Return the probability that a Student variable lies in [-t, t]."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    if freedom == 1:
        return 2 * angle / math.pi
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom, 2):  # each term is the last one times cos^2 (k-1)/k
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def paired_interval(differences: Sequence[float]) -> Interval | None:
    """Return the mean of differences that are paired by seed, with its Student interval; None of fewer than two.

    With n seeds it is mean +- t(n - 1) sd / sqrt(n). t(2) is 4.30: three seeds tell little apart, and that is right.
    Two differences that are equal by chance, as those of few images often are, have no spread to go by: None, too.
    """
    mean, sd = mean_and_sd(differences)
    if mean is None or sd is None or (len(differences) == 2 and mean and sd < _EQUAL):
        return None
    half = student_quantile(len(differences) - 1) * sd / math.sqrt(len(differences))
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    values_NR: NDArray[np.float64],
    labels_N: NDArray[np.int64],
    groups: Mapping[str, Sequence[int]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, list[Interval]]:
    """Return percentile intervals of accuracies, or of differences of accuracies, by group and for all images.

    A group's value is the mean over its classes of the mean over their images; `all` is the mean over all images. In a
    group of at least `FEWEST_CLASSES` classes, classes are drawn with replacement and keep their images, whose chance
    is in the spread of the classes' means already: to draw images again inside the drawn classes would count it twice
    (Davison and Hinkley 1997, section 3.8). In a smaller group every class stays and its images are drawn with
    replacement. Groups are drawn apart, for `all` too. All columns see the same draws, so they can be compared.

    Args:
        values_NR: of each image, averaged over seeds: 1 for right, 0 for wrong, or differences of those.
        labels_N: class ids.
        groups: class ids by group; together all classes that have an image.
        draws: D.
        seed: of NumPy's generator.

    Returns:
        An interval for each column, by group and under "all"; a group without a test image is left out.
    """
    rng = np.random.default_rng(seed)
    order_N = np.argsort(labels_N, kind="stable")
    values_NR, labels_N = values_NR[order_N], labels_N[order_N]
    found: dict[str, list[Interval]] = {}
    sums, sizes = [], []
    for group, classes in groups.items():
        rows_n = np.flatnonzero(np.isin(labels_N, np.asarray(classes, dtype=np.int64)))
        if not len(rows_n):
            continue
        _, start_c, size_c = np.unique(labels_N[rows_n], return_index=True, return_counts=True)
        total_cR = np.add.reduceat(values_NR[rows_n], start_c, axis=0)
        mean_cR = total_cR / size_c[:, None]
        if len(size_c) >= FEWEST_CLASSES:
            drawn = _drawn_classes(rng, total_cR, mean_cR, size_c, draws)
        else:
            drawn = _drawn_images(rng, values_NR[rows_n], start_c, size_c, draws)
        value_DR, sum_DR, size_D = drawn
        found[group] = _percentiles(mean_cR.mean(axis=0), value_DR)
        sums.append(sum_DR)
        sizes.append(size_D)
    all_DR = np.sum(sums, axis=0) / np.sum(sizes, axis=0)[:, None]
    return {"all": _percentiles(values_NR.mean(axis=0), all_DR), **found}


def _drawn_classes(
    rng: np.random.Generator, total_cR: NDArray[np.float64], mean_cR: NDArray[np.float64], size_c: NDArray[np.int64],
    draws: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Draw classes with their images. Return the group's value, the sum over images and the number of images."""
    classes = len(size_c)
    values, sums, sizes = [], [], []
    for part in _pieces(draws, classes):
        place = rng.integers(classes, size=(part, classes)) + classes * np.arange(part)[:, None]
        times_dc = np.bincount(place.ravel(), minlength=part * classes).reshape(part, classes).astype(np.float64)
        values.append(times_dc @ mean_cR / classes)
        sums.append(times_dc @ total_cR)
        sizes.append(times_dc @ size_c)
    return np.concatenate(values), np.concatenate(sums), np.concatenate(sizes)


def _drawn_images(
    rng: np.random.Generator, values_nR: NDArray[np.float64], start_c: NDArray[np.int64], size_c: NDArray[np.int64],
    draws: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:  # fmt: skip
    """Draw images within every class. Return the group's value, the sum over images and the number of images."""
    value_DR = np.zeros((draws, values_nR.shape[1]))
    sum_DR = np.zeros_like(value_DR)
    for start, size in zip(start_c.tolist(), size_c.tolist(), strict=True):
        own_sR, done = values_nR[start : start + size], 0
        for part in _pieces(draws, size):
            place = rng.integers(size, size=(part, size)) + size * np.arange(part)[:, None]
            times_ds = np.bincount(place.ravel(), minlength=part * size).reshape(part, size).astype(np.float64)
            sum_dR = times_ds @ own_sR
            value_DR[done : done + part] += sum_dR / size / len(size_c)
            sum_DR[done : done + part] += sum_dR
            done += part
    return value_DR, sum_DR, np.full(draws, float(size_c.sum()))


def _pieces(draws: int, width: int) -> list[int]:
    """Split the draws so that a piece of them, `width` numbers each, stays small."""
    size = max(1, _BLOCK // max(width, 1))
    return [min(size, draws - start) for start in range(0, draws, size)]


def _percentiles(estimate_R: NDArray[np.float64], drawn_DR: NDArray[np.float64]) -> list[Interval]:
    low_R, high_R = np.quantile(drawn_DR, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [Interval(*map(float, one)) for one in zip(estimate_R, low_R, high_R, strict=True)]
