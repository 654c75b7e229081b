"""BBN: one branch learns from the data as it is, the other mostly from rare classes; weight moves from first to second.

Each branch gets a batch of its own. Their features, weighted by alpha and 1 - alpha, go through one linear layer, and
the sum of their scores is compared with the labels of both batches. Half of the linear layer belongs to each branch.
Paper: Zhou et al. 2020, "BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual Recognition",
arXiv:1912.02413.

Shapes: E = 2 experts (conventional, re-balancing), e of them held here, B images, or pairs of them, C classes,
D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from experts.batches import Batch
from experts.cases import Case
from experts.flow import Flow, FlowSettings, Network
from experts.heads.head import Head
from experts.losses.cross_entropy import cross_entropy
from experts.objective import Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import Settings, register
from experts.scalars import scalar_of_step
from experts.side_by_side import side_by_side


def cumulative_alpha(epoch: int, span: int) -> float:
    """Return the weight of the conventional branch: alpha = 1 - ((epoch - 1) / span)^2.

    Args:
        epoch: counted from 1, at most span + 1, beyond which alpha would be negative.
        span: epochs after which alpha would be 0.

    Source: published code of arXiv:1912.02413 (Combiner). The paper's T / Tmax counts from 0.
    """
    assert 1 <= epoch <= span + 1, (epoch, span)
    return 1 - ((epoch - 1) / span) ** 2


def bbn_loss(
    logits_EBC: Tensor, labels_2B: Tensor, *, alpha: Tensor | float, rest: Tensor | float, images: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return alpha CE(z, y) + (1 - alpha) CE(z, y'), z the sum of the halves, y and y' the labels of the two batches.

    Args:
        logits_EBC: half scores of the two branches, of images paired by row; half types are computed in float32.
        labels_2B: class ids of the conventional and of the re-balancing batch, int64, in [0, C).
        alpha: in [0, 1].
        rest: 1 - alpha.
        images: scalar, pairs of the global batch.

    Returns:
        The loss (scalar, nats) and its terms before their weights, detached: `conventional` and `rebalancing`.

    Source: published code of arXiv:1912.02413 (bbn_mix).
    Differs: the paper adds the scores of two classifiers, the code concatenates features before one; the same but for
        the single bias.
    """
    sum_1BC = at_least_float32(logits_EBC).sum(dim=0, keepdim=True)
    conventional, rebalancing = (
        cross_entropy(sum_1BC, labels_B, denominator=images).squeeze(0) for labels_B in labels_2B
    )
    loss = alpha * conventional + rest * rebalancing
    return loss, {"conventional": conventional.detach(), "rebalancing": rebalancing.detach()}


