"""Kept predictions take no more memory than the estimate says: one split at a time, written without a copy."""

from __future__ import annotations

import tracemalloc
import weakref

import numpy as np

from aggregation.predictions import Predictions
from orchestration.storage.files import read_json
from orchestration.storage.predictions import file_of, write_predictions


def of(images, classes, *, offset=0):
    draws = np.random.default_rng(offset)
    logits = draws.normal(size=(2, images, classes)).astype(np.float16)
    labels = draws.integers(0, classes, images)
    ranks = np.zeros((2, images), np.int32)
    return Predictions(("ensemble", "expert0"), labels, logits.argmax(2).astype(np.int32), ranks, ranks + 0.5, logits)


def test_a_split_is_written_and_dropped_before_the_next_is_asked_for(tmp_path):
    made = []

    def kept():
        for models, split in ((("last",), "test"), (("last",), "val"), (("best",), "test")):
            assert not any(ref() for ref in made)
            one = of(30, 4, offset=len(split))
            made.append(weakref.ref(one))
            yield models, split, one
            del one

    write_predictions([tmp_path / "a", tmp_path / "b"], kept(), 4, probabilities=True)
    for folder in ("a", "b"):
        assert {which: [*splits] for which, splits in read_json(tmp_path / folder / "measures.json").items()} == {
            "last": ["test", "val"],
            "best": ["test"],
        }
    again = Predictions.read(file_of(tmp_path / "a", "last", "val"))
    assert np.array_equal(again.labels_N, of(30, 4, offset=3).labels_N)


def test_writing_takes_no_copy_of_the_scores(tmp_path):
    images, classes = 3400, 2500
    ranks = np.zeros((2, images), np.int32)
    logits = np.zeros((2, images, classes), np.float16)
    large = Predictions(("ensemble", "expert0"), ranks[0].astype(np.int64), ranks, ranks, ranks + 0.5, logits)
    tracemalloc.start()
    try:
        write_predictions([tmp_path], [(("last",), "test", large)], classes, probabilities=False)
        assert tracemalloc.get_traced_memory()[1] < 20e6 < logits.nbytes  # NumPy writes pieces of 16 MiB
    finally:
        tracemalloc.stop()
