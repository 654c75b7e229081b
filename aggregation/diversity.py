"""How much the experts of an ensemble differ, and how their errors split into bias and variance.

All of it compares the experts' own logits, whatever rule combines them. Where experts give parts of one score (BBN's
halves, ResLT's branches) a part is no prediction, and these numbers say how the parts differ, not how good they are.

Shapes: N images of a split, B images of one update, E experts, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.metrics import SplitMeans, all_groups
from aggregation.per_image import LABELS, MemberScores, PerImage
from experts.data.transfer import to_device

_MAIN = "main"


class Diversity(PerImage):
    """Predictions of every expert, image by image, to be merged and summarised.

    Stored per image: its label, the experts' main prediction, and every expert's prediction and divergence from the
    mean: 12 bytes, and 12 per expert. Pieces of a split can be added separately and merged in any order: the summary is
    the same to the last bit.

    The arrays of a state: `labels`, `main` and `<expert>/<prediction|divergence>`.
    """

    stored: ClassVar[Mapping[str, Any]] = {LABELS: np.int64, _MAIN: np.int32, "prediction": np.int32}

    def update(self, expert_logits: Mapping[str, Tensor], labels_B: Tensor) -> None:
        """Add one batch, which may be empty. No value is read: labels that are no class, and logits that are not
        finite, are refused by `state`, `merge` and `result`.

        Args:
            expert_logits: logits [B, C] by expert, the same experts in every call. Equal largest scores count as the
                first of them.
            labels_B: class ids.

        Raises:
            ValueError: shapes or experts do not fit.
        """
        if not expert_logits:
            raise ValueError("diversity needs the logits of 1 expert or more, got none")
        shapes = {tuple(logits_BC.shape) for logits_BC in expert_logits.values()}
        if len(shapes) > 1 or (shape := next(iter(shapes)))[:1] != labels_B.shape or len(shape) != 2:
            raise ValueError(f"logits {', '.join(map(str, sorted(shapes)))} do not fit {len(labels_B)} labels")
        self.add(MemberScores.stacked(expert_logits), labels_B)

    def add(self, scores: MemberScores, labels_B: Tensor) -> None:
        """Add one batch as `update` does."""
        # In float64, so that a divergence of nearly equal experts is more than rounding.
        mean_BC = scores.logits_MBC.mean(dim=0)
        main_B = main_predictions(scores.prediction_MB, mean_BC)
        divergence_EB = _divergence(mean_BC.log_softmax(dim=1), scores.log_p_MBC)
        labels_B = to_device(labels_B.detach(), mean_BC.device)
        # No class is -1: that marks logits that are not finite.
        prediction_EB = scores.prediction_MB.where(scores.finite_MB, -1)
        integers = torch.cat([labels_B[None], main_B[None], prediction_EB])
        names = [f"{name}/{key}" for key in ("prediction", "divergence") for name in scores.names]
        self._append((LABELS, _MAIN, *names), torch.cat([integers.double(), divergence_EB]), mean_BC.shape[1])

    @property
    def _experts(self) -> list[str]:
        return _experts(self._names)

    def _misfit(self, names: tuple[str, ...]) -> str:
        return f"diversity of {', '.join(self._experts)} cannot take in predictions of {', '.join(_experts(names))}"

    def _check(self, piece: Mapping[str, NDArray[Any]], num_classes: int) -> None:
        labels_N = piece[LABELS]
        if len(labels_N) and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
            raise ValueError(
                f"labels lie in {labels_N.min()} to {labels_N.max()}; the experts have {num_classes} classes"
            )
        bad = [name for name in self._experts if (piece[f"{name}/prediction"] < 0).any()]
        if bad:
            raise ValueError(
                f"{', '.join(bad)}: logits are not finite (NaN or infinite); the model has diverged or its weights are "
                f"damaged: evaluate an earlier checkpoint"
            )

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
        arrays = self.state()
        labels_N, main_N = arrays[LABELS], arrays[_MAIN]
        if labels_N.max() >= len(counts_C):
            raise ValueError(f"diversity: an image has label {labels_N.max()}; there are {len(counts_C)} classes")
        groups = all_groups(counts_C, cuts)
        means = SplitMeans(labels_N, groups, len(counts_C)).of_groups
        names = self._experts
        said = {name: arrays[f"{name}/prediction"] for name in names}
        said_EN = np.stack(list(said.values()))
        pairs = {(a, b): means(said[a] != said[b]) for a, b in itertools.combinations(names, 2)}
        no_pairs: dict[str, float | None] = dict.fromkeys(["all", *groups])
        divergence = {name: means(arrays[f"{name}/divergence"]) for name in names}
        return {
            "num_experts": len(names),
            "experts": names,
            "disagreement": _mean(list(pairs.values())) if pairs else no_pairs,
            "agreement": means((said_EN == said_EN[0]).all(axis=0)) if pairs else no_pairs,
            "pairs": [{"experts": list(pair), "disagreement": by_group} for pair, by_group in pairs.items()],
            "divergence": divergence,
            "mean_divergence": _mean(list(divergence.values())),
            "error": means((said_EN != labels_N).mean(axis=0)),
            "bias": means(main_N != labels_N),
            "variance": means((said_EN != main_N).mean(axis=0)),
        }


def main_predictions(prediction_EB: Tensor, mean_logits_BC: Tensor) -> Tensor:
    """Return the class that most experts predict, int64 [B]; equal votes go to the class of the largest mean logit.

    Neither the order of experts nor, but for equal mean logits, the order of classes matters.
    """
    votes_EB = (prediction_EB[:, None] == prediction_EB).sum(dim=0)
    # Among the classes with the most votes alone, the mean logits decide, and of equal ones the first class.
    mean_EB = mean_logits_BC.gather(1, prediction_EB.T).T.where(votes_EB == votes_EB.amax(dim=0), float("-inf"))
    return prediction_EB.where(mean_EB == mean_EB.amax(dim=0), mean_logits_BC.shape[1]).amin(dim=0)


def divergence_from_mean(logits_EBC: Tensor) -> Tensor:
    """Return KL(softmax(mean logits) || softmax(logits of k)) of every expert k and image, nats, [E, B], at least 0."""
    return _divergence(logits_EBC.mean(dim=0).log_softmax(dim=1), logits_EBC.log_softmax(dim=2))


def _divergence(log_q_BC: Tensor, log_p_EBC: Tensor) -> Tensor:
    # Rounding can leave the divergence of equal distributions just below 0.
    return (log_q_BC - log_p_EBC).mul_(log_q_BC.exp()).sum(dim=2).clamp(min=0)


def _experts(names: Sequence[str]) -> list[str]:
    return [name.rsplit("/", 1)[0] for name in names if name.endswith("/prediction")]


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
