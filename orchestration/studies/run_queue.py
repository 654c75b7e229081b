"""Which run of a study is next. Pure: no files, no processes.

    waiting -> running -> finished, failed or stopped
                  |
                  +-> waiting      its process died: again, from its newest checkpoint

A run waits for an earlier one that begins with the same stage and has not ended: it takes the stage over then. Later
runs overtake it. If the earlier one fails, the next that needs the stage trains it.

A run also waits for those whose models it learns from or begins with. If one of them ends otherwise than finished, so
does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

WAITING, RUNNING, FINISHED, FAILED, STOPPED = "waiting", "running", "finished", "failed", "stopped"
ENDED = (FINISHED, FAILED, STOPPED)


@dataclass
class _Run:
    status: str = WAITING
    deaths: int = 0  # of its process, in a row without progress
    progress: int = -1  # at the last of them


class RunQueue:
    """The runs of a study and what has become of each.

    Args:
        stages: digests of the stages of each run, by run, in the order in which they are to be trained.
        statuses: of runs that are not waiting.
        deaths: how often the process of a run may die without progress between, before the run fails.
        after: runs that must be finished before a run begins, by run.
    """

    def __init__(
        self,
        stages: Mapping[str, Sequence[str]],
        statuses: Mapping[str, str] | None = None,
        deaths: int = 6,
        after: Mapping[str, Sequence[str]] = MappingProxyType({}),
    ) -> None:
        self._after = after
        self._stages = {name: frozenset(own) for name, own in stages.items()}
        self._runs = {name: _Run() for name in stages}
        self._most_deaths = deaths
        for name, status in (statuses or {}).items():
            self._runs[name].status = status

    def status(self, run: str) -> str:
        """Return the status of a run."""
        return self._runs[run].status

    def with_status(self, *statuses: str) -> list[str]:
        """Return the runs that have one of some statuses, in order."""
        return [name for name, run in self._runs.items() if run.status in statuses]

    @property
    def done(self) -> bool:
        """Whether every run has ended."""
        return not self.with_status(WAITING, RUNNING)

    def able(self) -> Iterator[str]:
        """Yield the runs that can begin now, in order."""
        yield from (name for name in self.with_status(WAITING) if self._blocker(name) is None)

    def ready(self) -> int:
        """Count the runs that could be trained at once, those that train now too."""
        begun = list[str]()
        for name in self.with_status(RUNNING, WAITING):
            waits = self._unfinished(name) or any(self._shared(name, other) for other in begun)
            if self.status(name) == RUNNING or not waits:
                begun.append(name)
        return len(begun)

    def forsake(self) -> Iterator[tuple[str, str]]:
        """End runs that wait for one that has ended and has not finished, as that one has. Yield each, and that one."""
        while found := next(self._lost(), None):
            self._runs[found[0]].status = self.status(found[1])
            yield found

    def donors(self, run: str) -> list[str]:
        """Return the runs that may have trained stages of a run, finished ones first."""
        ended = self.with_status(FINISHED) + self.with_status(FAILED, STOPPED)
        return [name for name in ended if name != run and self._shared(run, name)]

    def begin(self, run: str) -> None:
        """Note that a run trains."""
        assert self._runs[run].status == WAITING
        self._runs[run].status = RUNNING

    def end(self, run: str, status: str) -> None:
        """Note how a run has ended."""
        assert self._runs[run].status == RUNNING and status in ENDED
        self._runs[run].status = status

    def lose(self, run: str, progress: int) -> bool:
        """Note that the process that trained a run has died. Return whether the run is tried again.

        Args:
            run: that it trained.
            progress: of its checkpoints, a number that grows with each.
        """
        lost = self._runs[run]
        assert lost.status == RUNNING
        lost.deaths = 1 if progress > lost.progress else lost.deaths + 1
        lost.progress = max(progress, lost.progress)
        lost.status = WAITING if lost.deaths < self._most_deaths else FAILED
        return lost.status == WAITING

    def stop(self) -> None:
        """Note that no waiting run will begin."""
        for name in self.with_status(WAITING):
            self._runs[name].status = STOPPED

    def _blocker(self, run: str) -> str | None:
        """Return a run that this one needs, or that trains a stage of it, or will before; None if there is none.

        A stage that a finished run has needs nobody.
        """
        if needed := self._unfinished(run):
            return needed[0]
        missing = self._stages[run].difference(*(self._stages[name] for name in self.with_status(FINISHED)))
        for other in self._before(run):
            if missing & self._stages[other]:
                return other
        return None

    def _lost(self) -> Iterator[tuple[str, str]]:
        for name in self.with_status(WAITING):
            yield from ((name, one) for one in self._unfinished(name) if self.status(one) in ENDED)

    def _unfinished(self, run: str) -> list[str]:
        return [one for one in self._after.get(run, ()) if self.status(one) != FINISHED]

    def _before(self, run: str) -> Iterator[str]:
        """Yield the runs that train, and those that wait before a run; none that needs another, perhaps this one."""
        yield from self.with_status(RUNNING)
        for name in self.with_status(WAITING):
            if name == run:
                return
            if not self._unfinished(name):
                yield name

    def _shared(self, one: str, other: str) -> bool:
        return bool(self._stages[one] & self._stages[other])
