"""Folders and lists of images: their contents, the errors of every kind of damage, and every kind of file."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experts.batches import StreamConfig, TrainBatches
from experts.data.config import Augment, DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.decode import decode_file
from experts.data.images import FileImages, ResidentImages
from experts.samplers.instance_balanced import InstanceBalanced
from orchestration.config.compose import load_config

LOCAL_CIFAR10 = Path(__file__).parents[5] / "shared" / "data" / "cifar10-jpeg.tar.xz"  # optional local data


def picture(path, value=0, size=(32, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def tree(root, splits=("train", "test"), counts=(4, 3)):
    for split in splits:
        for c, count in enumerate(counts):
            for i in range(count):
                picture(root / split / f"class{c}" / f"{i}.jpg", 10 * c + i)
    return root


def folder(root, **more):
    return DatasetConfig(name="folder", source="image_folder", root=str(root), **more)


def lists(root, **more):
    return DatasetConfig(
        name="list",
        source="image_list",
        root=str(root),
        **({"train_list": "train.txt", "test_list": "test.txt"} | more),
    )


@pytest.mark.parametrize(
    ("splits", "val"),
    [
        (("train", "test"), 0),
        (("train", "val"), 0),
        (("train", "val", "test"), 7),
    ],
)
def test_a_folder_per_class_is_read_in_sorted_order(tmp_path, splits, val):
    dataset = open_dataset(folder(tree(tmp_path, splits)))
    assert dataset.class_names == ("class0", "class1")
    assert dataset.counts_C.tolist() == [4, 3]
    assert dataset.test.counts(2).tolist() == [4, 3]
    assert (0 if dataset.val is None else len(dataset.val)) == val
    assert dataset.raw_image_shape == (32, 32, 3)
    expected = [
        decode_file(str(tmp_path / "train" / f"class{c}" / f"{i}.jpg")) for c, n in ((0, 4), (1, 3)) for i in range(n)
    ]
    assert torch.equal(dataset.train.images, torch.stack(expected))


def test_a_folder_without_splits_holds_out_a_test_set(tmp_path):
    tree(tmp_path, ("",), (6, 5))
    dataset = open_dataset(folder(tmp_path, test_per_class=2))
    assert dataset.counts_C.tolist() == [4, 3]
    assert dataset.test.counts(2).tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"test_per_class = 0: folder has no test set.*or give a test/ folder beside"):
        open_dataset(folder(tmp_path))


def test_a_share_of_each_class_is_held_out_and_said(tmp_path):
    """0.25 of 10, 6, 2, 1 images are 3 (half is rounded up), 2 (1.5), 1 (0.5) and none of the only one."""
    tree(tmp_path, ("",), (10, 6, 2, 1))
    dataset = open_dataset(folder(tmp_path, test_fraction=0.25))
    assert dataset.counts_C.tolist() == [7, 4, 1, 1]
    assert dataset.test.counts(4).tolist() == [3, 2, 1, 0]
    held_out, without = dataset.remarks
    assert held_out.text == "held out for the test: 6 images, 3 to 0 per class (dataset.test_fraction = 0.25)"
    assert (without.kind, without.count, without.doubt) == ("no_test_image", 1, True)
    assert "class 3 ('class3') has one image" in without.text
    same = open_dataset(folder(tmp_path, test_fraction=0.25))
    assert same.digest == dataset.digest
    with pytest.raises(ValueError, match=r"test_per_class = 2: class 2 .'class2'. has 2 images.*dataset.test_fraction"):
        open_dataset(folder(tmp_path, test_per_class=2))
    with pytest.raises(ValueError, match=r"test_fraction = 0.25 and test_per_class = 1 are both set"):
        folder(tmp_path, test_fraction=0.25, test_per_class=1)


def test_a_natural_long_tail_stays_and_what_is_cut_is_said(tmp_path):
    preset = load_config(["method=ce", "dataset=image_folder_lt", f"dataset.root={tree(tmp_path, counts=(9, 4, 2))}"])
    whole = open_dataset(preset.dataset)
    assert whole.counts_C.tolist() == [9, 4, 2]
    assert [remark.kind for remark in whole.remarks] == ["overlap_content"], "the pictures of both splits are the same"
    cut = open_dataset(preset.dataset.model_copy(update={"imbalance_ratio": 2.0}))
    assert cut.counts_C.tolist() == [2, 1, 1]
    assert (cut.remarks[0].kind, cut.remarks[0].count) == ("cut", 11)
    assert cut.remarks[0].text == "4 of 15 images are trained on, 11 are left out (dataset.imbalance_ratio = 2)"
    with pytest.raises(ValueError, match=r"class 1 .'class1'. would have no .*dataset.imbalance_ratio=null keeps"):
        open_dataset(preset.dataset.model_copy(update={"imbalance_ratio": 100.0}))


def test_sets_are_resident_or_streamed_as_asked(tmp_path):
    tree(tmp_path)
    crop = Augment(random_resized_crop=(0.5, 1))
    assert isinstance(open_dataset(folder(tmp_path)).train, ResidentImages)
    assert isinstance(open_dataset(folder(tmp_path, resident="never")).train, FileImages)
    assert isinstance(open_dataset(folder(tmp_path, resident_mib=0)).train, FileImages)
    assert isinstance(open_dataset(folder(tmp_path, augment=crop)).train, FileImages)
    assert isinstance(open_dataset(folder(tmp_path, augment=crop)).test, ResidentImages)
    assert isinstance(open_dataset(folder(tmp_path, augment=crop, resident="always")).train, ResidentImages)


def test_images_of_different_shapes_have_no_common_shape(tmp_path):
    picture(tree(tmp_path) / "train" / "class0" / "0.jpg", size=(20, 30))
    assert open_dataset(folder(tmp_path)).raw_image_shape is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "train" / "class2").mkdir(),
            "class2: class 'class2' has no image; needed at least one file",
        ),
        (lambda root: [p.unlink() for p in (root / "train" / "class1").iterdir()], "class 'class1' has no image"),
        (lambda root: [p.unlink() for p in (root / "test").glob("*/*")], "the test set has no image"),
        (
            lambda root: (root / "test" / "other").mkdir(),
            "differ from those of train/: other is not in train/ .1 such.",
        ),
        (lambda root: (root / "train").rename(root / "learn"), "found test/ but no train/"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(tmp_path, damage, message):
    damage(tree(tmp_path))
    with pytest.raises(ValueError, match=message):
        open_dataset(folder(tmp_path))


@pytest.mark.parametrize("empty", [False, True])
def test_a_class_that_the_test_lacks_is_trained_on_and_said(tmp_path, empty):
    """A natural long tail may have so few images of a class that nobody kept one for the test."""
    root = tree(tmp_path, counts=(4, 3, 2))
    for path in (root / "test" / "class1").iterdir():
        path.unlink()
    if not empty:
        (root / "test" / "class1").rmdir()
    dataset = open_dataset(folder(root))
    assert dataset.test.counts(3).tolist() == [4, 0, 2]
    [remark] = [remark for remark in dataset.remarks if remark.kind == "no_test_image"]
    assert remark.text.startswith("1 of 3 classes have no test image, first class 1 ('class1')")


def test_an_empty_root_and_a_wrong_number_of_classes_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found no class folder; needed one folder per class"):
        open_dataset(folder(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"dataset.num_classes = 3: found 2 classes .*set dataset.num_classes=2 or"):
        open_dataset(folder(tree(tmp_path / "tree"), num_classes=3))
    with pytest.raises(ValueError, match=r"found 1 class .'class0'., needed at least 2"):
        open_dataset(folder(tree(tmp_path / "one", counts=(3,))))
    with pytest.raises(ValueError, match=r"a test set of its own; set dataset.test_per_class=0"):
        open_dataset(folder(tmp_path / "tree", test_per_class=1))
    with pytest.raises(ValueError, match=r"dataset.index_groups = \[3, 7\]: found 2 classes"):
        open_dataset(folder(tmp_path / "tree", index_groups=(3, 7)))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"hello", lambda b: b[:3]])
@pytest.mark.parametrize(("resident", "processes"), [("always", 0), ("never", 0), ("never", 1)])
def test_a_damaged_image_is_named_wherever_it_is_decoded(tmp_path, damage, resident, processes):
    victim = (
        tree(tmp_path, counts=(4, 18)) / "train" / "class1" / "10.jpg"
    )  # not among the files that are opened for their shape
    victim.write_bytes(damage(victim.read_bytes()))
    chosen = folder(tmp_path, resident=resident, loader_processes=processes)
    with pytest.raises(ValueError, match=r"class1/10.jpg") as raised:
        run_through(chosen)
    assert "\n" not in str(raised.value)
    assert "take it out of the set" in str(raised.value)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("L", "grey.jpg"),
        ("CMYK", "cmyk.jpg"),
        ("P", "palette.png"),
        ("RGBA", "alpha.png"),
        ("LA", "grey_alpha.png"),
        ("1", "bits.png"),
        ("RGB", "plain.bmp"),
        ("RGB", "plain.webp"),
        ("RGB", "plain.png"),
        ("RGB", "plain.jpg"),
    ],
)
def test_every_kind_of_file_becomes_rgb_as_pillow_reads_it(tmp_path, mode, name):
    picture(tmp_path / name, size=(40, 30), mode=mode)
    with Image.open(tmp_path / name) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    decoded = decode_file(str(tmp_path / name))
    assert decoded.shape == (3, 40, 30)
    assert (decoded.int() - expected.int()).abs().max() <= (2 if mode == "CMYK" else 0)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert torch.equal(decode_file(str(tmp_path / "deep.png"))[0].flatten(), torch.arange(256, dtype=torch.uint8))


def test_jpegs_are_the_same_without_torchvisions_decoder(tmp_path, monkeypatch):
    picture(tmp_path / "a.jpg", size=(50, 70))
    fast = decode_file(str(tmp_path / "a.jpg"))
    monkeypatch.setattr("experts.data.decode.jpeg_decoder", lambda: None)
    assert torch.equal(decode_file(str(tmp_path / "a.jpg")), fast)


def run_through(config):
    dataset = open_dataset(config)
    sampler = InstanceBalanced(InstanceBalanced.Config(), dataset.train.labels, 2)
    stream = StreamConfig(seed=0, stage="s", stream="m", epochs=1, batch_size=4)
    list(TrainBatches(dataset.train, sampler, config, stream).iterate(1))


def write_lists(root, train, test):
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)


TRAIN = "train/class0/0.jpg 0\ntrain/class0/1.jpg 0\n\ntrain/class1/0.jpg 1\n"
TEST = "test/class0/0.jpg 0\ntest/class1/0.jpg 1\n"


def test_lists_keep_their_order_and_counts(tmp_path):
    write_lists(tree(tmp_path), TRAIN, TEST)
    dataset = open_dataset(lists(tmp_path))
    assert dataset.class_names == ("class0", "class1")
    assert dataset.train.labels.tolist() == [0, 0, 1]
    assert len(dataset.test) == 2
    more = {"train_list": str(tmp_path / "train.txt"), "num_classes": 2, "val_list": "test.txt"}
    elsewhere = open_dataset(lists(tmp_path, **more))
    assert elsewhere.train.labels.tolist() == [0, 0, 1]
    assert len(elsewhere.val) == 2


def test_paths_may_hold_spaces(tmp_path):
    picture(tmp_path / "a b" / "c d.jpg")
    picture(tmp_path / "e" / "f.jpg")
    write_lists(tmp_path, "a b/c d.jpg 0\ne/f.jpg 1\n", "e/f.jpg 1\n")
    assert open_dataset(lists(tmp_path)).class_names == ("a b", "e")


@pytest.mark.parametrize(
    ("train", "test", "more", "message"),
    [
        (TRAIN + "nonsense\n", TEST, {}, r"train.txt:5: found 'nonsense'; needed `path label`"),
        (TRAIN + "x.jpg -1\n", TEST, {}, r"train.txt:5: found 'x.jpg -1'; needed `path label`"),
        (TRAIN + "x.jpg 1.5\n", TEST, {}, r"train.txt:5: found"),
        (TRAIN + "x.jpg 2\n", TEST, {"num_classes": 2}, r"train.txt:5: label 2 is out of range; needed 0 to 1"),
        (TRAIN, TEST + "x.jpg 7\n", {}, r"dataset.test_list = test.txt: label 7 is not in dataset.train_list"),
        (TRAIN, TEST, {"num_classes": 3}, r"class 2 has no training image.*; needed at least 1"),
        (
            "train/class0/0.jpg 0\ntrain/class1/0.jpg 2\n",
            TEST,
            {},
            r"label 1 is not in dataset.train_list, whose labels are 0, 2",
        ),
        ("\n\n", TEST, {}, r"train.txt: holds no image; needed at least one"),
        ("gone/0.jpg 0\n" + TRAIN, TEST, {}, r"train.txt: its first image is not at .*gone/0.jpg; set dataset.root"),
        (TRAIN + "train/gone.jpg 1\n", TEST, {}, r"train/gone.jpg: cannot be read .No such file"),
        (TRAIN, TEST, {"test_list": "absent.txt"}, r"dataset.test_list = absent.txt: no such file, here or in dataset"),
        (TRAIN, TEST, {"test_list": None}, r"test_per_class = 0: list has no test set.*or give dataset.test_list"),
        (TRAIN, TEST, {"root": None}, r"dataset.root is not set .dataset list."),
        (TRAIN, TEST, {"val_list": "test.txt", "val_per_class": 1}, r"val_list and val_per_class = 1 are both set"),
        (TRAIN, TEST, {"train_list": None}, r"train_list is not set; source=image_list needs"),
    ],
)
def test_a_bad_list_names_file_and_line_or_key(tmp_path, train, test, more, message):
    write_lists(tree(tmp_path), train, test)
    with pytest.raises(ValueError, match=message):
        open_dataset(
            DatasetConfig(
                **(
                    {
                        "name": "list",
                        "source": "image_list",
                        "root": str(tmp_path),
                        "train_list": "train.txt",
                        "test_list": "test.txt",
                    }
                    | more
                )
            )
        )


@pytest.mark.skipif(not LOCAL_CIFAR10.is_file(), reason=f"needs CIFAR-10 as {LOCAL_CIFAR10}")
def test_real_jpegs_open_as_a_folder(tmp_path):
    """The first twelve pictures of the archive, split by hand into two classes and a test set."""
    with tarfile.open(LOCAL_CIFAR10) as archive:
        members = [m for m, _ in zip((m for m in archive if m.isfile()), range(12), strict=False)]
        for i, member in enumerate(members):
            data = archive.extractfile(member).read()
            target = tmp_path / ("train" if i < 8 else "test") / f"class{i % 2}" / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
            assert Image.open(io.BytesIO(data)).size == (32, 32)
    dataset = open_dataset(folder(tmp_path))
    assert dataset.train.images.shape == (8, 3, 32, 32)
    assert dataset.train.images.float().std() > 20
