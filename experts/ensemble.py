"""An ensemble: a trunk that experts share, and the experts by name.

Shapes: E experts held here, B images, D features, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from experts.registry import build


class Expert(nn.Module):
    """Late stages and a head. The two are apart, because some methods mix the features of several images."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, h: Tensor) -> Tensor:
        """Trunk output to logits [B, C]; `features(h)` gives [B, D], `head` the rest."""
        return self.head(self.features(h))


class Ensemble(nn.Module):
    """The experts that live in one place, on their own copy of the trunk.

    Attributes:
        trunk: images [B, 3, H, W] to what every expert starts from.
        experts: name to `Expert`, in the order of the logits.
    """

    def __init__(self, trunk: nn.Module, experts: dict[str, Expert]) -> None:
        super().__init__()
        self.trunk = trunk
        self.experts = nn.ModuleDict(experts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts held, in the order of the logits."""
        return tuple(self.experts)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits of the experts held, [E, B, C]."""
        h = self.trunk(images_B3HW)
        return torch.stack([expert(h) for expert in self.experts.values()])


def build_ensemble(
    backbone_config: Any,
    head_config: Any,
    *,
    num_classes: int,
    expert_names: Sequence[str],
    reduce_dimension: bool,
    seed: int,
    only: Sequence[str] | None = None,
) -> Ensemble:
    """Build the trunk and some or all experts, on the CPU, in float32.

    The weights of the trunk and of each expert are a pure function of the seed and of "trunk" or the expert's name:
    they depend neither on which other experts are built nor on any generator's state, and leave the latter alone.

    Args:
        backbone_config: config of a registered "model".
        head_config: config of a registered "head".
        num_classes: C, at least 2.
        expert_names: all experts of the ensemble, in the order of the logits.
        reduce_dimension: thinner late stages, as RIDE has them.
        seed: of the run.
        only: the experts to build, in any order; all if None.

    Raises:
        ValueError: no expert, a name that is used twice or cannot be a key, a name in `only` that is not an expert's,
            or fewer than 2 classes.
    """
    check_names(expert_names)
    chosen = list(expert_names) if only is None else list(only)
    unknown = [name for name in chosen if name not in expert_names]
    if unknown or not chosen:
        raise ValueError(
            f"experts to build: {', '.join(map(repr, chosen)) or 'none'}; needed one or more of "
            f"{', '.join(map(repr, expert_names))}"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes = {num_classes}; a classifier needs at least 2")
    backbone = build("model", backbone_config)
    with keyed_draws(seed, "trunk"):
        trunk = backbone.trunk()
        backbone.initialise(trunk)
    experts = {}
    for name in expert_names:
        if name not in chosen:
            continue
        with keyed_draws(seed, f"expert/{name}"):
            features = backbone.late_stages(reduce_dimension=reduce_dimension)
            num_features = backbone.num_features(reduce_dimension=reduce_dimension)
            experts[name] = Expert(features, build("head", head_config, num_features, num_classes))
            backbone.initialise(experts[name])
    return Ensemble(trunk, experts)


def check_names(expert_names: Sequence[str]) -> None:
    """Refuse names that cannot tell experts apart in logs and files.

    Raises:
        ValueError: no name, a name that is used twice, empty, has a dot, or is "ensemble" or "trunk".
    """
    if not expert_names:
        raise ValueError("an ensemble needs at least 1 expert; set method.num_experts to 1 or more")
    for name in expert_names:
        if not name or "." in name or name in ("ensemble", "trunk"):
            raise ValueError(f"expert name '{name}': needs a word without dots other than 'ensemble' and 'trunk'")
        if list(expert_names).count(name) > 1:
            raise ValueError(f"expert name '{name}' is used twice; every expert needs its own")


@contextmanager
def keyed_draws(seed: int, key: str) -> Iterator[None]:
    """Inside, torch's CPU draws are a function of (seed, key); outside, the generator is as it was."""
    digest = hashlib.sha256(f"initial weights/{seed}/{key}".encode()).digest()
    default_dtype = torch.get_default_dtype()
    # The CPU generator alone: torch.manual_seed would reach for accelerators, which a driver must not touch.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
