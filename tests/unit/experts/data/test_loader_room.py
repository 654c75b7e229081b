"""Loader processes are refused where the machine has no room for them, and named what is missing."""

from __future__ import annotations

import resource
from functools import partial

import pytest
from PIL import Image

from experts.data import loader_room
from experts.data.dataset import open_dataset
from experts.data.loader_room import Room, missing_room, room_here, waiting_bytes
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer

MIB = 2**20
ENOUGH = Room((2**40, 2**40), (2**40, 2**40), (10**6, 10**6))


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (
            {"shared_memory": (64 * MIB, 16 * MIB)},
            "/dev/shm: 16.0 of 64.0 MiB are free; loader processes hand over up to",
        ),
        ({"shared_memory": None}, "/dev/shm: there is none"),
        ({"memory": (2**40, MIB)}, "memory: 1 MiB are free"),
        ({"open_files": (64, 4)}, "open files: 60 of 64 are open; loader processes need about 56 more"),
    ],
)
def test_what_is_missing_is_named_with_what_to_set(lacking, words):
    assert missing_room(3, [512], 64, ENOUGH) is None
    problem = missing_room(3, [512], 64, ENOUGH._replace(**lacking))
    assert problem is not None and words in problem and "dataset.loader_processes" in problem
    assert missing_room(0, [512], 64, ENOUGH._replace(**lacking)) is None


def test_room_is_needed_for_two_batches_of_each_process_and_one_in_use_by_every_worker():
    size = (2 * 3 + 1) * 512 * 3 * 64 * 64
    assert waiting_bytes(3, [512], 64) == size and waiting_bytes(0, [512], 64) == 0
    for workers in (1, 2):
        assert missing_room(3, [512], 64, ENOUGH._replace(shared_memory=(2**40, workers * size)), workers) is None
        assert missing_room(3, [512], 64, ENOUGH._replace(shared_memory=(2**40, workers * size - 1)), workers)


@pytest.mark.parametrize("version", [1, 2])
def test_the_lowest_limit_of_nested_groups_counts_and_files_in_memory_are_free(tmp_path, monkeypatch, version):
    """A group of 512 MiB with 500 used, 100 of them for files read; around it one of 600 MiB with 590 used."""
    process, outer = tmp_path / "proc", tmp_path / "groups" / "outer"
    names = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
             ("memory.max", "memory.current", "inactive_file"))[version - 1]  # fmt: skip
    for folder, numbers in ((outer, (600, 590, 0)), (outer / "inner", (512, 500, 100))):
        folder.mkdir(parents=True)
        for name, mib in zip(names[:2], numbers, strict=False):
            (folder / name).write_text(f"{mib * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {numbers[2] * MIB}\n")
    process.mkdir()
    kind = ("cgroup cgroup rw,memory", "cgroup2 cgroup rw")[version - 1]
    (process / "cgroup").write_text(("4:memory:/outer/inner\n", "0::/outer/inner\n")[version - 1])
    (process / "mountinfo").write_text(f"30 20 0:1 / {tmp_path / 'groups'} rw - {kind}\n")
    assert list(loader_room._group_memory(process)) == [(512 * MIB, 112 * MIB), (600 * MIB, 10 * MIB)]
    monkeypatch.setattr(loader_room, "_group_memory", partial(loader_room._group_memory, process))
    assert room_here().memory == (512 * MIB, 10 * MIB)


def test_the_limit_of_open_files_is_this_process_own():
    limit, free = room_here().open_files
    assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0] and 0 < free < limit


@pytest.mark.parametrize(
    ("room", "words"), [(2**20, ["run.evaluation_batch_size=1"]), (2**21, ["run.evaluation_batch_size=1000"])]
)
def test_a_stage_without_room_for_steps_or_scoring_ends_before_its_first_step(tmp_path, monkeypatch, room, words):
    """Three batches of a step are 3 * 4 * 3 * 171**2 bytes, a little above 1 MiB."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    small = ["dataset.image_size=171", "dataset.resident=never", "dataset.loader_processes=1", "engine.name=torch"]
    stage = ["method.stages.train.batch_size=4", "pace=cifar10_lt", "backbone=resnet8", f"dataset.root={tmp_path}"]
    config = load_config(["method=ce", "dataset=image_folder_lt", *small, *stage, *words])
    dataset = open_dataset(config.dataset)
    monkeypatch.setattr(loader_room, "room_here", lambda: ENOUGH._replace(shared_memory=(2**40, room)))
    with pytest.raises(ValueError, match=r"dataset.loader_processes = 1: /dev/shm: .* are free"):
        StageTrainer(config, "train", dataset, Mesh(MeshShape(1, 1)))
    monkeypatch.setattr(loader_room, "room_here", lambda: ENOUGH)
    StageTrainer(config, "train", dataset, Mesh(MeshShape(1, 1))).close()
