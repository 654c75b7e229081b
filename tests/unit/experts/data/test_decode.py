"""Image files of rare kinds and of impossible sizes.

Each becomes RGB by the rule of `experts.data.decode`, or is refused before it takes memory.
"""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from experts.data.decode import MAX_ASPECT, MAX_PIXELS, UnreadableImage, decode_file, frame

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(path, image, **how):
    image.save(path, **how)
    return str(path)


def as_tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def test_transparency_is_dropped_and_colours_stay_as_stored(tmp_path):
    """Fully transparent pixels keep their stored colour; neither black nor white is mixed in."""
    alpha = np.zeros((20, 30, 1), np.uint8)
    rgba = Image.fromarray(np.concatenate([PIXELS, alpha], axis=2))
    assert torch.equal(decode_file(saved(tmp_path / "rgba.png", rgba)), as_tensor(PIXELS))
    grey_alpha = Image.fromarray(np.concatenate([PIXELS[..., :1], alpha], axis=2), "LA")
    expected = as_tensor(PIXELS[..., :1].repeat(3, 2))
    assert torch.equal(decode_file(saved(tmp_path / "la.png", grey_alpha)), expected)


def test_a_transparent_palette_gives_its_colours(tmp_path):
    palette = Image.fromarray(PIXELS).quantize(16)
    expected = as_tensor(np.array(palette.convert("RGB")))
    assert torch.equal(decode_file(saved(tmp_path / "p.png", palette, transparency=0)), expected)
    assert torch.equal(decode_file(saved(tmp_path / "p.gif", palette, transparency=0)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_not_applied(tmp_path, orientation):
    """Pixels as stored, as in torchvision's ImageFolder, which published training code uses."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decode_file(saved(tmp_path / "plain.jpg", Image.fromarray(PIXELS)))
    assert torch.equal(decode_file(saved(tmp_path / "turned.jpg", Image.fromarray(PIXELS), exif=exif)), plain)
    assert plain.shape == (3, 20, 30)


def test_the_first_of_several_frames_counts(tmp_path):
    frames = [Image.fromarray(PIXELS[..., i]) for i in range(3)]
    path = saved(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    assert torch.equal(decode_file(path)[0], torch.from_numpy(PIXELS[..., 0]))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_where_pillow_would_clip_them(tmp_path, mode):
    path = saved(tmp_path / "deep.tiff", Image.new(mode, (4, 4), 300))
    with pytest.raises(UnreadableImage, match=rf"pixels of 32 bits, Pillow's mode {mode}; needed 8 or 16 bits"):
        decode_file(path)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("prefix", [b"", b"\xff" * 5], ids=["plain", "filled"])
def test_a_jpeg_that_claims_to_be_huge_is_refused_by_its_header(tmp_path, progressive, prefix):
    """A file of 1 KB that would take 12 GB to decode."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "jpeg", progressive=progressive)
    data = file.getvalue()
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    huge = data[: at + 5] + (65000).to_bytes(2, "big") * 2 + data[at + 9 :]
    (tmp_path / "huge.jpg").write_bytes(huge[:2] + prefix + huge[2:])
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableImage, match=rf"65000 x 65000 pixels, at most {MAX_PIXELS:,} are read"):
            decode_file(str(tmp_path / "huge.jpg"))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9500, 16000], ids=["beyond ours", "beyond Pillow's"])
def test_other_huge_files_are_refused_before_their_pixels_are_unpacked(tmp_path, side):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "bmp")
    data = file.getvalue()
    (tmp_path / "huge.bmp").write_bytes(data[:18] + struct.pack("<ii", side, side) + data[26:])
    for ending in ("png", "bmp"):
        with pytest.raises(UnreadableImage, match=r"pixels, at most|exceeds limit"):
            decode_file(str(tmp_path / f"huge.{ending}"))


def test_an_extremely_thin_image_is_refused(tmp_path):
    """Resized to a short side of 224 it would take 224 x 224 x 2000 x 3 bytes; the thinnest image that is read fits."""
    with pytest.raises(UnreadableImage, match="2000 x 1 pixels, one side more than 1000 times the other"):
        decode_file(saved(tmp_path / "wide.png", Image.new("RGB", (2 * MAX_ASPECT, 1))))
    with pytest.raises(UnreadableImage, match="one side more than"):
        decode_file(saved(tmp_path / "high.jpg", Image.new("RGB", (1, 2 * MAX_ASPECT))))
    widest = decode_file(saved(tmp_path / "widest.png", Image.new("RGB", (MAX_ASPECT, 1), (255, 0, 0))))
    assert frame(widest, 32)[0].eq(255).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "bmp", "tiff", "webp"])
def test_any_damage_gives_an_image_or_one_kind_of_error(tmp_path, kind):
    """60 files of each kind, with a few bytes changed or the end cut off."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    whole = file.getvalue()
    refused = 0
    for i in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 120), 3):
            data[at] = rng.integers(0, 256)
        path = tmp_path / f"{i}.{kind}"
        path.write_bytes(data[: rng.integers(1, len(data))] if i % 4 == 0 else data)
        try:
            assert decode_file(str(path)).dtype == torch.uint8
        except UnreadableImage as problem:
            refused += problem.path == str(path) and bool(problem.reason)
    assert refused > 5
