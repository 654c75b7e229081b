"""Quality of predictions: top-1 by class and group, negative log-likelihood, calibration.

Shapes: N images of a split, B images of one update, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MANY_ABOVE = 100
FEW_BELOW = 20
GROUPS = ("many", "medium", "few")
CALIBRATION_BINS = 15
MEASURED = {"correct": np.bool_, "confidence": np.float64, "nll": np.float64}
_EXTRA = "per_image:"  # before the names of extra numbers in a state; a member's arrays have a "/"


def groups_by_count(counts_C: Sequence[int] | NDArray[Any]) -> dict[str, NDArray[np.int64]]:
    """Return the classes with more than 100 (many), 20 to 100 (medium) and fewer than 20 (few) training images.

    Source: Liu et al. 2019, arXiv:1904.05160 (OLTR) and those who follow it, RIDE among them.
    """
    counts = np.asarray(counts_C)
    many, few = counts > MANY_ABOVE, counts < FEW_BELOW
    return {group: np.flatnonzero(mask) for group, mask in zip(GROUPS, (many, ~many & ~few, few), strict=True)}


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
    return {group: np.sort(part) for group, part in zip(GROUPS, np.split(order, list(cuts)), strict=True)}


def all_groups(counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int] | None) -> dict[str, NDArray[np.int64]]:
    """Return the groups of both rules: `many`, `medium`, `few` and, empty without `cuts`, the same `_by_index`."""
    no_class = dict.fromkeys(GROUPS, np.empty(0, np.int64))
    by_index = groups_by_index(counts_C, cuts) if cuts is not None else no_class
    return groups_by_count(counts_C) | {f"{group}_by_index": ids for group, ids in by_index.items()}


def class_means(values_N: NDArray[Any], labels_N: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Return the mean over the images of each class, [C], NaN without images; their order does not matter."""
    # Float sums depend on their order: sorted, they do not depend on how the split was divided among replicas.
    order = np.lexsort((values_N, labels_N))
    size_C = np.bincount(labels_N, minlength=num_classes)
    total_C = np.bincount(labels_N[order], values_N[order].astype(np.float64), num_classes)
    return total_C / np.where(size_C, size_C, np.nan)  # NaN without NumPy's warning about 0 / 0


def group_means(
    values_N: NDArray[Any], labels_N: NDArray[np.int64], groups: Mapping[str, NDArray[np.int64]], num_classes: int
) -> dict[str, float | None]:
    """Summarise a number per image as accuracies are summarised.

    Args:
        values_N: the number, at least one.
        labels_N: class ids, in [0, num_classes).
        groups: class ids by group, see `all_groups`.
        num_classes: C.

    Returns:
        `all`: mean over the images; for every group the unweighted mean over its classes' means, None where no class of
        it has an image. Neither depends on the order of the images, to the last bit.
    """
    mean_C = class_means(values_N, labels_N, num_classes)
    means: dict[str, float | None] = {"all": float(np.sort(values_N).mean())}  # sorted: the same sum in any order
    for group, ids in groups.items():
        present = mean_C[ids][~np.isnan(mean_C[ids])]
        means[group] = float(present.mean()) if len(present) else None
    return means


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
    order = np.argsort(confidence, kind="stable")  # so that the sums below do not depend on the order of the images
    confidence, correct = confidence[order], correct[order]
    # side="left" puts a confidence on an edge into the bin below, (low, high]; 0 has none below and goes to the first.
    bin_N = np.maximum(np.searchsorted(np.linspace(0, 1, bins + 1), confidence, side="left") - 1, 0)
    size = np.bincount(bin_N, minlength=bins)
    gap = np.abs(np.bincount(bin_N, correct, bins) - np.bincount(bin_N, confidence, bins))
    filled = size > 0
    return float(gap.sum() / len(confidence)), float((gap[filled] / size[filled]).max())


