"""Every registered piece takes a step without making the host wait, and its operations may be captured and replayed.

Waits are counted on an emulated device. A replay is emulated, too: what a piece did at one moment is done again with
what a graph would have kept of that moment (Python numbers, the tensors that it read) and with the numbers of another
moment in the draws; this must give what the piece itself gives at that other moment, to the last bit.

Shapes: E experts, B images, C classes, D features.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import aggregation
import experts
from experts import registry
from experts.batches import on_host
from experts.cases import cases_of
from experts.data.keyed_random import key
from experts.draws import Moment, StepDraws
from experts.losses.class_weights import ClassWeights
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress
from tests.contract import test_flows as flows
from tests.contract import test_objectives as objectives
from tests.emulated_device import DEVICE, EmulatedDevice

registry.import_pieces(experts, aggregation)

EPOCHS, STEPS = 8, 3
EVERY_MOMENT = [Progress(epoch, EPOCHS, step, STEPS) for epoch in range(1, EPOCHS + 1) for step in (0, STEPS - 1)]
SOME_MOMENTS = [now for now in EVERY_MOMENT if now.epoch in (1, 2, 5, 8)]
ACCURACIES = itertools.cycle([[0.1, 0.2, 0.3, 0.4], [0.9, 0.3, 0.2, 0.0]])
every_flow = pytest.mark.parametrize("case", flows.OWN, ids=flows.Trial.label)
every_distillation = pytest.mark.parametrize("name", registry.registered_names("distillation"))


def trials():
    """Every objective in every case; those that take class weights with some, too, from the fourth epoch on."""
    for trial in objectives.CASES:
        yield pytest.param(trial, False, id=trial.label())
        if trial.case.config.weighting_problem() is None:
            yield pytest.param(trial, True, id=f"{trial.label()}-weighted")


every_objective = pytest.mark.parametrize(("trial", "weighted"), [*trials()])


def built(trial, weighted):
    objective = trial.objective()
    if weighted:
        objective.weigh(ClassWeights(rule="log_ratio", after_epoch=3), objectives.COUNTS)
    return objective


def draws_of(device="cpu"):
    return StepDraws(partial(key, 0), device)


def begin(draws, now):
    draws.begin(Moment(now.epoch, now.step, 7 * now.step, 7, 7 * now.step, 7))


class Step:
    """Inputs of an objective's step, on one device."""

    def __init__(self, trial, objective, device="cpu"):
        self.logits_EBC, self.labels = trial.logits(torch.float32).to(device), trial.labels().to(device)
        teachers = objectives.teachers_of(objective, len(objectives.LABELS))
        self.teachers = {name: scores.to(device) for name, scores in teachers.items()}
        self.positions_B = (torch.arange(len(objectives.LABELS)) * 50).to(device)

    def take(self, objective, now, draws) -> dict[str, Tensor]:
        """Return the loss, its terms, its denominators, and the gradient of the logits."""
        leaf_EBC = self.logits_EBC.clone().requires_grad_()
        extra = ExtraInputs(self.teachers, self.positions_B, draws.of_rows(), draws.of_labels(0))
        denominators = objective.denominators(self.labels, now)
        loss, terms = objective(leaf_EBC, self.labels, StepContext(denominators, now, extra))
        loss.backward()
        return {"loss": loss.detach(), **terms, **denominators, "gradient": leaf_EBC.grad}


def as_captured(module: nn.Module) -> nn.Module:
    """Return a module as a graph keeps it: the same tensors, and Python's numbers as they are now."""
    kept = copy.copy(module)
    kept._buffers = dict(module._buffers)
    kept._modules = {name: as_captured(part) for name, part in module._modules.items()}
    return kept


def replays(moments, draws, phase, keep, take):
    """Yield, for every moment whose phase was there before, what a replay gives and what the piece itself gives.

    Args:
        moments: in order; accuracies may be observed between them.
        draws: of the steps.
        phase: takes a moment to the phase.
        keep: returns what a graph keeps of the piece.
        take: takes what is kept (None: the piece itself) and a moment to the results.
    """
    captured = {}
    for now in moments:
        begin(draws, now)
        own = take(None, now)
        if phase(now) in captured:
            kept, then, held = captured[phase(now)]
            draws.refill(held)
            begin(draws, now)
            with draws.handing_out(held):
                yield take(kept, then), own
        else:
            captured[phase(now)] = keep(), now, draws.hold()
    # A phase is worth capturing only if it lasts. What changes from epoch to epoch is a tensor of the draws.
    assert len(captured) <= 4


def same(replayed, own):
    return replayed.keys() == own.keys() and all(torch.equal(replayed[name], own[name]) for name in own)


@every_objective
def test_an_objective_makes_the_host_wait_for_nothing(trial, weighted):
    with EmulatedDevice():
        objective = built(trial, weighted).to(DEVICE)
        step, draws = Step(trial, objective, DEVICE), draws_of(DEVICE)
        with EmulatedDevice() as seen:
            for now in (EVERY_MOMENT[0], EVERY_MOMENT[-1]):
                begin(draws, now)
                step.take(objective, now, draws)
    assert seen.waits == {}
    assert seen.launches


@every_objective
def test_an_objective_replayed_in_the_same_phase_gives_what_it_would_give_itself(trial, weighted):
    """Accuracies are observed between epochs."""
    objective = built(trial, weighted)
    step, draws = Step(trial, objective), draws_of()

    def phase(now):
        if now.step == 0 and objective.config.observes:
            objective.observe(next(ACCURACIES))
        return objective.phase(now)

    for replayed, own in replays(
        EVERY_MOMENT,
        draws,
        phase,
        lambda: as_captured(objective),
        lambda kept, now: step.take(kept or objective, now, draws),
    ):
        assert same(replayed, own)


