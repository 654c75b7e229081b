"""A queue trains every run, and a stage that several runs begin with once, whatever dies when."""

from __future__ import annotations

import random

import pytest

from orchestration.studies.run_queue import ENDED, FAILED, FINISHED, RUNNING, STOPPED, WAITING, RunQueue


def drawn_stages(draw: random.Random) -> dict[str, list[str]]:
    """Runs of one to three stages; a stage's digest includes those before it."""
    found = {}
    for run in range(draw.randint(1, 9)):
        path, stages = "", []
        for _ in range(draw.randint(1, 3)):
            path += draw.choice("ab")
            stages.append(path)
        found[f"r{run}"] = stages
    return found


def drawn_needs(draw: random.Random, runs: list[str]) -> dict[str, list[str]]:
    """Runs that some runs need, in an order that has nothing to do with theirs, so that none waits for itself."""
    order = draw.sample(runs, len(runs))
    return {run: draw.sample(order[:place], draw.randint(0, min(2, place))) for place, run in enumerate(order)}


@pytest.mark.parametrize("needing", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_run_ends_and_shared_stages_are_trained_once_unless_a_run_fails(seed, needing):
    draw = random.Random(seed)
    stages, lanes, deadly = drawn_stages(draw), draw.randint(1, 4), draw.random() < 0.5
    after = drawn_needs(draw, list(stages)) if needing else {}
    queue, trained, running = RunQueue(stages, deaths=2, after=after), [], {}
    for _ in range(500):
        for run, needed in queue.forsake():
            assert queue.status(run) == queue.status(needed) == FAILED and needed in after[run]
        while len(running) < lanes and (run := next(queue.able(), None)) is not None:
            have = {stage for donor in queue.donors(run) if queue.status(donor) == FINISHED for stage in stages[donor]}
            running[run] = [stage for stage in stages[run] if stage not in have]
            assert all(queue.status(needed) == FINISHED for needed in after.get(run, ()))
            queue.begin(run)
        busy = [stage for own in running.values() for stage in own]
        assert len(busy) == len(set(busy)), "two runs train one stage at once"
        assert running or queue.done, "nothing runs though runs wait"
        assert len(running) <= queue.ready()
        if queue.done:
            break
        run = draw.choice(sorted(running))
        new, fate = running.pop(run), draw.random() if deadly else 1.0
        if fate < 0.2:
            queue.end(run, FAILED)
        elif fate < 0.4:
            assert queue.lose(run, progress=0) == (queue.status(run) == WAITING)
        else:
            trained += new
            queue.end(run, FINISHED)
    assert queue.done and set(queue.with_status(*ENDED)) == set(stages)
    if not deadly:
        assert sorted(trained) == sorted({stage for own in stages.values() for stage in own})


def test_a_run_that_dies_is_tried_again_while_its_checkpoints_grow():
    queue = RunQueue({"a": ["x"]}, deaths=2)
    again = []
    for progress in (1, 2, 3, 3):
        assert next(queue.able(), None) == "a"
        queue.begin("a")
        again.append(queue.lose("a", progress))
    assert again == [True, True, True, False] and queue.status("a") == FAILED


def test_later_runs_overtake_those_that_wait_for_a_stage_and_a_failure_hands_it_on():
    queue = RunQueue({"crt": ["host", "crt"], "lws": ["host", "lws"], "other": ["x"]})
    order = [next(queue.able(), None)]
    queue.begin("crt")
    order.append(next(queue.able(), None))
    queue.begin("other")
    assert next(queue.able(), None) is None and queue.ready() == 2
    queue.end("crt", FAILED)
    assert [*order, next(queue.able(), None)] == ["crt", "other", "lws"] and queue.donors("lws") == ["crt"]


def test_a_stopped_queue_begins_nothing_and_finished_runs_stay():
    queue = RunQueue({"a": ["x"], "b": ["y"], "c": ["z"]}, {"a": FINISHED})
    queue.begin("b")
    queue.stop()
    assert (
        next(queue.able(), None) is None and queue.with_status(STOPPED) == ["c"] and queue.with_status(RUNNING) == ["b"]
    )
