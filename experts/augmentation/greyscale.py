"""Some images without colours, as torchvision's RandomGrayscale."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from experts.augmentation.augmentation import Augmentation, AugmentationSettings
from experts.augmentation.pixels import grey
from experts.data.transfer import to_device
from experts.registry import register


@register("augmentation", "greyscale")
class Greyscale(Augmentation):
    """Turns some images grey.

    Source: torchvision's RandomGrayscale. Differs: no rounding to 8 bits.
    """

    columns = ("greyed",)

    class Config(AugmentationSettings):
        name: Literal["greyscale"] = "greyscale"
        probability: Annotated[float, Field(ge=0, le=1)] = 0.2
        """Share of the images that turn grey."""

        @property
        def is_off(self) -> bool:
            """See `AugmentationSettings`."""
            return not self.probability

    def __call__(self, images_BcHW: Tensor, uniforms_BK: np.ndarray) -> Tensor:
        """See `Augmentation`."""
        rows = np.flatnonzero(uniforms_BK[:, 0] < self.config.probability)
        if not len(rows):
            return images_BcHW
        chosen = to_device(rows, images_BcHW.device)
        return images_BcHW.index_copy(0, chosen, grey(images_BcHW[chosen]).expand(-1, 3, -1, -1))
