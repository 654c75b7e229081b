"""One stage of a run on a started fleet: intervals of steps, evaluations, checkpoints, what the journal notes.

The driver decides when; workers decide what. Everything written here can be written again after a crash: a resumed
stage drops journal lines after its checkpoint and takes the same steps.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

from aggregation.diversity import Diversity, metrics
from aggregation.metrics import Scores, groups_by_count, groups_by_index
from orchestration.cluster.fleet import Fleet
from orchestration.cluster.preemption import Drained, Preempted
from orchestration.cluster.transfer import Sent, receive_saved, send
from orchestration.config.recipe import stage_classes
from orchestration.config.run_config import RunConfig
from orchestration.runs.console import Console
from orchestration.runs.pause import Pause
from orchestration.runs.run import Run
from orchestration.runs.stopping import GivenUp, Outcome, Stopped
from orchestration.storage.checkpoint import Checkpoint, DamagedCheckpoint, verify
from orchestration.storage.exports import weights_of
from orchestration.storage.run_folder import RunFolder
from orchestration.training.trainer import Interval

_INTERVAL_S = 1.0  # how often the driver hears from training


class StageRun:
    """One stage on a started fleet, from its newest checkpoint or from its beginning.

    Args:
        run: what it belongs to.
        stage: its name.
        fleet: started.
        console: told what happens.
        before: optimiser steps of the stages that came before.
        pause: since a loss, if there was one; ends with the first step.
    """

    def __init__(
        self, run: Run, stage: str, fleet: Fleet, console: Console, *, before: int = 0, pause: Pause | None = None
    ) -> None:
        self.run, self.stage, self.fleet, self.console, self._pause = run, stage, fleet, console, pause
        self.journal, self.config, self.folder, self.checkpoints = run.journal, run.config, run.folder, run.checkpoints
        settings = self.config.method.stages[stage]
        self.epochs = settings.epochs
        newest = self.checkpoints.newest(stage, console.message)
        self.journal.rewind({stage: newest.state["step"] if newest else 0}, self.checkpoints.stages)
        teachers = {name: self._send(run.model(teacher)) for name, teacher in settings.teachers.items()}
        self.seen = self.fleet.build(stage, teachers)
        run.marks.setdefault("built", time.time())
        if pause is not None:
            pause.mark("built")
        data = self._note_data()
        self.data_classes = len(data["counts"])
        self.counts = [data["counts"][c] for c in stage_classes(self.config.method, stage, data["counts"])]
        run.begin_tracking()
        self.before = before
        self.steps_per_epoch: int = self.seen[0]["steps_per_epoch"]
        self.total_steps = self.epochs * self.steps_per_epoch
        self.splits = ["val", "test"] if self.seen[0]["has_val"] else ["test"]
        select = self.config.run.select_on
        if select == "val" and "val" not in self.splits:
            raise ValueError(
                "run.select_on = val: this dataset has no validation split; set dataset.val_per_class (cut from the "
                "training pool), dataset.val_list, or run.select_on=test"
            )
        self.select_on = self.splits[0] if select == "auto" else select
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self._epoch_images, self._epoch_seconds = 0, 0.0
        self._pace = 0.0  # steps per second, as last seen
        if newest:
            self._go_on_from(newest)
        else:
            self._begin()
        if pause is not None:
            pause.mark("loaded")

    def _send(self, folder: Path) -> str | Sent:
        return send(folder, shared=self.folder.shared)

    def _begin(self) -> None:
        """The first weights of the stage, and what its objective must see before the first step."""
        source = self.config.method.starts_from(self.stage)
        if source is not None and source.stage is not None:
            weights = weights_of(self.checkpoints, source)
            self.fleet.call("start_from", self._send(weights))
            self.console.message(f"stage {self.stage} begins with the weights of {weights.name}")
        elif source is not None:
            model = self.run.model(source)
            self.fleet.call("start_from_model", self._send(model))
            self.console.message(f"stage {self.stage} begins with the weights of {model}")
        if self.seen[0]["prepares"]:
            self.console.message(f"stage {self.stage}: looking at the data with the teachers, once")
            self.fleet.call("prepare")

    def _note_data(self) -> dict[str, Any]:
        seen = self.seen[0]
        other = next((rank for rank, worker in enumerate(self.seen) if worker["digest"] != seen["digest"]), None)
        if other is not None:
            hosts = [f"worker {rank} on {self.fleet.hosts[rank]['node']}" for rank in (0, other)]
            raise ValueError(
                f"dataset.root = {self.config.dataset.root}: {' and '.join(hosts)} see other files there (digests "
                f"{seen['digest'][:12]} and {self.seen[other]['digest'][:12]}); needed the same on every node; copy "
                f"them, or put them on storage that all nodes share"
            )
        if left_out := self.fleet.left_out:
            first = left_out[0]
            self.run.message_once(
                f"dataset.quarantine = {self.config.dataset.quarantine}: {len(left_out)} training "
                f"image{'s' if len(left_out) > 1 else ''} cannot be read and {'are' if len(left_out) > 1 else 'is'} "
                f"left out, first {first['path']} ({first['reason']}); data.json has all"
            )
        cuts = self.config.dataset.index_groups

        def plain(groups: dict[str, Any]) -> dict[str, list[int]]:
            return {name: ids.tolist() for name, ids in groups.items()}

        data = {
            "dataset": self.config.dataset.name,
            "class_names": seen["class_names"],
            "counts": seen["counts"],
            "total": sum(seen["counts"]),
            "digest": seen["digest"],
            "image_shape": seen["image_shape"],
            "left_out": self.fleet.left_out or [],
            "groups": {
                "by_count": plain(groups_by_count(seen["counts"])),
                "by_index": plain(groups_by_index(seen["counts"], cuts)) if cuts else None,
            },
        }
        self.folder.write_data(data)
        return data

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        kept = self._send(checkpoint.folder)
        self.fleet.call("load", kept, {"step": state["step"], "sums": state["sums"]})
        self.step, self.best, self.last = state["step"], state["best"], state["last"]
        if self.best and self.best["step"] == self.step:
            self.checkpoints.copy_weights(checkpoint.folder, self.best["checkpoint"])  # may have been cut off
        elif self.best:
            try:
                verify(self.checkpoints.folder / self.best["checkpoint"])
            except DamagedCheckpoint as problem:
                raise ValueError(
                    f"{problem}: the weights of the best evaluation (step {self.best['step']}) are damaged; needed "
                    f"them whole; restore them from a copy, or remove {self.checkpoints.folder} to train anew"
                ) from problem
        self.console.message(
            f"going on from {checkpoint.folder.name}: step {self.step} of {self.total_steps}, "
            f"epoch {min(self.step // self.steps_per_epoch + 1, self.epochs)} of {self.epochs}"
        )

    @property
    def target(self) -> int:
        """The step this start trains to."""
        limit = self.config.run.max_steps
        return self.total_steps if limit is None else min(max(limit - self.before, 0), self.total_steps)

    def take(self, steps: int) -> None:
        """Train this many steps, with everything that is due on the way."""
        target = self.step + steps
        while self.step < target:
            self._advance(target)

    def carry_out(self) -> Outcome:
        """Train to the target and make sure that the end is evaluated and saved."""
        self.take(self.target - self.step)
        if self.last is None or self.last["step"] != self.step:
            self._evaluate(count=False)
            self._save()
        write_evaluations(self.folder, self.config, self.stage, {"best": self.best, "last": self.last})
        self.run.cost.note(peak_memory_gib=[round(gib, 2) for gib in self.fleet.call("peak_memory_gib")])
        newest = self.checkpoints.newest(self.stage, self.console.message)
        assert newest is not None
        return Outcome(self.stage, self.step >= self.total_steps, self.total_steps, newest.folder)

    def _advance(self, target: int) -> None:
        """Train one interval, note it, and do what is due at its end."""
        until = self._next_stop(target)
        first, before = self.step, time.monotonic()
        interval: Interval = self.fleet.call("train", until)[0]
        self.step = until
        if self._pause is not None:
            self._pause.mark("first step")
            self.run.record_recovery(self.stage, self._pause.spans(), max(0, self._pause.step - first))
            self._pause.over, self._pause = True, None
        self._pace = (until - first) / (time.monotonic() - before)
        self._note(first, interval)
        every = self.config.run.checkpoint_every_steps
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        evaluated = rest == 0 and (epoch % self.config.run.evaluate_every_epochs == 0 or epoch == self.epochs)
        if evaluated:
            self._evaluate(count=True)
        stop, given_up = self.run.signals.received, self.run.signals.given_up.is_set()
        drained = self.run.drains.among([*self.fleet.node_ids, self.run.drains.own_node]) if self.step < target else []
        if evaluated or self.step % every == 0 or stop is not None or given_up or drained:
            self._save()
        if given_up and stop is None:
            raise GivenUp(f"stage {self.stage} stopped after step {self.step}")
        if stop is not None:
            raise Stopped(
                stop,
                f"stopped after step {self.step} of {self.total_steps} of stage {self.stage}; the same command "
                f"continues from there",
            )
        if self.run.drains.own_node in drained:
            raise Preempted(
                f"the node of this command is being taken away; stopped after step {self.step} of {self.total_steps} "
                f"of stage {self.stage}, with a checkpoint; the same command continues from there"
            )
        if drained:
            nodes = sorted({h["node"] for h in self.fleet.hosts if h["node_id"] in drained})
            raise Drained(f"{', '.join(nodes)} will be taken away; checkpoint written after step {self.step}")

    def _next_stop(self, target: int) -> int:
        """The step of the next thing to do, at most an interval away."""
        every = self.config.run.checkpoint_every_steps
        due = min(
            target,
            (self.step // self.steps_per_epoch + 1) * self.steps_per_epoch,
            (self.step // every + 1) * every,
        )
        return min(due, self.step + max(1, int(self._pace * _INTERVAL_S)))

    def _note(self, first: int, interval: Interval) -> None:
        if "first_step" not in self.run.marks:
            self.run.marks["first_step"] = time.time()
            self.folder.note(startup_s=_differences(self.run.marks))
        for step, loss in enumerate(interval.losses, first + 1):
            self.journal.append(self.stage, (step - 1) // self.steps_per_epoch + 1, step, {"train/loss": loss})
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
        shown = {"loss": interval.losses[-1], "lr": interval.lr, "images/s": speed, **interval.terms}
        self.console.step(epoch, self.epochs, self.step, self.target, shown)

    def _evaluate(self, *, count: bool) -> None:
        """Score all splits. `count`: whether this may become the best and objectives may learn of it; those must come
        at the same steps in every run."""
        epoch = max((self.step - 1) // self.steps_per_epoch + 1, 1)
        cuts = self.config.dataset.index_groups if len(self.counts) == self.data_classes else None
        results = {}
        for split in self.splits:
            scores, diversity = Scores(), Diversity()
            for part in self.fleet.call("evaluate", split):
                if part is not None:
                    scores.merge(Scores.from_state(part[0]))
                    diversity.merge(Diversity.from_state(part[1]))
            results[split] = scores.result(self.counts, cuts) | {"diversity": diversity.result(self.counts, cuts)}
            self.journal.append(self.stage, epoch, self.step, _metrics(split, results[split]))
        self.journal.flush()
        if count and "val" in results and self.seen[0]["observes"]:
            self.fleet.call("observe", results["val"]["members"]["ensemble"]["per_class"])
        evaluation = {
            "split": "test",
            "selected_on": self.select_on,
            "selected_value": results[self.select_on]["members"]["ensemble"]["top1"]["all"],
            "stage": self.stage,
            "epoch": epoch,
            "step": self.step,
            **results["test"],
        }
        self.last = {"step": self.step, "evaluation": evaluation}
        value = results[self.select_on]["members"]["ensemble"]["top1"]["all"]
        if count and (self.best is None or value > self.best["value"]):
            name = f"best-{self.checkpoints.name(self.stage, self.step)}"
            self.best = {"step": self.step, "value": value, "checkpoint": name, "evaluation": evaluation}
        self.console.evaluation(evaluation)

    def _save(self) -> None:
        """Write a checkpoint; when the evaluation just made is the best, keep its weights apart as well."""
        self.journal.flush(sync=True)
        writing = self.checkpoints.begin()
        answers = self.fleet.call("save", str(writing) if self.folder.shared else None)
        entries = receive_saved(answers, writing)
        state = {
            "stage": self.stage,
            "total_steps": self.total_steps,
            **answers[0][1],
            "best": self.best,
            "last": self.last,
        }
        folder = self.checkpoints.complete(writing, self.checkpoints.name(self.stage, self.step), entries, state)
        if self.best and self.best["step"] == self.step:
            self.checkpoints.copy_weights(folder, self.best["checkpoint"])
        self.checkpoints.tidy(self.stage, self.config.run.keep_checkpoints)
        self.run.cost.note()
        self.folder.announce_checkpoint()


def write_evaluations(folder: RunFolder, config: RunConfig, stage: str, state: dict[str, Any]) -> None:
    """Write the last and the best evaluation of a stage, as its newest checkpoint holds them.

    A stage that knows only some classes has no place in the run's table; it has a folder of its own.
    """
    below = "" if config.method.stages[stage].classes is None else f"{stage}/"
    folder.write_evaluation(f"{below}last", state["last"]["evaluation"])
    folder.write_evaluation(f"{below}best", (state["best"] or state["last"])["evaluation"])


def _metrics(split: str, result: dict[str, Any]) -> dict[str, float]:
    """Metric names and values of an evaluation; groups without a class are left out."""
    values = {}
    for member, measured in result["members"].items():
        for group, top1 in measured["top1"].items():
            if top1 is not None:
                values[f"{split}/{member}/{group}/top1"] = top1
        for name in ("nll", "ece"):
            values[f"{split}/{member}/all/{name}"] = measured[name]
    for name, by_group in result["per_image"].items():
        values |= {f"{split}/ensemble/{group}/{name}": v for group, v in by_group.items() if v is not None}
    return values | {f"{split}/{name}": value for name, value in metrics(result["diversity"]).items()}


def _differences(marks: dict[str, float]) -> dict[str, float]:
    """Seconds between consecutive marks, and in all; 0 where the clock was set back."""
    names = list(marks)
    spans = {b: max(0.0, round(marks[b] - marks[a], 2)) for a, b in itertools.pairwise(names)}
    return spans | {"total": max(0.0, round(marks[names[-1]] - marks[names[0]], 2))}
