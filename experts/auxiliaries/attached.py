"""Auxiliaries on the experts of an ensemble, and copies of the network that follow it by a momentum.

A momentum copy is trunk, features and the embeddings of the auxiliaries that ask for it, once more. Nothing learns in
it. After each step it goes a part of the way to the network: copy = m copy + (1 - m) network, BatchNorm's statistics
apart, which it gathers itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings
from experts.ensemble import Ensemble, EnsembleConfig, Expert, keyed_draws
from experts.registry import build


def attach(
    model: Ensemble,
    configs: Mapping[str, AuxiliarySettings],
    parts: EnsembleConfig,
    counts_C: Tensor,
    *,
    seed: int,
    stage: str,
) -> None:
    """Give the experts of an ensemble their auxiliaries, and the copies that these ask for.

    The initial weights of each are a function of the seed, the stage, its name and the expert's.

    Args:
        model: on the CPU, with the weights that copies begin with.
        configs: of the auxiliaries, by name.
        parts: of the ensemble.
        counts_C: training images per class.
        seed: of the run.
        stage: its name.

    Raises:
        ValueError: an auxiliary refuses the counts.
    """
    for expert_name, expert in zip(model.names, model.members(), strict=True):
        for name, config in configs.items():
            if config.experts is None or expert_name in config.experts:
                with keyed_draws(seed, f"auxiliary/{stage}/{name}/{expert_name}"):
                    width = parts.trunk_channels if config.on_trunk else parts.num_features
                    expert.auxiliaries[name] = build("auxiliary", config, width, counts_C)
                auxiliaries_of(expert)[name].meet(expert.head)
        copied = {n: a.embed for n, a in auxiliaries_of(expert).items() if a.config.momentum_copy is not None}
        if copied:
            twins = {"features": expert.features, "embed": nn.ModuleDict(copied)}
            expert.momentum_copy = copy.deepcopy(nn.ModuleDict(twins))
    if any(config.momentum_copy is not None for config in configs.values()):
        # Whichever experts ask for it: all workers hold the same trunk, and the same copy of it.
        model.trunk_copy = copy.deepcopy(model.trunk)


def auxiliaries_of(expert: Expert) -> dict[str, Auxiliary]:
    """Return an expert's auxiliaries by name."""
    return dict(expert.auxiliaries.items())  # type: ignore[arg-type]


def twins(model: Ensemble) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield every module that has a copy, with the copy."""
    if model.trunk_copy is not None:
        yield model.trunk, model.trunk_copy
    for expert in model.members():
        if expert.momentum_copy is not None:
            yield expert.features, expert.momentum_copy["features"]
            embeds: Any = expert.momentum_copy["embed"]
            for name, embed in embeds.items():
                yield auxiliaries_of(expert)[name].embed, embed


def renew_copies(model: Ensemble) -> None:
    """Make every copy equal to what it is a copy of, because that has got other weights."""
    for module, twin in twins(model):
        twin.load_state_dict(module.state_dict())


class Following:
    """The parameters of a network's copies, which follow.

    Args:
        model: whose parameters have come to stay: no other tensors take their place afterwards.
        momentum: m, the part of the copy that stays in a step.
    """

    def __init__(self, model: Ensemble, momentum: float) -> None:
        pairs = [pair for module, twin in twins(model) for pair in _parameters(module, twin)]
        self._ahead = [parameter.detach() for parameter, _ in pairs]
        self._behind = [twin.detach() for _, twin in pairs]
        self._momentum = momentum

    @torch.no_grad()
    def step(self, ok: Tensor) -> None:
        """Follow by one step where `ok`, a bool scalar on the device."""
        if not self._behind:
            return
        part = ok.to(self._behind[0].dtype) * (1 - self._momentum)
        gaps = torch._foreach_sub(self._ahead, self._behind)
        torch._foreach_mul_(gaps, part)
        torch._foreach_add_(self._behind, gaps)


def _parameters(module: nn.Module, twin: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    ahead = dict(module.named_parameters())
    for name, behind in twin.named_parameters():
        if ahead[name].requires_grad:  # what is frozen stays what it is
            yield ahead[name], behind
