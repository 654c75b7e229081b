"""The work of a stage without steps: heads are fitted to the training images, open numbers are chosen on validation.

fit
    heads that fit        each sees its own expert's features of all training images; their sums go over the replicas
    numbers left open     every candidate in turn is set on all experts, and the ensemble scores the validation split;
                          the best mean of per-class accuracies wins; without such a split the published number holds

The test split is never read. A fit that was interrupted begins again.

Shapes: E experts, e of them held here, B images of one replica, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aggregation.aggregator import Outputs
from experts.tunable import Tunable
from orchestration.config.recipe_checks import open_choice
from orchestration.training.features import FeaturePasses
from orchestration.training.precision import casting
from orchestration.training.stage_setup import StageSetup, TrainingSetup

Fitted = Mapping[str, Any]
"""The result of a fit, as a checkpoint keeps it: `values`, by kind of piece the keys of its config, and `choices`."""


@dataclass(frozen=True)
class Choice:
    """One number that the recipe left open.

    Attributes:
        key: of the config, as `head.gamma`.
        value: that was taken.
        split: that it was chosen on; None where there was none to choose on.
        origin: where the published number comes from.
        published: that number.
        tried: (number, mean of per-class accuracies on the split), in the order tried.
    """

    key: str
    value: float
    split: str | None
    origin: str
    published: float
    tried: tuple[tuple[float, float], ...]


@torch.no_grad()
def fit(setup: StageSetup, beat: Callable[[], None]) -> Fitted:
    """Fit heads and choose open numbers. Every worker must take part, and all return the same.

    Args:
        setup: of the stage.
        beat: called after every batch.

    Raises:
        ValueError: a class has no image to fit a head to.
    """
    setup.model.eval()  # the next step sets the training mode again
    _fit_heads(setup, beat)
    values: dict[str, dict[str, float]] = {}
    choices = []
    for kind, config in (("head", _head_config(setup)), ("aggregator", setup.aggregator.config)):
        if (key := open_choice(kind, config)) is not None:
            choice = _choose(setup, kind, key, beat)
            values[kind] = {key: choice.value}
            choices.append(asdict(choice))
    return {"values": values, "choices": choices} if choices else {}


@torch.no_grad()
def fit_before_steps(setup: TrainingSetup, beat: Callable[[], None]) -> None:
    """Fit heads that go on to learn by steps. Every worker must take part; arguments and errors as for `fit`."""
    setup.model.eval()
    _fit_heads(setup, beat)
    setup.engine.restore({})  # ZeRO keeps its own copy of the weights, which must follow


def apply(setup: StageSetup, fitted: Fitted) -> None:
    """Set the numbers of an earlier fit; what heads were fitted to is among their tensors."""
    for kind, numbers in fitted.get("values", {}).items():
        for value in numbers.values():
            _set(_tunables(setup, kind), value)


def _head_config(setup: StageSetup) -> Any:
    return setup.config.method.head_in(setup.stage_name)


def _heads(setup: StageSetup) -> list[Any]:
    """Return the heads of this worker: one for each own expert, or the one that all share."""
    shared = setup.model.shared
    return [shared["head"]] if "head" in shared else [expert.head for expert in setup.model.members()]


def _tunables(setup: StageSetup, kind: str) -> list[Tunable]:
    return _heads(setup) if kind == "head" else [setup.aggregator]  # type: ignore[list-item]


def _set(tunables: Sequence[Tunable], value: float) -> None:
    for tunable in tunables:
        tunable.value = value


def _fit_heads(setup: StageSetup, beat: Callable[[], None]) -> None:
    """Let every own head see its features of the training images, if it is fitted to them."""
    heads = [head for head in _heads(setup) if head.fits or head.fits_first]
    if not heads:
        return
    features = FeaturePasses(setup, setup.dataset.train_as_evaluated(), beat)
    for place, head in enumerate(heads):
        try:
            head.fit(lambda place=place: features.of(place), partial(setup.mesh.sum_over_data, what="sums of a fit"))
        except ValueError as problem:
            empty = [setup.dataset.class_names[c] for c in (setup.counts_C == 0).nonzero().flatten().tolist()]
            named = f" (named {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''})" if empty else ""
            raise ValueError(f"stage {setup.stage_name}: {problem}{named}") from problem


def _choose(setup: StageSetup, kind: str, key: str, beat: Callable[[], None]) -> Choice:
    """Try every candidate on the validation split and set the best; ties go to the first."""
    tunables = _tunables(setup, kind)
    first = tunables[0]
    value, tried = first.published, []
    if setup.dataset.val is not None:
        features = FeaturePasses(setup, setup.scored("val"), beat)
        candidates, counted = list(first.candidates()), []
        for candidate in candidates:
            _set(tunables, candidate)
            counted.append(_right_and_all(setup, features))
            beat()  # a pass over features that are kept gives no sign of life
        # Read together, so that the host does not wait for every candidate.
        tried = [(n, _mean_accuracy(found)) for n, found in zip(candidates, torch.stack(counted).cpu(), strict=True)]
        value = max(tried, key=lambda one: one[1])[0]
    _set(tunables, value)
    split = "val" if tried else None
    return Choice(f"{kind}.{key}", value, split, first.origin, first.published, tuple(tried))


def _right_and_all(setup: StageSetup, features: FeaturePasses) -> Tensor:
    """Return by class the images that the ensemble has right, and all images; float64 [2, C]."""
    mesh = setup.mesh
    numbers_EK = setup.numbers_of_experts()
    setup.aggregator.check(numbers_EK)
    right_and_all_2C = torch.zeros(2, setup.dataset.num_classes, dtype=torch.float64, device=mesh.device)
    for own, labels_B in features.all():
        with casting(setup.config.engine, mesh.device):
            logits_EBC, gates_EB = setup.model.outputs_of(own, mesh.gather)
        found_B = setup.aggregator(Outputs(logits_EBC, numbers_EK, gates_EB)).argmax(dim=1)
        right_B = found_B == labels_B
        # Whole numbers, so that the order in which a GPU adds them does not matter.
        right_and_all_2C.index_add_(1, labels_B, torch.stack([right_B, torch.ones_like(right_B)]).double())
    return mesh.sum_over_data(right_and_all_2C, "right answers")


def _mean_accuracy(right_and_all_2C: Tensor) -> float:
    """Return the mean over classes of the accuracy, of those classes that the split has images of."""
    right_C, all_C = right_and_all_2C
    return (right_C / all_C)[all_C > 0].mean().item()
