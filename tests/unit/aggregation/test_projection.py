import sys

import numpy as np
import pytest

from aggregation.projection import own_centre, project
from aggregation.regions import fit_plane


def heaps(seed=0):
    """Three heaps of 12 images in 5 dimensions, far apart."""
    rng = np.random.default_rng(seed)
    labels_N = np.repeat([0, 4, 7], 12)
    return 20 * np.eye(8)[labels_N][:, [0, 4, 7, 1, 2]] + rng.normal(size=(36, 5)), labels_N


def test_principal_components_are_those_of_the_plane():
    features_ND, _ = heaps()
    plane, found = fit_plane(features_ND), project(features_ND, "pca")
    np.testing.assert_array_equal(found.places_N2, plane.places(features_ND))
    assert found.variance == plane.variance > 0.9


@pytest.mark.slow
def test_tsne_keeps_heaps_apart_and_comes_out_the_same_again():
    features_ND, labels_N = heaps()
    found = project(features_ND, "tsne")
    assert found.variance is None and own_centre(found.places_N2, labels_N) == 1.0
    np.testing.assert_array_equal(found.places_N2, project(features_ND, "tsne").places_N2)


def test_tsne_says_what_it_needs(monkeypatch):
    with pytest.raises(ValueError, match="found 3 images, needed 4"):
        project(heaps()[0][::12], "tsne")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ValueError, match="scikit-learn is not installed; install it"):
        project(heaps()[0], "tsne")


def test_images_near_the_mean_of_their_class_by_hand():
    """Means 1 and 4: of the first class both lie nearer to 1; of the second 3 and 7 to 4, and 2 to 1."""
    assert own_centre(np.array([[0.0], [2], [2], [3], [7]]), np.array([0, 0, 1, 1, 1])) == 4 / 5
