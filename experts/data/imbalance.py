"""The long-tailed variant of a full set: the published counts and the published selection of images.

Source: Cao et al. 2019 (LDAM), arXiv:1906.07413, whose selection RIDE, BBN, MiSLAS, SADE and H2T share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from experts.data.remarks import named

SELECTION_SEED = 0  # as published; the seed of a run does not change which images are used


def long_tailed_counts(
    num_classes: int, max_per_class: int, imbalance_ratio: float, kind: Literal["exp", "step"] = "exp"
) -> np.ndarray:
    """Return images per class, int64 [C]: int(n_max * (1 / ratio) ** (i / (C - 1))) in float64, truncated.

    `step`: the first C // 2 classes have n_max, the rest int(n_max / ratio).
    """
    fraction = 1.0 / imbalance_ratio  # as published: dividing by powers of the ratio rounds differently before int()
    if kind == "step":
        head = num_classes // 2
        counts = [max_per_class] * head + [int(max_per_class * fraction)] * (num_classes - head)
    else:
        counts = [int(max_per_class * fraction ** (i / (num_classes - 1.0))) for i in range(num_classes)]
    return np.array(counts, dtype=np.int64)


def shuffled_pools(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Return the positions of each class in the published order.

    One legacy generator of NumPy, seeded with 0, shuffles the whole list of every class in place, classes ascending.
    So the number of images taken from one class never changes another class, and the selection of a smaller ratio
    contains that of a larger one.
    """
    # NumPy's legacy generator: the published selection comes from it, and NumPy keeps it as it is.
    generator = np.random.RandomState(SELECTION_SEED)
    pools = []
    for c in range(num_classes):
        positions = np.flatnonzero(labels == c)
        generator.shuffle(positions)
        pools.append(positions)
    return pools


def hold_out(
    labels: np.ndarray, num_classes: int, per_class: int | np.ndarray, key: str, names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a set from a pool and return (positions that stay, positions held out), both in ascending order.

    Rule: the last `per_class` positions of each class's shuffled pool are held out.

    Args:
        per_class: images of each class; one number for all, or int64 [C].
        key: the setting that asked for it.
        names: of the classes.

    Raises:
        ValueError: a class would have no image left; names `key` and the class.
    """
    pools = shuffled_pools(labels, num_classes)
    wanted_C = np.broadcast_to(per_class, num_classes)
    for c, pool in enumerate(pools):
        if len(pool) <= wanted_C[c]:
            raise ValueError(
                f"dataset.{key} = {wanted_C[c]}: {named(names, c)} has {len(pool)} images and needs at least "
                f"{wanted_C[c] + 1}, so that one is left for training; lower dataset.{key}, or hold out a share of "
                f"each class with dataset.test_fraction"
            )
    out = np.sort(np.concatenate([pool[len(pool) - n :] for pool, n in zip(pools, wanted_C.tolist(), strict=True)]))
    stay = np.ones(len(labels), dtype=bool)
    stay[out] = False
    return np.flatnonzero(stay), out


def share_of_each_class(labels: np.ndarray, num_classes: int, fraction: float) -> np.ndarray:
    """Return the images of each class that a fraction holds out, int64 [C].

    Rounded half up, but at least one of each class, and one stays: a class of one image has none to hold out.
    """
    found_C = np.bincount(labels, minlength=num_classes)
    wanted_C = np.maximum(np.floor(fraction * found_C + 0.5).astype(np.int64), 1)
    return np.maximum(np.minimum(wanted_C, found_C - 1), 0)


class Selection(NamedTuple):
    """Positions in the pool, int64, one class after the other."""

    train: np.ndarray
    val: np.ndarray


def select(
    labels: np.ndarray,
    num_classes: int,
    *,
    imbalance_ratio: float | None = None,
    kind: Literal["exp", "step"] = "exp",
    max_per_class: int | None = None,
    balanced: bool = False,
    val_per_class: int = 0,
    names: Sequence[str] | None = None,
) -> Selection:
    """Choose the training images of a long-tailed set, and a validation cut that training never sees.

    Rule: each class's whole pool is shuffled (`shuffled_pools`); its last val_per_class positions are the validation
    set; the training set is its first min(n_i, pool - val_per_class) positions, with n_i the published count. So the
    validation set is the same for every ratio, and a training set only shrinks where the validation cut reaches it.
    Natural counts: n_i is the pool, at most max_per_class. `balanced`: n_i = round(N / C), N the sum of the counts
    that the other arguments give; a pool with fewer images is refused instead of shrinking its class.

    Args:
        labels: class ids of the pool, int64 [N].
        imbalance_ratio: n_max / n_min; None for natural counts.
        max_per_class: n_max; None is the size of the smallest class, or no limit with natural counts.
        names: of the classes, for messages.

    Raises:
        ValueError: a class has too few images, or would be left empty; names the class and the keys to change.
    """
    pools = shuffled_pools(labels, num_classes)

    found = np.array([len(pool) for pool in pools], dtype=np.int64)
    if imbalance_ratio is None:
        counts = found if max_per_class is None else np.minimum(found, max_per_class)
    else:
        counts = long_tailed_counts(num_classes, max_per_class or int(found.min()), imbalance_ratio, kind)
        _refuse_too_few(
            found,
            counts,
            names,
            f"dataset.imbalance_ratio = {imbalance_ratio:g}",
            "lower dataset.max_per_class or raise dataset.imbalance_ratio; dataset.imbalance_ratio=null keeps the "
            "counts that the set has",
        )

    if balanced:
        total = int(counts.sum())
        counts = np.full(num_classes, round(total / num_classes), dtype=np.int64)
        _refuse_too_few(
            found - val_per_class,
            counts,
            names,
            f"dataset.balanced = true (total {total})",
            "lower dataset.max_per_class or dataset.val_per_class, or raise dataset.imbalance_ratio; a set "
            "with natural counts needs a balanced list of its own in dataset.train_list",
        )

    # The validation images come from the end of a pool, the training images from its start: they meet in a small pool.
    kept = np.minimum(counts, found - val_per_class)
    for c in np.flatnonzero(kept < 1):
        if found[c] == 0:
            why, remedy = "the full set has none of it", "check the files and dataset.num_classes"
        elif counts[c] < 1:
            why = f"dataset.imbalance_ratio = {imbalance_ratio} with at most {counts.max()} per class leaves it none"
            remedy = (
                "dataset.imbalance_ratio=null keeps the counts that the set has; lower the ratio or raise "
                "dataset.max_per_class to make another long tail"
            )
        else:
            why, remedy = f"dataset.val_per_class = {val_per_class} takes all of its {found[c]}", "lower it"
        raise ValueError(f"{named(names, int(c))} would have no training image: {why}; needed at least 1; {remedy}")
    val = [pool[len(pool) - val_per_class :] for pool in pools]
    return Selection(np.concatenate([pool[:n] for pool, n in zip(pools, kept, strict=True)]), np.concatenate(val))


def _refuse_too_few(
    found: np.ndarray, needed: np.ndarray, names: Sequence[str] | None, because: str, remedy: str
) -> None:
    short = np.flatnonzero(found < needed)
    if len(short):
        c = int(short[0])
        more = f" (and {len(short) - 1} more classes)" if len(short) > 1 else ""
        raise ValueError(
            f"{because} needs {needed[c]} images of {named(names, c)}, found {max(found[c], 0)}{more}; {remedy}"
        )
