"""Every registered auxiliary is the same on every placement, after a resume and in a replay, and is not exported.

First each alone, on embeddings that are given; then all of them at once on the experts of a recipe.

Shapes: V views, B images of the whole batch, D features, d numbers of an embedding, C classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import aggregation
import experts
from experts import registry
from experts.auxiliaries.auxiliary import AuxiliarySettings, Seen
from experts.batches import share
from experts.cases import cases_of
from experts.ensemble import TRAINING_ONLY, part_of
from experts.objective import StepContext
from experts.progress import Progress
from orchestration.config.compose import load_config
from orchestration.storage.exports import ensemble_state
from orchestration.training import graphs
from orchestration.training.mesh import Mesh, MeshShape
from tests.auxiliaries import (
    FEW_WORDS,
    SHAPES,
    config_of,
    heads_that_follow,
    heads_with_memory,
    images_made,
    take,
    tensors_of,
    trainer_of,
)
from tests.emulated_device import DEVICE, EmulatedDevice
from tests.emulated_graphs import emulated_graphs
from tests.recipes import AS_ON_A_GPU
from tests.threads import run_mesh

registry.import_pieces(experts, aggregation)

WIDTH, IMAGES = 6, 7
COUNTS = torch.tensor([40, 20, 10, 5])
LABELS = torch.tensor([0, 1, 0, 2, 3, 0, 1])
NOW = Progress(2, 4, 1, 5)
CASES = [
    pytest.param(case.config, id=f"{name}-{place}")
    for name in registry.registered_names("auxiliary")
    for place, case in enumerate(cases_of("auxiliary", name))
]
every_case = pytest.mark.parametrize("config", CASES)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(config):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        auxiliary = registry.build("auxiliary", config, WIDTH, COUNTS).double()
        if (wanted := auxiliary.head or ("linear" if auxiliary.uses_head else None)) is not None:
            head = registry.build("head", registry.piece("head", wanted).Config(), WIDTH, len(COUNTS)).double()
            auxiliary.meet(head)
            auxiliary.met = [head]  # a list, so that it is not a part of the auxiliary
        return auxiliary


def seen_by(auxiliary, seed=0) -> Seen:
    """Return a step with embeddings as the auxiliary makes them, and keys and scores if it asks for these."""
    config = auxiliary.config
    with torch.no_grad():
        embedded = torch.stack(
            [auxiliary.embed(draw(IMAGES, WIDTH, seed=seed + v)) for v in range(config.views_together)]
        )
        keys = None if config.momentum_copy is None else auxiliary.embed(draw(IMAGES, WIDTH, seed=seed + 7))
    logits = draw(IMAGES, len(COUNTS), seed=seed + 8) if auxiliary.sees_logits else None
    told = None
    if auxiliary.guesses is not None:
        values = registry.piece("augmentation", auxiliary.guesses).told_values
        told = torch.from_numpy(np.random.default_rng(seed).integers(0, values, IMAGES))
    draws = np.random.default_rng(seed).random((IMAGES, auxiliary.draws)) if auxiliary.draws else None
    return Seen(
        embedded, keys, logits, LABELS, told_B=told, draws_BU=None if draws is None else torch.from_numpy(draws)
    )


def with_own_rows(values, start, stop):
    """Return the same values, of which only some rows have gradients."""
    before, own, after = values.tensor_split([start, stop], dim=-2)
    return torch.cat([before.detach(), own, after.detach()], dim=-2)


def changed(seen: Seen, change) -> Seen:
    return graphs.rebuilt(seen, change)


def settled(auxiliary):
    """Return the auxiliary after the pass before an epoch and some steps."""
    if auxiliary.looks(NOW):
        auxiliary.before_epoch(auxiliary.statistics(draw(40, WIDTH, seed=5), torch.arange(40) % len(COUNTS)), NOW)
    for step in range(3):
        auxiliary.update(seen_by(auxiliary, seed=10 * step), 0.1, torch.tensor(True))
    return auxiliary


def state(auxiliary) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in auxiliary.state_dict().items()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestAlone:
    """Each auxiliary on embeddings that are given."""

    @every_case
    def test_its_config_belongs_to_the_family(self, config):
        assert isinstance(config, AuxiliarySettings)
        assert config.views in (1, 2)

    @every_case
    def test_the_loss_is_finite_and_changes_nothing(self, config):
        auxiliary = settled(built(config))
        seen, before = seen_by(auxiliary), state(auxiliary)
        kept = changed(seen, torch.clone)
        first, second = (auxiliary.loss(seen, NOW) for _ in range(2))
        assert first.ndim == 0
        assert torch.isfinite(first)
        assert torch.equal(first, second)
        assert same(before, auxiliary.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(graphs.tensors_in(kept), graphs.tensors_in(seen), strict=True))

    @every_case
    @pytest.mark.parametrize("replicas", [2, 3, 9])
    def test_gradients_of_replicas_add_up_to_those_of_one(self, config, replicas):
        """Gradients are those of rows before the exchange and of parameters after it. Nine leave two replicas empty."""
        auxiliary = settled(built(config))
        seen = seen_by(auxiliary)
        after = [p for name, p in auxiliary.named_parameters() if not name.startswith("embed.")]

        def gradients(part, parts):
            leaves = [t.clone().requires_grad_() for t in (seen.embedded_VBd, seen.logits_BC) if t is not None]
            own = [with_own_rows(leaf, *share(IMAGES, part, parts)) for leaf in leaves]
            logits = None if seen.logits_BC is None else own[1]
            loss = auxiliary.loss(replace(seen, embedded_VBd=own[0], logits_BC=logits, replicas=parts), NOW)
            if not loss.requires_grad:
                return loss, [torch.zeros_like(x) for x in (*leaves, *after)]
            found = torch.autograd.grad(loss, [*leaves, *after], allow_unused=True, materialize_grads=True)
            return loss, found

        loss, expected = gradients(0, 1)
        parts = [gradients(part, replicas) for part in range(replicas)]
        assert all(torch.equal(found, loss) for found, _ in parts)
        for place, whole in enumerate(expected):
            torch.testing.assert_close(sum(found[place] for _, found in parts), whole, rtol=1e-9, atol=1e-12)

    @every_case
    def test_the_gradient_is_that_of_the_value(self, config):
        auxiliary = settled(built(config))
        seen = seen_by(auxiliary)
        leaf = seen.embedded_VBd.clone().requires_grad_()
        loss = auxiliary.loss(replace(seen, embedded_VBd=leaf), NOW)
        if loss.requires_grad:
            assert torch.autograd.gradcheck(
                lambda x: auxiliary.loss(replace(seen, embedded_VBd=x), NOW), (leaf,), atol=1e-4
            )

    @every_case
    def test_a_batch_of_one_image_and_of_one_class_has_a_finite_loss(self, config):
        auxiliary = settled(built(config))
        whole = seen_by(auxiliary)
        for rows in ([0], [0, 2, 5]):
            seen = changed(whole, lambda t, rows=rows: t[rows] if t.ndim == 1 else t[..., rows, :])
            leaf = seen.embedded_VBd.clone().requires_grad_()
            loss = auxiliary.loss(replace(seen, embedded_VBd=leaf), NOW)
            assert torch.isfinite(loss)
            if loss.requires_grad:
                (found,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
                assert torch.isfinite(found).all()

    @every_case
    def test_a_step_that_was_not_finite_leaves_the_memory_as_it_was(self, config):
        auxiliary = settled(built(config))
        before = state(auxiliary)
        bad = changed(seen_by(auxiliary), lambda t: t * float("nan") if t.is_floating_point() else t)
        auxiliary.update(bad, 0.1, torch.tensor(False))
        assert same(before, auxiliary.state_dict())

    @every_case
    def test_all_that_it_keeps_is_in_its_saved_buffers(self, config):
        """A fresh one with the state of another goes on as that does."""
        first = settled(built(config))
        second = built(config)
        second.load_state_dict(state(first))
        for step in range(3):
            seen = seen_by(first, seed=100 * step)
            assert torch.equal(first.loss(seen, NOW), second.loss(seen, NOW))
            for auxiliary in (first, second):
                auxiliary.update(seen, 0.1, torch.tensor(True))
            assert same(first.state_dict(), second.state_dict())

    @every_case
    def test_statistics_of_parts_add_up_and_are_zero_for_none(self, config):
        auxiliary = built(config)
        if not auxiliary.looks(replace(NOW, epoch=1)) and not auxiliary.looks(NOW):
            return
        features, labels = draw(40, WIDTH, seed=5), torch.arange(40) % len(COUNTS)
        whole = auxiliary.statistics(features, labels)
        parts = [auxiliary.statistics(features[rows], labels[rows]) for rows in (slice(0, 13), slice(13, 40))]
        assert whole.dtype == torch.float64
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)
        assert not auxiliary.statistics(features[:0], labels[:0]).any()

    @every_case
    def test_the_host_waits_for_nothing(self, config):
        with EmulatedDevice():
            auxiliary = settled(built(config)).float().to(DEVICE)
            for head in getattr(auxiliary, "met", []):
                head.float().to(DEVICE)
            seen = changed(seen_by(built(config)), lambda t: (t.float() if t.is_floating_point() else t).to(DEVICE))
            ok = torch.ones((), dtype=torch.bool, device=DEVICE)
            leaf = seen.embedded_VBd.clone().requires_grad_()
            with EmulatedDevice() as device:
                loss = auxiliary.loss(replace(seen, embedded_VBd=leaf), NOW)
                if loss.requires_grad:
                    loss.backward()
                auxiliary.update(seen, 0.1, ok)
        assert device.waits == {}

    @every_case
    def test_the_loss_of_another_moment_of_the_phase_is_the_same(self, config):
        """A replay has the Python numbers of its capture: within a phase nothing may follow the moment."""
        auxiliary = settled(built(config))
        seen, of_phase = seen_by(auxiliary), {}
        for epoch in range(1, 9):
            now = Progress(epoch, 8, 2, 5)
            loss = auxiliary.loss(seen, now)
            assert torch.equal(of_phase.setdefault(auxiliary.phase(now), loss), loss)
        assert len(of_phase) <= 4


# All of them at once, on the experts of RIDE


IN_FLOAT64 = "engine.precision=float64"
ALL = {"auxiliaries": config_of, "heads": heads_that_follow, "memories": heads_with_memory, "images made": images_made}
each = pytest.mark.parametrize("which", ALL.values(), ids=ALL)
each_that_is_captured = pytest.mark.parametrize("which", list(ALL.values())[:3], ids=list(ALL)[:3])


def trained(shape, which=config_of, steps=6):
    """Return losses and terms, and the tensors of all workers of the first replica."""
    config = which(IN_FLOAT64)

    def work(mesh, lock):
        with lock:
            trainer = trainer_of(config, mesh)
        trainer.prepare()
        return take(trainer, steps), tensors_of(trainer)

    found = run_mesh(shape, work)
    losses = found[0][0]
    assert all(other == losses for other, _ in found), "workers disagree"
    tensors = {}
    for rank in range(0, shape.workers, shape.replicas):
        tensors |= found[rank][1]
    return losses, tensors


@lru_cache
def packed(which=config_of):
    return trained(MeshShape(3, 3), which)


@each
@pytest.mark.parametrize("place", [name for name in SHAPES if name != "packed"])
def test_losses_weights_and_memories_are_the_same_wherever_experts_live(place, which):
    """The fourth step has one image, so that other replicas have none; the fifth begins an epoch."""
    expected, tensors = packed(which)
    losses, found = trained(MeshShape(3, *SHAPES[place]), which)
    for own, other in zip(losses, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-8, abs=1e-8)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-7, msg=name)


@lru_cache
def two_batches(*more):
    """Return the config of three experts with contrast of one batch and cross-entropy of another."""
    words = ["method=hybrid_sc", "method.num_experts=3", "method.stages.train.augment.name=crop_flip", *more]
    return load_config([*FEW_WORDS, *words, "method.stages.train.auxiliaries.near.name=prototypes"])


def test_losses_and_weights_are_the_same_where_auxiliaries_and_objective_see_two_batches():
    expected, tensors = trained(MeshShape(3, 3), two_batches, steps=5)
    losses, found = trained(MeshShape(3, 3, 2), two_batches, steps=5)
    for own, other in zip(losses, expected, strict=True):
        assert own == pytest.approx(other, rel=1e-8, abs=1e-8)
    for name, value in tensors.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-7, msg=name)


def test_the_loss_that_is_logged_has_the_weighted_ones_of_auxiliaries():
    """In the first step, whose losses do not depend on the weights yet."""
    losses, _ = packed()
    config = config_of(IN_FLOAT64, weight=0)
    bare = take(trainer_of(config), 1)[0]
    auxiliaries = config.method.stages["train"].auxiliaries
    terms = {name: value for name, value in losses[0].items() if name.split("/")[0] in auxiliaries}
    assert len(terms) == 3 * len(auxiliaries)
    assert {name: bare[name] for name in terms} == terms
    assert losses[0]["loss"] == pytest.approx(bare["loss"] + 0.3 * sum(terms.values()), rel=1e-9)


@each
def test_a_resumed_run_goes_on_to_the_bit_in_the_middle_of_an_epoch(which, tmp_path):
    config = which()
    whole, first = trainer_of(config), trainer_of(config)
    expected = take(whole, 7)
    found = take(first, 3)
    first.save(str(tmp_path))
    second = trainer_of(config)
    second.load(str(tmp_path), first.state())
    found += take(second, 4)
    assert found == expected
    assert same(tensors_of(second), tensors_of(whole))


def test_a_checkpoint_of_one_placement_loads_on_another(tmp_path):
    config = config_of(IN_FLOAT64)
    expected, tensors = packed()
    first = trainer_of(config)
    found = take(first, 3)
    first.save(str(tmp_path))

    def work(mesh, lock):
        with lock:
            trainer = trainer_of(config, mesh)
        trainer.load(str(tmp_path), first.state())
        return take(trainer, 3), tensors_of(trainer)

    answers = run_mesh(MeshShape(3, 1), work)
    for own, other in zip(found + answers[0][0], expected, strict=True):
        assert own == pytest.approx(other, rel=1e-8, abs=1e-8)
    for _, own in answers:
        for name, value in own.items():
            torch.testing.assert_close(value, tensors[name], rtol=1e-7, atol=1e-7, msg=name)


def test_heads_that_follow_have_moved():
    _, tensors = packed(heads_that_follow)
    moved = [name for name, value in tensors.items() if name.endswith(".sum_D") and value.any()]
    assert len(moved) == 3


def test_what_is_exported_has_no_auxiliaries(tmp_path):
    config = config_of()
    trainer = trainer_of(config)
    take(trainer, 1)
    trainer.save(str(tmp_path))
    own = trainer.setup.model.state_dict()
    exported = ensemble_state(config, "train", tmp_path)
    assert any(part_of(name) in TRAINING_ONLY for name in own)
    assert set(exported) == {name for name in own if part_of(name) not in TRAINING_ONLY}


def test_a_later_stage_begins_without_what_an_earlier_one_has_learnt_beside(tmp_path):
    """Its own auxiliaries are new, and copies of the network begin as the network does."""
    config = config_of()
    first = trainer_of(config)
    take(first, 1)
    first.save(str(tmp_path))
    second = trainer_of(config)
    fresh = tensors_of(second)
    second.start_from(str(tmp_path))
    before, after = tensors_of(first), tensors_of(second)
    for name, value in after.items():
        if part_of(name) == "auxiliaries":
            assert torch.equal(value, fresh[name]), name
        elif part_of(name) == "momentum copies":
            twin = name.replace("trunk_copy.", "trunk.").replace(".momentum_copy.features.", ".features.")
            if twin != name:
                assert torch.equal(value, after[twin]), name
        else:
            assert torch.equal(value, before[name]), name


@pytest.fixture
def early(monkeypatch):
    """Capture the first step of a kind: no library has to get ready."""
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)


@each_that_is_captured
def test_replays_give_the_bits_of_steps_of_their_own(which, early):
    """Those of the CPU, too; and no step makes the host wait."""
    found = []
    config = which(AS_ON_A_GPU, "method.stages.train.objective_weight={ramp: linear, start: 1, end: 0.5}")
    for context in (nullcontext(), emulated_graphs()):
        with EmulatedDevice(), context as made:
            trainer = trainer_of(config, Mesh(MeshShape(3, 3), device=DEVICE))
            losses = take(trainer, 6)
            found.append((losses, tensors_of(trainer)))
    on_cpu = trainer_of(config)
    found.append((take(on_cpu, 6), tensors_of(on_cpu)))
    assert made
    assert [backend.problems for backend in made] == [[]]
    assert made[0].replays
    for losses, tensors in found[1:]:
        assert losses == found[0][0]
        assert same(tensors, found[0][1])


@each
def test_a_step_makes_the_host_wait_for_nothing(which):
    with EmulatedDevice():
        trainer = trainer_of(which(), Mesh(MeshShape(3, 3), device=DEVICE))
        setup = trainer.training
        batches = trainer._batches_of(setup, 1, 0)
        trainer._step(next(batches), setup.progress(0))
        batch = next(batches)
        with EmulatedDevice() as seen:
            trainer._step(batch, setup.progress(1))
    assert seen.waits == {}


@each
def test_a_step_that_is_not_finite_moves_no_memory_and_no_copy(which):
    trainer = trainer_of(which())
    take(trainer, 2)
    before = tensors_of(trainer)
    setup = trainer.training
    batch = next(trainer._batches_of(setup, 1, 2))
    trainer._step(replace(batch, images_B3HW=batch.images_B3HW * float("nan")), setup.progress(2))
    after = tensors_of(trainer)
    moved = [n for n in after if not torch.equal(after[n], before[n]) and "running" not in n and "num_batches" not in n]
    assert not moved


def test_a_loss_that_is_not_finite_is_found_in_its_auxiliary():
    config = config_of()
    trainer = trainer_of(config)
    name = next(iter(config.method.stages["train"].auxiliaries.values())).name
    cls = registry.piece("auxiliary", name)
    broken = lambda self, seen, now: seen.embedded_VBd.sum() * float("nan")  # noqa: E731
    with patch.object(cls, "loss", broken), pytest.raises(FloatingPointError, match=f"auxiliary x_{name}/expert0"):
        take(trainer, 1)


def test_experts_may_have_different_auxiliaries(tmp_path):
    """Where they live changes nothing."""
    words = [*FEW_WORDS, "engine.precision=float64"]
    at = "method.stages.train.auxiliaries"
    words += [
        f"{at}.a.name=triplet",
        f"{at}.a.experts=[expert1]",
        f"{at}.b.name=supcon",
        f"{at}.b.experts=[expert0,expert2]",
    ]
    config = load_config(words)

    def work(mesh, lock):
        with lock:
            trainer = trainer_of(config, mesh)
        return take(trainer, 2)

    (packed_losses,) = run_mesh(MeshShape(3, 3), work)
    assert {"a/expert1", "b/expert0", "b/expert2"} <= packed_losses[0].keys()
    assert "a/expert0" not in packed_losses[0]
    for losses in run_mesh(MeshShape(3, 1), work):
        for own, other in zip(losses, packed_losses, strict=True):
            assert own == pytest.approx(other, rel=1e-8, abs=1e-8)


SILENT = [name for name in registry.registered_names("objective") if registry.piece("objective", name).silent]


@pytest.mark.parametrize("name", SILENT)
def test_a_silent_objective_is_zero_and_has_a_gradient_of_zero(name):
    objective = registry.build("objective", registry.piece("objective", name).Config(), COUNTS, 2)
    logits_EBC = torch.stack([draw(IMAGES, len(COUNTS), seed=k) for k in range(2)]).requires_grad_()
    loss, terms = objective(logits_EBC, LABELS, StepContext(objective.denominators(LABELS, NOW), NOW))
    loss.backward()
    assert not loss
    assert not terms
    assert not logits_EBC.grad.any()
