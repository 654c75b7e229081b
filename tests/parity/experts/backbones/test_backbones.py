"""The ResNets, their cuts and the heads against the published networks, with weights filled by a formula.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `model/ldam_drw_resnets`, CPU, float64, BatchNorm
in training mode; parameter counts also kaidic/LDAM-DRW @ 2536330, and for big images the same repository's `fb_resnets`
and Vanint/SADE-AgnosticLT @ cba11b8. BBN: megvii-research/BBN @ 7992e90. ResLT: jiequancui/ResLT @ 9650d93. Tolerance
1e-6: numbers were printed to 6 decimals.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from experts.backbones.resnet_cifar import ResNetCifar
from experts.backbones.resnet_imagenet import Branch, ResNetImageNet
from experts.ensemble import Ensemble, EnsembleConfig, build_ensemble
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.heads.tau_normalised import TauNormalisedHead
from experts.registry import build


def resnet32(head, *, num_classes: int, num_experts: int, reduce_dimension: bool) -> Ensemble:
    return build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=32),
            head,
            num_classes=num_classes,
            expert_names=[f"expert{k}" for k in range(num_experts)],
            reduce_dimension=reduce_dimension,
        ),
        seed=0,
    )


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fill(parameter: torch.Tensor, formula) -> None:
    index = torch.arange(parameter.numel(), dtype=torch.float64)
    parameter.data.copy_(formula(index).view_as(parameter))


def fill_convolutions(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fill(part.weight, lambda i: 0.1 * torch.cos(i))


def formula_images() -> torch.Tensor:
    return torch.sin(0.01 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)


def close(found, published):
    torch.testing.assert_close(found, torch.tensor(published, dtype=found.dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("reduce_dimension", "logits", "features"),
    [
        (
            True,
            [1.360878, 0.325722, -0.866417, -1.645944, -1.652748, -0.885951, 0.302658, 1.347448, 1.754870, 1.342093],
            [1.954749, 1.310390, 1.747348, 2.002814],
        ),
        (
            False,
            [1.572180, 1.058956, 0.032889, -1.016074, -1.564732, -1.392752, -0.572759, 0.539077, 1.381553, 1.567978],
            [1.415200, 1.243507, 1.369112, 1.397825],
        ),
    ],
    ids=["reduced", "unreduced"],
)
def test_scores_are_the_published_ones(reduce_dimension, logits, features):
    net = resnet32(CosineHead.Config(), num_classes=10, num_experts=3, reduce_dimension=reduce_dimension).double()
    fill_convolutions(net)
    for expert in net.experts.values():
        fill(expert.head.weight, lambda i: torch.sin(0.7 * i + 1))
    images = formula_images()
    with torch.no_grad():
        logits_EBC = net(images)
        features_BD = net.experts["expert0"].features(net.trunk(images))

    close(logits_EBC.mean(dim=0)[0], logits)
    close(features_BD[0, :4], features)
    assert torch.equal(logits_EBC[0], logits_EBC[1])
    assert torch.equal(logits_EBC[0], logits_EBC[2])


def test_the_cosine_head_alone_is_the_published_one():
    head = CosineHead(CosineHead.Config(scale=30), 4, 3)
    head.weight.data = torch.tensor([[1.0, 0, -1], [2, 1, 0], [0, 1, 1], [-1, 0.5, 2]])
    scores = head(torch.tensor([[1.0, 2, 3, 4], [0.5, -1, 0, 2]]))
    published = torch.tensor([[2.236068, 25.560386, 22.360680], [-18.708287, 0, 18.708287]])
    torch.testing.assert_close(scores, published, atol=5e-6, rtol=0)  # float32 near 25: 2e-6


def test_parameter_counts_with_reduced_widths():
    net = resnet32(CosineHead.Config(), num_classes=100, num_experts=4, reduce_dimension=True)
    assert num_parameters(net.trunk) == 23_824
    assert {num_parameters(expert) for expert in net.experts.values()} == {253_344}
    assert num_parameters(net) == 1_037_200


@pytest.mark.parametrize(
    ("head", "num_experts", "published"),
    [(LinearHead.Config(), 1, 470_004), (CosineHead.Config(), 1, 469_904), (CosineHead.Config(), 3, 1_362_064)],
    ids=["linear", "cosine", "three-cosine"],
)
def test_parameter_counts_with_full_widths(head, num_experts, published):
    net = resnet32(head, num_classes=100, num_experts=num_experts, reduce_dimension=False)
    assert num_parameters(net) == published


def test_a_branch_of_bbn_is_the_last_block():
    """The features are those of the uncut network at full width: cutting changes nothing."""
    parts = ResNetCifar(ResNetCifar.Config(depth=32, split="last_block"))
    trunk, branches = parts.trunk().double(), [parts.late_stages(reduce_dimension=False).double() for _ in range(2)]
    for part in (trunk, *branches):
        fill_convolutions(part)
    with torch.no_grad():
        h = trunk(formula_images())
        assert h.shape == (2, 64, 8, 8)
        maps = [branch[:-1](h) for branch in branches]  # before the mean over positions
        features_BD = branches[0](h)
    assert torch.cat(maps, dim=1).shape == (2, 128, 8, 8)
    close(features_BD[0, :4], [1.415200, 1.243507, 1.369112, 1.397825])


def test_three_batchnorms_of_reslt_on_one_network():
    net = build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=32, split="branches"),
            LinearHead.Config(),
            num_classes=10,
            expert_names=["H", "M", "T"],
            reduce_dimension=False,
            shared_head=True,
        ),
        seed=0,
    ).double()
    fill_convolutions(net)
    fill(net.shared["head"].weight, lambda i: torch.sin(0.7 * i + 1))
    net.shared["head"].bias.data.zero_()
    for name, (weight, bias) in {"M": (0.5, 0.1), "T": (2.0, -0.3)}.items():
        nn.init.constant_(net.experts[name].features.bn.weight, weight)
        nn.init.constant_(net.experts[name].features.bn.bias, bias)
    with torch.no_grad():
        logits_EBC = net(formula_images())
    published = [
        [0.140198, -0.030019, -0.181258, -0.217905, -0.116792, 0.058157, 0.196339, 0.210395, 0.091439, -0.085325],
        [0.171175, 0.095553, -0.040477, -0.150918, -0.165948, -0.076065, 0.061906, 0.160740, 0.157954, 0.055309],
        [-0.022832, -0.391726, -0.512970, -0.309914, 0.089071, 0.431745, 0.501469, 0.254163, -0.153825, -0.464565],
    ]
    close(logits_EBC[:, 0], published)


RESLT_MAP = [[[1.0, 2], [3, -4]], [[0.5, 0], [-1, 2]]]
RESLT_CONV = [[[1.0, -1], [0.5, 0.5]], [[-1, 2], [0.3, -0.6]], [[1, 1], [-0.5, 0.2]]]
RESLT_HEAD, RESLT_BIAS = [[1.0, 2], [0.5, -0.5], [-1, 3]], [0.1, 0.2, -0.3]
RESLT_EVAL = [[0.569322, -0.199149, 0.530434], [0.142331, 0.159319, -0.111670], [0.498157, 0.557617, -0.390846]]
RESLT_TRAINING = [[3.099985, 0.668748, 0.137498], [3.149985, 0.937496, -0.724998], [2.674987, 0.587498, 0.124998]]


def reslt_parts(eval_order: str) -> tuple[list[Branch], TauNormalisedHead, torch.Tensor]:
    """Branches in evaluation mode, so that new BatchNorm statistics are used; the head is as built."""
    branches = [Branch(2, "conv_first", eval_order).double().eval() for _ in range(3)]
    for branch, rows in zip(branches, RESLT_CONV, strict=True):
        branch.conv.weight.data = torch.tensor(rows, dtype=torch.float64)[:, :, None, None]
    head = TauNormalisedHead(TauNormalisedHead.Config(gamma=0.7), 2, 3).double()
    head.weight.data = torch.tensor(RESLT_HEAD, dtype=torch.float64)
    head.bias.data = torch.tensor(RESLT_BIAS, dtype=torch.float64)
    return branches, head, torch.tensor([RESLT_MAP], dtype=torch.float64)


def test_reslt_in_evaluation_pools_first_and_normalises_the_head():
    branches, head, h = reslt_parts("pool_first")
    with torch.no_grad():
        scores = torch.cat([head.eval()(branch(h)) for branch in branches])
    close(scores, RESLT_EVAL)
    close(scores.sum(dim=0), [1.209810, 0.517788, 0.027918])


def test_reslt_in_training_convolves_first_and_has_a_bias():
    branches, head, h = reslt_parts("conv_first")
    with torch.no_grad():
        scores = torch.cat([head.train()(branch(h)) for branch in branches])
    close(scores, RESLT_TRAINING)


def test_reslt_in_numpy():
    """ReLU(K x / sqrt(1 + eps)) before or after the mean; W x + b in training, (W_c / |W_c|^gamma) x in evaluation."""
    x, kernels = np.array(RESLT_MAP).reshape(2, 4), np.array(RESLT_CONV)
    weight, bias, gamma = np.array(RESLT_HEAD), np.array(RESLT_BIAS), 0.7
    root = np.sqrt(1 + 1e-5)
    pooled_first = np.stack([np.maximum(k @ x.mean(1) / root, 0) for k in kernels])
    conv_first = np.stack([np.maximum(k @ x / root, 0).mean(1) for k in kernels])
    normalised = weight / np.linalg.norm(weight, axis=1, keepdims=True) ** gamma
    np.testing.assert_allclose(pooled_first @ normalised.T, RESLT_EVAL, atol=1e-6, rtol=0)
    np.testing.assert_allclose(conv_first @ weight.T + bias, RESLT_TRAINING, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("training", "order"), [(True, "conv_first"), (True, "pool_first"), (False, "pool_first")])
def test_a_branch_follows_its_order_in_training_and_the_other_in_evaluation(training, order):
    h = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    branch = Branch(4, order if training else "conv_first", "pool_first").train(training)
    found = branch(h)
    weight = branch.conv.weight[:, :, 0, 0]
    mean, variance = branch.bn.running_mean, branch.bn.running_var
    values = h if order == "conv_first" else h.mean(dim=(2, 3), keepdim=True)
    y = torch.einsum("dc,bchw->bdhw", weight, values)
    if training:
        mean, variance = y.mean(dim=(0, 2, 3)), y.var(dim=(0, 2, 3), correction=0)
    y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    torch.testing.assert_close(found, y.relu().mean(dim=(2, 3)), atol=1e-6, rtol=1e-5)


def counts(config, *, reduce_dimension: bool, num_classes: int, head=CosineHead) -> tuple[int, int, int]:
    """Count parameters of the trunk, of an expert's features and of a head, without allocating them."""
    parts = build("model", config)
    with torch.device("meta"):
        features = parts.late_stages(reduce_dimension=reduce_dimension)
        head = head(head.Config(), parts.num_features(reduce_dimension=reduce_dimension), num_classes)
        return num_parameters(parts.trunk()), num_parameters(features), num_parameters(head)