@every_objective
def test_the_phase_changes_at_every_switch(trial, weighted):
    objective = built(trial, weighted)
    switches = [*trial.case.config.switches.values(), *([3] if weighted else [])]
    for last in switches:
        if 0 < last < EPOCHS:
            before, after = (objective.phase(Progress(epoch, EPOCHS)) for epoch in (last, last + 1))
            assert before != after


# Flows


class FlowStep:
    """A flow's step with the objective of its case, on one device."""

    def __init__(self, trial, device="cpu"):
        self.flow = trial.build_flow()
        self.flow.objective.to(device)
        self.ensemble = trial.ensemble().float().to(device)
        self.network = flows.Network(self.ensemble)
        self.network.draws = draws_of(device)
        self.batch = on_device(flows.batch_of(trial), device)

    def take(self, flow, now) -> dict[str, Tensor]:
        flow, draws = flow or self.flow, self.network.draws
        outputs_EBX = flow(self.network, self.batch, now, lambda own, what="logits": own)
        labels, global_labels = flow.labels(self.batch)
        extra = ExtraInputs({}, None, draws.of_rows(), draws.of_labels(0))
        denominators = flow.objective.denominators(global_labels, now)
        loss, _ = flow.objective(outputs_EBX, labels, StepContext(denominators, now, extra))
        learning = [p for p in self.ensemble.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, learning, allow_unused=True)
        found = {str(k): g for k, g in enumerate(gradients) if g is not None}
        return {"outputs": outputs_EBX.detach(), "loss": loss.detach(), **found}

    def as_captured(self):
        kept = copy.copy(self.flow)
        kept.objective = as_captured(self.flow.objective)
        return kept


def on_device(batch, device):
    """Return a batch of float32 images on a device, and its labels in main memory too, as training has them."""
    moved = {
        name: value.to(device) for name in ("labels_B", "global_labels", "positions_B")
        if (value := getattr(batch, name)) is not None
    }  # fmt: skip
    partner = None if batch.partner is None else on_device(batch.partner, device)
    images_B3HW = batch.images_B3HW.float().to(device)
    return replace(batch, images_B3HW=images_B3HW, partner=partner, host_labels=on_host(batch), **moved)


@every_flow
def test_a_flow_makes_the_host_wait_for_nothing(case):
    with EmulatedDevice():
        step = FlowStep(case, DEVICE)
        with EmulatedDevice() as seen:
            for now in (EVERY_MOMENT[0], EVERY_MOMENT[-1]):
                begin(step.network.draws, now)
                step.take(None, now)
    assert seen.launches
    assert seen.waits == {}


@every_flow
def test_a_flow_replayed_in_the_same_phase_gives_what_it_would_give_itself(case):
    step = FlowStep(case)
    for replayed, own in replays(
        SOME_MOMENTS,
        step.network.draws,
        lambda now: (step.flow.phase(now), step.flow.objective.phase(now)),
        step.as_captured,
        step.take,
    ):
        assert same(replayed, own)


# Distillations


def distilled(piece, device, now):
    def scores(*shape, seed):
        return objectives.draw(*shape, seed=seed).float().to(device)

    logits_EBC, teacher_BC = scores(3, 7, 4, seed=1).requires_grad_(), scores(7, 4, seed=2)
    denominators = piece.denominators(objectives.LABELS.to(device))
    loss, terms = piece(logits_EBC.sum(), logits_EBC, {"teacher": teacher_BC}, denominators, now)
    loss.backward()
    return {"loss": loss.detach(), **terms, "gradient": logits_EBC.grad}


@every_distillation
def test_a_distillation_makes_the_host_wait_for_nothing(name):
    piece = registry.build("distillation", registry.piece("distillation", name).Config())
    with EmulatedDevice() as seen:
        distilled(piece, DEVICE, EVERY_MOMENT[0])
    assert {kind for kind, _ in seen.waits} <= {"to the device"}  # of the scores that the test makes


@every_distillation
def test_a_distillation_gives_the_same_in_the_same_phase(name):
    piece = registry.build("distillation", registry.piece("distillation", name).Config())
    of_phase = {}
    for now in EVERY_MOMENT:
        assert same(of_phase.setdefault(piece.phase(now), distilled(piece, "cpu", now)), distilled(piece, "cpu", now))
    assert len(of_phase) <= 4


# Modules

MODULES = [(kind, name) for kind in ("head", "calibration") for name in registry.registered_names(kind)]


@pytest.mark.parametrize(("kind", "name"), MODULES)
def test_a_head_or_calibration_makes_the_host_wait_for_nothing(kind, name):
    for case in cases_of(kind, name):
        with EmulatedDevice():
            module = registry.build(kind, case.config, 6, 4).to(DEVICE)
            features_BD = torch.ones(3, 6).to(DEVICE)
            inputs = (features_BD,) if kind == "head" else (torch.ones(3, 4).to(DEVICE), features_BD)
            with EmulatedDevice() as seen:
                for training in (True, False):
                    scores_BC = module.train(training)(*inputs)
                    if scores_BC.requires_grad:
                        scores_BC.sum().backward()
        assert seen.waits == {}


@pytest.mark.parametrize("name", registry.registered_names("model"))
def test_a_model_makes_the_host_wait_for_nothing(name):
    case = cases_of("model", name)[0]
    model = registry.build("model", case.config)
    with EmulatedDevice():
        parts = [model.trunk().to(DEVICE), model.late_stages(reduce_dimension=False).to(DEVICE)]
        images_B3HW = torch.ones(2, 3, case.image_size, case.image_size).to(DEVICE)
        with EmulatedDevice() as seen:
            parts[1](parts[0](images_B3HW)).sum().backward()
    assert seen.waits == {}
