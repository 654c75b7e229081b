"""Mistakes of operators with expert systems: one message each, before Ray is touched where the config decides.

Teachers, hosts of second stages, numbers of experts, weights, test distributions, groups without a class.
"""

from __future__ import annotations

import json
import math
import shutil

import pytest

from aggregation.serving import DESCRIPTION
from orchestration.cli import main
from orchestration.config.compose import load_config
from orchestration.runs import driver as driver_module
from orchestration.storage.exports import check_sources
from tests import runs
from tests.contract.test_recipes import digits, export, whole

pytestmark = pytest.mark.ray

SMALL = ["dataset=digits_lt", "dataset.image_size=16", "engine.threads=1", "tracking.enabled=false"]
TEACHER = "method.stages.train.teachers.teacher"


def refused(capsys, *words: str) -> str:
    """Return the message of a command that must be refused."""
    capsys.readouterr()
    assert main(list(words)) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert "expertail: " in said.err
    return said.err


def train_refused(capsys, folder, *words: str) -> str:
    return refused(capsys, "train", *SMALL, f"run.dir={folder}", *words)


def finished_run(folder, **changes):
    """Write the folder of a finished run of two experts with untrained networks.

    Args:
        changes: to model.json.
    """
    from orchestration.config.compose import load_config, to_yaml

    config = load_config(["method=ride", "method.num_experts=2", *SMALL])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    dataset = digits(0)
    served = folder / "export" / "last"
    export(served, config, "train", dataset, whole(config, "train", dataset.num_classes))
    description = json.loads((served / DESCRIPTION).read_text())
    (served / DESCRIPTION).write_text(json.dumps(description | changes))
    return folder


