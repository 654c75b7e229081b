"""ResLT's loss against numbers from the published code, and against a NumPy transcription.

Origin of the numbers: jiequancui/ResLT @ 9650d93, `crossEntropy` and the loss assembled as in its CIFAR-100 training
loop, on CPU in float32, printed to 6 decimals. Tolerance: half a unit of the last printed decimal plus float32
rounding of the published run. Networks and the evaluation head are compared where the backbones are tested.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experts.methods.reslt import ResLT, guarded_nll
from experts.objective import StepContext
from experts.progress import Progress

# By these counts class 0 is many, class 1 medium, class 2 few: branch M learns 1 and 2, branch T learns 2.
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
        atol=2e-6,
        rtol=1e-6,
    )


def evaluate(logits_EBC, labels_B=LABELS, counts_C=COUNTS, **settings):
    objective = ResLT(ResLT.Config(**settings), counts_C, len(logits_EBC))
    return objective(logits_EBC, labels_B, StepContext(objective.denominators(labels_B, NOW), NOW))


def leaf(dtype=torch.float32):
    return torch.tensor(LOGITS, dtype=dtype, requires_grad=True)


def test_branches_and_their_common_denominator():
    objective = ResLT(ResLT.Config(), COUNTS, 3)
    assert objective.denominators(LABELS, NOW) == {"images": 3, "branch_images": 6}
    _, terms = evaluate(leaf())
    close(terms["independent"] * 6, [1.499026, 1.293712, 1.198441])
    close(terms["independent"].sum(), 0.665196)
    close(terms["fused"], 0.214677)


@pytest.mark.parametrize(("beta", "published"), [(0.995, 0.662944), (0.72, 0.539051)])
def test_the_loss_is_the_published_one(beta, published):
    close(evaluate(leaf(), beta=beta)[0], published)


def test_gradients_are_the_published_ones():
    logits = leaf()
    evaluate(logits, beta=0.995)[0].backward()
    head = [[-0.035881, 0.029368, 0.006513], [0.039443, 0.047921, -0.087364], [0.044744, -0.066933, 0.022188]]
    medium = [[-0.000326, 0.000299, 0.000027], [0.022992, 0.041467, -0.064458], [0.036997, -0.091969, 0.054972]]
    tail = [[-0.000326, 0.000299, 0.000027], [0.101026, 0.015163, -0.116189], [0.000191, -0.000255, 0.000064]]
    close(logits.grad, [head, medium, tail])


def test_the_guard_bounds_the_loss_of_an_impossible_label():
    logits, label = torch.tensor([[[40.0, 0, 0]]]), torch.tensor([1])
    close(guarded_nll(logits, label, 1e-7), [[16.118095]])
    close(guarded_nll(logits, label, 0.0), [[40.0]])


@pytest.mark.parametrize(
    ("num_classes", "cuts", "medium", "few"),
    [
        (100, (35, 70), range(35, 100), range(70, 100)),
        (10, (2, 4), range(2, 10), range(4, 10)),
        (1000, (175, 780), range(175, 1000), range(780, 1000)),
    ],
    ids=["cifar100", "cifar10", "imagenet_lt"],
)
def test_published_masks_are_cuts_of_the_classes_by_falling_count(num_classes, cuts, medium, few):
    counts = torch.arange(num_classes, 0, -1)
    objective = ResLT(ResLT.Config(groups={"rule": "index", "cuts": cuts}), counts, 3)
    found = [torch.nonzero(row).flatten().tolist() for row in objective.targets_EC]
    assert found == [list(range(num_classes)), list(medium), list(few)]


def test_published_masks_of_imagenet_are_of_rising_counts():
    """Its class ids rise with the count: branch M learns ids below 825, branch T ids below 220."""
    objective = ResLT(ResLT.Config(groups={"rule": "index", "cuts": (175, 780)}), torch.arange(1, 1001), 3)
    assert objective.targets_EC.sum(dim=1).tolist() == [1000, 825, 220]
    assert objective.targets_EC[1, :825].all()
    assert objective.targets_EC[2, :220].all()


def test_two_branches_learn_all_and_medium_with_few():
    """Published for iNaturalist, whose third branch is computed and then ignored."""
    by_count = ResLT(ResLT.Config(), COUNTS, 2)
    assert by_count.targets_EC.tolist() == [[True, True, True], [False, True, True]]
    inat = ResLT(ResLT.Config(groups={"rule": "index", "cuts": (1542,)}), torch.arange(1, 8143), 2)
    assert torch.equal(inat.targets_EC[1], torch.arange(8142) < 6600)


def reslt_in_numpy(z_EBC, labels, groups, beta, guard, fused_guard):
    """The published equations in float64, one image at a time; groups are the first classes of the branches."""
    independent = fused = count = 0.0
    for b, y in enumerate(labels):
        for z, first in zip(z_EBC[:, b], groups, strict=True):
            if y >= first:
                independent += -np.log(np.exp(z[y]) / np.exp(z).sum() + guard)
                count += 1
        total = z_EBC[:, b].sum(axis=0)
        fused += -np.log(np.exp(total[y]) / np.exp(total).sum() + fused_guard)
    return beta * independent / count + (1 - beta) * fused / len(labels)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("fused", ["exact", "guarded"])
@pytest.mark.parametrize("guard", [1e-7, 1e-2, 0.0])
def test_loss_equals_the_equations_in_float64(guard, fused, branches, seed):
    """Tolerance 1e-12: both sides are float64 and differ in the order of operations only."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(branches, 9, 6)) * 3, rng.integers(0, 6, size=9)
    groups = {"rule": "index", "cuts": (2, 4)[: branches - 1]}
    loss, _ = evaluate(
        torch.tensor(logits),
        torch.tensor(labels),
        torch.arange(6, 0, -1),
        beta=0.8,
        log_guard=guard,
        fused=fused,
        groups=groups,
    )
    fused_guard = guard if fused == "guarded" else 0.0
    expected = reslt_in_numpy(logits, labels, (0, 2, 4)[:branches], 0.8, guard, fused_guard)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fused", ["exact", "guarded"])
