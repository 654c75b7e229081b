"""Predictions of a split, kept: what every member says of each image, in the order of the split.

Whatever is asked of a finished run later (a confusion matrix, top-5, an interval) follows from them, without the
network.

Shapes: N images of a split, B images of one batch, M members, C classes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.per_image import MemberScores

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Predictions:
    """Predictions of members for the same images.

    Attributes:
        names: of the members, the ensemble first.
        labels_N: class ids, int64.
        predicted_MN: classes with the largest scores, the first of equals; int32, from scores in float64.
        rank_MN: how many classes are before the right one by their scores, 0 where it was predicted; int32.
        confidence_MN: probability of the predicted class by a softmax, float32.
        logits_MNC: scores in float16, cut to its largest number; None where they are too many to keep.
    """

    names: tuple[str, ...]
    labels_N: NDArray[np.int64]
    predicted_MN: NDArray[np.int32]
    rank_MN: NDArray[np.int32]
    confidence_MN: NDArray[np.float32]
    logits_MNC: NDArray[np.float16] | None

    @classmethod
    def of_batch(cls, member_logits: Mapping[str, Tensor], labels_B: Tensor, *, logits: bool = True) -> Predictions:
        """Take scores [B, C] by member, and the labels.

        Raises:
            ValueError: a score is not finite.
        """
        scores = MemberScores.stacked(member_logits)
        if not scores.finite_MB.all():
            raise ValueError("scores are not finite (NaN or infinite): the model has diverged")
        labels = labels_B.to(scores.logits_MBC.device).expand(len(scores.names), -1)[..., None]
        own_MB1 = scores.logits_MBC.gather(2, labels)
        classes_C = torch.arange(scores.logits_MBC.shape[2], device=own_MB1.device)
        before_MBC = (scores.logits_MBC > own_MB1) | ((scores.logits_MBC == own_MB1) & (classes_C < labels))
        confidence_MB = scores.log_p_MBC.gather(2, scores.prediction_MB[..., None])[..., 0].exp()
        kept = scores.logits_MBC.clamp(-_LARGEST, _LARGEST).half().cpu().numpy() if logits else None
        return cls(
            scores.names,
            labels_B.long().cpu().numpy(),
            scores.prediction_MB.int().cpu().numpy(),
            before_MBC.sum(dim=2).int().cpu().numpy(),
            confidence_MB.float().cpu().numpy(),
            kept,
        )

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """Put pieces of a split together, in their order.

        Raises:
            ValueError: there is none, or they are of different members.
        """
        if len({part.names for part in parts}) != 1:
            found = [", ".join(part.names) for part in parts]
            raise ValueError(f"predictions of {' and of '.join(found) or 'nobody'}; needed pieces of the same members")
        if len(parts) == 1:
            return parts[0]
        logits = [part.logits_MNC for part in parts]
        return cls(
            parts[0].names,
            np.concatenate([part.labels_N for part in parts]),
            np.concatenate([part.predicted_MN for part in parts], axis=1),
            np.concatenate([part.rank_MN for part in parts], axis=1),
            np.concatenate([part.confidence_MN for part in parts], axis=1),
            None if any(one is None for one in logits) else np.concatenate(logits, axis=1),  # type: ignore[arg-type]
        )

    def write(self, file: BinaryIO) -> None:
        """Write everything as an npz file, without a copy in memory; nothing in it is pickled."""
        named: dict[str, Any] = {
            "names": np.array(self.names), "labels": self.labels_N, "predicted": self.predicted_MN,
            "rank": self.rank_MN, "confidence": self.confidence_MN,
        }  # fmt: skip
        if self.logits_MNC is not None:
            named["logits"] = self.logits_MNC
        np.savez(file, **named)

    @classmethod
    def read(cls, path: Path, *, logits: bool = True) -> Predictions:
        """Read an npz file.

        Args:
            path: of the file.
            logits: whether to read the scores of all classes, too, which are most of it.

        Raises:
            ValueError: the file is damaged or of something else.
        """
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                found = {name: file[name] for name in file.files if logits or name != "logits"}
            return cls(
                tuple(map(str, found["names"])), found["labels"], found["predicted"], found["rank"],
                found["confidence"], found.get("logits"),
            )  # fmt: skip
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as problem:
            raise ValueError(f"{path}: found no predictions ({problem}); needed a file that a run has kept") from None


def images_per_class(path: Path, num_classes: int) -> NDArray[np.int64] | None:
    """Return how many images of each class a kept file is of, [C]; None where there is no such file, or it is damaged.

    Reads the labels alone, however large the file is.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return np.bincount(file["labels"], minlength=num_classes)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def wilson_interval(accuracy: NDArray[Any], images: NDArray[Any], z: float = 1.96) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the lower and the upper end of the interval of an accuracy that was counted on so many images, fractions.

    Args:
        accuracy: fractions; NaN stays NaN.
        images: at least 1 where the accuracy is a number.
        z: quantile of the normal distribution; 1.96 for 95 %.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    n = np.maximum(images, 1)
    centre = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return centre - half, centre + half


