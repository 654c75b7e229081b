"""How a run continues after losses, and how it ends: with fakes that record the calls they get, and no Ray."""

from __future__ import annotations

import io
import json
import signal
from types import SimpleNamespace

import pytest

from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.placement import NoRoom
from orchestration.cluster.preemption import Preempted, PreemptionNotice
from orchestration.config.compose import load_config
from orchestration.runs import driver as driver_module
from orchestration.runs import supervisor as supervisor_module
from orchestration.runs.console import Console
from orchestration.runs.driver import Driver
from orchestration.runs.kept_predictions import predictions_missing
from orchestration.runs.run import Run
from orchestration.runs.stopping import GivenUp, Outcome, Stopped, StopSignals
from orchestration.runs.waiting import Waiting
from orchestration.storage.checkpoint import write_file
from orchestration.storage.run_folder import RunFolder
from orchestration.training.mesh import MeshShape

LFME = ["method=lfme", "cluster.cpus_per_worker=0.5", "cluster.placement_timeout_s=0.01", "cluster.max_failures=2"]


class FakeFleet:
    """One worker that starts at once.

    Args:
        events: records the calls.
        name: of the fleet, in events.
        rooms: raised by each question for room in turn, None for a place.
    """

    def __init__(self, events, name="main", rooms=()):
        self.events, self.name, self.rooms = events, name, list(rooms)
        self.shape, self.workers, self.hosts = MeshShape(1, 1), [], [{"pid": name}]
        self.unreachable, self.disconnected, self.leaving = [], [], set()

    def reserve(self):
        pass

    def start(self):
        self.events.append(f"start {self.name}")
        self.workers = ["worker"]

    def replace_lost(self):
        self.events.append(f"replace lost {self.name}")

    def keep_spares(self):
        pass

    def call(self, method, *args):
        return [True]

    def move(self):
        self.events.append(f"move {self.name}")
        self.check_room()

    def kill(self):
        self.workers = []

    def close(self):
        self.events.append(f"close {self.name}")

    def unreachable_nodes(self):
        if not self.unreachable:
            return []
        self.events.append("unreachable")
        return self.unreachable.pop(0)

    def crowded_nodes(self):
        return ["node a is crowded"]

    def leaving_nodes(self):
        return self.leaving

    def disconnected_nodes(self):
        assert self.workers, "asked workers that were ended"
        self.events.append("connected?")
        return self.disconnected.pop(0) if self.disconnected else None

    def check_room(self):
        self.events.append("room?")
        problem = self.rooms.pop(0) if self.rooms else None
        if problem is not None:
            raise problem


@pytest.fixture
def events():
    return []


@pytest.fixture
def make_run(tmp_path, events, monkeypatch):
    """A run whose stages do what `acts` says: a list by stage, one act for every time the stage is begun."""
    folders = []

    def make(acts, rooms=(), words=LFME, shown=None):
        class FakeStage:
            def __init__(self, run, stage, fleet, console, *, before=0, pause=None):
                self.stage, self.step, self.prepared = stage, 0, False

            def prepare(self):
                self.prepared = True

            def carry_out(self):
                assert self.prepared
                events.append(f"train {self.stage}")
                act = acts[self.stage].pop(0)
                if isinstance(act, BaseException):
                    raise act
                if callable(act):
                    act()
                return Outcome(self.stage, True, 1, tmp_path)

            def note_memory(self):
                pass

        monkeypatch.setattr(supervisor_module, "keep_predictions", lambda trained: None)
        monkeypatch.setattr(supervisor_module, "_ASK_AGAIN_S", 0.01)
        monkeypatch.setattr(supervisor_module, "StageRun", FakeStage)
        monkeypatch.setattr(driver_module, "Fleet", lambda config, shape, look: FakeFleet(events, "further"))
        folders.append(RunFolder(tmp_path / str(len(folders))))
        main = FakeFleet(events, rooms=rooms)
        return Driver(Run(load_config(words), folders[-1], Console(stream=shown), StopSignals(), {}), main)

    yield make
    for folder in folders:
        folder.close()


