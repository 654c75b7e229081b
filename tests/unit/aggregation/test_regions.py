from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from aggregation.aggregator import MeanLogits, Outputs, SumLogits
from aggregation.regions import (
    ENSEMBLE,
    decision_regions,
    features_of,
    fit_plane,
    laid_end_to_end,
    scores_of,
    window_of,
)
from experts.ensemble import Ensemble, Expert, build_ensemble
from experts.registry import build
from orchestration.config.compose import load_config


def linear(weight, bias=None):
    weight = torch.tensor(weight, dtype=torch.float32)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.weight.data = weight
    head.bias.data = torch.zeros(len(weight)) if bias is None else torch.tensor(bias, dtype=torch.float32)
    return head


def served(heads, rule=MeanLogits):
    """What a served model is to the regions: an ensemble whose experts' features are its input, and a rule."""
    experts = {f"e{k}": Expert(nn.Identity(), head, position=k) for k, head in enumerate(heads)}
    aggregator = rule(rule.Config(), torch.ones(2, dtype=torch.int64), tuple(experts))
    return SimpleNamespace(ensemble=Ensemble(nn.Identity(), experts), aggregator=aggregator)


def points(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_a_plane_that_holds_all_points_loses_nothing():
    axes = np.linalg.qr(points(5, 2))[0].T
    features_ND = 3.0 + points(40, 2, 1) * [5.0, 1.0] @ axes
    plane = fit_plane(features_ND)
    assert plane.variance == pytest.approx(1.0)
    np.testing.assert_allclose(plane.features(plane.places(features_ND)), features_ND, atol=1e-12)
    np.testing.assert_allclose(plane.axes_2D @ plane.axes_2D.T, np.eye(2), atol=1e-12)
    assert plane.places(features_ND).var(axis=0)[0] > 10 * plane.places(features_ND).var(axis=0)[1]


def test_the_share_of_variance_and_the_axes_by_hand():
    """Points +-3 along x, +-2 along y, +-1 along z: squares 18, 8, 2, of which the plane holds 26 of 28."""
    plane = fit_plane(np.array([[3, 0, 0], [-3, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 1], [0, 0, -1.0]]))
    assert plane.variance == pytest.approx(26 / 28)
    np.testing.assert_allclose(plane.axes_2D, [[1, 0, 0], [0, 1, 0]], atol=1e-12)


def test_the_order_of_the_images_does_not_turn_the_plane():
    features_ND = points(30, 6)
    np.testing.assert_allclose(fit_plane(features_ND).axes_2D, fit_plane(features_ND[::-1]).axes_2D, atol=1e-10)


@pytest.mark.parametrize(
    ("features_ND", "words"),
    [(np.full((3, 3), 0.1), "all the same"), (np.ones((1, 3)), "2 images"), (np.full((3, 3), np.nan), "are finite")],
)
def test_features_without_a_plane_are_refused(features_ND, words):
    with pytest.raises(ValueError, match=words):
        fit_plane(features_ND)


def test_regions_of_one_linear_classifier_by_hand():
    """Class 1 where x > 1: on a window from -2 to 4 half of it, and class 2, which always wins, is not looked at."""
    model = served([linear([[0, 0], [1, 0], [0, 0]], [0, -1, 99])])
    features = torch.tensor([[0.0, 1.0], [3.0, -1.0], [0.5, 0.0], [3.5, 0.5]])
    plane = fit_plane(np.array([[-3.0, 0], [3, 0], [0, 1], [0, -1]]))
    labels_N = np.array([0, 1, 1, 1])
    found = decision_regions(model, ENSEMBLE, [features], labels_N, [0, 1], plane, (-2, 4, -1, 1), side=61)
    assert found.predicted_N.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(found.recall_K, [1, 2 / 3])
    assert found.faithful == 1.0
    x = np.linspace(-2, 4, 61)
    clear = np.abs(x - 1) > 1e-6
    np.testing.assert_array_equal(found.region_GG[:, clear], np.tile(x[clear] > 1, (61, 1)))
    np.testing.assert_allclose(found.area_K, [0.5, 0.5], atol=1 / 61)
    swapped = decision_regions(model, ENSEMBLE, [features], 1 - labels_N, [1, 0], plane, (-2, 4, -1, 1), side=61)
    np.testing.assert_array_equal(swapped.predicted_N, 1 - found.predicted_N)


@pytest.mark.parametrize("rule", [MeanLogits, SumLogits])
def test_the_ensemble_has_regions_of_the_features_of_all_experts(rule):
    """Every grid point against the equation in float64: argmax of the sum of W_e h_e, h the point's features."""
    widths, classes = (4, 3), [0, 2, 3]
    weights = [points(4, width, width) for width in widths]
    features = [torch.from_numpy(points(25, width, 10 + width)).float() for width in widths]
    model = served([linear(weight) for weight in weights], rule)
    plane = fit_plane(laid_end_to_end(features))
    window = window_of([plane.places(laid_end_to_end(features))])
    found = decision_regions(model, ENSEMBLE, features, np.zeros(25, np.int64), classes, plane, window, side=21)
    left, right, bottom, top = window
    for row, y in enumerate(np.linspace(bottom, top, 21)):
        for column, x in enumerate(np.linspace(left, right, 21)):
            h_D = plane.mean_D + x * plane.axes_2D[0] + y * plane.axes_2D[1]
            z_C = weights[0] @ h_D[:4] + weights[1] @ h_D[4:]
            best = np.sort(z_C[classes])
            if best[-1] - best[-2] > 1e-5:
                assert found.region_GG[row, column] == z_C[classes].argmax()
    z_NC = features[0].double().numpy() @ weights[0].T + features[1].double().numpy() @ weights[1].T
    np.testing.assert_array_equal(found.predicted_N, z_NC[:, classes].argmax(axis=1))
    assert found.area_K.sum() == pytest.approx(1.0)
    assert np.isnan(found.recall_K[1:]).all()


def test_what_the_plane_cannot_show_makes_it_less_faithful():
    """The classifier looks at z alone, along which the images differ least."""
    model = served([linear([[0, 0, -1], [0, 0, 1]])])
    features = torch.from_numpy(points(200, 3) * [9, 5, 1]).float()
    plane = fit_plane(features.double().numpy())
    labels_N = (features[:, 2] > 0).long().numpy()
    found = decision_regions(model, "e0", [features], labels_N, [0, 1], plane, (-1, 1, -1, 1), side=5)
    assert found.recall_K.tolist() == [1, 1]
    assert 0.3 < found.faithful < 0.75


@pytest.mark.parametrize("method", ["ride", "reslt", "bbn", "ride_router", "ce"])
def test_scores_from_features_are_those_from_images(method):
    """Of every member: shared heads, halves of a head and routers included."""
    config = load_config([f"method={method}", "dataset=digits_lt"])
    recipe = config.method
    ensemble = build_ensemble(config.ensemble(recipe.final, 10), seed=0).eval()
    rule = build("aggregator", recipe.aggregator_in(recipe.final), torch.arange(10, 0, -1), recipe.expert_names)
    model = SimpleNamespace(ensemble=ensemble, aggregator=rule)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    features = features_of(model, images)
    with torch.no_grad():
        logits_EBC, gates_EB = ensemble.outputs(images)
    torch.testing.assert_close(scores_of(model, ENSEMBLE, features), rule(Outputs(logits_EBC, None, gates_EB)))
    for name, own_BD, logits_BC in zip(recipe.expert_names, features, logits_EBC, strict=True):
        torch.testing.assert_close(scores_of(model, name, [own_BD]), logits_BC)


def test_a_window_holds_all_places_with_room():
    left, right, bottom, top = window_of([np.array([[0.0, 0.0]]), np.array([[10.0, 0.0]])])
    assert (left, right) == pytest.approx((-0.6, 10.6))
    assert bottom < 0 < top
