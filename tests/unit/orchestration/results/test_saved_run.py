"""A saved run measured again gives the numbers that training gave."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from aggregation.metrics import Scores, groups_by_count, groups_by_index
from experts.data.dataset import open_dataset
from orchestration.commands.evaluate import reevaluate
from orchestration.config.compose import load_config
from orchestration.results.saved_run import _open_split
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.exports import export_finals
from orchestration.storage.run_folder import RunFolder
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

WORDS = [
    "engine.name=torch", "engine.threads=1", "dataset.image_size=8", "dataset.val_per_class=3", "run.select_on=val",
    "run.evaluation_batch_size=100", "method.stages.train.optimizer.lr=0.01",
]  # fmt: skip
STEPS = 3


def train(path, *words):
    """Make a run folder as training leaves it, with a few steps taken in this process."""
    config = load_config([*WORDS, *words])
    dataset = open_dataset(config.dataset)
    trainer = StageTrainer(config, "train", dataset, Mesh(mesh_shape(config.method.num_experts, 1)))
    trainer.train(STEPS)
    counts, cuts = dataset.counts_C.tolist(), config.dataset.index_groups
    evaluations = {}
    for split in ("val", "test"):
        scores = Scores.from_state(trainer.evaluate(split)[0]).result(counts, list(cuts))
        when = {"split": split, "selected_on": "val", "stage": "train", "epoch": 1, "step": STEPS}
        evaluations[split] = {**when, **scores}
    folder = RunFolder(path)
    folder.write_config(config)
    folder.record_start(config, [], {})
    plain = [
        {name: ids.tolist() for name, ids in groups.items()}
        for groups in (groups_by_count(counts), groups_by_index(counts, cuts))
    ]
    folder.write_data({
        "dataset": config.dataset.name, "class_names": list(dataset.class_names), "counts": counts,
        "total": sum(counts), "digest": dataset.digest, "image_shape": dataset.raw_image_shape,
        "groups": {"by_count": plain[0], "by_index": plain[1]},
    })  # fmt: skip
    checkpoints = Checkpoints(path, ["train"])
    writing = checkpoints.begin()
    entries = trainer.save(str(writing))
    state = {"stage": "train", **trainer.state(), "best": None, "last": None}
    saved = checkpoints.complete(writing, checkpoints.name("train", STEPS), entries, state)
    for name in ("last", "best"):
        folder.write_evaluation(name, evaluations["test"])
    export_finals(config, folder, "train", saved)
    folder.update_run(status="finished")
    folder.close()
    trainer.close()
    return evaluations


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    return path, train(path)


@pytest.fixture
def copy(trained, tmp_path):
    """The run in a folder that a test may damage, as training left it."""
    return shutil.copytree(trained[0], tmp_path / "tiny", ignore=shutil.ignore_patterns("again-*"))


def again(path, weights="best", split="test"):
    return json.loads((path / "evaluation" / f"again-{weights}-{split}.json").read_text())


@pytest.mark.parametrize(("weights", "split"), [("best", "test"), ("last", "val")])
def test_the_numbers_are_those_of_training(weights, split, trained):
    path, evaluations = trained
    before = (path / "evaluation" / f"{weights}.json").read_text()
    text = reevaluate(str(path), weights, split, [])
    found, expected = again(path, weights, split), evaluations[split]
    assert found["num_images"] == expected["num_images"] == (500 if split == "test" else 30)
    assert (found["split"], found["step"], found["weights"]) == (split, STEPS, weights)
    assert found["members"].keys() == expected["members"].keys() == {"ensemble", "expert0", "expert1", "expert2"}
    for member, values in expected["members"].items():
        assert found["members"][member]["top1"] == values["top1"]
        assert found["members"][member]["per_class"] == values["per_class"]
        assert found["members"][member]["nll"] == pytest.approx(values["nll"], abs=1e-5)
    assert (path / "evaluation" / f"{weights}.json").read_text() == before
    assert f"{100 * expected['members']['ensemble']['top1']['all']:.2f}" in text
    assert f"measured on {split}" in text and f"again-{weights}-{split}.json" in text


@pytest.mark.parametrize("precision", ["float64", "autocast"])
@pytest.mark.slow
def test_the_precision_is_that_of_the_run(precision, tmp_path):
    evaluations = train(tmp_path / "run", f"engine.precision={precision}")
    reevaluate(str(tmp_path / "run"), "last", "test", [])
    found = again(tmp_path / "run", "last")
    for member, values in evaluations["test"]["members"].items():
        assert found["members"][member]["top1"] == values["top1"]
        assert found["members"][member]["nll"] == pytest.approx(values["nll"], abs=1e-5)


def test_the_table_says_how_best_was_chosen_only_where_that_is_true(trained):
    path, _ = trained
    assert "test was not used" in reevaluate(str(path), "best", "test", [])
    assert "was not used" not in reevaluate(str(path), "best", "val", [])


def test_how_the_data_is_read_may_differ(copy):
    words = ["run.evaluation_batch_size=7", "dataset.resident=always", "dataset.root=/some where"]
    reevaluate(str(copy), "best", "test", words)
    assert again(copy)["num_images"] == 500


@pytest.mark.parametrize("word", ["seed=1", "method=ce", "dataset.image_size=16", "engine.threads=2", "run.name=x"])
def test_keys_that_made_the_model_may_not_differ(word, copy):
    with pytest.raises(ValueError, match="cannot be changed for a trained run") as error:
        reevaluate(str(copy), "best", "test", ["dataset.root=/x", word])
    assert str(error.value).startswith(word) and "dataset.root" in str(error.value)


def test_a_wrong_value_is_refused(copy):
    with pytest.raises(ValueError, match=r"run\.evaluation_batch_size = 0: needed 1 or more, or 'auto'"):
        reevaluate(str(copy), "best", "test", ["run.evaluation_batch_size=0"])


def test_other_data_is_refused_with_both_digests(copy):
    data = json.loads((copy / "data.json").read_text())
    found, data["digest"] = data["digest"], "f" * 64
    (copy / "data.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"found digest {found[:12]} .*needed ffffffffffff") as error:
        reevaluate(str(copy), "best", "test", [])
    assert "dataset.root" in str(error.value)
    assert not (copy / "evaluation" / "again-best-test.json").exists()


def test_a_run_without_a_model_is_refused_with_the_command_that_continues_it(copy):
    shutil.rmtree(copy / "export")
    run = json.loads((copy / "run.json").read_text()) | {"status": "failed", "command": "expertail train seed=0"}
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=r"no model yet, the run is failed; .*expertail train seed=0$"):
        reevaluate(str(copy), "best", "test", [])


def test_a_missing_run_is_refused_with_its_nearest_neighbour(copy):
    with pytest.raises(ValueError, match=r"nothing there; .*did you mean .*tiny\?"):
        reevaluate(str(copy.parent / "tinny"), "best", "test", [])
    with pytest.raises(ValueError, match=r"a folder without config\.yaml"):
        reevaluate(str(copy.parent), "best", "test", [])
    with pytest.raises(ValueError, match="found a file"):
        reevaluate(str(copy / "run.json"), "best", "test", [])


@pytest.mark.parametrize("name", ["config.yaml", "data.json", "export/best/model.json"])
def test_a_damaged_file_is_named(name, copy):
    (copy / name).write_text("{ not: [this")
    with pytest.raises(ValueError, match=name):
        reevaluate(str(copy), "best", "test", [])


def test_a_flipped_byte_of_the_model_is_found(copy):
    path = copy / "export" / "best" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged"):
        reevaluate(str(copy), "best", "test", [])


def test_a_run_without_a_validation_set_has_no_val(tmp_path):
    path = tmp_path / "run"
    train(path)
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("val_per_class: 3", "val_per_class: 0"))
    config = load_config([*WORDS, "dataset.val_per_class=0", "run.select_on=auto"])
    data = json.loads((path / "data.json").read_text()) | {"digest": open_dataset(config.dataset).digest}
    (path / "data.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="no validation set; use --split test"):
        reevaluate(str(path), "best", "val", [])


def test_a_result_that_cannot_be_written_is_still_shown(copy, monkeypatch):
    def refuse(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orchestration.results.saved_run.write_json", refuse)
    text = reevaluate(str(copy), "best", "test", [])
    assert "ensemble" in text
    assert text.endswith("again-best-test.json cannot be written (Permission denied)")


def test_files_replaced_under_the_same_names_are_not_measured(tmp_path, capsys):
    """By content where the run had decoded them, else by size; other times alone are said."""
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / "0.png")
    config = load_config(["method=ce", "dataset=image_folder_lt", f"dataset.root={tmp_path}", "dataset.resident=never"])
    streamed = open_dataset(config.dataset)
    resident = open_dataset(config.dataset.model_copy(update={"resident": "always"}))
    runs = [{"digest": found.digest, "files": found.fingerprints()} for found in (resident, streamed)]
    for data in runs:
        _open_split(tmp_path, config, data, "test")
    path = tmp_path / "test" / "bee" / "0.png"
    os.utime(path, (0, 0))
    for data in runs:
        _open_split(tmp_path, config, data, "test")
    assert capsys.readouterr().err.count("other times than when the run began") == 1
    shutil.copy(tmp_path / "test" / "ant" / "0.png", path)
    with pytest.raises(ValueError, match=r"this is not the data of the run: test images .* hold other data"):
        _open_split(tmp_path, config, runs[0], "test")
    _open_split(tmp_path, config, runs[0], "test", files_known=True)  # read at this start already, so not once more
    path.write_bytes(path.read_bytes() + b"0")
    with pytest.raises(ValueError, match=r"test images of the same names have other sizes"):
        _open_split(tmp_path, config, runs[1], "test")
    _open_split(tmp_path, config, {"digest": resident.digest}, "test")  # a run of an older version knows nothing
