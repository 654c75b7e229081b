"""Decoding learns of files: equal ones, dark ones, pictures of nothing, one of another size, replaced ones."""

import os

import numpy as np
import pytest
from PIL import Image

from experts.data.config import Augment, DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.fingerprints import of_read, of_states, replaced, touched


def picture(path, seed=0, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for s, split in enumerate(("train", "test")):
        for c, name in enumerate(("ant", "bee")):
            for i in range(3):
                picture(tmp_path / split / name / f"{i}.png", 100 * s + 10 * c + i)
    return tmp_path


def folder(root, **more):
    return DatasetConfig(name="own", source="image_folder", root=str(root), image_size=8, **more)


def test_decoding_tells_of_equal_files_dark_ones_and_pictures_of_nothing(root):
    ant, bee = root / "train" / "ant", root / "train" / "bee"
    (ant / "copy.png").write_bytes((ant / "0.png").read_bytes())
    (bee / "wrong.png").write_bytes((ant / "1.png").read_bytes())
    (root / "test" / "bee" / "leak.png").write_bytes((bee / "0.png").read_bytes())
    for i, ending in enumerate(("png", "tif")):
        dark = np.random.default_rng(i).integers(0, 4096, (8, 8)).astype(np.uint16)
        Image.fromarray(dark).save(ant / f"dark.{ending}")
    Image.new("RGB", (8, 8), (9, 200, 9)).save(ant / "green.png")
    Image.fromarray(np.full((8, 8), 40, np.uint8)).save(ant / "grey.png")
    found = {remark.kind: remark for remark in open_dataset(folder(root)).remarks}
    assert {kind: remark.count for kind, remark in found.items()} == {
        "repeated_content": 1, "two_labels_content": 1, "overlap_content": 1, "dark": 2, "one_colour": 2,
    }  # fmt: skip
    assert "train/ant/0.png and train/ant/copy.png" in found["repeated_content"].text
    assert "1 of 7 test images are training images too (by content), first test/bee/leak.png" in [
        remark.text for remark in found.values()
    ]
    assert open_dataset(folder(root, resident="never")).remarks == (), "files that are not read beforehand tell nothing"


def test_one_image_of_another_size_is_enough_and_files_not_decoded_have_no_known_shape(root):
    assert open_dataset(folder(root)).raw_image_shape == (8, 8, 3)
    assert open_dataset(folder(root, resident="never")).raw_image_shape is None
    cropped = folder(root, augment=Augment(random_resized_crop=(0.5, 1)))
    assert open_dataset(cropped).raw_image_shape is None
    picture(root / "test" / "bee" / "1.png", size=(9, 8))
    assert open_dataset(folder(root)).raw_image_shape is None


def test_replaced_files_are_noticed_by_content_or_else_by_size_and_time(root):
    decoded, streamed = open_dataset(folder(root)), open_dataset(folder(root, resident="never"))
    by_content, by_state = decoded.fingerprints(), streamed.fingerprints()
    assert set(by_content) == set(by_state) == {"training", "test"}
    assert of_read(streamed.test.files) == by_content["test"]
    path = root / "test" / "bee" / "1.png"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # as large as before, and as old
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "hold other data" in replaced("test", by_content["test"], of_read(streamed.test.files))
    assert replaced("test", by_state["test"], of_states(streamed.test.files)) is None
    assert touched("test", by_state["test"], of_states(streamed.test.files)) is None
    os.utime(path, ns=(0, 0))
    assert "other times" in touched("test", by_state["test"], of_states(streamed.test.files))
    path.write_bytes(data[:-1])
    assert "other sizes" in replaced("test", by_state["test"], of_states(streamed.test.files))
    assert replaced("test", by_content["test"], by_state["test"]) is None, "what only one has is not compared"


def test_files_that_are_read_once_for_quarantine_are_known_by_state_too_which_is_asked_for_once(root, monkeypatch):
    """A worker that comes later is told what to leave out, reads nothing, and compares sizes and times."""
    asked = []

    def states(pool):
        asked.append(pool)
        return of_states(pool)

    monkeypatch.setattr("experts.data.dataset.of_states", states)
    first = open_dataset(folder(root, resident="never", quarantine=1))
    later = open_dataset(folder(root, resident="never", quarantine=1), left_out=[])
    assert first.fingerprints() == first.fingerprints()
    assert len(asked) == 2, "training and test files, at the first of two builds alone"
    for split, found in later.fingerprints().items():
        assert found == {key: first.fingerprints()[split][key] for key in ("sizes", "times")}
        assert "contents" in first.fingerprints()[split]
