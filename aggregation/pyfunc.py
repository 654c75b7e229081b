"""An ensemble behind MLflow's `predict`: pictures in any form, answers in words.

    mlflow.pyfunc.load_model("models:/NAME/1").predict([open("a.jpg", "rb").read()], params={"top": 5})

Each picture is decoded and brought to the evaluation's frame on its own, so a large one is not held for long.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

from aggregation.answers import in_words
from aggregation.pictures import pictures
from aggregation.serving import ServedModel, load_model

TOP = 3
"""Classes named for each picture, unless `params` say otherwise."""
_BATCH = 64  # pictures computed at once


class PictureModel:
    """A loaded ensemble that takes what people have.

    Attributes:
        model: the ensemble.
    """

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return an answer per picture; see `in_words`.

        Args:
            model_input: one or several pictures, in any form that `pictures` takes.
            params: `top`, the number of classes to name.

        Raises:
            ValueError: something is no picture, `top` is below 1, or the ensemble has no answer.
        """
        top = (params or {}).get("top", TOP)
        if isinstance(top, bool) or not isinstance(top, Integral) or top < 1:
            raise ValueError(f"params: top = {top!r}; needed a whole number, at least 1")
        model, found = self.model, []
        frames = (model.frame(image) for image in pictures(model_input, model.description.image_shape[2]))
        while batch := list(itertools.islice(frames, _BATCH)):
            answers = model.ask(torch.stack(batch))
            found += in_words(answers, model.class_names, model.description.expert_names, int(top))
        return found


def _load_pyfunc(path: str) -> PictureModel:
    """Load an exported folder for MLflow, which needs an object with `predict`."""
    return PictureModel(load_model(path))
