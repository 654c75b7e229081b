import os

import numpy as np
import pytest
from PIL import Image

from experts.data.unknown import open_unknown
from orchestration.config.compose import load_config


def config(**changes):
    return load_config(["method=ce", "dataset=digits_lt"]).dataset.model_copy(update=changes)


def picture(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), shade, np.uint8)).save(path)


def test_a_folder_gives_its_images_at_any_depth_by_name(tmp_path):
    for name, shade in (("b.png", 20), ("a/z.png", 10), ("c/d/e.png", 30)):
        picture(tmp_path / name, shade)
    (tmp_path / "notes.txt").write_text("no image")
    store = open_unknown(str(tmp_path), config(image_size=16))
    assert store.read(np.arange(3))[:, 0, 0, 0].tolist() == [10, 20, 30] and store.read(np.arange(1)).shape[2:] == (
        16,
        16,
    )


def test_a_list_has_a_path_per_line_below_the_data_sets_root_or_its_own_folder(tmp_path):
    picture(tmp_path / "open" / "with space.png", 10)
    picture(tmp_path / "open" / "x.png", 20)
    (tmp_path / "list.txt").write_text("open/with space.png -1\n\nopen/x.png\n")
    for root in (str(tmp_path), None):
        store = open_unknown(str(tmp_path / "list.txt"), config(image_size=16, root=root))
        assert store.read(np.arange(2))[:, 0, 0, 0].tolist() == [10, 20]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffcaf\u00e9/x.png\ny z.png\n".encode(),
        'image,label\n"caf\u00e9/x.png",-1\n"y z.png",3\n'.encode(),
        "caf\u00e9\\x.png\t0\r\ny z.png\t0\r\n".encode("cp1252"),
        "caf\u00e9/x.png,cat\ny z.png,dog\n".encode(),
        "caf\u00e9/x.png\ny z.png 3\n".encode(),
        "caf\u00e9/x.png -1\ny z.png\n".encode(),
    ],
    ids=["a mark, paths alone", "commas, quotes, header", "as Windows writes it", "words", "a label once", "none once"],
)
def test_a_list_of_any_form_is_read(tmp_path, text):
    picture(tmp_path / "caf\u00e9" / "x.png", 10)
    picture(tmp_path / "y z.png", 20)
    (tmp_path / "list.txt").write_bytes(text)
    store = open_unknown(str(tmp_path / "list.txt"), config(image_size=16))
    assert store.read(np.arange(2))[:, 0, 0, 0].tolist() == [10, 20]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "nothing: no such folder or file; needed images of no known class"),
        ("empty", "empty: holds no image of no known class; needed files that end in .jpg"),
        ("empty.txt", "empty.txt: holds no path"),
        ("lost.txt", "lost.txt:1: 'gone.png 0' names no image below .*; set dataset.root"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, name, words):
    os.mkdir(tmp_path / "empty")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "lost.txt").write_text("gone.png 0\n")
    with pytest.raises(ValueError, match=words):
        open_unknown(str(tmp_path / name), config())
