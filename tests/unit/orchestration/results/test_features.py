import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aggregation.projection import project
from experts.ensemble import build_ensemble
from orchestration.cli import main
from orchestration.config.compose import from_yaml
from orchestration.results.features import PER_CLASS, _positions, draw_stages
from orchestration.results.pictures import draw_report
from tests.short_runs import train

pytestmark = pytest.mark.slow  # pictures take seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network of two stages, the second of which moves heads and BatchNorm's statistics alone."""
    return train(tmp_path_factory.mktemp("runs") / "run", "dr_h2t", "backbone=resnet8")


@pytest.fixture(scope="module")
def written(run):
    return draw_report(run)


def numbers(run, name):
    return json.loads((run / "evaluation" / f"features-{name}.json").read_text())


def test_a_report_has_the_features_and_lengths_of_every_stage(run, written):
    for name in ("features-train", "norms-train", "features-h2t", "norms-h2t"):
        assert run / "report" / f"{name}.png" in written
        with Image.open(run / "report" / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    found = numbers(run, "train")
    assert found["class_ids"] == list(range(10)) and found["train_images"][0] == 120
    (one,) = found["members"]
    assert len(found["labels"]) == len(one["moments"]["after"]["places"]) <= 10 * PER_CLASS
    assert all(0 < one["moments"][m]["variance"] <= 1 and 0 < one["moments"][m]["own_centre"] <= 1 for m in ("before",))


def test_a_run_begins_with_new_weights_and_a_later_stage_with_those_before_it(run, written):
    config = from_yaml(run / "config.yaml")
    new = build_ensemble(config.ensemble("train", 10), seed=config.seed).experts["expert0"].head.weight
    train, h2t = (numbers(run, stage)["members"][0]["norms"] for stage in ("train", "h2t"))
    np.testing.assert_allclose(train["before"]["weights"], new.detach().norm(dim=new.shape.index(64)), rtol=1e-5)
    np.testing.assert_allclose(h2t["before"]["features"], train["after"]["features"], rtol=1e-5)
    assert h2t["before"]["weights"] == train["after"]["weights"] != h2t["after"]["weights"]


def test_a_stage_that_leaves_features_as_they_are_has_lengths_alone(tmp_path):
    run = train(tmp_path / "run", "crt", "backbone=resnet8", "method.stages.crt.frozen_batchnorm=eval")
    drawn = {path.name for path in draw_stages(run)}
    assert drawn == {"features-train.png", "norms-train.png", "norms-crt.png"} and not numbers(run, "crt")["moved"]


def test_classes_stage_and_projection_may_be_chosen(run, written, monkeypatch, capsys):
    monkeypatch.setattr(
        "orchestration.results.features.project", lambda rows_ND, rule: project(rows_ND, "pca")
    )  # quick
    chosen = ["--classes", "7, 1,3", "--stage", "train", "--projection", "tsne"]
    assert main(["features", str(run), *chosen]) == 0
    printed = capsys.readouterr().out
    assert "features-train-1-3-7-tsne.png" in printed and "h2t" not in printed.replace("dr_h2t", "")
    found = numbers(run, "train-1-3-7-tsne")
    assert found["class_ids"] == [1, 3, 7] and set(found["labels"]) == {1, 3, 7}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classes", "0,12"], "no class '12'; needed ids from 0 to 9"),
        (
            ["--stage", "h2x"],
            "--stage h2x: needed a stage that is trained, has steps and knows all classes: train, h2t",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(run, options, words, capsys):
    assert main(["features", str(run), *options]) == 1
    assert words in capsys.readouterr().err


def test_features_that_cannot_be_drawn_cost_a_line_and_not_the_report(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("features_classes: null", "features_classes: [0, cat]"))
    drawn = draw_report(other)
    assert "not drawn: ValueError: run.features_classes=[0, 'cat']: no class 'cat'" in capsys.readouterr().err
    assert other / "report" / "class_counts.png" in drawn and other / "report" / "features-train.png" not in drawn
    config.write_text(config.read_text().replace("features_picture: pca", "features_picture: false"))
    assert draw_stages(other) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(("classes", "size", "device"), [(10, 32, "cpu"), (1000, 224, "cpu"), (1000, 224, "cuda")])
def test_costs_are_bounded_whatever_the_number_of_classes_and_the_size_of_images(classes, size, device):
    """50 test images of each class; on a CPU 2^23 pixels for the lengths, and ten images or more of a class shown."""
    saved = SimpleNamespace(
        store=SimpleNamespace(labels=np.tile(np.arange(classes), 50)),
        data={"counts": list(range(classes, 0, -1))},
        device=torch.device(device),
        config=SimpleNamespace(dataset=SimpleNamespace(image_size=size)),
    )
    shown = [0, 5, 9]
    chosen = np.bincount(saved.store.labels[_positions(saved, shown)], minlength=classes)
    assert (chosen[shown] == 50).all() and chosen.max() == 50
    assert (chosen > 0).sum() == {(10, "cpu"): 10, (1000, "cpu"): 167 + 2, (1000, "cuda"): 1000}[classes, device]
    assert chosen.sum() <= 2000 + 150
