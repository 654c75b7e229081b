"""Images as operators really have them, through whole runs: rare formats, unreadable files, nearly empty classes.

Trees are of 3 classes of 16 x 16 pictures, runs of a few steps.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image

from orchestration.cli import main
from tests import runs
from tests.e2e.test_bad_input import refused

pytestmark = pytest.mark.ray

COMMON = ["pace=digits_lt", "method.stages.train.epochs=1", "method.stages.train.batch_size=8"]
FOLDER = [
    *COMMON, "dataset=image_folder_lt", "dataset.imbalance_ratio=null", "dataset.index_groups=null",
]  # fmt: skip
LISTS = [*COMMON, "dataset=image_list"]
BAD = ("train/ant/3.jpg", "train/bee/0.jpg")


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "images"


def damage(tree, *names):
    for i, name in enumerate(names):
        data = (tree / name).read_bytes()
        (tree / name).write_bytes((data[:200], b"")[i % 2])


def data_of(folder):
    return json.loads((folder / "data.json").read_text())


def test_files_of_every_kind_train(tree, warm, tmp_path, capsys):
    """CMYK, grey, palette, alpha, 16 bits and a turned camera, beside plain ones; streamed: steps read."""
    picture = Image.open(tree / "train" / "ant" / "0.jpg")
    picture.convert("CMYK").save(tree / "train" / "ant" / "1.jpg")
    picture.convert("L").save(tree / "train" / "ant" / "2.jpg")
    for mode in ("P", "RGBA", "LA", "1"):
        picture.convert(mode).save(tree / "train" / "ant" / f"{mode}.png")
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tree / "train" / "ant" / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tree / "train" / "ant" / "turned.jpg", exif=exif)
    words = [*FOLDER, f"dataset.root={tree}", "dataset.resident=never"]
    assert runs.train(tmp_path / "run", *words) == 0
    assert all(math.isfinite(loss) for loss in runs.losses(tmp_path / "run").values())
    assert data_of(tmp_path / "run")["counts"] == [16, 10, 10]


@pytest.mark.drill
def test_a_run_in_quarantine_says_so_resumes_and_is_measured_again(tree, warm, tmp_path, capsys):
    damage(tree, *BAD)
    folder = tmp_path / "run"
    words = [*FOLDER, f"dataset.root={tree}", "dataset.quarantine=2"]
    assert runs.train(folder, *words, "run.max_steps=2") == 0
    said = capsys.readouterr()
    assert "2 training images cannot be read and are left out, first train/ant/3.jpg (not a whole image" in said.err
    assert "28 training images of 3 classes, 10 to 9 per class (ratio 1.111); 2 unreadable images left out" in said.out
    data = data_of(folder)
    assert (data["counts"], data["total"]) == ([9, 9, 10], 28)
    assert [(item["path"], item["label"]) for item in data["left_out"]] == list(zip(BAD, (0, 1), strict=True))

    assert runs.train(folder, *words, "cluster.workers=3") == 0
    assert sorted(runs.losses(folder)) == [1, 2, 3, 4]
    assert data_of(folder) == data

    capsys.readouterr()
    assert main(["evaluate", str(folder)]) == 0
    assert "2 unreadable images left out" in capsys.readouterr().out


@pytest.mark.drill
def test_a_run_in_quarantine_equals_one_whose_bad_files_are_not_there(tree, warm, tmp_path, capsys):
    damage(tree, *BAD)
    words = [*FOLDER, f"dataset.root={tree}", "dataset.resident=never"]
    assert runs.train(tmp_path / "with", *words, "dataset.quarantine=5", "cluster.workers=3") == 0
    for name in BAD:
        (tree / name).unlink()
    assert runs.train(tmp_path / "without", *words, "cluster.workers=3") == 0
    assert runs.points(tmp_path / "with") == runs.points(tmp_path / "without")


def test_another_set_of_bad_files_is_refused_on_resume_and_more_than_allowed_at_any_time(tree, warm, tmp_path, capsys):
    damage(tree, BAD[0])
    folder = tmp_path / "run"
    words = [*FOLDER, f"dataset.root={tree}", "dataset.quarantine=2"]
    assert runs.train(folder, *words, "run.max_steps=1") == 0
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    damage(tree, "train/cat/1.jpg")
    said = refused(capsys, folder, *words)
    assert "this run was started with other data" in said
    assert "29 training images; found" in said and ", 28)" in said
    damage(tree, "train/cat/2.jpg")
    said = refused(capsys, folder, *words)
    assert "dataset.quarantine = 2: 3 of 30 training images cannot be read" in said
    assert str(tree / BAD[0]) in said
    assert (folder / "data.json").read_bytes() == before["data.json"]
    assert (folder / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


@pytest.mark.drill
def test_a_bad_test_image_is_refused_whatever_the_quarantine(tree, warm, tmp_path, capsys):
    damage(tree, "test/cat/1.jpg")
    words = [*FOLDER, f"dataset.root={tree}", "dataset.quarantine=30", "dataset.resident=never"]
    said = refused(capsys, tmp_path / "run", *words)
    assert str(tree / "test/cat/1.jpg") in said
    assert "no test image is left out" in said
    assert not list((tmp_path / "run").glob("metrics.jsonl")) or not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.drill
def test_a_class_of_one_image_and_one_that_the_test_lacks_give_numbers_or_not_available(tree, warm, tmp_path, capsys):
    """Class 1 has one training image; class 2 no test image, so its group has no accuracy. Never NaN, never 0."""
    train = [f"train/ant/{i}.jpg 0" for i in range(10)] + ["train/bee/0.jpg 1"]
    train += [f"train/{name}/{i}.jpg 2" for i in range(10) for name in ("cat", "bee")]
    (tree / "train.txt").write_text("\n".join(train) + "\n")
    (tree / "test.txt").write_text("test/ant/0.jpg 0\ntest/bee/0.jpg 1\ntest/bee/1.jpg 1\n")
    folder = tmp_path / "run"
    assert runs.train(folder, *LISTS, f"dataset.root={tree}", "run.pictures=true") == 0
    table = capsys.readouterr().out
    assert "n/a" in table
    assert "nan" not in table.lower()
    assert data_of(folder)["counts"] == [10, 1, 20]
    found = {p.stem: json.loads(p.read_text(), parse_constant=pytest.fail) for p in folder.glob("evaluation/*.json")}
    for evaluation in (found["last"], found["best"]):  # and no file holds NaN or Infinity
        ensemble = evaluation["members"]["ensemble"]
        assert ensemble["per_class"][2] is None
        assert ensemble["top1"]["medium"] is None, "class 2 is the only one with 20 to 100 images"
        assert None not in (ensemble["per_class"][0], ensemble["per_class"][1], ensemble["top1"]["all"])
    assert all(math.isfinite(record["value"]) for record in runs.records(folder))


@pytest.mark.drill
def test_a_batch_of_fewer_images_than_replicas_changes_nothing(warm, tmp_path, capsys):
    """405 digits in batches of 134 or 202 leave a last batch of 3 or 1: of four replicas some have no image of it."""
    for batch in (134, 202):
        words = [
            "method=ce", f"method.stages.train.batch_size={batch}", "method.stages.train.epochs=1",
            "engine.precision=float64",
        ]  # fmt: skip
        packed, split = tmp_path / f"packed{batch}", tmp_path / f"split{batch}"
        assert runs.train(packed, *words) == 0
        assert runs.train(split, *words, "cluster.workers=4") == 0
        assert list(runs.losses(split).values()) == pytest.approx(list(runs.losses(packed).values()), abs=1e-6)


@pytest.mark.drill
def test_more_replicas_than_test_images_measure_the_same(tree, warm, tmp_path, capsys):
    """Three test images on four replicas; the fourth has none to measure."""
    for name in ("ant", "bee", "cat"):
        for i in (1, 2):
            (tree / "test" / name / f"{i}.jpg").unlink()
    words = ["method=ce", "pace=digits_lt", *FOLDER[1:], f"dataset.root={tree}", "engine.precision=float64"]
    for folder, more in ((tmp_path / "packed", []), (tmp_path / "split", ["cluster.workers=4"])):
        assert runs.train(folder, *words, *more) == 0
    packed, split = (json.loads((tmp_path / f / "evaluation" / "last.json").read_text()) for f in ("packed", "split"))
    assert split["num_images"] == packed["num_images"] == 3
    assert split["members"]["ensemble"]["nll"] == pytest.approx(packed["members"]["ensemble"]["nll"], abs=1e-6)
