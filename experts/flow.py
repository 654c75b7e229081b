"""Flows take the images of a step to the outputs that the objective reads: one piece of kind "flow" per stage.

A worker holds a copy of the trunk, some of the experts, and a copy of whatever lies after all experts. A flow computes
its experts' outputs; the other experts' come in detached. The same flow serves one process and many workers.

Shapes: E experts, e of them held here, B images of one replica, C classes, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from experts.batches import Batch
from experts.cases import Case
from experts.draws import StepDraws
from experts.objective import Objective
from experts.progress import Progress
from experts.registry import Settings, piece, registered_name, registered_names

Result = Any
PARTS = ("trunk", "features", "attention", "heads", "memory", "calibration", "gates", "auxiliaries")
"""Parts that can learn: the shared trunk, the experts' late stages, attention on their last maps, all heads (the shared
one too), their memories, calibrations on top of heads, a router, auxiliaries of the experts."""


class Network(Protocol):
    """One worker's modules, for a flow to run.

    Attributes:
        names: experts held here, in the order of the logits.
        draws: makes numbers of the step, random ones and others that change with time; see `StepDraws`.
        views: of every image, that trunk and features are to see together; 1 unless an auxiliary asks for more. Only
            flows that take auxiliaries need to look.
    """

    names: tuple[str, ...]
    draws: StepDraws
    views: int

    def trunk(self, run: Callable[[nn.Module], Result]) -> Result:
        """Return `run(trunk)`; called once per step."""
        ...

    def experts(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        """Return `run(experts)`, the experts held here by name; each has `features`, `head` and perhaps `gate`."""
        ...

    def shared(self, run: Callable[[nn.ModuleDict], Result]) -> Result:
        """Return `run(shared)`, the modules after all experts: "head" and "router", where a method has them."""
        ...

    def made(self, h: Tensor, batch: Batch, progress: Progress) -> Sequence[Tensor]:
        """Return images that the experts' auxiliaries make, as the trunk would put them out.

        Args:
            h: the trunk's output of all views, one under the other.
            batch: whose images these are.
            progress: where training stands.

        Returns:
            [g, ...] for each expert held here, or nothing at all. Their scores go below those of the batch; the step
            adds their labels.
        """
        ...

    def show(self, features: Sequence[Tensor], scores: Tensor) -> None:
        """Let the experts' auxiliaries see a step.

        Args:
            features: of all views, one under the other, [V B, D] for each expert held here; more below is left out.
            scores: of the first view, before any exchange, [e, B, X]; more below is left out.
        """
        ...


class Gather(Protocol):
    """The exchange of outputs between workers, which all of them make equally often."""

    def __call__(self, own: Tensor, /, what: str = "logits") -> Tensor:
        """Take values of the experts held here, [e, ...], to those of all experts, [E, ...], the others' detached.

        Args:
            own: the values.
            what: they are, in words, for `expertail plan`.
        """
        ...


class FlowSettings(Settings):
    """Base of the flows' configs."""

    @property
    def skips_images(self) -> bool:
        """Whether experts may leave out some images, so that a step costs at most what `plan` counts."""
        return False


