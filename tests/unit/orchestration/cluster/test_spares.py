"""Spare processes: one that fails is reported as soon as Ray knows, and is not counted on."""

from __future__ import annotations

import pytest
from ray.exceptions import RayActorError

from orchestration.cluster import spares as spares_module
from orchestration.cluster.spares import Spares


class Process:
    """A spare; its promise and its answers are its own name, or an error once it is dead."""

    def __init__(self, name):
        self.name, self.dead = name, False
        self.heartbeat = self

    def remote(self):
        return self


@pytest.fixture
def ray(monkeypatch):
    """Answers come at once; a dead process answers with Ray's error."""
    killed = []

    def get(process, timeout=None):
        if process.dead:
            raise RayActorError(error_msg="put in")
        return {"node_id": process.name}

    monkeypatch.setattr(spares_module.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(spares_module.ray, "get", get)
    monkeypatch.setattr(spares_module.ray, "kill", killed.append)
    monkeypatch.setattr(spares_module, "_LOOK_S", 0.0)
    return killed


@pytest.mark.parametrize("looks_before", [0, 2])
def test_a_spare_that_cannot_warm_up_or_dies_later_is_reported_once(ray, looks_before):
    said = []
    spares = Spares(said.append)
    one, other = Process("a"), Process("b")
    for process in (one, other):
        spares.add(process, process)
    for _ in range(looks_before):
        spares.look()
    one.dead = True
    spares.look()
    spares.look()
    (line,) = said
    assert line.startswith("a spare worker is lost (a worker died: ") and "put in" in line and "; 1 left " in line
    assert ray == [one]
    assert spares.take(["a", "b"], lambda unused: unused) == [other], "on another node, where there is none on its own"
    assert len(spares) == 0


def test_a_spare_of_the_same_node_is_taken_first_and_the_others_stay(ray):
    spares = Spares(print)
    one, other = Process("a"), Process("b")
    for process in (one, other):
        spares.add(process, process)
    assert spares.take(["b"], lambda unused: unused) == [other]
    assert len(spares) == 1
    spares.close()
    assert ray == [one] and len(spares) == 0
