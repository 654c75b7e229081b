"""Answers of an ensemble for pictures, as numbers and in words.

Shapes: B pictures, E experts, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experts.data.names import readable


@dataclass(frozen=True)
class Answers:
    """Answers of an ensemble for images.

    Attributes:
        probabilities_BC: of the ensemble, float32.
        experts_EBC: of each expert alone, float32.
    """

    probabilities_BC: NDArray[np.float32]
    experts_EBC: NDArray[np.float32]


def in_words(
    answers: Answers, class_names: Sequence[str], expert_names: Sequence[str], top: int
) -> list[dict[str, Any]]:
    """Return an answer per picture, of plain Python values that JSON takes.

    Args:
        answers: of the ensemble.
        class_names: C names.
        expert_names: E names.
        top: classes to name, at least 1; all of them where there are not so many.

    Returns:
        `class` and `probability`: the likeliest class, the first of equals;
        `top`: the likeliest classes, each with `class` and `probability`;
        `experts`: by name, the `class` and `probability` that each alone would answer with;
        `disagreement`: share of the pairs of experts that name different classes; 0 for one expert.
    """

    names = [readable(name) for name in class_names]  # JSON and files take no bytes that are no text

    def said(p_C: NDArray[np.float32], c: int) -> dict[str, Any]:
        return {"class": names[c], "probability": float(p_C[c])}

    found = []
    for p_C, p_EC in zip(answers.probabilities_BC, answers.experts_EBC.swapaxes(0, 1), strict=True):
        likely = [said(p_C, c) for c in np.argsort(-p_C, kind="stable")[:top]]
        own_E = p_EC.argmax(axis=1)
        pairs = [one != other for one, other in itertools.combinations(own_E, 2)]
        experts = {name: said(p_EC[e], c) for e, (name, c) in enumerate(zip(expert_names, own_E, strict=True))}
        disagreement = float(np.mean(pairs)) if pairs else 0.0
        found.append({**likely[0], "top": likely, "experts": experts, "disagreement": disagreement})
    return found
