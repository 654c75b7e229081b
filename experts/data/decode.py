"""From an image file to pixels, and from pixels to the square that the network sees.

Kinds of files (`decode_file`): grey, palette and CMYK pixels become RGB. Transparency is dropped and the colours stay
as stored. 16-bit values lose their lower 8 bits. A file of several frames gives its first. An EXIF orientation is not
applied, as in torchvision's ImageFolder.

Limits: an image of more than MAX_PIXELS pixels, or with one side more than MAX_ASPECT times the other, is refused by
its header, before memory is taken for its pixels. Otherwise one file of a kilobyte could end a worker that has trained
for days.

The small-image rule (`frame`): an image whose longer side is at most image_size is enlarged by the largest whole
factor that fits (bilinear; factor 1 leaves it as it is), then centred on black. Any other image is resized so that
its short side is image_size, then centre-cropped. One channel is repeated onto three, later, on the device.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate, pad

from experts.data.kinds import formats
from experts.data.resampling import resample

MODE_RGB = 3  # torchvision.io.ImageReadMode.RGB
JPEG_START = b"\xff\xd8\xff"
_DEEP_FORMATS = ("PNG", "PPM")  # their grey of 16 bits is 32 bits wide in Pillow; PPM's is scaled to 65535 there
MAX_PIXELS = 89_478_485  # Pillow's own limit, 256 MiB as RGB; a file of 1 KB can claim 12 GB
MAX_ASPECT = 1000  # of a thinner image, resizing the short side to image_size makes the long one huge
_BARE_MARKERS = {0x01, *range(0xD0, 0xD8)}  # markers of a JPEG that have no length
_FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # followed by the image's size
_SCAN_MARKERS = {0xD9, 0xDA}
CROP_ATTEMPTS = 10
CROP_UNIFORMS = 2 * CROP_ATTEMPTS + 2  # per image: area and aspect of every attempt, then top and left


@functools.cache
def jpeg_decoder() -> Callable[[Tensor, int], Tensor] | None:
    """Return torchvision's decoder of JPEG files; None where torchvision is missing, and Pillow decodes everything.

    It is twice as fast as Pillow's and, from the same libjpeg, gives the same pixels. torchvision has announced its
    removal and warns of it at every call of the wrapper, so this is the operator below it. The first call loads
    torchvision, which takes a second: most data has no JPEG files.
    """
    with contextlib.suppress(ImportError):
        import torchvision.io  # noqa: F401, it registers the operator
    return getattr(torch.ops.image, "decode_jpeg", None)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded.

    Attributes:
        path: as given to the decoder.
        reason: what is wrong with the file, in a few words.
        remedy: what an operator can do.
    """

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)  # an error that goes to another process is built again from these
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of this process or system: no file is at fault, and none may be left out for them."""
_RESTORE = "restore it, take it out of the set, or let dataset.quarantine leave such training images out"


def decode_file(path: str) -> Tensor:
    """Read one image file as RGB; see `read_file` and `decode`."""
    return decode(path, read_file(path))


def read_file(path: str) -> bytes:
    """Return what a file holds.

    Raises:
        UnreadableImage: the file is missing or empty; names it.
        OSError: this process may open no more files, or has no memory.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            raise
        remedy = "check dataset.root and its permissions"
        raise UnreadableImage(path, f"cannot be read ({error.strerror})", remedy) from None
    if not data:
        raise UnreadableImage(path, "an empty file, needed an image", _RESTORE)
    return data


def decode(path: str, data: bytes) -> Tensor:
    """Return an image as RGB. Damage that leaves it decodable, as a flipped bit in a JPEG's middle, goes unnoticed.

    Args:
        path: of its file, for messages.
        data: the file.

    Returns:
        uint8 [3, H, W].

    Raises:
        UnreadableImage: the file is truncated, too large or not an image; names it.
    """
    decode_jpeg = jpeg_decoder() if data.startswith(JPEG_START) else None
    try:
        if decode_jpeg is not None:
            height, width = _size_of_jpeg(data)
            _refuse_size(height, width)
            if height and width:
                with contextlib.suppress(RuntimeError):  # Pillow reads rarer kinds, and says what is wrong
                    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), MODE_RGB)
        return _decode_with_pillow(data)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = "of no known kind" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UnreadableImage(path, f"not a whole image ({what}; {len(data)} bytes)", _RESTORE) from None


