"""Parts with their own learning rates: every placement equals the control run, and a resumed run an unbroken one.

ZeRO keeps a flat buffer per rate, padded for its workers, so both splitting and joining are tested.
"""

from __future__ import annotations

import numpy as np
import pytest

from experts.data.dataset import open_dataset
from orchestration.cluster.fleet import Fleet
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests.e2e.test_placement import save
from tests.recipes import saved_tensors

pytestmark = pytest.mark.ray

STEPS = 6
RATES = {"trunk": 0.1, "features": 0.5, "heads": 2.0}
WORDS = [
    "method=ace",  # whose experts have rates of their own besides
    "dataset.image_size=8",
    "method.stages.train.batch_size=50",
    *(f"method.stages.train.lr_factors.{part}={factor}" for part, factor in RATES.items()),
    "engine.threads=1",
    "engine.precision=float64",
    "cluster.cpus_per_worker=0.1",
]
REPLICAS = ["cluster.workers=2", "cluster.experts_per_worker=3"]


def train(words, folder, *stops):
    """Train to the last stop; at every stop, save and go on from there in a new fleet."""
    config = load_config([*WORDS, *words])
    shape = mesh_shape(config.method.num_experts, config.cluster.workers, config.cluster.experts_per_worker)
    losses, before = [], None
    for stop in stops:
        fleet = Fleet(config, shape)
        try:
            fleet.start()
            fleet.build("train")
            if before is not None:
                fleet.call("load", *before)
            losses += fleet.call("train", stop)[0].losses
            saved = folder / str(stop)
            saved.mkdir(parents=True)
            before = str(saved), save(fleet, saved)
        finally:
            fleet.close()
    return np.array(losses), saved_tensors(saved)


@pytest.fixture(scope="module")
def control(tmp_path_factory):
    """Train the control run: one process, plain PyTorch."""
    config = load_config([*WORDS, "engine.name=torch"])
    trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(3, 1)))
    losses, folder = trainer.train(STEPS).losses, tmp_path_factory.mktemp("control")
    trainer.save(str(folder))
    return np.array(losses), saved_tensors(folder)


@pytest.mark.parametrize(
    "words",
    [["cluster.workers=3"], REPLICAS, [*REPLICAS, "engine.zero_stage=2"]],
    ids=["spread", "2 replicas", "2 replicas, ZeRO 2"],
)
def test_every_placement_learns_at_the_same_rates(words, control, warm, tmp_path):
    losses, tensors = train(words, tmp_path, STEPS)
    expected, expected_tensors = control
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-9)
    assert tensors.keys() == expected_tensors.keys()
    for key, values in expected_tensors.items():
        np.testing.assert_allclose(tensors[key], values, rtol=0, atol=1e-9, err_msg=key)


def test_a_run_that_is_resumed_goes_on_bitwise(warm, tmp_path):
    whole, tensors = train(REPLICAS, tmp_path / "whole", STEPS)
    parts, again = train(REPLICAS, tmp_path / "parts", 2, STEPS)
    assert parts.tolist() == whole.tolist()
    assert all(np.array_equal(again[key], values) for key, values in tensors.items())
    assert any(".momentum:" in key for key in tensors)