def imagenet(**options):
    return ResNetImageNet.Config(**options)


@pytest.mark.parametrize(
    ("config", "reduce_dimension", "num_classes", "trunk_published", "expert_published", "total_published"),
    [
        (imagenet(depth=10), True, 1000, 313_664, None, 9_401_792),
        (imagenet(depth=50), True, 1000, 1_444_928, 14_077_440, 43_677_248),
        (imagenet(depth=50, cardinality=32), True, 1000, 1_412_416, 13_825_536, 42_889_024),
        (imagenet(depth=50), True, 8142, 1_444_928, None, 76_587_584),
        (imagenet(depth=152), False, 365, 2_565_184, None, 171_543_616),
    ],
    ids=["resnet10", "resnet50", "resnext50", "resnet50-inat", "resnet152-places"],
)
def test_parameter_counts_of_ride_and_tade_on_big_images(
    config, reduce_dimension, num_classes, trunk_published, expert_published, total_published
):
    trunk, features, head = counts(config, reduce_dimension=reduce_dimension, num_classes=num_classes)
    assert trunk == trunk_published
    assert expert_published in (features + head, None)
    assert trunk + 3 * (features + head) == total_published


@pytest.mark.parametrize(
    ("config", "trunk_published", "branch_published"),
    [
        (ResNetCifar.Config(depth=32, split="last_block"), 389_520, 73_984),
        (imagenet(depth=50, split="last_block"), 19_045_440, 4_462_592),
    ],
    ids=["resnet32", "resnet50"],
)
def test_parameter_counts_of_bbn(config, trunk_published, branch_published):
    trunk, features, _ = counts(config, reduce_dimension=False, num_classes=10)
    assert (trunk, features) == (trunk_published, branch_published)


