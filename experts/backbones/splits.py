"""The cuts of a residual network into a trunk that experts share and the stages that each expert owns.

    ride        the last two stages are the expert's                                RIDE, TADE
    last_stage  the last stage is the expert's                                      ACE
    last_block  the last residual block is the expert's                             BBN
    whole       everything is the expert's; the trunk hands the images on           LFME
    branches    nothing but a light branch after the last block is the expert's     ResLT

Parameters keep the names they have in the whole network ("layer3.4.conv1.weight"), in the trunk and in the experts, so
weights of a whole network fit any cut by name.

Shapes: B images, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn

from experts.backbones.batchnorm import counted

Split = Literal["ride", "last_stage", "last_block", "whole", "branches"]


class GlobalMean(nn.Module):
    """The mean over all positions of a map of any size: [B, D, H, W] -> [B, D]."""

    def forward(self, h_BDHW: Tensor) -> Tensor:
        return h_BDHW.mean(dim=(2, 3))


class SplitResNet(ABC):
    """Builds the parts of a residual network; every call of a method builds new, untrained ones.

    A subclass defines `stem`, `block`, `branch` and `initialise`.

    Args:
        blocks: residual blocks of every stage.
        split: where to cut.
        planes: base width of every stage.
        thin_planes: the same for experts that are made thinner.
        expansion: channels that leave a block over its base width.
        halvings: how often the map is halved on the way through the whole network.
    """

    def __init__(
        self,
        *,
        blocks: tuple[int, ...],
        split: Split,
        planes: tuple[int, ...],
        thin_planes: tuple[int, ...],
        expansion: int = 1,
        halvings: int,
    ) -> None:
        self.blocks = blocks
        self.split = split
        self.planes = planes
        self.thin_planes = thin_planes
        self.expansion = expansion
        self.halvings = halvings
        # The network as one row of blocks: a cut is then a number of blocks from the start, even inside a stage.
        self.places = [(stage, index) for stage, number in enumerate(blocks) for index in range(number)]
        self.num_shared_blocks = {
            "ride": sum(blocks[:-2]),
            "last_stage": sum(blocks[:-1]),
            "last_block": sum(blocks) - 1,
            "whole": 0,
            "branches": sum(blocks),
        }[split]

    @abstractmethod
    def stem(self) -> dict[str, nn.Module]:
        """Return the layers before the first residual block, by name."""

    @abstractmethod
    def block(self, stage: int, index: int, in_planes: int, planes: int) -> nn.Module:
        """Return residual block `index` of a stage, both counted from 0; the block takes in_planes channels."""

    @abstractmethod
    def branch(self, num_features: int) -> nn.Module:
        """Return an expert of the split "branches": [B, D, H, W] -> [B, D]."""

    @abstractmethod
    def initialise(self, module: nn.Module) -> None:
        """Draw the initial weights of a trunk, an expert or a head."""

    def trunk(self) -> nn.Module:
        """Return the part that experts share: [B, 3, H, W] to the map at the cut."""
        if self.split == "whole":
            return nn.Identity()
        return counted(_chain(self.stem() | self._stages(0, self.num_shared_blocks, self.planes)))

    def late_stages(self, *, reduce_dimension: bool) -> nn.Module:
        """Return the part that an expert owns before its head: the trunk's output to [B, D].

        Raises:
            ValueError: `reduce_dimension` with a split whose experts have no stage of their own.
        """
        if self.split == "branches":
            return counted(self.branch(self.num_features(reduce_dimension=reduce_dimension)))
        parts = self.stem() if self.split == "whole" else {}
        parts |= self._stages(self.num_shared_blocks, len(self.places), self.widths(reduce_dimension))
        return counted(_chain({**parts, "pool": GlobalMean()}))

    def num_features(self, *, reduce_dimension: bool) -> int:
        """Return D."""
        return self.widths(reduce_dimension)[-1] * self.expansion

    @property
    def experts_have_maps(self) -> bool:
        """Whether every expert has a last map of its own, that attention can be put on."""
        return self.split != "branches"

    def map_shape(self, image_size: int, *, reduce_dimension: bool) -> tuple[int, int]:
        """Return the channels and the side of an expert's last map, before the mean over its positions.

        Args:
            image_size: side of the images, pixels.
            reduce_dimension: as for `late_stages`.
        """
        side = image_size
        for _ in range(self.halvings):
            side = -(-side // 2)  # a convolution of stride 2 keeps the odd row
        return self.widths(reduce_dimension)[-1] * self.expansion, side

    @property
    def trunk_channels(self) -> int:
        """The channels of the trunk's output."""
        if not self.num_shared_blocks:
            return 3 if self.split == "whole" else self.planes[0]
        stage, _ = self.places[self.num_shared_blocks - 1]
        return self.planes[stage] * self.expansion

    def widths(self, reduce_dimension: bool) -> tuple[int, ...]:
        """Return the base width of every stage on the way through an expert; stages in the trunk keep their full width.

        Raises:
            ValueError: `reduce_dimension` with a split whose experts have no stage of their own.
        """
        if not reduce_dimension:
            return self.planes
        if self.split in ("last_block", "branches"):
            raise ValueError(
                f"method.reduce_dimension = true with backbone.split = '{self.split}': it makes whole stages of the "
                f"experts thinner, and here they own none; set method.reduce_dimension = false, or backbone.split to "
                f"'ride', 'last_stage' or 'whole'"
            )
        # Full width before the cut: the trunk is one for all experts, whatever width they have.
        shared = {"ride": len(self.blocks) - 2, "last_stage": len(self.blocks) - 1, "whole": 0}[self.split]
        return self.planes[:shared] + self.thin_planes[shared:]

    def _stages(self, start: int, stop: int, widths: tuple[int, ...]) -> dict[str, nn.Module]:
        """Return residual blocks start to stop - 1 of the network, grouped by stage, under their names."""
        stages: dict[str, dict[str, nn.Module]] = {}
        for stage, index in self.places[start:stop]:
            # Later blocks continue their own stage, a first block the stage before, and the very first block the stem.
            if index:
                in_planes = widths[stage] * self.expansion
            else:
                in_planes = widths[stage - 1] * self.expansion if stage else widths[0]
            block = self.block(stage, index, in_planes, widths[stage])
            stages.setdefault(f"layer{stage + 1}", {})[str(index)] = block
        return {name: _chain(blocks) for name, blocks in stages.items()}


def _chain(parts: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))
