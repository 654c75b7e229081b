"""The Ray that a run starts for itself, on a machine where others may run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest

START = """
import json, os, time
import psutil, ray
from orchestration.cluster.local_ray import start_local_ray
start_local_ray()
[node] = ray.nodes()
processes = psutil.Process().children(recursive=True)
print(json.dumps({
    "agent": ray._private.worker._global_node.dashboard_agent_listen_port,
    "listening": sorted({c.laddr.port for p in processes for c in p.net_connections() if c.status == "LISTEN"}),
    "with_us": [p.pid for p in processes if os.getpgid(p.pid) == os.getpgrp()],
}))
"""


@pytest.mark.drill
@pytest.mark.xdist_group("ray")
def test_it_opens_no_port_that_another_ray_may_hold_and_leaves_our_process_group():
    with contextlib.ExitStack() as held:
        for port in (52365, 44217):
            other = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # another Ray has it: as good
                other.bind(("0.0.0.0", port))
                other.listen()
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["agent"] in found["listening"]
    assert not {52365, 44217} & set(found["listening"])
    assert not found["with_us"]
