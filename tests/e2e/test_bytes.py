"""Workers exchange in a step what `plan` says, byte for byte, and no feature map.

A spy inside every worker records all calls of torch's process groups, which DeepSpeed uses as well.
Digits at 8 x 8 pixels, batches of 50 images of 405, ResNet-8. The workers are processes of this file's, without Ray.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from aggregation.serving import TrainingData, export_model
from experts.ensemble import build_ensemble
from orchestration.config.compose import load_config
from orchestration.config.recipe import stage_classes
from orchestration.config.words import available
from orchestration.preflight.plan import plan
from tests.worlds import Worlds

pytestmark = pytest.mark.xdist_group("worlds")  # one set of processes for all of them

COMMON = [
    "dataset.image_size=8",
    "dataset.augment.crop_padding=1",
    "engine.threads=1",
    "cluster.cpus_per_worker=0.1",
]
BATCH = 50
MOST_WORKERS = 6
STAGES = {"ride": "train", "tade": "train", "ace": "train", "bbn": "train", "reslt": "train",
          "ride_router": "router", "ride_h2t": "h2t"}  # fmt: skip
PLACEMENTS = {
    "spread": "cluster.workers={experts}",
    "two replicas of all": "cluster.workers=2 cluster.experts_per_worker={experts}",
}
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
}


def calls_of_one_step(trainer):
    """Take a step in a worker. Return what it gave to process groups: name, size of the group, shape and bytes."""
    import torch
    from torch.distributed import ProcessGroup

    def tensors(found):
        if isinstance(found, torch.Tensor):
            return [found]
        return [t for part in found for t in tensors(part)] if isinstance(found, list | tuple) else []

    def listening(name, call):
        def heard(group, *args, **more):
            # What a worker gives is the last tensor; what it gets comes before.
            own = tensors([*args, *more.values()])[-1:]
            calls.append((name, group.size(), [(tuple(t.shape), t.numel() * t.element_size()) for t in own]))
            return call(group, *args, **more)

        return heard

    if trainer.training.objective.prepares:
        trainer.prepare()
    setup = trainer.training
    if any(piece.looks(setup.progress(0)) for piece in setup.auxiliaries.pieces):
        trainer.train(1)  # the pass before an epoch is no step
    calls = []
    words = ("reduce", "gather", "broadcast", "all_to_all", "alltoall", "scatter", "send", "recv", "barrier")
    kept = {name: method for name, method in vars(ProcessGroup).items() if any(word in name for word in words)}
    for name in kept:
        setattr(ProcessGroup, name, listening(name, getattr(ProcessGroup, name)))
    try:
        trainer.train(trainer.done + 1)
    finally:
        for name, method in kept.items():
            setattr(ProcessGroup, name, method)
    return calls


@pytest.fixture(scope="module")
def worlds():
    """Start six workers for all tests of this file."""
    found = Worlds(MOST_WORKERS)
    yield found
    found.close()


@pytest.fixture
def check(worlds):
    """Return a function that compares every worker's step with the plan."""

    def compare(words, stage, teachers=None):
        return compared(
            worlds, load_config([*COMMON, f"method.stages.{stage}.batch_size={BATCH}", *words]), stage, teachers
        )

    return compare


def compared(worlds, config, stage, teachers=None):
    found = plan(config)
    (planned,) = [part for part in found.stages if part.name == stage]
    assert planned.exchanges
    calls = worlds.run(config, stage, teachers or {}, calls_of_one_step)
    assert len(calls) == found.shape.workers
    for rank, of_worker in enumerate(calls):
        slot, _ = found.shape.position(rank)
        crossing = [call for call in of_worker if call[1] > 1]
        measured, expected = Counter(), Counter()
        for name, among, given in crossing:
            assert len(given) == 1, name
            measured[KINDS[name], among] += given[0][1]
        for exchange in planned.exchanges:
            expected[exchange.kind, exchange.among] += exchange.payloads[slot]
        assert measured == +expected, f"worker {rank}"
        # Whatever has rows for images is scores: experts, images, classes or a gate's score; or vectors of auxiliaries.
        vectors = bool(config.method.stages[stage].auxiliaries)
        matrices = [shape for _, _, ((shape, _),) in crossing if len(shape) > 1]
        images = planned.shares[0]
        assert all(
            len(shape) == 3 and shape[1] == images and (vectors or shape[2] in (1, planned.num_classes))
            for shape in matrices
        )
    return planned, calls


seen = set()


