"""Every registered flow gives the same outputs and gradients packed, spread and piece by piece.

Shapes: E experts, B images, C classes, X outputs of an expert.
"""

from __future__ import annotations

import copy
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
from experts.batches import Batch, Mixed, on_host
from experts.cases import Case, cases_of
from experts.data.keyed_random import key
from experts.draws import Moment, StepDraws
from experts.ensemble import EnsembleConfig, build_ensemble, part_of
from experts.flow import PARTS
from experts.flows.plain import Plain
from experts.heads.linear import LinearHead
from experts.methods.ace import ACE, OwnClasses
from experts.methods.bbn import BBN, Bilateral, BilateralHead
from experts.objective import ExtraInputs, StepContext
from experts.progress import Progress
from tests.emulated_device import DEVICE, EmulatedDevice, OnDevice
from tests.networks import Unwatched

registry.import_pieces(experts, aggregation)

COUNTS = torch.tensor([300, 60, 12, 1])
LABELS = torch.tensor([0, 3, 1, 0, 2, 2, 0])
PARTNERS = torch.tensor([3, 1, 2, 2, 3, 0, 1])
NOW = Progress(epoch=2, epochs=4, step=1, steps_per_epoch=3)


@dataclass(frozen=True)
class Trial:
    """One case of one flow."""

    flow: str
    case: Case

    def label(self) -> str:
        settings = self.case.config.model_dump(exclude_unset=True) | self.case.objective.model_dump(exclude_unset=True)
        more = [f"{key}={value}" for key, value in settings.items()]
        return "-".join([self.flow, self.case.objective.name, *more, *["shared_head"] * self.case.shared_head])

    @property
    def num_experts(self) -> int:
        return self.case.num_experts

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"expert{k}" for k in range(self.num_experts))

    def cls(self) -> Any:
        return registry.piece("flow", self.flow)

    def build_flow(self, **changes: Any) -> Any:
        config = self.case.objective.model_copy(update=changes)
        loss = registry.build("objective", config, COUNTS, self.num_experts)
        return registry.build("flow", self.case.config, loss, self.names, partial(key, 0, "train"))

    def ensemble(self, only=None):
        net = build_ensemble(
            EnsembleConfig(
                ResNetCifar.Config(depth=8),
                self.case.head or LinearHead.Config(),
                num_classes=len(COUNTS),
                expert_names=self.names,
                reduce_dimension=False,
                shared_head=self.case.shared_head,
                router=self.case.router,
            ),
            seed=0,
            only=only,
        )
        return net.double()


def on_the_plain_flow() -> list[Trial]:
    """Every objective for any flow, of pieces of a batch and without teachers, as in the last of its cases."""
    found = []
    for name in registry.registered_names("objective"):
        cls, case = registry.piece("objective", name), cases_of("objective", name)[-1]
        if cls.flow is None and case.config.teacher_names is None and not (case.config.whole_batch or cls.silent):
            found.append(Trial("plain", Case(Plain.Config(), case.num_experts, objective=case.config)))
    return found


OWN = [Trial(name, case) for name in registry.registered_names("flow") for case in cases_of("flow", name)]
CASES = list({case.label(): case for case in [*OWN, *on_the_plain_flow()]}.values())
every_case = pytest.mark.parametrize("case", CASES, ids=Trial.label)


def draws_at(now):
    """Return the draws of a step of seven images."""
    draws = StepDraws(partial(key, 0))
    draws.begin(Moment(now.epoch, now.step, 0, 7))
    return draws


