import json

import numpy as np
import pytest
from PIL import Image

from orchestration.cli import main
from orchestration.tracking.contents import files
from tests.short_runs import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", "ride", "backbone=resnet8", stages=1)


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_any_run_is_measured_beside_images_of_no_known_class(run, noise, capsys):
    assert main(["evaluate", str(run), "--unknown", str(noise), "--model", "last", "--threshold", "0.15"]) == 0
    printed = capsys.readouterr().out
    assert "500 images of known classes (test), 12 of none" in printed and "AUROC" in printed
    found = json.loads((run / "evaluation" / "open-last-test.json").read_text())
    assert (found["num_known"], found["num_unknown"], found["threshold"]) == (500, 12, 0.15)
    assert list(found["members"]) == ["ensemble", "expert0", "expert1", "expert2"]
    for one in found["members"].values():
        assert 0 <= one["f_measure"] <= 1 and 0 <= one["auroc"] <= 1
    assert {"evaluation/open-last-test.json", "report/open-last-test.png"} <= set(files(run))  # what a server gets


def test_at_threshold_0_nothing_is_rejected_and_accuracy_is_the_usual_one(run, noise, capsys):
    assert main(["evaluate", str(run), "--unknown", str(noise), "--model", "last", "--threshold", "0"]) == 0
    assert "The highest of 10 probabilities is never below 0.1: nothing is rejected." in capsys.readouterr().out
    assert main(["evaluate", str(run), "--model", "last"]) == 0
    capsys.readouterr()
    found, usual = (
        json.loads((run / "evaluation" / f"{name}-last-test.json").read_text())["members"] for name in ("open", "again")
    )
    for member, one in found.items():
        assert one["top1"] == usual[member]["top1"] and one["precision"] == one["top1"]["all"]
        assert one["rejected"] == {"known": 0.0, "unknown": 0.0}
        assert one["recall"] == pytest.approx(500 * one["precision"] / (500 * one["precision"] + 12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--threshold", "0.2"], "--threshold 0.2: only with --unknown"),
        (["--unknown", "x", "--threshold", "1.5"], "--threshold 1.5: needed a probability from 0 to 1"),
        (["--unknown", "x", "--weights", "test-time"], "--unknown x with --weights: measured apart"),
        (["--unknown", "/nowhere"], "/nowhere: no such folder or file"),
    ],
)
def test_options_that_cannot_work_are_refused(run, options, words, capsys):
    assert main(["evaluate", str(run), *options]) == 1
    assert words in capsys.readouterr().err
