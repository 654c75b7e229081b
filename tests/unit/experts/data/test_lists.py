"""Lists as users have them: read to the same images and classes as the plain one, or refused with the line and why."""

import os
import time

import pytest

from experts.data.config import DatasetConfig
from experts.data.lists import open_image_list

NAMES = ("ant", "bee", "cat")
PLAIN = [(f"train/{name}/{i}.jpg", c) for c, name in enumerate(NAMES) for i in range(3)]
TEST = [(f"test/{name}/0.jpg", c) for c, name in enumerate(NAMES)]


def lines(images, form="{} {}\n"):
    return "".join(form.format(*image) for image in images)


@pytest.fixture
def root(tmp_path):
    """Images that nobody opens: reading a list looks for the first one only."""
    for path, _ in PLAIN + TEST:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / "test.txt").write_text(lines(TEST))
    return tmp_path


def read(root, train, **more):
    (root / "train.txt").write_bytes(train if isinstance(train, bytes) else train.encode())
    keys = {"train_list": "train.txt", "test_list": "test.txt"} | more
    return open_image_list(DatasetConfig(name="list", source="image_list", root=str(root), **keys))


@pytest.mark.parametrize(
    ("written", "kinds"),
    [
        (lines(PLAIN).encode(), []),
        (b"\xef\xbb\xbf" + lines(PLAIN).encode(), []),
        (lines(PLAIN).encode("utf-16"), ["encoding"]),
        (b"\xfe\xff" + lines(PLAIN).encode("utf-16-be"), ["encoding"]),
        (lines(PLAIN).encode("utf-32"), ["encoding"]),
        (lines(PLAIN, "{}\t{}\n"), []),
        (lines(PLAIN, "{}  \t {}\r\n"), []),
        (lines(PLAIN, "{} {}\r"), []),
        (lines(PLAIN, "{},{}\n"), []),
        (lines(PLAIN, "{}; {}\n"), []),
        (lines(PLAIN, '"{}","{}"\n'), []),
        (lines(PLAIN, "'{}' {}\n"), []),
        (lines(PLAIN, "{} {}.0\n"), []),
        (lines(PLAIN, "{} 000{}\n"), []),
        ("path,label\n" + lines(PLAIN, "{},{}\n"), ["header"]),
        ("\nimage class\n" + lines(PLAIN), ["header"]),
        ("# made by hand 2024\n" + lines(PLAIN), []),
        (lines(PLAIN).replace("/", "\\"), []),
        (lines([(path, label + 1) for path, label in PLAIN]), ["renumbered"]),
        (lines([(path, label * 77) for path, label in PLAIN]), ["renumbered"]),
        (lines([(path, label * 40_000_000) for path, label in PLAIN]), ["renumbered"]),
        (lines([(path, label * (2**62 - 1)) for path, label in PLAIN]), ["renumbered"]),
    ],
)
def test_a_list_is_read_however_it_was_saved(root, written, kinds):
    (root / "test.txt").write_text(lines(PLAIN[:1]).replace("train", "test"))  # label 0, or its first label
    begun = time.monotonic()
    if "renumbered" in kinds:
        first = written.split()[1]
        (root / "test.txt").write_text(f"test/ant/0.jpg {first}\n")
    found = read(root, written)
    assert time.monotonic() - begun < 5, "a large label takes neither time nor memory"
    assert found.class_names == NAMES
    assert [os.fsdecode(path) for path in found.train.paths.tolist()] == [path for path, _ in PLAIN]
    assert found.train.labels.tolist() == [label for _, label in PLAIN]
    assert found.test.labels.tolist() == [0]
    assert [remark.kind for remark in found.remarks] == kinds


def test_renumbered_classes_without_folders_of_their_own_keep_their_labels_as_names(root):
    mixed = [(path, (5, 900, 40_000_000)[i % 3]) for i, (path, _) in enumerate(PLAIN)]
    found = read(root, lines(mixed), test_list=None)
    assert found.class_names == ("5", "900", "40000000")
    assert "its 3 labels are 5, 900, 40000000; the classes are numbered 0 to 2" in found.remarks[0].text


def test_paths_are_quoted_where_the_writer_of_a_table_found_it_needed(root):
    """A path with a comma, one with quotes in it, one that has them on disk."""
    images = [*PLAIN, ("train/cat/a, b.jpg", 2), ('train/cat/an "x".jpg', 2), ('"bee".jpg', 1)]
    (root / '"bee".jpg').touch()
    written = lines(PLAIN, "{},{}\n") + '"train/cat/a, b.jpg",2\n"train/cat/an ""x"".jpg","2"\n"bee".jpg,1\n'
    found = read(root, written)
    assert [os.fsdecode(path) for path in found.train.paths.tolist()] == [path for path, _ in images]
    assert found.train.labels.tolist() == [label for _, label in images]