class Flow(ABC):
    """One way from images to outputs.

    Args:
        config: the `Config` of the class.
        objective: of the stage; a flow may ask which images an expert learns from.
        expert_names: of all experts, in the order of the logits.
        draws: makes the key of a random choice from words and numbers that say which (`keyed_random.key` with
            seed and stage filled in), so that choices are the same on every worker and after a restart.

    Raises:
        ValueError: the objective is meant for another flow, or the flow for another objective.
    """

    Config: ClassVar[Any]
    takes: ClassVar[type[Objective] | None] = None
    """The class of the objectives that it works with; None: any that is not meant for another flow."""
    learns: ClassVar[frozenset[str]] = frozenset({"trunk", "features", "attention", "heads", "memory", "calibration"})
    """Those of PARTS that the outputs carry gradients to; the rest is frozen whatever the recipe says."""
    needs_partner: ClassVar[bool] = False
    """Whether a second batch, paired by row, must come with every batch (`stages.<stage>.partner_sampler`)."""
    scores_partner: ClassVar[bool] = False
    """Whether the objective sees the partner's images and labels, and auxiliaries alone see the batch's."""
    needs_own_heads: ClassVar[bool] = False
    """Whether every expert must have a head of its own."""
    takes_auxiliaries: ClassVar[bool] = False
    """Whether it runs `network.views` of every image, and shows the network what it has found."""
    takes_features: ClassVar[bool] = False
    """Whether it can go on from `Batch.features`, where trunk and features neither learn nor change."""
    own_streams: ClassVar[bool] = False
    """Whether expert k sees the k-th of the paired batches only, so that trunks that live apart see different ones."""
    recipe: ClassVar[str | None] = None
    """A recipe that uses the flow, for messages to name."""
    capturable: bool = True
    """Whether shapes follow from shapes alone, so that its operations can be captured once and replayed. False where
    they follow values: such a flow runs operation by operation."""

    def __init__(
        self, config: Any, objective: Objective, expert_names: Sequence[str], draws: Callable[..., int]
    ) -> None:
        problem = self.pairing_problem(type(objective))
        if problem is not None:
            raise ValueError(problem)
        self.config = config
        self.objective = objective
        self.expert_names = tuple(expert_names)
        self.draws = draws

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults, with the objective that the flow takes.

        A flow that takes any objective defines its own cases, so that this frame imports no particular loss.
        """
        assert cls.takes is not None, f"flow '{registered_name(cls)}' takes any objective: its `cases` must name one"
        return [Case(cls.Config(), cls.takes.num_experts_allowed[0], objective=cls.takes.Config())]

    @classmethod
    def pairing_problem(cls, objective: type[Objective]) -> str | None:
        """Return why a stage cannot have this flow with that objective, and what to set; None where it can."""
        # Either side may demand the other: a flow by `takes`, an objective by `flow`. Each message names a way out.
        own, its = registered_name(cls), registered_name(objective)
        refused = f"objective '{its}' and flow '{own}' do not fit"
        if cls.takes is not None and not issubclass(objective, cls.takes):
            others = [name for name in registered_names("objective") if issubclass(piece("objective", name), cls.takes)]
            return f"{refused}; flow '{own}' goes with objective {_or(others)}: set objective.name, or flow.name"
        if objective.flow not in (None, own):
            return f"{refused}; objective '{its}' goes with flow '{objective.flow}': set flow.name={objective.flow}"
        if objective.label_sets == 2 and not cls.needs_partner:
            others = [name for name in registered_names("flow") if piece("flow", name).needs_partner]
            return (
                f"{refused}; the objective wants the labels of two batches, which flow {_or(others)} has: set flow.name"
            )
        return None

    def phase(self, progress: Progress) -> Hashable:
        """Return a value that changes whenever the flow is made of other operations or Python numbers.

        While it stays the same, operations that were captured once are right for every moment, as for
        `Objective.phase`. By default it never changes: what changes from step to step comes from `network.draws`.
        """
        del progress
        return ()

    @abstractmethod
    def __call__(self, network: Network, batch: Batch, progress: Progress, gather: Gather) -> Tensor:
        """Return the outputs of all experts, float [E, B, X]; X is C unless the objective says otherwise.

        Args:
            network: this worker's modules.
            batch: this replica's part of the batch, with its partner if one is needed.
            progress: where training stands.
            gather: takes own outputs [e, B, X] to those of all experts [E, B, X], the others' detached. Workers
                exchange outputs in it, so all of them must call it equally often.
        """

    def scored(self, batch: Batch) -> Batch:
        """Return the batch, or its partner, whose images and labels the objective sees."""
        return batch.partner if self.scores_partner and batch.partner is not None else batch

    def labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the labels of this replica's images and of the global batch.

        Both are [B], or [2, B] where the objective wants those of both batches of a pair.
        """
        if self.objective.label_sets == 1:
            return self.scored(batch).labels_B, self.scored(batch).global_labels
        assert batch.partner is not None
        return (
            torch.stack([batch.labels_B, batch.partner.labels_B]),
            torch.stack([batch.global_labels, batch.partner.global_labels]),
        )


def through_shared_head(network: Network, scores: Tensor) -> Tensor:
    """Return the scores of the experts' own heads, [e, B, X], after the head that they share, if there is one."""
    return network.shared(lambda shared: shared["head"](scores) if "head" in shared else scores)


def _or(names: Sequence[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
