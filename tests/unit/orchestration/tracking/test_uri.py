"""The URIs that name a tracking store."""

from __future__ import annotations

import pytest

from orchestration.tracking.uri import check_uri, default_uri


def test_a_uri_that_is_no_store_is_refused_without_its_secret(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tracking\.uri = ftp://host/x: needed the URI of a tracking store"):
        check_uri("ftp://me:s3cret@host/x")
    monkeypatch.chdir(tmp_path)
    assert check_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert check_uri("http://h:5000") == "http://h:5000"
