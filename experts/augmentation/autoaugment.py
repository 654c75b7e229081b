"""AutoAugment (Cubuk, Zoph, Mane, Vasudevan, Le, CVPR 2019): the policy that was found for CIFAR-10.

Shapes: B images, K columns.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.augmentation.operations import MAGNITUDES, SIGNED, apply
from experts.registry import register

BINS = 10
CIFAR10 = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)
"""Pairs of operations, each with its probability and its magnitude of ten."""


@register("augmentation", "autoaugment")
class AutoAugment(Augmentation):
    """Applies one of 25 pairs of operations, drawn per image; each of the two happens with its own probability.

    Source: Cubuk et al. 2019, arXiv:1805.09501, table 7, as torchvision's AutoAugment (CIFAR-10): its magnitudes, a
    fair coin for the direction of an operation that has one, nearest pixels, black outside.
    """

    acts_on = "bytes"
    columns = ("pair", "first", "first_sign", "second", "second_sign")

    class Config(AugmentationSettings):
        name: Literal["autoaugment"] = "autoaugment"

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        side = images_BcHW.shape[-1]
        pair_B = (uniforms_BK[:, 0] * len(CIFAR10)).astype(np.int64)
        for turn in range(2):
            names, probability, place = zip(*(pair[turn] for pair in CIFAR10), strict=True)
            magnitudes = np.array([MAGNITUDES[name](BINS, side)[at] for name, at in zip(names, place, strict=True)])
            applied_B = uniforms_BK[:, 1 + 2 * turn] < np.array(probability)[pair_B]
            negative_B = (uniforms_BK[:, 2 + 2 * turn] < 0.5) & np.isin(names, SIGNED)[pair_B]
            names_B = np.where(applied_B, np.array(names)[pair_B], "identity")
            images_BcHW = apply(images_BcHW, names_B, np.where(negative_B, -1, 1) * magnitudes[pair_B])
        return images_BcHW