class Network(Unwatched):
    """One worker's modules, run in place; counts what the flow asks for."""

    def __init__(self, ensemble):
        self.ensemble, self.names, self.draws = ensemble, ensemble.names, draws_at(NOW)
        self.runs, self.trunk_outputs = [], None

    def trunk(self, run):
        self.runs.append("trunk")
        self.trunk_outputs = run(self.ensemble.trunk)
        return self.trunk_outputs

    def experts(self, run):
        self.runs.append("experts")
        return run(self.ensemble.experts)

    def shared(self, run):
        self.runs.append("shared")
        return run(self.ensemble.shared)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(case, rows=slice(None), labels=LABELS) -> Batch:
    """Return some rows of one batch, as a replica gets them, with a partner if the flow needs one."""
    partner = None
    if case.cls().needs_partner:
        partner = Batch(draw(7, 3, 8, 8, seed=2)[rows], PARTNERS[rows], PARTNERS)
    return Batch(draw(7, 3, 8, 8, seed=1)[rows], labels[rows], labels, torch.arange(7)[rows], partner)


class Packed:
    """A gather for all experts in one place; it records its inputs."""

    def __init__(self):
        self.gathered: list[Tensor] = []

    def __call__(self, own, what="logits"):
        self.gathered.append(own.detach().clone())
        return own


class Slot:
    """A gather for one of several workers: the others' outputs are those of a packed run, detached."""

    def __init__(self, place, gathered):
        self.place, self.gathered, self.calls = place, gathered, 0

    def __call__(self, own, what="logits"):
        everyone = list(self.gathered[self.calls].split(1))
        self.calls += 1
        assert own.shape == everyone[self.place].shape
        everyone[self.place] = own
        return torch.cat(everyone)


def step(case, network, batch, gather, now=NOW, flow=None):
    """Return outputs and loss of one step; its gradients are in the network's parameters."""
    flow = flow or case.build_flow()
    outputs_EBX = flow(network, batch, now, gather)
    labels, global_labels = flow.labels(batch)
    drawn = draws_at(now).of_rows()
    extra = ExtraInputs(draws=lambda what, width: drawn(what, width)[batch.positions_B])
    denominators = flow.objective.denominators(global_labels, now)
    loss, _ = flow.objective(outputs_EBX, labels, StepContext(denominators, now, extra))
    if loss.requires_grad:
        loss.backward()
    return outputs_EBX.detach(), loss.detach()


def gradients(ensemble) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ensemble.named_parameters()}


def test_the_flows_of_the_published_systems_are_registered_and_tested():
    assert {"plain", "bilateral", "ace", "h2t", "router"} <= set(registry.registered_names("flow"))


@every_case
def test_outputs_and_labels_are_what_the_objective_takes(case):
    flow, network, gather, batch = case.build_flow(), Network(case.ensemble()), Packed(), batch_of(case)
    outputs_EBX = flow(network, batch, NOW, gather)
    outputs = len(COUNTS) + flow.objective.extra_outputs
    assert outputs_EBX.shape == (case.num_experts, len(LABELS), outputs)
    assert torch.isfinite(outputs_EBX).all()
    for labels in flow.labels(batch):
        flow.objective.check_shapes(outputs_EBX, labels)
    assert network.runs.count("trunk") == 1
    assert set(case.cls().learns) <= set(PARTS)


@every_case
def test_the_same_step_gives_the_same_outputs_and_leaves_the_batch_alone(case):
    batch = batch_of(case)
    first = step(case, Network(case.ensemble()), batch, Packed())
    again = step(case, Network(case.ensemble()), batch, Packed())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for held, fresh in ((batch, batch_of(case)), (batch.partner, batch_of(case).partner)):
        if fresh is not None:
            assert torch.equal(held.images_B3HW, fresh.images_B3HW)
            assert torch.equal(held.labels_B, fresh.labels_B)


@every_case
def test_only_what_the_flow_learns_gets_gradients_and_all_of_it_does(case):
    ensemble = case.ensemble()
    step(case, Network(ensemble), batch_of(case), Packed())
    for name, p in ensemble.named_parameters():
        if part_of(name) not in case.cls().learns:
            assert p.grad is None, name
        else:
            assert p.grad is not None, name
            assert p.grad.abs().max() > 0, name