def measures(kept: Predictions, num_classes: int, *, probabilities: bool = True) -> dict[str, dict[str, Any]]:
    """Measure what the usual table leaves out, by member.

    Args:
        kept: of a split; at least one image.
        num_classes: C.
        probabilities: whether a softmax of the scores means anything; `reliability` is None otherwise.

    Returns:
        `top1`, `top5`: fractions of the images, `top5` None where C <= 5;
        `balanced`: mean over the classes with images of their accuracy;
        `macro_f1`: mean over the same classes of 2 TP / (2 TP + FP + FN); 0 where none of a class is predicted;
        `worst_class`: id and accuracy of the class with the lowest, the first of equals, and its `images`;
        `confused`: the 20 most frequent wrong pairs as `label`, `predicted`, `images`;
        `reliability`: for 15 bins of confidence their `images`, mean `confidence` and `accuracy`, None in empty ones.
    """
    size_C = np.bincount(kept.labels_N, minlength=num_classes)
    there = np.flatnonzero(size_C)
    found = {}
    for m, name in enumerate(kept.names):
        predicted_N, right_N = kept.predicted_MN[m], kept.rank_MN[m] == 0
        right_C = np.bincount(kept.labels_N[right_N], minlength=num_classes)[there]
        accuracy = right_C / size_C[there]
        said_C = np.bincount(predicted_N, minlength=num_classes)[there]
        worst = int(accuracy.argmin())
        found[name] = {
            "top1": float(right_N.mean()),
            "top5": float((kept.rank_MN[m] < 5).mean()) if num_classes > 5 else None,
            "balanced": float(accuracy.mean()),
            "macro_f1": float((2 * right_C / (size_C[there] + said_C)).mean()),
            "worst_class": {
                "class": int(there[worst]), "accuracy": float(accuracy[worst]), "images": int(size_C[there[worst]]),
            },
            "confused": _confused(kept.labels_N[~right_N], predicted_N[~right_N], num_classes),
            "reliability": _reliability(kept.confidence_MN[m], right_N) if probabilities else None,
        }  # fmt: skip
    return found


def confusion(kept: Predictions, member: str, num_classes: int) -> NDArray[np.int64]:
    """Return how many images of each class (rows) a member takes for each class (columns), [C, C]."""
    pairs_N = kept.labels_N * num_classes + kept.predicted_MN[kept.names.index(member)]
    return np.bincount(pairs_N, minlength=num_classes**2).reshape(num_classes, num_classes)


def _confused(labels: NDArray[Any], predicted: NDArray[Any], num_classes: int) -> list[dict[str, int]]:
    pairs, images = np.unique(labels * num_classes + predicted, return_counts=True)
    order = np.argsort(-images, kind="stable")[:20]
    return [
        {"label": int(pairs[i] // num_classes), "predicted": int(pairs[i] % num_classes), "images": int(images[i])}
        for i in order
    ]


def _reliability(confidence_N: NDArray[Any], right_N: NDArray[Any], bins: int = 15) -> list[dict[str, Any]]:
    """Return the images, mean confidence and accuracy of each bin (low, high]."""
    place_N = np.clip(np.ceil(confidence_N.astype(float) * bins).astype(int) - 1, 0, bins - 1)
    found: list[dict[str, Any]] = []
    for b in range(bins):
        here = place_N == b
        images = int(here.sum())
        means = (float(confidence_N[here].mean(dtype=float)), float(right_N[here].mean())) if images else (None, None)
        found.append({"images": images, "confidence": means[0], "accuracy": means[1]})
    return found
