"""ACE: experts for ever rarer classes, each silent on the classes that are not its own.

The first expert learns all classes and the trunk; the others learn from images of their own classes alone, leave the
trunk as it is, and learn more slowly the fewer images they see.
Paper: Cai et al. 2021, "ACE: Ally Complementary Experts for Solving Long-Tailed Recognition in One-Shot",
arXiv:2108.02385. No code was published: what the paper leaves open is an option.

Shapes: E experts, e of them held here, B images, b of them of an expert's own classes, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from experts.batches import Batch, on_host
from experts.cases import Case
from experts.class_groups import GroupRule, nested_targets
from experts.data.transfer import to_device
from experts.flow import Flow, FlowSettings, Network
from experts.objective import Objective, ObjectiveSettings, StepContext, num_images
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.registry import register


def ace_loss(
    logits_EBC: Tensor,
    labels_B: Tensor,
    *,
    targets_EC: Tensor,
    softmax_over: Literal["all", "target"],
    com_batch: Literal["target", "all"],
    com_reduction: Literal["sum", "mean"],
    rows_E: Tensor,
    images: Tensor,
    min_rows: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum over experts of the cross-entropy on their classes and of their squared scores for all others.

    Args:
        logits_EBC: scores; half types are computed in float32. Rows of an expert that do not enter may hold anything.
        labels_B: class ids, int64, in [0, C).
        targets_EC: an expert's own classes, bool.
        softmax_over: "all" classes, or an expert's own ("target").
        com_batch: whether the squared scores are of images of the expert's classes ("target") or of "all" images.
        com_reduction: of the squares over the classes that are not the expert's.
        rows_E: images of each expert's classes in the global batch: its denominator.
        images: scalar, images of the global batch: denominator of the squares of "all" images.
        min_rows: experts with fewer images in the global batch, or none, add nothing.

    Returns:
        The loss (scalar, nats plus squared scores) and its terms [E], detached: `classification` and `complement`.

    Source: arXiv:2108.02385, section 3, as quoted by others; both terms have weight 1.
    """
    logits_EBC = at_least_float32(logits_EBC)
    dtype = logits_EBC.dtype
    rows_EB = targets_EC[:, labels_B]
    # An expert divides by its own images of the global batch, or skips the step with factor 0. Where it has none, its
    # numerators are 0; dividing them by 1 keeps them so.
    considered_E = rows_E if com_batch == "target" else images
    factor_E = (considered_E >= min_rows).to(dtype) / rows_E.clamp(min=1).to(dtype)

    scores_EBC = logits_EBC if softmax_over == "all" else logits_EBC.masked_fill(~targets_EC[:, None], -torch.inf)
    index_EB1 = labels_B.expand(len(logits_EBC), -1).unsqueeze(-1)
    nll_EB = -scores_EBC.log_softmax(dim=-1).gather(-1, index_EB1).squeeze(-1)
    # where, not a product: over its own classes, a label of another class has an infinite loss, and 0 * inf is NaN.
    classification_E = torch.where(rows_EB, nll_EB, 0).sum(dim=-1) * factor_E

    others_EC = ~targets_EC
    square_EB = (logits_EBC.square() * others_EC[:, None]).sum(dim=-1)
    if com_reduction == "mean":
        square_EB = square_EB / others_EC.sum(dim=-1, keepdim=True).clamp(min=1)
    if com_batch == "target":
        complement_E = torch.where(rows_EB, square_EB, 0).sum(dim=-1) * factor_E
    else:
        complement_E = square_EB.sum(dim=-1) * (images >= min_rows).to(dtype) / images.to(dtype)
    terms = {"classification": classification_E.detach(), "complement": complement_E.detach()}
    return (classification_E + complement_E).sum(), terms


