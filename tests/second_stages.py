"""Second stages for a small run of RIDE with linear heads, as words of a command: those that learn, those that fit."""

from __future__ import annotations

from collections.abc import Sequence

_LEARNING = (
    "batch_size: 50, optimizer: {lr: 0.05, momentum: 0.9, weight_decay: 5e-4}, lr_schedule: {name: cosine}, "
    "sampler: {name: class_balanced}"
)
_CLASSIFIER = "freeze: [trunk, features], objective: {name: cross_entropy}"
_CALIBRATION = "freeze: [trunk, features, heads], frozen_batchnorm: train"
WITH_STEPS = {
    "crt": f"{_LEARNING}, {_CLASSIFIER}, head: {{name: linear}}, reinit: [heads], frozen_batchnorm: train",
    "cosine_crt": f"{_LEARNING}, {_CLASSIFIER}, head: {{name: cosine, scale: 16}}, reinit: [heads]",
    "lws": f"{_LEARNING}, {_CALIBRATION}, objective: {{name: cross_entropy}}, calibration: {{name: scales}}",
    "disalign": f"{_LEARNING}, {_CALIBRATION}, objective: {{name: grw}}, calibration: {{name: disalign}}",
    "dr": f"{_LEARNING}, {_CLASSIFIER}",
}
WITHOUT_STEPS = {
    "ncm": "head: {name: ncm}, reinit: [heads]",
    "tau": "head: {name: tau_normalised, gamma: null}",
}
HOST = ["method=ride", "method.stages.train.head.name=linear", "method.stages.train.objective.scale=1"]
"""RIDE, but with heads that tau-normalisation, too, can go on from."""


def second_stages(names: Sequence[str], epochs: int = 1, start_from: str = "stage: train", more: str = "") -> list[str]:
    """Return the words that add stages after `train`; they do not wait for each other.

    Args:
        names: of WITH_STEPS and WITHOUT_STEPS.
        epochs: of those with steps.
        start_from: the first weights of each.
        more: further keys of each.
    """
    words = []
    for name in names:
        parts = f"epochs: {epochs}, {WITH_STEPS[name]}" if name in WITH_STEPS else f"epochs: 0, {WITHOUT_STEPS[name]}"
        words.append(
            f"method.stages.{name}={{{parts}, after: [train], start_from: {{{start_from}}}{more and f', {more}'}}}"
        )
    return words
