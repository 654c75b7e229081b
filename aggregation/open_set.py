"""Quality of predictions where some images are of no known class, and one that is not sure is to say "unknown".

Shapes: N images of known classes, U images of none, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.metrics import SplitMeans, all_groups
from aggregation.per_image import LABELS

State = Mapping[str, NDArray[Any]]
"""As `Scores.state` returns it."""
PUBLISHED_THRESHOLD = 0.1


def open_set(
    known: State,
    unknown: State,
    counts_C: Sequence[int] | NDArray[Any],
    cuts: Sequence[int] | None,
    threshold: float = PUBLISHED_THRESHOLD,
) -> dict[str, Any]:
    """Measure every member on images of known classes and images of none.

    An image whose highest probability is below the threshold is predicted to be unknown. With TP the known images
    that get their class, FP the known images that get another class or "unknown", and FN the unknown images that get
    a class, precision P = TP / (TP + FP), recall R = TP / (TP + FN), and F = 2 P R / (P + R). Unknown images that are
    predicted as such count nowhere.

    Args:
        known, unknown: scores of the images, with the same members; labels of unknown ones are not read.
        counts_C: training images per class, which make the groups.
        cuts: of the groups by index; None: those groups are None.
        threshold: in [0, 1]; published 0.1.

    Returns:
        `threshold`, `num_known`, `num_unknown`, and `members`, by member:
        `f_measure`, `precision`, `recall`: fractions; F is 0 without a true positive, R None without one and without
        an unknown image that got a class;
        `auroc`: the probability that a known image has a higher highest probability than an unknown one, ties half;
        `rejected`: shares of `known` and `unknown` images that are predicted to be unknown;
        `top1`: of the known images, where "unknown" is wrong; keys and means as in `Scores.result`.

    Raises:
        ValueError: there is no known or no unknown image.

    Source: Liu et al. 2019, arXiv:1904.05160, section 4, and the F-measure of its published code, whose FP and FN are
    not the usual ones.
    """
    labels_N = known[LABELS]
    if not len(labels_N) or not len(unknown[LABELS]):
        raise ValueError(
            f"open-set measures need known and unknown images, found {len(labels_N)} and {len(unknown[LABELS])}"
        )
    means = SplitMeans(labels_N, all_groups(counts_C, cuts), len(counts_C))
    members = {}
    for member in [name.removesuffix("/correct") for name in known if name.endswith("/correct")]:
        sure_N, sure_U = known[f"{member}/confidence"], unknown[f"{member}/confidence"]
        right_N = known[f"{member}/correct"] & (sure_N >= threshold)
        f_measure, precision, recall = f_measure_of(right_N, sure_U >= threshold)
        members[member] = {
            "f_measure": f_measure,
            "precision": precision,
            "recall": recall,
            "auroc": auroc(sure_N, sure_U),
            "rejected": {"known": float((sure_N < threshold).mean()), "unknown": float((sure_U < threshold).mean())},
            "top1": means.of_groups_and_classes(right_N)[0],
        }
    return {"threshold": threshold, "num_known": len(labels_N), "num_unknown": len(unknown[LABELS]), "members": members}


def f_measure_of(right_N: NDArray[np.bool_], taken_U: NDArray[np.bool_]) -> tuple[float, float, float | None]:
    """Return F, P and R as `open_set` defines them.

    Args:
        right_N: which known images get their class.
        taken_U: which unknown images get a class.
    """
    right, taken = int(right_N.sum()), int(taken_U.sum())
    precision = right / len(right_N)
    recall = right / (right + taken) if right + taken else None
    return (2 * precision * recall / (precision + recall) if right and recall else 0.0), precision, recall


def auroc(known_N: NDArray[np.floating], unknown_U: NDArray[np.floating]) -> float:
    """Return the share of pairs in which the known image has the higher number; equal ones count half."""
    ordered_U = np.sort(unknown_U)
    below, up_to = (np.searchsorted(ordered_U, known_N, side) for side in ("left", "right"))
    return float((below + up_to).sum() / 2 / len(known_N) / len(unknown_U))
