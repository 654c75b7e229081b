"""The network and the address at which workers meet."""

from __future__ import annotations

import os

import psutil
import pytest

from orchestration.training.world import Rendezvous, use_network_of

NAMES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def names(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored, even if it was not set
        monkeypatch.delenv(name)


def test_exchanges_use_the_network_of_the_nodes_address():
    use_network_of("192.0.2.1")  # nobody's
    assert not any(name in os.environ for name in NAMES)
    use_network_of("127.0.0.1")
    loopback = os.environ["GLOO_SOCKET_IFNAME"]
    assert any(found.address == "127.0.0.1" for found in psutil.net_if_addrs()[loopback])
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={loopback}", "that one, not all that begin so"


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_was_named_stays(name, monkeypatch):
    monkeypatch.setenv(name, "chosen")
    use_network_of("127.0.0.1")
    other = next(n for n in NAMES if n != name)
    assert os.environ[name] == "chosen"
    assert os.environ[other] != "chosen"


def test_a_world_is_opened_at_one_address_alone():
    meeting = Rendezvous("127.0.0.1", 1, host_here=True)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == meeting.port} == {"127.0.0.1"}
    with pytest.raises(ValueError, match=r"at 192\.0\.2\.1: no port can be opened there .* --node-ip-address"):
        Rendezvous("192.0.2.1", 1, host_here=True)
