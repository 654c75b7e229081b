"""Which nodes answer, and which of two that do not reach each other is left out."""

from __future__ import annotations

import socket
import time

import pytest

from orchestration.cluster import reachability as links
from orchestration.cluster.reachability import answering, cut_off, open_door


def test_doors_answer_until_they_are_closed(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    doors = [open_door("127.0.0.1", gpu=False) for _ in range(2)]
    places = [door.getsockname() for door in doors]
    assert answering(places) == [True, True]
    doors[0].close()
    assert answering(places) == [False, True]
    doors[1].close()
    assert answering([]) == []


def test_a_place_that_swallows_packets_does_not_answer_in_time(monkeypatch):
    """A full queue of connections: nobody refuses, nobody accepts."""
    monkeypatch.setattr(links, "_KNOCK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        begun = time.monotonic()
        assert answering([full.getsockname()[:2]] * 3) == [False] * 3
        assert 0.2 <= time.monotonic() - begun < 2


def test_a_door_is_on_the_network_that_exchanges_use(monkeypatch):
    import psutil

    loopback = next(
        name for name, found in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in found)
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", loopback)
    with open_door("192.0.2.1", gpu=False) as door:
        assert door.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("silent", "expected"),
    [
        ({}, None),
        ({"a": [], "b": []}, None),
        ({"a": ["b"], "b": ["a"]}, ("a", "b")),
        ({"b": ["a"]}, ("a", "b")),  # one way suffices
        ({"c": ["b"]}, ("b", "c")),
        ({"a": ["b", "c"]}, ("b", "a")),  # without a, the others reach one another
        ({"c": ["a"], "b": ["c"]}, ("a", "c")),
    ],
)
def test_the_node_with_most_cuts_is_left_out_and_of_equals_the_last(silent, expected):
    nodes = ["a", "a", "b", "c"]
    assert cut_off(nodes, [silent.get(node, []) for node in nodes]) == expected
