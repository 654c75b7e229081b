"""A stack of augmentations: what happens to a batch of images between the store and the network, on the device.

    bytes      uint8, as stored        moves, cropping, RandAugment, ...; moves in a row are one gather
    numbers    0 to 1, 3 channels      colours, blur
    result     normalised

Pieces run in the order of the list. Before a piece that takes the other kind, pixels become it: numbers are rounded to
the nearest byte, as images of 8 bits are.

Shapes: B images, S = image_size, K columns of a piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.augmentation.augmentation import Move
from experts.augmentation.moves import Places
from experts.augmentation.pixels import normalised, to_bytes, to_numbers
from experts.augmentation.resized_crop import ResizedCrop
from experts.data.config import Augment, DatasetConfig
from experts.registry import build

SHARED = ("crop_top", "crop_left", "flip", "rotation", "brightness", "contrast", "saturation", "order")
"""Columns of the table "pixels". Whatever else a piece draws comes from a table of its own."""
Draws = Mapping[str, np.ndarray]
"""By table, the uniform numbers of some images, float64 [B, width] in [0, 1)."""
Column = tuple[str, int]
"""A table and a column in it."""


class Stack:
    """Augmentations one after the other, then normalisation.

    Args:
        pieces: configs of kind "augmentation", in their order, or pieces.
        mean, std: of the channels, on a scale of 0 to 1.
        columns: where the pieces' columns lie in tables, by name. By default in `SHARED` and in tables of their own.

    Attributes:
        crop_scale: area shares of the random crop that the stack begins with, which the decoder makes of files; None
            where it does not.
        tables: by name, the width of the tables of draws.
    """

    def __init__(
        self,
        pieces: Sequence[Any],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        columns: Mapping[str, Column] | None = None,
    ) -> None:
        self.mean, self.std = mean, std
        built = [piece if hasattr(piece, "columns") else build("augmentation", piece) for piece in pieces]
        first = built[0] if built else None
        self.crop_scale: tuple[float, float] | None = first.config.scale if isinstance(first, ResizedCrop) else None
        self.tables: dict[str, int] = {}
        self._times = Counter[str]()
        self._pieces = [(piece, self._places_of(piece, columns)) for piece in built]

    @classmethod
    def of(cls, config: DatasetConfig, augment: Augment | None = None) -> Stack:
        """Return the stack of a data set, or another one for its images."""
        return cls((augment or config.augment).stack, config.mean, config.std)

    def _places_of(self, piece: Any, known: Mapping[str, Column] | None) -> list[Column]:
        """Find where the columns of a piece lie, and note their tables."""
        if known is not None:
            return [known[name] for name in piece.columns]
        table = piece.table or piece.config.name
        self._times[table] += 1
        again = self._times[table] > 1
        if again:  # a piece that comes twice has draws of its own each time
            table = f"{table} {self._times[table]}"
        own = [name for name in piece.columns if again or name not in SHARED]
        if own:
            self.tables[table] = len(own)
        if len(own) < len(piece.columns):
            self.tables["pixels"] = len(SHARED)
        return [(table, own.index(name)) if name in own else ("pixels", SHARED.index(name)) for name in piece.columns]

    def draw(self, uniforms: Callable[[str, int], np.ndarray]) -> dict[str, np.ndarray]:
        """Return the draws of some images.

        Args:
            uniforms: takes a table's name and width to the images' rows.
        """
        return {table: uniforms(table, width) for table, width in self.tables.items()}

    def told(self, uniforms: Callable[[str, int], np.ndarray]) -> dict[str, np.ndarray]:
        """Return what some images' draws are told as, int64 [B], by the name of the piece; see `Piece.told`.

        Args:
            uniforms: as `draw` takes it; asked for the tables of pieces that tell something alone.
        """
        telling = [(piece, columns) for piece, columns in self._pieces if piece.told_values]
        tables = {table for _, columns in telling for table, _ in columns}
        draws = {table: uniforms(table, self.tables[table]) for table in tables}
        # Of a piece that comes twice, the last.
        return {piece.config.name: piece.told(_picked(draws, columns)) for piece, columns in telling}

    def __call__(
        self, images_BcHW: Tensor, draws: Draws, dtype: torch.dtype = torch.float32, *, cropped: bool = False
    ) -> Tensor:
        """Augment and normalise images.

        Args:
            images_BcHW: uint8 [B, 1 or 3, S, S], any device; not written to.
            draws: as `draw` returns them.
            dtype: of the result and of the arithmetic on numbers.
            cropped: the first piece's crop was made already.

        Returns:
            [B, 3, S, S], contiguous, on the images' device.
        """
        return normalised(self.changed(images_BcHW, draws, dtype, cropped=cropped), self.mean, self.std)

    def changed(
        self, images_BcHW: Tensor, draws: Draws, dtype: torch.dtype = torch.float32, *, cropped: bool = False
    ) -> Tensor:
        """Augment images as `__call__`, without normalisation: numbers of 0 to 1, [B, 3, S, S], a new tensor."""
        pixels, moves = images_BcHW, list[tuple[Move, np.ndarray]]()
        for piece, columns in self._pieces:
            if cropped and isinstance(piece, ResizedCrop):
                continue
            uniforms_BK = _picked(draws, columns)
            if isinstance(piece, Move):
                moves.append((piece, uniforms_BK))
                continue
            pixels, moves = _moved(pixels, moves), []
            if piece.acts_on == "numbers" and pixels.dtype == torch.uint8:
                pixels = to_numbers(pixels, dtype)
            elif piece.acts_on == "bytes" and pixels.dtype != torch.uint8:
                pixels = to_bytes(pixels)
            pixels = piece(pixels, uniforms_BK)
        pixels = _moved(pixels, moves)
        return to_numbers(pixels, dtype) if pixels.dtype == torch.uint8 else pixels


def prepare_eval(images_BcHW: Tensor, config: DatasetConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scale test images to 0..1, normalise them, and repeat one channel onto three.

    Args:
        images_BcHW: uint8 [B, 1 or 3, S, S].

    Returns:
        [B, 3, S, S] on the images' device.
    """
    return normalised(to_numbers(images_BcHW, dtype), config.mean, config.std)


def _picked(draws: Draws, columns: Sequence[Column]) -> np.ndarray:
    """Return the columns of a piece, float64 [B, K]."""
    tables = {table for table, _ in columns}
    if len(tables) == 1:
        return draws[columns[0][0]][:, [place for _, place in columns]]
    return np.stack([draws[table][:, place] for table, place in columns], axis=1)


def _moved(pixels_BcHW: Tensor, moves: Sequence[tuple[Move, np.ndarray]]) -> Tensor:
    """Move the pixels of images by one gather."""
    if not moves:
        return pixels_BcHW
    images, _, height, width = pixels_BcHW.shape
    places = Places(images, height, width, pixels_BcHW.device)
    for move, uniforms_BK in reversed(moves):  # the last one is undone first
        move.undo(places, uniforms_BK)
    return places.take(pixels_BcHW)
