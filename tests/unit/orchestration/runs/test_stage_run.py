"""Refusals of a stage before its first step, and the memory that is told at its end."""

from __future__ import annotations

import contextlib
import io

import pytest

from orchestration.config.compose import load_config
from orchestration.runs.console import Console
from orchestration.runs.run import Run
from orchestration.runs.stage_run import StageRun
from orchestration.runs.stopping import StopSignals
from orchestration.storage.run_folder import RunFolder
from orchestration.tracking.contents import tags


class FakeFleet:
    """Two workers on two nodes that have looked at the data."""

    hosts = ({"node": "10.0.0.1"}, {"node": "10.0.0.2"})
    left_out = ()

    def __init__(self, *digests):
        self.digests = digests

    def build(self, stage, teachers):
        seen = {"class_names": list("0123456789"), "counts": [9] * 10, "image_shape": [1, 16, 16], "has_val": False} | {
            "remarks": [],
            "files": {},
        }
        return [seen | {"digest": digest, "steps_per_epoch": 3, "prepares": False} for digest in self.digests]


def begin(folder, digests, tracked):
    with contextlib.closing(RunFolder(folder)) as held:
        config = load_config(["method=ce", "dataset.root=/data"])
        run = Run(config, held, Console(stream=None), StopSignals(), {}, lambda: tracked.append(1))
        with run.journal:
            StageRun(run, "train", FakeFleet(*digests), run.console).prepare()


def test_workers_that_see_other_files_are_refused_and_named_with_their_nodes(tmp_path):
    tracked = []
    with pytest.raises(ValueError, match="see other files there") as refused:
        begin(tmp_path / "run", ["a" * 64, "b" * 64], tracked)
    text = str(refused.value)
    assert text.startswith("dataset.root = /data: worker 0 on 10.0.0.1 and worker 1 on 10.0.0.2 ")
    assert f"digests {'a' * 12} and {'b' * 12}" in text
    assert not tracked and not (tmp_path / "run" / "data.json").exists(), "a refused start leaves no trace"


def test_workers_that_see_the_same_files_begin(tmp_path):
    tracked = []
    begin(tmp_path / "run", ["a" * 64, "a" * 64], tracked)
    assert tracked and (tmp_path / "run" / "data.json").exists()


class Workers:
    """Two workers that have held memory."""

    def __init__(self, gpu):
        self.answers = {"peak_memory_gib": [1.234, 1.5], "gpu_peak_memory_gib": gpu}

    def call(self, name):
        return self.answers[name]


@pytest.mark.parametrize("gpu", [[None, None], [2.0, 3.456]])
def test_it_is_in_run_json_on_the_console_and_in_mlflow(gpu, tmp_path):
    text = io.StringIO()
    with contextlib.closing(RunFolder(tmp_path)) as folder:
        run = Run(load_config([]), folder, Console(stream=text), StopSignals(), {})
        StageRun(run, "train", Workers(gpu), run.console).note_memory()
        found = folder.read_run()
    assert found["peak_memory_gib"] == [1.23, 1.5]
    assert found.get("gpu_peak_memory_gib") == (None if None in gpu else [2.0, 3.46])
    told = "peak memory of a worker 1.50 GiB, of its GPU 3.46 GiB"
    assert (told in text.getvalue()) == (None not in gpu)
    assert tags(found, {}, {})["peak_memory_gib"] == "1.5"
    assert tags(found, {}, {}).get("gpu_peak_memory_gib") == (None if None in gpu else "3.46")