def at(monkeypatch, driver, steps):
    """The newest checkpoint of every stage, one for every time it is looked for."""
    found = iter(steps)

    def newest(stage, report):
        step = next(found)
        return None if step is None else SimpleNamespace(state={"step": step, "total_steps": 100}, folder=None)

    monkeypatch.setattr(driver.run.checkpoints, "newest", newest)


def supervise(driver, stage="many"):
    return supervisor_module.Supervisor(driver.run, driver.fleet, driver.run.console, stage).carry_out()


RESTARTED = ["replace lost main", "connected?", "train many"]
"""After a first death: the place of the dead worker is filled, and workers must reach each other."""


def deaths(count):
    return [WorkerLost("a worker died") for _ in range(count)]


def test_failures_without_a_new_checkpoint_end_the_run_at_the_limit(make_run, monkeypatch, events):
    driver = make_run({"many": [*deaths(3), None]})
    at(monkeypatch, driver, [None, None, None])
    with pytest.raises(WorkerLost, match=r"3 failures, .* no new checkpoint of stage many"):
        supervise(driver)
    begun = [e for e in events if e.endswith("main")]
    assert begun == ["start main", "replace lost main", "start main"], "survivors are kept after the first loss only"
    assert driver.run.folder.read_run()["failures"] == 2


def test_a_new_checkpoint_refills_the_failures_that_are_allowed(make_run, monkeypatch, events):
    """Limit 2. Seven deaths, at steps 0 0 4 4 8 8 8: the third at step 8 is the first that is one too many."""
    driver = make_run({"many": [*deaths(7), None]})
    at(monkeypatch, driver, [None, None, 4, 4, 8, 8, 8])
    with pytest.raises(WorkerLost, match="3 failures"):
        supervise(driver)
    assert events.count("train many") == 7

    driver = make_run({"many": [*deaths(6), None]})
    at(monkeypatch, driver, [None, None, 4, 4, 8, 8])
    assert supervise(driver).finished
    assert driver.run.folder.read_run()["failures"] == 6


def test_a_restart_waits_for_a_lost_node(make_run, events):
    missing = NoRoom("cluster.workers = 1: places for 0")
    driver = make_run({"many": [*deaths(1), None]}, rooms=[missing, missing, None])
    assert supervise(driver).finished
    assert events == ["start main", "train many", "room?", "room?", "room?", *RESTARTED]


def test_a_node_that_does_not_come_back_ends_the_run(make_run, events):
    missing = NoRoom("cluster.workers = 1: places for 0")
    driver = make_run({"many": deaths(1)}, rooms=[missing] * 1000)
    with pytest.raises(ValueError, match="places for 0"):
        supervise(driver)
    assert events.count("room?") > 2


def test_a_restart_waits_until_ray_knows_of_a_dead_node(make_run, events):
    """One failure: no worker is started on a node that does not answer."""
    driver = make_run({"many": [*deaths(1), None]})
    driver.fleet.unreachable = [["node b"], ["node b"]]
    assert supervise(driver).finished
    assert events == ["start main", "train many", "unreachable", "unreachable", "room?", *RESTARTED]
    assert driver.run.folder.read_run()["failures"] == 1


def test_a_network_that_is_mended_in_time_costs_a_wait(make_run, events):
    shown = io.StringIO()
    driver = make_run({"many": [*deaths(1), None]}, shown=shown)
    driver.fleet.disconnected = [("node a", "node b"), ("node a", "node b"), None]
    assert supervise(driver).finished
    waited = ["connected?"] * 3
    assert events == ["start main", "train many", "room?", "replace lost main", *waited, "train many"]
    assert shown.getvalue().count("nodes node a and node b do not reach each other, though Ray reaches both") == 1
    assert "waiting up to 0.1 s for the network" in shown.getvalue()
    assert driver.run.folder.read_run()["failures"] == 1


def test_nodes_that_never_reach_each_other_end_the_run_and_are_named(make_run, events):
    driver = make_run({"many": deaths(1)})
    driver.fleet.disconnected = [("node a", "node b")] * 1000
    with pytest.raises(
        ValueError, match=r"node a and node b do not reach each other, .*mend the network.*the same command continues"
    ):
        supervise(driver)
    assert events.count("connected?") > 2
    assert not any(event.startswith("move") for event in events)


