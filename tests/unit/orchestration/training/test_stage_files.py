"""A checkpoint is what training was when the copy was taken, whatever it does while the files are written."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from experts.data.dataset import open_dataset
from orchestration.config.compose import load_config
from orchestration.storage.checkpoint import entry_of
from orchestration.storage.tensor_file import TensorFile
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.emulated_device import DEVICE, EmulatedDevice
from tests.recipes import AS_ON_A_GPU

WORDS = [
    "method=ride",
    "dataset=digits_lt",
    "dataset.image_size=16",
    "method.stages.train.batch_size=50",
    "engine.name=torch",
]


def trainer_on(device, *, steps):
    config = load_config([*WORDS, AS_ON_A_GPU])
    mesh = Mesh(mesh_shape(config.method.num_experts, 1), device=device)
    trainer = StageTrainer(config, "train", open_dataset(config.dataset), mesh)
    if steps:
        trainer.train(steps)
    return trainer


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("now", "later", "next")]
    for folder in made:
        folder.mkdir()
    return made


def test_steps_after_the_copy_do_not_reach_the_files(folders):
    now, later, following = folders
    trainer = trainer_on("cpu", steps=2)
    state = trainer.take_snapshot()
    said = json.dumps(state)
    trainer.save(str(now))  # at once, with a copy of its own
    trainer.train(4)
    entries = trainer.write_snapshot(str(later))
    assert files(later) == files(now)
    assert "trunk.momentum.safetensors" in files(now)
    assert json.dumps(state) == said and state["step"] == 2
    assert entries == [entry_of(entry.name, files(now)[entry.name]) for entry in entries]

    trainer.take_snapshot()
    trainer.write_snapshot(str(following))
    assert [name for name, data in files(following).items() if data == files(now)[name]] == []


def test_contents_for_another_node_are_the_files(folders):
    trainer = trainer_on("cpu", steps=1)
    trainer.take_snapshot()
    written = trainer.write_snapshot(str(folders[0]))
    assert trainer.snapshot.contents() == (written, files(folders[0]))


def test_the_memory_of_a_copy_is_used_again():
    trainer = trainer_on("cpu", steps=1)
    trainer.take_snapshot()
    places = {name: file._bytes.data_ptr() for name, file in trainer.snapshot._files.items()}
    trainer.train(2)
    trainer.take_snapshot()
    assert {name: file._bytes.data_ptr() for name, file in trainer.snapshot._files.items()} == places


def test_a_copy_before_the_first_step_has_no_momentum(folders):
    trainer = trainer_on("cpu", steps=0)
    trainer.take_snapshot()
    trainer.write_snapshot(str(folders[0]))
    assert files(folders[0]) and not any("momentum" in name for name in files(folders[0]))


def test_the_host_waits_for_no_single_tensor_of_a_device(folders):
    """All copies are asked for at once; a GPU is waited for after that, once."""
    with EmulatedDevice() as seen:
        trainer = trainer_on(DEVICE, steps=2)
        seen.waits.clear()
        trainer.take_snapshot()
        assert seen.waits == {}
        trainer.write_snapshot(str(folders[0]))
    calm = trainer_on("cpu", steps=2)
    calm.save(str(folders[1]))
    assert files(folders[0]) == files(folders[1])


TENSORS = {
    "weight": torch.arange(12.0).reshape(3, 4),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "half": torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 5),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
}


def test_a_tensor_file_has_the_librarys_bytes_each_time_it_is_filled():
    file = TensorFile(TENSORS)
    for factor in (1, 3):
        tensors = {name: (t * factor).to(t.dtype) for name, t in TENSORS.items()}
        assert file.fits(tensors)
        file.fill(tensors)
        assert bytes(file.data()) == save({name: t.contiguous() for name, t in tensors.items()})
        assert all(torch.equal(t, tensors[name]) for name, t in load(bytes(file.data())).items())


@pytest.mark.parametrize(
    "other",
    [
        {"weight": torch.zeros(4, 3)},
        {"weight": torch.zeros(3, 4, dtype=torch.float64)},
        {"bias": torch.zeros(3, 4)},
        {},
    ],
    ids=["shape", "type", "name", "none"],
)
def test_tensors_of_another_layout_do_not_fit(other):
    assert not TensorFile({"weight": torch.ones(3, 4)}).fits(other)
