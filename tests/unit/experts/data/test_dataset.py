"""dataset.quarantine: unreadable training images are left out when the data is opened, and nothing else is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from experts.batches import StreamConfig, TrainBatches
from experts.data.config import Augment, DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.decode import UnreadableImage
from experts.data.images import FileImages, ResidentImages
from experts.samplers.instance_balanced import InstanceBalanced
from experts.samplers.reversed import Reversed

COUNTS = (9, 6, 4)
BAD = ("train/class0/3.jpg", "train/class1/0.jpg", "train/class1/5.jpg")
RESIDENT_OR_STREAMED = pytest.mark.parametrize("resident", ["always", "never"])


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, count in enumerate(COUNTS):
            folder = tmp_path / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path


def damage(tree, *names):
    """Cut the first file off, empty the second, replace the third by text, and so on."""
    for i, name in enumerate(names):
        data = (tree / name).read_bytes()
        (tree / name).write_bytes((data[:200], b"", b"hello")[i % 3])


def settings(tree, **more):
    return DatasetConfig(name="tree", source="image_folder", root=str(tree), image_size=16, **more)


def pixels_of_an_epoch(dataset, sampler=InstanceBalanced):
    drawn = sampler(sampler.Config(), dataset.train.labels, dataset.num_classes)
    stream = StreamConfig(seed=0, stage="s", stream="m", epochs=1, batch_size=4)
    batches = TrainBatches(dataset.train, drawn, dataset.config, stream)
    return [(batch.images_B3HW, batch.labels_B) for batch in batches.iterate(1)]


@RESIDENT_OR_STREAMED
def test_the_rest_is_as_if_the_bad_files_had_never_existed(tree, tmp_path_factory, resident):
    """Counts, digest, samplers and every pixel of an epoch."""
    other = tmp_path_factory.mktemp("clean")
    for path in tree.rglob("*.jpg"):
        name = path.relative_to(tree)
        if str(name) not in BAD:
            (other / name).parent.mkdir(parents=True, exist_ok=True)
            (other / name).write_bytes(path.read_bytes())
    damage(tree, *BAD)
    found = open_dataset(settings(tree, resident=resident, quarantine=3))
    clean = open_dataset(settings(other, resident=resident))
    assert isinstance(found.train, ResidentImages if resident == "always" else FileImages)
    assert found.counts_C.tolist() == clean.counts_C.tolist() == [8, 4, 4]
    assert found.digest == clean.digest
    assert found.train.labels.tolist() == clean.train.labels.tolist()
    for sampler in (InstanceBalanced, Reversed):
        pairs = zip(pixels_of_an_epoch(found, sampler), pixels_of_an_epoch(clean, sampler), strict=True)
        for (images, labels), (their_images, their_labels) in pairs:
            assert torch.equal(images, their_images)
            assert torch.equal(labels, their_labels)
    assert [(item.path, item.label) for item in found.left_out] == list(zip(BAD, (0, 1, 1), strict=True))
    reasons = [item.reason for item in found.left_out]
    assert "not a whole image" in reasons[0]
    assert "an empty file" in reasons[1]
    assert "of no known kind" in reasons[2]
    assert clean.left_out == ()


@RESIDENT_OR_STREAMED
def test_a_worker_leaves_out_the_listed_files_without_looking(tree, resident):
    damage(tree, *BAD)
    config = settings(tree, resident=resident, quarantine=3)
    found = open_dataset(config)
    given = open_dataset(config, left_out=[item.path for item in found.left_out])
    assert given.digest == found.digest
    assert given.left_out == ()
    for mine, theirs in zip(pixels_of_an_epoch(given), pixels_of_an_epoch(found), strict=True):
        assert torch.equal(mine[0], theirs[0])
    damage(tree, "train/class0/0.jpg")  # damaged after the check: an error when it is read, never a second quarantine
    with pytest.raises(UnreadableImage, match=r"class0/0.jpg"):
        pixels_of_an_epoch(open_dataset(config, left_out=list(BAD)))


@RESIDENT_OR_STREAMED
def test_one_too_many_is_refused_with_count_and_first_files(tree, resident):
    more = ("train/class2/0.jpg", "train/class2/3.jpg")
    damage(tree, *BAD, *more)
    with pytest.raises(ValueError, match=r"dataset.quarantine = 4: 5 of 19 training images cannot be read") as raised:
        open_dataset(settings(tree, resident=resident, quarantine=4))
    said = str(raised.value)
    assert all(f"{tree / name} (" in said for name in BAD)
    assert not any(name in said for name in more)
    assert "and 2 more; restore them, or set dataset.quarantine=5" in said
    assert open_dataset(settings(tree, resident=resident, quarantine=5)).counts_C.tolist() == [8, 4, 2]


def test_without_a_quarantine_the_first_bad_file_is_the_error(tree):
    damage(tree, *BAD)
    with pytest.raises(
        UnreadableImage, match=r"class0/3.jpg: not a whole image .*dataset.quarantine leave such"
    ) as raised:
        open_dataset(settings(tree, resident="always"))
    assert "\n" not in str(raised.value)


@RESIDENT_OR_STREAMED
@pytest.mark.parametrize("split", ["test", "val"])
def test_no_test_or_validation_image_is_ever_left_out(tree, resident, split):
    """Streamed files too: an operator who expects bad files learns of them at the start, not at an evaluation."""
    if split == "val":
        (tree / "test").rename(tree / "val")
        for c in range(len(COUNTS)):
            (tree / "test" / f"class{c}").mkdir(parents=True)
            (tree / "test" / f"class{c}" / "0.jpg").write_bytes((tree / "val" / f"class{c}" / "0.jpg").read_bytes())
    damage(tree, f"{split}/class2/1.jpg" if split == "val" else "test/class2/1.jpg")
    named = {"test": "test", "val": "validation"}[split]
    with pytest.raises(UnreadableImage, match=rf"{split}/class2/1.jpg: .*no {named} image is left out"):
        open_dataset(settings(tree, resident=resident, quarantine=100))


def test_a_class_without_a_readable_image_is_named(tree):
    names = [f"train/class2/{i}.jpg" for i in range(4)]
    damage(tree, *names)
    with pytest.raises(
        ValueError, match=r"none of the training images of class 2 .'class2'. can be read; the first is"
    ):
        open_dataset(settings(tree, quarantine=10))


def test_only_images_of_the_run_are_checked(tree):
    """The long-tailed selection comes first and is never refilled: a bad file outside it costs nothing, and one inside
    it is missing."""
    chosen = settings(tree, imbalance_ratio=2, max_per_class=4, quarantine=19, resident="never")
    whole = open_dataset(chosen)
    used = {str(path) for path in np.char.decode(whole.train.files.paths)}
    unused = next(f"train/class0/{i}.jpg" for i in range(9) if f"train/class0/{i}.jpg" not in used)
    damage(tree, unused)
    assert open_dataset(chosen).digest == whole.digest
    victim = sorted(name for name in used if "class0" in name)[0]
    damage(tree, victim)
    found = open_dataset(chosen)
    assert set(np.char.decode(found.train.files.paths)) == used - {victim}
    assert [item.path for item in found.left_out] == [victim]


def test_other_bad_files_give_another_digest(tree):
    damage(tree, BAD[0])
    one = open_dataset(settings(tree, quarantine=3))
    damage(tree, BAD[1])
    two = open_dataset(settings(tree, quarantine=3))
    assert one.digest != two.digest


def test_a_missing_file_of_a_list_is_left_out_too_and_random_crops_stay_the_same(tree):
    lines = [f"{p.relative_to(tree)} {p.parent.name[-1]}" for p in sorted((tree / "train").rglob("*.jpg"))]
    (tree / "train.txt").write_text("\n".join([*lines[:3], "train/class0/gone.jpg 0", *lines[3:]]) + "\n")
    (tree / "clean.txt").write_text("\n".join(lines) + "\n")
    (tree / "test.txt").write_text("\n".join(lines) + "\n")

    def listed(name, quarantine):
        return open_dataset(
            DatasetConfig(
                name="list", source="image_list", root=str(tree), train_list=name, test_list="test.txt", image_size=16,
                quarantine=quarantine, augment=Augment(random_resized_crop=(0.5, 1)),
            )
        )  # fmt: skip

    found, clean = listed("train.txt", 1), listed("clean.txt", 0)
    assert [item.reason for item in found.left_out] == ["cannot be read (No such file or directory)"]
    assert found.digest == clean.digest
    for mine, theirs in zip(pixels_of_an_epoch(found), pixels_of_an_epoch(clean), strict=True):
        assert torch.equal(mine[0], theirs[0])


def test_only_sets_of_files_have_a_quarantine():
    with pytest.raises(ValidationError, match="quarantine = 3: digits has no image files; set quarantine=0"):
        DatasetConfig(name="digits", source="digits", quarantine=3)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        DatasetConfig(name="tree", source="image_folder", quarantine=-1)


def test_the_list_of_left_out_files_is_plain_data(tree):
    damage(tree, BAD[0])
    item = open_dataset(settings(tree, quarantine=1)).left_out[0]
    assert json.loads(json.dumps(vars(item))) == {"path": BAD[0], "label": 0, "reason": item.reason}


def test_every_checked_file_gives_a_beat(tree):
    beats = []
    open_dataset(settings(tree, quarantine=1, resident="never"), beat=lambda: beats.append(None))
    assert len(beats) == 2 * sum(COUNTS)