def test_a_worker_that_refuses_is_not_asked_again(make_run, events):
    """A refusal is a ValueError, as "no room" is; only the latter may change by itself."""
    driver = make_run({"many": deaths(1)})

    def refuse():
        events.append("refused")
        raise ValueError("cluster.gpus_per_worker = 1: this worker's torch finds no CUDA device")

    for place in ("disconnected_nodes", "check_room"):
        events.clear()
        driver.fleet.workers = []
        driver.run.signals.received = None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver.fleet, place, refuse)
            patch.setattr(supervisor_module.StageRun, "carry_out", lambda stage: (_ for _ in ()).throw(*deaths(1)))
            with pytest.raises(ValueError, match="no CUDA device"):
                supervise(driver)
        assert events.count("refused") == 1, place


def test_a_refusal_while_the_fleet_moves_is_told_as_it_is(make_run, events):
    driver = make_run({"many": [PreemptionNotice("node a")]}, rooms=[ValueError("dataset.root = /data: gone")])
    with pytest.raises(ValueError, match=r"^dataset.root = /data: gone$"):
        supervise(driver)
    assert events == ["start main", "train many", "move main", "room?"]


def test_a_signal_ends_the_wait_for_a_lost_node(make_run):
    missing = NoRoom("cluster.workers = 1: places for 0")
    driver = make_run({"many": deaths(1)}, rooms=[missing] * 1000)
    driver.fleet.check_room = lambda: driver.run.signals._note(signal.SIGTERM, None) or (_ for _ in ()).throw(missing)
    with pytest.raises(Stopped, match="the same command continues"):
        supervise(driver)


def test_workers_that_die_after_a_signal_are_not_started_again(make_run, events):
    driver = make_run({"many": []})

    def die():
        driver.run.signals.received = signal.SIGTERM
        raise WorkerLost("a worker died")

    supervisor_module.StageRun.carry_out = lambda stage: die()
    with pytest.raises(Stopped) as stopped:
        supervise(driver)
    assert stopped.value.exit_code == 143
    assert events == ["start main"]


@pytest.mark.parametrize(("why", "begun"), [("hang", "start main"), ("failure", "replace lost main")])
def test_workers_of_a_mesh_that_hung_are_all_started_again(make_run, events, why, begun, monkeypatch):
    monkeypatch.setattr(supervisor_module, "write_stacks", lambda workers, hosts, folder: f"stacks kept in {folder}")
    driver = make_run({"many": [WorkerLost("lost", why), None]})
    assert supervise(driver).finished
    assert [e for e in events if e.endswith("main")] == ["start main", begun]


def test_out_of_memory_is_tried_once_more_and_not_for_ever(make_run):
    driver = make_run({"many": [WorkerLost("full", "memory") for _ in range(3)]})
    with pytest.raises(WorkerLost, match="out of memory 2 times in a row; use larger nodes"):
        supervise(driver)
    assert driver.run.folder.read_run()["failures"] == 1


def test_out_of_memory_after_a_death_is_the_first_time(make_run):
    driver = make_run({"many": [WorkerLost("died"), WorkerLost("full", "memory"), None]})
    assert supervise(driver).finished
    assert driver.run.folder.read_run()["failures"] == 2


def test_preemptions_have_a_budget_of_their_own(make_run, events):
    """Two preemptions are allowed and no failure counts; the third ends with exit status 75."""
    words = [*LFME, "cluster.max_preemptions=2"]
    driver = make_run({"many": [PreemptionNotice("node a"), WorkerLost("node b", "preemption"), None]}, words=words)
    assert supervise(driver).finished
    assert driver.run.folder.read_run()["preemptions"] == 2
    assert "failures" not in driver.run.folder.read_run()

    driver = make_run({"many": [PreemptionNotice("node a") for _ in range(3)]}, words=words)
    with pytest.raises(Preempted, match=r"cluster.max_preemptions = 2") as ended:
        supervise(driver)
    assert ended.value.exit_code == 75


