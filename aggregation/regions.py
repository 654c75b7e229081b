"""Decision regions: the class that a classifier gives to every point of a plane through the experts' features.

The plane is that of the two strongest principal components of the features of some images. A point of it stands for the
features there: what the plane does not show is at its mean. Features of several experts are laid end to end, so one
point stands for features of all of them, and the ensemble's rule has regions like any one expert.

Shapes: E experts, C classes of the model, K of them shown, N images, D features of all experts together, G points of a
side of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aggregation.aggregator import Outputs
from aggregation.serving import ServedModel

ENSEMBLE = "ensemble"
_ROWS = 4096  # points of the plane that are classified at once


@dataclass(frozen=True)
class Plane:
    """A plane in the space of features, float64.

    Attributes:
        mean_D: its origin.
        axes_2D: two directions of length 1, at right angles.
        variance: the share of the images' variance that lies in it, in [0, 1].
    """

    mean_D: NDArray[np.float64]
    axes_2D: NDArray[np.float64]
    variance: float

    def places(self, features_ND: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the places of features on the plane, [N, 2]."""
        return (features_ND - self.mean_D) @ self.axes_2D.T

    def features(self, places_N2: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the features that places of the plane stand for, [N, D]."""
        return self.mean_D + places_N2[:, :1] * self.axes_2D[0] + places_N2[:, 1:] * self.axes_2D[1]


@dataclass(frozen=True)
class Regions:
    """A classifier on a plane. Classes are numbered from 0 in the order they were asked for.

    Attributes:
        places_N2: of the images.
        predicted_N: class of every image by its true features.
        region_GG: class of every point of the grid, rows from the bottom up.
        area_K: share of the grid that each class has.
        recall_K: share of each class's images that are given their class; NaN where there is none.
        faithful: share of the images whose class is that of the region they lie in: how far the plane can be trusted.
    """

    places_N2: NDArray[np.float64]
    predicted_N: NDArray[np.int64]
    region_GG: NDArray[np.int64]
    area_K: NDArray[np.float64]
    recall_K: NDArray[np.float64]
    faithful: float


def fit_plane(features_ND: NDArray[np.floating]) -> Plane:
    """Return the plane of the two strongest principal components.

    The sign of an axis is chosen so that its largest entry is positive.

    Raises:
        ValueError: fewer than 2 images or features, some not finite, or all images have the same.
    """
    features_ND = np.asarray(features_ND, dtype=np.float64)
    if min(features_ND.shape) < 2:
        raise ValueError(
            f"a plane needs 2 images and 2 features or more, found {features_ND.shape[0]} and {features_ND.shape[1]}"
        )
    if not np.isfinite(features_ND).all():
        raise ValueError("a plane needs features that are finite, found NaN or infinity; the model has diverged")
    mean_D = features_ND.mean(axis=0)
    _, strength, axes = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(features_ND - mean_D), False))
    if strength[0] <= 1e-12 * np.abs(features_ND).max():
        raise ValueError("a plane needs images with different features; these are all the same")
    # A decomposition leaves the signs open; fixed, figures of one run can be compared.
    axes_2D = axes[:2]
    largest = np.abs(axes_2D).argmax(axis=1)
    axes_2D = axes_2D * np.sign(axes_2D[[0, 1], largest])[:, None]
    return Plane(mean_D, axes_2D, float((strength[:2] ** 2).sum() / (strength**2).sum()))


@torch.no_grad()
def features_of(model: ServedModel, images_B3HW: Tensor) -> list[Tensor]:
    """Return the features that the experts' heads get of some images: [B, D] for each expert."""
    h = model.ensemble.trunk(images_B3HW)
    return [expert.features(h) for expert in model.ensemble.members()]


@torch.no_grad()
def scores_of(model: ServedModel, member: str, features: Sequence[Tensor]) -> Tensor:
    """Return the scores [B, C] of the ensemble's rule or of one expert, from features.

    Args:
        model: on the device of the features.
        member: "ensemble", or the name of an expert.
        features: [B, D], of every expert for the ensemble, of the one otherwise.
    """
    ensemble = model.ensemble
    chosen = [
        expert for name, expert in zip(ensemble.names, ensemble.members(), strict=True) if member in (name, ENSEMBLE)
    ]
    scores = torch.stack([expert.head(own_BD) for expert, own_BD in zip(chosen, features, strict=True)])
    logits_EBC = ensemble.through_shared_head(scores)
    if member != ENSEMBLE:
        return logits_EBC[0]
    gates_EB = ensemble.gate_scores(features, logits_EBC) if ensemble.has_router else None
    numbers_EK = torch.stack([model.aggregator.describe(expert) for expert in chosen])
    model.aggregator.check(numbers_EK)
    return model.aggregator(Outputs(logits_EBC, numbers_EK, gates_EB))


def decision_regions(
    model: ServedModel,
    member: str,
    features: Sequence[Tensor],
    labels_N: NDArray[np.integer],
    classes: Sequence[int],
    plane: Plane,
    window: tuple[float, float, float, float],
    side: int = 200,
) -> Regions:
    """Classify images, and every point of a part of the plane, among some classes.

    Args:
        model: any.
        member: "ensemble", or the name of an expert.
        features: of the images, [N, D] for each expert that the member has (`scores_of`).
        labels_N: places of the images' classes in `classes`.
        classes: K ids, at least 2; scores of all others are left out.
        plane: through the features laid end to end.
        window: left, right, bottom, top of the part that is classified.
        side: G.
    """
    widths = [own_ND.shape[1] for own_ND in features]
    like = features[0]

    def classify(features_ND: NDArray[np.floating]) -> NDArray[np.int64]:
        found = []
        for first in range(0, len(features_ND), _ROWS):
            part = torch.from_numpy(np.ascontiguousarray(features_ND[first : first + _ROWS])).to(like)
            scores_BC = scores_of(model, member, part.split(widths, dim=1))
            found.append(scores_BC[:, list(classes)].argmax(dim=1).cpu().numpy())
        return np.concatenate(found)

    features_ND = laid_end_to_end(features)
    places_N2 = plane.places(features_ND)
    # By the true features, not by their places on the plane: `faithful` is where the two agree.
    predicted_N = classify(features_ND)
    left, right, bottom, top = window
    across, up = np.meshgrid(np.linspace(left, right, side), np.linspace(bottom, top, side))
    region_GG = classify(plane.features(np.stack([across.ravel(), up.ravel()], axis=1))).reshape(side, side)
    right_K = [predicted_N[labels_N == k] == k for k in range(len(classes))]
    return Regions(
        places_N2=places_N2,
        predicted_N=predicted_N,
        region_GG=region_GG,
        area_K=np.bincount(region_GG.ravel(), minlength=len(classes)) / side**2,
        recall_K=np.array([found.mean() if len(found) else np.nan for found in right_K]),
        faithful=float((classify(plane.features(places_N2)) == predicted_N).mean()),
    )


def laid_end_to_end(features: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the features of several experts as one row per image, [N, D]."""
    return torch.cat(list(features), dim=1).double().cpu().numpy()


def window_of(places: Sequence[NDArray[np.floating]], margin: float = 0.06) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of a rectangle that holds all places with room to spare."""
    all_N2 = np.concatenate(list(places))
    low, high = all_N2.min(axis=0), all_N2.max(axis=0)
    room = np.maximum(margin * (high - low), 1e-6)
    (left, bottom), (right, top) = low - room, high + room
    return float(left), float(right), float(bottom), float(top)
