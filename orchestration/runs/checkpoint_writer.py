"""Write the checkpoints of a stage beside its training, one at a time.

Training stops for a copy of the weights in the workers' memory. A thread does the rest, in this order, which is a
promise: killed at any point, the run has its newest complete checkpoint, the journal before it, and best weights that
can be copied again.

    collect      journal to disk; workers write their files from the copy, or send them
    complete     state, manifest, final name: from here on the checkpoint exists
    keep best    copy the weights of the best evaluation, if it is this one
    prune        remove checkpoints that are no longer to stay, and best weights that none of the others names
    announce     hours used, to run.json; storage at a URL, which uploads what is complete

A writer is in one of five states. `start`, `check`, `wait` and leaving the `with` block belong to the thread that
trains the stage; the thread of a write changes the state at its own end alone.

    idle         no write is in flight                      `start`, after the copy             -> collecting
    collecting   waits for disk and workers                 all files are there                 -> completing
                                                            the stage ends by a loss or Ctrl-C  -> given up
    completing   works on the driver's disk alone           done                                -> idle
    failed       a write ended with an error                raised once by the training thread  -> idle
    given up     no write completes any more, ever          a restarted stage has another writer

What the two threads share:
    the copy         in the workers; written by `snapshot`, so the write before must have ended: `wait` comes first
    state            evaluations are made anew each time and never changed, so the references in it are a copy
    journal          appends go on while the disk works, see `Journal.sync`; lines of later steps are cut on resuming
    run.json         both change it, under the folder's lock (`RunFolder.update_run`)
    checkpoints      only the thread of the write makes, renames and removes a stage's; the stage reads them before its
                     first write and after its last one. A restart looks for the newest after `with` was left
    workers          calls of both threads; "files" is a thread of its own there. Either call may find a death; the
                     training thread reports it, once
    tracking         follows the journal and run.json from a process of its own, and hears nothing from here
"""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestration.cluster.failures import WorkerLost
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.transfer import receive_saved
from orchestration.runs.run import Run
from orchestration.runs.stopping import Stopped
from orchestration.storage.checkpoint import FileEntry

_LAST_FILES_S = 3.0  # after a loss or a second Ctrl-C: what is nearly written may still become a checkpoint


class CheckpointWriter:
    """Writes the checkpoints of one stage on a thread of its own. Used as a context that no write outlives.

    Args:
        run: that the stage belongs to.
        stage: its name.
        fleet: of the stage.

    Attributes:
        newest: the checkpoint completed last; None before the first.
    """

    def __init__(self, run: Run, stage: str, fleet: Fleet) -> None:
        self._run, self._stage, self._fleet = run, stage, fleet
        self.newest: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = False
        self._completing = threading.Lock()  # held while a checkpoint gets its name and what follows from that

    # The training thread

    def start(self, state: dict[str, Any]) -> None:
        """Write a checkpoint of the copy that the workers hold; returns at once. Call `wait` before the copy is taken.

        Args:
            state: its state.json.
        """
        assert self._thread is None and not self._given_up
        self._run.journal.flush()  # what is in memory; `_collect` waits for the disk
        self._thread = threading.Thread(
            target=self._write, args=(state,), name=f"checkpoint of {self._stage}", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed; return at once if it goes on or has succeeded."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until no write is in flight, and raise its error if it failed.

        Raises:
            WorkerLost, ValueError, OSError: as `Fleet.call`, and as the disk says.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the write in flight end, or make sure that it never completes.

        Raises:
            ValueError, OSError: the write failed, before the problem that ends the block.
        """
        try:
            self._leave(problem)
        finally:  # also where Ctrl-C ended the waiting
            self._given_up = True

    def _leave(self, problem: BaseException | None) -> None:
        if problem is None:
            self.wait()
        elif isinstance(problem, WorkerLost) or not isinstance(problem, Exception | Stopped):
            self._give_up()  # a write that fails with its worker is no failure of its own
        else:
            try:
                self.wait()
            except WorkerLost:
                pass  # the problem says more
            except Exception as earlier:
                raise earlier from problem

    def _give_up(self) -> None:
        """Wait a little for the files of the write in flight. After that it completes no more.

        A checkpoint that is getting its name is waited for: it must be there or not, for whoever looks next.
        """
        if self._thread is not None:
            self._thread.join(_LAST_FILES_S)
            with self._completing:
                self._given_up = True
            self._thread, self._error = None, None

    # The thread of a write

    def _write(self, state: dict[str, Any]) -> None:
        try:
            writing, entries = self._collect()
            with self._completing:
                if not self._given_up:
                    self._complete(writing, entries, state)
        except BaseException as error:
            self._error = error

    def _collect(self) -> tuple[Path, list[FileEntry]]:
        """Return a folder with the files of all workers. The lines before the checkpoint are on disk by then."""
        self._run.journal.sync()
        writing = self._run.checkpoints.begin()
        answers = self._fleet.call("write", str(writing) if self._run.folder.shared else None)
        if len(answers) < self._fleet.shape.workers:
            raise WorkerLost("the workers were ended before they wrote a checkpoint")
        return writing, receive_saved(answers, writing)

    def _complete(self, writing: Path, entries: list[FileEntry], state: dict[str, Any]) -> None:
        """Make a checkpoint of the files, and do what may only follow once it exists."""
        run = self._run
        self.newest = self._name(writing, entries, state)
        self._keep_best(self.newest, state)
        run.checkpoints.prune(self._stage, self.newest, run.config.run.keep_checkpoints)
        run.cost.write()
        run.folder.announce_checkpoint()

    def _name(self, writing: Path, entries: list[FileEntry], state: dict[str, Any]) -> Path:
        checkpoints = self._run.checkpoints
        return checkpoints.complete(writing, checkpoints.name(self._stage, state["step"]), entries, state)

    def _keep_best(self, folder: Path, state: dict[str, Any]) -> None:
        """Copy the weights of a complete checkpoint if its evaluation is the best so far."""
        best = state["best"]
        if best and best["step"] == state["step"]:
            self._run.checkpoints.copy_weights(folder, best["checkpoint"])