def test_gradient_is_the_closed_form(fused):
    """With p the label's probability and g the guard, -log(p + g) has the gradient (softmax - onehot) p / (p + g).

    Of the fused loss it is the same for all branches, (1 - beta) / B (softmax(sum) - onehot), with the factor in the
    guarded form only; a branch's own loss counts where its mask does, divided by the 6 images of all branches.
    """
    beta, guard = 0.7, 1e-2  # a guard large enough to show
    logits = leaf(torch.float64)
    evaluate(logits, beta=beta, log_guard=guard, fused=fused)[0].backward()
    z = logits.detach()
    onehot = torch.nn.functional.one_hot(LABELS, 3).double()

    def slope(scores, g):
        p = scores.softmax(dim=-1)
        p_y = (p * onehot).sum(dim=-1, keepdim=True)
        return (p - onehot) * p_y / (p_y + g)

    masks_EB = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 0]], dtype=torch.float64)
    own = beta * masks_EB[..., None] * slope(z, guard) / 6
    common = (1 - beta) * slope(z.sum(dim=0), guard if fused == "guarded" else 0.0) / 3
    torch.testing.assert_close(logits.grad, own + common, atol=1e-12, rtol=1e-12)


def test_an_impossible_label_has_a_finite_gradient_with_and_without_guard():
    for guard in (0.0, 1e-7):
        logits = torch.tensor([[[200.0, 0, 0]]] * 2, requires_grad=True)
        loss, _ = evaluate(logits, torch.tensor([1]), log_guard=guard)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("num_experts", [1, 4])
def test_other_numbers_of_branches_are_refused(num_experts):
    with pytest.raises(ValueError, match=rf"'reslt': method\.num_experts = {num_experts}; it takes 3 or 2"):
        ResLT(ResLT.Config(), torch.tensor([500, 50, 5, 4, 3]), num_experts)


def test_a_branch_without_classes_is_refused():
    with pytest.raises(ValueError, match=r"no class is few.*groups\.rule = 'equal'"):
        ResLT(ResLT.Config(), torch.tensor([500, 50, 20]), 3)
