"""KCL: contrast with at most k positives for every image, whatever its class, so that frequent classes do not shape the
features alone.

An image's query meets its own key and a queue of keys. Its targets are its own key and k keys of its class, drawn from
the queue.

Shapes: B images of the whole batch, d numbers of an embedding, K keys of the queue, k positives.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Momentum, Seen
from experts.auxiliaries.projection import Layers, Projection
from experts.auxiliaries.queue import EMPTY, Queue, queue_problem
from experts.cases import Case
from experts.progress import Progress
from experts.registry import register

Rest = Literal["negatives", "zero"]


def drawn_positives(same_BK: Tensor, draws_B: Tensor, positives: int) -> Tensor:
    """Return which keys are an image's positives: the first of its class from a random place of the queue on, bool.

    The queue is taken as a ring. Neighbours in it are independent images, so this is as good as a draw of each key, and
    needs one number for an image instead of K.

    Args:
        same_BK: whether a key is of the image's class.
        draws_B: uniform numbers in [0, 1).
        positives: k, at most.
    """
    size = same_BK.shape[1]
    start_B = (draws_B * size).int().clamp_max(size - 1)
    place_K = torch.arange(size, dtype=torch.int32, device=same_BK.device)  # B K of them are in memory
    # Places from the start on are different numbers, so that nothing is decided by the order of equal ones.
    ahead_BK = torch.where(same_BK, (place_K - start_B[:, None]) % size, size)
    last_B1 = ahead_BK.topk(min(positives, size), dim=1, largest=False).values[:, -1:]
    return same_BK & (ahead_BK <= last_B1)


def k_positive_contrast(
    queries_Bd: Tensor, keys_Bd: Tensor, queue_Kd: Tensor, same_BK: Tensor, chosen_BK: Tensor, empty_K: Tensor,
    *, temperature: float, rest: Rest = "negatives",
) -> Tensor:  # fmt: skip
    """Return the mean over images of the cross-entropy of a softmax over keys with an even target on positives, nats.

    Args:
        queries_Bd, keys_Bd, queue_Kd: directions, at least float32.
        same_BK: whether a key of the queue is of the image's class.
        chosen_BK: which of those are positives, beside the image's own key.
        empty_K: entries that hold no key, which count nothing.
        temperature: divides the cosines, no unit.
        rest: keys of the image's class that were not chosen are "negatives", or have a cosine of "zero".
    """
    own_B1 = (queries_Bd * keys_Bd).sum(dim=1, keepdim=True) / temperature
    score_BK = queries_Bd @ queue_Kd.T / temperature
    if rest == "zero":
        score_BK = torch.where(same_BK & ~chosen_BK, 0, score_BK)
    # The least finite number counts nothing in the sum, and is multiplied by nothing else.
    counted_BK = score_BK.masked_fill(empty_K, torch.finfo(score_BK.dtype).min)
    total_B = torch.cat([own_B1, counted_BK], dim=1).logsumexp(dim=1)
    along_B = own_B1[:, 0] + torch.where(chosen_BK, score_BK, 0).sum(dim=1)
    return (total_B - along_B / (1 + chosen_BK.sum(dim=1))).mean()


@register("auxiliary", "kcl")
class KCL(Auxiliary):
    """`k_positive_contrast` of two views, with a momentum copy and a queue of keys and labels.

    Source: Kang et al. 2021 (ICLR), and published code.
    Differs: the published choice of positives is the top k of zeros and ones, which are whatever the library returns;
    ours are drawn anew in each step. The published queue is filled before training; ours begins empty, and what is
    empty counts nothing. Published code shuffles images between GPUs for the BatchNorm of the copy; ours normalises
    over the whole batch.
    """

    class Config(AuxiliarySettings):
        name: Literal["kcl"] = "kcl"
        positives: Annotated[int, Field(ge=1)] = 6
        """k, at most so many keys of the queue for an image, beside its own; published 6."""
        fewer: Literal["take", "refuse"] = "take"
        """A class with fewer training images than `positives`: it has those it has, as published, or is refused."""
        rest: Rest = "negatives"
        """Further keys of the image's class: "negatives", or "zero" for a cosine of 0; published both."""
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.07
        """Divides the cosines, no unit; published 0.07."""
        queue_size: Annotated[int, Field(ge=1)] = 65536
        """K, at least a batch; published 65536 for ImageNet-LT."""
        momentum: Momentum = 0.999
        """m of the network's copy that makes the keys, in a step; published 0.999."""
        projection: Layers = "mlp"
        """Layers from features to embeddings; published "mlp" or "linear"."""
        dim: Annotated[int, Field(ge=1)] = 128
        """Numbers of an embedding; published 128."""

        def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
            """Return why the queue does not go with the batch. See `AuxiliarySettings.batch_problem`."""
            del drop_last
            return queue_problem(self.name, self.queue_size, batch_size)

        def counts_problem(self, counts: list[int]) -> str | None:
            """Return which classes have too few images, if they are refused. See `AuxiliarySettings.counts_problem`."""
            short = [c for c, images in enumerate(counts) if images < self.positives]
            if self.fewer == "take" or not short:
                return None
            return (
                f"auxiliary '{self.name}': positives = {self.positives}, and {len(short)} of {len(counts)} classes "
                f"have fewer training images: {', '.join(f'class {c} has {counts[c]}' for c in short[:10])}; needed as "
                f"many of each; set positives={min(counts)} at most, or fewer=take"
            )

    views: ClassVar[int] = 2
    draws: ClassVar[int] = 1

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Auxiliary.cases`."""
        small = cls.Config(queue_size=14, dim=4, positives=2)
        return [Case(small), Case(small.model_copy(update={"rest": "zero", "positives": 20}))]

    def __init__(self, config: Config, num_features: int, counts_C: Tensor) -> None:
        super().__init__(config, num_features, counts_C)
        self.embed = Projection(config.projection, num_features, config.dim)
        self.queue = Queue(config.queue_size, config.dim)

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """See `k_positive_contrast`."""
        queries_Bd, config, queue = seen.embedded_VBd[0], self.config, self.queue
        assert seen.keys_Bd is not None and seen.draws_BU is not None
        same_BK = seen.labels_B[:, None] == queue.labels_K
        return k_positive_contrast(
            queries_Bd,
            seen.keys_Bd,
            queue.keys_Kd.to(queries_Bd.dtype),
            same_BK,
            drawn_positives(same_BK, seen.draws_BU[:, 0], config.positives),
            queue.labels_K == EMPTY,
            temperature=config.temperature,
            rest=config.rest,
        )

    def update(self, seen: Seen, lr: float, ok: Tensor) -> None:
        """Push the keys of the batch."""
        assert seen.keys_Bd is not None
        self.queue.push(seen.keys_Bd, seen.labels_B, ok)
