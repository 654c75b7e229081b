"""Features of some images on a plane, for the eye, and one number that says how far it can be trusted.

Shapes: N images, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aggregation.regions import fit_plane

Rule = Literal["pca", "tsne"]
_PERPLEXITY = 30.0  # about how many neighbours t-SNE keeps; published 5 to 50


@dataclass(frozen=True)
class Projection:
    """Images on a plane.

    Attributes:
        places_N2: where each image lies.
        variance: share of the features' variance that the plane holds, in [0, 1]; None for t-SNE, which is no plane.
    """

    places_N2: NDArray[np.float64]
    variance: float | None


def project(features_ND: NDArray[np.floating], rule: Rule) -> Projection:
    """Lay images on a plane by their features. The same features give the same places.

    Args:
        features_ND: of the images.
        rule: "pca": the two strongest principal components; "tsne": t-SNE of scikit-learn, begun from them, which
            keeps neighbours together and no distances.

    Raises:
        ValueError: as `fit_plane`; "tsne" without scikit-learn, or with fewer than 4 images.
    """
    plane = fit_plane(features_ND)
    if rule == "pca":
        return Projection(plane.places(features_ND), plane.variance)
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise ValueError(
            "projection tsne: scikit-learn is not installed; install it (pip install scikit-learn), or choose pca"
        ) from None
    if len(features_ND) < 4:
        raise ValueError(f"projection tsne: found {len(features_ND)} images, needed 4 or more; choose pca")
    perplexity = min(_PERPLEXITY, (len(features_ND) - 1) / 3)
    rows = np.asarray(features_ND, dtype=np.float64)
    return Projection(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows).astype(float), None)


def own_centre(features_ND: NDArray[np.floating], labels_N: NDArray[np.integer]) -> float:
    """Return the share of images that lie nearest to the mean of their own class, by all features.

    A projection may show classes in one heap that are apart, and t-SNE the reverse.
    """
    classes = np.unique(labels_N)
    rows = np.asarray(features_ND, dtype=np.float64)
    mean_KD = np.stack([rows[labels_N == c].mean(axis=0) for c in classes])
    # The images' own squares are the same for every class.
    distance_NK = (mean_KD**2).sum(axis=1) - 2 * rows @ mean_KD.T
    return float((classes[distance_NK.argmin(axis=1)] == labels_N).mean())
