"""Every recipe is trained to the same numbers wherever its workers are, from its first stage to its last.

22 digits of 8 x 8 pixels in batches of 7, so that two replicas have 4 and 3 images, and the last batch of an epoch one
and none. Steps are a stage's last ones, whatever a recipe changes late having changed; of twenty, half are its first.
Workers are threads that exchange for real; Ray and DeepSpeed are in tests/e2e/test_placement_systems.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import aggregation
import experts
from experts import registry
from experts.cases import cases_of
from experts.class_groups import GroupRule
from orchestration.config.compose import load_config
from orchestration.config.words import available
from orchestration.storage.exports import ensemble_state
from orchestration.training.mesh import MeshShape
from orchestration.training.trainer import StageTrainer
from tests.auxiliaries import few
from tests.combinations import COMBINED, LOUD
from tests.recipes import WORDS, digits, export, saved_tensors, teachers_of
from tests.threads import run_mesh

registry.import_pieces(experts, aggregation)

FEW_STEPS, STEPS = 2, 20
NEED_COSINES = {"gcl"}
"""Second stages that go on from cosines; the recipes of these names have them."""


def even(settings):
    """Return settings whose groups of classes, if they have any, are of as many classes each."""
    grouped = settings is not None and "groups" in type(settings).model_fields
    return settings.model_copy(update={"groups": GroupRule(rule="equal")}) if grouped else settings


def config_of(words, objective=None):
    """Return the config of some words in float64, with batches of 7 in every stage, and with an objective if given."""
    config = load_config([*WORDS, "engine.precision=float64", *words])
    stages = {}
    for name, stage in config.method.stages.items():
        changes = {"batch_size": 7, "objective": even(objective or stage.objective)} if stage.epochs else {}
        stages[name] = stage.model_copy(update=changes)
    changes = {"stages": stages, "aggregator": even(config.method.aggregator)}
    return config.model_copy(update={"method": config.method.model_copy(update=changes)})


@lru_cache
def images():
    """Return 22 digits of all classes, and one more of each for validation."""
    return replace(few(), val=digits(1).val)


def take(trainer, steps):
    """Take whole epochs with half of the steps, then a stage's last steps; return the losses and terms of all."""
    setup, found, mixed = trainer.training, [], 0
    total = setup.stage.epochs * setup.steps_per_epoch
    begin = steps // 2 // setup.steps_per_epoch * setup.steps_per_epoch
    trainer.prepare()
    for first, last in ((0, begin), (max(begin, total - steps + begin), total)):
        trainer.done = first
        while trainer.done < last:
            now = setup.progress(trainer.done)
            mixed += setup.stage.mixing is not None and setup.batches.batch(now.epoch, now.step).mixed is not None
            interval = trainer.train(trainer.done + 1)
            found += [("loss", interval.losses[0]), *sorted(interval.terms.items())]
    assert mixed or setup.stage.mixing is None, "a mixing that never mixes shows nothing"
    return found


def trained(config, shape, folder: Path, steps):
    """Train all stages on a mesh, each from what the stages before it have saved there.

    Returns:
        Losses and terms, or what was fitted, and all tensors of a checkpoint, for each stage.
    """
    results, stages = {}, config.method.stages
    teaching = {teacher.stage for stage in stages.values() for teacher in stage.teachers.values()}
    for stage in stages:
        teachers, source = teachers_of(config, stage, images(), folder), config.method.starts_from(stage)
        (place := folder / stage).mkdir(parents=True)

        def work(mesh, lock, stage=stage, teachers=teachers, source=source, place=place):
            with lock:
                trainer = StageTrainer(config, stage, images(), mesh, teachers)
                if source is not None:
                    trainer.start_from(str(folder / source.stage))
            found = trainer.fit() if trainer.training is None else take(trainer, steps)
            trainer.save(str(place))
            trainer.close()
            return found, trainer.setup.dataset

        answers = run_mesh(shape, work)
        found, dataset = answers[0]
        assert all(other == found for other, _ in answers), "workers disagree"
        if stage in teaching:
            export(folder / f"{stage}.export", config, stage, dataset, state=ensemble_state(config, stage, place))
        results[stage] = found, saved_tensors(place)
    return results


