"""Folders hold more than images: other formats, hidden files, links, splits of other names."""

import os

import numpy as np
import pytest
from PIL import Image

from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.data.decode import UnreadableImage, decode_file
from experts.data.files import open_image_folder


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


def listed(root):
    raw = open_image_folder(folder(root))
    return [os.fsdecode(path) for path in raw.train.paths.tolist()], {r.kind: r for r in raw.remarks}


def test_images_are_known_by_ending_or_by_content_and_the_rest_is_counted(root):
    ant, plain = root / "train" / "ant", listed(root)[0]
    endings = (".jfif", ".avif", ".jp2", ".tga", ".JPE", ".qoi")
    for ending in endings:
        (ant / f"4{ending}").touch()
    picture(ant / "5.png")
    (ant / "5.png").rename(ant / "5.photo")
    picture(ant / "6.bmp")
    (ant / "6.bmp").rename(ant / "6")
    for name in ("notes.txt", "labels.csv", "BMnotes", "pages.pdf", "picture.eps", "table.h5"):
        (ant / name).write_text("BM, as a bitmap begins\n")
    (root / "train" / "beside.png").touch()
    found, remarks = listed(root)
    new = sorted(set(found) - set(plain))
    assert new == sorted(f"train/ant/{name}" for name in ("5.photo", "6", *(f"4{ending}" for ending in endings)))
    assert remarks["skipped"].count == 6
    assert "6 that are no images" in remarks["skipped"].text and "1 .txt" in remarks["skipped"].text
    assert "images in no class folder, which are not used: 1, first" in remarks["outside"].text


def test_what_systems_put_beside_images_is_never_one(root):
    plain = listed(root)[0]
    for name in (".ipynb_checkpoints", "@eaDir", ".Trash-1000", "__MACOSX", "$RECYCLE.BIN", "lost+found", "@Recycle"):
        picture(root / "train" / name / "0.png")  # would be a class
        picture(root / "train" / "ant" / name / "0.png")
    for name in ("Thumbs.db", "desktop.ini", "._0.png", ".hidden.jpg"):
        (root / "train" / "bee" / name).touch()
    found, remarks = listed(root)
    assert found == plain
    assert set(remarks) == {"skipped"}
    assert remarks["skipped"].count == 18
    assert "18 of the system or hidden" in remarks["skipped"].text


def test_links_are_followed_and_loops_are_not(root, tmp_path_factory):
    ant, elsewhere = root / "train" / "ant", tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "deep" / "7.png")
    (ant / "linked").symlink_to(elsewhere)
    (ant / "9.png").symlink_to(elsewhere / "deep" / "7.png")
    (ant / "loop").symlink_to(root / "train")
    (ant / "again").symlink_to(ant)
    (ant / "itself").symlink_to(ant / "itself")
    (root / "train" / "cat").symlink_to(elsewhere)
    (root / "test" / "cat").symlink_to(elsewhere)
    os.mkfifo(ant / "pipe.png")
    found, remarks = listed(root)
    assert [path for path in found if "/ant/" in path] == [
        *(f"train/ant/{i}.png" for i in range(3)), "train/ant/9.png", "train/ant/linked/deep/7.png",
    ]  # fmt: skip
    assert "train/cat/deep/7.png" in found
    assert remarks["loop"].count == 2
    assert "2 that are no files" in remarks["skipped"].text
    (ant / "8.png").symlink_to(root / "gone.png")  # a file that is missing is an error, as every missing file
    with pytest.raises(UnreadableImage, match=r"train/ant/8.png: cannot be read"):
        open_dataset(folder(root))


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation")])
def test_splits_are_known_by_their_usual_names(root, names):
    for split, name in zip(("train", "test"), names, strict=True):
        (root / split).rename(root / f"other_{name}")
        (root / f"other_{name}").rename(root / name)
    raw = open_image_folder(folder(root))
    assert raw.class_names == ("ant", "bee")
    assert (len(raw.train.labels), len(raw.test.labels)) == (6, 6)
    assert raw.train.paths[0] == f"{names[0]}/ant/0.png".encode()


def test_two_folders_of_one_split_are_refused_and_a_class_may_be_called_test(root):
    (root / "validation").mkdir()
    (root / "valid").mkdir()
    with pytest.raises(ValueError, match=r"found valid/ and validation/; needed one folder of val images"):
        open_image_folder(folder(root))
    for name in ("Test", "control"):
        picture(root / "classes" / name / "0.png")
    assert open_image_folder(folder(root / "classes")).class_names == ("Test", "control")


@pytest.mark.parametrize("ending", ["png", "tif", "pgm", "jp2"])
def test_sixteen_bits_are_scaled_in_every_format(tmp_path, ending):
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"deep.{ending}")
    assert decode_file(str(tmp_path / f"deep.{ending}"))[0].flatten().tolist() == list(range(256))


def test_a_file_that_would_run_a_program_is_refused(tmp_path):
    (tmp_path / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(UnreadableImage, match="of no known kind"):
        decode_file(str(tmp_path / "0.png"))


def test_classes_are_the_same_however_their_letters_are_written(root):
    """A Mac writes é as e and an accent; folders that went through one meet others that did not."""
    for split, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        picture(root / split / name / "0.png")
    raw = open_image_folder(folder(root))
    assert raw.class_names == ("ant", "bee", "caf\u00e9")
    assert [os.fsdecode(path) for path in raw.test.paths.tolist()][-1] == "test/cafe\u0301/0.png"
    assert raw.test.labels.tolist()[-1] == 2
    picture(root / "test" / "caf\u00e9" / "0.png")
    with pytest.raises(ValueError, match=r"differ from those of train/: .* is not in train/ .1 such"):
        open_image_folder(folder(root))


def test_classes_whose_names_look_the_same_are_said(root):
    for split in ("train", "test"):
        picture(root / split / "Ant" / "0.png", 7)
    assert listed(root)[1]["alike"].text.endswith("in capitals or spelling alone: 1, first Ant and ant")


def test_trains_may_be_a_class(root):
    """Where train/ holds pictures and no folder, beside other classes."""
    for name in ("bus", "train"):
        for i in range(3):
            picture(root / "vehicles" / name / f"{i}.png", i)
    assert open_image_folder(folder(root / "vehicles")).class_names == ("bus", "train")
    picture(root / "vehicles" / "train" / "express" / "0.png")
    assert open_image_folder(folder(root / "vehicles")).class_names == ("express",)


def test_a_class_of_other_files_alone_says_which_they_are(root):
    for i in range(3):
        (root / "train" / "bee" / f"{i}.png").unlink()
        (root / "train" / "bee" / f"{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"class 'bee' has no image \(found 3 .heic\); needed at least one file"):
        listed(root)
