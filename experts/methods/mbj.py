"""MBJ, a reconstruction: the classifier learns from features that the network gave earlier, too.

As the network moves, features of one image scatter. A memory that takes rare classes more often hands such old features
to the classifier beside those of the batch. No code was published, and the paper's sizes, chances and weights could not
be checked: this is our reading of its idea, not the published method, and its numbers may not stand for it.

Shapes: B images of the whole batch, D features, K entries of the memory, C classes.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.auxiliaries.lent import parameters_of, with_parameters
from experts.auxiliaries.queue import EMPTY, Queue, queue_problem
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register


@register("auxiliary", "mbj")
class MemoryOfFeatures(Auxiliary):
    """Cross-entropy of the expert's own head on earlier features, as many as the batch has images, drawn from a memory.

    The memory is first in, first out. An image of a class with n training images goes in with chance n_min / n, so that
    every class puts in as many. Its features have no gradient: the term trains the head alone.

    Source: a reconstruction after Liu, Li and Sun 2022, AAAI, arXiv:2008.09809.
    Differs: unknown; see the head of this file.
    """

    class Config(AuxiliarySettings):
        name: Literal["mbj"] = "mbj"
        queue_size: Annotated[int, Field(ge=1)] = 4096
        """K, at least a batch; ours."""
        after_epoch: Annotated[int, Field(ge=0)] = 100
        """Epoch (1-based) after which the head learns from the memory; ours, half of the epochs in the recipe."""

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why the memory does not go with the batch. See `AuxiliarySettings.batch_problem`."""
            del drop_last  # a partial batch pushes what it has
            return queue_problem(self.name, self.queue_size, batch_size)

    draws: ClassVar[int] = 2
    uses_head: ClassVar[bool] = True
    chance_C: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        return [Case(cls.Config(queue_size=14, after_epoch=1))]

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.queue = Queue(config.queue_size, num_features)
        rarest = counts_C[counts_C > 0].min()
        self.register_buffer("chance_C", rarest.double() / counts_C.clamp_min(1), persistent=False)

    def meet(self, head: Any) -> None:
        """Know the head without owning it: a parameter belongs to one module."""
        self._met: tuple[Any, ...] = (head,)

    def phase(self, progress: Progress) -> bool:
        """See `Auxiliary.phase`."""
        return progress.epoch > int(self.config.after_epoch)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the mean over the entries that are drawn, nats; 0 before its time, or from an empty memory."""
        features_BD = seen.embedded_VBd[0]
        if not self.phase(now):
            return features_BD.new_zeros(())
        assert seen.draws_BU is not None
        filled = (self.queue.labels_K != EMPTY).sum()  # from the first place on
        at_B = (seen.draws_BU[:, 1] * filled).long()
        head = self._met[0]
        with with_parameters(head, {name: seen.once(value) for name, value in parameters_of(head).items()}):
            scores = head(self.queue.keys_Kd[at_B].to(features_BD.dtype))
        labels_B = self.queue.labels_K[at_B].clamp_min(0)
        loss_B = F.cross_entropy(scores[:, : self.num_classes], labels_B, reduction="none")
        return torch.where(filled > 0, loss_B, 0).mean()

    def update(self, seen: Seen, lr: float, ok: Tensor) -> None:
        """Put in the images whose draw says so."""
        assert seen.draws_BU is not None
        chosen_B = seen.draws_BU[:, 0] < self.chance_C[seen.labels_B]
        self.queue.push(seen.embedded_VBd[0], seen.labels_B, ok, chosen_B)
