"""Everything that an evaluation measures of the same images: scores of the ensemble and its experts, and diversity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from aggregation.aggregator import Aggregator, Outputs
from aggregation.diversity import Diversity
from aggregation.metrics import Scores
from aggregation.per_image import MemberScores, read

States = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]
"""The states of `Scores` and of `Diversity`."""


class Tally:
    """Scores and diversity of the images that come, batch by batch.

    Args:
        aggregator: the rule that combines the experts.
        expert_names: in the order of the logits.
    """

    def __init__(self, aggregator: Aggregator, expert_names: Sequence[str]) -> None:
        self._aggregator, self._names = aggregator, tuple(expert_names)
        self.scores = Scores({"experts_used": aggregator.undecided})
        self.diversity = Diversity()

    def add(self, outputs: Outputs, labels_B: Tensor) -> None:
        """Measure a batch, which may be empty; waits for nothing."""
        experts = dict(zip(self._names, outputs.logits_EBC.unbind(), strict=True))
        used_B = self._aggregator.experts_used(outputs)
        extras = {} if used_B is None else {"experts_used": used_B}
        members = MemberScores.stacked({**self._aggregator.members(outputs), **experts})
        self.scores.add(members, labels_B, extras)
        self.diversity.add(members.only(self._names), labels_B)

    def states(self) -> States:
        """Return the states of both, after one wait for the device.

        Raises:
            ValueError: a label is not a class, or a score is not finite.
        """
        read([self.scores, self.diversity])
        return self.scores.state(), self.diversity.state()

    def result(
        self, counts_C: Sequence[int] | NDArray[Any], cuts: Sequence[int] | None, probabilities: bool
    ) -> dict[str, Any]:
        """Return the summary of the scores, with that of the diversity under the key `diversity`.

        Args: as `Scores.result`.

        Raises:
            ValueError: as `states`, or there was no image.
        """
        read([self.scores, self.diversity])
        scores = self.scores.result(counts_C, cuts, probabilities)
        return scores | {"diversity": self.diversity.result(counts_C, cuts)}
