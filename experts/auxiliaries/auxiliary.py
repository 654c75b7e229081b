"""The base of all auxiliaries: what an expert has beside features and head while a stage trains it.

An auxiliary has a loss of its own on the expert's features, modules that learn by it, and perhaps a memory. It is part
of its expert, so that it is trained, saved and resumed as that is, and is left out when a model is exported.

    embed(features)              of this replica's rows, with gradients; or rows of the trunk's output, without
    ... rows of all replicas     the same on each; own rows keep their gradients
    loss(seen, now)              of the whole batch
    update(seen, lr, ok)         after the weights have moved: queues, moving means
    before_epoch(sums, now)      at the start of an epoch, from the features of all training images

What an auxiliary keeps from step to step lies in buffers, and changes in the last two alone. The rules of a piece that
runs in every step hold here too (docs/architecture.md).

Shapes: V views, B images of the whole batch, b of one replica, D features, d numbers of an embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from experts.cases import Case
from experts.progress import Progress
from experts.ramps import Weight, constant
from experts.registry import Settings, piece


class AuxiliarySettings(Settings):
    """Base of the auxiliaries' configs."""

    name: str
    weight: Weight = constant(1.0)
    """Factor of the loss, no unit: a number, or a ramp (experts/ramps.py)."""
    experts: tuple[str, ...] | None = None
    """Names of the experts that have it. Unset: all of the stage."""

    @property
    def views(self) -> int:
        """Views of every image that it looks at, 1 or 2."""
        return int(piece("auxiliary", self.name).views)

    @property
    def on_trunk(self) -> bool:
        """Whether it sees the trunk's output; see `Auxiliary.on_trunk`."""
        return bool(piece("auxiliary", self.name).on_trunk)

    @property
    def makes(self) -> bool:
        """Whether it makes images; see `Auxiliary.makes`."""
        return bool(piece("auxiliary", self.name).makes)

    @property
    def momentum_copy(self) -> float | None:
        """Momentum of the copy of the network that the second view goes through; None if it needs no copy."""
        return getattr(self, "momentum", None)

    @property
    def views_together(self) -> int:
        """Views that go through the network that learns, as one batch."""
        return self.views if self.momentum_copy is None else 1

    def batch_problem(self, batch_size: int, *, drop_last: bool) -> str | None:
        """Return why the auxiliary does not take batches of so many images, and what to set; None where it does."""
        del batch_size, drop_last
        return None

    def counts_problem(self, counts: list[int]) -> str | None:
        """Return why it cannot work with so many training images per class, and what to do; None where it can."""
        del counts
        return None


Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""m of a copy of the network that follows it: copy = m copy + (1 - m) network, after every step."""


@dataclass(frozen=True)
class Seen:
    """One expert's step, as its auxiliary sees it: the whole batch, the same on every replica.

    Attributes:
        embedded_VBd: embeddings of the views that went through the network that learns, at least float32. Those of this
            replica's images have gradients.
        keys_Bd: of the second view through the momentum copy; None without one.
        logits_BC: the expert's scores of the first view, if it `sees_logits`.
        labels_B: int64.
        replicas: D, that compute the same loss.
        told_B: what the augmentation that it `guesses` has drawn for the first view, int64; None where it guesses none.
        draws_BU: uniform numbers in [0, 1) for every image, float64, the same on every placement, after a resume and in
            a replay; None where the auxiliary draws none.
    """

    embedded_VBd: Tensor
    keys_Bd: Tensor | None
    logits_BC: Tensor | None
    labels_B: Tensor
    replicas: int = 1
    told_B: Tensor | None = None
    draws_BU: Tensor | None = None

    def once(self, parameter: Tensor) -> Tensor:
        """Return a parameter that enters the loss of the whole batch, with a D-th of its gradient.

        Every replica computes the loss, and the gradients of replicas are summed. What reaches a parameter through
        `embed` is of own rows alone, and right; what reaches it directly would count D times.
        """
        if self.replicas == 1:
            return parameter
        whole = parameter.detach()
        return whole + (parameter - whole) / self.replicas


class Auxiliary(nn.Module):
    """A loss of one expert's features, and what belongs to it.

    Args:
        config: the `Config` of the class.
        num_features: D, or channels of the trunk's output.
        counts_C: training images per class, int64.

    Attributes:
        embed: takes features [b, D] to embeddings [b, d]. A subclass sets it; a momentum copy has a twin of it.
    """

    Config: ClassVar[Any]
    views: ClassVar[int] = 1
    """Views of every image: 2 where the second one is needed, in a batch with the first or for a momentum copy."""
    sees_logits: ClassVar[bool] = False
    """Whether the loss reads the scores of the expert's head."""
    draws: ClassVar[int] = 0
    """U, uniform numbers that the loss wants for every image, in `Seen.draws_BU`."""
    guesses: ClassVar[str | None] = None
    """Registered name of an augmentation of the first view, of whose draws the loss is told; see `Piece.told`."""
    head: ClassVar[str | None] = None
    """Registered name of the head whose memory it trains, and is given by `meet`; None: it knows no head."""
    uses_head: ClassVar[bool] = False
    """Whether its loss sends features of its own through the expert's head, whichever it is, that `meet` gives it."""
    on_trunk: ClassVar[bool] = False
    """Whether it sees the trunk's output, a row of c H W numbers for each image and without gradients, in place of
    `embed`; `num_features` is c then."""
    makes: ClassVar[bool] = False
    """Whether it makes images of its own, that go on from the trunk; see generator.py."""
    capturable: bool = True
    """See `Objective.capturable`."""
    embed: nn.Module

    def __init__(self, config: Any, num_features: int, counts_C: Tensor) -> None:
        super().__init__()
        if problem := config.counts_problem(counts_C.tolist()):
            raise ValueError(problem)
        self.config = config
        self.num_features, self.num_classes = num_features, len(counts_C)
        self.embed = nn.Identity()

    @classmethod
    def cases(cls) -> list[Case]:
        """Return what the contract tests try: the defaults, unless an auxiliary has more ways."""
        return [Case(cls.Config())]

    def meet(self, head: Any) -> None:
        """Take note of the expert's head, if it trains the head's memory or `uses_head`; both stay the head's.

        A parameter of it that enters the loss goes through `Seen.once`.
        """

    def phase(self, progress: Progress) -> Hashable:
        """Return a value that changes whenever the loss is made of other operations or Python numbers.

        See `Objective.phase`.
        """
        del progress
        return ()

    def loss(self, seen: Seen, now: Progress) -> Tensor:
        """Return the loss of the whole batch, a scalar; 0 by default. It changes nothing.

        Args:
            seen: embeddings and labels.
            now: the moment; what changes with it is in `phase`.
        """
        del now
        return seen.embedded_VBd.new_zeros(())

    def update(self, seen: Seen, lr: float, ok: Tensor) -> None:
        """Write to the buffers what the step has brought; nothing by default.

        Args:
            seen: as the loss saw it, without gradients.
            lr: base learning rate of the step.
            ok: bool scalar on the device. Where it is false the step was not finite, and no buffer may change.
        """

    def looks(self, now: Progress) -> bool:
        """Return whether it wants to see the features of all training images before an epoch."""
        del now
        return False

    def statistics(self, features_BD: Tensor, labels_B: Tensor) -> Tensor:
        """Return sums over some images that `before_epoch` wants over all, float64; of no image they are zeros.

        Args:
            features_BD: in evaluation mode, of images without augmentation.
            labels_B: int64.
        """
        raise NotImplementedError(f"{type(self).__name__} looks at all images, so it must define statistics")

    def before_epoch(self, sums: Tensor, now: Progress) -> None:
        """Write to the buffers what follows from the `statistics` of all training images."""


def class_sums(values_BD: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    """Return the sums of rows by class, and in the last column their numbers; float64 [classes, D + 1]."""
    ones_B1 = values_BD.new_ones(len(values_BD), 1, dtype=torch.float64)
    # A product, because adding rows by index is not deterministic on a GPU.
    member_BC = labels_B[:, None] == torch.arange(classes, device=labels_B.device)
    return member_BC.double().T @ torch.cat([values_BD.double(), ones_B1], dim=1)


def empty_class_problem(name: str, counts: list[int]) -> str | None:
    """Return which classes have no training image, for an auxiliary that needs their means; None if all have one."""
    empty = [c for c, images in enumerate(counts) if not images]
    if not empty:
        return None
    return (
        f"auxiliary '{name}': {len(empty)} of {len(counts)} classes have no training image: class "
        f"{', '.join(map(str, empty[:10]))}; needed at least 1 of each; leave them out of the data set, or remove it"
    )
