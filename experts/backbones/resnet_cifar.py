"""ResNet-8, 14, 20 and 32 for small images, the CIFAR network of long-tailed benchmarks, cut as a method needs it.

Shapes: B images of H x W pixels, any H and W; D features.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from experts.backbones.batchnorm import BatchNorm2d
from experts.backbones.splits import GlobalMean, Split, SplitResNet
from experts.cases import Case
from experts.registry import Settings, register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters ("option A")."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.stride = stride
        self.new_planes = planes - in_planes

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1 or self.new_planes:
            # Every second pixel, and the new channels as zeros, half of them before and half after the old ones.
            half = self.new_planes // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


@register("model", "resnet_cifar")
class ResNetCifar(SplitResNet):
    """Three stages of 16, 32 and 64 channels after one 3x3 convolution, and the mean over positions.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2; cuts and widths of the experts as in the published code of
    RIDE (arXiv:2010.01809), BBN (arXiv:1912.02413) and ResLT (arXiv:2101.10633). ACE (arXiv:2108.02385) published no
    code; its cut is our reading of the paper.
    """

    class Config(Settings):
        name: Literal["resnet_cifar"] = "resnet_cifar"
        depth: Literal[8, 14, 20, 32] = 32
        """Layers with weights: 3 stages of (depth - 2) / 6 blocks of two, the first convolution and the head."""
        split: Split = "ride"
        """What each expert owns: ride: stages 2 and 3; last_stage: stage 3; last_block: the last block of stage 3;
        whole: the whole network; branches: a BatchNorm on the last map. The rest is the shared trunk."""
        head_init: Literal["kaiming", "framework"] = "kaiming"
        """Initial weights of a linear head: kaiming: normal with variance 2 / D (RIDE, LDAM, H2T); framework: uniform
        within 1 / sqrt(D) (BBN, ResLT)."""

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the cheapest depth, and one with several blocks in a stage."""
        return [Case(cls.Config(depth=depth), image_size=12) for depth in (8, 14)]

    def __init__(self, config: Config) -> None:
        # RIDE makes each expert thinner, so that three experts cost about twice as much as one network.
        super().__init__(
            blocks=((config.depth - 2) // 6,) * 3,
            split=config.split,
            planes=(16, 32, 64),
            thin_planes=(16, 24, 48),
            halvings=2,
        )
        self.head_init = config.head_init

    def stem(self) -> dict[str, nn.Module]:
        return {"conv1": nn.Conv2d(3, 16, 3, padding=1, bias=False), "bn1": BatchNorm2d(16), "relu": nn.ReLU()}

    def block(self, stage: int, index: int, in_planes: int, planes: int) -> nn.Module:
        return BasicBlock(in_planes, planes, stride=2 if stage and not index else 1)

    def branch(self, num_features: int) -> nn.Module:
        return nn.Sequential(OrderedDict(bn=BatchNorm2d(num_features), pool=GlobalMean()))

    def initialise(self, module: nn.Module) -> None:
        """Draw convolutions and linear heads from a Kaiming normal; BatchNorm, biases and cosine heads stay as made."""
        kinds: tuple[type[nn.Conv2d | nn.Linear], ...] = (nn.Conv2d, nn.Linear)
        if self.head_init == "framework":
            kinds = (nn.Conv2d,)
        for part in module.modules():
            if isinstance(part, kinds):
                nn.init.kaiming_normal_(part.weight)
