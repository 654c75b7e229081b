"""Objectives made of other objectives: a weighted sum of terms, and one for each expert.

RIDE is the sum of `ldam` and `expert_divergence`; TADE is `cross_entropy`, `balanced_softmax` and `inverse_softmax`,
one per expert.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor, nn

from experts.cases import Case
from experts.class_groups import GroupRule
from experts.losses.class_weights import ClassWeights
from experts.losses.cross_entropy import CrossEntropy
from experts.objective import ExtraInputs, Objective, ObjectiveSettings, StepContext
from experts.progress import Progress
from experts.ramps import Ramp, constant
from experts.registry import PieceOf, build, piece, register

Part = Annotated[Any, PieceOf("objective")]


class ComposedSettings(ObjectiveSettings):
    """Base of the configs of objectives made of others: what follows from a part follows from the whole."""

    model_config = ConfigDict(defer_build=True)  # the other objectives are not registered yet

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Any]:
        """The parts' configs by their key, relative to `objective`."""

    @model_validator(mode="after")
    def _parts_that_fit(self) -> ComposedSettings:
        for key, part in self.parts.items():
            cls = piece("objective", part.name)
            if cls.flow is not None or cls.label_sets != 1 or cls.extra_outputs:
                where = f"flow '{cls.flow}'" if cls.flow else "other outputs than class scores"
                raise ValueError(
                    f"{key}.name = {part.name}: it is for {where}, and can be no part of another; remove it"
                )
        if self.whole_batch and self.teacher_names is not None:
            raise ValueError(f"{', '.join(self.parts)}: one needs the whole batch, another teachers; remove either")
        return self

    @property
    def whole_batch(self) -> bool:
        """Whether a part needs the whole batch; the others then get it, too."""
        return any(part.whole_batch for part in self.parts.values())

    @property
    def takes_mixed(self) -> bool:
        """Whether every part takes mixed images."""
        return all(part.takes_mixed for part in self.parts.values())

    def check_head(self, head: Any) -> None:
        """Refuse a head that a part refuses."""
        for part in self.parts.values():
            part.check_head(head)

    def weighting_problem(self) -> str | None:
        """Return why no part takes class weights; None where one does, as the others stay as they are."""
        problems = [part.weighting_problem() for part in self.parts.values()]
        return None if None in problems else problems[0]

    @property
    def gives_probabilities(self) -> bool:
        """Whether those of all parts that say something of classes do."""
        return all(part.gives_probabilities for part in self.parts.values() if part.fits_classes)

    @property
    def teacher_names(self) -> tuple[str, ...] | None:
        """The teachers that the parts need; None where none asks for one by name."""
        wanted = [part.teacher_names for part in self.parts.values()]
        known = [names for names in wanted if names is not None]
        return tuple(dict.fromkeys(name for names in known for name in names)) if known else None

    @property
    def group_rule(self) -> GroupRule | None:
        """The rule of the first part that has one."""
        return next((part.group_rule for part in self.parts.values() if part.group_rule is not None), None)

    @property
    def switches(self) -> dict[str, int]:
        """Those of the parts, under their full keys."""
        return {f"{at}.{key}": epoch for at, part in self.parts.items() for key, epoch in part.switches.items()}

    @property
    def prepares(self) -> bool:
        """Whether a part's `prepare` has something to do."""
        return any(part.prepares for part in self.parts.values())

    @property
    def observes(self) -> bool:
        """Whether a part's `observe` has something to do."""
        return any(part.observes for part in self.parts.values())


