"""BBN's alpha, mixing and sampling against numbers from the published code, and against a NumPy transcription.

Origin of the numbers: megvii-research/BBN @ 7992e90, `Combiner` and the dataset's `get_weight`, on CPU in float32,
printed to 6 decimals. Tolerance: half a unit of the last printed decimal plus float32 rounding of the published run.
The network is compared where the backbones are tested.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from experts.batches import Batch
from experts.ensemble import Ensemble, Expert
from experts.methods.bbn import BBN, Bilateral, BilateralHead, bbn_loss, cumulative_alpha
from experts.objective import StepContext
from experts.progress import Progress
from experts.samplers.reversed import Reversed
from tests.networks import run_together

FEATURES_A = [[1.0, 2], [0, 1]]
FEATURES_B = [[0.5, -1], [2, 0]]
WEIGHT = torch.tensor([[0.1, 0.2, 0.3, -0.1], [-0.2, 0.4, 0, 0.5], [0.3, -0.3, 0.2, 0.1]])
BIAS = torch.tensor([0.05, -0.05, 0])
LABELS = torch.tensor([[0, 1], [2, 2]])
COUNTS = torch.tensor([100, 10, 1])


def close(found, published, atol=2e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64),
        torch.as_tensor(published, dtype=torch.float64),
        atol=atol,
        rtol=1e-6,
    )


def at(epoch, epochs=200):
    return Progress(epoch=epoch, epochs=epochs)


@pytest.mark.parametrize(
    ("epochs", "epoch", "published"),
    [
        (200, 1, 1),
        (200, 2, 0.999975),
        (200, 50, 0.939975),
        (200, 100, 0.754975),
        (200, 120, 0.645975),
        (200, 160, 0.367975),
        (200, 200, 0.009975),
        (180, 90, 0.801975),
        (180, 120, 0.645975),
        (180, 180, 0.198975),
        (90, 60, 0.651900),
        (90, 90, 0.207900),
    ],
)
def test_alpha_is_the_published_one(epochs, epoch, published):
    close(BBN(BBN.Config(), COUNTS, 2).alpha(at(epoch, epochs)), published)


def test_alpha_can_end_with_the_stage_or_after_any_number_of_epochs():
    def alpha(epochs, alpha_epochs):
        return BBN(BBN.Config(alpha_epochs=alpha_epochs), COUNTS, 2).alpha(at(epochs, epochs))

    assert alpha(180, "stage") == pytest.approx(1 - (179 / 180) ** 2)
    assert alpha(11, 20) == 0.75
    assert alpha(21, 20) == 0
    with pytest.raises(ValueError, match=r"objective\.alpha_epochs = 20: .* the stage has 22; set 21 or more"):
        alpha(22, 20)


def two_halves():
    """An ensemble that is its two halves of the fixture's linear layer."""
    experts = {}
    for position, name in enumerate(("conventional", "rebalancing")):
        head = BilateralHead(BilateralHead.Config(), 2, 3, position)
        with torch.no_grad():
            head.weight.copy_(WEIGHT[:, 2 * position : 2 * position + 2])
            if position == 0:
                head.bias.copy_(BIAS)
        experts[name] = Expert(nn.Identity(), head)
    return Ensemble(nn.Identity(), experts)


def mixed(epoch, scale=2.0):
    """Half scores, loss and what to differentiate by, as flow, head and objective give them together."""
    ensemble = two_halves()
    features = [torch.tensor(f, requires_grad=True) for f in (FEATURES_A, FEATURES_B)]
    batches = [Batch(f, y, y) for f, y in zip(features, LABELS, strict=True)]
    batch = Batch(features[0], LABELS[0], LABELS[0], partner=batches[1])
    objective = BBN(BBN.Config(), COUNTS, 2)
    flow = Bilateral(Bilateral.Config(scale=scale), objective, ensemble.names, lambda *words: 0)
    half_EBC, _ = run_together(flow, ensemble, batch, at(epoch))
    labels, global_labels = flow.labels(batch)
    assert torch.equal(labels, LABELS)
    loss, terms = objective(half_EBC, labels, StepContext(objective.denominators(global_labels, at(epoch)), at(epoch)))
    loss.backward()
    return ensemble, features, half_EBC, loss, terms


def test_first_epoch_ignores_the_second_branch():
    _, (a, b), half_EBC, loss, terms = mixed(epoch=1)
    close(half_EBC.detach().sum(dim=0), [[1.05, 1.15, -0.6], [0.45, 0.75, -0.6]])
    close(loss, 0.762438)
    close(terms["conventional"], 0.762438)
    close(a.grad, [[-0.127607, 0.054418], [0.175928, -0.164811]])
    assert torch.count_nonzero(b.grad) == 0


def test_the_middle_of_training_is_as_published():
    ensemble, (a, b), half_EBC, loss, _ = mixed(epoch=101)
    close(half_EBC.detach().sum(dim=0), [[0.925, 0.6, -0.45], [0.65, 0.55, -0.25]])
    close(loss, 1.081180)
    close(a.grad, [[-0.100599, 0.100617], [0.069555, -0.025991]])
    close(b.grad, [[-0.024383, 0.048765], [0.028743, -0.057485]])
    close(ensemble.experts["conventional"].head.bias.grad, [0.094436, 0.003617, -0.098053])
    assert ensemble.experts["rebalancing"].head.bias is None


