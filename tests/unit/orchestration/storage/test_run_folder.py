"""What a run folder says of its run."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path


def test_the_run_folder_keeps_no_password(tmp_path, monkeypatch):
    from orchestration.config.compose import load_config
    from orchestration.storage.run_folder import RunFolder

    word = "tracking.uri=http://me:s3cret@host:5000"
    monkeypatch.setattr(sys, "argv", ["expertail", "train", word, "dataset=digits_lt"])
    folder = RunFolder(tmp_path)
    folder.write_config(load_config([word, "dataset=digits_lt"]))
    folder.record_start(folder.stored_config(), [], {})
    folder.close()
    assert folder.stored_config().tracking.uri == "http://host:5000"
    assert folder.read_run()["command"] == "expertail train tracking.uri=http://host:5000 dataset=digits_lt"
    assert not [path for path in tmp_path.iterdir() if "s3cret" in path.read_text()]


def test_what_a_published_result_keeps_of_a_run_names_no_host(tmp_path):
    from orchestration.config.compose import load_config
    from orchestration.storage.run_folder import RunFolder, origin

    with contextlib.closing(RunFolder(tmp_path)) as folder:
        folder.record_start(load_config([]), [], {})
        found = origin(folder.read_run())
    assert found.keys() == {"commit", "versions", "hardware"}
    assert found["hardware"].keys() == {"processor", "cpus", "memory_gib"}
    for results in (Path(__file__).parents[4] / "benchmarks" / "results").glob("*.json"):
        assert not {"host", "hostname", "node"} & json.loads(results.read_text()).keys(), results
