"""The network and the address at which workers meet."""

from __future__ import annotations

import os

import psutil
import pytest

from orchestration.training.world import Rendezvous, use_network_of


def test_gloo_uses_the_network_of_the_nodes_address(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    use_network_of("192.0.2.1")  # nobody's
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_network_of("127.0.0.1")
    loopback = os.environ["GLOO_SOCKET_IFNAME"]
    assert any(found.address == "127.0.0.1" for found in psutil.net_if_addrs()[loopback])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    use_network_of("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"


def test_a_world_is_opened_at_one_address_alone():
    meeting = Rendezvous("127.0.0.1", 1, host_here=True)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening if c.laddr.port == meeting.port} == {"127.0.0.1"}
    with pytest.raises(ValueError, match=r"at 192\.0\.2\.1: no port can be opened there .* --node-ip-address"):
        Rendezvous("192.0.2.1", 1, host_here=True)
