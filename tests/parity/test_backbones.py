"""The ResNet and the cosine head against the published networks, with weights filled by a formula.

Origin of the numbers: frank-xwang/RIDE-LongTailRecognition @ ab8be5c, `model/ldam_drw_resnets`, CPU, float64, BatchNorm
in training mode; parameter counts also kaidic/LDAM-DRW @ 2536330. Tolerance 1e-6: numbers were printed to 6 decimals.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experts.backbones.resnet_cifar import ResNetCifar
from experts.ensemble import Ensemble, build_ensemble
from experts.heads import CosineHead, LinearHead


def resnet32(head, *, num_classes: int, num_experts: int, reduce_dimension: bool) -> Ensemble:
    return build_ensemble(
        ResNetCifar.Config(depth=32),
        head,
        num_classes=num_classes,
        expert_names=[f"expert{k}" for k in range(num_experts)],
        reduce_dimension=reduce_dimension,
        seed=0,
    )


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def fill(parameter: torch.Tensor, formula) -> None:
    index = torch.arange(parameter.numel(), dtype=torch.float64)
    parameter.data.copy_(formula(index).view_as(parameter))


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
def test_f6_forward(reduce_dimension, logits, features):
    net = resnet32(CosineHead.Config(), num_classes=10, num_experts=3, reduce_dimension=reduce_dimension).double()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fill(module.weight, lambda i: 0.1 * torch.cos(i))
        elif isinstance(module, CosineHead):
            fill(module.weight, lambda i: torch.sin(0.7 * i + 1))
    images = torch.sin(0.01 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    with torch.no_grad():
        logits_EBC = net(images)
        features_BD = net.experts["expert0"].features(net.trunk(images))

    def close(found, published):
        torch.testing.assert_close(found, torch.tensor(published, dtype=torch.float64), atol=1e-6, rtol=0)

    close(logits_EBC.mean(dim=0)[0], logits)
    close(features_BD[0, :4], features)
    assert torch.equal(logits_EBC[0], logits_EBC[1])
    assert torch.equal(logits_EBC[0], logits_EBC[2])


def test_cosine_head_alone():
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