def test_one_node_that_is_taken_from_several_stages_counts_once(make_run):
    driver = make_run({})
    driver.run.record_preemption(PreemptionNotice("node a"), "many", {"a"})
    driver.run.record_preemption(PreemptionNotice("nodes a and b"), "medium", {"a", "b"})
    driver.run.record_preemption(PreemptionNotice("node b"), "few", {"b"})
    assert driver.run.folder.read_run()["preemptions"] == 2
    driver.run.record_preemption(WorkerLost("a worker died", "preemption"), "few", set())
    assert driver.run.preemptions == 3


def test_nodes_taken_away_without_room_elsewhere_end_the_run_with_the_status_for_it(make_run):
    driver = make_run({"many": [PreemptionNotice("node a will be taken away")]}, rooms=[NoRoom("places for 0")] * 1000)
    with pytest.raises(Preempted, match=r"node a .*places for 0.*the same command continues"):
        supervise(driver)


def test_hours_are_counted_for_a_fleet_that_dies_while_it_starts(make_run):
    driver = make_run({"many": [None]})
    fleet, starts = driver.fleet, []

    def start():
        starts.append(driver.run.cost._workers)
        fleet.workers = ["worker"]
        if len(starts) == 1:
            raise WorkerLost("a worker died")

    fleet.start = fleet.replace_lost = start
    supervise(driver)
    assert starts == [1, 1]
    assert driver.run.cost._workers == 1


def test_a_stage_that_failed_for_good_ends_the_run_with_its_words_and_no_further_stage_begins(make_run, events):
    """One fleet after another: `few` waits when `many` fails, and is not begun."""
    driver = make_run(
        {"many": [FloatingPointError("stage many: not finite")], "medium": [None], "few": [None]},
        words=[*LFME, "cluster.side_by_side=1"],
    )
    with pytest.raises(FloatingPointError, match="stage many"):
        driver.carry_out()
    assert events == ["start main", "train many"]


def test_the_failure_is_told_and_not_that_others_were_given_up(make_run, events):
    driver = make_run(
        {"many": [GivenUp("m")], "medium": [FloatingPointError("medium: not finite")], "few": [Stopped(15, "f")]}
    )
    with pytest.raises(FloatingPointError):
        driver.carry_out()
    assert events.count("close further") == 2


def test_all_stages_of_a_wave_are_trained_before_the_next_begins(make_run, events):
    driver = make_run({"many": [None], "medium": [None], "few": [None], "student": [None]})
    assert driver.carry_out() == Outcome("student", True, 1, driver.run.folder.path.parent)
    trained = [event for event in events if event.startswith("train")]
    assert sorted(trained[:3]) == ["train few", "train many", "train medium"]
    assert trained[3] == "train student"


def test_run_json_lists_the_workers_of_every_living_fleet_with_their_stage(make_run):
    driver = make_run({})
    one, two = driver.fleet, FakeFleet([], "further")
    driver.run.announce_start(one, "many")
    driver.run.announce_start(two, "medium")
    driver.run.announce_start(one, "few")
    stored = driver.run.folder.read_run()
    assert stored["workers"] == [{"pid": "main", "stage": "few"}, {"pid": "further", "stage": "medium"}]
    assert stored["starts"] == 1


def test_what_a_kill_after_a_stages_last_checkpoint_left_out_is_written_at_the_next_start(make_run):
    """The weights of its best evaluation, and the evaluations of a stage that knows only some classes."""
    driver = make_run({})
    checkpoints = driver.run.checkpoints
    evaluation = {"step": 9, "evaluation": {"split": "test"}}
    best = evaluation | {"checkpoint": "best-00-many-00000009"}
    writing = checkpoints.begin()
    entries = [write_file(writing, "trunk.safetensors", b"weights")]
    state = {"step": 9, "total_steps": 9, "best": best, "last": evaluation}
    checkpoints.complete(writing, checkpoints.name("many", 9), entries, state)
    assert driver._finished("many").finished
    assert (checkpoints.folder / "best-00-many-00000009" / "trunk.safetensors").read_bytes() == b"weights"
    for name in ("last", "best"):
        assert json.loads((driver.run.folder.path / "evaluation" / "many" / f"{name}.json").read_text()) == {
            "split": "test"
        }
    assert driver._finished("medium") is None


