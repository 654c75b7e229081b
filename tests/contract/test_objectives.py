"""Every registered objective, in every variant of its config, keeps the promises of `Objective`.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import aggregation
import experts
from experts import registry
from experts.backbones.resnet_cifar import ResNetCifar
from experts.cases import Case, cases_of
from experts.data.keyed_random import key
from experts.draws import Moment, StepDraws
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.objective import MAX_EXPERTS, ExtraInputs, Objective, StepContext
from experts.progress import Progress

registry.import_pieces(experts, aggregation)

COUNTS = torch.tensor([300, 60, 12, 1])  # the rarest class has one image
LABELS = torch.tensor([0, 3, 1, 0, 2, 2, 0])
NOW = Progress(epoch=2, epochs=4, step=1, steps_per_epoch=3)
PARTNERS = torch.tensor([3, 1, 2, 2, 3, 0, 1])  # of the second batch, for objectives that want the labels of both


def draw(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prepare(objective) -> None:
    """Show the objective every training image and two validation images per class, if it needs them."""

    def batches(split):
        labels = torch.arange(len(COUNTS)).repeat_interleave(COUNTS if split == "train" else 2)
        yield ExtraInputs(teachers_of(objective, len(labels)), torch.arange(len(labels))), labels

    if objective.config.prepares:
        objective.prepare(batches)
    if objective.config.observes:
        objective.observe([0.5, 0.4, 0.1, 0.1])


def teachers_of(objective, images) -> dict[str, Tensor]:
    """Scores of the teachers that the objective asks for, each of the classes that it knows."""
    known = {name: len(objective.teacher_classes.get(name, COUNTS)) for name in objective.config.teacher_names or ()}
    return {name: draw(images, classes, seed=len(name)) for name, classes in known.items()}


@dataclass(frozen=True)
class Trial:
    """One case of one objective, at some logits and labels."""

    name: str
    case: Case

    def label(self) -> str:
        settings = self.case.config.model_dump(exclude_unset=True)
        return "-".join([self.name, *(f"{key}={value}" for key, value in settings.items()), f"E{self.num_experts}"])

    @property
    def cls(self) -> type[Objective]:
        return registry.piece("objective", self.name)

    @property
    def num_experts(self) -> int:
        return self.case.num_experts

    def objective(self):
        objective = registry.build("objective", self.case.config, COUNTS, self.num_experts)
        prepare(objective)
        return objective

    def logits(self, dtype=torch.float64) -> Tensor:
        outputs = len(COUNTS) + self.cls.extra_outputs
        return (draw(self.num_experts, len(LABELS), outputs, seed=self.num_experts) * 5).to(dtype)

    def labels(self, images: Any = slice(None)) -> Tensor:
        """Return the labels of some images; the images are the last axis."""
        return (torch.stack([LABELS, PARTNERS]) if self.cls.label_sets == 2 else LABELS)[..., images]

    def now(self, objective, images: Any = slice(None), labels=None) -> StepContext:
        """Return the context of some images, with the denominators of all."""
        teachers = {name: scores[images] for name, scores in teachers_of(objective, len(LABELS)).items()}
        draws = StepDraws(partial(key, 0, "contract"))
        draws.begin(Moment(NOW.epoch, 0, 0, len(LABELS)))
        drawn = draws.of_rows()
        extra = ExtraInputs(teachers, (torch.arange(len(LABELS)) * 50)[images], lambda *what: drawn(*what)[images])
        return StepContext(objective.denominators(self.labels() if labels is None else labels, NOW), NOW, extra)

    def loss(self, objective, logits_EBC):
        return objective(logits_EBC, self.labels(), self.now(objective))

    def gradient(self, objective, logits_EBC) -> Tensor:
        leaf_EBC = logits_EBC.clone().requires_grad_()
        self.loss(objective, leaf_EBC)[0].backward()
        return leaf_EBC.grad


OBJECTIVES = [n for n in registry.registered_names("objective") if not registry.piece("objective", n).silent]
CASES = [Trial(name, case) for name in OBJECTIVES for case in cases_of("objective", name)]
every_case = pytest.mark.parametrize("case", CASES, ids=Trial.label)


def test_the_objectives_of_the_published_systems_are_registered():
    assert {"cross_entropy", "ldam", "ride", "tade", "reslt", "bbn", "ace", "lfme"} <= set(OBJECTIVES)
    assert {"logit_adjustment", "grw"} <= set(OBJECTIVES)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loss_and_terms_are_finite_in_at_least_float32(case, dtype):
    loss, terms = case.loss(case.objective(), case.logits(dtype))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.shape == ()
    assert loss.dtype == wanted
    assert torch.isfinite(loss)
    assert terms
    for name, term in terms.items():
        assert term.shape in [(), (case.num_experts,)], name
        assert term.dtype == wanted, name
        assert not term.requires_grad, name
        assert torch.isfinite(term).all(), name


@every_case
def test_denominators_are_positive_float64_scalars_that_add_over_pieces(case):
    objective = case.objective()
    whole = objective.denominators(case.labels(), NOW)
    pieces = [objective.denominators(case.labels(slice(*ends)), NOW) for ends in ((0, 0), (0, 3), (3, None))]
    assert whole
    for name, value in whole.items():
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value > 0
        torch.testing.assert_close(sum(piece[name] for piece in pieces), value, atol=0, rtol=1e-14)


@every_case
def test_pieces_of_a_batch_sum_to_the_whole_and_an_empty_piece_is_zero(case):
    """Losses, terms and gradients; tolerance 1e-12 for another order of float64 sums."""
    objective = case.objective()
    if objective.config.whole_batch:
        return  # see below
    whole = case.logits().requires_grad_()
    loss, terms = case.loss(objective, whole)
    loss.backward()

    apart = case.logits().requires_grad_()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    results = []
    for images in (order[:3], order[3:3], order[3:4], order[4:]):
        results.append(objective(apart[:, images], case.labels(images), case.now(objective, images)))
        results[-1][0].backward()
    assert results[1][0] == 0
    assert all(torch.count_nonzero(term) == 0 for term in results[1][1].values())
    torch.testing.assert_close(sum(result[0] for result in results), loss, atol=1e-12, rtol=1e-12)
    for name, term in terms.items():
        torch.testing.assert_close(sum(result[1][name] for result in results), term, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(apart.grad, whole.grad, atol=1e-12, rtol=1e-12)


def whole_batch_with(own, logits, images) -> Tensor:
    """Return all logits, those of some images attached and the others detached, as a replica has them."""
    rows = logits.detach().clone()
    return rows.index_copy(1, torch.arange(len(LABELS))[images], own)


@every_case
def test_a_loss_of_the_whole_batch_gives_every_replica_the_gradient_of_its_rows(case):
    """Uneven shares, one of them empty. Every replica has the whole value."""
    objective = case.objective()
    if not objective.config.whole_batch:
        return
    whole = case.logits().requires_grad_()
    loss, _ = case.loss(objective, whole)
    loss.backward()
    for images in (slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 7)):
        own = case.logits()[:, images].requires_grad_()
        value, _ = case.loss(objective, whole_batch_with(own, whole, images))
        value.backward()
        torch.testing.assert_close(value, loss, atol=0, rtol=1e-14)
        torch.testing.assert_close(own.grad, whole.grad[:, images], atol=1e-14, rtol=1e-12)


@every_case
def test_an_empty_piece_has_a_gradient_of_zero_for_what_made_its_logits(case):
    objective = case.objective()
    if objective.config.whole_batch:
        return
    weight = torch.ones(4, case.logits().shape[-1], requires_grad=True)
    logits_EBC = torch.zeros(case.num_experts, 0, 4) @ weight
    none = slice(0, 0)
    objective(logits_EBC, case.labels(none), case.now(objective, none))[0].backward()
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) == 0


@every_case
def test_slots_evaluated_apart_give_the_whole_loss_and_their_own_gradient(case):
    """As on a worker: its own expert attached, the others' logits detached. Bitwise, not to a tolerance."""
    objective = case.objective()
    logits = case.logits()
    whole = logits.clone().requires_grad_()
    loss, _ = case.loss(objective, whole)
    loss.backward()
    for own in range(case.num_experts):
        slot_BC = logits[own].clone().requires_grad_()
        others = [slot_BC if k == own else z_BC.clone() for k, z_BC in enumerate(logits)]
        value, _ = case.loss(objective, torch.stack(others))
        value.backward()
        assert torch.equal(value, loss)
        assert torch.equal(slot_BC.grad, whole.grad[own])