@pytest.mark.parametrize(
    ("config", "num_classes", "branches_published", "total_published"),
    [
        (ResNetCifar.Config(depth=32, split="branches"), 100, 3 * 128, 470_388),
        (imagenet(depth=10, split="branches"), 1000, 789_504, 6_208_296),
        (imagenet(depth=50, cardinality=32, split="branches"), 1000, 12_595_200, 37_624_104),
    ],
    ids=["resnet32", "resnet10", "resnext50"],
)
def test_parameter_counts_of_reslt_with_its_one_head(config, num_classes, branches_published, total_published):
    trunk, features, head = counts(config, reduce_dimension=False, num_classes=num_classes, head=LinearHead)
    assert 3 * features == branches_published
    assert trunk + 3 * features + head == total_published


def test_parameter_counts_of_lfme_with_its_extra_layer():
    """ResNet-10 without a head is 4,905,792 (6,208,296 less ResLT's 789,504 and a head of 513,000); 512 * 513 more."""
    config = imagenet(depth=10, split="whole", extra_layer=True)
    trunk, features, head = counts(config, reduce_dimension=False, num_classes=146, head=LinearHead)
    assert (trunk, features, head) == (0, 4_905_792 + 512 * 513, 513 * 146)


@pytest.mark.parametrize("split", ["ride", "last_stage", "last_block", "whole"])
@pytest.mark.parametrize(
    ("depth", "cardinality", "published"),
    [(50, 1, 25_557_032), (101, 1, 44_549_160), (152, 1, 60_192_808), (50, 32, 25_028_904)],
)
def test_one_expert_of_any_cut_is_torchvisions_network(split, depth, cardinality, published):
    config = imagenet(depth=depth, cardinality=cardinality, split=split)
    assert sum(counts(config, reduce_dimension=False, num_classes=1000, head=LinearHead)) == published


@pytest.mark.parametrize(
    ("config", "torchvision_net"),
    [
        (
            imagenet(depth=10, split="whole"),
            lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1]),
        ),
        (imagenet(depth=50, split="whole"), torchvision.models.resnet50),
        (imagenet(depth=50, cardinality=32, split="whole"), torchvision.models.resnext50_32x4d),
    ],
    ids=["resnet10", "resnet50", "resnext50"],
)
@pytest.mark.slow
def test_features_are_those_of_torchvisions_network_with_the_same_weights(config, torchvision_net):
    """float64, BatchNorm in training mode with at least 9 values per channel, our weights in their network."""
    parts = build("model", config)
    ours = parts.late_stages(reduce_dimension=False).double()
    with torch.device("meta"):
        theirs = torchvision_net()
    theirs.fc = nn.Identity()
    theirs.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()}, assign=True)
    images = torch.sin(torch.arange(1 * 3 * 65 * 65, dtype=torch.float64)).view(1, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), atol=1e-9, rtol=1e-9)
