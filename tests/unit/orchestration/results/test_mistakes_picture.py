"""The sheet shows the surest mistakes, the surest first, and decodes no other image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aggregation.predictions import Predictions
from experts.data import images as images_module
from experts.data.images import FileImages
from experts.data.pools import FilePool
from orchestration.results.mistakes_picture import draw_mistakes, worst_mistakes
from orchestration.results.pictures import draw_report
from orchestration.results.style import picture_style, save_figure
from orchestration.storage.predictions import write_predictions
from tests import short_runs
from tests.recipes import digits

IMAGES, CLASSES = 60, 4


def predictions(labels, wrong):
    """Every image that is wrong has the next class; an image is the surer the later it comes."""
    ranks = np.zeros((2, IMAGES), np.int32)
    ranks[0, wrong] = 1
    predicted = (labels + ranks) % CLASSES
    confidence = np.linspace(0.3, 0.9, IMAGES, dtype=np.float32)
    return Predictions(("ensemble", "expert0"), labels, predicted, ranks, np.stack([confidence] * 2), None)


def predictions_of(labels):
    """Predicted classes, ranks and confidence where every third image is taken for the next class."""
    ranks = np.stack([np.arange(len(labels)) % 3 == 0] * 2).astype(np.int32)
    return (labels + ranks) % 10, ranks, np.full(ranks.shape, 0.5, np.float32)


@pytest.fixture
def saved(tmp_path):
    labels = np.arange(IMAGES) % CLASSES
    paths = []
    for i in range(IMAGES):
        paths.append(f"picture $_{i}.png".encode())
        Image.new("RGB", (12 + i % 3, 9), (4 * i, 0, 0)).save(tmp_path / paths[-1].decode())
    method = SimpleNamespace(gives_probabilities=lambda stage: stage == "train", final="train")
    return SimpleNamespace(
        store=FileImages(FilePool(str(tmp_path), np.array(paths), labels), 16),
        data={"class_names": ["a $_$", "<b>", "c", "d" * 40]},
        config=SimpleNamespace(method=method),
    )


def test_the_surest_come_first():
    kept = predictions(np.zeros(IMAGES, np.int64), wrong=[3, 50, 20])
    assert worst_mistakes(kept, 2).tolist() == [50, 20]


def test_the_images_shown_are_decoded_and_no_other(saved, tmp_path, monkeypatch):
    wrong = np.arange(0, IMAGES, 2)
    kept = predictions(saved.store.labels, wrong)
    write_predictions([tmp_path / "evaluation"], [(("last",), "test", kept)], CLASSES, probabilities=True)
    read, real = [], images_module.decode_file
    monkeypatch.setattr(images_module, "decode_file", lambda path: read.append(path) or real(path))
    with picture_style():
        figure = draw_mistakes(tmp_path / "evaluation", lambda: saved, "", "ce, run a")
        save_figure(figure, tmp_path / "mistakes.png")
    assert read == [saved.store.files.path(place) for place in wrong[::-1][:24]]
    (panel,) = figure.axes
    texts = [text.get_text() for text in panel.texts]
    assert len(texts) == len(panel.images) == 24
    assert texts[0].splitlines()[:2] == ["c", "taken for dddddddddddddddd…, 89.0 %"]
    assert texts[0].endswith("picture $_58.png")
    assert "the surest 24 of 30 mistakes among 60 test images" in figure.get_suptitle().replace("\n", " ")


def test_names_of_files_are_drawn_with_fonts_that_have_their_script(saved, tmp_path, monkeypatch):
    """No font of another script need be on this machine: one that has 猫 is put in its place."""
    saved.store.files.paths[5] = "猫.png".encode()
    Image.new("RGB", (9, 9)).save(tmp_path / "猫.png")
    write_predictions(
        [tmp_path / "evaluation"],
        [(("last",), "test", predictions(saved.store.labels, [5, 6]))],
        CLASSES,
        probabilities=True,
    )
    monkeypatch.setattr(
        "orchestration.results.mistakes_picture.fonts_for",
        lambda names: (["DejaVu Sans", "a font with 猫"] if "猫" in names else ["DejaVu Sans"], ""),
    )
    figure = draw_mistakes(tmp_path / "evaluation", lambda: saved, "", "ce, run a")
    titles = figure.axes[0].texts
    assert [title.get_fontfamily() for title in titles] == [["DejaVu Sans", "a font with 猫"]] * 2
    assert titles[1].get_text().endswith("猫.png")


def test_nothing_is_drawn_where_nothing_is_wrong_or_scores_are_no_probabilities(saved, tmp_path):
    assert draw_mistakes(tmp_path / "none", lambda: saved, "", "") is None
    for wrong, stage in (([], ""), ([1], "other")):
        kept = predictions(saved.store.labels, wrong)
        write_predictions([tmp_path / "evaluation"], [(("last",), "test", kept)], CLASSES, probabilities=True)
        assert draw_mistakes(tmp_path / "evaluation", lambda: saved, stage, "") is None


def test_predictions_of_other_images_are_refused(saved, tmp_path):
    kept = predictions(saved.store.labels[::-1], [1])
    write_predictions([tmp_path / "evaluation"], [(("last",), "test", kept)], CLASSES, probabilities=True)
    with pytest.raises(ValueError, match="its labels are not those of the test images"):
        draw_mistakes(tmp_path / "evaluation", lambda: saved, "", "")


@pytest.mark.slow
def test_a_sheet_that_cannot_be_drawn_costs_itself_and_a_line(tmp_path):
    run = short_runs.train(tmp_path / "run", "ce", "backbone=resnet8", "run.features_picture=false", stages=1)
    labels = digits(0).test.labels
    others = Predictions(("ensemble", "expert0"), labels[::-1], *predictions_of(labels[::-1]), None)
    write_predictions([run / "evaluation"], [(("last",), "test", others)], 10, probabilities=True)
    lines = []
    drawn = {path.name for path in draw_report(run, lines.append)}
    (line,) = lines
    assert line.startswith("report/mistakes.png was not drawn: ValueError: ")
    assert "its labels are not those of the test images" in line
    assert {"per_class.png", "confusion.png", "reliability.png"} <= drawn

    right = Predictions(("ensemble", "expert0"), labels, *predictions_of(labels), None)
    write_predictions([run / "evaluation"], [(("last",), "test", right)], 10, probabilities=True)
    assert run / "report" / "mistakes.png" in draw_report(run, lines.append)
    assert lines == [line]