@every_case
def test_inputs_are_unchanged_and_the_same_inputs_give_the_same_loss(case):
    objective = case.objective()
    logits, labels, now, fresh = case.logits(), case.labels().clone(), case.now(objective), case.now(objective)
    first = objective(logits, labels, now)[0]
    assert torch.equal(logits, case.logits())
    assert torch.equal(labels, case.labels())
    assert now.denominators == fresh.denominators
    assert torch.equal(now.extra.positions_B, fresh.extra.positions_B)
    for name, scores in fresh.extra.teachers.items():
        assert torch.equal(now.extra.teachers[name], scores)
    assert torch.equal(case.loss(objective, logits)[0], first)
    assert torch.equal(case.loss(case.objective(), logits)[0], first)


@every_case
def test_an_objective_that_needs_positions_takes_no_mixed_images(case):
    """The loss of a partner's labels would be that of the image's own position."""
    objective, now = case.objective(), case.now(case.objective())
    unplaced = replace(now, extra=replace(now.extra, positions_B=None))
    if case.case.config.takes_mixed:
        loss = objective(case.logits(), case.labels(), unplaced)[0]
        assert torch.equal(loss, case.loss(objective, case.logits())[0])
    else:
        with pytest.raises(ValueError, match="no positions"):
            objective(case.logits(), case.labels(), unplaced)


