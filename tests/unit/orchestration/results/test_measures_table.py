"""Measures of kept predictions beside top-1: lines below the table and two pictures, from the files alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.predictions import Predictions
from orchestration.results.measures_table import drawings_of_measures, measures_lines
from orchestration.results.style import draw_to
from orchestration.storage.predictions import write_predictions


def data_of(classes):
    return {"class_names": [f"kind $_{c}$" for c in range(classes)], "counts": list(range(classes, 0, -1))}


def keep(folder, classes, **how):
    draws = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), 4)
    scores = draws.normal(size=(len(labels), classes))
    scores[np.arange(len(labels)), labels] += 4 * (labels != 1)  # class 1 is left to chance
    kept = Predictions.of_batch({"ensemble": torch.tensor(scores)}, torch.tensor(labels))
    write_predictions([folder], [(("last",), "test", kept)], classes, **{"probabilities": True, **how})
    return labels, scores


def test_the_worst_class_is_named_below_the_table(tmp_path):
    labels, scores = keep(tmp_path / "evaluation", 6)
    title, heads, _, row = measures_lines(tmp_path, data_of(6), [""])
    right = scores.argmax(axis=1) == labels
    assert "last model" in title
    assert heads.split() == ["top-5", "balanced", "macro-F1", "worst", "class"]
    assert row.split()[2] == f"{100 * right.mean():.2f}"  # classes have equally many images here
    assert row.endswith(f"{100 * right[labels == 1].mean():.2f} of 4 images: kind $_1$")
    assert measures_lines(tmp_path / "none", data_of(6), [""]) == []


@pytest.mark.parametrize(("classes", "how", "drawn"), [
    (6, {}, {"confusion.png", "reliability.png"}),
    (60, {}, {"confusion.png", "reliability.png"}),
    (101, {}, {"reliability.png"}),  # no matrix of so many classes can be read
    (6, {"probabilities": False}, {"confusion.png"}),
])  # fmt: skip
def test_pictures_are_drawn_of_what_was_kept(classes, how, drawn, tmp_path):
    keep(tmp_path / "evaluation", classes, **how)
    said = []
    found = {
        name
        for name, draw in drawings_of_measures(tmp_path / "evaluation", data_of(classes), "title")
        if draw_to(tmp_path / name, draw, said.append)
    }
    assert (found, said) == (drawn, [])
