"""ACE's losses and learning rates against numbers worked out from the formulas, and against a NumPy transcription.

Origin of the numbers: no code was published; they were computed in float64 from arXiv:2108.02385's formulas as others
quote them, by hand and apart from this code, and printed to 6 decimals. Tolerance: a unit of the last one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.methods.ace import ACE
from experts.objective import StepContext
from experts.progress import Progress

# Class 0 is many, class 1 medium, class 2 few: experts learn {0, 1, 2}, {1, 2} and {2}.
COUNTS = torch.tensor([500, 50, 5])
LABELS = torch.tensor([0, 2, 1])
LOGITS = [
    [[2, 0.5, -1], [0.1, 0.3, 0.8], [0.4, 1.2, -0.3]],
    [[1, 1.5, 0], [-0.4, 0.2, 1.1], [0.2, 0.9, 0.6]],
    [[0.3, -0.2, 0.4], [1.2, -0.7, 0.5], [0, 0.5, -0.8]],
]
NOW = Progress(epoch=1, epochs=200)


def close(found, published) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(published, dtype=torch.float64),
        atol=1e-6,
        rtol=1e-6,
    )


def evaluate(logits_EBC, labels_B=LABELS, counts_C=COUNTS, **settings):
    objective = ACE(ACE.Config(**settings), counts_C, len(logits_EBC))
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, NOW), NOW))


def leaf():
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)


def test_losses_are_those_of_the_formulas():
    loss, terms = evaluate(leaf())
    close(terms["classification"], [0.499676, 0.646856, 1.198442])
    close(terms["complement"], [0, 0.100000, 1.930000])
    close(loss, 4.374973)


def test_losses_with_a_softmax_over_own_classes():
    _, terms = evaluate(leaf(), softmax_over="target")
    close(terms["classification"], [0.499676, 0.447755, 0])
    close(terms["complement"], [0, 0.100000, 1.930000])


def test_gradients_are_those_of_the_formulas():
    logits = leaf()
    evaluate(logits)[0].backward()
    close(logits.grad[2, 1], [3.007477, -1.309141, -0.698336])
    close(logits.grad[1, 1:], [[-0.331543, 0.124738, -0.193195], [0.310974, -0.276527, 0.165553]])
    assert torch.count_nonzero(logits.grad[1, 0]) == 0
    assert torch.count_nonzero(logits.grad[2, [0, 2]]) == 0


def test_learning_rates_follow_images_not_classes():
    close(0.1 * torch.tensor(ACE(ACE.Config(), COUNTS, 3).lr_factors), [0.1, 0.009910, 0.000901])
    assert ACE(ACE.Config(scale_lr=False), COUNTS, 3).lr_factors == (1.0, 1.0, 1.0)


def test_learning_rates_of_cifar100():
    """10,847, 2,023 and 305 images."""
    counts = torch.tensor([int(500 * 100 ** (-c / 99)) for c in range(100)])
    objective = ACE(ACE.Config(), counts, 3)
    assert (objective.targets_EC * counts).sum(dim=1).tolist() == [10847, 2023, 305]
    torch.testing.assert_close(
        0.1 * torch.tensor(objective.lr_factors), torch.tensor([0.1, 0.01865, 0.002812]), atol=5e-6, rtol=0
    )


def test_four_experts_take_nested_quarters_of_the_classes():
    objective = ACE(ACE.Config(groups={"rule": "equal"}), torch.arange(8, 0, -1), 4)
    assert objective.targets_EC.sum(dim=1).tolist() == [8, 6, 4, 2]
    assert objective.targets_EC[3].tolist() == [False] * 6 + [True] * 2


def test_an_expert_none_of_whose_classes_is_in_the_batch_adds_nothing():
    """Its denominator is 0 and its terms are 0, with a gradient of 0: not NaN, also for the softmax of own classes."""
    labels = torch.tensor([0, 0, 1])
    for softmax_over in ("all", "target"):
        logits = leaf()
        loss, terms = evaluate(logits, labels, softmax_over=softmax_over)
        loss.backward()
        assert torch.isfinite(loss)
        assert (terms["classification"][2], terms["complement"][2]) == (0, 0)
        assert torch.isfinite(logits.grad).all()
        assert torch.count_nonzero(logits.grad[2]) == 0
        assert torch.count_nonzero(logits.grad[1]) > 0


def test_an_expert_with_fewer_images_than_it_needs_skips_the_step():
    logits = leaf()
    loss, terms = evaluate(logits, min_rows=2)
    loss.backward()
    close(terms["classification"], [0.499676, 0.646856, 0])
    close(terms["complement"], [0, 0.1, 0])
    assert torch.count_nonzero(logits.grad[2]) == 0


def ace_in_numpy(z_EBC, labels, targets, *, over_targets=False, all_images=False, mean=False):
    """The paper's equations in float64, one expert and one image at a time."""
    classes, loss = range(z_EBC.shape[2]), 0.0
    for z_BC, own in zip(z_EBC, targets, strict=True):
        others = [c for c in classes if c not in own]
        images = [b for b, y in enumerate(labels) if y in own]
        columns = sorted(own) if over_targets else list(classes)
        for b in images:
            z = z_BC[b]
            loss += (np.log(np.exp(z[columns]).sum()) - z[labels[b]]) / len(images)
        penalised = range(len(labels)) if all_images else images
        for b in penalised:
            squares = (z_BC[b][others] ** 2).sum() / (max(len(others), 1) if mean else 1)
            loss += squares / len(penalised)
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("softmax_over", ["all", "target"])
@pytest.mark.parametrize("com_batch", ["target", "all"])
@pytest.mark.parametrize("com_reduction", ["sum", "mean"])
def test_loss_equals_the_equations_in_float64(com_reduction, com_batch, softmax_over, seed):
    """Tolerance 1e-12: both sides are float64 and differ in the order of sums only."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 9, 6)) * 3, np.concatenate([rng.integers(0, 6, size=8), [5]])
    loss, _ = evaluate(
        torch.tensor(logits),
        torch.tensor(labels),
        torch.arange(6, 0, -1),
        groups={"rule": "index", "cuts": (2, 4)},
        softmax_over=softmax_over,
        com_batch=com_batch,
        com_reduction=com_reduction,
    )
    expected = ace_in_numpy(
        logits,
        labels,
        [{0, 1, 2, 3, 4, 5}, {2, 3, 4, 5}, {4, 5}],
        over_targets=softmax_over == "target",
        all_images=com_batch == "all",
        mean=com_reduction == "mean",
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_closed_form():
    """Of an expert's image: (softmax(z) - onehot(y) + 2 z on other classes) / images of its classes."""
    logits = leaf()
    evaluate(logits)[0].backward()
    z = logits.detach()
    onehot = torch.nn.functional.one_hot(LABELS, 3).double()
    others_EC = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
    rows_EB = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 0]], dtype=torch.float64)
    slope = z.softmax(dim=-1) - onehot + 2 * z * others_EC[:, None]
    expected = slope * (rows_EB / rows_EB.sum(dim=1, keepdim=True))[..., None]
    torch.testing.assert_close(logits.grad, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_experts", [1, 5])
def test_other_numbers_of_experts_are_refused(num_experts):
    with pytest.raises(ValueError, match=rf"'ace': method\.num_experts = {num_experts}; it takes 2 to 4"):
        ACE(ACE.Config(), torch.arange(1, 9), num_experts)


def test_a_set_without_few_is_refused_with_what_to_set():
    counts = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    with pytest.raises(ValueError, match=r"no class is few.*50 to 5000.*groups\.rule = 'equal'"):
        ACE(ACE.Config(), counts, 3)
    equal = ACE(ACE.Config(groups={"rule": "equal"}), counts, 3)
    assert equal.targets_EC.sum(dim=1).tolist() == [10, 6, 3]
