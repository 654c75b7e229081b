"""Every mistake of an operator gives one message that names it, exit code 1 and no traceback, and loses nothing."""

from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import runs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def stopped(warm_pool, tmp_path_factory):
    """Stop a run after 5 steps; tests copy and damage it."""
    from _pytest.monkeypatch import MonkeyPatch

    from tests.conftest import lend

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with MonkeyPatch.context() as patch:
        lend(warm_pool, patch)
        assert runs.train(folder, "run.max_steps=5") == 0
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    return folder


def refused(capsys, folder, *words: str) -> str:
    """Return the message of a run that must be refused."""
    capsys.readouterr()
    assert runs.train(folder, *words) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert "expertail: " in said.err
    return said.err


def test_all_problems_of_a_command_come_in_one_message_and_make_no_folder(warm, tmp_path, capsys):
    said = refused(capsys, tmp_path / "run", "method.num_expert=3", "engine.zero_stage=7", "seed=x", "cluster.worker=2")
    for part in (
        "did you mean method.num_experts?",
        "engine.zero_stage = 7",
        "seed = x",
        "did you mean cluster.workers?",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["cluster.workers=2"], ["cluster.workers = 2", "num_experts = 3", "3, 6, 9"]),
        (["cluster.workers=4"], ["cluster.workers = 4", "num_experts = 3"]),
        (["cluster.workers=2", "cluster.experts_per_worker=2"], ["experts_per_worker = 2", "1 or 3"]),
        (["method.num_experts=0"], ["method.num_experts = 0"]),
        (["method.num_experts=9"], ["method.num_experts = 9"]),
        (["method.head.scale=16"], ["objective.scale = 30", "head.scale = 16"]),
        (["run.select_on=val"], ["run.select_on = val", "dataset.val_per_class"]),
        (
            ["dataset.imbalance_ratio=1000", "dataset.max_per_class=120"],
            ["class 7", "dataset.imbalance_ratio = 1000", "at least 1"],
        ),
        (["dataset.max_per_class=5000"], ["5000", "dataset.max_per_class"]),
        (["dataset=fashion_mnist_lt"], ["dataset.root", "dataset.download"]),
        (["dataset=cifar10_lt", "dataset.root=/nowhere"], ["dataset.root = /nowhere", "dataset.download"]),
        (["schedule=ride_digits_lt"], ["there are no schedules any more", "method=ride dataset=digits_lt", "pace="]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and "=" in value[0] else "",
)
def test_a_config_that_cannot_work_is_refused_by_key(words, parts, warm, tmp_path, capsys):
    said = refused(capsys, tmp_path / "run", *words)
    for part in parts:
        assert part in said, said


def test_a_changed_config_is_refused_with_a_difference(copy, warm, capsys):
    before = {p.name: p.read_bytes() for p in copy.glob("*.jsonl")}
    said = refused(capsys, copy, "method.stages.train.optimizer.lr=0.2", "dataset.imbalance_ratio=10")
    assert "method.stages.train.optimizer.lr: 0.1 -> 0.2" in said
    assert "dataset.imbalance_ratio: 20.0 -> 10.0" in said
    assert {p.name: p.read_bytes() for p in copy.glob("*.jsonl")} == before


def test_a_flipped_byte_is_named_and_an_older_checkpoint_taken(copy, warm, capsys):
    newest = sorted((copy / "checkpoints").glob("[0-9]*"))[-1]
    flip(newest / "expert1.safetensors")
    assert runs.train(copy, "run.max_steps=9") == 0
    said = capsys.readouterr().err
    assert "expert1.safetensors" in said
    assert "step 4 of 27" in said
    assert sorted(runs.losses(copy)) == list(range(1, 10))


def test_when_no_checkpoint_is_whole_the_run_is_refused_and_left_alone(copy, warm, capsys):
    for folder in (copy / "checkpoints").glob("[0-9]*"):
        flip(folder / "trunk.safetensors")
    before = (copy / "metrics.jsonl").read_bytes()
    said = refused(capsys, copy)
    assert "no checkpoint of stage train is whole" in said
    assert "trunk.safetensors" in said
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_an_unreadable_run_folder_is_named(copy, warm, capsys, tmp_path):
    (copy / "config.yaml").write_text("a: [1,\n")
    assert "config.yaml" in refused(capsys, copy)
    (tmp_path / "file").write_text("")
    assert "the run folder cannot be written" in refused(capsys, tmp_path / "file" / "run")


def test_a_run_that_is_being_carried_out_is_refused_to_a_second(copy, warm, capsys):
    from orchestration.storage.run_folder import RunFolder

    held = RunFolder(copy)
    try:
        assert "already being carried out" in refused(capsys, copy)
    finally:
        held.close()


def test_a_loss_that_is_not_finite_stops_every_worker_and_names_the_expert(warm, tmp_path, capsys):
    folder = tmp_path / "run"
    said = refused(capsys, folder, "method.stages.train.optimizer.lr=1e30", "cluster.workers=3")
    assert "not finite" in said
    assert "expert" in said
    assert "epoch 1, step" in said
    assert all(np.isfinite(list(runs.losses(folder).values())))
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"


