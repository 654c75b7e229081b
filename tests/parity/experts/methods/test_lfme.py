"""LFME's student: schedules, distillation and loss against numbers from the published code, and against NumPy.

Origin of the numbers: xiangly55/LFME @ 0a18a06, `get_distill_loss_weight`, `instance_weight_scheduler`,
`set_scale_classwise_instance_weight_with_shot`, `DistillationLoss` and `batch_loss` on CPU in float64, printed to 6
decimals. Tolerance: half a unit of the last decimal.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from experts.class_groups import GroupRule
from experts.methods.lfme import (
    LFME,
    TEACHERS,
    instance_factors,
    instance_share,
    lfme_loss,
    scaled_confidences,
    teacher_weights,
)
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.draws import class_aware_draws, positions_by_class
from experts.schedules import Cosine, Steps

COUNTS = torch.tensor([12, 100, 30, 20, 130, 24])
GROUPS = {"many": [4, 1], "medium": [2, 5], "few": [3, 0]}
NOW = Progress(epoch=3, epochs=90)


def close(found, published) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=6e-7, rtol=0)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Schedules


def test_weight_of_a_teacher():
    student = [0, 0.17, 0.18, 0.30, 0.45, 0.60, 0.70]
    found = teacher_weights(tensor(student), tensor([0.6] * 7), alpha=0.3)
    close(found, [1, 1, 1, 0.714286, 0.357143, 0, 0])


def test_a_teacher_that_is_never_right_has_no_weight():
    assert teacher_weights(tensor([0.0, 0.5]), tensor([0.0, 0.0]), alpha=0.3).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("epoch", "published"),
    [
        (1, [1, 0.243606, 0.073237, 0.511111]),
        (45, [1, 1, 1, 1]),
        (60, [1, 1.257862, 1.315942, 1.166667]),
        (90, [1, 1.773585, 1.947826, 1.5]),
    ],
)
def test_the_instance_schedule_is_the_published_one(epoch, published):
    u = tensor([1, 12 / 53, 12 / 230, 0.5])
    close(instance_factors(u, instance_share(Progress(epoch, 90), clamp=False)), published)
    close(instance_factors(u, instance_share(Progress(epoch, 90), clamp=True)), np.minimum(published, 1).tolist())


P = [0.2, 0.5, 0.9, 0.1, 0.4, 0.6, 0.3, 0.7]
U = [0.052174, 0.458385, 1, 0.226415, 0.690566, 1, 1, 1]


def test_confidences_are_scaled_class_by_class():
    labels, lowest = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), tensor([12 / 230, 12 / 53, 1])
    close(scaled_confidences(tensor(P), labels, lowest), U)
    order = torch.tensor([6, 3, 0, 7, 1, 4, 2, 5])
    close(scaled_confidences(tensor(P)[order], labels[order], lowest), [U[i] for i in order])


def test_a_class_of_equal_confidences_or_of_one_image_counts_in_full():
    labels, lowest = torch.tensor([0, 0, 1]), tensor([0.1, 0.2, 0.3])
    assert scaled_confidences(tensor([0.4, 0.4, 0.9]), labels, lowest).tolist() == [1, 1, 1]


# Loss


def call(logits, labels, teachers, groups, weights, factors, **settings):
    return lfme_loss(
        logits,
        torch.tensor(labels),
        teacher_scores=[tensor(t) for t in teachers],
        groups=[torch.tensor(g) for g in groups],
        weight_T=tensor(weights),
        factor_B=tensor(factors),
        temperature=2.0,
        images=tensor(len(labels)),
        **settings,
    )


def test_the_distillation_term_is_the_published_one():
    """The published value is the mean over elements times the group's size: the sum over classes, mean over images."""
    _, _, kl_T = call(tensor([[2, 0.5], [0.1, 0.3]]), [0, 0], [[[1, 1.5], [-0.4, 0.2]]], [[0, 1]], [1], [1, 1])
    close(kl_T, [0.064019])


