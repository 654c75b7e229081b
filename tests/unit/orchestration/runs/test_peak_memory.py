"""The most memory that workers held is told at the end of a stage: of the process, and of its GPU if it has one."""

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


class Workers:
    def __init__(self, gpu):
        self.answers = {"peak_memory_gib": [1.234, 1.5], "gpu_peak_memory_gib": gpu}

    def call(self, name):
        return self.answers[name]


@pytest.mark.parametrize("gpu", [[None, None], [2.0, 3.456]])
def test_it_is_in_run_json_on_the_console_and_in_mlflow(gpu, tmp_path):
    text = io.StringIO()
    with contextlib.closing(RunFolder(tmp_path)) as folder:
        run = Run(load_config([]), folder, Console(stream=text), StopSignals(), {})
        StageRun(run, "train", Workers(gpu), run.console)._note_memory()
        found = folder.read_run()
    assert found["peak_memory_gib"] == [1.23, 1.5]
    assert found.get("gpu_peak_memory_gib") == (None if None in gpu else [2.0, 3.46])
    told = "peak memory of a worker 1.50 GiB, of its GPU 3.46 GiB"
    assert (told in text.getvalue()) == (None not in gpu)
    assert tags(found, {}, {})["peak_memory_gib"] == "1.5"
    assert tags(found, {}, {}).get("gpu_peak_memory_gib") == (None if None in gpu else "3.46")
