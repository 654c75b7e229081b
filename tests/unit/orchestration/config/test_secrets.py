"""No password leaves the config."""

from __future__ import annotations

import pytest

from orchestration.config.messages import say, show
from orchestration.config.secrets import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:s3cret@host:5000/a@b", "https://host:5000/a@b"),
        ("error at http://token@h/ and http://x:y@z", "error at http://h/ and http://z"),
        ("postgresql://h/db?user=u&password=p%40q&sslkey=k", "postgresql://h/db?user=u&password=***&sslkey=***"),
        ("postgresql+psycopg2://me:a/b?c#d@h:5432/db", "postgresql+psycopg2://h:5432/db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("http://h/#/experiments/1/runs?viewStateShareKey=ab1", "http://h/#/experiments/1/runs?viewStateShareKey=ab1"),
    ],
)
def test_secrets_are_taken_out_of_uris(text, expected):
    assert redact(text) == expected


def test_what_is_printed_has_no_password(capsys):
    say("method=ce tracking.uri=http://me:s3cret@host: 1 problem")
    show("run  tracking.uri=http://me:s3cret@host")
    said = capsys.readouterr()
    assert said.err == "expertail: method=ce tracking.uri=http://host: 1 problem\n"
    assert said.out == "run  tracking.uri=http://host\n"
