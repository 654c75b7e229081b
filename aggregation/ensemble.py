"""How the experts' outputs become the ensemble's: pieces of kind "aggregator".

Shapes: E experts, B images, C classes, K numbers an expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from experts.class_groups import GroupRule, nested_targets
from experts.heads import CosineHead, LinearHead
from experts.losses.precision import at_least_float32
from experts.registry import Settings, register

ALL_EXPERTS = "all experts"
"""A router's second member: what the ensemble would say if every image went to every expert."""


@dataclass(frozen=True)
class Outputs:
    """What all experts say of some images.

    Attributes:
        logits_EBC: scores.
        numbers_EK: what `Aggregator.describe` said of every expert; K may be 0.
        gates_EB: a router's score for asking the next expert after expert k (a probability above 1/2 is a score above
            0); the last row means nothing. None without a router.
    """

    logits_EBC: Tensor
    numbers_EK: Tensor | None = None
    gates_EB: Tensor | None = None


class Aggregator(ABC):
    """One rule. Built with the training images per class, int64 [C], and the experts' names."""

    def __init__(self, config: Any, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        self.config = config
        self.expert_names = expert_names

    def describe(self, expert: nn.Module) -> Tensor:
        """Numbers of one expert's weights that the rule needs, float [K]; none by default."""
        return torch.zeros(0)

    @abstractmethod
    def __call__(self, outputs: Outputs) -> Tensor:
        """The ensemble's scores [B, C]: argmax gives the class, softmax the probabilities."""

    def members(self, outputs: Outputs) -> dict[str, Tensor]:
        """Scores [B, C] to be measured by name: "ensemble" first, then what it should be compared with."""
        return {"ensemble": self(outputs)}

    def experts_used(self, outputs: Outputs) -> Tensor | None:
        """How many experts each image was shown to, [B]; None where it is always all."""
        return None


@register("aggregator", "mean_logits")
class MeanLogits(Aggregator):
    """Mean over experts of the logits: the normalised product of their probabilities. RIDE's rule."""

    class Config(Settings):
        name: Literal["mean_logits"] = "mean_logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).mean(dim=0)


@register("aggregator", "sum_logits")
class SumLogits(Aggregator):
    """Sum over experts of the logits, where each gives a part of one score: BBN's halves, ResLT's branches."""

    class Config(Settings):
        name: Literal["sum_logits"] = "sum_logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC).sum(dim=0)


@register("aggregator", "mean_probabilities")
class MeanProbabilities(Aggregator):
    """Mean over experts of the probabilities, each expert one vote of weight 1.

    Computed as a log of a sum of exponentials, so that small probabilities do not become log 0.
    """

    class Config(Settings):
        name: Literal["mean_probabilities"] = "mean_probabilities"

    def __call__(self, outputs: Outputs) -> Tensor:
        """Log-probabilities; see `Aggregator.__call__`."""
        log_p_EBC = at_least_float32(outputs.logits_EBC).log_softmax(dim=-1)
        return log_p_EBC.logsumexp(dim=0) - math.log(len(log_p_EBC))


@register("aggregator", "weighted")
class Weighted(Aggregator):
    """Sum over experts of weight times logits, one weight for each expert. TADE's rule at test time.

    Source: Zhang et al. 2022, arXiv:2107.09249; the weights learned there are any point of the simplex.

    Raises:
        ValueError: a weight is negative, they do not sum to 1, or they are not of exactly the ensemble's experts.
    """

    class Config(Settings):
        name: Literal["weighted"] = "weighted"
        weights: dict[str, float]
        """Share of each expert by name, no unit: 0 or more, together 1."""

        @field_validator("weights")
        @classmethod
        def _on_the_simplex(cls, weights: dict[str, float]) -> dict[str, float]:
            shown = ", ".join(f"{name} {weight:g}" for name, weight in weights.items()) or "none"
            wrong = [name for name, weight in weights.items() if not (math.isfinite(weight) and weight >= 0)]
            if wrong:
                raise ValueError(f"weights {shown}: {', '.join(wrong)} must be a number of 0 or more")
            total = math.fsum(weights.values())
            if abs(total - 1) > 1e-6:
                divided = "; divide each by their sum" if total > 0 else ""
                raise ValueError(f"weights {shown}: they sum to {total:.8g}, needed 1 (within 1e-6){divided}")
            return weights

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble of other experts than there are weights for.

            Raises:
                ValueError: names the key, what was found and what was needed.
            """
            if set(self.weights) != set(names):
                raise ValueError(
                    f"method.aggregator.weights: found weights of {', '.join(self.weights)}; needed one for each of "
                    f"{', '.join(names)} and nobody else"
                )

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        self._weights = [config.weights[name] for name in expert_names]

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_EBC = at_least_float32(outputs.logits_EBC)
        return torch.einsum("e,ebc->bc", logits_EBC.new_tensor(self._weights), logits_EBC)


@register("aggregator", "only")
class Only(Aggregator):
    """The logits of one expert: LFME's student, whose teachers are left out at test time.

    Raises:
        ValueError: the ensemble has no expert of that name.
    """

    class Config(Settings):
        name: Literal["only"] = "only"
        expert: str
        """Name of the expert that answers."""

        def check_experts(self, names: Sequence[str]) -> None:
            """Refuse an ensemble without that expert.

            Raises:
                ValueError: names the key, what was found and what was needed.
            """
            if self.expert not in names:
                raise ValueError(
                    f"method.aggregator.expert = {self.expert}: no such expert; needed one of {', '.join(names)}"
                )

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        config.check_experts(expert_names)
        self._position = expert_names.index(config.expert)

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        return at_least_float32(outputs.logits_EBC[self._position])


@register("aggregator", "ace")
class Ace(Aggregator):
    """Per class the mean over the experts responsible for it, each expert's logits brought to the first one's scale.

    Expert i is responsible for the groups i, i + 1, ... of classes, head to tail. Its logits are multiplied by
    a_1 / a_i, a_i the mean over its classes of the head's row norms to the power `norm_power`. Logits of classes that
    an expert is not responsible for are left out, and the divisor is the number of responsible experts.

    Source: Cai et al. 2021, arXiv:2108.02385. No code was published; the power of the norm is uncertain and an option.

    Raises:
        ValueError: the rule gives an empty group, the head has no rows to measure, or an expert's rows are all zero.
    """

    class Config(Settings):
        name: Literal["ace"] = "ace"
        groups: GroupRule = GroupRule()
        """Which classes each expert answers for; must be the rule of the stage's objective.groups."""
        norm_power: float = Field(1.0, gt=0, allow_inf_nan=False)
        """p, the row norms are taken to this power before their mean; sources have 1 and 2."""

        def check_head(self, head: Any) -> None:
            """Refuse a head whose row norms are not known.

            Raises:
                ValueError: names the key and what to set.
            """
            if head.name not in ("linear", "cosine"):
                raise ValueError(_unknown_head(f"method.head.name = {head.name}"))

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        self._targets_EC = nested_targets(counts_C.cpu(), len(expert_names), config.groups)

    def describe(self, expert: nn.Module) -> Tensor:
        """Norms of the head's rows, one for each class, [C]; all equal to the scale where a head normalises them."""
        head: Any = getattr(expert, "head", None)
        if isinstance(head, CosineHead):
            return head.weight.detach().new_full((head.weight.shape[1],), head.scale)
        if type(head) not in (nn.Linear, LinearHead):
            raise ValueError(_unknown_head(f"an expert's head is a {type(head).__name__}"))
        return at_least_float32(head.weight.detach()).norm(dim=1)

    def scales(self, norms_EC: Tensor) -> Tensor:
        """a_1 / a_i for every expert i, [E].

        Raises:
            ValueError: an expert's rows are zero or not finite.
        """
        targets_EC = self._targets_EC.to(norms_EC.device)
        powers_EC = at_least_float32(norms_EC) ** self.config.norm_power
        mean_E = powers_EC.where(targets_EC, 0).sum(dim=1) / targets_EC.sum(dim=1)
        bad = [name for name, mean in zip(self.expert_names, mean_E.tolist(), strict=True) if not 0 < mean < math.inf]
        if bad:
            raise ValueError(
                f"method.aggregator 'ace': the head of {', '.join(bad)} has rows of norm 0 or not finite for all the "
                f"classes it answers for; needed trained weights: evaluate another checkpoint"
            )
        return mean_E[0] / mean_E

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        if outputs.numbers_EK is None:
            raise ValueError("method.aggregator 'ace': found no row norms of the experts' heads, needed one a class")
        logits_EBC = at_least_float32(outputs.logits_EBC)
        scale_E11 = self.scales(outputs.numbers_EK).to(logits_EBC)[:, None, None]
        targets_EC = self._targets_EC.to(logits_EBC.device)
        return (scale_E11 * logits_EBC).where(targets_EC[:, None], 0).sum(dim=0) / targets_EC.sum(dim=0)


@register("aggregator", "router")
class Router(Aggregator):
    """Every image goes through the first expert, and on to the next as long as the gates ask; mean of the used ones.

    An image stops at the first gate whose score is 0 or less (a probability of 1/2 or less).

    Source: Wang et al. 2021, arXiv:2010.01809 (expert assignment), and the published code's evaluation.

    Raises:
        ValueError: the ensemble has no gates, or their scores are not finite.
    """

    class Config(Settings):
        name: Literal["router"] = "router"

    def experts_used(self, outputs: Outputs) -> Tensor:
        """1 to E for each image, int64 [B]."""
        gates_EB = outputs.gates_EB
        if gates_EB is None:
            raise ValueError(
                "method.aggregator.name = router: the ensemble has no gates; set method.router and train its stage, or "
                "use method.aggregator.name = mean_logits"
            )
        asks_EB = gates_EB[:-1]
        if not bool(torch.isfinite(asks_EB).all()):
            raise ValueError(
                "method.aggregator.name = router: scores of the gates are not finite (NaN or infinite); the router has "
                "diverged or its weights are damaged: evaluate an earlier checkpoint"
            )
        return 1 + (asks_EB > 0).long().cumprod(dim=0).sum(dim=0)

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        logits_EBC = at_least_float32(outputs.logits_EBC)
        used_B = self.experts_used(outputs)
        shown_EB = torch.arange(len(logits_EBC), device=used_B.device)[:, None] < used_B
        return logits_EBC.where(shown_EB[..., None], 0).sum(dim=0) / used_B[:, None]

    def members(self, outputs: Outputs) -> dict[str, Tensor]:
        """The routed scores, and what the mean of all experts would have said."""
        return {"ensemble": self(outputs), ALL_EXPERTS: at_least_float32(outputs.logits_EBC).mean(dim=0)}


def _unknown_head(found: str) -> str:
    return (
        f"{found}: method.aggregator 'ace' needs a row of weights for each class; set method.head.name to linear or "
        f"cosine, and method.shared_head to false"
    )