def _decode_with_pillow(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=formats()) as opened:
        _refuse_size(opened.height, opened.width)
        image: Image.Image = opened
        if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in _DEEP_FORMATS):
            # Pillow would clip 16-bit grey at 255 instead of scaling it
            image = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        elif opened.mode in ("I", "F"):
            raise ValueError(f"pixels of 32 bits, Pillow's mode {opened.mode}; needed 8 or 16 bits")
        elif opened.mode == "P" and "transparency" in opened.info:
            image = opened.convert("RGBA")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _size_of_jpeg(data: bytes) -> tuple[int, int]:
    """Return height and width as the header of a JPEG states them, without decoding; zeros if it states none."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME_MARKERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        if marker in _SCAN_MARKERS:
            break
        if marker == 0xFF:  # filling
            at += 1
        else:
            at += 2 if marker in _BARE_MARKERS else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def _refuse_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS:,} are read")
    if max(height, width) > MAX_ASPECT * max(1, min(height, width)):
        raise ValueError(f"{width} x {height} pixels, one side more than {MAX_ASPECT} times the other")


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize bilinearly with anti-aliasing, uint8 [..., channels, H, W] to [..., channels, height, width]."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    batch = images if images.dim() == 4 else images[None]
    if images.device.type == "cpu":
        out = interpolate(batch, (height, width), mode="bilinear", align_corners=False, antialias=True)
    else:  # torch has no kernel for uint8 there
        out = resample(batch, np.array([[0, 0, *images.shape[-2:]]]), height, width)
    return out if images.dim() == 4 else out[0]


def frame(images: Tensor, size: int, short_side: int | None = None) -> Tensor:
    """Bring images to size x size with nothing random: the small-image rule, or a short side and a centre crop.

    Args:
        images: uint8 [..., channels, H, W].
        short_side: pixels of the short side before the centre crop, at least `size`; None follows the rule.

    Returns:
        uint8 [..., channels, size, size].
    """
    height, width = images.shape[-2:]
    if short_side is None and max(height, width) <= size:
        factor = size // max(height, width)
        images = resize(images, factor * height, factor * width)
        if images.shape[-2:] == (size, size):
            return images
        top, left = (size - factor * height) // 2, (size - factor * width) // 2
        return pad(images, (left, size - factor * width - left, top, size - factor * height - top))

    short = short_side or size
    if height <= width:
        images = resize(images, short, short * width // height)
    else:
        images = resize(images, short * height // width, short)
    top, left = (round((side - size) / 2.0) for side in images.shape[-2:])  # as torchvision's center_crop rounds
    return images[..., top : top + size, left : left + size]


def resized_crop_boxes(height: int, width: int, scale: tuple[float, float], uniforms_BK: np.ndarray) -> np.ndarray:
    """Return where to crop images of one size, as torchvision's RandomResizedCrop chooses.

    Up to ten attempts at an area share from `scale` and a log-uniform aspect in [3/4, 4/3]; if none fits, the largest
    centred crop of an allowed aspect.

    Args:
        uniforms_BK: [B, CROP_UNIFORMS] in [0, 1).

    Returns:
        Top, left, height and width in pixels, int64 [B, 4].
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    share_BA, aspect_BA = uniforms_BK[:, :-2].reshape(-1, CROP_ATTEMPTS, 2).transpose(2, 0, 1)
    area_BA = height * width * (scale[0] + share_BA * (scale[1] - scale[0]))
    ratio_BA = np.exp(low + aspect_BA * (high - low))
    sides_2BA = np.rint([np.sqrt(area_BA / ratio_BA), np.sqrt(area_BA * ratio_BA)])
    fits_2BA = (sides_2BA > 0) & (sides_2BA <= np.array([height, width])[:, None, None])
    fits_BA = fits_2BA[0] & fits_2BA[1]
    h_B, w_B = sides_2BA[:, np.arange(len(uniforms_BK)), fits_BA.argmax(axis=1)]
    top_B, left_B = uniforms_BK[:, -2] * (height - h_B + 1), uniforms_BK[:, -1] * (width - w_B + 1)
    boxes_B4 = np.stack([top_B, left_B, h_B, w_B], axis=1).astype(np.int64)  # cuts off

    h = min(height, round(width / (3 / 4)))
    w = min(width, round(height * (4 / 3)))
    boxes_B4[~fits_BA.any(axis=1)] = (height - h) // 2, (width - w) // 2, h, w
    return boxes_B4


def resized_crop(image: Tensor, size: int, scale: tuple[float, float], uniforms: np.ndarray) -> Tensor:
    """Crop at random and resize to size x size, uint8 [channels, H, W] to [channels, size, size]."""
    [box] = resized_crop_boxes(image.shape[-2], image.shape[-1], scale, uniforms[None])
    return crop_and_resize(image, box, size)


def crop_and_resize(image: Tensor, box: np.ndarray, size: int) -> Tensor:
    """Resize a box of an image, its top, left, height and width, to size x size."""
    top, left, h, w = box.tolist()
    return resize(image[:, top : top + h, left : left + w], size, size)