class Scores:
    """Results per image of the members of an evaluation, to be merged and summarised.

    Stored per image: its label and, for every member, whether it was right, how sure it was and its negative
    log-likelihood: 17 bytes per member; and any extra numbers, such as how many experts a router asked. Pieces of a
    split can be scored separately and merged in any order: the summary is the same to the last bit.
    """

    def __init__(self) -> None:
        self._labels: list[NDArray[np.int64]] = []
        self._members: dict[str, dict[str, list[NDArray[Any]]]] = {}
        self._extras: dict[str, list[NDArray[np.float64]]] = {}

    @property
    def num_images(self) -> int:
        """N so far."""
        return sum(map(len, self._labels))

    def update(
        self, member_logits: Mapping[str, Tensor], labels_B: Tensor, per_image: Mapping[str, Tensor] | None = None
    ) -> None:
        """Score one batch, which may be empty.

        Args:
            member_logits: logits or log-probabilities [B, C] by member, the same members in every call. Equal largest
                scores count as the first of them.
            labels_B: class ids.
            per_image: extra numbers [B] by name, such as `experts_used`; the same names in every call.

        Raises:
            ValueError: shapes, members or names do not fit, a label is not in [0, C), or a score or an extra number is
                not finite.
        """
        labels = labels_B.detach().cpu().numpy().astype(np.int64)
        batch = {}
        for member, logits_BC in member_logits.items():
            if logits_BC.ndim != 2 or len(logits_BC) != len(labels):
                raise ValueError(f"{member}: scores {tuple(logits_BC.shape)} do not fit {len(labels)} labels")
            if len(labels) and not 0 <= labels.min() <= labels.max() < logits_BC.shape[1]:
                raise ValueError(
                    f"labels lie in {labels.min()} to {labels.max()}; {member} has {logits_BC.shape[1]} classes"
                )
            batch[member] = _measure(member, logits_BC.detach(), labels_B.detach())
        extras = {name: _extra(name, values_B, len(labels)) for name, values_B in (per_image or {}).items()}
        self._append(labels, batch, extras)

    def merge(self, other: Scores) -> None:
        """Add the images of another piece of the same split.

        Raises:
            ValueError: the other piece has other members or other extra numbers.
        """
        if other._members:
            members = {m: {k: np.concatenate(v) for k, v in kept.items()} for m, kept in other._members.items()}
            extras = {name: np.concatenate(parts) for name, parts in other._extras.items()}
            self._append(np.concatenate(other._labels), members, extras)

    def _append(
        self,
        labels: NDArray[np.int64],
        batch: dict[str, dict[str, NDArray[Any]]],
        extras: dict[str, NDArray[np.float64]],
    ) -> None:
        if not len(labels) and not batch:  # an empty piece of a replica that scored nothing
            return
        if not batch or (self._members and set(batch) != set(self._members)):
            raise ValueError(
                f"scores of {', '.join(self._members) or 'nobody'} cannot take in "
                f"scores of {', '.join(batch) or 'nobody'}"
            )
        if self._members and set(extras) != set(self._extras):
            raise ValueError(
                f"scores with {', '.join(self._extras) or 'no extra number'} per image cannot take in "
                f"scores with {', '.join(extras) or 'no extra number'}"
            )
        self._labels.append(labels)
        for name, numbers in extras.items():
            self._extras.setdefault(name, []).append(numbers)
        for member, values in batch.items():
            kept = self._members.setdefault(member, {key: [] for key in MEASURED})
            for key in MEASURED:
                kept[key].append(values[key])

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays, to send to another process: `labels`, `<member>/<correct|confidence|nll>` and
        `per_image:<name>`."""
        arrays: dict[str, NDArray[Any]] = {"labels": np.concatenate([np.empty(0, np.int64), *self._labels])}
        for member, kept in self._members.items():
            for key, parts in kept.items():
                arrays[f"{member}/{key}"] = np.concatenate(parts)
        return arrays | {_EXTRA + name: np.concatenate(parts) for name, parts in self._extras.items()}

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]]) -> Scores:
        """Rebuild the scores that `state` was taken from."""
        scores = cls()
        members: dict[str, dict[str, NDArray[Any]]] = {}
        extras: dict[str, NDArray[np.float64]] = {}
        for name, values in arrays.items():
            if "/" in name:
                member, key = name.rsplit("/", 1)
                members.setdefault(member, {})[key] = values
            elif name != "labels":
                extras[name.removeprefix(_EXTRA)] = values
        if members:
            scores._append(arrays["labels"], members, extras)
        return scores

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
        labels = np.concatenate(self._labels)
        if labels.max() >= len(counts_C):
            raise ValueError(f"a scored image has label {labels.max()}; there are {len(counts_C)} classes")
        groups = all_groups(counts_C, cuts)
        members = {}
        for member, parts in self._members.items():
            kept = {key: np.concatenate(values) for key, values in parts.items()}
            accuracy_C = class_means(kept["correct"], labels, len(counts_C))
            ece, mce = expected_calibration_error(kept["confidence"], kept["correct"])
            members[member] = {
                "top1": group_means(kept["correct"], labels, groups, len(counts_C)),
                "nll": float(np.sort(kept["nll"]).mean()) if probabilities else None,
                "ece": ece if probabilities else None,
                "mce": mce if probabilities else None,
                "per_class": [None if np.isnan(value) else float(value) for value in accuracy_C],
            }
        per_image = {
            name: group_means(np.concatenate(parts), labels, groups, len(counts_C))
            for name, parts in self._extras.items()
        }
        return {"num_images": len(labels), "members": members, "per_image": per_image}


def _measure(member: str, logits_BC: Tensor, labels_B: Tensor) -> dict[str, NDArray[Any]]:
    """Measure one batch, image by image; in float64, because float32 rounds confidences across the edges of bins."""
    bad = int((~torch.isfinite(logits_BC)).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"{member}: {bad} of {len(logits_BC)} images have scores that are not finite (NaN or infinite); "
            f"the model has diverged or its weights are damaged: evaluate an earlier checkpoint"
        )
    log_p_BC = logits_BC.double().log_softmax(dim=1)
    labels_B = labels_B.to(log_p_BC.device)
    values = {
        "correct": logits_BC.argmax(dim=1) == labels_B,
        "confidence": log_p_BC.amax(dim=1).exp().clamp(max=1),
        "nll": -log_p_BC.gather(1, labels_B[:, None])[:, 0],
    }
    return {key: values[key].cpu().numpy().astype(dtype) for key, dtype in MEASURED.items()}


def _extra(name: str, values_B: Tensor, num_images: int) -> NDArray[np.float64]:
    if values_B.shape != (num_images,) or "/" in name:
        raise ValueError(
            f"{name}: numbers {tuple(values_B.shape)} do not fit {num_images} labels; "
            f"needed one for each image, and a name without '/'"
        )
    numbers = values_B.detach().double().cpu().numpy()
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name}: {int((~np.isfinite(numbers)).sum())} of {num_images} numbers are not finite")
    return numbers