@pytest.mark.parametrize("method", available("method"))
def test_bytes_of_a_step_of_every_recipe_are_those_of_the_plan(method, worlds, tmp_path):
    """Every expert in a slot of its own, on two replicas. A stage that an earlier recipe has too is not repeated."""
    recipe = load_config([f"method={method}"]).method
    words = [*COMMON, f"method={method}", f"cluster.workers={2 * recipe.num_experts}"]
    assert 2 * recipe.num_experts <= MOST_WORKERS
    with_steps = [name for name, stage in recipe.stages.items() if stage.epochs]
    for stage in with_steps:
        for name, teacher in recipe.stages[stage].teachers.items():
            if teacher.run is not None:
                words.append(f"method.stages.{stage}.teachers.{name}.run={tmp_path / name}")
    config = load_config([*words, *(f"method.stages.{stage}.batch_size={BATCH}" for stage in with_steps)])
    for stage in with_steps:
        settings = config.method.stages[stage].model_dump_json(exclude={"epochs", "lr_schedule", "after", "start_from"})
        key = settings, str(config.ensemble(stage, 10)), config.method.num_experts
        if key not in seen:
            compared(worlds, config, stage, exported_teachers(config, stage, tmp_path))
            seen.add(key)


def exported_teachers(config, stage, folder):
    """Export an untrained ensemble for each teacher of a stage; return their folders."""
    return {
        name: exported(config, teacher.stage or stage, folder / name / "export" / teacher.weights)
        for name, teacher in config.method.stages[stage].teachers.items()
    }


def cases():
    for method in STAGES:
        for placement in PLACEMENTS:
            # Streams and learning rates with replicas are met by BBN; of the others, the drills ask.
            yield pytest.param(method, placement, marks=[] if method == "bbn" else [pytest.mark.drill])


@pytest.mark.parametrize(("method", "placement"), list(cases()))
def test_bytes_on_other_placements_are_those_of_the_plan(method, placement, check):
    experts = load_config([f"method={method}"]).method.num_experts
    words = PLACEMENTS[placement].format(experts=experts).split()
    check([f"method={method}", *words], STAGES[method])


FROZEN = "method.stages.train.start_from.run=/not/asked method.stages.train.freeze="


@pytest.mark.parametrize(
    ("method", "words"),
    [
        pytest.param("ace", "engine.name=torch", marks=pytest.mark.drill),
        ("ace", "engine.zero_stage=2"),  # a graph through the trunk in every slot
        pytest.param("reslt", "engine.precision=float64", marks=pytest.mark.drill),
        ("reslt", "engine.precision=autocast"),
        ("reslt", "engine.sync_batchnorm=false"),
        ("tade", f"{FROZEN}[trunk]"),
        ("tade", f"{FROZEN}[features] method.stages.train.frozen_batchnorm=train"),
        pytest.param("ride_router", "method.stages.router.frozen_batchnorm=train", marks=pytest.mark.drill),
    ],
)
def test_engines_precisions_and_frozen_parts(method, words, check):
    check([f"method={method}", "cluster.workers=6", *words.split()], STAGES[method])


def test_two_learning_rates_are_filled_up_and_measured_apart(check):
    """ZeRO keeps parameters of one learning rate together: each leaf is filled up by itself."""
    planned, _ = check(["method=ride", "cluster.workers=6", "method.stages.train.lr_factors.heads=10"], "train")
    sums = [exchange for exchange in planned.exchanges if exchange.what == "gradient, experts"]
    assert len(sums) == 1  # of one name, in two exchanges


def exported(config, stage, folder, names=None):
    """Export an untrained ensemble of a stage."""
    names = names or config.method.names_in(stage)
    counts = plan(config).counts
    ids = stage_classes(config.method, stage, list(counts))
    ensemble = replace(config.ensemble(stage, len(ids)), expert_names=names)
    state = build_ensemble(ensemble, seed=1).state_dict()
    data = TrainingData(
        dataset=config.dataset,
        class_names=[str(c) for c in ids],
        counts=[counts[c] for c in ids],
        image_shape=(8, 8, 1),
    )
    export_model(folder, state, ensemble, load_config(["method=ride"]).method.aggregator, data)
    return str(folder)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_teacher_of_four_experts_on_three_slots(mode, check, tmp_path):
    """4 experts on 3 slots: every slot gives rows for 2; in train mode its BatchNorms count all replicas' images."""
    teacher = f"method.stages.train.teachers.teacher={{run:{tmp_path},weights:last,mode:{mode}}}"
    words = ["method=ride_distill", "cluster.workers=6", teacher]
    folder = exported(load_config([*COMMON, *words]), "train", tmp_path / "export" / "last", ("a", "b", "c", "d"))
    planned, _ = check(words, "train", {"teacher": folder})
    whats = {exchange.what: exchange.payload for exchange in planned.exchanges}
    assert whats["scores of teacher teacher"] == 2 * 25 * 10 * 4
    assert ("BatchNorm statistics of teacher teacher" in whats) == (mode == "train")