@every_case
def test_gradient_equals_finite_differences_unless_the_objective_holds_something_constant(case):
    """Along a random direction. Holds for RIDE too, whose detached mean has no gradient in the sum over experts. An
    objective that says what it detaches must differ."""
    objective = case.objective()
    logits = case.logits()
    direction = draw(*logits.shape)
    ahead, behind = (case.loss(objective, logits + sign * 1e-5 * direction)[0] for sign in (1, -1))
    slope = (case.gradient(objective, logits) * direction).sum()
    if objective.detached:
        assert not torch.isclose((ahead - behind) / 2e-5, slope, atol=1e-6, rtol=1e-6)
    else:
        torch.testing.assert_close((ahead - behind) / 2e-5, slope, atol=1e-6, rtol=1e-6)


@every_case
def test_every_parameter_of_a_tiny_model_gets_a_gradient(case):
    net = build_ensemble(
        EnsembleConfig(
            ResNetCifar.Config(depth=8),
            CosineHead.Config(),
            num_classes=case.logits().shape[-1],
            expert_names=[f"expert{k}" for k in range(case.num_experts)],
            reduce_dimension=True,
        ),
        seed=0,
    )
    images = torch.randn(len(LABELS), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    case.loss(case.objective(), net(images))[0].backward()
    for name, parameter in net.named_parameters():
        learns = case.cls.last_expert_learns or not name.startswith(f"experts.expert{case.num_experts - 1}.")
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad.abs().max() > 0) == learns, name


