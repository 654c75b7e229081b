"""Every recipe trains by replays of graphs to the bits of steps that run one kernel at a time.

On the emulated device, whose graphs know nothing but the operations and tensors of their capture: see emulated_graphs.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from orchestration.config.compose import load_config
from orchestration.training import graphs
from orchestration.training.exchange import Alone, Groups
from orchestration.training.mesh import Mesh, MeshShape, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.echo import Crossing, spread
from tests.emulated_device import DEVICE, EmulatedDevice
from tests.emulated_graphs import emulated_graphs
from tests.recipes import PARTS, WORDS, Recipe, digits, every_recipe, marks

BATCH = 48
"""Images of a step: an epoch of 405 ends with a step of another size."""
SEVERAL_EXPERTS = [pytest.param(m, marks=marks(m)) for m, parts in PARTS.items() if ("one expert", False) in parts]


def moments(setup):
    """Yield (epoch, step) of some steps: of both sizes, and round every epoch in which the loss changes."""
    last, epochs = setup.steps_per_epoch - 1, setup.stage.epochs
    yield from ((1, 0), (1, 1), (1, last), (2, last))
    if setup.mesh.shape.workers > 1:  # cuts do not depend on the epoch
        return
    switches = {epochs - 1, *setup.stage.objective.switches.values()}
    if setup.stage.class_weights is not None:
        switches |= set(setup.stage.class_weights.switches.values())
    for epoch in sorted(switches):
        if 2 < epoch < epochs:
            yield from ((epoch, 0), (epoch + 1, 0), (epoch + 1, 1))


def take(trainer):
    """Yield losses and terms of some steps, which need not follow each other, then the weights and the momentum."""
    setup = trainer.training
    for epoch, step in moments(setup):
        trainer.done, trainer._upcoming = (epoch - 1) * setup.steps_per_epoch + step, None
        interval = trainer.train(trainer.done + 1)
        assert not interval.notes
        yield f"{setup.stage_name}, epoch {epoch}, step {step}: {interval.losses} {interval.terms}"
    for name, value in [*setup.model.state_dict().items(), *setup.engine.momentum().items()]:
        yield f"{setup.stage_name}, {name}", value.cpu()


def trained(method, folder, mesh, context):
    """Return all that `take` yields for the stages of a recipe, and what captured them."""
    folder.mkdir()
    stages = load_config([f"method={method}", *WORDS]).method.stages
    words = [f"method.stages.{name}.batch_size={BATCH}" for name, stage in stages.items() if stage.epochs]
    with EmulatedDevice(), context as made:
        trainers = Recipe(method, folder, *words, mesh=mesh).trainers()
        return [item for trainer in trainers if trainer.training is not None for item in take(trainer)], made


def compare(method, folder, mesh):
    """Train a recipe with graphs and without, find no difference, and return what captured the stages."""
    eager, _ = trained(method, folder / "eager", mesh, nullcontext())
    captured, made = trained(method, folder / "captured", mesh, emulated_graphs())
    same(eager, captured)
    return made


def same(eager, captured):
    """Compare what `take` yielded, bit by bit."""
    for expected, found in zip(eager, captured, strict=True):
        if isinstance(expected, str):
            assert found == expected  # text, since NaN is not itself
        else:
            assert found[0] == expected[0]
            assert torch.equal(found[1], expected[1]), expected[0]


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Capture the first step of a kind: no library has to get ready."""
    monkeypatch.setattr(graphs, "EAGER_CALLS", 1)


def packed(config):
    return Mesh(mesh_shape(config.method.num_experts, 1), device=DEVICE)


@every_recipe
def test_replays_give_the_bits_of_steps_of_their_own(method, tmp_path):
    for backend in compare(method, tmp_path, packed):
        assert not backend.problems
        assert backend.replays


@pytest.mark.parametrize("method", ["ce", *SEVERAL_EXPERTS])
def test_replays_are_cut_where_workers_exchange(method, tmp_path):
    """Recipes of one expert exchange what that of cross-entropy does."""
    crossed = []
    for backend in compare(method, tmp_path, partial(spread, crossed)):
        assert not backend.problems
        assert len(backend.pieces) >= 2 * backend.captures
        assert all(backend.pieces), "a graph without a kernel"
    assert crossed


@pytest.mark.parametrize("method", ["ride", "bbn"])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1)], ids=["replicas", "slots"])
def test_two_workers_replay_in_step(method, shape, tmp_path):
    """Two threads that exchange for real: what they hold after steps with graphs is what they hold without."""
    slots, replicas = shape
    words = [*WORDS, f"method={method}", f"method.stages.train.batch_size={BATCH}"]
    if method == "ride":
        words.append("method.num_experts=2")
    config, found, one_by_one = load_config(words), [], threading.Lock()

    def work(rank, half):
        groups = Groups(half if replicas == 2 else Alone(), half if slots == 2 else Alone(), half)
        mesh = Mesh(MeshShape(2, 2 // slots, replicas), rank, device=DEVICE, groups=groups)
        with one_by_one:  # torch draws new weights from one generator for all threads
            trainer = StageTrainer(config, "train", digits(config.dataset.val_per_class), mesh)
        return list(take(trainer)), half.made

    for context in (nullcontext(), emulated_graphs()):
        with EmulatedDevice(), context as made:
            found.append(Crossing().run(work))
    for eager, captured in zip(*found, strict=True):
        same(eager[0], captured[0])
        assert captured[1] == eager[1]
    assert len(made) == 2
    assert all(backend.replays and not backend.problems for backend in made)


def test_steps_that_are_mixed_and_steps_that_are_not_are_replayed(tmp_path):
    """A whole epoch in the middle of training, of which CMO leaves about half of the steps alone."""
    found, words = [], ["mix=cmo", f"method.stages.train.batch_size={BATCH}"]
    for context in (nullcontext(), emulated_graphs()):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        with EmulatedDevice(), context as made:
            trainer = next(Recipe("ride", folder, *words, mesh=packed).trainers())
            steps = trainer.setup.steps_per_epoch
            trainer.done = 9 * steps
            interval = trainer.train(10 * steps)
            mixed = {batch.mixed is not None for batch in trainer.training.batches.iterate(10)}
            found.append([f"{interval.losses} {interval.terms}", *take(trainer)])
    same(*found)
    [backend] = made
    assert not backend.problems
    assert mixed == {True, False}
    assert backend.captures >= 3  # the last step of an epoch has another size


def test_a_stage_that_is_closed_leaves_no_captures(tmp_path):
    """Its memory is free for the next stage, without a wait for Python's collector."""
    with EmulatedDevice(), emulated_graphs() as made:
        trainer = next(Recipe("ce", tmp_path, mesh=packed).trainers())
        trainer.train(3)
        kept = weakref.ref(made.pop())
        assert kept() is not None
        trainer.close()
        assert kept() is None