Z, Y = [[2, 0.5, -1, 0.3], [0.1, 0.3, 0.8, -0.2]], [0, 3]
T_MANY, T_LOW = [[1, 1.5], [-0.4, 0.2]], [[0.3, -0.2], [1.2, -0.7]]


def test_total_and_gradient_are_the_published_ones():
    logits = tensor(Z).requires_grad_()
    weights = teacher_weights(tensor([0.45, 0.1]), tensor([0.6, 0.5]), alpha=0.3)
    close(weights, [0.357143, 1])
    factors = instance_factors(tensor([0.25, 1]), instance_share(NOW, clamp=False))
    close(factors, [0.3, 1])
    loss, ce, kl_T = call(logits, Y, [T_MANY, T_LOW], [[0, 2], [1, 3]], weights.tolist(), factors.tolist())
    loss.backward()
    close(loss.detach(), 1.479387)
    close(ce.detach(), 1.438588)
    close(kl_T.detach(), [0.030569, 0.029881])
    close(
        logits.grad,
        [[-0.088654, 0.032064, 0.018431, 0.038159], [0.099396, 0.082995, 0.203435, -0.385826]],
    )


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def lfme_in_numpy(z, labels, teachers, groups, weights, factors, temperature, instance_on):
    """The published equations, one image at a time."""
    loss = 0.0
    for b, y in enumerate(labels):
        scaled = z[b] * factors[b] if instance_on == "logits" else z[b]
        ce = -np.log(softmax(scaled)[y])
        loss += ce * (factors[b] if instance_on == "loss" else 1)
        for t, group, weight in zip(teachers, groups, weights, strict=True):
            q, p = softmax(t[b] / temperature), softmax(scaled[group] / temperature)
            loss += weight * (q * np.log(q / p)).sum()
    return loss / len(labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("instance_on", ["logits", "loss"])
def test_loss_equals_the_equations_in_float64(instance_on, seed):
    rng = np.random.default_rng(seed)
    z, labels, groups = rng.normal(size=(6, 6)) * 3, rng.integers(0, 6, size=6), list(GROUPS.values())
    teachers = [rng.normal(size=(6, len(group))) * 2 for group in groups]
    weights, factors = rng.uniform(size=3), rng.uniform(0.1, 1.9, size=6)
    loss, _, _ = call(
        torch.tensor(z), labels, [t.tolist() for t in teachers], groups, weights, factors, instance_on=instance_on
    )
    expected = lfme_in_numpy(z, labels, teachers, groups, weights, factors, 2.0, instance_on)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_closed_form():
    """dL/dz = v ((softmax(v z) - onehot(y)) / B + sum_t w_t / (B T) (softmax(v z_t / T) - softmax(t / T)))."""
    logits, factors, weights = tensor(Z).requires_grad_(), [0.3, 1.2], [0.4, 0.9]
    call(logits, Y, [T_MANY, T_LOW], [[0, 2], [1, 3]], weights, factors)[0].backward()
    v = tensor(factors)[:, None]
    z = v * tensor(Z)
    expected = (z.softmax(dim=1) - torch.nn.functional.one_hot(torch.tensor(Y), 4)) / 2
    for w, t, group in zip(weights, (T_MANY, T_LOW), ([0, 2], [1, 3]), strict=True):
        expected[:, group] += w / 4 * ((z[:, group] / 2).softmax(dim=1) - (tensor(t) / 2).softmax(dim=1))
    torch.testing.assert_close(logits.grad, v * expected, atol=1e-12, rtol=1e-12)


# The objective


class Split:
    """A training and a validation split of a set, and what three teachers say of their images."""

    def __init__(self, seed=0, val_labels=(0, 1, 2, 3, 4, 4, 2, 3, 0, 5, 5)):
        rng = np.random.default_rng(seed)
        self.labels = {"train": rng.permutation(np.repeat(np.arange(6), COUNTS)), "val": np.array(val_labels)}
        self.scores = {
            split: {name: rng.normal(size=(len(labels), len(GROUPS[name]))) * 2 for name in TEACHERS}
            for split, labels in self.labels.items()
        }

    def given(self, split, rows):
        scores = {name: torch.tensor(self.scores[split][name][rows]) for name in TEACHERS}
        return ExtraInputs(scores, torch.tensor(rows) if split == "train" else None), torch.tensor(
            self.labels[split][rows]
        )

    def batches(self, split, size=37, seed=1):
        order = np.random.default_rng(seed).permutation(len(self.labels[split]))
        return (self.given(split, order[i : i + size]) for i in range(0, len(order), size))

    def confidence(self, row, split="train"):
        """Probability of the true class, and whether it is the largest, by the teacher who knows the class."""
        y = self.labels[split][row]
        name = next(name for name, ids in GROUPS.items() if y in ids)
        p = softmax(self.scores[split][name][row])
        place = GROUPS[name].index(y)
        return p[place], p.argmax() == place


def student(**settings):
    return LFME(LFME.Config(**settings), COUNTS, 1).double()


def prepared(split=None, **settings):
    objective = student(**settings)
    objective.prepare((split or Split()).batches)
    return objective


def test_published_groups_count_100_as_many_and_20_as_few():
    objective = student()
    assert {name: ids.tolist() for name, ids in objective.teacher_classes.items()} == GROUPS
    assert objective.config.teacher_names == ("many", "medium", "few")


def test_prepare_finds_what_the_teachers_are_sure_of_and_how_good_they_are():
    split = Split()
    objective = prepared(split)
    shots = {"many": 115, "medium": 27, "few": 16}
    raw = np.array([split.confidence(row)[0] for row in range(316)])
    for name, ids in GROUPS.items():
        theta = 16 / shots[name]
        for c in ids:
            own = split.labels["train"] == c
            p = raw[own]
            expected = (p - p.min()) / (p.max() - p.min()) * (1 - theta) + theta
            np.testing.assert_allclose(objective.instance_u_N.numpy()[own], expected, rtol=1e-12)
    for t, ids in enumerate(GROUPS.values()):
        right = [[split.confidence(r, "val")[1] for r in np.flatnonzero(split.labels["val"] == c)] for c in ids]
        assert objective.teacher_accuracy_T[t].item() == pytest.approx(np.mean([np.mean(r) for r in right]))
    assert objective.student_accuracy_T.tolist() == [0, 0, 0]


def test_few_shot_images_count_in_full_and_the_published_shots_can_be_set():
    objective = prepared(mean_shots=(230, 53, 12))
    labels = torch.tensor(Split().labels["train"])
    for c, lowest in {0: 1, 3: 1, 2: 12 / 53, 5: 12 / 53, 1: 12 / 230, 4: 12 / 230}.items():
        found = objective.instance_u_N[labels == c]
        assert found.min().item() == pytest.approx(lowest)
        assert found.max().item() == pytest.approx(1)


def test_order_and_size_of_the_batches_do_not_matter():
    split, one, other = Split(), student(), student()
    one.prepare(split.batches)
    other.prepare(lambda name: split.batches(name, size=5, seed=9))
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def loss_of(objective, split, rows, logits, now=NOW):
    given, labels = split.given("train", rows)
    return objective(logits, labels, StepContext(objective.denominators(labels, now), now, given))


@pytest.mark.parametrize("settings", [{}, {"instance_on": "loss", "clamp": True, "alpha": 0.0, "temperature": 4.0}])
@pytest.mark.parametrize("epoch", [1, 60])
def test_the_objective_is_the_loss_with_what_was_found(epoch, settings):
    split, rows = Split(), [5, 100, 7, 200, 291]
    objective = prepared(split, **settings)
    objective.observe([0.1, 0.2, 0.3, None, 0.5, 0.1])
    z = np.random.default_rng(4).normal(size=(1, 5, 6)) * 3
    loss, terms = loss_of(objective, split, rows, torch.tensor(z), Progress(epoch, 90))

    u, share = objective.instance_u_N.numpy()[rows], epoch / 45
    factors = u + (1 - u) * (min(share, 1) if settings else share)
    alpha = settings.get("alpha", 0.3)
    a, s = objective.teacher_accuracy_T.tolist(), [0.35, 0.2, 0.1]
    weights = [0 if ai == 0 else min(1, max(0, (ai - si) / (ai * (1 - alpha)))) for ai, si in zip(a, s, strict=True)]
    teachers = [split.scores["train"][name][rows] for name in TEACHERS]
    labels = split.labels["train"][rows]
    arguments = (list(GROUPS.values()), weights, factors, objective.config.temperature, objective.config.instance_on)
    assert loss.item() == pytest.approx(lfme_in_numpy(z[0], labels, teachers, *arguments), rel=1e-12)
    assert [terms[f"weight_{name}"].item() for name in TEACHERS] == pytest.approx(weights)
    assert terms["instance_factor"].item() == pytest.approx(factors.mean())
    parts = sum(weights[t] * terms[f"kl_{name}"].item() for t, name in enumerate(TEACHERS))
    assert loss.item() == pytest.approx(terms["cross_entropy"].item() + parts)


def test_a_student_who_draws_level_no_longer_listens():
    split = Split()
    objective = prepared(split)
    z = torch.zeros(1, 3, 6, dtype=torch.float64)
    before = loss_of(objective, split, [0, 1, 2], z)[1]
    objective.observe([1.0] * 6)
    after = loss_of(objective, split, [0, 1, 2], z)[1]
    known = [name for t, name in enumerate(TEACHERS) if objective.teacher_accuracy_T[t] > 0]
    assert known
    assert all(before[f"weight_{name}"] == 1 and after[f"weight_{name}"] == 0 for name in known)


def test_pieces_of_a_batch_add_up_and_an_empty_one_is_zero():
    split, rows = Split(), [5, 100, 7, 200, 291]
    objective = prepared(split)
    z = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, labels = split.given("train", rows)
    denominators = objective.denominators(labels, NOW)
    whole, terms = loss_of(objective, split, rows, z)
    pieces = []
    for own in ([0, 3], [], [4, 1, 2]):
        given, labels = split.given("train", np.array(rows)[own].astype(np.int64))
        pieces.append(objective(z[:, own], labels, StepContext(denominators, NOW, given)))
    assert pieces[1][0] == 0
    torch.testing.assert_close(sum(piece[0] for piece in pieces), whole, atol=1e-12, rtol=1e-12)
    for name, term in terms.items():
        torch.testing.assert_close(sum(piece[1][name] for piece in pieces), term, atol=1e-12, rtol=1e-12)


def test_state_makes_the_round_trip_through_a_checkpoint():
    split, z = Split(), torch.ones(1, 2, 6, dtype=torch.float64)
    first, second = prepared(split), student()
    first.observe([0.2, 0.1, 0.0, 0.0, 0.1, 0.3])
    assert {"instance_u_N", "teacher_accuracy_T", "student_accuracy_T"} < set(first.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(loss_of(first, split, [3, 4], z)[0], loss_of(second, split, [3, 4], z)[0])


# What does not fit


def test_a_loss_without_preparation_or_positions_is_refused():
    split, z = Split(), torch.ones(1, 2, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'lfme'.*prepare"):
        loss_of(student(), split, [3, 4], z)
    given, labels = split.given("train", [3, 4])
    objective = prepared(split)
    with pytest.raises(ValueError, match=r"'lfme'.*positions"):
        objective(z, labels, StepContext(objective.denominators(labels, NOW), NOW, ExtraInputs(given.teachers)))


def test_teachers_that_are_missing_or_of_other_classes_are_refused():
    split, z = Split(), torch.ones(1, 2, 6, dtype=torch.float64)
    given, labels = split.given("train", [3, 4])
    objective = prepared(split)
    fewer = {name: given.teachers[name] for name in ("many", "few")}
    for teachers in ({}, fewer, dict(given.teachers) | {"medium": given.teachers["many"][:, :1]}):
        with pytest.raises(ValueError, match=r"'lfme'.*teachers\.many"):
            objective(
                z,
                labels,
                StepContext(objective.denominators(labels, NOW), NOW, ExtraInputs(teachers, given.positions_B)),
            )


def test_a_training_image_that_is_missing_twice_there_or_has_no_finite_score_is_refused():
    split = Split()
    whole = list(split.batches("train"))
    bad = Split()
    bad.scores["train"]["many"][:] = np.nan
    for train in (whole[:-1], [*whole, whole[0]], [*whole[:-1], whole[0]], list(bad.batches("train"))):
        with pytest.raises(ValueError, match=r"'lfme'.*whole training set once"):
            student().prepare(lambda name, train=train: train if name == "train" else split.batches(name))


def test_a_validation_split_without_a_group_is_refused():
    split = Split(val_labels=(4, 1, 3, 0))
    with pytest.raises(ValueError, match=r"'medium'.*val_per_class"):
        student().prepare(split.batches)
    with pytest.raises(ValueError, match=r"'medium'.*val_per_class"):
        prepared().observe([0.5, 0.5, None, 0.5, 0.5, None])


@pytest.mark.parametrize("accuracies", [[0.5] * 5, [50.0] * 6, [-0.1] * 6])
def test_accuracies_that_are_not_fractions_of_each_class_are_refused(accuracies):
    with pytest.raises(ValueError, match="between 0 and 1"):
        prepared().observe(accuracies)


@pytest.mark.parametrize("num_experts", [0, 2, 9])
def test_more_than_one_student_is_refused(num_experts):
    with pytest.raises(ValueError, match=rf"'lfme'.*method.num_experts = {num_experts}"):
        LFME(LFME.Config(), COUNTS, num_experts)


def test_a_group_without_a_class_is_refused_and_equal_groups_are_a_way_out():
    counts = torch.tensor([500, 400, 300, 200])
    with pytest.raises(ValueError, match=r"groups.*equal"):
        LFME(LFME.Config(), counts, 1)
    objective = LFME(LFME.Config(groups=GroupRule(rule="equal")), counts, 1)
    assert [ids.tolist() for ids in objective.teacher_classes.values()] == [[0, 1], [2], [3]]


@pytest.mark.parametrize("shots", [(230, 53, 0), (12, 53, 230)])
def test_mean_shots_without_sense_are_refused(shots):
    with pytest.raises(ValueError, match="mean_shots"):
        student(mean_shots=shots)


# Sampling and learning rates of the recipe


def test_a_batch_of_256_is_64_classes_with_4_images_in_a_row_each():
    labels = np.repeat(np.arange(100), 300)
    sampler = ClassBalanced(ClassBalanced.Config(form="class_aware", images_per_visit=4), labels, 100)
    drawn = labels[sampler.draw(Progress(1, 90), 1234)][:256].reshape(64, 4)
    assert (drawn == drawn[:, :1]).all()
    assert len(set(drawn[:, 0])) == 64
    assert ClassBalanced.Config().images_per_visit == 4


def test_a_class_of_few_images_is_repeated_within_a_visit():
    by_class = [p.tolist() for p in positions_by_class(np.array([0, 0, 1, 1, 1, 1, 1]), 2)]
    draws = class_aware_draws(by_class, 4, 8, random.Random(0))
    assert sorted(map(int, np.bincount(draws, minlength=7)[:2])) == [2, 2]


def test_learning_rates_of_teachers_and_student():
    """Stepped before an epoch: teachers .05 (1 + cos(pi e / 120)), 0 in the last; the student drops in 50 and 80."""
    teacher = Cosine(Cosine.Config(stepped="before"))
    for e in (1, 60, 119, 120):
        assert 0.1 * teacher.factor(Progress(e, 120)) == pytest.approx(0.05 * (1 + np.cos(np.pi * e / 120)), abs=1e-15)
    drops = [{"after_epoch": 49, "factor": 0.1}, {"after_epoch": 79, "factor": 0.01}]
    student_rate = Steps(Steps.Config(milestones=drops))
    found = {e: 0.1 * student_rate.factor(Progress(e, 90)) for e in (1, 49, 50, 79, 80, 90)}
    assert found == pytest.approx({1: 0.1, 49: 0.1, 50: 0.01, 79: 0.01, 80: 0.001, 90: 0.001})
