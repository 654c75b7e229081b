"""Workers exchange in a step what `plan` says, byte for byte, and no feature map.

A spy inside every worker records all calls of torch's process groups, which DeepSpeed uses as well.
Digits at 8 x 8 pixels, batches of 50 images of 405, ResNet-8.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import ray

from aggregation.serving import TrainingData, export_model
from experts.ensemble import build_ensemble
from orchestration.cluster.fleet import Fleet
from orchestration.config.compose import load_config
from orchestration.config.recipe import stage_classes
from orchestration.preflight.plan import plan

pytestmark = pytest.mark.ray

COMMON = [
    "dataset.image_size=8",
    "dataset.augment.crop_padding=1",
    "engine.threads=1",
    "cluster.cpus_per_worker=0.1",
]
BATCH = 50
STAGES = {"ride": "train", "tade": "train", "ace": "train", "bbn": "train", "reslt": "train",
          "ride_router": "router", "ride_h2t": "h2t"}  # fmt: skip
PLACEMENTS = {
    "spread": "cluster.workers={experts}",
    "spread, two replicas": "cluster.workers={twice}",
    "two replicas of all": "cluster.workers=2 cluster.experts_per_worker={experts}",
}
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
}


def spy():
    """Return a function for a worker: take one step and report what went through process groups."""

    def one_step(worker):
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

        calls = []
        words = ("reduce", "gather", "broadcast", "all_to_all", "alltoall", "scatter", "send", "recv", "barrier")
        kept = {name: method for name, method in vars(ProcessGroup).items() if any(word in name for word in words)}
        for name in kept:
            setattr(ProcessGroup, name, listening(name, getattr(ProcessGroup, name)))
        try:
            worker.trainer.train(worker.trainer.done + 1)
        finally:
            for name, method in kept.items():
                setattr(ProcessGroup, name, method)
        return calls

    return one_step


def calls_of_one_step(config, stage, teachers=None):
    """Return, by worker and call: name, size of the group, and shape and bytes of the tensor sent."""
    fleet = Fleet(config, plan(config).shape)
    try:
        fleet.start()
        seen = fleet.build(stage, teachers)
        if seen[0]["prepares"]:
            fleet.call("prepare")
        return ray.get([worker.__ray_call__.remote(spy()) for worker in fleet.workers])
    finally:
        fleet.close()


def check(words, stage, teachers=None):
    """Compare every worker's step with the plan."""
    config = load_config([*COMMON, f"method.stages.{stage}.batch_size={BATCH}", *words])
    found = plan(config)
    (planned,) = [part for part in found.stages if part.name == stage]
    assert planned.exchanges
    calls = calls_of_one_step(config, stage, teachers)
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
        # Whatever has rows for images is scores: experts, images, classes or a gate's score.
        matrices = [shape for _, _, ((shape, _),) in crossing if len(shape) > 1]
        images = planned.shares[0]
        assert all(
            len(shape) == 3 and shape[1] == images and shape[2] in (1, planned.num_classes) for shape in matrices
        )
    return planned, calls


def cases():
    for method in STAGES:
        for placement in PLACEMENTS:
            # Streams and learning rates with replicas are met by BBN; of the others, the drills ask.
            long = placement != "spread" and method != "bbn"
            yield pytest.param(method, placement, marks=[pytest.mark.drill] if long else [])


@pytest.mark.parametrize(("method", "placement"), list(cases()))
def test_bytes_of_a_step_are_those_of_the_plan(method, placement, warm):
    experts = load_config([f"method={method}"]).method.num_experts
    words = PLACEMENTS[placement].format(experts=experts, twice=2 * experts).split()
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
def test_engines_precisions_and_frozen_parts(method, words, warm):
    check([f"method={method}", "cluster.workers=6", *words.split()], STAGES[method])


def test_two_learning_rates_are_filled_up_and_measured_apart(warm):
    """ZeRO keeps parameters of one learning rate together: a padding and a norm for each."""
    planned, _ = check(["method=ride", "cluster.workers=6", "method.stages.train.lr_factors.heads=10"], "train")
    whats = {exchange.what: exchange.payload for exchange in planned.exchanges}
    assert (whats["norm of the gradient, trunk (ZeRO)"], whats["norm of the gradient, experts (ZeRO)"]) == (4, 8)


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
def test_a_teacher_of_four_experts_on_three_slots(mode, warm, tmp_path):
    """4 experts on 3 slots: every slot gives rows for 2; in train mode its BatchNorms count all replicas' images."""
    teacher = f"method.stages.train.teachers.teacher={{run:{tmp_path},weights:last,mode:{mode}}}"
    words = ["method=ride_distill", "cluster.workers=6", teacher]
    folder = exported(load_config([*COMMON, *words]), "train", tmp_path / "export" / "last", ("a", "b", "c", "d"))
    planned, _ = check(words, "train", {"teacher": folder})
    whats = {exchange.what: exchange.payload for exchange in planned.exchanges}
    assert whats["scores of teacher teacher"] == 2 * 25 * 10 * 4
    assert ("BatchNorm statistics of teacher teacher" in whats) == (mode == "train")


def test_the_student_of_three_teachers_on_two_replicas(warm, tmp_path):
    words = ["method=lfme", "cluster.workers=2"]
    config = load_config([*COMMON, *words])
    teachers = {name: exported(config, name, tmp_path / name) for name in ("many", "medium", "few")}
    check(words, "student", teachers)