@register("objective", "bbn")
class BBN(Objective):
    """BBN's objective, of the half scores that the flow "bilateral" gives."""

    class Config(ObjectiveSettings):
        name: Literal["bbn"] = "bbn"
        alpha_epochs: Literal["published", "stage"] | Annotated[int, Field(ge=1)] = "published"
        """Epochs after which alpha would be 0: "stage": those of the stage (paper); "published": the same, but 200 for
        a stage of 180 epochs and 100 for one of 90 (code); or a number, at least the stage's epochs less 1."""

    flow: ClassVar[str | None] = "bilateral"
    num_experts_allowed: ClassVar[tuple[int, ...]] = (2,)
    roles: ClassVar[str] = "the conventional and the re-balancing branch"
    label_sets: ClassVar[int] = 2
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"alpha_epochs": "stage"}, {"alpha_epochs": 7})

    def alpha(self, progress: Progress) -> float:
        """Return the weight of the conventional branch, constant within an epoch; see `cumulative_alpha`.

        Raises:
            ValueError: alpha would become negative in this stage.
        """
        span, epochs = self.config.alpha_epochs, progress.epochs
        if span == "published":
            span = {180: 200, 90: 100}.get(epochs, epochs)
        elif span == "stage":
            span = epochs
        if epochs - 1 > span:
            raise ValueError(
                f"objective.alpha_epochs = {span}: alpha is 0 after as many epochs and then negative, the stage has "
                f"{epochs}; set {epochs - 1} or more, or 'stage'"
            )
        return cumulative_alpha(progress.epoch, span)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `bbn_loss` and `Objective.forward`. Labels are [2, B]."""
        self.check_shapes(logits_EBC, labels_B)
        logits_EBC = at_least_float32(logits_EBC)
        alpha = now.scalar("alpha", self.alpha, logits_EBC)
        rest = now.scalar("1 - alpha", lambda at: 1 - self.alpha(at), logits_EBC)
        return bbn_loss(logits_EBC, labels_B, alpha=alpha, rest=rest, images=now.denominators["images"])


@register("head", "bilateral")
class BilateralHead(Head):
    """One branch's half of a linear layer over both branches' features: x W^T, weight [C, D]; the first adds the bias.

    Drawn as the whole layer of 2 D inputs would be: uniform within 1 / sqrt(2 D).
    """

    class Config(Settings):
        name: Literal["bilateral"] = "bilateral"
        scale: ClassVar[float] = 1.0

    flow: ClassVar[str | None] = "bilateral"
    bias: nn.Parameter | None

    def __init__(self, config: Config, num_features: int, num_classes: int, position: int = 0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(2 * num_features)
        self.weight = nn.Parameter(torch.empty(num_classes, num_features).uniform_(-bound, bound))
        # One bias for the sum of the halves, so that its gradient is counted once.
        bias = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound)) if position == 0 else None
        self.register_parameter("bias", bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        return F.linear(features_BD, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[1]}, classes={self.weight.shape[0]}, bias={self.bias is not None}"


@register("flow", "bilateral")
class Bilateral(Flow):
    """The first expert gets the batch, the second its partner; features are weighted before the heads.

    In training they are multiplied by scale * alpha and scale * (1 - alpha). A trained model leaves both factors out,
    which with scale 2 means alpha = 1/2.
    """

    class Config(FlowSettings):
        name: Literal["bilateral"] = "bilateral"
        scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
        """Factor of the weighted features, no unit; published 2 (code), 1 (paper)."""

    takes: ClassVar[type[Objective] | None] = BBN
    needs_partner: ClassVar[bool] = True
    needs_own_heads: ClassVar[bool] = True
    own_streams: ClassVar[bool] = True
    objective: BBN

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        half = Case(cls.Config(), 2, objective=BBN.Config(), head=BilateralHead.Config())
        return [half, Case(cls.Config(scale=1.0), 2, objective=BBN.Config())]

    def factor(self, branch: int, progress: Progress) -> float:
        """Return what a branch's features are multiplied by."""
        alpha = self.objective.alpha(progress)
        return float(self.config.scale * (alpha if branch == 0 else 1 - alpha))

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `Flow.__call__`."""
        assert batch.partner is not None
        streams = batch.images_B3HW, batch.partner.images_B3HW
        held = [self.expert_names.index(name) for name in network.names]
        factors = [
            scalar_of_step(network.draws, f"factor of branch {k}", partial(self.factor, k), progress, streams[k])
            for k in held
        ]
        # One after the other, never as one batch: BatchNorm must normalise each stream by itself, and the running
        # statistics depend on this order.
        maps = network.trunk(lambda trunk: [trunk(streams[k]) for k in held])

        def run_experts(experts: Any) -> Tensor:
            def score(expert: Any, h: Tensor, factor: Tensor) -> Tensor:
                features_BD = expert.features(h)
                # Not in a half type, to which the factor would be rounded first.
                weighted_BD = factor * at_least_float32(features_BD)
                scores: Tensor = expert.head(weighted_BD.to(features_BD.dtype))
                return scores

            return torch.stack(side_by_side(score, experts.values(), maps, factors))

        return gather(network.experts(run_experts))
