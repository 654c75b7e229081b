"""The stacks of a process that hangs."""

from __future__ import annotations

from orchestration.cluster.hangs import own_stacks


def test_stacks_name_every_thread_and_the_line_it_is_at():
    found = own_stacks()
    assert found.count("thread MainThread:") == 1
    assert "test_stacks_name_every_thread_and_the_line_it_is_at" in found