def test_a_placement_that_cannot_be_met_fails_within_ten_seconds(local_ray, tmp_path, capsys):
    import time

    tracked = ["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9"]
    start = time.monotonic()
    said = refused(capsys, tmp_path / "run", "cluster.workers=3", "cluster.cpus_per_worker=64", *tracked)
    assert "wanted 3 x (64 CPUs" in said
    assert "the cluster has places for 0" in said
    said = refused(capsys, tmp_path / "run", "cluster.gpus_per_worker=1", "cluster.cpus_per_worker=0.1")
    assert "1 GPUs" in said
    assert time.monotonic() - start < 10


class TestFolderOfImages:
    """A class-per-folder tree of small JPEGs, damaged in one way at a time."""

    WORDS = ("dataset=image_folder_lt", "pace=digits_lt", "dataset.imbalance_ratio=null")

    @pytest.fixture
    def tree(self, tmp_path):
        rng = np.random.default_rng(0)
        for split, count in (("train", 6), ("test", 2)):
            for name in ("ant", "bee", "cat"):
                folder = tmp_path / "images" / split / name
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.jpg")
        return tmp_path / "images"

    def words(self, tree):
        return [*self.WORDS, f"dataset.root={tree}", "dataset.max_per_class=null", "dataset.index_groups=null"]

    def test_it_trains_when_whole(self, tree, warm, tmp_path, capsys):
        assert runs.train(tmp_path / "run", *self.words(tree), "run.max_steps=1") == 0
        assert "n/a" in capsys.readouterr().out, "no class has 20 images or more: those groups are empty"

    def test_a_truncated_jpeg_is_named(self, tree, warm, tmp_path, capsys):
        path = tree / "train" / "bee" / "3.jpg"
        path.write_bytes(path.read_bytes()[:300])
        assert str(path) in refused(capsys, tmp_path / "run", *self.words(tree))

    def test_an_empty_class_is_named(self, tree, warm, tmp_path, capsys):
        for path in (tree / "train" / "bee").iterdir():
            path.unlink()
        assert "bee" in refused(capsys, tmp_path / "run", *self.words(tree))

    def test_no_image_at_all_is_said(self, tree, warm, tmp_path, capsys):
        shutil.rmtree(tree)
        tree.mkdir()
        assert str(tree) in refused(capsys, tmp_path / "run", *self.words(tree))


def test_a_truncated_gz_and_a_label_out_of_range_are_named(warm, tmp_path, capsys):
    root = tmp_path / "fashion"
    root.mkdir()
    images = np.zeros((20, 28, 28), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part in ("train", "t10k"):
        write_idx(root / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(root / f"{part}-labels-idx1-ubyte.gz", labels)
    words = ["dataset=fashion_mnist_lt", f"dataset.root={root}", "dataset.max_per_class=2", "dataset.imbalance_ratio=1"]
    path = root / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert str(path) in refused(capsys, tmp_path / "run", *words)
    path.write_bytes(whole)
    write_idx(root / "t10k-labels-idx1-ubyte.gz", labels + 5)
    said = refused(capsys, tmp_path / "run", *words)
    assert "t10k-labels-idx1-ubyte" in said
    assert "label" in said


def test_a_list_with_a_bad_label_is_named_with_its_line(warm, tmp_path, capsys):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "train.txt").write_text("a.png 0\na.png 1\na.png seven\n")
    (tmp_path / "test.txt").write_text("a.png 0\n")
    said = refused(
        capsys,
        tmp_path / "run",
        "dataset=image_list",
        "pace=digits_lt",
        f"dataset.root={tmp_path}",
        f"dataset.train_list={tmp_path}/train.txt",
        f"dataset.test_list={tmp_path}/test.txt",
    )
    assert "train.txt:3" in said or "line 3" in said


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def test_a_start_that_was_refused_for_its_data_does_not_bind_the_next(warm, tmp_path, capsys):
    folder = tmp_path / "run"
    assert "5000" in refused(capsys, folder, "dataset.max_per_class=5000")
    assert runs.train(folder, "dataset.max_per_class=60", "run.max_steps=1") == 0


def test_damaged_weights_of_the_best_evaluation_are_found_before_training_goes_on(warm, tmp_path, capsys):
    folder = tmp_path / "run"
    assert runs.train(folder, "run.max_steps=14") == 0
    best = next((folder / "checkpoints").glob("best-*"))
    flip(best / "expert0.safetensors")
    before = runs.losses(folder)
    said = refused(capsys, folder)
    assert f"{best.name}/expert0.safetensors" in said
    assert "restore them" in said
    assert runs.losses(folder) == before


@pytest.mark.drill
def test_a_loss_that_is_not_finite_names_the_expert_also_with_replicas(warm, tmp_path, capsys):
    words = ["method.stages.train.optimizer.lr=1e30", "cluster.workers=2", "cluster.experts_per_worker=3"]
    assert "logits of expert" in refused(capsys, tmp_path / "run", *words)


def test_a_tracking_server_that_is_not_there_costs_a_message(warm, tmp_path, capsys):
    words = ["tracking.enabled=true", "tracking.uri=http://127.0.0.1:9", "tracking.final_wait_s=1", "run.max_steps=2"]
    assert runs.train(tmp_path / "run", *words) == 0
    said = capsys.readouterr()
    assert "ensemble" in said.out
    assert "expertail sync" in said.err
