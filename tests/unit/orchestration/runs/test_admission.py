"""What is refused before anything starts, and what a run that passes carries with it."""

from __future__ import annotations

import pytest

from orchestration.config.compose import load_config
from orchestration.runs import admission
from orchestration.runs.admission import admit
from orchestration.training.mesh import MeshShape

LFME = ["method=lfme", "cluster.cpus_per_worker=0.5"]
NODE = {"CPU": 2.0}


def test_a_run_folder_that_would_vanish_is_refused(monkeypatch):
    admitted = admit(load_config([*LFME, "run.dir=runs"]))
    assert admitted.on({"a": NODE}).config.run.dir == "runs"
    with pytest.raises(ValueError, match=r"run.dir = runs: relative, and the cluster has 2 nodes.*set run.dir=/"):
        admitted.on({"a": NODE, "b": NODE})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match=r"run.dir = runs: relative, and a submitted job .* vanishes"):
        admit(load_config([*LFME, "run.dir=runs"]))
    admit(load_config([*LFME, "run.dir=/shared/runs"])).on({"a": NODE, "b": NODE})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=ride", "cluster.workers=2"], r"cluster.workers = 2 does not fit method.num_experts = 3"),
        (["method=ride_h2t", "method.stages.h2t.start_from.stage=null", "method.stages.h2t.start_from.run=/none"],
         r"method.stages.h2t.start_from.run = /none: there is no run"),
        (["run.dir=nonsense://host/runs"], r"run.dir = nonsense://host/runs"),
    ],
)  # fmt: skip
def test_each_refusal_names_its_key(words, message):
    with pytest.raises(ValueError, match=message):
        admit(load_config(words))


def test_every_check_is_made_once_and_the_mesh_is_carried(monkeypatch):
    made = []
    for name in ("shape_of", "check_sources", "check_run_dir"):
        check = getattr(admission, name)
        monkeypatch.setattr(admission, name, lambda *args, name=name, check=check: made.append(name) or check(*args))
    admitted = admit(load_config(["method=ride", "cluster.workers=3", "run.dir=/runs"]))
    assert made == ["shape_of", "check_sources", "check_run_dir"]
    assert admitted.shape == MeshShape(3, 1)


def test_a_run_keeps_the_threads_of_its_first_start_unless_the_config_says_how_many():
    nodes = {"a": {"CPU": 8.0}}
    words = ["method=ce", "cluster.cpus_per_worker=4"]
    assert admit(load_config(words)).on(nodes).config.engine.threads == 4
    assert admit(load_config(words)).on(nodes, threads=2).config.engine.threads == 2
    assert admit(load_config([*words, "engine.threads=3"])).on(nodes, threads=2).config.engine.threads == 3


def test_cpus_are_shared_among_all_stages_that_train_side_by_side(monkeypatch):
    asked = []
    monkeypatch.setattr(
        admission, "resolve_resources", lambda cluster, engine, workers: asked.append(workers) or (1, 1)
    )
    admit(load_config(["method=lfme"])).on({"a": NODE})
    assert asked == [3]
