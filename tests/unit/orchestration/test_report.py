import json
import math

import numpy as np
import pytest
from PIL import Image

from aggregation.metrics import groups_by_count
from orchestration.journal import Journal, Series
from orchestration.report import _running_mean, _steps_per_epoch, write_report

EVERYTHING = ["class_counts.png", "curves.png", "per_class.png", "table.txt"]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def member(values):
    return {"top1": {"all": 0.5, "many": 0.6, "medium": None, "few": 0.1}, "nll": 1.0, "ece": 0.1, "per_class": values}


def run(folder, num_classes=10, epochs=3, stages=("train",), evaluated=("last", "best"), journal=True):
    """A small run folder; the last class has no test image."""
    counts = [max(1, int(500 * 100 ** (-c / (num_classes - 1)))) for c in range(num_classes)]
    groups = {name: ids.tolist() for name, ids in groups_by_count(counts).items()}
    write(folder / "data.json", {
        "dataset": "fake", "counts": counts,
        "class_names": [f"a rather long class name {c}" for c in range(num_classes)],
        "groups": {"by_count": groups, "by_index": None}, "image_shape": None,
    })  # fmt: skip
    for which in evaluated:
        values = [*np.linspace(0.9, 0.1, num_classes - 1).tolist(), None]
        write(folder / f"evaluation/{which}.json", {
            "split": "test", "selected_on": "test", "stage": stages[-1], "epoch": epochs, "step": 5 * epochs,
            "num_images": 100, "members": {"ensemble": member(values), "expert0": member(values)},
        })  # fmt: skip
    if journal:
        with Journal(folder) as lines:
            for stage in stages:
                for step in range(1, 5 * epochs + 1):
                    epoch = (step - 1) // 5 + 1
                    loss = math.nan if step == 7 else 3 / step
                    lines.append(stage, epoch, step, {"train/loss": loss})
                    if step % 5 == 0:
                        values = {"train/lr": 0.1**epoch, "train/ldam/expert0": loss, "train/total": loss}
                        values |= {"test/ensemble/all/top1": 0.5, "test/expert0/all/top1": 0.4}
                        values |= {"test/ensemble/few/top1": 0.1, "val/ensemble/all/top1": 0.3}
                        lines.append(stage, epoch, step, values)
    return folder


@pytest.mark.parametrize(("num_classes", "stages"), [(10, ("train",)), (2000, ("first", "second"))])
def test_a_run_gets_every_picture_and_the_table(tmp_path, num_classes, stages):
    written = write_report(run(tmp_path, num_classes, stages=stages))
    assert sorted(path.name for path in written) == EVERYTHING
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == EVERYTHING
    for name in EVERYTHING[:3]:
        with Image.open(tmp_path / "report" / name) as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("L"))
        assert 300 < min(pixels.shape) < 2000
        assert pixels.std() > 5  # something is drawn
    assert "best was chosen on TEST" in (tmp_path / "report" / "table.txt").read_text()


def test_a_report_is_the_same_when_written_again(tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in write_report(tmp_path)}
    assert {path.name: path.read_bytes() for path in write_report(tmp_path)} == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"evaluated": ()}, ["class_counts.png", "curves.png", "table.txt"]),
        ({"evaluated": (), "journal": False}, ["class_counts.png", "table.txt"]),
        ({"evaluated": ("last",), "epochs": 1}, EVERYTHING),
    ],
)
def test_an_interrupted_run_gets_what_it_has(tmp_path, arguments, expected):
    assert sorted(path.name for path in write_report(run(tmp_path, **arguments))) == expected


def test_a_run_of_one_step_and_an_empty_folder(tmp_path):
    assert write_report(tmp_path / "empty") == []
    with Journal(tmp_path / "young") as lines:
        lines.append("train", 1, 1, {"train/loss": 2.0})
    assert [path.name for path in write_report(tmp_path / "young")] == ["curves.png"]


def test_a_damaged_file_is_named(tmp_path):
    (run(tmp_path) / "evaluation" / "last.json").write_text("{")
    with pytest.raises(ValueError, match=r"last\.json: not valid JSON"):
        write_report(tmp_path)


def test_steps_per_epoch_come_from_complete_epochs():
    assert _steps_per_epoch([Series([1, 1, 2, 2, 3], [1, 10, 11, 20, 21], [0.0] * 5)]) == 10
    assert _steps_per_epoch([Series([1], [4], [0.0])]) == 4


def test_the_running_mean_is_centred_narrower_at_the_ends_and_skips_nan():
    np.testing.assert_allclose(_running_mean(np.array([1.0, 2.0, 6.0]), 3), [1.5, 3.0, 4.0])
    np.testing.assert_allclose(_running_mean(np.array([1.0, np.nan, 3.0]), 3), [1.0, 2.0, 3.0])
    assert np.isnan(_running_mean(np.array([np.nan]), 1)).all()
