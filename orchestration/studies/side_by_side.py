"""Train the runs of a study side by side: as many lanes as the cluster has places, one queue, study.json as it goes.

carry_out
    `_adjust`     as many lanes as there are places and runs that can begin
    `_feed`       a run for each idle lane
    `_hear`       what lanes say: a run began, ended; a lane died
A signal is passed on to the lanes once; each writes a checkpoint, and the same command goes on.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from orchestration.cluster.placement import Resources, places
from orchestration.results.text import duration, plural
from orchestration.runs.stopping import StopSignals
from orchestration.storage.files import read_json
from orchestration.studies.lanes import Event, Lane, Lanes
from orchestration.studies.points import Need, Point
from orchestration.studies.progress import seconds_left
from orchestration.studies.run_queue import FAILED, FINISHED, RUNNING, STOPPED, WAITING, RunQueue
from orchestration.studies.study_folder import StudyFolder

_LOOK_S = 1.0  # between two looks at signals
_NODES_S = 5.0  # between two looks at the nodes of the cluster
_GROWTH_MIB = 1024.0  # of a lane since its first run; what libraries keep must not grow for ever
_PROBLEM_CHARACTERS = 200
_STARTS_LOST = 3  # lanes in a row that die before they are ready


class SideBySide:
    """Trains the runs of a study.

    Args:
        folder: of the study, with its points taken.
        points: to train, in the order in which reports show them.
        lanes: to train them in.
        nodes: returns the resources of each node of the cluster, by name.
        most: limit to the number of lanes; None: as many as there are places.
        defaults: words of every run beside its own.
        report: takes a line for the operator.
        ended: called when a run has ended.
        lent: run folders from elsewhere that have trained a stage, by digest of the stage.
        looked: called every second or so with how far the study is, in a few words.
    """

    def __init__(
        self,
        folder: StudyFolder,
        points: Sequence[Point],
        lanes: Lanes,
        nodes: Callable[[], Mapping[str, Resources]],
        most: int | None,
        defaults: Sequence[str],
        report: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        lent: Mapping[str, Path] = MappingProxyType({}),
        looked: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder, self._lanes, self._nodes, self._most = folder, lanes, nodes, most
        self._defaults, self._report, self._ended = tuple(defaults), report, ended
        self._points, self._lent, self._looked = {point.run: point for point in points}, lent, looked
        # All recipes with the first seed come first: a report has something to compare early.
        order = sorted(points, key=lambda point: point.seed)
        statuses = {point.run: folder.record(point.run)["status"] for point in points}
        to_train = {p.run: [digest for digest in p.stages.values() if digest not in lent] for p in order}
        self._queue = RunQueue(to_train, statuses, after={point.run: point.after for point in points})
        self._begun_at: dict[str, float] = {}
        self._took: list[float] = []
        self._took_by_recipe: dict[str, float] = {}
        self._no_room: str | None = None
        self._asked_at, self._room = -math.inf, 1
        self._fitted, self._away = set[Need](), set[Need]()
        self._lost_starts = 0
        self._stopping = False

    def carry_out(self) -> int | None:
        """Train until every run has ended. Return the signal that stopped it before, if one did.

        Lanes are told to end, and may not have; see `Lanes.finish`.

        Raises:
            KeyboardInterrupt: a second Ctrl-C; lanes are ended at once.
            ValueError: lanes do not start, or the disk is full.
        """
        try:
            with StopSignals().watch() as signals:
                while not self._queue.done or self._stopping:
                    if signals.received is not None and not self._stopping:
                        self._stop(signals.received)
                    if not self._stopping:
                        self._forsake()
                        self._adjust()
                        self._feed()
                    elif not self._lanes.alive:
                        break
                    self._end_idle()
                    for event in self._lanes.events(_LOOK_S):
                        self._hear(event)
                    self._looked(f"{self._count()}{self._left()}")
            for lane in self._lanes.alive:
                lane.end()  # it uploads what is left of its runs meanwhile
            if self._no_room is not None and signals.received is None:
                self._lanes.finish(self._report)
                raise ValueError(f"no run begins any more: {self._no_room}")
            return signals.received
        except BaseException:
            self._lanes.close()
            raise
        finally:
            for run in self._queue.with_status(RUNNING):
                self._folder.record(run)["status"] = STOPPED
            self._folder.save()

    # Lanes

    def _adjust(self) -> None:
        """Start lanes for runs that could begin, up to the places that there are; end those that are too many."""
        now = time.monotonic()
        if now - self._asked_at >= _NODES_S:
            self._asked_at = now
            nodes, waiting = self._nodes(), self._queue.with_status(WAITING, RUNNING)
            self._room = room(nodes, [self._points[run] for run in waiting])
            self._note_room(nodes, {self._points[run].need for run in waiting})
        wanted = min(self._room, self._queue.ready(), self._most or self._room)
        lanes = [lane for lane in self._lanes.alive if not lane.ending]
        for _ in range(len(lanes), wanted):
            self._lanes.start()
        idle = [lane for lane in lanes if lane.run is None]
        for lane in idle[: max(0, len(lanes) - max(wanted, 1))]:
            lane.end()

    def _note_room(self, nodes: Mapping[str, Resources], needs: set[Need]) -> None:
        """Note which runs fit on the nodes. Those that did once wait where none is left, for one that is added.

        Runs that never fitted are tried: what could never be is refused, and says what is missing.
        """
        fitting = {need for need in needs if fit(nodes, need) > 0}
        self._fitted |= fitting
        away = (needs & self._fitted) - fitting
        if bool(away) != bool(self._away):
            self._report("no node has room for the next runs: they wait for one" if away else "there is room again")
            self._folder.content["waits_for"] = "a node with room for its runs" if away else None
            self._folder.save()  # for `expertail status`
        self._away = away

    def _end_idle(self) -> None:
        for lane in self._lanes.alive:
            if self._stopping and lane.run is None and not lane.ending:
                lane.end()

    def _feed(self) -> None:
        for lane in self._lanes.alive:
            if not lane.ready or lane.ending or lane.run is not None:
                continue
            run = self._next()
            if run is None:
                lane.release()
                continue
            self._queue.begin(run)
            self._begun_at[run] = time.time()
            record = self._folder.record(run)
            self._folder.update(run, status=RUNNING, attempts=record["attempts"] + 1)
            lane.give(self._job(run))

    def _next(self) -> str | None:
        """Return the run to train next; None if none can begin now.

        Of one seed the longest goes first, as far as earlier seeds say, so that lanes end at about the same time.
        """
        able = (run for run in self._queue.able() if self._points[run].need not in self._away)
        first = next(able, None)
        if first is None:
            return None
        seed = self._points[first].seed
        of_seed = itertools.takewhile(lambda run: self._points[run].seed == seed, able)
        return max([first, *of_seed], key=lambda run: self._took_by_recipe.get(_recipe(self._points[run]), math.inf))

    def _job(self, run: str) -> dict[str, Any]:
        path = self._folder.path
        stages = self._points[run].stages.values()
        lenders = dict.fromkeys(self._lent[digest] for digest in stages if digest in self._lent)
        return {
            "run": run,
            "folder": str(path / run),
            "words": launch_words(self._points[run], path, self._defaults),
            "study": path.name,
            "donors": [*map(str, lenders), *(str(path / donor) for donor in self._queue.donors(run))],
        }

    def _forsake(self) -> None:
        """Note runs that can never begin."""
        for run, needed in self._queue.forsake():
            status = self._queue.status(needed)
            self._note(run, status, f"it needs {needed}, which {'has failed' if status == FAILED else 'was stopped'}")

    def _stop(self, number: int) -> None:
        self._stopping = True
        self._queue.stop()
        if training := len(self._queue.with_status(RUNNING)):
            self._report(f"stopping: {plural(training, 'run')} to write a checkpoint")
        self._lanes.stop(number)

    # What lanes say

    def _hear(self, event: Event) -> None:
        lane = event.lane
        match event.kind:
            case "ready":
                lane.ready, self._lost_starts = True, 0
            case "began":
                self._report(f"{event.values['run']}: began  ({self._count()})")
            case "ended":
                self._end(lane, event.values)
            case "said":
                self._report(event.values["text"])
            case "died":
                self._lose(lane, event.values["code"])

    def _end(self, lane: Lane, values: Mapping[str, Any]) -> None:
        run, status, problem = values["run"], values["status"], values["problem"]
        lane.run = None
        lane.ending = lane.ending or (status == STOPPED and problem is not None)  # a signal ends its process, too
        if status == STOPPED and problem is None:
            problem = "run.max_steps ended it before the end of training"
        elif status == STOPPED and not self._stopping:  # by a signal to its process alone, or by drained nodes
            return self._try_again(run, problem)
        elif values.get("no_place") and self._points[run].need in self._fitted and not self._stopping:
            return self._try_again(run, problem)  # its node has gone since the last look
        if values.get("no_room"):  # as it would be for every run after this one
            status, self._no_room = STOPPED, problem
            self._queue.stop()
        self._queue.end(run, status)
        self._note(run, status, problem)
        memory = values["memory_mib"]
        lane.first_memory_mib = lane.first_memory_mib or memory
        if memory - lane.first_memory_mib > _GROWTH_MIB:
            lane.end()

    def _lose(self, lane: Lane, code: int) -> None:
        """Go on without a lane that has died; the run that it trained goes on in another."""
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        if lane.run is None:
            if not lane.ready and not self._stopping:
                self._lost_starts += 1
                if self._lost_starts >= _STARTS_LOST:
                    raise ValueError(
                        f"{_STARTS_LOST} processes for runs ended {how} before they were ready; see "
                        f"{self._folder.path}/lanes.log"
                    )
            return
        run = lane.run
        if self._stopping:
            self._queue.end(run, STOPPED)
            return self._note(run, STOPPED, f"its process ended {how}")
        self._try_again(run, f"its process ended {how}")

    def _try_again(self, run: str, why: str) -> None:
        """Let a run go on from its newest checkpoint, unless it ends again and again without a new one."""
        self._asked_at = -math.inf  # a node may have gone: the next run begins by what there is now
        if self._queue.lose(run, _progress(self._folder.path / run)):
            self._report(f"{run}: {_first_line(why)}; it goes on from its newest checkpoint")
            self._folder.update(run, status=WAITING)
        else:
            self._note(run, FAILED, f"{_first_line(why)}, again and again without a new checkpoint")

    def _left(self) -> str:
        """Return about how long the rest takes, in words; nothing before a run has ended."""
        running = [self._begun_at[run] for run in self._queue.with_status(RUNNING)]
        left = seconds_left(self._took, running, len(self._queue.with_status(WAITING)), time.time())
        return "" if left is None else f", about {duration(left)} left"

    def _note(self, run: str, status: str, problem: str | None) -> None:
        self._folder.update(run, status=status, problem=problem)
        begun = self._begun_at.get(run)
        seconds = 0.0 if begun is None else time.time() - begun
        if status == FINISHED:
            self._took.append(seconds)
            self._took_by_recipe[_recipe(self._points[run])] = seconds
        said = _result(self._folder.path / run) if status == FINISHED else f": {_first_line(problem)}"
        took = "" if begun is None else f"  {duration(seconds)}"
        self._report(f"{run}: {status}{said}{took}  ({self._count()})")
        self._ended()

    def _count(self) -> str:
        never = [run for run in self._queue.with_status(STOPPED) if run not in self._begun_at]  # begin next time
        ended = len(self._queue.with_status(FINISHED, FAILED, STOPPED)) - len(never)
        running, waiting = len(self._queue.with_status(RUNNING)), len(self._queue.with_status(WAITING)) + len(never)
        return f"{ended} of {len(self._points)} ended, {running} running, {waiting} waiting"


def _recipe(point: Point) -> str:
    """Return what the runs of a row have in common."""
    return json.dumps([point.role, sorted(point.label.items())])


def room(nodes: Mapping[str, Resources], points: Sequence[Point]) -> int:
    """Count the runs that fit on the nodes at once, by those that need least; at least one, which may have to wait."""
    return max([1, *(fit(nodes, need) for need in {point.need for point in points})])


def fit(nodes: Mapping[str, Resources], need: Need) -> int:
    """Count the runs of one need that fit on the nodes at once."""
    bundle, workers = need
    return sum(places(node, dict(bundle)) for node in nodes.values()) // workers


def launch_words(point: Point, folder: Path, defaults: Sequence[str]) -> list[str]:
    """Return the words with which `expertail train` makes exactly this run."""
    return [*point.words, *defaults, f"run.dir={folder}", f"run.name={point.run}"]


def _first_line(problem: str | None) -> str:
    return ((problem or "").strip().splitlines() or ["without a word"])[0][:_PROBLEM_CHARACTERS]


def _progress(folder: Path) -> int:
    """Return a number that grows with each checkpoint of a run."""
    return max((path.stat().st_mtime_ns for path in folder.glob("checkpoints/[0-9]*")), default=0)


def _result(folder: Path) -> str:
    """Return a finished run's accuracies in a few words; nothing where it has none."""
    top1 = read_json(folder / "evaluation" / "last.json").get("members", {}).get("ensemble", {}).get("top1", {})
    shown = [f"{group} {100 * top1[group]:.1f}" for group in ("all", "few") if top1.get(group) is not None]
    return f": {', '.join(shown)}" if shown else ""