@every_case
def test_experts_apart_give_the_packed_loss_and_their_gradients_add_up(case):
    """Tolerance 1e-12: sums over experts in another order. BatchNorm trains; every worker's trunk is its own copy."""
    packed = case.ensemble()
    gather, batch = Packed(), batch_of(case)
    outputs_EBX, loss = step(case, Network(packed), batch, gather)
    wanted = gradients(packed)
    found = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for place, name in enumerate(case.names):
        alone, slot = case.ensemble(only=[name]), Slot(place, gather.gathered)
        own_EBX, own_loss = step(case, Network(alone), batch, slot)
        assert slot.calls == len(gather.gathered)
        torch.testing.assert_close(own_EBX, outputs_EBX, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(own_loss, loss, atol=1e-12, rtol=1e-12)
        for parameter, value in gradients(alone).items():
            found[parameter] += value
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=1e-10, msg=name)


@every_case
def test_some_experts_together_and_some_apart_give_the_packed_loss(case):
    """The last two in one place, as with two experts per worker."""
    gather, batch = Packed(), batch_of(case)
    outputs_EBX, _ = step(case, Network(case.ensemble()), batch, gather)
    rest = [value[:-2] for value in gather.gathered]

    def with_the_rest(own, what="logits"):
        return torch.cat([rest.pop(0), own])

    own_EBX, _ = step(case, Network(case.ensemble(only=case.names[-2:])), batch, with_the_rest)
    torch.testing.assert_close(own_EBX, outputs_EBX, atol=1e-12, rtol=1e-12)


@every_case
def test_pieces_of_a_batch_add_up_also_where_a_piece_is_empty(case):
    """In evaluation mode, where BatchNorm does not look at the rest of the batch. One piece has no image; one has none
    of a rare class, which the others have."""
    whole = case.ensemble().eval()
    outputs_EBX, loss = step(case, Network(whole), batch_of(case), Packed())
    apart = case.ensemble().eval()
    parts = [
        step(case, Network(apart), batch_of(case, rows), Packed())
        for rows in (slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 4), slice(4, 7))
    ]
    torch.testing.assert_close(torch.cat([part[0] for part in parts], dim=1), outputs_EBX, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sum(part[1] for part in parts), loss, atol=1e-12, rtol=1e-12)
    wanted = gradients(whole)
    for name, value in gradients(apart).items():
        torch.testing.assert_close(value, wanted[name], atol=1e-12, rtol=1e-10, msg=name)


@every_case
def test_partner_images_matter_where_the_flow_says_it_needs_them_and_to_one_expert_each_with_own_streams(case):
    """In evaluation mode, where images do not meet in BatchNorm."""
    batch, ensemble = batch_of(case), case.ensemble().eval()
    if batch.partner is None:
        batch = replace(batch, partner=Batch(draw(7, 3, 8, 8, seed=2), PARTNERS, PARTNERS))

    def outputs(batch):
        return step(case, Network(copy.deepcopy(ensemble)), batch, Packed())[0]

    def louder(batch):
        return replace(batch, images_B3HW=3 * batch.images_B3HW)

    before = outputs(batch)
    by_partner = (outputs(replace(batch, partner=louder(batch.partner))) != before).flatten(1).any(dim=1).tolist()
    by_batch = (outputs(louder(batch)) != before).flatten(1).any(dim=1).tolist()
    if case.cls().own_streams:
        assert (by_batch, by_partner) == ([True, False], [False, True])
    else:
        assert by_batch == [not case.cls().scores_partner] * case.num_experts
        assert by_partner == [case.cls().needs_partner] * case.num_experts


# Promises of single flows

BBN_CASE = Trial("bilateral", Case(Bilateral.Config(), 2, objective=BBN.Config(), head=BilateralHead.Config()))
ACE_CASE = Trial("ace", Case(OwnClasses.Config(), objective=ACE.Config()))


