"""H2T's fusion, flow, losses, sampling and learning rates against numbers from the published code and by hand.

Origin of the numbers: Keke921/H2T @ 3dafa70, its fusion routine on CPU, with torch's generator seeded 0 where a
permutation is drawn; head and cross-entropy by the framework; 6 decimals. Tolerance: half a unit of the last decimal.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from aggregation.h2t import H2T, MeanCrossEntropy, fuse
from experts.backbones.resnet_cifar import ResNetCifar
from experts.batches import Batch
from experts.data.keyed_random import key
from experts.ensemble import EnsembleConfig, build_ensemble, part_of
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.losses.cross_entropy import CrossEntropy
from experts.objective import StepContext
from experts.progress import Progress
from experts.samplers.class_balanced import ClassBalanced
from experts.samplers.instance_balanced import InstanceBalanced
from experts.schedules import Cosine, Steps
from tests.networks import run_apart, run_together

COUNTS = torch.tensor([50, 20, 5, 1])
NAMES = ("one", "two", "three")
NOW = Progress(epoch=2, epochs=10, step=3, steps_per_epoch=7)
FIRST, SECOND = torch.tensor([4, 0, 7, 3, 2, 5, 1, 6]), torch.tensor([7, 5, 1, 4, 6, 2, 0, 3])


def close(found, published, atol=6e-7) -> None:
    found = torch.as_tensor(found, dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=atol, rtol=0)


def maps():
    x1 = torch.arange(16.0).reshape(2, 8, 1, 1)
    return x1, -x1 - 100


# Fusion


@pytest.mark.parametrize("ratio", [0.25, 0.3])
def test_two_of_eight_channels_come_from_the_donor(ratio):
    fused = fuse(*maps(), ratio, FIRST)
    close(fused[0].flatten(), [-100, 1, 2, 3, -104, 5, 6, 7], atol=0)
    close(fused[1].flatten(), [-108, 9, 10, 11, -112, 13, 14, 15], atol=0)


def test_a_second_expert_has_its_own_permutation():
    close(fuse(*maps(), 0.25, SECOND)[0].flatten(), [0, 1, 2, 3, 4, -105, 6, -107], atol=0)


def test_swapping_channels_of_maps_before_pooling_is_swapping_pooled_features():
    draws = torch.Generator().manual_seed(0)
    x1, x2 = torch.randn(2, 5, 8, 3, 4, generator=draws, dtype=torch.float64)
    pooled = fuse(x1.mean(dim=(2, 3)), x2.mean(dim=(2, 3)), 0.5, FIRST)
    assert torch.equal(fuse(x1, x2, 0.5, FIRST).mean(dim=(2, 3)), pooled)


@pytest.mark.parametrize(
    ("channels", "ratio", "swapped"),
    [(48, 0.25, 12), (64, 0.25, 16), (64, 0.3, 19), (2048, 0.3, 614), (1536, 0.3, 460)],
)
def test_the_number_of_channels_is_cut_off(channels, ratio, swapped):
    fused = fuse(torch.zeros(1, channels), torch.ones(1, channels), ratio, torch.randperm(channels))
    assert fused.sum() == swapped


def test_ratio_0_is_the_receiver_ratio_1_the_donor_and_inputs_stay_as_they_are():
    x1, x2 = maps()
    assert torch.equal(fuse(x1, x2, 0, FIRST), x1)
    assert torch.equal(fuse(x1, x2, 1, FIRST), x2)
    assert torch.equal(x1, maps()[0])
    assert torch.equal(x2, maps()[1])


def test_inputs_that_do_not_fit_are_refused():
    x1, x2 = maps()
    for receiver, donor, order in ((x1, x2[:1], FIRST), (x1, x2[:, :7], FIRST), (x1, x2, FIRST[:7])):
        with pytest.raises(ValueError, match="one shape"):
            fuse(receiver, donor, 0.25, order)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"flow\.ratio"):
            fuse(x1, x2, ratio, FIRST)
        with pytest.raises(ValueError, match="ratio"):
            H2T.Config(ratio=ratio)


def test_one_step_is_the_published_one():
    f1 = torch.tensor([[1.0, 2, 3, 4], [0, 1, 0, 2]], dtype=torch.float64)
    f2 = torch.tensor([[5.0, 6, 7, 8], [1, 1, 1, 1]], dtype=torch.float64)
    fused = fuse(f1, f2, 0.5, torch.tensor([0, 1, 3, 2]))
    close(fused, [[5, 6, 3, 4], [1, 1, 0, 2]])
    weight = torch.tensor([[0.1, 0.2, 0.3, -0.1], [-0.2, 0.4, 0, 0.5], [0.3, -0.3, 0.2, 0.1]], dtype=torch.float64)
    weight.requires_grad_()
    bias = torch.tensor([0.05, -0.05, 0], dtype=torch.float64, requires_grad=True)
    z = fused @ weight.T + bias
    close(z.detach(), [[2.25, 3.35, 0.7], [0.15, 1.15, 0.2]])
    labels = torch.tensor([2, 0])
    objective = CrossEntropy(CrossEntropy.Config(), torch.tensor([3, 2, 1]), 1)
    loss, _ = objective(z[None], labels, StepContext(objective.denominators(labels, NOW), NOW))
    loss.backward()
    close(loss.detach(), 2.275619)
    close(bias.grad, [-0.276584, 0.641209, -0.364624])
    close(weight.grad[0], [0.197753, 0.316337, 0.355753, -0.316000])


# Flow


def flow(ratio=0.25, seed=0):
    objective = CrossEntropy(CrossEntropy.Config(), COUNTS, 3)
    return H2T(H2T.Config(ratio=ratio), objective, NAMES, lambda *parts: key(seed, "stage", *parts))


def pair():
    draws = torch.Generator().manual_seed(5)
    receiver, donor = torch.randn(2, 6, 3, 8, 8, generator=draws, dtype=torch.float64)
    labels, other = torch.tensor([0, 1, 2, 3, 1, 0]), torch.zeros(6, dtype=torch.int64)
    return Batch(receiver, labels, labels, partner=Batch(donor, other, other))


def ensemble(head=None, **settings):
    return build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=8),
            head or LinearHead.Config(),
            num_classes=4,
            expert_names=NAMES,
            reduce_dimension=False,
            **settings,
        ),
        seed=1,
    ).double()


@pytest.mark.parametrize("head", [LinearHead.Config(), CosineHead.Config()], ids=["linear", "cosine"])
def test_outputs_are_heads_of_features_fused_by_an_order_per_expert(head):
    """Against the same thing written with NumPy, one image and one channel at a time; BatchNorm in eval mode."""
    net, batch, h2t = ensemble(head).eval(), pair(), flow()
    outputs, _ = run_together(h2t, net, batch, NOW)
    with torch.no_grad():
        maps = [net.trunk(images) for images in (batch.images_B3HW, batch.partner.images_B3HW)]
    assert outputs.shape == (3, 6, 4)
    orders = []
    for position, (name, expert) in enumerate(net.experts.items()):
        order = h2t.channels(name, 64, NOW)
        orders.append(order.tolist())
        assert sorted(order) == list(range(64))
        with torch.no_grad():
            f1, f2 = (expert.features(h).numpy().copy() for h in maps)
        for b in range(6):
            for channel in order[:16]:
                f1[b, channel] = f2[b, channel]
        weight = expert.head.weight.detach().numpy()
        if head.name == "linear":
            expected = f1 @ weight.T + expert.head.bias.detach().numpy()
        else:
            lengths = np.linalg.norm(f1, axis=1, keepdims=True) * np.linalg.norm(weight, axis=0)
            expected = 30 * (f1 @ weight) / lengths
        np.testing.assert_allclose(outputs[position].detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_permutations_are_new_every_step_and_epoch_and_the_same_when_asked_again():
    orders = [
        flow(seed=seed).channels(name, 8, Progress(epoch, 10, step, 7)).tolist()
        for seed, name, epoch, step in [(0, "one", 1, 0), (0, "one", 1, 1), (0, "one", 2, 0), (1, "one", 1, 0)]
    ]
    assert len(set(map(tuple, orders))) == 4
    assert flow().channels("one", 8, Progress(1, 10, 0, 7)).tolist() == orders[0]


def test_every_channel_is_swapped_as_often_as_the_ratio_says():
    """400 steps of 2 of 8 channels: 100 swaps per channel expected, standard deviation 8.7, limits at 5 of them."""
    swapped = torch.zeros(8)
    for step in range(400):
        swapped[flow().channels("one", 8, Progress(1, 1, step, 400))[:2]] += 1
    assert swapped.sum() == 800
    assert (swapped - 100).abs().max() < 44


def test_only_heads_learn():
    net = ensemble()
    outputs, _ = run_together(flow(), net, pair(), NOW)
    outputs.square().sum().backward()
    learned = {part_of(name) for name, p in net.named_parameters() if p.grad is not None}
    assert learned == H2T.learns & {part_of(name) for name, _ in net.named_parameters()} == {"heads"}
    assert all(p.grad.abs().max() > 0 for name, p in net.named_parameters() if part_of(name) == "heads")


def test_a_shared_head_gets_fused_features_too():
    """ResLT's host: experts hand their features to one head. At ratio 1 every output is the donor's."""
    net, batch = ensemble(shared_head=True).eval(), pair()
    outputs, _ = run_together(flow(ratio=1), net, batch, NOW)
    torch.testing.assert_close(outputs, net(batch.partner.images_B3HW))
    outputs.sum().backward()
    assert net.shared["head"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("slot", range(3))
def test_experts_apart_give_the_same_outputs(slot):
    net, batch = ensemble().eval(), pair()
    outputs, gathered = run_together(flow(), net, batch, NOW)
    apart = run_apart(flow(), net, batch, NOW, gathered, slot)
    assert torch.equal(apart, outputs)
    assert apart.requires_grad


def test_running_statistics_see_the_receiver_first_then_the_donor():
    """BatchNorm in train mode: the trunk, then every expert, on the receiver and only then on the donor."""
    net, batch = ensemble().train(), pair()
    expected = copy.deepcopy(net)
    with torch.no_grad():
        maps = [expected.trunk(images) for images in (batch.images_B3HW, batch.partner.images_B3HW)]
        for expert in expected.experts.values():
            for h in maps:
                expert.features(h)
    run_together(flow(), net, batch, NOW)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.num_batches_tracked == 2 for m in norms)
    for (name, found), wanted in zip(net.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(found, wanted), name


def test_a_batch_without_partner_is_refused():
    with pytest.raises(ValueError, match="partner_sampler"):
        run_together(flow(), ensemble(), Batch(*[torch.zeros(1)] * 3), NOW)


def test_an_empty_piece_has_empty_outputs_with_a_graph():
    batch = pair()
    none = Batch(
        batch.images_B3HW[:0],
        batch.labels_B[:0],
        batch.labels_B,
        partner=Batch(batch.images_B3HW[:0], *[torch.ones(0)] * 2),
    )
    outputs, _ = run_together(flow(), ensemble().eval(), none, NOW)
    assert outputs.shape == (3, 0, 4)
    outputs.sum().backward()


# Loss of the mean


@pytest.mark.parametrize("seed", range(3))
def test_mean_cross_entropy_and_its_gradient_are_the_closed_forms(seed):
    """L = CE of the mean; dL/dz_k = (softmax(mean) - onehot(y)) / (E B) for every expert. Tolerance: order of sums."""
    rng = np.random.default_rng(seed)
    z, labels = rng.normal(size=(3, 5, 4)) * 4, rng.integers(0, 4, size=5)
    leaf, labels_B = torch.tensor(z, requires_grad=True), torch.tensor(labels)
    objective = MeanCrossEntropy(MeanCrossEntropy.Config(), COUNTS, 3)
    loss, terms = objective(leaf, labels_B, StepContext(objective.denominators(labels_B, NOW), NOW))
    loss.backward()
    mean = z.mean(axis=0)
    p = np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True)
    assert loss.item() == pytest.approx(-np.log(p[range(5), labels]).mean(), rel=1e-12)
    assert terms["cross_entropy"] == loss
    np.testing.assert_allclose(leaf.grad, np.broadcast_to((p - np.eye(4)[labels]) / 15, z.shape), atol=1e-13)


# Learning rates and sampling


def test_learning_rate_of_the_second_stage():
    published = [
        0.02,
        0.01951057,
        0.01809017,
        0.01587785,
        0.01309017,
        0.01,
        0.00690983,
        0.00412215,
        0.00190983,
        0.00048943,
    ]
    schedule = Cosine(Cosine.Config())
    close([0.02 * schedule.factor(Progress(e + 1, 10)) for e in range(10)], published, atol=6e-9)


def test_learning_rate_of_the_first_stage():
    milestones = [{"after_epoch": 160, "factor": 0.1}, {"after_epoch": 180, "factor": 0.01}]
    schedule = Steps(Steps.Config(warmup_epochs=5, milestones=milestones))
    close([0.1 * schedule.factor(Progress(e + 1, 200)) for e in (0, 4, 159, 160, 180)], [0.02, 0.1, 0.1, 0.01, 0.001])


def test_receivers_are_balanced_and_donors_as_the_images_are():
    labels = np.repeat(np.arange(4), COUNTS.numpy())
    receivers = ClassBalanced(ClassBalanced.Config(form="multinomial"), labels, 4)
    donors = InstanceBalanced(InstanceBalanced.Config(), labels, 4)
    np.testing.assert_allclose(receivers.class_probabilities(NOW), [0.25] * 4, rtol=1e-12)
    np.testing.assert_allclose(donors.class_probabilities(NOW), COUNTS.numpy() / 76, rtol=1e-12)
