"""Kept predictions are what a run's evaluations say, wherever the experts lived."""

from __future__ import annotations

import numpy as np
import pytest

from aggregation.predictions import Predictions
from orchestration.storage.files import read_json
from tests import runs
from tests.recipes import digits

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_predictions_of_two_replicas_are_the_evaluations_image_by_image(warm, tmp_path):
    words = [
        "method=ride",
        "dataset=digits_lt",
        "engine.name=torch",
        "cluster.workers=2",
        "cluster.experts_per_worker=3",
    ]
    words += ["dataset.image_size=8", "dataset.val_per_class=4", "method.stages.train.optimizer.lr=0.5"]
    assert runs.train(tmp_path / "run", *words) == 0
    steps = {which: read_json(tmp_path / f"run/evaluation/{which}.json")["step"] for which in ("last", "best")}
    assert steps["best"] < steps["last"]
    folder, test = tmp_path / "run" / "evaluation", digits(4).test
    for which in ("last", "best"):
        kept = Predictions.read(folder / f"predictions-{which}-test.npz")
        assert np.array_equal(kept.labels_N, test.labels)
        said = read_json(folder / f"{which}.json")["members"]
        assert list(kept.names) == list(said)
        for m, member in enumerate(kept.names):
            assert (kept.rank_MN[m] == 0).mean() == pytest.approx(said[member]["top1"]["all"], abs=1e-12)
            measured = read_json(folder / "measures.json")[which]["test"][member]
            assert measured["top1"] == pytest.approx(said[member]["top1"]["all"], abs=1e-12)
        assert (kept.logits_MNC.argmax(axis=2) == kept.predicted_MN).mean() > 0.99
    assert (folder / "predictions-last-val.npz").is_file()
