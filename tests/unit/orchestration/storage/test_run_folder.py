"""What a run folder says of its run."""

from __future__ import annotations

import sys


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
