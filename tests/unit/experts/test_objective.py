"""Bad settings and numbers of the objectives; contract/ and parity/ have the rest."""

from __future__ import annotations

import pytest
import torch

from experts.losses.cross_entropy import CrossEntropy
from experts.losses.effective_number import effective_number_weights
from experts.losses.ldam import ldam_margins
from experts.methods.ldam import LDAM
from experts.methods.ride import RIDE, class_temperatures
from experts.objective import StepContext
from experts.progress import Progress

COUNTS = torch.tensor([50, 5, 1])


@pytest.mark.parametrize("cls", [LDAM, RIDE])
@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 0},
        {"max_margin": -0.1},
        {"reweight_epoch": -1},
        {"reweight_epoch": 1.5},
        {"reweight_beta": 1.0},
        {"reweight_beta": -0.1},
        {"reweight_epochs": 160},
        {"scale": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_key(cls, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        cls.Config(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"diversity_factor": float("inf")}, {"base_temperature": 0}, {"temp_norm": "minus"}, {"base_on": "mean"}],
    ids=str,
)
def test_rides_own_settings_are_refused_by_key(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        RIDE.Config(**settings)


@pytest.mark.parametrize("cls", [LDAM, RIDE])
def test_classes_without_images_are_refused_by_number(cls):
    with pytest.raises(ValueError, match=r"2 of 4 classes have no training image \(class 1, 3\)"):
        cls(cls.Config(), torch.tensor([5, 0, 2, 0]), 1)


def test_many_classes_without_images_are_not_all_listed():
    counts = torch.zeros(100, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"100 of 100 .*\(class 0, 1, 2, 3, 4 \.\.\.\)"):
        ldam_margins(counts, max_margin=0.5)


def test_beta_of_one_is_refused():
    with pytest.raises(ValueError, match="beta < 1"):
        effective_number_weights(COUNTS, beta=1.0)


def test_class_balanced_weights_keep_their_digits_for_beta_close_to_one():
    """(1 - beta^n) / (1 - beta) -> n, so the weights become inverse frequency; 1 - beta^n itself would be noise."""
    weights = effective_number_weights(COUNTS, beta=1 - 1e-12)
    inverse = 1 / COUNTS.double()
    torch.testing.assert_close(weights, 3 * inverse / inverse.sum(), atol=0, rtol=1e-9)


def test_temperatures_that_would_not_be_positive_are_refused_with_the_key():
    """u = 0.9 C p + 0.1: [2.69, 0.13, 0.127] at frequencies [998, 1, 1] / 1000; less 1.69 is negative."""
    counts = torch.tensor([998, 1, 1])
    with pytest.raises(ValueError, match="temp_norm = 'subtract'"):
        class_temperatures(counts, factor=0.9, norm="subtract")
    assert (class_temperatures(counts, factor=0.9) > 0).all()


@pytest.mark.parametrize(("epoch", "late"), [(1, False), (2, False), (3, True), (4, True)])
def test_the_switch_comes_after_its_epoch_for_weights_and_temperatures_alike(epoch, late):
    """After epoch 2 of 4. Before it the denominator of the weighted mean is the number of images."""
    objective = RIDE(RIDE.Config(reweight_epoch=2), COUNTS, 2)
    progress, labels = Progress(epoch, 4), torch.tensor([0, 1])
    images, class_weight = objective.denominators(labels, progress).values()
    assert images == 2
    assert (class_weight != 2) == late
    logits = torch.tensor([[[3.0, 1, 0], [0, 1, 2]], [[1.0, 0, 0], [0, 2, 0]]])
    now = StepContext({"images": images, "class_weight": class_weight}, progress)
    by_switch = {
        on: RIDE(RIDE.Config(reweight_epoch=0 if on else None), COUNTS, 2)(logits, labels, now)[1]
        for on in (True, False)
    }
    terms = objective(logits, labels, now)[1]
    for name, value in terms.items():
        assert torch.equal(value, by_switch[late][name]), name


def test_losses_of_half_logits_are_computed_in_float32_under_autocast():
    objective = RIDE(RIDE.Config(diversity_reference="pairwise"), COUNTS, 2)
    progress, labels = Progress(1, 1), torch.tensor([0, 1])
    logits = torch.tensor([[[3.0, 1, 0], [0, 1, 2]], [[1.0, 0, 0], [0, 2, 0]]]).bfloat16()
    denominators = objective.denominators(labels, progress)
    plain = objective(logits.float(), labels, StepContext(denominators, progress))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(objective(logits, labels, StepContext(denominators, progress))[0], plain)


def test_large_scores_do_not_overflow():
    """Scores of 1e4: exp would overflow; cross-entropy is the gap to the largest."""
    logits = torch.tensor([[[0.0, 1e4, -1e4]]])
    objective, progress = CrossEntropy(CrossEntropy.Config(), COUNTS, 1), Progress(1, 1)
    labels = torch.tensor([2])
    assert objective(logits, labels, StepContext(objective.denominators(labels, progress), progress))[0] == 2e4
    ride = RIDE(RIDE.Config(), COUNTS, 1)
    assert torch.isfinite(ride(logits, labels, StepContext(ride.denominators(labels, progress), progress))[0])
