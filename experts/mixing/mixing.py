"""The base of all mixings: pieces of kind "mixing", which blend images and give them two sets of labels.

A mixing draws once for a whole step, of all replicas, on the host. Its draws are keyed by seed, stage, epoch, stream
and step, so every placement blends the same pairs. The loss of a blend is share L(z, first) + (1 - share) L(z, second),
with one share for all images of the step. Losses of the whole batch, class weights and graphs need nothing more.

Shapes: B images of a step, of all replicas; N images here, M of them mixed, S = image_size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from experts.cases import Case
from experts.data.keyed_random import KeyedRandom, permutation
from experts.data.transfer import to_device
from experts.mixing.boxes import Box, paste
from experts.progress import Progress
from experts.registry import Settings

Alpha = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
"""Parameter of Beta(alpha, alpha), whose share is 1/2 to three digits from 1e6 on; draws of 1e300 would never end."""


@dataclass(frozen=True)
class Blend:
    """The mixing of one step's images.

    Attributes:
        share: weight of the first labels, in [0, 1]; of the images' own pixels too, unless a box is pasted.
        first_B, second_B: both sets of labels, int64. Usually of the images and of their partners.
        order_B: rows of the partners in the step; None: the same rows of the mixing's own stream.
        box: of the partners' pixels, pasted into the images; None: all pixels are blended.
    """

    share: float
    first_B: np.ndarray
    second_B: np.ndarray
    order_B: np.ndarray | None
    box: Box | None = None


@dataclass(frozen=True)
class Step:
    """All that a mixing may look at when it mixes a step.

    Attributes:
        labels_B: of the images, int64.
        second_B: of the same rows of the mixing's own stream; None where it has none.
        image_size: height and width of the images, pixels.
        now: the moment of the step.
        key_of: takes a name to the key of its draws in this epoch. It knows nothing of replicas.
    """

    labels_B: np.ndarray
    second_B: np.ndarray | None
    image_size: int
    now: Progress
    key_of: Callable[[str], int]

    def order(self, name: str) -> np.ndarray:
        """Return a random order of the step's images, int64 [B]; another name gives another one."""
        return permutation(self.key_of(f"{name}/{self.now.step}"), len(self.labels_B))

    def generator(self, name: str) -> KeyedRandom:
        """Return a generator of the step's own; another name gives another one."""
        return KeyedRandom(self.key_of(f"{name}/{self.now.step}"))


class MixingSettings(Settings):
    """Base of the mixings' configs."""

    @property
    def second_sampler(self) -> Any | None:
        """Config of the sampler of a second stream of images, which partners come from; None: they are of the step."""
        return None

    def mixed_epochs(self, epochs: int) -> range:
        """Return the epochs, from 1, of a stage of so many in which steps may be mixed."""
        return range(1, epochs + 1)

    def length_problem(self, epochs: int) -> str | None:
        """Return why a stage of so many epochs cannot be mixed, and what to set; None where it can."""
        del epochs
        return None


class Mixing(ABC):
    """One way to mix the images of a step.

    Args:
        config: the `Config` of the class.
        counts_C: training images per class, int64.
    """

    Config: ClassVar[Any]

    def __init__(self, config: Any, counts_C: np.ndarray) -> None:
        self.config = config
        self.counts_C = counts_C

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults."""
        return [Case(cls.Config())]

    @abstractmethod
    def blend(self, step: Step) -> Blend | None:
        """Return how a step is mixed, which depends on the arguments alone; None leaves it as it is."""


class Part(NamedTuple):
    """Rows of some images that are mixed alike."""

    blend: Blend
    rows: slice


def mix(images_N3SS: Tensor, partners_M3SS: Tensor, parts: Sequence[Part]) -> Tensor:
    """Return images, mixed with partners. Both are written to; the host waits for nothing.

    Args:
        images_N3SS: of one or more steps.
        partners_M3SS: of the rows of the parts, in their order.
        parts: at least one, in the order of their rows, which do not overlap. Boxes in all or in none.
    """
    counts = [part.rows.stop - part.rows.start for part in parts]
    blends = [part.blend for part in parts]
    everything = len(partners_M3SS) == len(images_N3SS)
    if not everything:
        rows = np.concatenate([np.arange(part.rows.start, part.rows.stop) for part in parts])
        rows_M = to_device(rows, images_N3SS.device)
    mine = images_N3SS if everything else images_N3SS.index_select(0, rows_M)
    boxes = [blend.box for blend in blends if blend.box is not None]
    assert len(boxes) in (0, len(blends)), "a mixing pastes boxes in all of its steps or in none"
    if boxes:
        mixed = paste(mine, partners_M3SS, boxes, counts)
    else:
        mixed = _weighted(mine, partners_M3SS, np.repeat([blend.share for blend in blends], counts))
    return mixed if everything else images_N3SS.index_copy_(0, rows_M, mixed)


def _weighted(images_N3SS: Tensor, partners_N3SS: Tensor, share_N: np.ndarray) -> Tensor:
    # 1 less a rounded share is another number, so the rest is computed in double.
    weights_2N = to_device(np.stack([share_N, 1 - share_N]), images_N3SS.device, images_N3SS.dtype)
    share_N111, rest_N111 = weights_2N[:, :, None, None, None]
    return images_N3SS.mul_(share_N111).add_(partners_N3SS.mul_(rest_N111))
