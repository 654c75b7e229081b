"""float32 is float32 on a GPU too, unless the config says tf32. The switches are torch's; a CPU has them as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aggregation.serving import TrainingData, export_model, load_model
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from experts.precision import allow_tf32, exact_float32
from orchestration.config.compose import load_config
from orchestration.results.run_table import run_table
from orchestration.training import trainer as training
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer

SWITCHES = {"float32": False, "tf32": True, "float64": False, "autocast": False}


@pytest.fixture(autouse=True)
def switches():
    """Leave torch's switches as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def config_of(precision):
    words = ["dataset.image_size=8", "engine.name=torch", "cluster.gpus_per_worker=1", f"engine.precision={precision}"]
    return load_config(words)


@pytest.mark.parametrize("what", ["train", "evaluate", "prepare", "fit"])
@pytest.mark.parametrize(("precision", "allowed"), SWITCHES.items())
def test_a_worker_computes_in_the_precision_of_its_run(precision, allowed, what, monkeypatch):
    config = config_of(precision)
    trainer = StageTrainer(config, "train", open_dataset(config.dataset), Mesh(mesh_shape(3, 1)))
    seen = []

    def look(*_):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))

    monkeypatch.setattr(training.evaluation, "evaluate", look)
    monkeypatch.setattr(training.evaluation, "prepare_objective", look)
    monkeypatch.setattr(training.fitting, "fit", look)
    trainer._step = lambda batch, now: (look(), (0.1, {"loss": 1.0}))[1]
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = not allowed, True
    getattr(trainer, what)(*{"train": (1,), "evaluate": ("test",)}.get(what, ()))
    assert seen == [(allowed, False)]
    trainer.close()


def test_a_block_of_exact_float32_ends_as_it_began():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    with exact_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32


def test_a_served_model_answers_in_float32_whatever_its_program_does(tmp_path, monkeypatch):
    config = config_of("float32")
    dataset = open_dataset(config.dataset)
    ensemble = config.ensemble("train", dataset.num_classes)
    data = TrainingData(
        dataset=config.dataset,
        class_names=dataset.class_names,
        counts=dataset.counts_C.tolist(),
        image_shape=dataset.raw_image_shape,
    )
    export_model(
        tmp_path / "m", build_ensemble(ensemble, seed=0).state_dict(), ensemble, config.method.aggregator, data
    )
    model, seen = load_model(tmp_path / "m"), []
    computed = model.outputs
    monkeypatch.setattr(model, "outputs", lambda x: (seen.append(torch.backends.cudnn.allow_tf32), computed(x))[1])
    allow_tf32(True)
    model.predict(np.zeros((2, 8, 8), np.uint8))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_the_table_names_a_precision_other_than_float32():
    assert run_table(config_of("tf32"), {}, {}).splitlines()[0].endswith("digits_lt, tf32")
    assert run_table(config_of("float32"), {}, {}).splitlines()[0].endswith("digits_lt")
