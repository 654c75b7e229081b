"""The auxiliaries of one worker's experts in the steps of a stage (experts/auxiliaries/), and heads that follow them.

In a step, which a graph may replay:

    made     = auxiliary.make(rows of the trunk's output)         # if it makes images; the flow goes on with them
    features = of all views, from the flow                        # own rows
    keys     = the momentum copy's, of the second view            # own rows, without gradients
    embedded = auxiliary.embed(features)                          # own rows
    seen     = rows of all replicas of the same expert            # own ones with gradients; one exchange per auxiliary
    loss     = auxiliary.loss(seen)                               # of the whole batch, the same on every replica

Before the first step of an epoch they may see all training images (before_epoch.py). After a step, one kernel at a time
and only where the step was finite, comes `update` with what was seen, and the copies follow.
Between experts one number of each auxiliary crosses, for the loss that is logged.

Shapes: E experts, e of them held here, A auxiliaries, V views, B images of the whole batch, b of one replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from experts.auxiliaries.attached import Following, auxiliaries_of
from experts.auxiliaries.auxiliary import Auxiliary, AuxiliarySettings, Seen
from experts.auxiliaries.generator import Generator
from experts.batches import Batch, on_host
from experts.batches import share as share_of
from experts.draws import StepDraws
from experts.ensemble import Ensemble
from experts.precision import at_least_float32
from experts.progress import Progress
from experts.scalars import Numbers
from experts.side_by_side import side_by_side
from orchestration.config.run_config import EngineConfig
from orchestration.training.graphs import rebuilt
from orchestration.training.mesh import Mesh
from orchestration.training.network import HeldModules
from orchestration.training.precision import casting

SeenByAll = tuple[dict[str, Seen], ...]
"""All that the auxiliaries of each expert held here have seen, by name."""


@dataclass(frozen=True)
class Watched:
    """All that a step has shown, for what comes after it; without gradients.

    Attributes:
        seen: by auxiliaries.
        means: of the features of the whole batch, [D] for each head held here that follows them.
    """

    seen: SeenByAll
    means: tuple[Tensor, ...]


class StageAuxiliaries:
    """The auxiliaries of the experts that a worker holds.

    Args:
        configs: of the stage's auxiliaries, by name.
        model: with the auxiliaries attached, and parameters that have come to stay.
        mesh: this worker's place.
        engine: says in what type the network computes.

    Attributes:
        configs: as given.
        held: those of each own expert, by name.
    """

    def __init__(
        self, configs: Mapping[str, AuxiliarySettings], model: Ensemble, mesh: Mesh, engine: EngineConfig
    ) -> None:
        self.configs = configs
        self.held = [auxiliaries_of(expert) for expert in model.members()]
        self._model, self._mesh, self._engine = model, mesh, engine
        momenta = [config.momentum_copy for config in configs.values() if config.momentum_copy is not None]
        heads = [(place, expert.head) for place, expert in enumerate(model.members())]
        self._heads: list[tuple[int, Any]] = [
            (place, head)
            for place, head in heads
            if getattr(head, "follows", False) and any(p.requires_grad for p in head.parameters())
        ]
        self._following = Following(model, momenta[0]) if momenta else None
        self._makers = [name for name, config in configs.items() if config.makes]
        self._trunk_rows: Tensor | None = None  # of a step, from the flow to the losses

    def __bool__(self) -> bool:
        """Whether anything looks at a step."""
        return bool(self.configs or self._heads)

    @property
    def pieces(self) -> list[Auxiliary]:
        """All of them; those of one name have the same phases."""
        return [auxiliary for own in self.held for auxiliary in own.values()]

    def made(self, h: Tensor, batch: Batch, now: Progress) -> list[Tensor]:
        """See `Network.made`; keeps the trunk's output for the losses."""
        if not any(config.on_trunk for config in self.configs.values()):
            return []
        own = at_least_float32(h[: len(batch.labels_B)].detach()).flatten(1)
        [[rows]] = self._everyones([[own]], len(batch.global_labels), "trunk's output for auxiliaries")
        self._trunk_rows = rows
        labels, share = self.made_labels(batch, now)
        if not len(labels):
            return []
        [name] = self._makers
        whole = on_host(batch).global_labels
        found = [cast(Generator, pieces[name]).make(rows, whole, now, share) for pieces in self.held]
        return [x.view(len(x), *h.shape[1:]).to(h.dtype) for x in found]

    def made_labels(self, batch: Batch, now: Progress) -> tuple[np.ndarray, slice]:
        """Return the labels of the images that are made in a step, int64 [G], and which of them this replica makes."""
        if not self._makers:
            return np.zeros(0, dtype=np.int64), slice(0, 0)
        maker = cast(Generator, self.held[0][self._makers[0]])
        labels = maker.made_labels(on_host(batch).global_labels, now)
        return labels, slice(*share_of(len(labels), self._mesh.replica, self._mesh.shape.replicas))

    def losses(self, network: HeldModules, batch: Batch, now: Progress) -> tuple[Tensor, Watched]:
        """Return the losses of the whole batch, [e, A], 0 where an expert lacks the auxiliary; and what was shown.

        Args:
            network: whose flow has run.
            batch: of this replica.
            now: the moment.
        """
        features, scores = network.take_shown()
        means = self._means(features, batch)
        zero = at_least_float32(scores).new_zeros(())
        if not self.configs:
            return zero.new_zeros(len(self.held), 0), Watched((), means)
        keys = self._keys(batch)
        embedded = network.experts(
            lambda experts: side_by_side(
                lambda expert, own: _embedded(auxiliaries_of(expert), own, len(batch.labels_B)),
                experts.values(),
                features,
            )
        )
        seen: SeenByAll = tuple({} for _ in self.held)
        for name in self.configs:
            self._cross(name, embedded, keys, scores, batch, seen, network.draws)
        losses = [
            torch.stack([own[name].loss(found[name], now) if name in own else zero for name in self.configs])
            for own, found in zip(self.held, seen, strict=True)
        ]
        return torch.stack(losses), Watched(rebuilt(seen, Tensor.detach), means)

    def _means(self, features: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
        """Return the mean features of the whole batch for each head that follows them, in one exchange."""
        if not self._heads:
            return ()
        own = [at_least_float32(features[place].detach())[: len(batch.labels_B)].sum(dim=0) for place, _ in self._heads]
        sums = self._mesh.sum_over_data(torch.cat(own), "mean features of heads")
        return (sums / len(batch.global_labels)).split(len(own[0]))

    @torch.no_grad()
    def _keys(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Return the momentum copies' embeddings of the second view, by auxiliary, for each own expert."""
        copies = [expert.momentum_copy for expert in self._model.members()]
        if self._model.trunk_copy is None:
            return [{} for _ in copies]
        with casting(self._engine, self._mesh.device):
            h = self._model.trunk_copy(batch.views[0])  # on every worker, for BatchNorm's statistics
            present: list[nn.Module] = [copy for copy in copies if copy is not None]
            found = iter(side_by_side(lambda copy: _keys_of(copy, h), present))
        return [{} if copy is None else next(found) for copy in copies]

    def _cross(
        self,
        name: str,
        embedded: list[dict[str, Tensor]],
        keys: list[dict[str, Tensor]],
        scores: Tensor,
        batch: Batch,
        seen: SeenByAll,
        draws: StepDraws,
    ) -> None:
        """Gather the rows of all replicas for the auxiliaries of one name, and add what each sees to `seen`."""
        places = [place for place, own in enumerate(self.held) if name in own]
        if not places:
            return
        piece = self.held[places[0]][name]
        if piece.on_trunk:
            assert self._trunk_rows is not None, "the flow has not asked what is made"
            of_trunk = Seen(self._trunk_rows[None], None, None, batch.global_labels, self._mesh.shape.replicas)
            for place in places:
                seen[place][name] = of_trunk
            return
        count, views = len(batch.labels_B), piece.config.views_together
        has_keys, classes = piece.config.momentum_copy is not None, piece.num_classes
        rows: list[list[Tensor]] = []
        for place in places:
            own = embedded[place][name]
            parts = [*own.view(views, count, *own.shape[1:])]
            parts += [keys[place][name]] if has_keys else []
            # Objectives may want further outputs, and images that were made lie below.
            parts += [scores[place][:count, :classes]] if piece.sees_logits else []
            rows.append([at_least_float32(part) for part in parts])
        whole = self._everyones(rows, len(batch.global_labels), f"vectors of auxiliary {name}")
        drawn = draws.of_rows(whole=True)
        for place, parts in zip(places, whole, strict=True):
            seen[place][name] = Seen(
                torch.stack(parts[:views]),
                parts[views] if has_keys else None,
                parts[-1] if piece.sees_logits else None,
                batch.global_labels,
                self._mesh.shape.replicas,
                None if piece.guesses is None else batch.told[piece.guesses],
                drawn(f"{name} of {self._model.names[place]}", piece.draws) if piece.draws else None,
            )

    def _everyones(self, own: list[list[Tensor]], images: int, what: str) -> list[list[Tensor]]:
        """Return tensors [b, x] of several experts with the rows of all replicas, [B, x], in one exchange."""
        if self._mesh.shape.replicas == 1:
            return own
        widths = [part.shape[1] for part in own[0]]
        packed = torch.stack([torch.cat(parts, dim=1) for parts in own])
        return [list(rows.split(widths, dim=1)) for rows in self._mesh.batch_rows(packed, images, what)]

    def counted(
        self, own_eA: Tensor, names: tuple[str, ...], now: Progress, numbers: Numbers
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this replica's share of all experts' losses, weighted, and each as a term.

        Args:
            own_eA: as `losses` returns them.
            names: of all experts.
            now: the moment.
            numbers: makes weights that change with it.
        """
        replicas = self._mesh.shape.replicas
        values_EA = self._mesh.gather(own_eA, "losses of auxiliaries")
        # All replicas have the whole value, and values are summed over them; gradients are of own rows.
        values_EA = values_EA - (1 - 1 / replicas) * values_EA.detach()
        total, terms = values_EA.new_zeros(()), dict[str, Tensor]()
        for column, (name, config) in enumerate(self.configs.items()):
            total = total + config.weight.times(values_EA[:, column].sum(), f"weight of {name}", now, numbers)
            if config.experts is None:
                terms[name] = values_EA[:, column]
            else:
                terms |= {f"{name}/{own}": values_EA[names.index(own), column] for own in config.experts}
        return total, terms

    @torch.no_grad()
    def update(self, watched: Watched, lr: float, ok: Tensor) -> None:
        """Let memories and heads take in a step, and copies follow the weights that it has moved.

        Args:
            watched: of the step.
            lr: its base learning rate.
            ok: whether all was finite, a bool scalar on the device.
        """
        for own, found in zip(self.held, watched.seen or [{} for _ in self.held], strict=True):
            for name, auxiliary in own.items():
                auxiliary.update(found[name], lr, ok)
        for (_, head), mean_D in zip(self._heads, watched.means, strict=True):
            head.follow(mean_D, lr, ok)
        if self._following is not None:
            self._following.step(ok)


def _embedded(auxiliaries: Mapping[str, Auxiliary], features: Tensor, images: int) -> dict[str, Tensor]:
    """Return the embeddings of one expert's features [V b, D], of as many views as each auxiliary wants."""
    return {
        name: auxiliary.embed(features[: auxiliary.config.views_together * images])
        for name, auxiliary in auxiliaries.items()
        if not auxiliary.on_trunk
    }


def _keys_of(copy: Any, h: Tensor) -> dict[str, Tensor]:
    features = copy["features"](h)
    return {name: embed(features) for name, embed in copy["embed"].items()}
