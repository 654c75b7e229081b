"""RIDE's router: after each expert a gate decides, by its features and the mean logits so far, whether to ask the next.

The router is trained in a last stage on a trained ensemble, in which only the gates learn. Every expert but the last
has a gate: a layer of its own, followed by a layer that all gates share.
Paper: Wang et al. 2021, "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", arXiv:2010.01809,
section 3 (expert assignment); form and numbers as in the published code.

Shapes: E experts, e of them held here, B images, C classes, D features, G = E - 1 gates, k largest logits.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from aggregation.aggregator import Aggregator, AggregatorSettings, Outputs
from experts.batches import Batch
from experts.cases import Case
from experts.directions import directions
from experts.flow import Flow, FlowSettings, Gather, Network, through_shared_head
from experts.objective import MAX_EXPERTS, Objective, ObjectiveSettings, StepContext
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import Settings, register
from experts.side_by_side import side_by_side

ALL_EXPERTS = "all experts"
"""The aggregator's second member: the ensemble's scores if every image went to every expert."""


def gate_score(final: nn.Linear, hidden_BH: Tensor, running_BC: Tensor) -> Tensor:
    """Return the score for asking the next expert: the shared layer over largest mean logits and a gate's hidden layer.

    Args:
        final: k + H inputs, one output; k follows from its size.
        hidden_BH: outputs of the gate's own layer.
        running_BC: mean logits of the experts asked so far.

    Returns:
        [B]; above 0 (a probability above 1/2) means ask.
    """
    k = final.in_features - hidden_BH.shape[1]
    largest_Bk = running_BC.topk(k, dim=1).values.to(hidden_BH.dtype)
    return final(torch.cat([largest_Bk, hidden_BH], dim=1)).squeeze(1)


class Hidden(nn.Module):
    """A gate's own layer: features [B, D], brought to length 1, to [B, H].

    Differs: published code divides by the length as it is; here lengths below 1e-12 count as 1e-12, not as NaN.
    """

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, width)

    def forward(self, features_BD: Tensor) -> Tensor:
        direction_BD = directions(at_least_float32(features_BD), dim=1)
        return F.relu(self.linear(direction_BD))


class Final(nn.Module):
    """The layer that all gates share. See `gate_score`."""

    def __init__(self, top_k: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(top_k + width, 1)

    def forward(self, hidden_BH: Tensor, running_BC: Tensor) -> Tensor:
        return gate_score(self.linear, hidden_BH, running_BC)

    def zeros(self, images: int) -> Tensor:
        """Return a score of 0 for each image, with a gradient of zero for this layer.

        A worker without a gate needs it: gradients are summed over workers, and all of them must take part.
        """
        weight = self.linear.weight
        return 0 * self.linear(weight.new_zeros(images, self.linear.in_features)).squeeze(1)


@register("router", "ride")
class RideRouter:
    """Builds the layers of the gates; every call of a method builds new, untrained ones."""

    class Config(Settings):
        name: Literal["ride"] = "ride"
        top_k: Annotated[int, Field(ge=1)] = 30
        """Largest mean logits that a gate sees, at most C; published 30 (CIFAR, ResNet-10), 50 (ResNet-50,
        ResNeXt-50, iNat)."""
        width: Annotated[int, Field(ge=1)] = 16
        """H, outputs of a gate's own layer."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def hidden(self, num_features: int) -> Hidden:
        """Build a gate's own layer, for features [B, num_features]."""
        return Hidden(num_features, self.config.width)

    def final(self, num_classes: int) -> Final:
        """Build the layer that all gates share."""
        return Final(min(self.config.top_k, num_classes), self.config.width)


def running_correct(logits_EBC: Tensor, labels_B: Tensor) -> Tensor:
    """Return whether the mean logits of the first i experts are right, bool [E, B]; the first of equals counts."""
    own_C = torch.arange(logits_EBC.shape[-1], device=labels_B.device)
    known_B = own_C.gather(0, labels_B)  # the labels; one out of range is an error here, without waiting for a device
    # Sums instead of means: the largest logit is the same.
    return logits_EBC.cumsum(dim=0).argmax(dim=-1) == known_B


def gate_targets(correct_EB: Tensor) -> Tensor:
    """Return the gates' targets, bool [G, B]: the prediction so far is wrong, and a later expert makes it right.

    Source: published code of arXiv:2010.01809.
    """
    # Sums from the back: above 0 where the mean of this many experts, or of more, is right.
    later_EB = correct_EB.flip(0).long().cumsum(dim=0).flip(0) > 0
    return ~correct_EB[:-1] & later_EB[1:]


