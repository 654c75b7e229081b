"""The URIs that name a tracking store."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
from sqlalchemy.engine import make_url

from orchestration.tracking.uri import artifact_folder, check_uri, default_uri, sqlite_path


def test_a_uri_that_is_no_store_is_refused_without_its_secret(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tracking\.uri = ftp://host/x: needed the URI of a tracking store"):
        check_uri("ftp://me:s3cret@host/x")
    monkeypatch.chdir(tmp_path)
    assert check_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert check_uri("http://h:5000") == "http://h:5000"


@pytest.mark.parametrize("name", ["a?b", "50%25 done", "100%", "a#b", "~", "c,d", "1.10", "caf\udce9", "a%3Fb"])
def test_a_path_reaches_the_database_as_it_is(tmp_path, name):
    uri = default_uri(tmp_path / name)
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")  # of the library that opens it
    assert sqlite_path(uri) == tmp_path / name / "mlflow.db"
    assert check_uri(uri) == uri
    assert artifact_folder(uri, Path("elsewhere")) == (tmp_path / name / "mlartifacts").as_uri()


@pytest.mark.parametrize("name", ["a?b", "50% done", "a%3Fb"])
def test_mlflow_makes_no_folder_beside_that_of_a_database(tmp_path, name):
    (tmp_path / name / "runs").mkdir(parents=True)
    uri = default_uri(tmp_path / name / "runs")
    create_sqlalchemy_engine_with_retry(uri).dispose()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert uri == f"sqlite:///{tmp_path}/{name.replace('%', '%25').replace('?', '%3F')}%2Fruns%2Fmlflow.db"


def test_what_follows_a_question_mark_stays_a_setting_of_the_database(tmp_path):
    uri = f"sqlite:///{tmp_path}/x.db?timeout=30"
    assert check_uri(uri) == uri
    assert sqlite_path(uri) == tmp_path / "x.db"
