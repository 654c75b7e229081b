"""Every registered objective, in every variant of its config, keeps the promises of `Objective`.

Shapes: E experts, B images, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import experts
from experts import registry
from experts.backbones.resnet_cifar import ResNetCifar
from experts.ensemble import build_ensemble
from experts.heads import CosineHead, LinearHead
from experts.progress import Progress

registry.import_pieces(experts)

COUNTS = torch.tensor([300, 60, 12, 1])  # the rarest class has one image
LABELS = torch.tensor([0, 3, 1, 0, 2, 2, 0])
NOW = Progress(epoch=2, epochs=4, step=1, steps_per_epoch=3)
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
}
# Objectives that take fewer numbers of experts than 1 and 3 would be listed here, with the reason.
NUM_EXPERTS: dict[str, list[int]] = {}


@dataclass(frozen=True)
class Case:
    name: str
    settings: tuple[tuple[str, Any], ...]
    num_experts: int

    def label(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings), f"E{self.num_experts}"])

    def objective(self):
        cls = registry.piece("objective", self.name)
        return registry.build("objective", cls.Config(**dict(self.settings)), COUNTS, self.num_experts)

    def logits(self, dtype=torch.float64) -> Tensor:
        draws = torch.Generator().manual_seed(self.num_experts)
        return (torch.randn(self.num_experts, len(LABELS), len(COUNTS), generator=draws, dtype=torch.float64) * 5).to(
            dtype
        )


CASES = [
    Case(name, tuple(settings.items()), num_experts)
    for name in registry.names("objective")
    for settings in [{}, *VARIANTS.get(name, [])]
    for num_experts in NUM_EXPERTS.get(name, [1, 3])
]


def some_cases(wanted):
    return pytest.mark.parametrize("case", list(filter(wanted, CASES)), ids=Case.label)


every_case = some_cases(lambda case: True)


def loss_of(objective, logits_EBC, labels_B=LABELS):
    return objective(logits_EBC, labels_B, objective.denominators(labels_B, NOW), NOW)


def gradient_of(objective, logits_EBC):
    leaf_EBC = logits_EBC.clone().requires_grad_()
    loss_of(objective, leaf_EBC)[0].backward()
    return leaf_EBC.grad


def test_the_objectives_of_the_main_job_are_registered():
    assert {"cross_entropy", "ldam", "ride"} <= set(registry.names("objective"))


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loss_and_terms_are_finite_in_at_least_float32(case, dtype):
    loss, terms = loss_of(case.objective(), case.logits(dtype))
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
    whole = objective.denominators(LABELS, NOW)
    pieces = [objective.denominators(piece, NOW) for piece in (LABELS[:0], LABELS[:3], LABELS[3:])]
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
    denominators = objective.denominators(LABELS, NOW)
    loss, terms = objective(whole, LABELS, denominators, NOW)
    loss.backward()

    apart = case.logits().requires_grad_()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    results = []
    for images in (order[:3], order[3:3], order[3:4], order[4:]):
        results.append(objective(apart[:, images], LABELS[images], denominators, NOW))
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
    weight = torch.ones(4, len(COUNTS), requires_grad=True)
    logits_EBC = torch.zeros(case.num_experts, 0, 4) @ weight
    objective(logits_EBC, LABELS[:0], objective.denominators(LABELS, NOW), NOW)[0].backward()
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) == 0


@every_case
def test_slots_evaluated_apart_give_the_whole_loss_and_their_own_gradient(case):
    """What a worker does: its own expert attached, the others' logits detached. Bitwise, not to a tolerance."""
    objective = case.objective()
    logits = case.logits()
    whole = logits.clone().requires_grad_()
    loss, _ = loss_of(objective, whole)
    loss.backward()
    for own in range(case.num_experts):
        slot_BC = logits[own].clone().requires_grad_()
        others = [slot_BC if k == own else z_BC.clone() for k, z_BC in enumerate(logits)]
        value, _ = loss_of(objective, torch.stack(others))
        value.backward()
        assert torch.equal(value, loss)
        assert torch.equal(slot_BC.grad, whole.grad[own])


@some_cases(lambda case: case.num_experts > 1)
def test_couples_says_whether_gradients_need_the_other_experts(case):
    objective = case.objective()
    logits = case.logits()
    changed = logits.clone()
    changed[-1] += torch.arange(len(COUNTS))
    moved = not torch.equal(gradient_of(objective, logits)[0], gradient_of(objective, changed)[0])
    # True of the class, it may be idle in a variant, but not at the defaults.
    assert moved <= objective.couples
    assert case.settings or moved == objective.couples


@every_case
def test_inputs_are_unchanged_and_the_same_inputs_give_the_same_loss(case):
    objective = case.objective()
    logits, labels = case.logits(), LABELS.clone()
    first = loss_of(objective, logits, labels)[0]
    assert torch.equal(logits, case.logits())
    assert torch.equal(labels, LABELS)
    assert torch.equal(loss_of(objective, logits, labels)[0], first)
    assert torch.equal(loss_of(case.objective(), logits, labels)[0], first)


@every_case
def test_gradient_equals_finite_differences(case):
    """Along a random direction. Holds for RIDE too, whose detached mean has no gradient in the sum over experts."""
    objective = case.objective()
    logits = case.logits()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ahead, behind = (loss_of(objective, logits + sign * 1e-5 * direction)[0] for sign in (1, -1))
    slope = (gradient_of(objective, logits) * direction).sum()
    torch.testing.assert_close((ahead - behind) / 2e-5, slope, atol=1e-6, rtol=1e-6)


@every_case
def test_every_parameter_of_a_tiny_model_gets_a_gradient(case):
    net = build_ensemble(
        ResNetCifar.Config(depth=8),
        CosineHead.Config(),
        num_classes=len(COUNTS),
        expert_names=[f"expert{k}" for k in range(case.num_experts)],
        reduce_dimension=True,
        seed=0,
    )
    images = torch.randn(len(LABELS), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loss_of(case.objective(), net(images))[0].backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_case
def test_state_makes_the_round_trip_and_constants_follow_the_module(case):
    objective, other = case.objective(), case.objective()
    other.load_state_dict(objective.state_dict())
    assert torch.equal(loss_of(objective, case.logits())[0], loss_of(other, case.logits())[0])
    assert not list(objective.parameters())
    for name, buffer in objective.to("meta").named_buffers():
        assert buffer.is_meta, name


@pytest.mark.parametrize("name", registry.names("objective"))
@pytest.mark.parametrize("num_experts", [0, 9])
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
            loss_of(objective, wrong)


@every_case
def test_a_label_out_of_range_is_an_error(case):
    objective = case.objective()
    for label in (len(COUNTS), -100):
        labels = LABELS.clone()
        labels[2] = label
        with pytest.raises((RuntimeError, IndexError)):
            objective(case.logits(), labels, objective.denominators(LABELS, NOW), NOW)


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
