"""Train one stage of a run on a started fleet: intervals of steps, evaluations, checkpoints, lines of the journal.

The driver decides when, workers decide how. Everything written here can be written again after a crash: a resumed
stage drops the journal lines after its checkpoint and takes the same steps.

    prepare      build the stage on the workers, load its newest checkpoint or its first weights
    carry_out    until the target:
                     train an interval: to the next evaluation or checkpoint, at most about a second
                     note its losses; evaluate and save if due (checkpoint_writer.py writes beside the next steps)
                     end early, with a checkpoint, on a signal, or when nodes are taken away
                 evaluate and save the end if that was not due

A stage without steps fits in place of its intervals. If it is interrupted, it fits again.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from aggregation.diversity import Diversity, metrics
from aggregation.metrics import Scores
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.preemption import Preempted, PreemptionNotice
from orchestration.cluster.transfer import Sent, send
from orchestration.config.recipe import stage_classes
from orchestration.config.run_config import RunConfig
from orchestration.runs.checkpoint_writer import CheckpointWriter
from orchestration.runs.console import Console
from orchestration.runs.pause import Pause
from orchestration.runs.run import Run
from orchestration.runs.stage_data import (
    carried_forward,
    check_not_replaced,
    check_same_files,
    describe_data,
    left_out_message,
)
from orchestration.runs.stopping import GivenUp, Outcome, Stopped
from orchestration.storage.checkpoint import Checkpoint, DamagedCheckpoint, verify
from orchestration.storage.exports import weights_of
from orchestration.storage.files import DATA, read_json
from orchestration.storage.run_folder import RunFolder
from orchestration.training.trainer import Interval

_INTERVAL_S = 1.0  # about how long workers train before the driver hears from them


class StageRun:
    """One stage on a started fleet, from its newest checkpoint or from its beginning. Call `prepare` first.

    Args:
        run: that the stage belongs to.
        stage: its name.
        fleet: started.
        console: shows progress and messages.
        before: optimiser steps of the stages that came before.
        pause: since a loss, if there was one; ends with the first step.

    Attributes:
        step: optimiser steps done.
        best: the best evaluation so far that counts, with its step, value and checkpoint.
        last: the newest evaluation, with its step.
        fitted: what a stage without steps chose, as `fitting.fit` returns it.
        built: what `Worker.build` returned, in the order of ranks.
    """

    def __init__(
        self, run: Run, stage: str, fleet: Fleet, console: Console, *, before: int = 0, pause: Pause | None = None
    ) -> None:
        self.run, self.stage, self.fleet, self.console = run, stage, fleet, console
        self.journal, self.config, self.folder, self.checkpoints = run.journal, run.config, run.folder, run.checkpoints
        self.before, self._pause = before, pause
        self.epochs = self.config.method.stages[stage].epochs
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.fitted: dict[str, Any] = {}
        self._epoch_images, self._epoch_seconds = 0, 0.0
        self._pace = 0.0  # steps per second of the last interval
        self._writer = CheckpointWriter(run, stage, fleet)
        self._loaded: Path | None = None  # the checkpoint that this start goes on from

    def prepare(self) -> None:
        """Build the stage on the workers, note what the data is, and load the newest checkpoint or first weights.

        Raises:
            ValueError: workers see different files, or a key does not fit the data; or as `Worker.build`.
            WorkerLost: as `Fleet.call`.
        """
        run, settings = self.run, self.config.method.stages[self.stage]

        # Chosen before the workers build, which takes long: a run without a whole checkpoint ends here.
        newest = self.checkpoints.newest_verified(self.stage, self.console.message)
        # Without a checkpoint every line goes: a stage without steps writes its lines at step 0.
        self.journal.rewind({self.stage: newest.state["step"] if newest else -1}, self.checkpoints.stages)

        teachers = {name: self.send(run.model(source)) for name, source in settings.teachers.items()}
        self.built = self.fleet.build(self.stage, teachers)
        run.marks.setdefault("built", time.time())
        if self._pause is not None:
            self._pause.mark("built")

        # The data is checked before anything of this start is written or uploaded.
        first, left_out = self.built[0], self.fleet.left_out
        check_same_files(self.config.dataset, [worker["digest"] for worker in self.built], self.fleet.hosts)
        if left_out:
            run.message_once(left_out_message(self.config.dataset, left_out))
        data = describe_data(self.config.dataset, first, left_out or [])
        before = read_json(self.folder.path / DATA)
        if before.get("digest") != data["digest"]:  # `write_data` refuses it, if the run has trained
            before = {}
        doubts = check_not_replaced(self.config.dataset, before.get("files", {}), data["files"])
        data = carried_forward(data, before)
        for text in [*(remark["text"] for remark in data["remarks"]), *doubts]:
            run.message_once(f"data: {text}")
        self.folder.write_data(data)
        self.num_data_classes = len(data["counts"])
        self.counts = [data["counts"][c] for c in stage_classes(self.config.method, self.stage, data["counts"])]
        run.begin_tracking()

        self.steps_per_epoch: int = first["steps_per_epoch"]
        self.total_steps = self.epochs * self.steps_per_epoch
        self.splits = ["val", "test"] if first["has_val"] else ["test"]
        self.select_on = self._selection_split()

        if newest:
            self._resume(newest)
        else:
            self._begin()
        if self._pause is not None:
            self._pause.mark("loaded")

    def send(self, folder: Path) -> str | Sent:
        """Send a folder to where workers can read it."""
        return send(folder, shared=self.folder.shared)

    def _selection_split(self) -> str:
        """Return the split that chooses the best evaluation."""
        select = self.config.run.select_on
        if select == "val" and "val" not in self.splits:
            raise ValueError(
                "run.select_on = val: this dataset has no validation split; set dataset.val_per_class (cut from the "
                "training pool), dataset.val_list, or run.select_on=test"
            )
        return self.splits[0] if select == "auto" else select

    # The first weights

    def _begin(self) -> None:
        """Load the first weights of the stage, and show its objective what it must see before the first step."""
        source = self.config.method.starts_from(self.stage)
        if source is not None and source.stage is not None:
            weights = weights_of(self.checkpoints, source)
            self.fleet.call("start_from", self.send(weights))
            self.console.message(f"stage {self.stage} begins with the weights of {weights.name}")
        elif source is not None:
            model = self.run.model(source)
            self.fleet.call("start_from_model", self.send(model))
            self.console.message(f"stage {self.stage} begins with the weights of {model}")
        if self.built[0]["prepares"]:
            self.console.message(f"stage {self.stage}: looking at the data before the first step, once")
            self.fleet.call("prepare")

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        sent = self.send(checkpoint.folder)
        self.fitted = state.get("fitted", {})  # checkpoints of earlier versions have none
        self.fleet.call("load", sent, {"step": state["step"], "sums": state["sums"], "fitted": self.fitted})
        self.step, self.best, self.last = state["step"], state["best"], state["last"]
        self._loaded = checkpoint.folder
        if self.best and self.best["step"] == self.step:
            # Written after the checkpoint that names it, so the start before may have been killed in between.
            self.checkpoints.copy_weights(checkpoint.folder, self.best["checkpoint"])
        elif self.best:
            try:
                verify(self.checkpoints.folder / self.best["checkpoint"])
            except DamagedCheckpoint as problem:
                raise ValueError(
                    f"{problem}: the weights of the best evaluation (step {self.best['step']}) are damaged; needed "
                    f"them whole; restore them from a copy, or remove {self.checkpoints.folder} to train anew"
                ) from problem
        where = f"step {self.step} of {self.total_steps}, epoch {self._epoch_after(self.step)} of {self.epochs}"
        self.console.message(f"going on from {checkpoint.folder.name}: {where if self.epochs else 'it is fitted'}")

    # Training

    @property
    def checkpoint(self) -> Path | None:
        """Return the checkpoint that this start wrote last, or else loaded; None before either."""
        return self._writer.newest or self._loaded

    @property
    def target(self) -> int:
        """The step that this start trains to."""
        limit = self.config.run.max_steps
        return self.total_steps if limit is None else min(max(limit - self.before, 0), self.total_steps)

    def take(self, steps: int) -> None:
        """Train this many steps, and evaluate and save when it is due."""
        target = self.step + steps
        while self.step < target:
            self._advance(target)

    def carry_out(self) -> Outcome:
        """Train to the target and make sure that the end is evaluated and saved."""
        with self._writer:  # however this ends, no checkpoint is written after it
            if not self.epochs and self.last is None:
                self._fit()
            self.take(self.target - self.step)
            if self.last is None or self.last["step"] != self.step:
                self._evaluate(count=False)
                self._save()
        write_evaluations(self.folder, self.config, self.stage, {"best": self.best, "last": self.last})
        assert self.checkpoint is not None
        return Outcome(self.stage, self.step >= self.total_steps, self.total_steps, self.checkpoint)

    def note_memory(self) -> None:
        """Note in run.json, and say where there are GPUs, the most memory that each worker has held."""
        peaks = {}
        for what in ("peak_memory_gib", "gpu_peak_memory_gib"):
            found = self.fleet.call(what)
            if None not in found:
                peaks[what] = [round(gib, 2) for gib in found]
        self.run.cost.write(**peaks)
        if on_gpu := peaks.get("gpu_peak_memory_gib"):
            host = max(peaks["peak_memory_gib"])
            self.console.message(
                f"stage {self.stage}: peak memory of a worker {host:.2f} GiB, of its GPU {max(on_gpu):.2f} GiB"
            )

    def _fit(self) -> None:
        """Fit what a stage without steps fits, and say what was chosen."""
        self.fitted = self.fleet.call("fit")[0]
        for choice in self.fitted.get("choices", []):
            split = choice["split"]
            how = (
                f"chosen on {split}" if split else f"published ({choice['origin']}), since there is no validation split"
            )
            self.console.message(f"stage {self.stage}: {choice['key']} = {choice['value']:g}, {how}")

    def _epoch_after(self, step: int) -> int:
        """Return the epoch, from 1, that the step after this one belongs to; 0 in a stage without steps."""
        return min(step // self.steps_per_epoch + 1, self.epochs) if self.epochs else 0

    def _advance(self, target: int) -> None:
        """Train one interval, note it, and evaluate and save if it is due at its end.

        Raises:
            Stopped, GivenUp: the run is to end.
            Preempted, PreemptionNotice: this command's node, or workers' nodes, are being taken away.
        """
        self._writer.check()  # not hours later, at the next checkpoint
        until = self._next_stop(target)
        first, begun = self.step, time.monotonic()
        intervals: list[Interval] = self.fleet.call("train", until)
        interval = replace(intervals[0], notes=list(dict.fromkeys(note for each in intervals for note in each.notes)))
        self.step = until

        if self._pause is not None:  # the stage stood still until these steps
            self._pause.mark("first step")
            self.run.record_recovery(self.stage, self._pause.spans(), max(0, self._pause.step - first))
            self._pause.over, self._pause = True, None

        self._pace = (until - first) / (time.monotonic() - begun)
        self._note(first, interval)

        epoch, rest = divmod(self.step, self.steps_per_epoch)
        evaluated = rest == 0 and (epoch % self.config.run.evaluate_every_epochs == 0 or epoch == self.epochs)
        if evaluated:
            self._evaluate(count=True)

        # Asked once, before the save: a signal that comes during it waits for the end of the next interval.
        ending = self._ending(target)
        if evaluated or self.step % self.config.run.checkpoint_every_steps == 0 or ending is not None:
            self._save()
        if ending is not None:
            self._writer.wait()  # it says that there is a checkpoint
            raise ending

    def _ending(self, target: int) -> BaseException | None:
        """Return what is to be raised once a checkpoint is written; None if the stage goes on."""
        stop, leaving = self.run.signals.received, self.run.leaving_nodes
        if stop is not None:
            return Stopped(
                stop,
                f"stopped after step {self.step} of {self.total_steps} of stage {self.stage}; the same command "
                f"continues from there",
            )
        if self.run.signals.given_up.is_set():
            return GivenUp(f"stage {self.stage} stopped after step {self.step}")
        if self.step >= target:  # nothing is left to move
            return None

        gone = leaving.among([*self.fleet.node_ids, leaving.own_node])
        if leaving.own_node in gone:  # the command cannot move itself
            return Preempted(
                f"the node of this command is being taken away; stopped after step {self.step} of {self.total_steps} "
                f"of stage {self.stage}, with a checkpoint; the same command continues from there"
            )
        if gone:
            nodes = sorted({h["node"] for h in self.fleet.hosts if h["node_id"] in gone})
            return PreemptionNotice(f"{', '.join(nodes)} will be taken away; checkpoint written after step {self.step}")
        return None

    def _next_stop(self, target: int) -> int:
        """Return the step of the next evaluation or checkpoint, or an earlier one about an interval away."""
        every = self.config.run.checkpoint_every_steps
        # Never beyond the end of an epoch, even if it is not evaluated: workers train within one epoch.
        due = min(
            target,
            (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch,
            (self.step // every + 1) * every,
        )
        return min(due, self.step + max(1, int(self._pace * _INTERVAL_S)))

    def _note(self, first: int, interval: Interval) -> None:
        """Write an interval to the journal and show it.

        Args:
            first: the step before the interval.
            interval: what rank 0 returned; its losses are those of all workers.
        """
        if "first_step" not in self.run.marks:
            self.run.marks["first_step"] = time.time()
            self.folder.update_run(startup_s=_differences(self.run.marks))

        for step, loss in enumerate(interval.losses, first + 1):
            self.journal.append(self.stage, (step - 1) // self.steps_per_epoch + 1, step, {"train/loss": loss})

        # Of training alone: evaluations and checkpoints do not count in images per second.
        self._epoch_images += interval.images
        self._epoch_seconds += interval.seconds
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        speed = interval.images / max(interval.seconds, 1e-9)
        if interval.epoch_means:
            means = {f"train/{'epoch_loss' if k == 'loss' else k}": v for k, v in interval.epoch_means.items()}
            pace = self._epoch_images / max(self._epoch_seconds, 1e-9)
            self.journal.append(
                self.stage, epoch, self.step, {**means, "train/lr": interval.lr, "train/images_per_s": pace}
            )
            self._epoch_images, self._epoch_seconds = 0, 0.0

        for note in interval.notes:
            self.console.message(f"stage {self.stage}: {note}")
        shown = {"loss": interval.losses[-1], "lr": interval.lr, "images/s": speed, **interval.terms}
        self.console.step(epoch, self.epochs, self.step, self.target, shown)

    def _evaluate(self, *, count: bool) -> None:
        """Score all splits.

        Args:
            count: whether this may become the best evaluation, and objectives may learn of it. Such evaluations must
                come at the same steps in every run, however often it was interrupted.
        """
        epoch = max((self.step - 1) // self.steps_per_epoch + 1, 1) if self.epochs else 0
        # Groups by index are cut for all classes of the data: a stage that knows only some has none.
        cuts = self.config.dataset.index_groups if len(self.counts) == self.num_data_classes else None

        results = {}
        for split in self.splits:
            scores, diversity = Scores(), Diversity()
            for part in self.fleet.call("evaluate", split):
                if part is not None:
                    scores.merge(Scores.from_state(part[0]))
                    diversity.merge(Diversity.from_state(part[1]))
            found = scores.result(self.counts, cuts, self.config.method.gives_probabilities(self.stage))
            results[split] = found | {"diversity": diversity.result(self.counts, cuts)}
            self.journal.append(self.stage, epoch, self.step, metrics_of(split, results[split]))
        self.journal.flush()

        if count and "val" in results and self.built[0]["observes"]:
            self.fleet.call("observe", results["val"]["members"]["ensemble"]["per_class"])

        evaluation = {
            "split": "test",
            "selected_on": self.select_on if self.epochs else None,  # there is one state: nothing to select from
            "selected_value": results[self.select_on]["members"]["ensemble"]["top1"]["all"],
            "stage": self.stage,
            "epoch": epoch,
            "step": self.step,
            **({"fitted": self.fitted} if self.fitted else {}),
            **results["test"],
        }
        self.last = {"step": self.step, "evaluation": evaluation}
        value = results[self.select_on]["members"]["ensemble"]["top1"]["all"]
        if count and (self.best is None or value > self.best["value"]):
            name = f"best-{self.checkpoints.name(self.stage, self.step)}"
            self.best = {"step": self.step, "value": value, "checkpoint": name, "evaluation": evaluation}
        self.console.evaluation(evaluation)

    def _save(self) -> None:
        """Let the workers copy what a checkpoint holds. It is written while training goes on."""
        self._writer.wait()  # the workers hold one copy
        counters = self.fleet.call("snapshot")[0]
        state = {"stage": self.stage, "total_steps": self.total_steps, **counters, "best": self.best, "last": self.last}
        self._writer.start(state)


def write_evaluations(folder: RunFolder, config: RunConfig, stage: str, state: dict[str, Any]) -> None:
    """Write the last and the best evaluation of a stage, as its newest checkpoint holds them.

    A stage that knows only some classes has a folder of its own: its numbers do not belong in the run's table. So has
    every final stage where there are several.
    """
    for below in folders_of_results(config, stage):
        folder.write_evaluation(f"{below}last", state["last"]["evaluation"])
        folder.write_evaluation(f"{below}best", (state["best"] or state["last"])["evaluation"])


def folders_of_results(config: RunConfig, stage: str) -> list[str]:
    """Return the folders below evaluation/ that the results of a stage belong in: "", "<stage>/" or both."""
    method = config.method
    folders = [] if method.stages[stage].classes is not None or stage in method.finals[:-1] else [""]
    if method.stages[stage].classes is not None or (stage in method.finals and len(method.finals) > 1):
        folders.append(f"{stage}/")
    return folders


def metrics_of(split: str, result: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of an evaluation by name. Groups without a class are left out."""
    values = {}
    for member, measured in result["members"].items():
        for group, top1 in measured["top1"].items():
            if top1 is not None:
                values[f"{split}/{member}/{group}/top1"] = top1
        for name in ("nll", "ece"):
            if measured[name] is not None:
                values[f"{split}/{member}/all/{name}"] = measured[name]
    for name, by_group in result["per_image"].items():
        values |= {f"{split}/ensemble/{group}/{name}": v for group, v in by_group.items() if v is not None}
    return values | {f"{split}/{name}": value for name, value in metrics(result["diversity"]).items()}


def _differences(marks: dict[str, float]) -> dict[str, float]:
    """Return the seconds between consecutive marks, and in all; 0 where the clock was set back."""
    names = list(marks)
    spans = {b: max(0.0, round(marks[b] - marks[a], 2)) for a, b in itertools.pairwise(names)}
    return spans | {"total": max(0.0, round(marks[names[-1]] - marks[names[0]], 2))}
