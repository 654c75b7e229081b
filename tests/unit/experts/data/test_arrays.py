"""Digits and Fashion-MNIST: their images and labels, and the errors of damaged files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from experts.data.arrays import FASHION_CLASSES, read_idx
from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.readers import open_raw

LOCAL_FASHION = Path(__file__).parents[5] / "shared" / "data" / "fashion-mnist"  # optional local data


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion(folder, counts=(6, 5), pack=True):
    folder.mkdir(parents=True, exist_ok=True)
    for part, per_class in zip(("train", "t10k"), counts, strict=True):
        labels = np.tile(np.arange(10), per_class)
        images = np.repeat(np.arange(len(labels)), 28 * 28).reshape(-1, 28, 28)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{kind}-ubyte"
            if pack:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), 1))
            else:
                (folder / name).write_bytes(idx(array))


def fashion(root, **more):
    return DatasetConfig(name="fashion", source="fashion_mnist", root=str(root), **more)


def test_digits_hold_out_a_test_set_that_is_the_same_for_every_ratio():
    chosen = DatasetConfig(name="digits", source="digits", test_per_class=50, imbalance_ratio=20, max_per_class=120)
    dataset = open_dataset(chosen)
    assert dataset.counts_C.tolist() == [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    assert dataset.test.counts(10).tolist() == [50] * 10
    assert dataset.train.images.shape == (405, 1, 32, 32)
    assert dataset.train.images.max() == 255
    assert dataset.raw_image_shape == (8, 8, 1)
    assert (dataset.num_classes, dataset.val) == (10, None)
    other = open_dataset(chosen.model_copy(update={"imbalance_ratio": 5, "val_per_class": 10}))
    assert (other.test.images == dataset.test.images).all()
    assert other.val.counts(10).tolist() == [10] * 10
    assert other.digest != dataset.digest
    assert open_dataset(chosen).digest == dataset.digest


def test_digits_without_a_held_out_test_set_are_refused():
    with pytest.raises(ValueError, match=r"dataset.test_per_class = 0: digits has no test set"):
        open_dataset(DatasetConfig(name="digits", source="digits"))


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw", "raw"])
@pytest.mark.parametrize("pack", [True, False])
def test_fashion_is_read_packed_or_unpacked_from_every_place_of_torchvision(tmp_path, place, pack):
    write_fashion(tmp_path / place, pack=pack)
    dataset = open_dataset(fashion(tmp_path, imbalance_ratio=2, max_per_class=6))
    assert dataset.class_names == FASHION_CLASSES
    assert dataset.counts_C.tolist() == [6, 5, 5, 4, 4, 4, 3, 3, 3, 3]
    assert dataset.raw_image_shape == (28, 28, 1)
    first = dataset.train.images[0, 0]
    assert (first[2:30, 2:30] == first[2, 2]).all()
    assert not first[:2].any()
    assert not first[:, 30:].any()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[: len(b) // 2], "t10k-images-idx3-ubyte.gz: not a whole gzip file .*fetch the file again"),
        (lambda b: b"", "t10k-images-idx3-ubyte.gz: begins with nothing"),
        (lambda b: b"not a gzip file", "not a whole gzip file"),
        (lambda b: b[:40] + bytes([b[40] ^ 255]) + b[41:], "t10k-images-idx3-ubyte.gz: not a whole gzip file"),
        (lambda b: gzip.compress(gzip.decompress(b)[:-1]), r"bytes unpacked, its header .50, 28, 28. needs 39216"),
        (
            lambda b: gzip.compress(b"\0" * 100),
            "begins with 00000000, an IDX file of 3 axes of bytes begins with 00000803",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    write_fashion(tmp_path)
    victim = tmp_path / "t10k-images-idx3-ubyte.gz"
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_dataset(fashion(tmp_path))


def test_a_missing_file_and_a_wrong_pair_are_named(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(7))))
    with pytest.raises(ValueError, match="t10k has 50 images but 7 labels"):
        open_dataset(fashion(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"found no train-images-idx3-ubyte.gz .* or set dataset.download=true"):
        open_dataset(fashion(tmp_path))


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    write_fashion(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(60, 11))))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz: label 11 of image 0 is out of range; needed"):
        open_dataset(fashion(tmp_path))


@pytest.mark.skipif(not LOCAL_FASHION.is_dir(), reason=f"needs Fashion-MNIST in {LOCAL_FASHION}")
def test_the_real_fashion_mnist_has_its_published_counts():
    source = open_raw(fashion(LOCAL_FASHION))
    assert np.bincount(source.train.labels).tolist() == [6000] * 10
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    assert abs(source.train.images.mean() / 255 - 0.2860) < 1e-4
    assert read_idx(str(LOCAL_FASHION / "t10k-labels-idx1-ubyte.gz"), 1)[:5].tolist() == [9, 2, 1, 1, 6]
