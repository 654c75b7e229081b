"""One worker's modules, for a flow to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experts.batches import Batch
from experts.draws import StepDraws
from experts.ensemble import Ensemble
from experts.flow import Result
from experts.progress import Progress
from orchestration.config.run_config import EngineConfig
from orchestration.training.precision import casting


class HeldModules:
    """The modules that this worker holds; they compute in the type that the run's config says.

    Args:
        model: the modules.
        config: says in what type they compute.
        device: where they are.
        draws: of the step, for flows.
        views: of every image, that auxiliaries want to see together.
        watched: whether there are auxiliaries.
        make: see `Network.made`.
    """

    def __init__(
        self,
        model: Ensemble,
        config: EngineConfig,
        device: torch.device,
        draws: StepDraws,
        *,
        views: int = 1,
        watched: bool = False,
        make: Callable[[Tensor, Batch, Progress], Sequence[Tensor]] = lambda h, batch, progress: (),
    ) -> None:
        self.names = model.names
        self.draws, self.views = draws, views
        self._watched, self._make = watched, make
        self._shown: tuple[Sequence[Tensor], Tensor] | None = None
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

    def made(self, h: Tensor, batch: Batch, progress: Progress) -> Sequence[Tensor]:
        """See `Network.made`."""
        return self._make(h, batch, progress)

    def show(self, features: Sequence[Tensor], scores: Tensor) -> None:
        """See `Network.show`."""
        if self._watched:
            self._shown = features, scores

    def take_shown(self) -> tuple[Sequence[Tensor], Tensor]:
        """Return what the flow has shown, and keep it no longer: it holds the graph of a step."""
        assert self._shown is not None, "the flow has shown nothing"
        shown, self._shown = self._shown, None
        return shown

    def _run(self, run: Callable[[Any], Result], module: nn.Module) -> Result:
        with casting(self._config, self._device):
            return run(module)