class TestBeforeRay:
    """The config or a folder that it names decides; Ray is neither started nor asked."""

    @pytest.fixture(autouse=True)
    def no_ray(self, monkeypatch):
        def touched(*_):
            raise AssertionError("Ray was touched")

        monkeypatch.setattr(driver_module, "cluster", touched)
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # so that the command starts none of its own ahead of time

    @pytest.mark.parametrize(
        ("words", "parts"),
        [
            (["method=tade", "method.num_experts=2"], ["objective 'tade'", "it takes 3", "method.num_experts=3"]),
            (["method=bbn", "method.num_experts=3"], ["objective 'bbn'", "it takes 2"]),
            (["method=ace", "method.num_experts=5"], ["objective 'ace'", "it takes 2 to 4"]),
            (["method=reslt", "method.num_experts=4"], ["objective 'reslt'", "it takes 3 or 2"]),
            (["method=lfme", "method.num_experts=2"], ["stages.student.objective 'lfme'", "it takes 1"]),
            (["method=ride_router", "method.num_experts=1"], ["flow 'router'", "2 experts or more"]),
            (["method=ride_router", "method.router=null"], ["method.router unset", "method.router.name=ride"]),
            (["method=ride_router", "method.stages.router.after=[]"], ["stages.router.start_from", "random weights"]),
            (["method=ride", "method.router.name=ride"], ["router: no stage trains it"]),
            (["method=ride", "method.aggregator.name=router"], ["aggregator = router: no router is trained by then"]),
            (["method=ride_h2t", "method.stages.h2t.partner_sampler=null"], ["flow 'h2t'", "partner_sampler"]),
            (["method=ride_h2t", "method.stages.h2t.after=[]"], ["stages.h2t.start_from", "random weights"]),
            (
                ["method=ride_h2t", "method.stages.h2t.freeze=[heads]"],
                ["stages.h2t.freeze", "nothing is left to learn"],
            ),
            (["method=ride_h2t", "method.stages.h2t.flow.ratio=1.5"], ["flow.ratio = 1.5", "needed 1 or less"]),
            (["method=dr_h2t", "method.head.name=bilateral"], ["flow 'h2t'", "head 'bilateral'"]),
            (["method=ride_h2t", "method.stages.h2t.lr_factors.trunk=0.1"], ["lr_factors.trunk", "does not learn"]),
            (
                [
                    "method=ride",
                    "method.aggregator={name: weighted, weights: {expert0: 0.5, expert1: 0.6, expert2: 0}}",
                ],
                ["method.aggregator.weights", "sum to 1.1", "needed 1"],
            ),
            (
                ["method=ride", "method.aggregator={name: weighted, weights: {expert0: 0.5, expert1: 0.5}}"],
                ["aggregator.weights", "expert0, expert1, expert2 and no other expert"],
            ),
            (["method=lfme", "method.stages.student.aggregator.expert=expert_few"], ["no such expert", "student"]),
            (["method=lfme", "dataset.val_per_class=0"], ["dataset.val_per_class = 0", "never takes the test set"]),
            (["method=lfme", "method.stages.few.classes.rule.rule=count"], ["objective.groups", "stages.few.classes"]),
            (["method=lfme", "method.stages.student.teachers.few.stage=rare"], ["teachers = rare", "an earlier stage"]),
            (["method=ride_distill", f"{TEACHER}.stage=train"], ["stage = train, run = ", "exactly one of them"]),
            (["method=ride_distill"], [f"{TEACHER}.run", "there is no run", "a finished run"]),
            (
                ["method=ride", "method.backbone_weights=none.safetensors"],
                ["method.backbone_weights", "import-weights"],
            ),
        ],
        ids=lambda value: " ".join(value)[:60] if isinstance(value, list) and "=" in value[0] else "",
    )
    def test_a_recipe_that_cannot_work_is_refused_by_key(self, words, parts, tmp_path, capsys):
        said = train_refused(capsys, tmp_path, *words)
        for part in parts:
            assert part in said, said
        assert not list(tmp_path.rglob("metrics.jsonl"))

    def refused_teacher(self, capsys, folder):
        said = train_refused(capsys, folder.parent, "method=ride_distill", f"{TEACHER}.run={folder}")
        assert f"{TEACHER}.run = {folder}" in said
        return said

    @pytest.mark.parametrize("status", ["running", "stopped", "failed"])
    def test_a_teacher_that_is_not_finished_is_refused(self, status, tmp_path, capsys):
        folder = finished_run(tmp_path / "teacher")
        (folder / "run.json").write_text(json.dumps({"status": status}))
        said = self.refused_teacher(capsys, folder)
        assert f"the run is {status}; needed a finished one" in said

    def test_a_teacher_without_its_model_or_with_a_damaged_one_is_refused(self, tmp_path, capsys):
        folder = finished_run(tmp_path / "teacher")
        (folder / "export" / "last" / DESCRIPTION).write_text("{")
        assert "not valid JSON" in self.refused_teacher(capsys, folder)
        shutil.rmtree(folder / "export")
        assert "it has no export/last" in self.refused_teacher(capsys, folder)
        (folder / "run.json").write_text("[1,")
        assert "run.json cannot be read" in self.refused_teacher(capsys, folder)

    def test_a_teacher_of_another_input_size_or_normalisation_is_refused(self, tmp_path, capsys):
        folder = finished_run(tmp_path / "teacher")
        path = folder / "export" / "last" / DESCRIPTION
        description = json.loads(path.read_text())
        for key, value, shown in (("image_size", 32, "32"), ("mean", [0.1, 0.2, 0.3], "(0.1, 0.2, 0.3)")):
            changed = {**description["preprocessing"], key: value}
            path.write_text(json.dumps(description | {"preprocessing": changed}))
            said = self.refused_teacher(capsys, folder)
            assert f"sees images with {key} = {shown}, this run has dataset.{key} = " in said

    def test_a_first_model_of_another_input_size_is_refused(self, tmp_path, capsys):
        folder = finished_run(tmp_path / "first")
        words = ["method=ride", f"method.stages.train.start_from.run={folder}", "dataset.image_size=24"]
        said = train_refused(capsys, tmp_path, *words)
        assert "method.stages.train.start_from.run" in said
        assert "image_size = 16" in said and "dataset.image_size = 24" in said

    @pytest.mark.parametrize("status", ["running", "stopped", "failed"])
    def test_a_first_model_of_an_unfinished_run_is_refused(self, status, tmp_path, capsys):
        folder = finished_run(tmp_path / "first")
        (folder / "run.json").write_text(json.dumps({"status": status}))
        said = train_refused(capsys, tmp_path, "method=ride", f"method.stages.train.start_from.run={folder}")
        assert f"method.stages.train.start_from.run = {folder}: the run is {status}; needed a finished one" in said

    def test_a_first_model_with_a_head_that_the_stage_does_not_continue_is_refused(self, tmp_path, capsys):
        """The run has cosine heads, the recipe a linear one; with new heads it passes to the next problem."""
        folder = finished_run(tmp_path / "first")
        words = ["method=ce", f"method.stages.train.start_from.run={folder}"]
        said = train_refused(capsys, tmp_path, *words)
        assert f"method.stages.train.start_from.run = {folder}: head 'linear' continues 'tau_normalised' only" in said
        assert "found 'cosine'; set reinit=[heads] for new weights" in said
        check_sources(load_config([*words, *SMALL, "method.stages.train.reinit=[heads]"]))

    @pytest.mark.parametrize("weights", ["0.5,0.6", "0.5,-0.5,1", "0.5,nan,0.5", "half"])
    def test_weights_that_are_no_shares_are_refused(self, weights, tmp_path, capsys):
        said = refused(capsys, "evaluate", str(tmp_path), f"--weights={weights}")
        assert f"--weights {weights}" in said
        assert "sum to 1" in said or "a number for each expert" in said


