"""Every registered objective, in every variant of its config, keeps the promises of `Objective`.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import aggregation
import experts
from experts import registry
from experts.backbones.resnet_cifar import ResNetCifar
from experts.ensemble import EnsembleConfig, build_ensemble
from experts.heads.cosine import CosineHead
from experts.heads.linear import LinearHead
from experts.objective import MAX_EXPERTS, Given
from experts.progress import Progress

registry.import_pieces(experts, aggregation)

COUNTS = torch.tensor([300, 60, 12, 1])  # the rarest class has one image
LABELS = torch.tensor([0, 3, 1, 0, 2, 2, 0])
NOW = Progress(epoch=2, epochs=4, step=1, steps_per_epoch=3)
PARTNERS = torch.tensor([3, 1, 2, 2, 3, 0, 1])  # of the second batch, for objectives that want the labels of both
EQUAL_GROUPS = {"rule": "equal"}
# Settings beside the defaults that take another path through the code. A new objective is tested at its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ldam": [{"reweight_epoch": 1}],
    "ride": [
        {"reweight_epoch": 1},
        {"reweight_epoch": 1, "temp_norm": "subtract", "base_temperature": 2.0},
        {"reweight_epoch": 0, "diversity_reference": "pairwise"},
        {"diversity_factor": 0.0, "base_on": "published"},
        {"diversity_factor": 0.0},
    ],
    "tade": [{"tau": 1.0, "inverse": "stable", "log_guard": 0.0}],
    "reslt": [{"beta": 0.5, "fused": "guarded"}, {"log_guard": 0.0, "groups": {"rule": "equal"}}],
    "bbn": [{"alpha_epochs": "stage"}, {"alpha_epochs": 7}],
    "ace": [
        {"softmax_over": "target", "com_reduction": "mean"},
        {"com_batch": "all", "groups": EQUAL_GROUPS},
        {"min_rows": 2},
    ],
    "lfme": [{"instance_on": "loss", "clamp": True}],
}
# Numbers of experts to test with where a class of objectives says which it allows; "ace" takes four only with other
# groups of classes than it has at its defaults.
NUM_EXPERTS: dict[str, tuple[int, ...]] = {"ace": (2, 3), "router": (2, 4)}
LAST_LEARNS_NOTHING = {"router": "the last expert has no gate"}
TEACHERS = {"many": [0], "medium": [1], "few": [2, 3]}  # which classes the teachers of "lfme" know


def draw(*shape, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def allowed(name) -> tuple[int, ...] | None:
    """Numbers of experts that an objective says it takes; None: any."""
    return registry.piece("objective", name).num_experts_allowed


def prepare_lfme(objective) -> None:
    """Teachers of every training image, and a validation split of two images a class."""

    def batches(split):
        labels = torch.arange(len(COUNTS)).repeat_interleave(COUNTS if split == "train" else 2)
        teachers = {name: draw(len(labels), len(ids), seed=len(name)) for name, ids in TEACHERS.items()}
        yield Given(teachers, torch.arange(len(labels))), labels

    objective.prepare(batches)
    objective.observe([0.5, 0.4, 0.1, 0.1])


# What an objective needs before its first step.
PREPARE = {"lfme": prepare_lfme}


@dataclass(frozen=True)
class Case:
    name: str
    settings: tuple[tuple[str, Any], ...]
    num_experts: int

    def label(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings), f"E{self.num_experts}"])

    def objective(self):
        cls = registry.piece("objective", self.name)
        objective = registry.build("objective", cls.Config(**dict(self.settings)), COUNTS, self.num_experts)
        PREPARE.get(self.name, lambda objective: None)(objective)
        return objective

    def logits(self, dtype=torch.float64) -> Tensor:
        outputs = len(COUNTS) + registry.piece("objective", self.name).extra_outputs
        return (draw(self.num_experts, len(LABELS), outputs, seed=self.num_experts) * 5).to(dtype)

    def labels(self, images: Any = slice(None)) -> Tensor:
        """Of some images; the images are the last axis."""
        pair = registry.piece("objective", self.name).label_sets == 2
        return (torch.stack([LABELS, PARTNERS]) if pair else LABELS)[..., images]

    def given(self, images: Any = slice(None)) -> Given:
        """What some objectives want to know of some images beside logits and labels."""
        teachers = {name: draw(len(LABELS), len(ids), seed=len(ids))[images] for name, ids in TEACHERS.items()}
        return Given(teachers, (torch.arange(len(LABELS)) * 50)[images])

    def loss(self, objective, logits_EBC, labels=None):
        labels = self.labels() if labels is None else labels
        return objective(logits_EBC, labels, objective.denominators(labels, NOW), NOW, self.given())

    def gradient(self, objective, logits_EBC) -> Tensor:
        leaf_EBC = logits_EBC.clone().requires_grad_()
        self.loss(objective, leaf_EBC)[0].backward()
        return leaf_EBC.grad


CASES = [
    Case(name, tuple(settings.items()), num_experts)
    for name in registry.names("objective")
    for settings in [{}, *VARIANTS.get(name, [])]
    for num_experts in NUM_EXPERTS.get(name, allowed(name) or (1, 3))
]
CASES.append(Case("ace", (("groups", EQUAL_GROUPS),), 4))


def some_cases(wanted):
    return pytest.mark.parametrize("case", list(filter(wanted, CASES)), ids=Case.label)


every_case = some_cases(lambda case: True)


def test_the_objectives_of_the_published_systems_are_registered():
    assert {"cross_entropy", "ldam", "ride", "tade", "reslt", "bbn", "ace", "lfme"} <= set(registry.names("objective"))


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
    whole = case.logits().requires_grad_()
    denominators = objective.denominators(case.labels(), NOW)
    loss, terms = objective(whole, case.labels(), denominators, NOW, case.given())
    loss.backward()

    apart = case.logits().requires_grad_()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    results = []
    for images in (order[:3], order[3:3], order[3:4], order[4:]):
        results.append(objective(apart[:, images], case.labels(images), denominators, NOW, case.given(images)))
        results[-1][0].backward()
    assert results[1][0] == 0
    assert all(torch.count_nonzero(term) == 0 for term in results[1][1].values())
    torch.testing.assert_close(sum(result[0] for result in results), loss, atol=1e-12, rtol=1e-12)
    for name, term in terms.items():
        torch.testing.assert_close(sum(result[1][name] for result in results), term, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(apart.grad, whole.grad, atol=1e-12, rtol=1e-12)


@every_case
def test_an_empty_piece_has_a_gradient_of_zero_for_what_made_its_logits(case):
    objective = case.objective()
    weight = torch.ones(4, case.logits().shape[-1], requires_grad=True)
    logits_EBC = torch.zeros(case.num_experts, 0, 4) @ weight
    denominators, none = objective.denominators(case.labels(), NOW), slice(0, 0)
    objective(logits_EBC, case.labels(none), denominators, NOW, case.given(none))[0].backward()
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) == 0


@every_case
def test_slots_evaluated_apart_give_the_whole_loss_and_their_own_gradient(case):
    """What a worker does: its own expert attached, the others' logits detached. Bitwise, not to a tolerance."""
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