@register("objective", "ace")
class ACE(Objective):
    """ACE's objective and its rule for learning rates. The first expert learns all classes."""

    class Config(ObjectiveSettings):
        name: Literal["ace"] = "ace"
        softmax_over: Literal["all", "target"] = "all"
        """Classes in the softmax: "all", or the expert's own ("target"); the sources differ."""
        com_batch: Literal["target", "all"] = "target"
        """Images whose scores for classes that are not the expert's are pulled to 0: those of its own classes
        ("target"), or "all"; the sources differ."""
        com_reduction: Literal["sum", "mean"] = "sum"
        """Over those scores' squares; the sources differ."""
        groups: GroupRule = GroupRule()
        """The classes that an expert leaves out; 4 experts need rule "equal" or "index", and so do sets without a class
        of few images, as CIFAR-10-LT."""
        scale_lr: bool = True
        """Whether an expert's learning rate is multiplied by the share of training images in its classes."""
        min_rows: Annotated[int, Field(ge=1)] = 1
        """Fewest images of its classes in the global batch with which an expert takes the step; 2 where its maps shrink
        to 1 x 1, since BatchNorm cannot train on one value."""

    flow: ClassVar[str | None] = "ace"
    num_experts_allowed: ClassVar[tuple[int, ...]] = (2, 3, 4)
    roles: ClassVar[str] = "published 3 and 4"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"softmax_over": "target", "com_reduction": "mean"},
        {"com_batch": "all", "groups": {"rule": "equal"}},
        {"min_rows": 2},
    )
    targets_EC: Tensor

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Objective.cases`; 4 experts need another rule of groups than the default."""
        some = [case for case in super().cases() if case.num_experts < 4]
        return [*some, Case(cls.Config(groups=GroupRule(rule="equal")), 4)]

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        targets_EC = nested_targets(counts_C, num_experts, config.groups)
        images_E = (targets_EC * counts_C).sum(dim=-1, dtype=torch.float64)
        self._shares = tuple((images_E / images_E[0]).tolist())
        # Not persistent: it follows from config and counts, and an old checkpoint must not bring another.
        self.register_buffer("targets_EC", targets_EC, persistent=False)
        self.host_targets_EC = targets_EC.cpu().numpy()  # for a flow that counts rows without waiting for a device

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """The share of the training images, not of the classes, that each expert learns from."""
        return self._shares if self.config.scale_lr else super().lr_factors

    def rows_EB(self, labels_B: Tensor) -> Tensor:
        """Return where images are of an expert's own classes, bool [E, B]."""
        return self.targets_EC[:, labels_B]

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return `images`, and `rows_<k>`: images of the own classes of the k-th expert (from 0), perhaps none."""
        rows_E = self.rows_EB(labels_B).sum(dim=-1, dtype=torch.float64)
        return {"images": num_images(labels_B), **{f"rows_{k}": rows for k, rows in enumerate(rows_E)}}

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """See `ace_loss` and `Objective.forward`."""
        self.check_shapes(logits_EBC, labels_B)
        config = self.config
        return ace_loss(
            logits_EBC,
            labels_B,
            targets_EC=self.targets_EC,
            softmax_over=config.softmax_over,
            com_batch=config.com_batch,
            com_reduction=config.com_reduction,
            rows_E=torch.stack([now.denominators[f"rows_{k}"] for k in range(self.num_experts)]),
            images=now.denominators["images"],
            min_rows=config.min_rows,
        )


@register("flow", "ace")
class OwnClasses(Flow):
    """Every expert scores the images of its own classes, and only the first sends a gradient to the trunk.

    Rows that an expert does not score are 0. An expert whose classes are not in the global batch is not run at all:
    its BatchNorm must not count the step, while momentum and weight decay go on. An expert whose classes are only in
    other replicas' parts is run on no image, since its BatchNorm may be exchanging statistics with theirs. Of
    mixed images an expert scores every one that has a label of its classes.
    """

    class Config(FlowSettings):
        name: Literal["ace"] = "ace"
        select: Literal["before", "after"] = "before"
        """Whether images of other classes are left out "before" the expert, so that they never reach its BatchNorm, or
        "after" it; the paper does not say."""

        @property
        def skips_images(self) -> bool:
            """See `FlowSettings.skips_images`."""
            return self.select == "before"

    takes: ClassVar[type[Objective] | None] = ACE
    needs_own_heads: ClassVar[bool] = True
    capturable: bool = False
    """Labels say which images an expert scores, and with them the shapes of all that it computes."""
    objective: ACE

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Flow.cases`."""
        plain = Case(cls.Config(), objective=ACE.Config())
        everything = Case(cls.Config(), objective=ACE.Config(com_batch="all"))
        return [plain, Case(cls.Config(select="after"), objective=ACE.Config()), everything]

    def __call__(
        self, network: Network, batch: Batch, progress: Progress, gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """See `Flow.__call__`."""
        held = [self.expert_names.index(name) for name in network.names]
        enough, rows_EB = self._own_rows(batch)

        def run_trunk(trunk: nn.Module) -> Tensor:
            # The trunk learns from the first expert alone. A worker without it builds no graph, which saves the memory.
            with torch.set_grad_enabled(torch.is_grad_enabled() and 0 in held):
                return trunk(batch.images_B3HW)

        h = network.trunk(run_trunk)
        places = self._places(rows_EB[held], h.device)

        def run_experts(experts: Any) -> Tensor:
            scores = []
            for k, places_b, (name, expert) in zip(held, places, experts.items(), strict=True):
                h_k = h if k == 0 else h.detach()
                if not enough[k]:
                    scores.append(at_least_float32(h[:0].detach()).new_zeros(len(h), self.objective.num_classes))
                elif len(places_b) == len(h):  # all images are its own: nothing to select, nothing to copy
                    scores.append(at_least_float32(self._run(name, expert, h_k)))
                elif self.config.select == "after":
                    all_BC = at_least_float32(self._run(name, expert, h_k))
                    scores.append(all_BC * all_BC.new_zeros(len(h), 1).index_fill(0, places_b, 1))
                else:
                    some_bC = at_least_float32(self._run(name, expert, h_k.index_select(0, places_b)))
                    none_BC = some_bC.new_zeros(len(h), some_bC.shape[1])
                    scores.append(none_BC.index_put((places_b,), some_bC))
            return torch.stack(scores)

        return gather(network.experts(run_experts))

    def _own_rows(self, batch: Batch) -> tuple[list[bool], np.ndarray]:
        """Return for each expert whether the global batch has enough images for it, and where its own lie here.

        The labels are read on the host, since shapes follow them.
        """
        targets_EC, labels = self.objective.host_targets_EC, on_host(batch)
        rows_EB, global_rows_EB = targets_EC[:, labels.labels_B], targets_EC[:, labels.global_labels]
        if batch.mixed is not None:
            others = on_host(batch.mixed)
            rows_EB = rows_EB | targets_EC[:, others.labels_B]
            global_rows_EB = global_rows_EB | targets_EC[:, others.global_labels]
        if self.objective.config.com_batch == "all":  # then every expert's scores of every image enter the loss
            rows_EB, global_rows_EB = np.ones_like(rows_EB), np.ones_like(global_rows_EB)
        return (global_rows_EB.sum(axis=1) >= self.objective.config.min_rows).tolist(), rows_EB

    @staticmethod
    def _places(rows_EB: np.ndarray, device: torch.device) -> Sequence[Tensor]:
        """Return the places of each expert's rows, int64, on the device after one copy; a mask would make it wait."""
        places = [np.flatnonzero(rows_B) for rows_B in rows_EB]
        return to_device(np.concatenate(places), device).split([len(found) for found in places])

    @staticmethod
    def _run(name: str, expert: Any, h: Tensor) -> Tensor:
        try:
            return expert(h)
        except ValueError as problem:
            if "more than 1 value per channel" not in str(problem):
                raise
            # BatchNorm's own message names neither the expert nor a key to set.
            raise ValueError(
                f"expert '{name}': the batch has 1 image of its classes and its maps are 1 x 1: BatchNorm needs more "
                f"than one value; set objective.min_rows = 2 to let the expert skip such steps, or use a larger batch"
            ) from problem