class Composed(Objective):
    """Base of objectives made of others. Denominators and terms of a part carry its name and a dot before their own."""

    weighable: ClassVar[bool] = True
    parts: nn.ModuleDict

    def _take(self, parts: Mapping[str, Objective]) -> None:
        self.parts = nn.ModuleDict(parts)
        self.teacher_classes = {}
        for part in parts.values():
            self.teacher_classes |= part.teacher_classes
        self.capturable = all(part.capturable for part in parts.values())

    def _each(self) -> dict[str, Any]:
        return dict(self.parts.items())

    @property
    def detached(self) -> str:
        """The quantities that the parts hold constant."""
        return "; ".join(part.detached for part in self._each().values() if part.detached)

    def weigh(self, weights: ClassWeights, counts_C: Tensor) -> None:
        """Put class weights on all parts that take them. See `Objective.weigh`."""
        if problem := self.config.weighting_problem():
            raise ValueError(problem)
        for part in self._each().values():
            if part.config.weighting_problem() is None:
                part.weigh(weights, counts_C)

    def phase(self, progress: Progress) -> Hashable:
        """Return the parts' phases. See `Objective.phase`."""
        return tuple(part.phase(progress) for part in self._each().values())

    def denominators(self, labels_B: Tensor, progress: Progress) -> dict[str, Tensor]:
        """Return the parts' denominators, each named `<part>.<denominator>`."""
        return {
            f"{name}.{key}": value
            for name, part in self._each().items()
            for key, value in part.denominators(labels_B, progress).items()
        }

    def _loss_of(
        self, name: str, logits_EBC: Tensor, labels_B: Tensor, now: StepContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a part's loss and its terms, with its own denominators."""
        above = f"{name}."
        own = {key.removeprefix(above): v for key, v in now.denominators.items() if key.startswith(above)}
        # Parts that draw the same quantity get other numbers.
        inside = replace(now, denominators=own, extra=now.extra.within(name))
        loss, terms = self.parts[name](logits_EBC, labels_B, inside)
        return loss, terms

    def prepare(self, batches: Callable[[str], Iterable[tuple[ExtraInputs, Tensor]]]) -> None:
        """Let every part that wants to look at the data do so, one after the other."""
        for part in self._each().values():
            if part.config.prepares:
                part.prepare(batches)

    def assume_prepared(self) -> None:
        """See `Objective.assume_prepared`."""
        for part in self._each().values():
            part.assume_prepared()

    def observe(self, per_class_top1: Sequence[float | None]) -> None:
        """See `Objective.observe`."""
        for part in self._each().values():
            part.observe(per_class_top1)


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@register("objective", "sum")
class Sum(Composed):
    """A weighted sum of objectives of all experts.

    The class distribution that its experts learn is the mean of what the terms say, by their weights. Terms with a
    weight that is not positive do not count, nor do terms that say nothing of classes.
    """

    class Config(ComposedSettings):
        name: Literal["sum"] = "sum"
        terms: dict[str, Part] = Field(default_factory=lambda: {"cross_entropy": CrossEntropy.Config()})
        """The terms by a name of their own."""
        weights: dict[str, Ramp] = Field(default_factory=dict)
        """Factors of the terms, by name, no unit: numbers or ramps (experts/ramps.py); 1 where a term has none. A
        negative one rewards."""

        @model_validator(mode="after")
        def _named(self) -> Sum.Config:
            if not self.terms:
                raise ValueError("terms = {}: needed at least one, as terms.<name>.name=cross_entropy")
            if bad := [name for name in self.terms if not _NAME.fullmatch(name)]:
                raise ValueError(f"terms.{bad[0]}: needed a name of letters, digits and underscores")
            if unknown := sorted(set(self.weights) - set(self.terms)):
                raise ValueError(f"weights.{unknown[0]}: there is no such term; the terms are {', '.join(self.terms)}")
            if not any(self.weight(name).start or self.weight(name).end for name in self.terms):
                found = self.model_dump()["weights"]
                raise ValueError(f"weights = {found}: all terms count nothing; give one a weight that is not 0")
            return self

        @property
        def parts(self) -> Mapping[str, Any]:
            """See `ComposedSettings.parts`."""
            return {f"terms.{name}": term for name, term in self.terms.items()}

        def number_problem(self, num_experts: int) -> str | None:
            """Return why a term does not take so many experts. See `ObjectiveSettings.number_problem`."""
            problems = [
                super().number_problem(num_experts),
                *(t.number_problem(num_experts) for t in self.terms.values()),
            ]
            return next((problem for problem in problems if problem is not None), None)

        def weight(self, name: str) -> Ramp:
            """Return the factor of a term."""
            return self.weights.get(name, constant(1.0))

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return the terms' distributions, in the proportion of their weights; of ramps as they end."""
            counting = [(self.weight(name).end, term) for name, term in self.terms.items() if term.fits_classes]
            found = [(w, *term.trained_log_prior(counts_C, log_share_C, num_experts)) for w, term in counting if w > 0]
            if not found:
                return super().trained_log_prior(counts_C, log_share_C, num_experts)
            whole = sum(w for w, _, _ in found)
            rows = torch.stack([w / whole * log_EC for w, log_EC, _ in found]).sum(dim=0)
            words = zip(*(of_each for _, _, of_each in found), strict=True)
            return rows, tuple(" and ".join(dict.fromkeys(of_one)) for of_one in words)

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        self._take({name: build("objective", term, counts_C, num_experts) for name, term in config.terms.items()})
        different = {part.lr_factors for part in self._each().values()} - {super().lr_factors}
        if len(different) > 1:
            raise ValueError(
                f"objective 'sum': its terms want different learning rates of the experts, {sorted(different)}; needed "
                f"one set at most; remove a term"
            )

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Objective.cases`."""
        ride = cls.Config(
            terms={
                "ldam": {"name": "ldam", "reweight_epoch": 1},
                "divergence": {"name": "expert_divergence", "reweight_epoch": 1},
            },
            weights={"divergence": constant(-0.45)},
        )
        nested = cls.Config(
            terms={
                "both": {"name": "sum", "terms": {"a": {"name": "logit_adjustment"}, "b": {"name": "ldam"}}},
                "c": {"name": "cross_entropy"},
            },
            weights={"both": constant(0.5)},
        )
        whole = cls.Config(terms={"a": {"name": "lade"}, "b": {"name": "ldam"}}, weights={"a": constant(0.5)})
        falling = ride.model_copy(update={"weights": {"ldam": Ramp(ramp="parabolic", start=1, end=0)}})
        return [Case(cls.Config(), 1), Case(nested, 1), Case(whole, 1), Case(ride, 2), Case(ride, 3), Case(falling, 2)]

    @property
    def lr_factors(self) -> tuple[float, ...]:
        """Those of the term that has other ones than 1."""
        plain = super().lr_factors
        return next((part.lr_factors for part in self._each().values() if part.lr_factors != plain), plain)

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and every term's terms before its weight, `<term>.<its term>`."""
        self.check_shapes(logits_EBC, labels_B)
        losses, terms = [], dict[str, Tensor]()
        for name in self.parts:
            loss, found = self._loss_of(name, logits_EBC, labels_B, now)
            losses.append(self.config.weight(name).times(loss, f"weight of {name}", now.progress, now.extra.numbers))
            terms |= {f"{name}.{key}": value for key, value in found.items()}
        return torch.stack(losses).sum(), terms


@register("objective", "per_expert")
class PerExpert(Composed):
    """One objective for each expert, in the experts' order, each of that expert's scores alone."""

    class Config(ComposedSettings):
        name: Literal["per_expert"] = "per_expert"
        of: tuple[Part, ...] = Field(default_factory=lambda: (CrossEntropy.Config(),))
        """The experts' objectives, in the experts' order."""

        @property
        def parts(self) -> Mapping[str, Any]:
            """See `ComposedSettings.parts`."""
            return {f"of.{place}": part for place, part in enumerate(self.of)}

        def number_problem(self, num_experts: int) -> str | None:
            """Return why the parts are not one for each expert. See `ObjectiveSettings.number_problem`."""
            if problem := super().number_problem(num_experts):
                return problem
            if len(self.of) != num_experts:
                return (
                    f"objective.of: {len(self.of)} objectives for method.num_experts = {num_experts}; needed one for "
                    f"each expert; set method.num_experts={len(self.of)}, or change objective.of"
                )
            return next((problem for part in self.of if (problem := part.number_problem(1))), None)

        def weighting_problem(self) -> str | None:
            """Return why an expert's part takes no class weights: all must."""
            return next((problem for part in self.of if (problem := part.weighting_problem())), None)

        def trained_log_prior(
            self, counts_C: Tensor, log_share_C: Tensor, num_experts: int
        ) -> tuple[Tensor, tuple[str, ...]]:
            """Return what each expert's own objective says."""
            del num_experts
            found = [part.trained_log_prior(counts_C, log_share_C, 1) for part in self.of]
            return torch.cat([row_1C for row_1C, _ in found]), tuple(word for _, words in found for word in words)

    def __init__(self, config: Config, counts_C: Tensor, num_experts: int) -> None:
        super().__init__(config, counts_C, num_experts)
        self._take({str(k): build("objective", part, counts_C, 1) for k, part in enumerate(config.of)})

    @classmethod
    def cases(cls) -> list[Case]:
        """See `Objective.cases`."""
        ldam = {"name": "ldam", "reweight_epoch": 1}
        both = {"name": "sum", "terms": {"a": {"name": "cross_entropy"}, "b": {"name": "grw"}}}
        of_three = cls.Config(of=(ldam, both, {"name": "logit_adjustment"}))
        return [Case(cls.Config(), 1), Case(of_three, 3)]

    def forward(self, logits_EBC: Tensor, labels_B: Tensor, now: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum over experts, the term `per_expert` [E], and, of a part with several terms, each of them."""
        self.check_shapes(logits_EBC, labels_B)
        losses, terms = [], dict[str, Tensor]()
        for place, name in enumerate(self.parts):
            loss, found = self._loss_of(name, logits_EBC[place : place + 1], labels_B, now)
            losses.append(loss)
            if len(found) > 1:
                terms |= {f"{name}.{key}": value.sum() for key, value in found.items()}
        loss_E = torch.stack(losses)
        return loss_E.sum(), {"per_expert": loss_E.detach(), **terms}
