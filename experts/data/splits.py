"""Splits of a full set: the images to train on, to validate on and to test on. Nothing is decoded here.

test          the published one, or images held out of the training pool    imbalance.hold_out
train, val    the published long-tailed selection, a validation cut         imbalance.select

What is cut or held out is counted in remarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from experts.data.config import DatasetConfig
from experts.data.imbalance import hold_out, select, share_of_each_class
from experts.data.pools import Pool, RawDataset
from experts.data.remarks import Remark, named


class Splits(NamedTuple):
    """The images of each split, and what became of the others."""

    train: Pool
    val: Pool | None
    test: Pool
    remarks: tuple[Remark, ...]


def choose_splits(config: DatasetConfig, raw: RawDataset) -> Splits:
    """Select the images of each split as the config asks.

    Raises:
        ValueError: too few images of a class or none, or keys that do not fit the splits or classes that the set has.
    """
    chosen = _choose(config, raw)
    num_classes = len(raw.class_names)
    for name, pool in (("training", chosen.train), ("test", chosen.test), ("validation", chosen.val)):
        if pool is not None and not len(pool.labels):
            raise ValueError(f"dataset {config.name}: the {name} set has no image; check dataset.root = {config.root}")
    empty = np.flatnonzero(np.bincount(chosen.train.labels, minlength=num_classes) == 0)
    if len(empty):
        raise ValueError(
            f"dataset {config.name}: {named(raw.class_names, int(empty[0]))} has no training image"
            f"{f', nor have {len(empty) - 1} more' if len(empty) > 1 else ''}; needed at least 1; check "
            f"{'dataset.train_list' if config.train_list else 'the files'} and dataset.num_classes"
        )
    if config.index_groups is not None and config.index_groups[1] >= num_classes:
        raise ValueError(
            f"dataset.index_groups = {list(config.index_groups)}: found {num_classes} classes; the second "
            f"cut must be smaller, or index_groups null"
        )
    remarks = (*chosen.remarks, *_without(raw.class_names, {"validation": raw.val, "test": raw.test}))
    return chosen._replace(remarks=remarks)


def _without(names: tuple[str, ...], given: Mapping[str, Pool | None]) -> Iterator[Remark]:
    """Yield the classes that a split of the set's own has no image of."""
    for split, pool in given.items():
        if pool is None:
            continue
        without = np.flatnonzero(np.bincount(pool.labels, minlength=len(names)) == 0)
        if len(without):
            yield Remark(
                f"no_{split}_image",
                len(without),
                f"{len(without):,} of {len(names):,} classes have no {split} image, first "
                f"{named(names, int(without[0]))}: nothing there tells how well they are known",
                doubt=True,
            )


def _choose(config: DatasetConfig, raw: RawDataset) -> Splits:
    num_classes, names = len(raw.class_names), raw.class_names
    pool, val, test = raw.train, raw.val, raw.test
    remarks: list[Remark] = []
    if test is None:
        held_out_C = _held_out(config, pool.labels, num_classes)
        stay, out = hold_out(pool.labels, num_classes, held_out_C, "test_per_class", names)
        pool, test = pool.take(stay), pool.take(out)
        remarks += _held_out_remarks(config, held_out_C, names)
    elif config.test_per_class or config.test_fraction:
        key = "test_per_class" if config.test_per_class else "test_fraction"
        raise ValueError(
            f"dataset.{key} = {getattr(config, key)}: {config.name} has a test set of its own; "
            f"set dataset.{key}={0 if config.test_per_class else 'null'}"
        )
    if config.val_per_class and val is not None:
        raise ValueError(
            f"dataset.val_per_class = {config.val_per_class}: {config.name} has a validation set of its "
            f"own; set dataset.val_per_class=0"
        )

    natural = config.imbalance_ratio is None and config.max_per_class is None
    if natural and not (config.balanced or config.val_per_class):
        return Splits(pool, val, test, tuple(remarks))
    chosen = select(
        pool.labels,
        num_classes,
        imbalance_ratio=config.imbalance_ratio,
        kind=config.imbalance_type,
        max_per_class=config.max_per_class,
        balanced=config.balanced,
        val_per_class=config.val_per_class,
        names=names,
    )
    if config.val_per_class:
        remarks.append(
            Remark(
                "held_out",
                len(chosen.val),
                f"held out for validation: {len(chosen.val):,} images, {config.val_per_class} of each class "
                f"(dataset.val_per_class)",
            )
        )
    remarks += _cut(config, len(pool.labels) - len(chosen.val), len(chosen.train))
    val = pool.take(chosen.val) if config.val_per_class else val
    return Splits(pool.take(chosen.train), val, test, tuple(remarks))


def _held_out(config: DatasetConfig, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the test images to hold out of each class, int64 [C]."""
    if config.test_fraction:
        return share_of_each_class(labels, num_classes, config.test_fraction)
    if not config.test_per_class:
        place = {"image_list": "dataset.test_list", "image_folder": "a test/ folder beside train/"}
        raise ValueError(
            f"dataset.test_per_class = 0: {config.name} has no test set; set dataset.test_fraction=0.2 to hold out a "
            f"share of each class, test_per_class to the images of each class to hold out, or give "
            f"{place.get(config.source, 'another source')}"
        )
    return np.full(num_classes, config.test_per_class)


def _held_out_remarks(config: DatasetConfig, held_out_C: np.ndarray, names: tuple[str, ...]) -> Iterator[Remark]:
    total, most, least = int(held_out_C.sum()), int(held_out_C.max()), int(held_out_C.min())
    each = f"{most} of each class" if most == least else f"{most} to {least} per class"
    key = f"test_fraction = {config.test_fraction:g}" if config.test_fraction else "test_per_class"
    yield Remark("held_out", total, f"held out for the test: {total:,} images, {each} (dataset.{key})")
    without = np.flatnonzero(held_out_C == 0)
    if len(without) and total:
        first = named(names, int(without[0]))
        more = f" and {len(without) - 1} more have" if len(without) > 1 else " has"
        yield Remark(
            "no_test_image",
            len(without),
            f"{first}{more} one image, which is trained on: no test image tells how well it is known",
            doubt=True,
        )


def _cut(config: DatasetConfig, found: int, used: int) -> Iterator[Remark]:
    keys = {
        "imbalance_ratio": config.imbalance_ratio,
        "max_per_class": config.max_per_class,
        "balanced": config.balanced or None,
    }
    because = ", ".join(f"dataset.{key} = {value:g}" for key, value in keys.items() if value is not None)
    if found > used:
        yield Remark(
            "cut",
            found - used,
            f"{used:,} of {found:,} images are trained on, {found - used:,} are left out ({because})",
        )
