"""Nodes that cannot be reached are found and named."""

from __future__ import annotations

import socket
import time

import psutil
import pytest

from orchestration.cluster import reachability
from orchestration.cluster.reachability import disconnected_pair, listen, unreachable_from_here


def test_listeners_are_reached_until_they_are_closed(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    sockets = {name: listen("127.0.0.1", gpu=False) for name in ("a", "b")}
    listeners = {name: found.getsockname() for name, found in sockets.items()}
    assert unreachable_from_here(listeners) == []
    sockets["a"].close()
    assert unreachable_from_here(listeners) == ["a"]
    sockets["b"].close()
    assert unreachable_from_here(listeners) == ["a", "b"]
    assert unreachable_from_here({}) == []


def test_a_listener_that_swallows_packets_is_unreachable_in_time(monkeypatch):
    """A full queue of connections: nothing refuses and nothing accepts."""
    monkeypatch.setattr(reachability, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        begun = time.monotonic()
        assert unreachable_from_here(dict.fromkeys("abc", full.getsockname()[:2])) == ["a", "b", "c"]
        assert 0.2 <= time.monotonic() - begun < 2


@pytest.mark.parametrize(("gpu", "name"), [(False, "GLOO_SOCKET_IFNAME"), (True, "NCCL_SOCKET_IFNAME")])
@pytest.mark.parametrize("form", ["{}", "={}"])
def test_a_listener_is_on_the_network_that_exchanges_use(gpu, name, form, monkeypatch):
    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)
    )
    monkeypatch.setenv(name, form.format(loopback))
    with listen("192.0.2.1", gpu=gpu) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("unreachable", "expected"),
    [
        ({}, None),
        ({"a": [], "b": []}, None),
        ({"a": ["b"], "b": ["a"]}, ("a", "b")),
        ({"b": ["a"]}, ("a", "b")),  # one direction is enough
        ({"c": ["b"]}, ("b", "c")),
        ({"a": ["c", "b"]}, ("a", "b")),  # the first pair in the order of ranks
        ({"c": ["a"], "b": ["c"]}, ("a", "c")),
    ],
)
def test_the_first_two_nodes_that_do_not_reach_each_other_are_named(unreachable, expected):
    nodes = ["a", "a", "b", "c"]
    assert disconnected_pair(nodes, [unreachable.get(node, []) for node in nodes]) == expected