def check(config, shape, folder, steps):
    """Compare a mesh with one worker: to 1e-6, BatchNorm's statistics, momentum and memories too."""
    expected = trained(config, MeshShape(shape.num_experts, shape.num_experts), folder / "packed", steps)
    found = trained(config, shape, folder / "placed", steps)
    assert found.keys() == expected.keys()
    for stage, (numbers, tensors) in found.items():
        wanted, wanted_tensors = expected[stage]
        if isinstance(numbers, list):
            assert [name for name, _ in numbers] == [name for name, _ in wanted]
            values, wanted_values = ([value for _, value in pairs] for pairs in (numbers, wanted))
            np.testing.assert_allclose(values, wanted_values, rtol=0, atol=1e-6, err_msg=stage)
        else:
            assert numbers == wanted
        assert tensors.keys() == wanted_tensors.keys()
        for name, value in wanted_tensors.items():
            np.testing.assert_allclose(tensors[name], value, rtol=0, atol=1e-6, err_msg=f"{stage} {name}")


MIXES = {
    mix: ["method=ce", f"mix={mix}", *([*LOUD, "method.stages.train.mixing.probability=1"] if mix == "cmo" else [])]
    for mix in available("mix")
}
AFTERWARDS = ",".join(part for part in available("then") if part not in NEED_COSINES)
CASES = {
    **{method: [f"method={method}"] for method in available("method")},
    **{f"{mix} on ce": words for mix, words in MIXES.items()},
    "RandAugment on ce": ["method=ce", "dataset.augment.name=randaugment"],
    "every second stage": ["method=ce", "method.num_experts=2", f"then=[{AFTERWARDS}]"],
}
every_case = pytest.mark.parametrize("words", CASES.values(), ids=CASES)


@every_case
@pytest.mark.slow
def test_the_last_steps_of_each_stage_are_those_of_one_worker(words, tmp_path):
    """With one expert per worker; with two replicas where there is one expert."""
    config = config_of(words)
    num_experts = config.method.num_experts
    check(config, MeshShape(num_experts, 1, 1 if num_experts > 1 else 2), tmp_path, FEW_STEPS)


@every_case
@pytest.mark.drill
def test_twenty_steps_of_each_stage_are_those_of_one_worker(words, tmp_path):
    """With replicas of one expert per worker; with three replicas where there is one expert, of 3, 2 and 2 images."""
    config = config_of(words)
    num_experts = config.method.num_experts
    check(config, MeshShape(num_experts, 1, 2 if num_experts > 1 else 3), tmp_path, STEPS)


@pytest.mark.parametrize("words", [words for _, words in COMBINED.values()], ids=COMBINED)
@pytest.mark.drill
def test_combinations_are_the_same_from_first_to_last_stage(words, tmp_path):
    check(config_of(words), MeshShape(3, 1, 2), tmp_path, STEPS)


def forms():
    """Return every case of every objective that the plain flow takes without teachers."""
    found = []
    for name in registry.registered_names("objective"):
        cls = registry.piece("objective", name)
        for place, case in enumerate(cases_of("objective", name)):
            if cls.flow is None and case.config.teacher_names is None and not cls.silent:
                found.append(pytest.param(case, id=f"{name}-{place}"))
    return found


@pytest.mark.parametrize("case", forms())
@pytest.mark.drill
def test_every_form_of_an_objective_is_the_same_for_twenty_steps(case, tmp_path):
    """With two replicas of all experts; slots apart are in test_objectives.py."""
    config = config_of(["method=ce", f"method.num_experts={case.num_experts}"], case.config)
    check(config, MeshShape(case.num_experts, case.num_experts, 2), tmp_path, STEPS)
