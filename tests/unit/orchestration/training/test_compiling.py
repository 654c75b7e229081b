"""engine.compile: the same numbers to rounding, one code for all experts, whole batches alone, bitwise resume."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from aggregation.metrics import Scores
from orchestration.config.compose import load_config
from orchestration.config.identity import identity
from orchestration.results.run_table import run_table
from orchestration.training import compiling
from orchestration.training.exchange import NOBODY, Groups
from orchestration.training.mesh import Mesh, MeshShape
from orchestration.training.trainer import StageTrainer
from tests.recipes import WORDS, digits

SMALL = ["method=ride", *WORDS, "backbone.depth=8", "method.stages.train.batch_size=16"]
SMALL += ["run.evaluation_batch_size=64"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Keep the code of these tests away from the user's."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    yield
    torch._dynamo.reset()
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    if before is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def trainer(*words, mesh=None):
    config = load_config([*SMALL, *words])
    return StageTrainer(config, "train", digits(0), mesh or Mesh(MeshShape(3, 3)))


@pytest.mark.drill  # 40 s of compiling
@pytest.mark.filterwarnings("ignore")  # torch's compiler raises some itself, and hides them
def test_an_epoch_in_compiled_code(tmp_path):
    """The epoch ends with a batch that is not whole; it is saved before that, and resumed."""
    plain, compiled = trainer("engine.precision=float64"), trainer("engine.precision=float64", "engine.compile=true")
    steps = plain.setup.steps_per_epoch
    counters.clear()
    expected, first = plain.train(steps), compiled.train(steps - 1)
    assert counters["stats"]["unique_graphs"] == 2, "the trunk's and the experts'"
    (tmp_path / "half").mkdir()
    compiled.save(str(tmp_path / "half"))
    last = compiled.train(steps)
    assert counters["stats"]["unique_graphs"] == 2, "none for the last batch"
    assert not counters["graph_break"]
    assert [*first.losses, *last.losses] == pytest.approx(expected.losses, rel=1e-6)
    for name, value in plain.setup.model.state_dict().items():
        torch.testing.assert_close(compiled.setup.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    scores = {name: one.evaluate("test") for name, one in (("plain", plain), ("compiled", compiled))}
    assert counters["stats"]["unique_graphs"] == 4, "evaluation has two of its own, for whole batches"
    top1 = [Scores.from_state(states[0]).result([1] * 10, None)["members"] for states in scores.values()]
    assert [m["top1"] for m in top1[0].values()] == [m["top1"] for m in top1[1].values()]

    resumed = trainer("engine.precision=float64", "engine.compile=true")
    resumed.load(str(tmp_path / "half"), {"step": steps - 1, "sums": {}})
    assert resumed.train(steps).losses == last.losses
    weights = resumed.setup.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in compiled.setup.model.state_dict().items())


def whole(model):
    return [m for m in model.modules() if m._compiled_call_impl is not None]


def test_trunk_and_features_alone_are_compiled():
    model = trainer("engine.compile=true").setup.model
    assert whole(model) == [model.trunk, *(expert.features for expert in model.members())]
    assert not whole(trainer().setup.model)


@pytest.mark.parametrize("sync", [True, False])
def test_a_part_with_batchnorms_that_exchange_is_not(sync):
    class Other:
        size, rank, handle = 2, 0, None

    mesh = Mesh(MeshShape(3, 3, 2), groups=Groups(Other(), NOBODY.experts, Other()))
    compiled = trainer("engine.compile=true", f"engine.sync_batchnorm={str(sync).lower()}", mesh=mesh)
    assert bool(whole(compiled.setup.model)) != sync


@pytest.mark.parametrize("rows", [16, 32, 15, 0, 20])
def test_whole_batches_alone_run_in_compiled_code(rows, monkeypatch):
    """Batches of 16 in training, where flows may lay two of them under one another, and of 20 in evaluation.

    Every use tells that the worker is alive.
    """
    called, beats = [], []
    monkeypatch.setattr(torch, "compile", lambda plain, **_: lambda x: (called.append(len(x)), plain(x))[1])
    module = torch.nn.Linear(2, 2)
    module._compiled_call_impl = compiling._WholeBatches(module, 16, 20, lambda: beats.append(1))
    x = torch.zeros(rows, 2)
    with torch.no_grad():
        module(x)
    assert called == ([20] if rows == 20 else [])
    called.clear()
    assert torch.equal(module(x), module.bias.expand(rows, 2))
    assert called == ([rows] if rows in (16, 32) else [])
    assert beats == [1, 1]


@pytest.mark.parametrize("named", [None, default_cache_dir(), "/elsewhere"])
def test_code_lies_in_the_users_cache_unless_another_folder_is_named(named, monkeypatch, tmp_path):
    """Torch names its own default, which is not another."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    if named is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named)
    trainer("engine.compile=true")
    expected = named if named == "/elsewhere" else str(tmp_path / ".cache" / "expertail" / "compiled")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_a_home_that_cannot_be_written_is_no_hindrance(monkeypatch, tmp_path):
    (tmp_path / ".cache").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    trainer("engine.compile=true")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


def test_a_node_without_a_compiler_is_refused(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"engine\.compile = true: found no C\+\+ compiler .*engine\.compile=false"):
        trainer("engine.compile=true")


def test_it_is_part_of_a_runs_identity_and_its_table_names_it():
    compiled = load_config([*SMALL, "engine.compile=true"])
    assert identity(compiled) != identity(load_config(SMALL))
    assert run_table(compiled, {}, {}).splitlines()[0].endswith(", compiled")
