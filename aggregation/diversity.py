"""How much the experts of an ensemble differ, and how their errors split into bias and variance.

All of it compares the experts' own logits, whatever rule combines them. Where experts give parts of one score (BBN's
halves, ResLT's branches) a part is no prediction, and these numbers say how the parts differ, not how good they are.

Shapes: N images of a split, B images of one update, E experts, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.metrics import all_groups, group_means

STORED = {"prediction": np.int32, "divergence": np.float64}
_MAIN = "main"


class Diversity:
    """Predictions of every expert, image by image, to be merged and summarised.

    Stored per image: its label, the experts' main prediction, and every expert's prediction and divergence from the
    mean: 12 bytes, and 12 per expert. Pieces of a split can be added separately and merged in any order: the summary is
    the same to the last bit.
    """

    def __init__(self) -> None:
        self._labels: list[NDArray[np.int64]] = []
        self._main: list[NDArray[np.int32]] = []
        self._experts: dict[str, dict[str, list[NDArray[Any]]]] = {}

    @property
    def num_images(self) -> int:
        """N so far."""
        return sum(map(len, self._labels))

    def update(self, expert_logits: Mapping[str, Tensor], labels_B: Tensor) -> None:
        """Add one batch, which may be empty.

        Args:
            expert_logits: logits [B, C] by expert, the same experts in every call. Equal largest scores count as the
                first of them.
            labels_B: class ids.

        Raises:
            ValueError: shapes or experts do not fit, a label is not in [0, C), or a logit is not finite.
        """
        labels = labels_B.detach().cpu().numpy().astype(np.int64)
        if not expert_logits:
            raise ValueError("diversity needs the logits of 1 expert or more, got none")
        shapes = {tuple(logits_BC.shape) for logits_BC in expert_logits.values()}
        if len(shapes) > 1 or (shape := next(iter(shapes)))[:1] != labels.shape or len(shape) != 2:
            raise ValueError(f"logits {', '.join(map(str, sorted(shapes)))} do not fit {len(labels)} labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < shape[1]:
            raise ValueError(f"labels lie in {labels.min()} to {labels.max()}; the experts have {shape[1]} classes")
        # float64, so that a divergence of nearly equal experts is more than rounding.
        logits_EBC = torch.stack([logits_BC.detach().double() for logits_BC in expert_logits.values()])
        bad = [name for name, z_BC in zip(expert_logits, logits_EBC, strict=True) if not torch.isfinite(z_BC).all()]
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: logits are not finite (NaN or infinite); the model has diverged or its weights are "
                f"damaged: evaluate an earlier checkpoint"
            )
        prediction_EB = logits_EBC.argmax(dim=2)
        values = {
            "prediction": prediction_EB.cpu().numpy(),
            "divergence": divergence_from_mean(logits_EBC).cpu().numpy(),
        }
        batch = {
            name: {key: values[key][k].astype(dtype) for key, dtype in STORED.items()}
            for k, name in enumerate(expert_logits)
        }
        main_B = main_predictions(prediction_EB, logits_EBC.mean(dim=0))
        self._append(labels, main_B.cpu().numpy().astype(np.int32), batch)

    def merge(self, other: Diversity) -> None:
        """Add the images of another piece of the same split.

        Raises:
            ValueError: the other piece has other experts.
        """
        if other._experts:
            experts = {n: {k: np.concatenate(v) for k, v in kept.items()} for n, kept in other._experts.items()}
            self._append(np.concatenate(other._labels), np.concatenate(other._main), experts)

    def _append(
        self, labels: NDArray[np.int64], main: NDArray[np.int32], batch: dict[str, dict[str, NDArray[Any]]]
    ) -> None:
        if self._experts and set(batch) != set(self._experts):
            raise ValueError(
                f"diversity of {', '.join(self._experts)} cannot take in predictions of {', '.join(batch)}"
            )
        self._labels.append(labels)
        self._main.append(main)
        for name, values in batch.items():
            kept = self._experts.setdefault(name, {key: [] for key in STORED})
            for key in STORED:
                kept[key].append(values[key])

    def state(self) -> dict[str, NDArray[Any]]:
        """Return everything as arrays, to send to another process.

        They are `labels`, `main`, and `<expert>/<prediction|divergence>` for every expert.
        """
        arrays: dict[str, NDArray[Any]] = {
            "labels": np.concatenate([np.empty(0, np.int64), *self._labels]),
            _MAIN: np.concatenate([np.empty(0, np.int32), *self._main]),
        }
        for name, kept in self._experts.items():
            for key, parts in kept.items():
                arrays[f"{name}/{key}"] = np.concatenate(parts)
        return arrays

    @classmethod
    def from_state(cls, arrays: Mapping[str, NDArray[Any]]) -> Diversity:
        """Rebuild the object that `state` was taken from."""
        diversity = cls()
        experts: dict[str, dict[str, NDArray[Any]]] = {}
        for name, values in arrays.items():
            if "/" in name:
                expert, key = name.rsplit("/", 1)
                experts.setdefault(expert, {})[key] = values
        if experts:
            diversity._append(arrays["labels"], arrays[_MAIN], experts)
        return diversity

    def result(self, counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int] | None) -> dict[str, Any]:
        """Return a summary as plain numbers, fit for JSON; the key `diversity` of an evaluation.

        Args:
            counts_C: TRAINING images per class, which make the groups.
            cuts: of the groups by index, see `aggregation.metrics.groups_by_index`; None: those groups are None.

        Returns:
            `num_experts`: E; `experts`: their names. The rest by group, in the way of `Scores.result`: `all` of the
            images, `many`, `medium`, `few` and the same `_by_index` unweighted means over classes, None where the split
            has no image of the group.
            `disagreement`: share of images on which two experts predict different classes, mean over the pairs; None in
            every group for a single expert, which has no pair.
            `agreement`: share of images on which all experts predict the same class; None for a single expert too.
            `pairs`: a list of `experts` (two names) and their `disagreement`.
            `divergence`: by expert, mean of KL(softmax(mean logits) || softmax(its logits)), nats: the direction of
            RIDE's diversity term, at temperature 1. `mean_divergence`: mean over the experts.
            `error`: mean over the experts of the share of wrong predictions.
            `bias`: share of images whose main prediction, the class that most experts predict, is wrong.
            `variance`: mean over the experts of the share of images on which they leave the main prediction.

        Variance costs only where there is no bias: of images whose main prediction is right, the error is the variance;
        of the others it is the share of experts that are wrong, 1 less those that depart to the right class.

        Raises:
            ValueError: no image was added, or a label is not in [0, C).

        Source: Domingos 2000, "A unified bias-variance decomposition and its applications", for the 0-1 loss.
        Differs: there, as in RIDE (arXiv:2010.01809), predictions come from models trained on resampled training sets;
        here the experts of one ensemble take their place, so variance is their spread, not that of training again.
        """
        if not self.num_images:
            raise ValueError("diversity: no image was taken in; the split to evaluate is empty")
        labels, main = np.concatenate(self._labels), np.concatenate(self._main)
        if labels.max() >= len(counts_C):
            raise ValueError(f"diversity: an image has label {labels.max()}; there are {len(counts_C)} classes")
        groups = all_groups(counts_C, cuts)
        kept = {name: {k: np.concatenate(v) for k, v in parts.items()} for name, parts in self._experts.items()}
        prediction_EN = np.stack([values["prediction"] for values in kept.values()])

        def means(values_N: NDArray[Any]) -> dict[str, float | None]:
            return group_means(values_N, labels, groups, len(counts_C))

        pairs = {
            (a, b): means(kept[a]["prediction"] != kept[b]["prediction"]) for a, b in itertools.combinations(kept, 2)
        }
        no_pairs: dict[str, float | None] = dict.fromkeys(["all", *groups])
        divergence = {name: means(values["divergence"]) for name, values in kept.items()}
        return {
            "num_experts": len(kept),
            "experts": list(kept),
            "disagreement": _mean(list(pairs.values())) if pairs else no_pairs,
            "agreement": means((prediction_EN == prediction_EN[0]).all(axis=0)) if pairs else no_pairs,
            "pairs": [{"experts": list(pair), "disagreement": by_group} for pair, by_group in pairs.items()],
            "divergence": divergence,
            "mean_divergence": _mean(list(divergence.values())),
            "error": means((prediction_EN != labels).mean(axis=0)),
            "bias": means(main != labels),
            "variance": means((prediction_EN != main).mean(axis=0)),
        }


def main_predictions(prediction_EB: Tensor, mean_logits_BC: Tensor) -> Tensor:
    """Return the class that most experts predict, int64 [B]; equal votes go to the class of the largest mean logit.

    Neither the order of experts nor, but for equal mean logits, the order of classes matters.
    """
    votes_BC = torch.zeros_like(mean_logits_BC)
    votes_BC.scatter_add_(1, prediction_EB.T, torch.ones_like(prediction_EB.T, dtype=votes_BC.dtype))
    # Among the classes with the most votes alone, the mean logits decide.
    most_BC = votes_BC == votes_BC.amax(dim=1, keepdim=True)
    return mean_logits_BC.masked_fill(~most_BC, float("-inf")).argmax(dim=1)


def divergence_from_mean(logits_EBC: Tensor) -> Tensor:
    """Return KL(softmax(mean logits) || softmax(logits of k)) of every expert k and image, nats, [E, B], at least 0."""
    log_p_EBC = logits_EBC.log_softmax(dim=2)
    log_q_BC = logits_EBC.mean(dim=0).log_softmax(dim=1)
    # Rounding can leave the divergence of equal distributions just below 0.
    return (log_q_BC.exp() * (log_q_BC - log_p_EBC)).sum(dim=2).clamp(min=0)


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Return a result as numbers for the journal, by name after the split: `ensemble/few/disagreement` and
    `expert0/few/divergence`; what is None is left out, and so are single pairs and groups by index."""
    found: dict[str, float] = {}
    for key in ("disagreement", "agreement", "mean_divergence", "error", "bias", "variance"):
        name = {"error": "expert_error"}.get(key, key)
        found |= {f"ensemble/{group}/{name}": value for group, value in result[key].items() if _shown(group, value)}
    for expert, by_group in result["divergence"].items():
        found |= {f"{expert}/{group}/divergence": v for group, v in by_group.items() if _shown(group, v)}
    return found


def _shown(group: str, value: float | None) -> bool:
    return value is not None and not group.endswith("_by_index")


def _mean(results: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of several results of the same images, group by group."""
    means: dict[str, float | None] = {}
    for group in results[0]:
        values = [value for one in results if (value := one[group]) is not None]
        means[group] = sum(values) / len(values) if values else None
    return means
