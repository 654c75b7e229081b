"""Folders and lists of images are counted before a run, where they lie on this machine."""

from orchestration.config.compose import load_config
from orchestration.preflight.expected_data import expected_data, forget
from orchestration.preflight.plan_text import describe


def test_a_plan_counts_the_images_of_a_folder_and_says_what_is_held_out(tmp_path):
    for name, count in (("ant", 20), ("bee", 5), ("cat", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            (tmp_path / name / f"{i}.jpg").touch()
    (tmp_path / "ant" / "notes.txt").touch()
    config = load_config(
        ["method=ce", "dataset=image_folder_lt", f"dataset.root={tmp_path}", "dataset.test_fraction=0.2"]
    )
    found = expected_data(config)
    assert (found.num_classes, found.counts_C.tolist(), found.test_images) == (3, [16, 4, 1], 6)
    text = describe(config)
    assert "3 classes, 21 training images, 16 to 1 per class (ratio 16)" in text
    assert "held out for the test: 6 images, 4 to 1 per class (dataset.test_fraction = 0.2)" in text
    assert "skipped in class folders: 1 that are no images (1 .txt)" in text
    assert "would refuse this" not in text
    (tmp_path / "cat" / "2.jpg").touch()
    forget()
    assert expected_data(config).counts_C.tolist() == [16, 4, 2]


def test_what_a_list_has_wrong_is_listed_as_missing(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg x\n")
    (tmp_path / "test.txt").write_text("a.jpg 0\n")
    config = load_config(["method=ce", "dataset=image_list", f"dataset.root={tmp_path}"])
    assert expected_data(config).counts_C is None
    assert "train.txt:1: found 'a.jpg x'; needed" in " ".join(describe(config).split())
