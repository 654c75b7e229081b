"""A choice of training images by a similarity that is given as a file."""

from __future__ import annotations

import numpy as np
import pytest

from experts.progress import Progress
from experts.samplers.most_similar import MostSimilar

LABELS = np.array([0, 0, 0, 1, 1, 2])


def shown(config, labels=LABELS, num_classes=3):
    """The positions of an epoch, in ascending order."""
    return sorted(MostSimilar(config, labels, num_classes).draw(Progress(1, 1), 7).tolist())


def file(folder, text):
    path = folder / "similarity.txt"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [0, 1, 2, 5]), (3, [0, 1, 2, 3, 4, 5])])
def test_all_images_of_the_most_similar_classes_are_shown_once(tmp_path, keep, expected):
    """Classes 0 and 1 are equally similar: the first is kept."""
    path = file(tmp_path, "0.25\n\n0.25\n1e0\n")
    assert shown(MostSimilar.Config(similarity=path, keep=keep)) == expected
    assert shown(MostSimilar.Config(similarity=(0.25, 0.25, 1), keep=keep)) == expected


def test_the_most_similar_images_are_shown_once(tmp_path):
    config = MostSimilar.Config(similarity=file(tmp_path, "-1\n5\n0\n3\n4\n-2\n"), of="images", keep=3)
    sampler = MostSimilar(config, LABELS, 3)
    assert shown(config) == [1, 3, 4]
    assert sampler.draws_per_epoch == 3
    assert sampler.class_probabilities(Progress(1, 1)).tolist() == [1 / 3, 2 / 3, 0]


def test_a_file_is_found_from_the_folder_of_the_command_and_never_read_for_another(tmp_path, monkeypatch):
    path = file(tmp_path, "1\n2\n3\n")
    monkeypatch.chdir(tmp_path)
    config = MostSimilar.Config(similarity="similarity.txt", keep=1)
    assert config.similarity == path
    saved = config.model_dump(mode="json")
    file(tmp_path, "3\n2\n1\n")
    again = MostSimilar.Config(**saved)  # a config that is read again keeps the hash, and needs no file
    assert again == config
    with pytest.raises(ValueError, match=r"is not the file that the run began with.*put that file back"):
        shown(again)


@pytest.mark.parametrize("text", ["1\nnan\n3\n", "1\ninf\n3\n", "1\nten\n3\n", "1\n2 3\n4\n"])
def test_a_line_that_is_not_one_finite_number_is_named(tmp_path, text):
    with pytest.raises(ValueError, match=r"similarity\.txt: line 2 is '.*needed one finite number"):
        MostSimilar.Config(similarity=file(tmp_path, text), keep=1)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.txt: cannot be read.*needed a text file"):
        MostSimilar.Config(similarity=str(tmp_path / "gone.txt"), keep=1)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary\.txt: cannot be read"):
        MostSimilar.Config(similarity=str(tmp_path / "binary.txt"), keep=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_list_must_be_of_finite_numbers(bad):
    with pytest.raises(ValueError, match="finite"):
        MostSimilar.Config(similarity=(1.0, bad), keep=1)


@pytest.mark.parametrize(
    ("of", "length", "message"),
    [
        ("classes", 2, r"has 2 numbers; needed 3, one for each of the classes"),
        ("classes", 6, r"has 6 numbers; needed 3.*set of to images"),
        ("images", 3, r"has 3 numbers; needed 6, one for each of the training images; set of to classes"),
    ],
)
def test_another_number_of_lines_is_refused(tmp_path, of, length, message):
    config = MostSimilar.Config(similarity=file(tmp_path, "1\n" * length), of=of, keep=1)
    with pytest.raises(ValueError, match=message):
        shown(config)


def test_more_than_there_is_cannot_be_kept():
    with pytest.raises(ValueError, match=r"keep = 4, found 3 classes; lower keep"):
        shown(MostSimilar.Config(similarity=(1, 2, 3), keep=4))