@every_case
def test_state_makes_the_round_trip_and_constants_follow_the_module(case):
    objective, other = case.objective(), case.objective()
    other.load_state_dict(objective.state_dict())
    assert torch.equal(case.loss(objective, case.logits())[0], case.loss(other, case.logits())[0])
    assert not list(objective.parameters())
    for name, buffer in objective.to("meta").named_buffers():
        assert buffer.is_meta, name


@pytest.mark.parametrize(
    ("name", "num_experts"),
    [
        (name, number)
        for name in OBJECTIVES
        for number in range(MAX_EXPERTS + 2)
        if number not in registry.piece("objective", name).num_experts_allowed
    ],
)
def test_a_wrong_number_of_experts_is_refused_by_name_with_the_nearest_that_it_takes(name, num_experts):
    cls = registry.piece("objective", name)
    with pytest.raises(ValueError, match=rf"'{name}': method.num_experts = {num_experts}; it takes") as refusal:
        cls(cls.Config(), COUNTS, num_experts)
    nearest = int(str(refusal.value).rpartition("set method.num_experts=")[2])
    assert abs(nearest - num_experts) == min(abs(number - num_experts) for number in cls.num_experts_allowed)


@every_case
def test_logits_that_do_not_fit_are_refused_by_name(case):
    objective = case.objective()
    logits = case.logits()
    for wrong in (torch.cat([logits, logits[:1]]), logits[:, :, :-1], logits[:, :-1], logits[0]):
        with pytest.raises(ValueError, match=f"objective '{case.name}'"):
            case.loss(objective, wrong)


@every_case
def test_labels_of_another_number_of_batches_are_refused_by_name(case):
    objective, labels = case.objective(), case.labels()
    other = labels[0] if labels.ndim == 2 else torch.stack([labels, labels])
    with pytest.raises(ValueError, match=f"objective '{case.name}'.*labels"):
        objective(case.logits(), other, case.now(objective))


@every_case
def test_learning_rates_are_multiplied_by_one_positive_number_per_expert(case):
    factors = case.objective().lr_factors
    assert len(factors) == case.num_experts
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[0] == 1


@every_case
def test_a_label_out_of_range_is_an_error(case):
    objective = case.objective()
    for label in (len(COUNTS), -100):
        labels = case.labels().clone()
        labels[..., 2] = label
        with pytest.raises((RuntimeError, IndexError)):
            objective(case.logits(), labels, case.now(objective))


@every_case
def test_a_class_without_an_image_is_refused_or_does_not_matter(case):
    """No weight, margin or prior of it is infinite without a word."""
    counts = COUNTS.clone()
    counts[2] = 0
    try:
        objective = registry.build("objective", case.case.config, counts, case.num_experts)
    except ValueError as refusal:
        assert "1 of 4 classes have no training image (class 2)" in str(refusal) or "objective." in str(refusal)  # noqa: PT017
        return
    if objective.config.prepares:
        return
    labels = case.labels().clamp(max=1)
    loss, _ = objective(case.logits(), labels, case.now(objective, labels=labels))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_counts_that_are_not_a_list_of_classes_are_refused(name):
    cls = registry.piece("objective", name)
    for counts in (torch.tensor([3]), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="2 or more classes"):
            cls(cls.Config(), counts, cls.num_experts_allowed[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_head_is_checked_against_the_objective(name):
    """Objectives with a scale want the head to have the same; the others take any head."""
    config = registry.piece("objective", name).Config()
    config.check_head(CosineHead.Config(scale=getattr(config, "scale", 30.0)))
    if not hasattr(config, "scale"):
        config.check_head(LinearHead.Config())
        return
    with pytest.raises(ValueError, match=rf"objective\.scale = {config.scale:g}.*head\.scale = 1;.*cosine"):
        config.check_head(LinearHead.Config())
    with pytest.raises(ValueError, match=rf"objective\.scale = {config.scale:g}.*head\.scale = 16"):
        config.check_head(CosineHead.Config(scale=16))
    config.model_copy(update={"scale": 1.0}).check_head(LinearHead.Config())
