"""Facts about the files of a split, learnt while all of them are decoded anyway."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from experts.data.fingerprints import content_hash
from experts.data.pools import FilePool
from experts.data.remarks import Remark, shown

_DARK = 64  # of 256: pixels that 14 of 16 bits reach


class Census:
    """Contents, shapes and doubtful pictures of a split. Several threads may note different images at once.

    Attributes:
        contents: hashes of the files, as hexadecimal bytes [N]; empty for those that cannot be read.
    """

    def __init__(self, count: int) -> None:
        self.contents = np.zeros(count, dtype="S32")
        self._shapes: set[tuple[int, ...]] = set()
        self._plain: list[int] = []
        self._deep: list[int] = []

    def note(self, position: int, data: bytes, image: Tensor) -> None:
        """Note one image.

        Args:
            position: in the split.
            data: of its file.
            image: uint8 [3, H, W], as decoded.
        """
        self.contents[position] = content_hash(data)
        pixels = image.numpy()
        self._shapes.add(pixels.shape)
        middle, corner = pixels[1, pixels.shape[1] // 2, pixels.shape[2] // 2], pixels[1, 0, 0]
        # Two pixels tell of nearly every picture that it is neither: a decoded file of 32 x 32 costs 0.1 ms in all.
        if middle == corner and bool((pixels == pixels[:, :1, :1]).all()):
            self._plain.append(position)
        elif middle < _DARK and corner < _DARK and int(pixels.max()) < _DARK and _is_deep(data):
            self._deep.append(position)

    def take(self, positions: np.ndarray) -> Census:
        """Return what is known of the images at these positions, ascending, which are all that could be read."""
        part = Census(len(positions))
        part.contents = self.contents[positions]
        part._shapes = self._shapes
        part._plain, part._deep = (np.searchsorted(positions, found).tolist() for found in (self._plain, self._deep))
        return part

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """Return the shapes [3, H, W] of all images."""
        return set(self._shapes)

    def remarks(self, split: str, pool: FilePool) -> Iterator[Remark]:
        """Yield what looks wrong, for a split by its name in words."""
        total = len(pool.labels)

        def first(positions: list[int]) -> str:
            return shown(pool.paths[min(positions)])

        if self._plain:
            count = len(self._plain)
            yield Remark(
                "one_colour",
                count,
                f"{count:,} of {total:,} {split} images are one colour all over, first {first(self._plain)}",
                doubt=True,
            )
        if self._deep:
            count = len(self._deep)
            yield Remark(
                "dark",
                count,
                f"{count:,} of {total:,} {split} images are files of 16 bits that use at most 14 of them, so that they "
                f"are dark, first {first(self._deep)}; scale their values to 0 ... 65535",
                doubt=True,
            )


def _is_deep(data: bytes) -> bool:
    """Say whether a file has 16 bits for each value."""
    if data.startswith(b"\x89PNG"):
        return data[24] == 16
    with Image.open(io.BytesIO(data)) as opened:
        bits = getattr(opened, "tag_v2", {}).get(258, (8,))  # TIFF's BitsPerSample
        return opened.mode.startswith("I") or max(bits) > 8
