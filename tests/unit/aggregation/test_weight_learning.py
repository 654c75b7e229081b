"""Guards of the learnt weights, the oracle, the correction for a known prior."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from aggregation.weight_learning import (
    Learner,
    WeightLearning,
    choose_weights,
    class_prior,
    combine,
    correct_counts,
    correct_for_prior,
    oracle_weights,
    simplex_grid,
)


def one_stable_expert(images=256, classes=30, seed=0):
    """Views on which expert 1 says the same twice and the two others say anything."""
    generator = torch.Generator().manual_seed(seed)
    views = 3 * torch.randn(2, 3, images, classes, generator=generator)
    views[1, 1] = views[0, 1]
    return views


def learn(views, settings, passes=5):
    learner = Learner(len(views[0]), settings)
    for _ in range(passes):
        for rows in torch.arange(views.shape[2]).split(settings.batch_size):
            learner.step(views[:, :, rows])
        learner.end_pass()
        if learner.stopped:
            break
    return learner


def test_weight_goes_to_the_expert_that_agrees_with_itself():
    learner = learn(one_stable_expert(), WeightLearning(lr=0.3))
    weights = learner.weights_E
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert (weights > 0).all()
    assert weights[1] > 0.5
    assert weights[1] > 2 * max(weights[0], weights[2])


def test_learning_ends_after_the_pass_in_which_a_weight_rounds_below_the_limit():
    learner = learn(one_stable_expert(), WeightLearning(lr=3, batch_size=32), passes=50)
    least = [min(round(w, 2) for w in weights) for weights in learner.trajectory]
    assert learner.stopped
    assert len(least) < 50
    assert least[-1] < 0.05
    assert all(value >= 0.05 for value in least[:-1])
    assert not learn(one_stable_expert(), WeightLearning(lr=3, batch_size=32, stop_below=0), passes=5).stopped


def test_views_that_are_equal_move_nothing_but_the_weight_decay():
    views = torch.randn(1, 3, 20, 30).expand(2, -1, -1, -1)
    learner = learn(views, WeightLearning())
    torch.testing.assert_close(learner.weights_E, torch.full((3,), 1 / 3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_after_a_loss_that_is_not_finite_the_weights_stay_and_the_pass_ends_with_an_error():
    learner = Learner(3, WeightLearning())
    views = one_stable_expert()
    learner.step(views)
    before = learner.numbers_E
    spoilt = views.clone()
    spoilt[0, 2, 5, 1] = float("nan")
    learner.step(spoilt)
    learner.step(views)
    assert torch.equal(learner.numbers_E, before)
    with pytest.raises(FloatingPointError, match="step 2 is nan"):
        learner.end_pass()


def test_learnt_weights_are_kept_when_new_views_agree_more():
    learner = learn(one_stable_expert(), WeightLearning(lr=0.3))
    choice = choose_weights(learner, -0.5, -0.6, num_classes=30)
    assert choice.weights == choice.learnt == learner.weights_E.tolist()
    assert choice.fallback is None
    assert choice.warnings == []


@pytest.mark.parametrize("learnt", [-0.499999, float("nan")])
def test_a_worse_surrogate_on_new_views_gives_uniform_weights_and_says_so(learnt):
    learner = learn(one_stable_expert(), WeightLearning(lr=0.3))
    choice = choose_weights(learner, -0.5, learnt, num_classes=30)
    assert choice.weights == [1 / 3] * 3
    assert choice.learnt == learner.weights_E.tolist() != choice.weights
    assert "uniform weights are used" in choice.fallback
    assert f"surrogate {learnt:.6f}, with uniform weights -0.500000" in choice.fallback


@pytest.mark.parametrize(("classes", "warned"), [(19, True), (20, False)])
def test_few_classes_are_warned_of(classes, warned):
    choice = choose_weights(Learner(3, WeightLearning()), 0, 0, num_classes=classes)
    assert bool(choice.warnings) == warned
    assert not warned or "19 classes" in choice.warnings[0]


def test_one_expert_has_weight_one():
    learner = learn(one_stable_expert()[:, :1], WeightLearning())
    assert learner.weights_E.tolist() == [1.0]
    assert "1 expert" in choose_weights(learner, 0, 0, num_classes=30).warnings[0]
    assert oracle_weights(torch.randn(1, 9, 4), torch.arange(9) % 4) == [1.0]


@pytest.mark.parametrize("experts", range(1, 9))
def test_the_grid_lies_on_the_simplex_and_begins_with_uniform_weights(experts):
    grid = simplex_grid(experts)
    assert grid[0] == pytest.approx([1 / experts] * experts)
    assert (grid >= 0).all()
    np.testing.assert_allclose(grid.sum(axis=1), 1, atol=1e-12)
    assert len(grid) <= 241
    assert len(np.unique(grid[1:].round(9), axis=0)) == len(grid) - 1
    corners = {tuple(row) for row in grid.tolist() if max(row) == 1}
    assert len(corners) == experts
    distance = ((grid[1:] - 1 / experts) ** 2).sum(axis=1)
    assert (np.diff(distance) > -1e-9).all()


def test_three_experts_are_tried_at_every_fifth_percent():
    assert len(simplex_grid(3)) == 1 + 231  # multiples of 1/20: 21 * 22 / 2
    np.testing.assert_allclose(simplex_grid(3)[1:] * 20, (simplex_grid(3)[1:] * 20).round(), atol=1e-9)


def test_counting_equals_combining_one_by_one():
    """Also where all experts agree, and more candidates than fit at once."""
    generator = torch.Generator().manual_seed(0)
    shared = 2 * torch.randn(1, 300, 7, generator=generator)
    logits = shared + torch.randn(4, 300, 7, generator=generator)
    labels = torch.randint(7, (300,), generator=generator)
    grid = simplex_grid(4)
    alike = (logits.argmax(-1) == logits[0].argmax(-1)).all(0)
    assert 50 < alike.sum() < 250
    found = correct_counts(grid, logits, labels)
    for weights, count in zip(grid, found, strict=True):
        predicted = combine(torch.from_numpy(weights), logits).argmax(dim=1)
        assert count == (predicted == labels).sum()


def test_the_oracle_finds_the_weights_that_labels_were_made_with():
    """Labels are the prediction of one weighting. All images right needs weights as close as the images are dense."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 3000, 5, generator=generator)
    made = torch.tensor([0.13, 0.62, 0.25])
    labels = combine(made, logits).argmax(dim=1)
    found = oracle_weights(logits, labels)
    assert sum(found) == pytest.approx(1, abs=1e-12)
    assert min(found) >= 0
    right = correct_counts(np.array([found]), logits, labels)[0]
    assert right >= 0.99 * 3000
    assert right >= correct_counts(simplex_grid(3), logits, labels).max()
    np.testing.assert_allclose(found, made, atol=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_the_oracle_is_never_below_uniform_nor_below_what_it_begins_from(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(5, 40, 6, generator=generator), torch.randint(6, (40,), generator=generator)
    also = torch.rand(8, 5, generator=generator).double()
    also = (also / also.sum(dim=1, keepdim=True)).tolist()
    found = oracle_weights(logits, labels, also)
    counts = correct_counts(np.array([found, [0.2] * 5, *also]), logits, labels)
    assert counts[0] == counts.max()


def test_uniform_weights_win_a_tie():
    logits = torch.randn(1, 30, 4).expand(3, -1, -1)
    assert oracle_weights(logits, torch.arange(30) % 4) == pytest.approx([1 / 3] * 3)


def test_a_known_prior_moves_scores_by_the_log_of_the_ratio():
    """By hand: test 3 : 1, trained for 1 : 9. Shift log(.75/.1), log(.25/.9); the second expert is for uniform."""
    logits = torch.zeros(2, 1, 2)
    trained = np.log([[0.1, 0.9], [0.5, 0.5]])
    found = correct_for_prior(logits, class_prior(np.array([3, 1])), trained)
    np.testing.assert_allclose(found[0, 0].numpy(), np.log([7.5, 0.25 / 0.9]), rtol=1e-6)
    np.testing.assert_allclose(found[1, 0].numpy(), np.log([1.5, 0.5]), rtol=1e-6)
    assert logits.eq(0).all()


def test_the_correction_turns_the_optimal_classifier_of_one_prior_into_that_of_another():
    """Bayes: posterior under q from the posterior under p, exactly, float64."""
    rng = np.random.default_rng(0)
    likelihood_XC = rng.dirichlet(np.ones(6), size=4).T  # p(x | c)
    p, q = rng.dirichlet(np.ones(4), size=2)
    under_p, under_q = (likelihood_XC * prior / (likelihood_XC @ prior)[:, None] for prior in (p, q))
    corrected = correct_for_prior(torch.from_numpy(np.log(under_p))[None], q, np.log(p)[None])
    np.testing.assert_allclose(corrected[0].softmax(dim=1).numpy(), under_q, atol=1e-12)


def test_equal_priors_change_no_prediction():
    logits = torch.randn(3, 20, 5)
    prior = class_prior(np.array([9, 5, 3, 2, 1]))
    found = correct_for_prior(logits, prior, np.log(np.tile(prior, (3, 1))))
    torch.testing.assert_close(found, logits)


def test_a_class_that_the_test_set_lacks_is_ruled_out_with_finite_scores():
    found = correct_for_prior(torch.zeros(1, 1, 3), class_prior(np.array([5, 0, 5])), np.zeros((1, 3)))
    assert torch.isfinite(found).all()
    assert found.softmax(dim=2)[0, 0, 1] < 1e-11


def test_priors_that_do_not_fit_are_refused():
    logits = torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"found a test prior \[2\] .*needed \[3\] and \[2, 3\]"):
        correct_for_prior(logits, np.ones(2) / 2, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="class 1 has test frequency 0"):
        correct_for_prior(logits, np.array([0.5, 0, 0.5]), np.zeros((2, 3)))
    with pytest.raises(ValueError, match="at least 1 image"):
        class_prior(np.zeros(3))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_reordering_experts_reorders_the_weights(order):
    views, settings = one_stable_expert(), WeightLearning(lr=0.3)
    plain = learn(views, settings).weights_E
    moved = learn(views[:, list(order)], settings).weights_E
    torch.testing.assert_close(moved, plain[list(order)], atol=1e-12, rtol=0)
