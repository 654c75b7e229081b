"""ACE's rule at test time: each expert scores the classes of its groups.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from aggregation.aggregator import Aggregator, AggregatorSettings, Outputs
from experts.cases import Case
from experts.class_groups import GroupRule, nested_targets
from experts.data.transfer import Constant
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.precision import at_least_float32
from experts.registry import piece, register

MEASURABLE = (LinearHead, CosineHead)
"""Heads, with their subclasses, that score each class by one row of weights."""


@register("aggregator", "ace")
class Ace(Aggregator):
    """For each class, the mean over the experts responsible for it, after scaling their logits like the first expert's.

    Expert i is responsible for the groups i, i + 1, ... of classes, head to tail. Its logits are multiplied by
    a_1 / a_i, a_i the mean over its classes of the head's row norms to the power `norm_power`. Logits of classes that
    an expert is not responsible for are left out, and the divisor is the number of responsible experts.

    Source: Cai et al. 2021, arXiv:2108.02385. No code was published; the power of the norm is uncertain and an option.

    Raises:
        ValueError: the rule gives an empty group, the head has no rows to measure, or an expert's rows are all zero.
    """

    class Config(AggregatorSettings):
        name: Literal["ace"] = "ace"
        groups: GroupRule = GroupRule()
        """The classes that each expert answers for; must be the rule of the stage's objective.groups."""
        norm_power: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
        """p, the row norms are taken to this power before their mean; sources have 1 and 2."""

        def check_head(self, head: Any) -> None:
            """Refuse a head whose row norms are not known."""
            if not issubclass(piece("head", head.name), MEASURABLE):
                raise ValueError(_unknown_head(f"method.head.name = {head.name}"))

        def check_objective(self, objective: Any) -> None:
            """Refuse an objective whose experts learn other groups of classes than they answer for."""
            learnt = objective.group_rule
            if learnt is not None and learnt != self.groups:
                raise ValueError(
                    f"objective.groups = {learnt}, aggregator.groups = {self.groups}; needed the same; set both"
                )

    order_matters: ClassVar[str] = "an expert answers for the classes of its place"

    @classmethod
    def cases(cls, expert_names: tuple[str, ...]) -> list[Case]:
        """See `Aggregator.cases`; any number of experts needs groups of equal size."""
        del expert_names
        return [Case(cls.Config(groups=GroupRule(rule="equal")))]

    def __init__(self, config: Config, counts_C: Tensor, expert_names: tuple[str, ...]) -> None:
        super().__init__(config, counts_C, expert_names)
        self._targets_EC = Constant(nested_targets(counts_C.cpu(), len(expert_names), config.groups))

    def describe(self, expert: nn.Module) -> Tensor:
        """Return the norms of the head's rows, [C]; all equal to the scale where a head normalises them."""
        head: Any = getattr(expert, "head", None)
        if not isinstance(head, MEASURABLE):
            raise ValueError(_unknown_head(f"an expert's head is a {type(head).__name__}"))
        if isinstance(head, CosineHead):  # it normalises its rows in every pass, so the stored lengths mean nothing
            return head.weight.detach().new_full((head.weight.shape[1],), head.scale)
        return at_least_float32(head.weight.detach()).norm(dim=1)

    def scales(self, norms_EC: Tensor) -> Tensor:
        """Return a_1 / a_i for every expert i, [E]."""
        mean_E = self._means(norms_EC)
        return mean_E[0] / mean_E

    def _means(self, norms_EC: Tensor) -> Tensor:
        """Return a_i for every expert i, [E]."""
        targets_EC = self._targets_EC.on(norms_EC.device)
        # Only the classes that an expert answers for: its rows for the others were never meant to win.
        powers_EC = at_least_float32(norms_EC) ** self.config.norm_power
        return powers_EC.where(targets_EC, 0).sum(dim=1) / targets_EC.sum(dim=1)

    def check(self, numbers_EK: Tensor) -> None:
        """Refuse experts whose rows are zero or not finite; see `Aggregator.check`."""
        means = self._means(numbers_EK).tolist()
        bad = [name for name, mean in zip(self.expert_names, means, strict=True) if not 0 < mean < math.inf]
        if bad:
            raise ValueError(
                f"method.aggregator 'ace': the head of {', '.join(bad)} has rows of norm 0 or not finite for all the "
                f"classes it answers for; needed trained weights: evaluate another checkpoint"
            )

    def __call__(self, outputs: Outputs) -> Tensor:
        """See `Aggregator.__call__`."""
        if outputs.numbers_EK is None:
            raise ValueError("method.aggregator 'ace': found no row norms of the experts' heads, needed one per class")
        logits_EBC = at_least_float32(outputs.logits_EBC)
        scale_E11 = self.scales(outputs.numbers_EK).to(logits_EBC)[:, None, None]
        targets_EC = self._targets_EC.on(logits_EBC.device)
        # Every class has at least the first expert, so the divisor is never 0.
        return (scale_E11 * logits_EBC).where(targets_EC[:, None], 0).sum(dim=0) / targets_EC.sum(dim=0)


def _unknown_head(found: str) -> str:
    return (
        f"{found}: method.aggregator 'ace' needs a row of weights for each class; set method.head.name to linear or "
        f"cosine, and method.shared_head to false"
    )