def lost_in_predict(driver, monkeypatch, times):
    """Let workers die while they predict, so often."""
    asked = []

    def keep(trained):
        asked.append(trained)
        assert trained.prepared and driver.fleet.workers
        if len(asked) <= times:
            raise WorkerLost("a worker died: put in")

    monkeypatch.setattr(supervisor_module, "keep_predictions", keep)
    return asked


@pytest.mark.parametrize("losses", [1, 2])
def test_workers_lost_while_they_predict_cost_no_failure_and_at_most_the_predictions(
    losses, make_run, monkeypatch, events
):
    """With no failure allowed: other workers are asked once, then the run goes on without predictions."""
    shown = io.StringIO()
    driver = make_run({"student": [None]}, words=[*LFME, "cluster.max_failures=0"], shown=shown)
    asked, noted = lost_in_predict(driver, monkeypatch, losses), []
    monkeypatch.setattr(supervisor_module.StageRun, "note_memory", lambda stage: noted.append((stage, len(asked))))
    assert supervise(driver, "student").finished
    assert len(asked) == 2 and asked[0] is not asked[1]
    assert noted == [(asked[0], 0)], "the peak is that of the workers that trained"
    assert events == ["start main", "train student", "room?", "start main", "connected?"]
    stored = driver.run.folder.read_run()
    assert "failures" not in stored
    assert [late["stage"] for late in stored["losses_after_training"]] == ["student"] * losses
    cause = "WorkerLost: a worker died: put in"
    given_up = {"student": {"status": "failed", "cause": cause}} if losses == 2 else None
    assert stored.get("predictions") == given_up
    assert shown.getvalue().count(f"stage student: predictions were not kept: {cause}") == losses - 1
    assert bool(driver.fleet.workers) == (losses == 1), "a later stage starts workers of its own"
    missing = predictions_missing(driver.run.folder, driver.run.config, "student")
    assert missing == (losses == 1), "what was given up is not asked for by a later start"


def test_a_worker_lost_when_asked_for_its_memory_is_replaced_for_the_predictions(make_run, monkeypatch, events):
    shown = io.StringIO()
    driver = make_run({"student": [None]}, words=[*LFME, "cluster.max_failures=0"], shown=shown)
    asked = lost_in_predict(driver, monkeypatch, 0)

    def die(stage):
        raise WorkerLost("a worker died: put in")

    monkeypatch.setattr(supervisor_module.StageRun, "note_memory", die)
    assert supervise(driver, "student").finished
    assert len(asked) == 1 and events == ["start main", "train student", "room?", "start main", "connected?"]
    assert "stage student is trained; its peak memory is not noted: a worker died: put in" in shown.getvalue()
    (late,) = driver.run.folder.read_run()["losses_after_training"]
    assert (late["stage"], late["what"]) == ("student", "a worker died: put in")


def test_a_wait_for_places_is_noted_and_tracked_once_said_every_minute_and_ended_by_a_signal(make_run):
    shown, tracked = io.StringIO(), []
    run = make_run({}, shown=shown).run
    run._begin_tracking = lambda: tracked.append(run.folder.read_run()["status"])
    waiting = Waiting(run, 86400.0)
    for waited_s in range(130):
        waiting(float(waited_s), lambda: "2 x (1 CPUs, 0 GPUs), free are 0 CPUs")
    assert tracked == ["waiting"]
    stored = run.folder.read_run()
    assert stored["waits_for"] == "2 x (1 CPUs, 0 GPUs), free are 0 CPUs" and stored["created"]
    first, *more = shown.getvalue().splitlines()
    assert first == "waiting for 2 x (1 CPUs, 0 GPUs), free are 0 CPUs; waited 3.0 s of at most 24.0 h"
    assert len(more) == 2
    run.signals.received = signal.SIGTERM
    with pytest.raises(Stopped, match="while it waited for places; the same command continues") as stopped:
        waiting(130.0, lambda: "")
    assert stopped.value.exit_code == 143
