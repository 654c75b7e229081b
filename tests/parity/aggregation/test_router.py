"""RIDE's router: gate, targets and loss against numbers from the published code, and against NumPy.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `ea_resnet_cifar.ResNet_s.forward` with logits
and scores injected (float32) and `pred_expert_help` (float64), on CPU, printed to 6 decimals. Tolerance: half a unit of
the last decimal, and float32's rounding of a loss of 14.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from aggregation.aggregator import Outputs
from aggregation.router import Final, Hidden, RideRouter, RouterFlow, RouterObjective, gate_targets, running_correct
from aggregation.router import Router as RouterAggregator
from experts.backbones.resnet_cifar import ResNetCifar
from experts.batches import Batch
from experts.data.keyed_random import key
from experts.ensemble import EnsembleConfig, build_ensemble, part_of
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.objective import StepContext
from experts.progress import Progress
from tests.networks import run_apart, run_together

COUNTS = torch.tensor([300, 60, 12, 1])
NAMES = ("one", "two", "three")
NOW = Progress(epoch=1, epochs=5)
LOGITS = [
    [[2, 0, 0, 1], [0, 1, 0.5, 0], [0.2, 0.1, 0, 0], [1, 0, 0, 3]],
    [[0, 1, 0, 0], [0, 0, 3, 0], [0, 2, 0, 0], [0, 0, 0, 1]],
    [[0, 0, 0, 3], [0, 4, 0, 0], [5, 0, 0, 0], [0, 0, 2, 0]],
]
LABELS = torch.tensor([0, 2, 1, 3])
GATES = [[0.3, -0.2, 1, -1.5], [0.1, 0.4, -0.6, -2], [7, 7, 7, 7]]  # the last expert's is not looked at


def outputs_EBX(dtype=torch.float64):
    return torch.cat([torch.tensor(LOGITS, dtype=dtype), torch.tensor(GATES, dtype=dtype)[..., None]], dim=-1)


def objective(num_experts=3, **settings):
    return RouterObjective(RouterObjective.Config(**settings), COUNTS, num_experts)


def loss_of(outputs, labels=LABELS, **settings):
    router = objective(len(outputs), **settings)
    return router(outputs, labels, StepContext(router.denominators(labels, NOW), NOW))


# Targets and loss


def test_running_predictions_and_targets():
    correct = running_correct(torch.tensor(LOGITS), LABELS)
    assert correct.int().tolist() == [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]
    assert gate_targets(correct).int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_published_one(dtype):
    loss, terms = loss_of(outputs_EBX(dtype))
    assert loss.item() == pytest.approx(14.302207, abs=2e-6)
    assert terms["gate"].sum().item() == pytest.approx(2 * loss.item(), rel=1e-6)
    assert terms["gate"][-1] == 0
    assert terms["wanted"].tolist() == [0.5, 0, 0]
    assert terms["asked"].tolist() == [0.5, 0.5, 0]


def router_in_numpy(outputs, labels, pos_weight):
    """The published rule, one gate and one image at a time."""
    experts, images = len(outputs), len(labels)
    logits, scores = outputs[..., :-1], outputs[..., -1]
    total = 0.0
    for i in range(1, experts):
        for b, y in enumerate(labels):
            right = [np.argmax(logits[:j, b].mean(axis=0)) == y for j in range(i, experts + 1)]
            target = float(not right[0] and any(right[1:]))
            p = 1 / (1 + np.exp(-scores[i - 1, b]))
            total -= (pos_weight * target * np.log(p) + (1 - target) * np.log(1 - p)) / images / (experts - 1)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_experts", [2, 3, 5])
def test_loss_equals_the_rule_in_float64(num_experts, seed):
    rng = np.random.default_rng(seed)
    outputs, labels = rng.normal(size=(num_experts, 40, 5)) * 2, rng.integers(0, 4, size=40)
    loss, terms = loss_of(torch.tensor(outputs), torch.tensor(labels), pos_weight=20.0)
    assert terms["wanted"].max() > 0
    assert loss.item() == pytest.approx(router_in_numpy(outputs, labels, 20.0), rel=1e-12)


def test_gradient_is_the_closed_form_and_none_goes_to_logits():
    """dL/ds = ((1 - t) sigmoid(s) - w t (1 - sigmoid(s))) / (G B), 0 for the last expert's column."""
    leaf = outputs_EBX().requires_grad_()
    loss_of(leaf)[0].backward()
    target = torch.tensor([[0.0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    p = outputs_EBX()[:2, :, -1].sigmoid()
    expected = ((1 - target) * p - 100 * target * (1 - p)) / 8
    torch.testing.assert_close(leaf.grad[:2, :, -1], expected, atol=1e-12, rtol=1e-12)
    assert torch.count_nonzero(leaf.grad[:, :, :-1]) == 0
    assert torch.count_nonzero(leaf.grad[2]) == 0


def test_pieces_of_a_batch_add_up_and_an_empty_one_is_zero():
    router, whole = objective(), outputs_EBX()
    denominators = router.denominators(LABELS, NOW)
    loss, terms = router(whole, LABELS, StepContext(denominators, NOW))
    pieces = [router(whole[:, rows], LABELS[rows], StepContext(denominators, NOW)) for rows in ([0, 2], [], [3, 1])]
    assert pieces[1][0] == 0
    torch.testing.assert_close(sum(piece[0] for piece in pieces), loss, atol=1e-12, rtol=1e-12)
    for name, term in terms.items():
        torch.testing.assert_close(sum(piece[1][name] for piece in pieces), term, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_experts", [0, 1, 9])
def test_a_wrong_number_of_experts_is_refused_by_name(num_experts):
    with pytest.raises(ValueError, match=rf"'router'.*method.num_experts = {num_experts}"):
        objective(num_experts)


def test_outputs_without_a_column_of_scores_and_wrong_labels_are_refused():
    router = objective()
    with pytest.raises(ValueError, match="objective 'router'"):
        router(torch.tensor(LOGITS), LABELS, StepContext(router.denominators(LABELS, NOW), NOW))
    for label in (4, -1):
        with pytest.raises((IndexError, RuntimeError)):
            loss_of(outputs_EBX(), torch.tensor([0, 2, label, 3]))


# Gate


def test_score_of_a_gate():
    maps = torch.sin(0.3 * torch.arange(2 * 64 * 4, dtype=torch.float64)).reshape(2, 64, 2, 2)
    router = RideRouter(RideRouter.Config(top_k=2))
    hidden, final = router.hidden(64).double(), router.final(4).double()
    with torch.no_grad():
        hidden.linear.weight.copy_(0.1 * torch.cos(torch.arange(16.0 * 64, dtype=torch.float64)).reshape(16, 64))
        hidden.linear.bias.fill_(0.05)
        final.linear.weight.copy_(0.2 * torch.cos(0.5 * torch.arange(18, dtype=torch.float64))[None])
        final.linear.bias.fill_(-0.1)
    running = torch.tensor([[1.0, 3, 2, 0], [0.5, -1, 4, 2.5]], dtype=torch.float64)
    found = final(hidden(maps.mean(dim=(2, 3))), running)
    torch.testing.assert_close(found.detach(), torch.tensor([0.851682, 1.141224]).double(), atol=6e-7, rtol=0)


def test_a_gate_sees_at_most_as_many_logits_as_there_are_classes():
    router = RideRouter(RideRouter.Config())
    assert router.final(100).linear.in_features == 30 + 16
    assert router.final(10).linear.in_features == 10 + 16


def test_features_of_length_zero_give_a_finite_score():
    """The published gate divides 0 by 0 there."""
    assert torch.isfinite(Final(2, 16)(Hidden(8, 16)(torch.zeros(3, 8)), torch.zeros(3, 4))).all()


# Flow


def ensemble(head=None, **settings):
    return build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=8),
            head or LinearHead.Config(),
            num_classes=4,
            expert_names=NAMES,
            reduce_dimension=True,
            router=RideRouter.Config(top_k=3),
            **settings,
        ),
        seed=1,
    ).double()


def batch(images=6):
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    return Batch(pixels[:images], labels[:images], labels)


def flow():
    return RouterFlow(RouterFlow.Config(), objective(), NAMES, lambda *parts: key(0, "route", *parts))


@pytest.mark.parametrize("shared_head", [False, True], ids=["own heads", "shared head"])
@pytest.mark.parametrize("head", [LinearHead.Config(), CosineHead.Config()], ids=["linear", "cosine"])
def test_outputs_are_the_ensembles_logits_and_scores(head, shared_head):
    net = ensemble(head, shared_head=shared_head).eval()
    outputs, _ = run_together(flow(), net, batch(), NOW)
    logits, scores = net.outputs(batch().images_B3HW)
    assert outputs.shape == (3, 6, 5)
    assert torch.equal(outputs[..., :-1], logits)
    assert torch.equal(outputs[..., -1], scores)
    assert torch.count_nonzero(scores[-1]) == 0


def test_a_gate_sees_its_own_features_and_the_mean_logits_so_far():
    """Once more in NumPy: concat(largest mean logits, relu(W f/|f| + b)) times the shared row."""
    net = ensemble().eval()
    outputs, _ = run_together(flow(), net, batch(), NOW)
    with torch.no_grad():
        h = net.trunk(batch().images_B3HW)
    row, bias = (p.detach().numpy() for p in net.shared["router"].linear.parameters())
    for k, name in enumerate(NAMES[:2]):
        expert = net.experts[name]
        features = expert.features(h).detach().numpy()
        weight, own_bias = (p.detach().numpy() for p in expert.gate.linear.parameters())
        direction = features / np.linalg.norm(features, axis=1, keepdims=True)
        hidden = np.maximum(direction @ weight.T + own_bias, 0)
        mean = outputs[: k + 1, :, :-1].detach().numpy().mean(axis=0)
        largest = -np.sort(-mean, axis=1)[:, :3]
        expected = np.concatenate([largest, hidden], axis=1) @ row[0] + bias[0]
        np.testing.assert_allclose(outputs[k, :, -1].detach().numpy(), expected, rtol=1e-12)


def learn(net):
    router = objective(pos_weight=1.0)
    outputs, _ = run_together(flow(), net, batch(), NOW)
    labels = batch().labels_B
    loss, _ = router(outputs, labels, StepContext(router.denominators(labels, NOW), NOW))
    loss.backward()
    return loss


def test_only_gates_learn_and_nothing_else_moves():
    net = ensemble().eval()
    before = copy.deepcopy(net.state_dict())
    learn(net)
    learned = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert {part_of(name) for name in learned} == RouterFlow.learns == {"gates"}
    assert set(learned) == {name for name, _ in net.named_parameters() if part_of(name) == "gates"}
    assert all(gradient.abs().max() > 0 for gradient in learned.values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_gradient_steps_on_the_gates_lower_the_loss():
    net = ensemble().eval()
    gates = [p for name, p in net.named_parameters() if part_of(name) == "gates"]
    optimizer = torch.optim.SGD(gates, lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(learn(net).item())
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("slot", range(3))
def test_experts_apart_give_the_same_outputs_and_their_gradients_sum_to_the_whole(slot):
    net = ensemble().eval()
    router = objective()
    labels = batch().labels_B
    outputs, gathered = run_together(flow(), net, batch(), NOW)
    router(outputs, labels, StepContext(router.denominators(labels, NOW), NOW))[0].backward()
    whole = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    net.zero_grad()
    for own in range(3):
        apart = run_apart(flow(), net, batch(), NOW, gathered, own)
        if own == slot:
            assert torch.equal(apart, outputs)
        # Also the last expert's worker, which has no gate, has a graph to go back through.
        router(apart, labels, StepContext(router.denominators(labels, NOW), NOW))[0].backward()
    for name, p in net.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name], atol=1e-14, rtol=1e-12)


def test_the_worker_of_the_last_expert_alone_adds_zero_to_the_shared_layer():
    net = ensemble().eval()
    _, gathered = run_together(flow(), net, batch(), NOW)
    apart = run_apart(flow(), net, batch(), NOW, gathered, 2)
    apart.square().sum().backward()
    assert torch.count_nonzero(net.shared["router"].linear.weight.grad) == 0
    assert net.experts["one"].gate.linear.weight.grad is None


def test_an_empty_piece_has_empty_outputs_with_a_graph():
    outputs, _ = run_together(flow(), ensemble().eval(), batch(images=0), NOW)
    assert outputs.shape == (3, 0, 5)
    outputs.sum().backward()


def test_weights_of_an_expert_do_not_depend_on_the_router():
    """A router stage begins with the weights of a stage without one."""
    with_router = ensemble().state_dict()
    plain = build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=8), LinearHead.Config(), num_classes=4, expert_names=NAMES, reduce_dimension=True
        ),
        seed=1,
    ).double()
    assert all(torch.equal(value, with_router[name]) for name, value in plain.state_dict().items())
    assert {part_of(name) for name in set(with_router) - set(plain.state_dict())} == {"gates"}


def test_a_router_trained_to_say_yes_uses_all_experts_and_no_the_first():
    """The gates' scores mean the same to the objective and to the aggregator: above 0 asks on."""
    logits = torch.tensor(LOGITS)
    aggregator = RouterAggregator(RouterAggregator.Config(), COUNTS, NAMES)
    for score, used in ((5.0, 3), (-5.0, 1)):
        outputs = Outputs(logits, gates_EB=torch.full((3, 4), score))
        assert aggregator.experts_used(outputs).tolist() == [used] * 4
        torch.testing.assert_close(aggregator(outputs), logits[:used].mean(dim=0))
