"""The cluster that a run is carried out on is the one that was meant."""

from __future__ import annotations

import pytest

from orchestration.cluster import connection

FIRST, SECOND = "10.0.0.1:6379", "10.0.0.1:6380"


@pytest.mark.parametrize(
    ("running", "started", "expected"),
    [
        (set(), None, "auto"),  # Ray says that there is none
        ({FIRST}, None, FIRST),
        ({FIRST}, SECOND, FIRST),  # what `ray start` started last has ended
        ({FIRST, SECOND}, SECOND, SECOND),
        ({FIRST, SECOND}, "127.0.0.1:6380", "127.0.0.1:6380"),
    ],
)
def test_auto_is_the_only_ray_of_this_host_or_that_of_ray_start(monkeypatch, capsys, running, started, expected):
    monkeypatch.setattr(connection, "rays_of_this_host", lambda: (running, started))
    assert connection._one_of_this_host() == expected
    assert (f"2 Rays run on this host; taken is {expected}" in capsys.readouterr().err) == (len(running) == 2)


@pytest.mark.parametrize("started", [None, "10.0.0.1:7777"])
def test_auto_is_refused_where_it_would_be_any_of_several(monkeypatch, started):
    """Two runs without a cluster have a Ray each; a third that says auto would train on one of them."""
    monkeypatch.setattr(connection, "rays_of_this_host", lambda: ({FIRST, SECOND}, started))
    with pytest.raises(ValueError, match=rf"2 Rays run on this host \({FIRST}, {SECOND}\).*set cluster.address"):
        connection.start_ray("auto")
