"""Quality of predictions: top-1 by class and group, negative log-likelihood, calibration.

Shapes: N images of a split, B images of one update, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.per_image import LABELS, MemberScores, PerImage
from experts.data.transfer import to_device

MANY_ABOVE = 100
FEW_BELOW = 20
CLASS_GROUPS = ("many", "medium", "few")
CALIBRATION_BINS = 15
MEASURED = ("correct", "confidence", "nll")
_EXTRA = "per_image:"  # before the names of extra numbers in a state; a member's arrays have a "/"


def groups_by_count(counts_C: Sequence[int] | NDArray[Any]) -> dict[str, NDArray[np.int64]]:
    """Return the classes with more than 100 (many), 20 to 100 (medium) and fewer than 20 (few) training images.

    Source: Liu et al. 2019, arXiv:1904.05160 (OLTR) and those who follow it, RIDE among them.
    """
    counts = np.asarray(counts_C)
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {group: np.flatnonzero(mask) for group, mask in zip(CLASS_GROUPS, (many, ~many & ~few, few), strict=True)}


def groups_by_index(counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int]) -> dict[str, NDArray[np.int64]]:
    """Return the classes sorted by falling training count (ties: by class id), cut at two fixed places.

    Args:
        counts_C: training images per class.
        cuts: sizes of many, and of many and medium together; published: (36, 71) for CIFAR-100, (3, 7) for CIFAR-10.

    Raises:
        ValueError: not two cuts with 0 <= first <= second <= C.

    Source: published codes of MiSLAS and H2T. Not comparable with groups by count.
    """
    counts = np.asarray(counts_C)
    if len(cuts) != 2 or not 0 <= cuts[0] <= cuts[1] <= len(counts):
        raise ValueError(
            f"dataset.index_groups = {list(cuts)}: needs two cuts with 0 <= first <= second <= {len(counts)} classes"
        )
    order = np.argsort(-counts.astype(np.int64), kind="stable")
    return {group: np.sort(part) for group, part in zip(CLASS_GROUPS, np.split(order, list(cuts)), strict=True)}


def all_groups(counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int] | None) -> dict[str, NDArray[np.int64]]:
    """Return the groups of both rules: `many`, `medium`, `few` and, empty without `cuts`, the same `_by_index`."""
    no_class = dict.fromkeys(CLASS_GROUPS, np.empty(0, np.int64))
    by_index = groups_by_index(counts_C, cuts) if cuts is not None else no_class
    return groups_by_count(counts_C) | {f"{group}_by_index": ids for group, ids in by_index.items()}


class SplitMeans:
    """Means over the images of a split, over those of each class, and over groups of classes.

    None of them depends on the order of the images, to the last bit.

    Args:
        labels_N: class ids, in [0, C); at least one.
        groups: class ids by group, see `all_groups`.
        num_classes: C.
    """

    def __init__(self, labels_N: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]], num_classes: int) -> None:
        self._num_classes = num_classes
        self._labels_N = labels_N
        # NumPy sorts integers of 16 bits in linear time.
        self._short_labels_N = labels_N.astype(np.uint16) if num_classes <= 2**16 else labels_N
        size_C = np.bincount(labels_N, minlength=num_classes)
        self._size_C = np.where(size_C, size_C, np.nan)  # NaN without NumPy's warning about 0 / 0
        self._present = {group: ids[size_C[ids] > 0] for group, ids in groups.items()}

    def of_groups(self, values_N: NDArray[Any]) -> dict[str, float | None]:
        """Summarise a number per image as accuracies are summarised.

        Returns:
            `all`: mean over the images; for every group the unweighted mean over its classes' means, None where no
            class of it has an image.
        """
        return self.of_groups_and_classes(values_N)[0]

    def of_groups_and_classes(self, values_N: NDArray[Any]) -> tuple[dict[str, float | None], NDArray[np.float64]]:
        """Return what `of_groups` does, and the mean over the images of each class, [C], NaN where it has none."""
        mean, mean_C = self._means(values_N)
        by_group = {group: float(mean_C[ids].mean()) if len(ids) else None for group, ids in self._present.items()}
        return {"all": mean, **by_group}, mean_C

    def _means(self, values_N: NDArray[Any]) -> tuple[float, NDArray[np.float64]]:
        """Return the mean over all images, and those over the images of each class."""
        if values_N.dtype == np.bool_:  # counts are the same in any order
            right_C = np.bincount(self._labels_N[values_N], minlength=self._num_classes)
            return float(values_N.mean()), right_C / self._size_C
        # Sums of floats depend on their order: sorted, they do not depend on how the split was divided among replicas.
        by_value_N = np.argsort(values_N)
        order_N = by_value_N[np.argsort(self._short_labels_N[by_value_N], kind="stable")]
        sum_C = np.bincount(self._labels_N[order_N], values_N[order_N], self._num_classes)
        return float(values_N[by_value_N].mean()), sum_C / self._size_C


def expected_calibration_error(
    confidence_N: NDArray[Any], correct_N: NDArray[Any], bins: int = CALIBRATION_BINS
) -> tuple[float, float]:
    """Return how far confidence is from accuracy, over equal-width bins (low, high] of confidence.

    Args:
        confidence_N: largest predicted probability per image, in [0, 1].
        correct_N: whether the prediction was right.
        bins: number of bins.

    Returns:
        ECE, the mean of |accuracy - confidence| over bins weighted by their images, and MCE, its maximum; fractions.
        Both do not depend on the order of the images, to the last bit.

    Raises:
        ValueError: no image, lengths that differ, or a confidence outside [0, 1].

    Source: Guo et al. 2017, arXiv:1706.04599, section 2; bins as in the published code of MiSLAS.
    Differs: a confidence of exactly 0 is in the first bin, there in none; a softmax cannot give it.
    """
    confidence, correct = np.asarray(confidence_N, np.float64), np.asarray(correct_N, bool)
    if not len(confidence) or confidence.shape != correct.shape:
        raise ValueError(f"calibration needs one confidence per result, got {confidence.shape} and {correct.shape}")
    if not (confidence.min() >= 0 and confidence.max() <= 1):
        raise ValueError(f"confidences lie in {confidence.min()} to {confidence.max()}; needed 0 to 1")
    order = np.argsort(confidence)  # so that the sums below do not depend on the order of the images
    confidence, correct = confidence[order], correct[order]
    # side="left" puts a confidence on an edge into the bin below, (low, high]; 0 has none below and goes to the first.
    bin_N = np.maximum(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0)
    size = np.bincount(bin_N, minlength=bins)
    gap = np.abs(np.bincount(bin_N, correct, bins) - np.bincount(bin_N, confidence, bins))
    filled = size > 0
    return float(gap.sum() / len(confidence)), float((gap[filled] / size[filled]).max())


class Scores(PerImage):
    """Results per image of the members of an evaluation, to be merged and summarised.

    Stored per image: its label and, for every member, whether it was right, how sure it was and its negative
    log-likelihood: 17 bytes per member; and any extra numbers, such as how many experts a router asked. Pieces of a
    split can be scored separately and merged in any order: the summary is the same to the last bit.

    The arrays of a state: `labels`, `<member>/<correct|confidence|nll>` and `per_image:<name>`.

    Args:
        reasons: by name of an extra number, the message for images where it is not finite, if there is a better one
            than their number.
    """

    stored: ClassVar[Mapping[str, Any]] = {LABELS: np.int64, "correct": np.bool_}

    def __init__(self, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._reasons = dict(reasons or {})

    def update(
        self, member_logits: Mapping[str, Tensor], labels_B: Tensor, per_image: Mapping[str, Tensor] | None = None
    ) -> None:
        """Score one batch, which may be empty. No value is read: labels that are no class, and numbers that are not
        finite, are refused by `state`, `merge` and `result`.

        Args:
            member_logits: logits or log-probabilities [B, C] by member, the same members in every call. Equal largest
                scores count as the first of them.
            labels_B: class ids.
            per_image: extra numbers [B] by name, such as `experts_used`; the same names in every call.

        Raises:
            ValueError: shapes, members or names do not fit.
        """
        if not member_logits:
            raise ValueError(f"scores of {', '.join(self._members) or 'nobody'} cannot take in scores of nobody")
        num_classes = next(iter(member_logits.values())).shape[-1]
        for member, logits_BC in member_logits.items():
            if logits_BC.shape != (len(labels_B), num_classes):
                raise ValueError(
                    f"{member}: scores {tuple(logits_BC.shape)} do not fit {len(labels_B)} labels and {num_classes} "
                    f"classes"
                )
        self.add(MemberScores.stacked(member_logits), labels_B, per_image)

    def add(self, scores: MemberScores, labels_B: Tensor, per_image: Mapping[str, Tensor] | None = None) -> None:
        """Score one batch as `update` does."""
        extras = per_image or {}
        for name, values_B in extras.items():
            if values_B.shape != labels_B.shape or "/" in name:
                raise ValueError(
                    f"{name}: numbers {tuple(values_B.shape)} do not fit {len(labels_B)} labels; "
                    f"needed one for each image, and a name without '/'"
                )
        names = [f"{member}/{key}" for key in MEASURED for member in scores.names]
        extra_rows = [values_B.detach().double()[None] for values_B in extras.values()]
        labels_B = to_device(labels_B.detach(), scores.logits_MBC.device)
        rows_KB = torch.cat([labels_B.double()[None], _measured(scores, labels_B), *extra_rows])
        self._append((LABELS, *names, *(_EXTRA + name for name in extras)), rows_KB, scores.logits_MBC.shape[2])

    @property
    def _members(self) -> list[str]:
        return _members(self._names)

    def _misfit(self, names: tuple[str, ...]) -> str:
        if set(_members(names)) != set(self._members):
            return f"scores of {', '.join(self._members)} cannot take in scores of {', '.join(_members(names))}"
        return (
            f"scores with {', '.join(_extras(self._names)) or 'no extra number'} per image cannot take in "
            f"scores with {', '.join(_extras(names)) or 'no extra number'}"
        )

    def _check(self, piece: Mapping[str, NDArray[Any]], num_classes: int) -> None:
        labels_N = piece[LABELS]
        if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
            raise ValueError(
                f"labels lie in {labels_N.min()} to {labels_N.max()}; {self._members[0]} has {num_classes} classes"
            )
        for name in _extras(self._names):
            bad = np.count_nonzero(~np.isfinite(piece[_EXTRA + name]))
            if bad:
                raise ValueError(self._reasons.get(name) or f"{name}: {bad} of {len(labels_N)} numbers are not finite")
        for member in self._members:
            bad = np.count_nonzero(np.isnan(piece[f"{member}/nll"]))
            if bad:
                raise ValueError(
                    f"{member}: {bad} of {len(labels_N)} images have scores that are not finite (NaN or infinite); "
                    f"the model has diverged or its weights are damaged: evaluate an earlier checkpoint"
                )

    def result(
        self, counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int] | None, probabilities: bool = True
    ) -> dict[str, Any]:
        """Return a summary as plain numbers, fit for JSON.

        Args:
            counts_C: TRAINING images per class, which make the groups.
            cuts: of the groups by index, see `groups_by_index`; None: those groups are None.
            probabilities: whether a softmax of the scores means anything; `nll`, `ece` and `mce` are None otherwise.

        Returns:
            `num_images`; `members`, by member:
            `top1`: fractions; `all` of the images; `many`, `medium`, `few` and the same `_by_index`: unweighted means
            over the group's classes that the split has, None where it has none;
            `nll`: mean, nats; `ece`, `mce`: fractions, 15 bins; `per_class`: top-1, None where the split has no image;
            and `per_image`, by extra number: its means, over the same groups and in the same way as `top1`.

        Raises:
            ValueError: no image was scored, or a label is not in [0, C).
        """
        if not self.num_images:
            raise ValueError("no image was scored; the split to evaluate is empty")
        arrays = self.state()
        labels_N = arrays[LABELS]
        if labels_N.max() >= len(counts_C):
            raise ValueError(f"a scored image has label {labels_N.max()}; there are {len(counts_C)} classes")
        means = SplitMeans(labels_N, all_groups(counts_C, cuts), len(counts_C))
        members = {}
        for member in self._members:
            correct_N = arrays[f"{member}/correct"]
            top1, accuracy_C = means.of_groups_and_classes(correct_N)
            ece, mce = expected_calibration_error(arrays[f"{member}/confidence"], correct_N)
            members[member] = {
                "top1": top1,
                "nll": float(np.sort(arrays[f"{member}/nll"]).mean()) if probabilities else None,
                "ece": ece if probabilities else None,
                "mce": mce if probabilities else None,
                "per_class": [None if math.isnan(value) else value for value in accuracy_C.tolist()],
            }
        per_image = {name: means.of_groups(arrays[_EXTRA + name]) for name in _extras(self._names)}
        return {"num_images": len(labels_N), "members": members, "per_image": per_image}


def _measured(scores: MemberScores, labels_B: Tensor) -> Tensor:
    """Measure one batch, image by image: whether a member was right, its confidence and its negative log-likelihood.

    In float64, because float32 rounds confidences across the edges of bins.

    Returns:
        [3 M, B]; the last M are NaN where a score is not finite.
    """
    # A label that is no class must not read outside of the scores; `state` refuses it.
    known_B = labels_B.clamp(0, scores.logits_MBC.shape[2] - 1)
    asked_MB2 = torch.stack([scores.prediction_MB, known_B.expand_as(scores.prediction_MB)], dim=2)
    sure_MB, nll_MB = scores.log_p_MBC.gather(2, asked_MB2).unbind(2)
    correct_MB = scores.prediction_MB == labels_B
    nll_MB = torch.where(scores.finite_MB, -nll_MB, torch.nan)
    return torch.cat([correct_MB.double(), sure_MB.exp().clamp(max=1), nll_MB])


def _members(names: Sequence[str]) -> list[str]:
    return [name.rsplit("/", 1)[0] for name in names if name.endswith("/correct")]


def _extras(names: Sequence[str]) -> list[str]:
    return [name.removeprefix(_EXTRA) for name in names if name.startswith(_EXTRA) and "/" not in name]