class TestOnceTheDataIsOpen:
    """The data decides: classes of a teacher, groups without a class."""

    def test_a_teacher_of_other_classes_is_refused(self, warm, tmp_path, capsys):
        folder = finished_run(tmp_path / "teacher", class_names=[f"animal {i}" for i in range(10)])
        said = train_refused(capsys, tmp_path, "method=ride_distill", f"{TEACHER}.run={folder}")
        assert f"teachers.teacher: {folder}/export/last was trained for other classes" in said
        assert "'animal 0' is not in dataset digits_lt" in said

    def test_a_first_model_of_other_classes_is_refused(self, warm, tmp_path, capsys):
        folder = finished_run(tmp_path / "first", class_names=[f"animal {i}" for i in range(10)])
        said = train_refused(capsys, tmp_path, "method=ride", f"method.stages.train.start_from.run={folder}")
        assert f"start_from: {folder}/export/last was trained for other classes" in said
        assert "'animal 0' is not in dataset digits_lt" in said

    def test_a_first_model_that_lacks_what_the_stage_needs_is_refused(self, warm, tmp_path, capsys):
        """Two experts, where the recipe has three."""
        folder = finished_run(tmp_path / "first")
        said = train_refused(capsys, tmp_path, "method=ride", f"method.stages.train.start_from.run={folder}")
        assert "stage train cannot begin with" in said
        assert "same backbone, head, expert names and number of classes" in said

    @pytest.mark.parametrize(
        "words",
        [
            ["method=ace"],
            ["method=reslt", "method.stages.train.objective.groups={rule: count, cuts: null}"],
            [
                "method=lfme",
                *(f"method.stages.{group}.classes.rule.rule=count" for group in ("many", "medium", "few")),
                "method.stages.student.objective.groups.rule=count",
            ],
        ],
        ids=lambda words: words[0],
    )
    def test_a_group_without_a_class_is_refused_with_a_way_out(self, words, warm, tmp_path, capsys):
        """120 to 60 images a class: none has fewer than 20."""
        said = train_refused(capsys, tmp_path, *words, "dataset.imbalance_ratio=2")
        assert "no class is few" in said
        assert "found 60 to 120 training images in 10 classes" in said
        assert "groups.rule = 'equal'" in said


@pytest.fixture(scope="module")
def finished(warm_pool, tmp_path_factory):
    """Train a run whose data has no few-shot class: 120 to 60 images each."""
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("finished") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, "method.stages.train.epochs=1", "dataset.imbalance_ratio=2") == 0
    return folder


class TestAfterwards:
    """Tables of a finished run, and later questions about it."""

    def test_an_empty_group_is_not_available_and_never_a_number(self, finished):
        text = (finished / "evaluation" / "last.json").read_text()
        assert "NaN" not in text
        for member in json.loads(text)["members"].values():
            assert member["top1"]["few"] is None
            assert math.isfinite(member["top1"]["all"])
        assert "nan" not in (finished / "metrics.jsonl").read_text().lower()

    def test_a_distribution_that_leaves_a_class_empty_is_refused(self, finished, capsys):
        said = refused(capsys, "evaluate", str(finished), "--distribution=backward-100")
        assert "--distribution backward-100: class 0 and 1 more would have no test image" in said
        assert "use a ratio of at most 50" in said

    def test_weights_of_another_number_of_experts_are_refused(self, finished, capsys):
        said = refused(capsys, "evaluate", str(finished), "--weights=0.5,0.5")
        assert "2 numbers; the run has 3 experts" in said

    def test_tables_of_other_distributions_have_no_nan(self, finished, capsys):
        assert main(["evaluate", str(finished), "--weights=0.2,0.3,0.5", "--distribution=backward-10"]) == 0
        said = capsys.readouterr().out
        assert "n/a" in said
        assert "nan" not in said.lower()
