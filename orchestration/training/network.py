"""One worker's modules, for a flow to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experts.draws import StepDraws
from experts.ensemble import Ensemble
from experts.flow import Result
from orchestration.config.run_config import EngineConfig
from orchestration.training.precision import casting


class HeldModules:
    """The modules that this worker holds; they compute in the type that the run's config says.

    Args:
        model: the modules.
        config: says in what type they compute.
        device: where they are.
        draws: of the step, for flows.
    """

    def __init__(self, model: Ensemble, config: EngineConfig, device: torch.device, draws: StepDraws) -> None:
        self.names = model.names
        self.draws = draws
        self._model, self._config, self._device = model, config, device

    def trunk(self, run: Callable[[nn.Module], Result]) -> Result:
        """See `Network.trunk`."""
        return self._run(run, self._model.trunk)

    def experts(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        """See `Network.experts`."""
        return self._run(run, self._model.experts)

    def shared(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        """See `Network.shared`."""
        return self._run(run, self._model.shared)

    def _run(self, run: Callable[[Any], Result], module: nn.Module) -> Result:
        with casting(self._config, self._device):
            return run(module)