def statistics(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def test_bilateral_trunk_statistics_are_those_of_two_steps_in_turn():
    case = BBN_CASE
    ensemble, batch = case.ensemble(), batch_of(case)
    step(case, Network(ensemble), batch, Packed())
    in_turn = case.ensemble().trunk
    in_turn(batch.images_B3HW)
    in_turn(batch.partner.images_B3HW)
    found = statistics(ensemble.trunk)
    assert found["bn1.num_batches_tracked"] == 2
    for name, value in statistics(in_turn).items():
        assert torch.equal(found[name], value), name


def test_a_bilateral_branch_alone_runs_its_own_stream_only():
    case = BBN_CASE
    batch, gather = batch_of(case), Packed()
    step(case, Network(case.ensemble()), batch, gather)
    for place, stream in enumerate((batch, batch.partner)):
        alone, trunk = case.ensemble(only=[case.names[place]]), case.ensemble().trunk
        step(case, Network(alone), batch, Slot(place, gather.gathered))
        trunk(stream.images_B3HW)
        for name, value in statistics(trunk).items():
            assert torch.equal(statistics(alone.trunk)[name], value), name


def test_the_bilateral_sum_is_one_linear_layer_over_both_features():
    """At epoch 2 of 4 alpha is 15/16; features count 2 alpha and 2 (1 - alpha) times, the bias once."""
    case = BBN_CASE
    ensemble, batch = case.ensemble().eval(), batch_of(case)
    outputs_EBX, _ = step(case, Network(ensemble), batch, Packed())
    first, second = ensemble.members()
    f_a = first.features(ensemble.trunk(batch.images_B3HW))
    f_b = second.features(ensemble.trunk(batch.partner.images_B3HW))
    weight = torch.cat([first.head.weight, second.head.weight], dim=1)
    whole = torch.cat([2 * 15 / 16 * f_a, 2 * 1 / 16 * f_b], dim=1) @ weight.T + first.head.bias
    torch.testing.assert_close(outputs_EBX.sum(dim=0), whole.detach(), atol=1e-12, rtol=1e-12)


NO_FEW = torch.tensor([0, 1, 1, 0, 0, 1, 0])


def test_ace_experts_score_images_of_their_own_classes_and_leave_zeros_elsewhere():
    outputs_EBX, _ = step(ACE_CASE, Network(ACE_CASE.ensemble()), batch_of(ACE_CASE), Packed())
    scored = (outputs_EBX != 0).any(dim=-1)
    assert torch.equal(scored, torch.stack([LABELS >= 0, LABELS >= 1, LABELS >= 2]))
    everywhere = Trial("ace", Case(OwnClasses.Config(), objective=ACE.Config(com_batch="all")))
    outputs_EBX, _ = step(everywhere, Network(everywhere.ensemble()), batch_of(everywhere), Packed())
    assert (outputs_EBX != 0).any(dim=-1).all()


def test_ace_trunk_learns_from_the_first_expert_alone():
    """Its gradient is that of the first expert's cross-entropy."""
    ensemble, batch = ACE_CASE.ensemble(), batch_of(ACE_CASE)
    step(ACE_CASE, Network(ensemble), batch, Packed())
    other = ACE_CASE.ensemble()
    logits_BC = other.members()[0](other.trunk(batch.images_B3HW))
    torch.nn.functional.cross_entropy(logits_BC, LABELS).backward()
    for name, p in other.trunk.named_parameters():
        torch.testing.assert_close(ensemble.trunk.get_parameter(name).grad, p.grad, atol=1e-12, rtol=1e-10)


def test_ace_worker_without_the_first_expert_builds_no_graph_of_the_trunk():
    gather = Packed()
    packed = Network(ACE_CASE.ensemble())
    step(ACE_CASE, packed, batch_of(ACE_CASE), gather)
    assert packed.trunk_outputs.requires_grad
    for place in (1, 2):
        network = Network(ACE_CASE.ensemble(only=[ACE_CASE.names[place]]))
        step(ACE_CASE, network, batch_of(ACE_CASE), Slot(place, gather.gathered))
        assert not network.trunk_outputs.requires_grad
        assert all(p.grad is None for p in network.ensemble.trunk.parameters())
        assert network.ensemble.trunk.bn1.num_batches_tracked == 1


@pytest.mark.parametrize(("select", "rows"), [("before", LABELS >= 2), ("after", LABELS >= 0)])
def test_ace_batchnorm_sees_own_images_or_the_whole_batch_as_set(select, rows):
    case = Trial("ace", Case(OwnClasses.Config(select=select), objective=ACE.Config()))
    ensemble, batch, other = case.ensemble(), batch_of(case), case.ensemble()
    step(case, Network(ensemble), batch, Packed())
    last = other.members()[2]
    last(other.trunk(batch.images_B3HW)[rows])
    for name, value in statistics(last).items():
        torch.testing.assert_close(statistics(ensemble.members()[2])[name], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("select", ["before", "after"])
def test_ace_expert_without_images_in_the_global_batch_is_not_run(select):
    """Its scores are zeros, it gets no gradient, its BatchNorm does not move; the others learn as ever."""
    case = Trial("ace", Case(OwnClasses.Config(select=select), objective=ACE.Config()))
    ensemble, untouched = case.ensemble(), statistics(case.ensemble().members()[2])
    outputs_EBX, loss = step(case, Network(ensemble), batch_of(case, labels=NO_FEW), Packed())
    assert torch.isfinite(loss)
    assert torch.count_nonzero(outputs_EBX[2]) == 0
    for name, value in statistics(ensemble.members()[2]).items():
        assert torch.equal(value, untouched[name]), name
    assert all(p.grad is None for p in ensemble.members()[2].parameters())  # for which a step takes zeros
    assert all(torch.count_nonzero(p.grad) > 0 for p in ensemble.members()[1].parameters())


def test_ace_expert_whose_images_are_on_other_replicas_is_run_on_none():
    """Rows 2 and 3 have the classes 1 and 0; the few are in other rows. BatchNorm counts the step."""
    ensemble = ACE_CASE.ensemble()
    outputs_EBX, _ = step(ACE_CASE, Network(ensemble), batch_of(ACE_CASE, slice(2, 4)), Packed())
    assert torch.count_nonzero(outputs_EBX[2]) == 0
    counters = [v for name, v in ensemble.members()[2].named_buffers() if name.endswith("num_batches_tracked")]
    assert all(counter == 1 for counter in counters)
    assert all(torch.count_nonzero(p.grad) == 0 for p in ensemble.members()[2].parameters())


@pytest.mark.parametrize("min_rows", [3, 4])
def test_ace_expert_with_too_few_images_skips_the_step(min_rows):
    """The batch has 3 images of class 2 or 3."""
    ensemble = ACE_CASE.ensemble()
    flow = ACE_CASE.build_flow(min_rows=min_rows)
    outputs_EBX, _ = step(ACE_CASE, Network(ensemble), batch_of(ACE_CASE), Packed(), flow=flow)
    assert (torch.count_nonzero(outputs_EBX[2]) == 0) == (min_rows == 4)


def test_ace_with_mixup_scores_images_that_are_partly_of_an_experts_classes():
    """Both of a blend's labels are compared with the same scores, so none of them may be a zero left by the other."""
    batch = replace(batch_of(ACE_CASE), mixed=Mixed(torch.tensor(0.6), torch.tensor(0.4), PARTNERS, PARTNERS))
    outputs_EBX, _ = step(ACE_CASE, Network(ACE_CASE.ensemble()), batch, Packed())
    scored = (outputs_EBX != 0).any(dim=-1)
    assert torch.equal(scored[2], (LABELS >= 2) | (PARTNERS >= 2))
    assert torch.equal(scored[1], (LABELS >= 1) | (PARTNERS >= 1))


@pytest.mark.parametrize("rows", [slice(None), slice(2, 4)], ids=["alone", "without the few"])
@pytest.mark.parametrize("select", ["before", "after"])
@pytest.mark.parametrize("mixup", [False, True])
def test_ace_counts_and_selects_rows_without_waiting_for_a_device(rows, select, mixup):
    case = Trial("ace", Case(OwnClasses.Config(select=select), objective=ACE.Config()))

    def work(device):
        batch = batch_of(case, rows)
        others = Mixed(torch.tensor(0.6), torch.tensor(0.4), PARTNERS[rows], PARTNERS)
        held = [replace(b, host_labels=on_host(b)) for b in (batch, others)]
        mixed = replace(held[1], labels_B=others.labels_B.to(device), global_labels=PARTNERS.to(device))
        there = replace(held[0], images_B3HW=batch.images_B3HW.to(device), labels_B=batch.labels_B.to(device))
        there = replace(there, global_labels=LABELS.to(device), mixed=mixed if mixup else None)
        ensemble, flow = case.ensemble().to(device), case.build_flow()
        seen.waits.clear()
        outputs_EBX = flow(Network(ensemble), there, NOW, Packed())
        outputs_EBX.square().sum().backward()
        assert not seen.waits
        found = [outputs_EBX.detach(), *gradients(ensemble).values()]
        return [value.inner if isinstance(value, OnDevice) else value for value in found]

    with EmulatedDevice() as seen:
        on_device = work(DEVICE)
        on_cpu = work("cpu")
    assert all(torch.equal(a, b) for a, b in zip(on_cpu, on_device, strict=True))


def test_ace_with_one_image_on_maps_of_one_pixel_says_what_to_set():
    """4 x 4 pixels leave 1 x 1 in the last stage; one image of class 2 or 3."""
    labels = torch.tensor([0, 0, 1, 2])
    batch = Batch(draw(4, 3, 4, 4, seed=1), labels, labels)
    with pytest.raises(ValueError, match=r"expert 'expert2': the batch has 1 image.*objective\.min_rows = 2"):
        ACE_CASE.build_flow()(Network(ACE_CASE.ensemble()), batch, NOW, Packed())
    outputs_EBX, _ = step(ACE_CASE, Network(ACE_CASE.ensemble()), batch, Packed(), flow=ACE_CASE.build_flow(min_rows=2))
    assert torch.count_nonzero(outputs_EBX[2]) == 0


@pytest.mark.parametrize("flow", registry.registered_names("flow"))
@pytest.mark.parametrize("objective", registry.registered_names("objective"))
def test_a_flow_and_an_objective_that_do_not_fit_are_refused_by_both_names(flow, objective):
    """They fit if each is meant for the other, or for any."""
    flow_cls, cls = registry.piece("flow", flow), registry.piece("objective", objective)
    fits = cls.flow in (None, flow) and (flow_cls.takes is None or issubclass(cls, flow_cls.takes))
    tried = cases_of("objective", objective)[-1]
    case = Trial(flow, Case(cases_of("flow", flow)[0].config, tried.num_experts, objective=tried.config))
    if fits:
        case.build_flow()
        return
    with pytest.raises(ValueError, match=rf"objective '{objective}' and flow '{flow}' do not fit; .*: set ") as refusal:
        case.build_flow()
    wanted = cls.flow if flow_cls.takes is None else flow_cls.takes.Config().name
    assert wanted in str(refusal.value).rpartition(";")[2]


def test_every_pair_that_a_piece_declares_exists_and_fits():
    for kind in ("objective", "head"):
        for name in registry.registered_names(kind):
            flow = registry.piece(kind, name).flow
            assert flow is None or flow in registry.registered_names("flow"), name