@register("objective", "router")
class RouterObjective(Objective):
    """Binary cross-entropy of the gates; the experts' logits only set the targets."""

    class Config(ObjectiveSettings):
        name: Literal["router"] = "router"
        pos_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
        """Factor of the loss of an image that needs another expert, no unit; published 100."""

    extra_outputs: ClassVar[int] = 1
    num_experts_allowed: ClassVar[tuple[int, ...]] = tuple(range(2, MAX_EXPERTS + 1))
    last_expert_learns: ClassVar[bool] = False  # it has no gate
    roles: ClassVar[str] = "a router chooses between them"
    flow: ClassVar[str | None] = "router"
    pos_weight: Tensor

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        # Not persistent: it follows from the config, and an old checkpoint must not bring another.
        pos_weight = torch.tensor(config.pos_weight, dtype=torch.float64)
        self.register_buffer("pos_weight", pos_weight, persistent=False)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over gates of the mean per image.

        Args:
            logits_EBC: [E, B, C + 1], the score of each expert's gate last; that of the last expert is ignored.
            labels_B, now: see `Objective.forward`.

        Returns:
            The loss and its terms: `gate` [E], each gate's mean (0 for the last expert, which has none), and `wanted`
            and `asked` [E], the shares of images that need the next expert, and that the gate alone would pass on.
        """
        self.check_shapes(logits_EBC, labels_B)
        outputs = at_least_float32(logits_EBC)
        images = now.denominators["images"].to(outputs.dtype)
        score_GB = outputs[:-1, :, -1]
        target_GB = gate_targets(running_correct(outputs[..., :-1].detach(), labels_B)).to(outputs.dtype)
        bce_GB = F.binary_cross_entropy_with_logits(
            score_GB, target_GB, reduction="none", pos_weight=self.pos_weight.to(outputs.dtype)
        )
        gate_G = bce_GB.sum(dim=1) / images
        asked_G = (score_GB.detach() > 0).to(outputs.dtype).sum(dim=1) / images
        terms = {"gate": gate_G.detach(), "wanted": target_GB.sum(dim=1) / images, "asked": asked_G}
        return gate_G.sum() / (self.num_experts - 1), {name: F.pad(term_G, (0, 1)) for name, term_G in terms.items()}


@register("flow", "router")
class RouterFlow(Flow):
    """Outputs are the experts' logits, without gradient, and after them a column with the score of each one's gate.

    The last expert has no gate: its column is 0.
    """

    class Config(FlowSettings):
        name: Literal["router"] = "router"

    recipe: ClassVar[str | None] = "ride_router"
    takes: ClassVar[type[Objective] | None] = RouterObjective
    learns: ClassVar[frozenset[str]] = frozenset({"gates"})

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        return [Case(cls.Config(), objective=RouterObjective.Config(), router=RideRouter.Config())]

    def __call__(self, network: Network, batch: Batch, progress: Progress, gather: Gather) -> Tensor:
        """See `Flow.__call__`; gathers twice, because a gate needs the logits of the experts before it."""
        with torch.no_grad():  # only the gates learn, and they start from the features
            h = network.trunk(lambda trunk: trunk(batch.images_B3HW))

        def score_and_hidden(expert: Any) -> tuple[Tensor, tuple[int, Tensor] | None]:
            with torch.no_grad():
                features_BD = expert.features(h)
                scores = expert.head(features_BD)
            return scores, None if expert.gate is None else (expert.position, expert.gate(features_BD))

        def scores_and_hidden(experts: Any) -> tuple[Tensor, list[tuple[int, Tensor] | None]]:
            found = side_by_side(score_and_hidden, experts.values())
            return torch.stack([scores for scores, _ in found]), [hidden for _, hidden in found]

        scores, hidden = network.experts(scores_and_hidden)
        with torch.no_grad():
            logits_EBC = gather(at_least_float32(through_shared_head(network, scores)))

        def gates(shared: Any) -> Tensor:
            router, columns = shared["router"], []
            for own in hidden:
                if own is None:  # a worker that holds the last expert alone still needs a graph to go back through
                    columns.append(router.zeros(logits_EBC.shape[1]).to(logits_EBC.dtype))
                else:
                    position, hidden_BH = own
                    running_BC = logits_EBC[: position + 1].mean(dim=0)
                    columns.append(router(hidden_BH, running_BC).to(logits_EBC.dtype))
            return torch.stack(columns)[..., None]

        return torch.cat([logits_EBC, gather(network.shared(gates), "scores of the gates")], dim=-1)


@register("aggregator", "router")
class Router(Aggregator):
    """The mean over the experts used: each image goes to the first, and on to the next while the gates ask for more.

    An image stops at the first gate whose score is 0 or less (a probability of 1/2 or less). Where the score of a gate
    is not finite, neither are the ensemble's.

    Source: Wang et al. 2021, arXiv:2010.01809 (expert assignment), and the published code's evaluation.

    Raises:
        ValueError: the ensemble has no gates.
    """

    class Config(AggregatorSettings):
        name: Literal["router"] = "router"

    needs_router: ClassVar[bool] = True
    order_matters: ClassVar[str] = "experts are asked in their order"
    undecided: ClassVar[str] = (
        "method.aggregator.name = router: scores of the gates are not finite (NaN or infinite); the router has "
        "diverged or its weights are damaged: evaluate an earlier checkpoint"
    )

    def experts_used(self, outputs: Outputs) -> Tensor:
        """Return 1 to E for each image, NaN where the score of a gate is not finite; float64 [B]."""
        gates_EB = outputs.gates_EB
        if gates_EB is None:
            raise ValueError(
                "method.aggregator.name = router: the ensemble has no gates; set method.router and train its stage, or "
                "use method.aggregator.name = mean_logits"
            )
        asks_EB = gates_EB[:-1]
        # The running product turns to 0 at the first gate that stops, whatever later gates would say.
        used_B = 1 + (asks_EB > 0).long().cumprod(dim=0).sum(dim=0)
        return used_B.double().where(torch.isfinite(asks_EB).all(dim=0), torch.nan)

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_EBC = at_least_float32(outputs.logits_EBC)
        used_B = self.experts_used(outputs)
        shown_EB = torch.arange(len(logits_EBC), device=used_B.device)[:, None] < used_B
        return logits_EBC.where(shown_EB[..., None], 0).sum(dim=0) / used_B[:, None].to(logits_EBC.dtype)

    def members(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the routed scores, and the mean over all experts."""
        return {"ensemble": self(outputs), ALL_EXPERTS: at_least_float32(outputs.logits_EBC).mean(dim=0)}
