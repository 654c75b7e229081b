"""ResNet-10, 50, 101 and 152 and ResNeXt-50 and 101 for large images, cut as a method needs it.

Parameters have the names of torchvision's networks, so that weights pretrained on ImageNet fit by name. Images of any
size work, because the features are a mean over positions.

Shapes: B images of H x W pixels; D features.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from experts.backbones.batchnorm import BatchNorm2d
from experts.backbones.splits import GlobalMean, Split, SplitResNet
from experts.cases import Case
from experts.registry import Settings, register

BLOCKS = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PLANES = (64, 128, 256, 512)
THIN_PLANES = (64, 128, 192, 384)
EXTRA_FEATURES = 512

Order = Literal["conv_first", "pool_first"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution in the shortcut where the shape changes."""

    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions to 4 times the base width; the stride is on the 3x3 one.

    With cardinality 32 (ResNeXt 32x4d) the 3x3 convolution has 32 groups of planes / 16 channels, rounded down.
    """

    expansion = 4

    def __init__(self, in_planes: int, planes: int, stride: int, cardinality: int = 1) -> None:
        super().__init__()
        # 32x4d: 4 channels per group at 64 base channels, and as many more as the stage is wider.
        inner = planes if cardinality == 1 else planes * 4 // 64 * cardinality
        outer = planes * self.expansion
        self.conv1 = nn.Conv2d(in_planes, inner, 1, bias=False)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(in_planes, outer, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


def shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Module:
    """Return the identity, or a 1x1 convolution and BatchNorm where the shape changes."""
    if stride == 1 and in_planes == out_planes:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), BatchNorm2d(out_planes))


class Branch(nn.Module):
    """ResLT's branch: 1x1 convolution, BatchNorm, ReLU and the mean over positions, [B, D, H, W] -> [B, D].

    Pooling first makes the convolution H * W times cheaper. Because of the ReLU it gives another function.
    """

    def __init__(self, num_features: int, order: Order, eval_order: Order) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_features, num_features, 1, bias=False)
        self.bn = BatchNorm2d(num_features)
        self.relu = nn.ReLU(inplace=True)
        self.pool = GlobalMean()
        self.order, self.eval_order = order, eval_order

    def forward(self, h_BDHW: Tensor) -> Tensor:
        if (self.order if self.training else self.eval_order) == "pool_first":
            # Kept as a map of one pixel, so that the same convolution and BatchNorm serve both orders.
            h_BDHW = self.pool(h_BDHW)[:, :, None, None]
        return self.pool(self.relu(self.bn(self.conv(h_BDHW))))

    def extra_repr(self) -> str:
        return f"training={self.order}, evaluation={self.eval_order}"


@register("model", "resnet_imagenet")
class ResNetImageNet(SplitResNet):
    """Four stages of 64, 128, 256 and 512 base channels after a 7x7 convolution and a max-pooling.

    Source: He et al. 2016, arXiv:1512.03385; Xie et al. 2017, arXiv:1611.05431; cuts and widths of the experts as in
    the published code of RIDE (arXiv:2010.01809), BBN (arXiv:1912.02413), LFME (arXiv:2001.01536) and ResLT
    (arXiv:2101.10633). ACE (arXiv:2108.02385) published no code; its cut is our reading of the paper.
    """

    class Config(Settings):
        name: Literal["resnet_imagenet"] = "resnet_imagenet"
        depth: Literal[10, 50, 101, 152] = 50
        """Layers with weights on the main path; 10 has basic blocks, the others bottlenecks."""
        cardinality: Literal[1, 32] = 1
        """Groups of the 3x3 convolutions: 1 is ResNet, 32 is ResNeXt 32x4d, for depth 50 and 101."""
        split: Split = "ride"
        """What each expert owns: ride: stages 3 and 4; last_stage: stage 4; last_block: the last block of stage 4;
        whole: the whole network; branches: a 1x1 convolution on the last map. The rest is the shared trunk."""
        extra_layer: bool = False
        """A linear layer to 512 features and a ReLU before the head, as in OLTR and LFME; needs split whole."""
        branch_order: Order = "conv_first"
        """Order in training of a branch's convolution and its mean over positions, with split branches. Published:
        conv_first for ResNeXt, pool_first for ResNet-10."""
        branch_order_eval: Order = "pool_first"
        """The order in evaluation. Published: pool_first, which is cheaper and gives another function."""
        init: Literal["published", "framework"] = "published"
        """Initial weights of convolutions: published: normal with variance 2 / (kernel area * output channels);
        framework: PyTorch's uniform ones (BBN)."""
        head_init: Literal["framework"] = "framework"
        """Linear layers start as PyTorch makes them. The key exists so that a recipe can set it for every backbone."""

        @model_validator(mode="after")
        def _fits(self) -> ResNetImageNet.Config:
            if self.cardinality == 32 and self.depth not in (50, 101):
                raise ValueError(
                    f"cardinality = 32 with depth = {self.depth}: ResNeXt 32x4d exists for depth 50 and 101; set "
                    f"cardinality = 1, or one of those depths"
                )
            if self.extra_layer and self.split != "whole":
                raise ValueError(
                    f"extra_layer = true with split = '{self.split}': needed split = 'whole', or extra_layer = false"
                )
            return self

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the cheapest depth, and one with several blocks in a stage."""
        return [Case(cls.Config(depth=depth), image_size=40) for depth in (10, 50)]

    def __init__(self, config: Config) -> None:
        super().__init__(
            blocks=BLOCKS[config.depth],
            split=config.split,
            planes=PLANES,
            thin_planes=THIN_PLANES,
            expansion=BasicBlock.expansion if config.depth == 10 else Bottleneck.expansion,
            halvings=5,
        )
        self.config = config

    def stem(self) -> dict[str, nn.Module]:
        return {
            "conv1": nn.Conv2d(3, self.planes[0], 7, stride=2, padding=3, bias=False),
            "bn1": BatchNorm2d(self.planes[0]),
            "relu": nn.ReLU(inplace=True),
            "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
        }

    def block(self, stage: int, index: int, in_planes: int, planes: int) -> nn.Module:
        # The first block of a stage halves the map; for stage 0 the stem has done so.
        stride = 2 if stage and not index else 1
        if self.config.depth == 10:
            return BasicBlock(in_planes, planes, stride)
        return Bottleneck(in_planes, planes, stride, self.config.cardinality)

    def branch(self, num_features: int) -> nn.Module:
        return Branch(num_features, self.config.branch_order, self.config.branch_order_eval)

    def late_stages(self, *, reduce_dimension: bool) -> nn.Module:
        features = super().late_stages(reduce_dimension=reduce_dimension)
        if self.config.extra_layer:
            pooled = super().num_features(reduce_dimension=reduce_dimension)
            features.add_module("fc_add", nn.Linear(pooled, EXTRA_FEATURES))
            features.add_module("fc_relu", nn.ReLU(inplace=True))
        return features

    def num_features(self, *, reduce_dimension: bool) -> int:
        return EXTRA_FEATURES if self.config.extra_layer else super().num_features(reduce_dimension=reduce_dimension)

    def initialise(self, module: nn.Module) -> None:
        """Draw the convolutions; BatchNorm, linear layers and heads stay as made."""
        if self.config.init == "framework":
            return
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                height, width = part.kernel_size
                nn.init.normal_(part.weight, std=math.sqrt(2 / (height * width * part.out_channels)))
        with torch.no_grad():
            for part in module.modules():
                if isinstance(part, Branch):
                    # The published code draws the three branches as one convolution to 3 D channels.
                    part.conv.weight /= math.sqrt(3)
