"""Every recipe on every data set: what it says fits together, and on digits each of its stages trains."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch

from aggregation.metrics import Scores
from aggregation.serving import TrainingData, export_model
from experts import ensemble as ensembles
from experts.data.dataset import open_dataset
from experts.ensemble import TRAINING_ONLY, build_ensemble, part_of
from experts.progress import Progress
from experts.registry import build
from orchestration.config.compose import load_config
from orchestration.config.identity import published
from orchestration.config.words import available
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.recipes import PARTS, QUICK, TRIED, chosen


@lru_cache
def composed(method, dataset, *words):
    return load_config([f"method={method}", f"dataset={dataset}", *words])


every_recipe = pytest.mark.parametrize(
    ("method", "dataset"), [(method, dataset) for method in available("method") for dataset in available("dataset")]
)


@every_recipe
@pytest.mark.slow
def test_every_method_has_every_data_set(method, dataset):
    config = composed(method, dataset)
    assert (config.method.name, config.dataset.name) == (method, dataset)
    # A recipe with a published number meets the conditions under which it was published.
    assert (published(config) is None) == (config.method.expected is None)


@every_recipe
@pytest.mark.slow
def test_nothing_is_planned_for_after_the_end(method, dataset):
    for stage in composed(method, dataset).method.stages.values():
        if stage.epochs:
            schedule = build("lr_schedule", stage.lr_schedule)
            factors = [schedule.factor(Progress(n, stage.epochs, 0, 1)) for n in range(1, stage.epochs + 1)]
            assert all(0 <= factor <= 1 for factor in factors)
            late = stage.class_weights.switches if stage.class_weights else {}
            switches = (*stage.lr_schedule.drops, *stage.objective.switches.values(), *late.values())
            assert all(epoch < stage.epochs for epoch in switches)


def test_recipes_that_are_tried_have_every_part_of_every_recipe():
    """The slow contract tests take these; a recipe with a new part is one of them, see tests/recipes.py."""
    assert set().union(*map(PARTS.get, TRIED)) == set().union(*PARTS.values())
    assert {("objective", "ride"), ("flow", "h2t"), ("stage", "freeze"), ("steps", False)} <= set().union(
        *PARTS.values()
    )
    for part in ("piece", "way of training"):
        assert "new" in chosen({**PARTS, "new": {*PARTS["ce"], part}}, [])
    assert "again" not in chosen({**PARTS, "again": PARTS["ride"]}, sorted(QUICK))
    assert chosen({"a": {1, 2}, "b": {2}, "c": {3}, "d": {1, 2, 3}}, []) == ["d"]
    assert chosen({"a": {1, 2}, "b": {2}, "c": {3}, "d": {1, 2, 3}}, ["b"]) == ["b", "d"]


WITHOUT_PROBABILITIES = {("acsl", "acsl"), ("distribution_balanced", "train")}


def test_losses_of_a_question_per_class_give_no_probabilities():
    stages = [
        (method, stage) for method in available("method") for stage in composed(method, "digits_lt").method.stages
    ]
    found = {(m, s) for m, s in stages if not composed(m, "digits_lt").method.gives_probabilities(s)}
    assert found == WITHOUT_PROBABILITIES
    for words in ("objective.form=sigmoid", "objective.form=softmax"):
        method = composed("focal", "digits_lt", f"method.stages.train.{words}").method
        assert method.gives_probabilities("train") == ("softmax" in words)


NEED_PLAIN_SCORES = {"tau_norm", "logit_adjusted", "uno_ic"}
"""Parts that need a linear head, or scores that follow the training distribution, which RIDE has not."""
NEED_COSINES = {"gcl"}
"""Parts whose head goes on from cosines, which a linear head has not."""


@pytest.mark.parametrize("part", available("then"))
@pytest.mark.slow
def test_a_part_fits_a_recipe_or_is_refused_for_what_its_stage_lacks(part):
    found = {method: config_or_problems(method, part) for method in available("method")}
    fitting = {method: config.method for method, config in found.items() if not isinstance(config, list)}
    assert ("ce" in fitting) == (part not in NEED_COSINES)
    assert ("ride" in fitting) == (part not in NEED_PLAIN_SCORES)
    for method, recipe in fitting.items():
        assert recipe.finals == (part,) and recipe.name == f"{method}+{part}"
    for problems in (problems for problems in found.values() if isinstance(problems, list)):
        assert problems and all(part in problem or "aggregator" in problem for problem in problems), problems


def config_or_problems(method, part):
    try:
        return load_config([f"method={method}", f"then={part}"])
    except ValueError as refusal:
        return str(refusal).splitlines()[1:]


@pytest.mark.parametrize("method", available("method"))
def test_small_data_is_trained_in_minutes(method):
    for dataset in ("digits_lt", "fashion_mnist_lt"):
        config = composed(method, dataset)
        assert config.backbone.depth == 8 and all(stage.epochs <= 40 for stage in config.method.stages.values())


PUBLISHED_PARAMETERS = {
    ("ride", "imagenet_lt"): 42_889_024,
    ("ride", "inat18"): 76_587_584,
    ("tade", "imagenet_lt"): 42_889_024,
    ("tade", "inat18"): 76_587_584,
    ("tade", "places_lt"): 171_543_616,
    ("reslt", "imagenet_lt"): 37_624_104,
    ("bbn", "inat18"): 19_045_440 + 2 * 4_462_592 + 8142 * 4096 + 8142,
    # ResLT's ResNet-10 without its branches and head, the extra layer and LFME's head.
    ("lfme", "imagenet_lt"): 6_208_296 - 789_504 - 513_000 + 512 * 513 + 1000 * 513,
}


@pytest.mark.parametrize("pair", PUBLISHED_PARAMETERS, ids="-".join)
@pytest.mark.slow
def test_big_ensembles_have_the_published_number_of_parameters(pair, monkeypatch):
    @contextmanager
    def without_memory(*_):
        with torch.device("meta"):
            yield

    monkeypatch.setattr(ensembles, "keyed_draws", without_memory)
    config = composed(*pair)
    model = whole(config, config.method.final, config.dataset.num_classes)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED_PARAMETERS[pair]


def test_tade_on_places_learns_heads_at_a_hundredth_and_the_rest_at_a_thousandth():
    stage = composed("tade", "places_lt").method.stages["train"]
    rates = {part: stage.optimizer.lr * factor for part, factor in stage.lr_factors.model_dump().items()}
    assert {rates.pop("trunk"), rates.pop("features")} == {0.001}
    assert set(rates.values()) == {0.01}


def whole(config, stage, num_classes, names=None):
    """Build the ensemble of a stage, untrained."""
    ensemble = config.ensemble(stage, num_classes)
    return build_ensemble(replace(ensemble, expert_names=names or ensemble.expert_names), seed=1)


def export(folder, config, stage, dataset, model):
    """Write the folder of a served model, as a finished stage or run does."""
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=dataset.counts_C.tolist(),
        image_shape=dataset.raw_image_shape,
    )
    ensemble = replace(config.ensemble(stage, dataset.num_classes), expert_names=model.names)
    state = {name: value for name, value in model.state_dict().items() if part_of(name) not in TRAINING_ONLY}
    export_model(folder, state, ensemble, config.method.aggregator_in(stage), data)
    return str(folder)


@lru_cache
def digits(val_per_class):
    config = load_config(["method=lfme", "dataset=digits_lt", "dataset.image_size=16"]).dataset
    return open_dataset(config.model_copy(update={"val_per_class": val_per_class}))


SUM = [
    "method.stages.train.objective.terms.margins.name=ldam",
    "method.stages.train.class_weights.rule=effective_number",
]
LATE = ["method.stages.train.class_weights.after_epoch=1"]


class TestOnDigits:
    """Each stage of each recipe, in one process with the plain engine: two steps from the weights it begins with."""

    @pytest.mark.parametrize("method", available("method"))
    @pytest.mark.slow
    def test_two_steps_move_what_learns_and_nothing_else(self, method, tmp_path):
        words = ["dataset=digits_lt", "dataset.image_size=16", "engine.name=torch", "tracking.enabled=false"]
        config = load_config([f"method={method}", *words])
        dataset = digits(config.dataset.val_per_class)
        mesh = Mesh(mesh_shape(config.method.num_experts, 1))
        for stage, settings in config.method.stages.items():
            teachers = {}
            for name, teacher in settings.teachers.items():
                teachers[name] = str(tmp_path / f"{teacher.stage}.export")
                if teacher.run is not None:  # of another run; here an untrained one of the same make, twice as large
                    names = [f"teacher{i}" for i in range(2 * config.method.num_experts)]
                    model = whole(config, stage, dataset.num_classes, names)
                    teachers[name] = export(tmp_path / "teacher", config, stage, dataset, model)
            trainer = StageTrainer(config, stage, dataset, mesh, teachers)
            source = config.method.starts_from(stage)
            if source is not None:
                trainer.start_from(str(tmp_path / source.stage))
            if settings.epochs:
                self.check_two_steps(trainer)
            else:
                self.check_fit(trainer)
            self.check_scores(trainer)
            (tmp_path / stage).mkdir()
            trainer.save(str(tmp_path / stage))
            export(tmp_path / f"{stage}.export", config, stage, trainer.setup.dataset, trainer.setup.model)
            trainer.close()

    @pytest.mark.parametrize(
        "other",
        [
            ["method=ldam", "method.stages.train.objective.reweight_epoch=1"],
            ["method=ce", "method.head.name=cosine", "method.stages.train.objective.name=sum", *SUM, *LATE],
        ],
        ids=["ldam", "sum"],
    )
    def test_deferred_weights_train_as_ldams_own_bitwise(self, other):
        """Two epochs of a few images, weights in the second: the block of the stage, LDAM's key, a sum of one term."""
        words = ["dataset=digits_lt", "dataset.image_size=8", "dataset.max_per_class=30", "engine.name=torch"]
        words += ["tracking.enabled=false", "method.stages.train.epochs=2"]
        losses = []
        for recipe in (["method=ldam_drw", *LATE], other, ["method=ldam"]):
            config = load_config([*recipe, *words])
            dataset = open_dataset(config.dataset)
            trainer = StageTrainer(config, "train", dataset, Mesh(mesh_shape(1, 1)))
            per_epoch = trainer.setup.steps_per_epoch
            losses.append([trainer.train(epoch * per_epoch).losses for epoch in (1, 2)])
            trainer.close()
        assert losses[0] == losses[1]
        assert losses[0][0] == losses[2][0]
        assert losses[0][1] != losses[2][1]

    @pytest.mark.parametrize("method", ["gcl", "esql"])
    def test_draws_go_on_bitwise_in_the_middle_of_an_epoch(self, method, tmp_path):
        words = ["dataset=digits_lt", "dataset.image_size=8", "engine.name=torch", "tracking.enabled=false"]
        config = load_config([f"method={method}", *words, "method.stages.train.batch_size=16"])
        dataset, mesh = open_dataset(config.dataset), Mesh(mesh_shape(1, 1))
        whole = StageTrainer(config, "train", dataset, mesh)
        expected = whole.train(6).losses
        halves = [StageTrainer(config, "train", dataset, mesh) for _ in range(2)]
        found = halves[0].train(3).losses
        halves[0].save(str(tmp_path))
        halves[1].load(str(tmp_path), halves[0].state())
        assert found + halves[1].train(6).losses == expected
        for trainer in (whole, *halves):
            trainer.close()

    def check_fit(self, trainer):
        before = {name: value.clone() for name, value in trainer.setup.model.named_parameters()}
        trainer.fit()
        after = dict(trainer.setup.model.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())

    def check_two_steps(self, trainer):
        before = {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}
        trainer.prepare()
        # In the second epoch: in the first, BBN's second branch has the weight 0.
        trainer.done = trainer.setup.steps_per_epoch
        steps = min(2, trainer.setup.steps_per_epoch)
        found = trainer.train(trainer.done + steps)
        assert len(found.losses) == steps
        assert all(map(math.isfinite, [*found.losses, *found.terms.values()]))

        stage, learning = trainer.setup.stage, trainer.setup.learns
        parameters = dict(trainer.setup.model.named_parameters())
        # LFME has no trunk, and OLTR's auxiliary no parameters.
        assert {part_of(name) for name in parameters} >= learning - {"trunk", "auxiliaries"}
        for name, value in trainer.setup.model.state_dict().items():
            moves = part_of(name) in learning | {"momentum copies"}  # which follow
            if name not in parameters:  # BatchNorm's statistics
                moves = moves or stage.frozen_batchnorm == "train"
            elif part_of(name) == "auxiliaries" and not before[name].any():
                continue  # what begins at zero stays there until its loss begins, as RSG's does
            assert torch.equal(value, before[name]) != moves, name
        assert trainer.training.engine.momentum().keys() == {name for name in parameters if part_of(name) in learning}

    def check_scores(self, trainer):
        state, _ = trainer.evaluate("test")
        members = Scores.from_state(state).result(trainer.setup.dataset.counts_C.tolist(), None)["members"]
        assert set(trainer.setup.expert_names) < set(members)
        assert all(np.isfinite(member["nll"]) for member in members.values())
