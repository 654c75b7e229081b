"""float32 is float32 on a GPU too, unless the config says tf32, and the same bits come if it says deterministic.

The switches are torch's; a CPU has them as well.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from aggregation.serving import TrainingData, export_model, load_model
from experts.data.dataset import open_dataset
from experts.ensemble import build_ensemble
from experts.precision import allow_tf32, exact_float32
from orchestration.config.compose import load_config
from orchestration.config.identity import identity
from orchestration.results.run_table import run_table
from orchestration.training import trainer as training
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.precision import memory_format_for, use_precision
from orchestration.training.step import TrainingStep
from orchestration.training.trainer import StageTrainer

SWITCHES = {"float32": False, "tf32": True, "float64": False, "autocast": False}


@pytest.fixture(autouse=True)
def switches(monkeypatch):
    """Leave torch's switches as they were."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def config_of(precision, *more):
    words = ["dataset.image_size=8", "engine.name=torch", "cluster.gpus_per_worker=1", f"engine.precision={precision}"]
    return load_config([*words, *more])


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
    take = TrainingStep.__call__
    monkeypatch.setattr(TrainingStep, "__call__", lambda step, batch, now: (look(), take(step, batch, now))[1])
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_gpu_alone_is_made_to_repeat_itself(deterministic, device):
    config = config_of("float32", f"engine.deterministic={str(deterministic).lower()}")
    torch.backends.cudnn.benchmark = True
    use_precision(config.engine, torch.device(device))
    expected = deterministic and device == "cuda"
    assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == expected
    assert not torch.backends.cudnn.benchmark, "it measures kernels and takes the fastest, another each time"
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if expected else None)
    use_precision(config_of("float32").engine, torch.device(device))
    assert not torch.are_deterministic_algorithms_enabled(), "the process serves another run"


def test_an_operators_workspace_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_precision(config_of("float32", "engine.deterministic=true").engine, torch.device("cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        (["cluster.gpus_per_worker=0"], "bitwise"),
        (["cluster.gpus_per_worker=1"], "to rounding"),
        (["cluster.gpus_per_worker=1", "engine.deterministic=true"], "bitwise"),
    ],
)
def test_a_run_says_how_exactly_it_resumes(words, resume):
    assert load_config(words).resume == resume


def test_repeatability_is_part_of_a_runs_identity_and_graphs_are_not():
    plain = identity(load_config([]))
    assert identity(load_config(["engine.deterministic=true"])) != plain
    assert identity(load_config(["engine.graphs=false"])) == plain
    assert load_config([]).engine.graphs == "auto"
    assert load_config(["engine.graphs=false"]).engine.graphs is False
    with pytest.raises(ValueError, match=r"engine\.graphs"):
        load_config(["engine.graphs=true"])


@pytest.mark.parametrize("precision", SWITCHES)
def test_channels_lie_side_by_side_where_that_is_faster(precision):
    if precision != "tf32":  # which a CPU has not
        on_cpu = load_config([f"engine.precision={precision}"]).engine
        found = memory_format_for(on_cpu, torch.device("cpu"))
        assert (found is torch.channels_last) == (precision != "float64")
    found = memory_format_for(config_of(precision).engine, torch.device("cuda"))
    assert (found is torch.channels_last) == (precision in ("tf32", "autocast"))


@pytest.mark.parametrize("asked", ["contiguous", "channels_last"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_memory_format_can_be_asked_for(asked, device):
    config = load_config([f"engine.memory_format={asked}"])
    wanted = torch.channels_last if asked == "channels_last" else torch.contiguous_format
    assert memory_format_for(config.engine, torch.device(device)) is wanted
    assert identity(config) != identity(load_config([]))
    assert asked.replace("_", " ") in run_table(config, {}, {}).splitlines()[0]


def test_weights_alone_decide_how_results_lie():
    """So images need no conversion."""
    convolution = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    found = convolution(torch.zeros(2, 3, 8, 8))
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_the_table_names_a_precision_other_than_float32():
    assert run_table(config_of("tf32"), {}, {}).splitlines()[0].endswith("digits_lt, tf32")
    assert run_table(config_of("float32"), {}, {}).splitlines()[0].endswith("digits_lt")
    repeatable = config_of("float32", "engine.deterministic=true")
    assert run_table(repeatable, {}, {}).splitlines()[0].endswith("digits_lt, deterministic")