def test_names_in_the_letters_of_windows_or_as_raw_bytes_are_found(root):
    (root / "train/ant/café.jpg").touch()
    images = [("train/ant/café.jpg", 0), *PLAIN]
    assert read(root, lines(images).encode("cp1252")).train.paths[0] == "train/ant/café.jpg".encode()
    with open(os.fsencode(root) + b"/train/ant/caf\xe8.jpg", "wb"):
        pass
    images = lines(images).encode().replace("é".encode(), b"\xe8")
    assert read(root, images).train.paths[0] == b"train/ant/caf\xe8.jpg"
    with pytest.raises(ValueError, match=r"train.txt: 'train/ant/\\xea.jpg' is no UTF-8, and there is no such file"):
        read(root, lines(PLAIN).encode() + b"train/ant/\xea.jpg 0\n")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (lines(PLAIN) + "train/c", r"train.txt:10: found 'train/c'; needed `path label`"),
        (lines(PLAIN) + "x.jpg -1\n", r"train.txt:10: found 'x.jpg -1'; needed"),
        (lines(PLAIN) + "x.jpg 1.5\n", r"train.txt:10: found 'x.jpg 1.5'; needed"),
        (lines(PLAIN) + "x.jpg 99999999999999999999\n", r"train.txt:10: label 9{20} is too large; needed .* below 2"),
        (lines(PLAIN) + f"x.jpg {2**63}\n", r"train.txt:10: label 9223372036854775808 is too large"),
        (lines(PLAIN) + "x.jpg " + "9" * 5000 + "\n", r"train.txt:10: label 9{40} is too large"),
        (lines([(label, path) for path, label in PLAIN]), r"train.txt:1: .*; found the label first, it comes last"),
        (lines([(path, path[6:9]) for path, _ in PLAIN]), r"train.txt:1: .*; found a word last: number the classes"),
        (lines(PLAIN).encode("utf-16-le"), r"train.txt:1: found b't.x00r.*zero bytes, as UTF-16"),
        (b"\xff\xfe" + lines(PLAIN).encode()[:-1], r"train.txt: begins with the mark of UTF-16 and is not"),
        (b"\x00\x8b\x08\x00\x00", r"zero bytes, as UTF-16 and files that are no text"),
        (b"\x1f\x8b\x08\x00\x00", r"train.txt: is a gzip file; unpack it"),
        (b"PK\x03\x04\x14\x00\x00", r"train.txt: is a zip file, as tables of Excel are; save it as CSV"),
        (lines(PLAIN, "{}|{}\n"), r"train.txt:1: .*; found '\|' before the label, needed a blank, tab, comma"),
        (lines(PLAIN, "{},{},\n"), r"train.txt:1: .*; found 3 columns, needed path and label alone"),
        (lines(PLAIN, "{},{},train\n"), r"train.txt:1: .*; found 3 columns, needed path and label alone"),
        (",path,label\n" + lines(PLAIN, "7,{},{}\n"), r"not at .*; found 3 columns, one of them the path; .*\(line 2:"),
        (lines(PLAIN, '{{"path": "{}", "label": {}}}\n'), r"train.txt:1: .*; found JSON, needed plain lines"),
        (lines(PLAIN, "{},{}\n") + "train/ant/0.jpg 0", r"train.txt:10: .*; other lines have a comma before the label"),
        (lines(PLAIN, "C:\\data\\{} {}\n"), r"its first image is not at .*; that is a path of Windows; write paths"),
        (lines(PLAIN, "file:///{} {}\n"), r"its first image is not at .*; that is a URL; write paths"),
        ("a.jpg,b.jpg\n", r"train.txt:1: found 'a.jpg,b.jpg'; needed `path label`"),
        ("gone/\x1b[31m.jpg 0\n", r"train.txt: its first image is not at .*gone/\\x1b\[31m.jpg; .*\(line 1: "),
        ("wrong_first.jpg O\n" + lines(PLAIN), r"train.txt:1: found 'wrong_first.jpg O'; needed `path label`"),
        ("# only a remark\n", r"train.txt: holds no image"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line_as_it_is(root, written, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(root, written)
    assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_labels_beyond_the_number_of_classes_are_refused_with_what_is_meant(root):
    from_one = lines([(path, label + 1) for path, label in PLAIN])
    with pytest.raises(ValueError, match=r"train.txt:7: label 3 is out of range; .*; its labels count from 1: leave"):
        read(root, from_one, num_classes=3)
    with pytest.raises(ValueError, match=r"num_classes = 40000000: .* has 9 images, so that some class would have no"):
        read(root, lines(PLAIN), num_classes=40_000_000)
    (root / "test.txt").write_text(lines(TEST) + "test/cat/0.jpg 3\n")
    with pytest.raises(ValueError, match=r"label 3 is not in dataset.train_list, whose labels are 0, 1, 2 .*txt:4"):
        read(root, lines(PLAIN))


def test_what_is_listed_twice_is_counted_and_nothing_is_dropped(root):
    twice = lines(PLAIN) + "train/./ant/0.jpg 0\ntrain//bee/0.jpg 1\ntrain/cat/../ant/1.jpg 2\n"
    (root / "test.txt").write_text(lines([*TEST, PLAIN[0], PLAIN[4]]))
    found = read(root, twice)
    assert len(found.train.labels) == 12
    assert [(remark.kind, remark.count, remark.doubt) for remark in found.remarks] == [
        ("repeated_file", 2, True), ("two_labels_file", 1, True), ("overlap_file", 2, True),
    ]  # fmt: skip
    texts = [remark.text for remark in found.remarks]
    assert "2 of 12 training images are there already" in texts[0]
    assert "first train/ant/1.jpg and train/cat/../ant/1.jpg with labels 0 and 2" in texts[1]
    assert texts[2] == "2 of 5 test images are training images too (by path), first train/ant/0.jpg"


def test_a_bare_name_means_the_list_in_root_and_a_path_the_one_that_it_names(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "train.txt").write_text(lines(PLAIN[:6]))
    (elsewhere / "mine.txt").write_text(lines(PLAIN[:3] + PLAIN[6:]))
    monkeypatch.chdir(elsewhere)
    assert len(read(root, lines(PLAIN)).train.labels) == 9
    test_list = lines(TEST[:1])
    (root / "test.txt").write_text(test_list)
    assert len(read(root, lines(PLAIN), train_list="./train.txt").train.labels) == 6
    assert read(root, lines(PLAIN), train_list="mine.txt").class_names == ("ant", "cat")
