"""Lists of images are absolute once a config is composed, and follow their root."""

from experts.data.config import DatasetConfig
from orchestration.config.compose import compose
from orchestration.config.list_paths import moved_lists


def test_composing_finds_lists_and_says_which_of_two_is_read(tmp_path, monkeypatch):
    root, here = tmp_path / "root", tmp_path / "here"
    for folder in (root, here):
        folder.mkdir()
        (folder / "train.txt").touch()
    (here / "mine.txt").touch()
    monkeypatch.chdir(here)
    words = ["method=ce", "dataset=image_list", "dataset.root=../root"]
    found = compose(words)
    data = found.config.dataset
    assert (data.train_list, data.test_list) == (str(root / "train.txt"), str(root / "test.txt"))
    assert found.notes == (
        f"dataset.train_list = train.txt: {root / 'train.txt'} is read, {here / 'train.txt'} is not",
    )
    other = compose([*words, "dataset.train_list=./train.txt", "dataset.test_list=mine.txt"])
    assert (other.config.dataset.train_list, other.config.dataset.test_list) == (
        str(here / "train.txt"),
        str(here / "mine.txt"),
    )
    assert f"{here / 'train.txt'} is read, {root / 'train.txt'} is not" in other.notes[0]


def test_lists_in_root_move_with_it():
    data = DatasetConfig(
        name="x", source="image_list", root="/new", train_list="/old/a/train.txt", test_list="/older/test.txt"
    )
    assert moved_lists(data, "/old") == {"train_list": "/new/a/train.txt"}
    assert moved_lists(data, "/new") == {}