def test_the_last_epoch_is_as_published():
    _, _, half_EBC, loss, _ = mixed(epoch=200)
    close(half_EBC.detach().sum(dim=0), [[0.554987, -1.028055, -0.005985], [1.242020, -0.042020, 0.786035]])
    close(loss, 1.120739)


def test_a_trained_model_has_neither_alpha_nor_the_factor():
    halves = [
        expert(torch.tensor(f))
        for expert, f in zip(two_halves().experts.values(), (FEATURES_A, FEATURES_B), strict=True)
    ]
    close(torch.stack(halves).sum(dim=0).detach(), [[0.8, 0.05, -0.3], [0.85, 0.35, 0.1]])


def test_reversed_sampling_is_as_published():
    sampler = Reversed(Reversed.Config(), np.repeat(np.arange(3), COUNTS.numpy()), 3)
    close(sampler.class_probabilities(Progress(1, 1)), [0.009009, 0.090090, 0.900901], atol=6e-7)


def bbn_in_numpy(f_a, f_b, weight, bias, y_a, y_b, alpha, scale):
    """The published equations in float64, one pair of images at a time."""
    loss = 0.0
    for a, b, label_a, label_b in zip(f_a, f_b, y_a, y_b, strict=True):
        g = scale * np.concatenate([alpha * a, (1 - alpha) * b])
        z = weight @ g + bias
        log_p = z - np.log(np.exp(z).sum())
        loss -= (alpha * log_p[label_a] + (1 - alpha) * log_p[label_b]) / len(f_a)
    return loss


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_flow_head_and_objective_equal_the_equations_in_float64(scale, seed):
    """Tolerance 1e-12: both sides are float64 and differ in the order of sums only."""
    rng = np.random.default_rng(seed)
    pairs, width, classes = 6, 4, 5
    f_a, f_b = rng.normal(size=(2, pairs, width))
    weight, bias = rng.normal(size=(classes, 2 * width)), rng.normal(size=classes)
    y_a, y_b = rng.integers(0, classes, size=(2, pairs))
    experts = {}
    for position, name in enumerate("ab"):
        head = BilateralHead(BilateralHead.Config(), width, classes, position).double()
        with torch.no_grad():
            head.weight.copy_(torch.tensor(weight[:, position * width : (position + 1) * width]))
            if position == 0:
                head.bias.copy_(torch.tensor(bias))
        experts[name] = Expert(nn.Identity(), head)
    labels = torch.tensor(np.stack([y_a, y_b]))
    partner = Batch(torch.tensor(f_b), labels[1], labels[1])
    batch = Batch(torch.tensor(f_a), labels[0], labels[0], partner=partner)
    objective = BBN(BBN.Config(), torch.arange(1, classes + 1), 2)
    flow = Bilateral(Bilateral.Config(scale=scale), objective, ("a", "b"), lambda *words: 0)
    now = at(epoch=7, epochs=20)
    half_EBC, _ = run_together(flow, Ensemble(nn.Identity(), experts), batch, now)
    loss, _ = objective(half_EBC, labels, StepContext(objective.denominators(labels, now), now))
    alpha = 1 - (6 / 20) ** 2
    assert loss.item() == pytest.approx(bbn_in_numpy(f_a, f_b, weight, bias, y_a, y_b, alpha, scale), rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.75, 0.0])
def test_gradient_is_the_closed_form(alpha):
    """dL/dz = (softmax(z) - alpha onehot(y_a) - (1 - alpha) onehot(y_b)) / B, the same for both halves."""
    draws = torch.Generator().manual_seed(0)
    half_EBC = torch.randn(2, 2, 3, generator=draws, dtype=torch.float64, requires_grad=True)
    bbn_loss(half_EBC, LABELS, alpha=alpha, rest=1 - alpha, images=torch.tensor(2.0))[0].backward()
    a, b = torch.nn.functional.one_hot(LABELS, 3).double()
    expected = (half_EBC.detach().sum(dim=0).softmax(dim=-1) - alpha * a - (1 - alpha) * b) / 2
    torch.testing.assert_close(half_EBC.grad, expected.expand(2, -1, -1), atol=1e-12, rtol=1e-12)


def test_a_half_is_drawn_as_of_the_whole_layer_and_only_the_first_has_a_bias():
    """torch draws weights and bias of a layer with n inputs uniformly within 1 / sqrt(n); here n = 2 x 200."""
    torch.manual_seed(0)
    first, second = (BilateralHead(BilateralHead.Config(), 200, 50, position) for position in (0, 1))
    for head in (first, second):
        assert head.weight.shape == (50, 200)
        assert 0.0499 < head.weight.abs().max() <= 0.05
    assert first.bias.abs().max() <= 0.05
    assert second.bias is None
    assert (
        sum(p.numel() for head in (first, second) for p in head.parameters()) == nn.Linear(400, 50).weight.numel() + 50
    )


def test_alpha_is_the_parabola():
    assert [cumulative_alpha(e, 4) for e in range(1, 6)] == [1, 15 / 16, 3 / 4, 7 / 16, 0]


@pytest.mark.parametrize("num_experts", [1, 3])
def test_other_numbers_of_branches_are_refused(num_experts):
    with pytest.raises(ValueError, match=rf"'bbn': method\.num_experts = {num_experts}; it takes 2"):
        BBN(BBN.Config(), COUNTS, num_experts)