@some_cases(lambda case: case.num_experts > 1)
def test_couples_says_whether_gradients_need_the_other_experts(case):
    objective = case.objective()
    logits = case.logits()
    changed = logits.clone()
    changed[-1] += 50 * one_hot(LABELS, changed.shape[-1])
    moved = not torch.equal(case.gradient(objective, logits)[0], case.gradient(objective, changed)[0])
    # True of the class, it may be idle in a variant, but not at the defaults.
    assert moved <= objective.couples
    assert case.settings or moved == objective.couples


@every_case
def test_inputs_are_unchanged_and_the_same_inputs_give_the_same_loss(case):
    objective = case.objective()
    logits, labels, given = case.logits(), case.labels().clone(), case.given()
    denominators = objective.denominators(labels, NOW)
    first = objective(logits, labels, denominators, NOW, given)[0]
    assert torch.equal(logits, case.logits())
    assert torch.equal(labels, case.labels())
    assert torch.equal(given.positions_B, case.given().positions_B)
    for name, scores in case.given().teachers.items():
        assert torch.equal(given.teachers[name], scores)
    assert torch.equal(case.loss(objective, logits)[0], first)
    assert torch.equal(case.loss(case.objective(), logits)[0], first)


@every_case
def test_gradient_equals_finite_differences(case):
    """Along a random direction. Holds for RIDE too, whose detached mean has no gradient in the sum over experts."""
    objective = case.objective()
    logits = case.logits()
    direction = draw(*logits.shape)
    ahead, behind = (case.loss(objective, logits + sign * 1e-5 * direction)[0] for sign in (1, -1))
    slope = (case.gradient(objective, logits) * direction).sum()
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
        if case.name in LAST_LEARNS_NOTHING and name.startswith(f"experts.expert{case.num_experts - 1}."):
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


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
        for name in registry.names("objective")
        for number in range(MAX_EXPERTS + 2)
        if number not in (allowed(name) or range(1, MAX_EXPERTS + 1))
    ],
)
def test_a_wrong_number_of_experts_is_refused_by_name(name, num_experts):
    config = registry.piece("objective", name).Config()
    with pytest.raises(ValueError, match=rf"'{name}'.*method.num_experts = {num_experts}"):
        registry.build("objective", config, COUNTS, num_experts)


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
    denominators = objective.denominators(labels, NOW)
    with pytest.raises(ValueError, match=f"objective '{case.name}'.*labels"):
        objective(case.logits(), other, denominators, NOW, case.given())


@every_case
def test_learning_rates_are_multiplied_with_one_positive_number_an_expert(case):
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
            objective(case.logits(), labels, objective.denominators(case.labels(), NOW), NOW, case.given())


@pytest.mark.parametrize("name", registry.names("objective"))
def test_counts_that_are_not_a_list_of_classes_are_refused(name):
    config = registry.piece("objective", name).Config()
    for counts in (torch.tensor([3]), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="2 or more classes"):
            registry.build("objective", config, counts, 1)


@pytest.mark.parametrize("name", registry.names("objective"))
def test_a_head_is_checked_against_the_objective(name):
    """Objectives with a scale want the head to have the same; the others take any head."""
    config = registry.piece("objective", name).Config()
    config.check_head(CosineHead.Config())
    if not hasattr(config, "scale"):
        config.check_head(LinearHead.Config())
        return
    with pytest.raises(ValueError, match=r"objective\.scale = 30.*head\.scale = 1;.*cosine"):
        config.check_head(LinearHead.Config())
    with pytest.raises(ValueError, match=r"objective\.scale = 30.*head\.scale = 16"):
        config.check_head(CosineHead.Config(scale=16))
    config.model_copy(update={"scale": 1.0}).check_head(LinearHead.Config())
