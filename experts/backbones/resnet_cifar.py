"""ResNet-8, 14, 20 and 32 for small images: the long-tailed benchmarks' CIFAR network, split as RIDE splits it.

Shapes: B images of H x W pixels, any H and W; D features.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experts.registry import Settings, register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters ("option A")."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        self.new_planes = planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.new_planes:
            half = self.new_planes // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


def stage(blocks: int, in_planes: int, planes: int, stride: int) -> nn.Sequential:
    """Residual blocks of one width, the first of which may change width and resolution."""
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))


class Trunk(nn.Module):
    """First convolution and stage 1: [B, 3, H, W] -> [B, 16, H, W]."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(blocks, 16, 16, 1)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.layer1(F.relu(self.bn1(self.conv1(images_B3HW))))


class LateStages(nn.Module):
    """Stages 2 and 3 and the mean over positions: [B, 16, H, W] -> [B, D]."""

    def __init__(self, blocks: int, planes2: int, planes3: int) -> None:
        super().__init__()
        self.layer2 = stage(blocks, 16, planes2, 2)
        self.layer3 = stage(blocks, planes2, planes3, 2)

    def forward(self, h_B16HW: Tensor) -> Tensor:
        return self.layer3(self.layer2(h_B16HW)).mean(dim=(2, 3))


@register("model", "resnet_cifar")
class ResNetCifar:
    """Makes the parts of the network; every call of a method makes new, untrained ones.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2; widths of the experts and the split as in the published code
    of RIDE (arXiv:2010.01809).
    """

    class Config(Settings):
        name: Literal["resnet_cifar"] = "resnet_cifar"
        depth: Literal[8, 14, 20, 32] = 32
        """Layers with weights: 3 stages of (depth - 2) / 6 blocks of two, the first convolution and the head."""

    def __init__(self, config: Config) -> None:
        self.blocks = (config.depth - 2) // 6

    def trunk(self) -> nn.Module:
        """What experts share."""
        return Trunk(self.blocks)

    def late_stages(self, *, reduce_dimension: bool) -> nn.Module:
        """What an expert owns before its head, with `num_features` outputs."""
        return LateStages(self.blocks, *self.widths(reduce_dimension))

    def num_features(self, *, reduce_dimension: bool) -> int:
        """D."""
        return self.widths(reduce_dimension)[-1]

    @staticmethod
    def widths(reduce_dimension: bool) -> tuple[int, int]:
        """Channels of stages 2 and 3; RIDE makes each expert thinner, so that three cost about twice one network."""
        return (24, 48) if reduce_dimension else (32, 64)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        """Kaiming-normal weights in convolutions and linear heads; BatchNorm, biases and cosine heads stay as made."""
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight)
