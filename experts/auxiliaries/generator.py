"""The base of auxiliaries that make images, as the trunk would put them out, from those of the batch.

    h          = trunk(images)                                   own rows
    rows       = h of the whole batch, without gradients         one exchange between replicas
    made       = generator.make(rows, labels)                    own share, with gradients of the generator
    features   = expert.features([h, made])                      so that BatchNorm sees both
    objective([scores of images, scores of made], [labels, made labels])

How many are made follows from labels, which the host has. So the steps of such a stage run operation by operation.

Shapes: B images of the whole batch, G made for it, g of them by one replica, X = c H W numbers of the trunk's output.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary
from experts.progress import Progress


class Generator(Auxiliary):
    """An auxiliary that makes images. `num_features` is c, and `Seen.embedded_VBd` the rows, [1, B, X]."""

    on_trunk: ClassVar[bool] = True
    makes: ClassVar[bool] = True
    capturable = False

    @abstractmethod
    def made_labels(self, labels_B: np.ndarray, now: Progress) -> np.ndarray:
        """Return the labels of the images that are made in a step, int64 [G]; the same for every expert.

        Args:
            labels_B: of the whole batch.
            now: the moment.
        """

    @abstractmethod
    def make(self, rows_BX: Tensor, labels_B: np.ndarray, now: Progress, own: slice) -> Tensor:
        """Return some of these images, [g, X], at least float32.

        Args:
            rows_BX: the trunk's output, without gradients, at least float32.
            labels_B, now: as `made_labels`.
            own: those of the G that are asked for.
        """
