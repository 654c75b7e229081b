"""Pictures in the forms that people have them: encoded bytes, base64, arrays, tables of these.

    one picture: the bytes of a file, the same as base64, or pixels [H, W] or [H, W, c], c of 1 to 4
    several: a list of such, an array [B, H, W] or [B, H, W, c], a table's or a mapping's column "image"

Pixels are whole numbers of 0 to 255. Files are decoded as those of a data set are. A text is never taken for a path: a
server would read files for whoever asks.

Shapes: B pictures of H x W pixels and c channels.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.data.decode import UnreadableImage, decode

COLUMN = "image"
_FORMS = (
    "needed encoded bytes, base64, or whole numbers of 0 to 255 as [H, W] or [H, W, 3], or a list or a column 'image' "
    "of such"
)
_ONLY_BASE64 = re.compile(rb"[A-Za-z0-9+/_\-\s]+={0,2}\s*")
_LUMA = (299, 587, 114)  # ITU-R BT.601, as Pillow takes it, in thousandths


def pixels(array: NDArray[Any], channels: int) -> NDArray[np.uint8]:
    """Return pictures of one size as uint8 [B, c, H, W]; c is 1 or 3, as given.

    Args:
        array: whole numbers of 0 to 255: [B, H, W] grey, [B, H, W, c] with c of 1 to 4; the last of 2 or 4 is
            transparency and is dropped. A single picture [H, W] or [H, W, c] is a batch of one.
        channels: of the images that the model was trained on.

    Raises:
        ValueError: other numbers or another shape; or [3, H, W] for a model of colour images, which may be one picture
            with its channels first.
    """
    needed = "needed pixels [B, H, W] or [B, H, W, 3], whole numbers of 0 to 255 and not normalised"
    shape = list(array.shape)
    if array.dtype != np.uint8:
        if array.dtype.kind not in "iu" or (array.size and (array.min() < 0 or array.max() > 255)):
            found = f"numbers of {array.min()} to {array.max()}" if array.dtype.kind in "iu" else f"type {array.dtype}"
            raise ValueError(f"images: found {found}; {needed}")
        array = array.astype(np.uint8)
    if channels == 3 and array.ndim == 3 and shape[0] == 3 and shape[-1] > 4:
        raise ValueError(
            f"images: found shape {shape}: one picture with its channels first, or three grey ones? {needed};"
            f" give [H, W, 3] for one picture, [3, H, W, 1] for three grey ones"
        )
    if array.ndim == 2 or (array.ndim == 3 and 1 <= shape[-1] <= 4):  # no picture is so few pixels wide
        array = array[None]
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not 1 <= array.shape[-1] <= 4 or 0 in array.shape[1:3]:
        raise ValueError(f"images: found shape {shape}; {needed}")
    return np.moveaxis(array[..., : 3 if array.shape[-1] > 2 else 1], -1, 1)


def as_trained(images: Tensor, channels: int) -> Tensor:
    """Return colour pictures as their luma where a model was trained on grey ones; others are returned as they are.

    Args:
        images: uint8 [..., c, H, W].
        channels: of the images that the model was trained on.
    """
    if channels == 3 or images.shape[-3] == 1:
        return images
    luma_3 = torch.tensor(_LUMA, device=images.device)[:, None, None]
    return ((images.int() * luma_3).sum(dim=-3, keepdim=True) + 500).div(1000).to(torch.uint8)


def pictures(given: Any, channels: int) -> Iterator[Tensor]:
    """Yield pictures one by one, each decoded when it is asked for.

    Args:
        given: one or several, in any form of this file's head.
        channels: of the images that the model was trained on.

    Yields:
        uint8 [c, H, W], c of 1 or 3.

    Raises:
        ValueError: what was given is no picture, or one cannot be decoded; says which.
    """
    if hasattr(given, "columns"):
        yield from pictures(list(given[_column(list(given.columns))]), channels)
    elif isinstance(given, Mapping):
        yield from pictures(given[_column(list(given))], channels)
    elif isinstance(given, str | bytes | bytearray | memoryview):
        yield _decoded(given, 0)
    elif isinstance(given, np.ndarray | Tensor) and (array := np.asarray(given)).dtype.kind in "iufb":
        yield from map(torch.from_numpy, pixels(array, channels).copy())
    elif isinstance(given, np.ndarray) and given.ndim == 0:
        yield from pictures(given.item(), channels)
    elif (numbers := _regular(given)) is not None:
        yield from map(torch.from_numpy, pixels(numbers, channels).copy())
    else:
        for place, one in enumerate(_listed(given)):
            yield _picture(one, place, channels)


def _column(names: list[Any]) -> Any:
    """Return the name of the column that holds the pictures."""
    if COLUMN in names or len(names) == 1:
        return COLUMN if COLUMN in names else names[0]
    raise ValueError(f"images: found columns {', '.join(map(str, names)) or 'none'}; needed one, '{COLUMN}'")


def _regular(given: Any) -> NDArray[Any] | None:
    """Return nested lists of numbers as one array; None where they are no lists, no numbers, or of several sizes."""
    inner = given
    while isinstance(inner, list | tuple) and inner:
        inner = inner[0]
    if inner is given or not isinstance(inner, int | float | np.number):
        return None
    try:
        return np.asarray(given)
    except ValueError:
        return None


def _listed(given: Any) -> list[Any]:
    try:
        return list(given)
    except TypeError:
        raise ValueError(f"images: found {type(given).__name__}; {_FORMS}") from None


def _picture(one: Any, place: int, channels: int) -> Tensor:
    """Return one member of a list as a picture."""
    if isinstance(one, str | bytes | bytearray | memoryview):
        return _decoded(one, place)
    if isinstance(one, Mapping):
        one = one[_column(list(one))]
        return _picture(one, place, channels)
    numbers = np.asarray(one) if isinstance(one, np.ndarray | Tensor) else _regular(one)
    if numbers is None or numbers.dtype.kind not in "iufb":
        raise ValueError(f"image {place}: found {type(one).__name__}; {_FORMS}")
    try:
        found = pixels(numbers, channels)
    except ValueError as problem:
        raise ValueError(f"image {place} of a list: {problem}") from None
    if len(found) != 1:
        raise ValueError(f"image {place}: found shape {list(numbers.shape)}, {len(found)} pictures; needed one")
    return torch.from_numpy(found[0].copy())


def _decoded(one: str | bytes | bytearray | memoryview, place: int) -> Tensor:
    data = _from_base64(one, place) if isinstance(one, str) else bytes(one)
    try:
        return decode(f"image {place}", data)
    except UnreadableImage as problem:
        if not isinstance(one, str) and _ONLY_BASE64.fullmatch(data):  # `b64encode` returns bytes
            return _decoded(data.decode("ascii"), place)
        raise ValueError(f"image {place}: {problem.reason}; needed the bytes of an image file") from None


def _from_base64(text: str, place: int) -> bytes:
    """Return the bytes of a base64 text, also of a data URL or in the alphabet of URLs, with or without padding."""
    code = "".join(text.partition(",")[2].split() if text.startswith("data:") else text.split())
    code = code.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(code + "=" * (-len(code) % 4), validate=True)
    except (binascii.Error, ValueError):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise ValueError(f"image {place}: {shown!r} is no base64; {_FORMS}; paths are not read") from None
