"""Runs over several seeds: who trains what and when, and what is read of them."""

from __future__ import annotations

import json
import threading
import time

import pytest

from benchmarks import seeds
from benchmarks.seeds import (
    Job,
    _claim,
    _work_through,
    accuracies,
    evaluation,
    is_finished,
    mean_and_spread,
    percent,
    wait_for_others,
)

JOBS = [Job(f"fashion-ce-s{seed}", (f"seed={seed}",)) for seed in range(6)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(seeds, "_LOOK_S", 0.002)
    monkeypatch.setattr(seeds, "_REST_S", 0.01)


class Trainings:
    """Stands for training: notes each job and how many trained at once."""

    def __init__(self):
        self.lock, self.at_once, self.most, self.names = threading.Lock(), 0, 0, []

    def __call__(self, runs, job):
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.names.append(job.name)
        time.sleep(0.02)
        finish(runs / job.name)
        with self.lock:
            self.at_once -= 1


def finish(folder, status="finished"):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"status": status}))


def started(runs, trainings, commands=1):
    """Start so many commands with two workers each on one folder."""
    workers = [
        threading.Thread(target=_work_through, args=(runs, JOBS, 2, trainings), daemon=True)
        for _ in range(2 * commands)
    ]
    for worker in workers:
        worker.start()
    return workers


def test_a_wave_ends_when_nobody_trains_one_of_its_jobs(tmp_path):
    held, free = threading.Event(), threading.Event()

    def another_command():
        with _claim(tmp_path / f"{JOBS[0].name}.lock") as mine:
            assert mine
            held.set()
            free.wait(20)

    threading.Thread(target=another_command, daemon=True).start()
    held.wait(20)
    waiting = threading.Thread(target=wait_for_others, args=(tmp_path, JOBS), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    free.set()
    waiting.join(20)
    assert not waiting.is_alive()


def test_a_job_that_did_not_finish_is_named(tmp_path, monkeypatch):
    class NoProcess:
        def __init__(self, **_):
            self.start = self.join = lambda: None

    monkeypatch.setattr(seeds.mp, "Process", NoProcess)
    finish(tmp_path / JOBS[0].name)
    finish(tmp_path / JOBS[1].name, "failed")
    with pytest.raises(SystemExit, match=f"not finished: {JOBS[1].name};"):
        seeds.train_all(tmp_path, JOBS[:2])


def test_two_commands_on_a_folder_train_each_job_once_and_two_at_a_time(tmp_path):
    trainings = Trainings()
    for worker in started(tmp_path, trainings, commands=2):
        worker.join(20)
    assert sorted(trainings.names) == [job.name for job in JOBS]
    assert trainings.most == 2


def test_a_finished_run_is_not_repeated_and_a_stopped_one_is(tmp_path):
    finish(tmp_path / JOBS[0].name)
    (tmp_path / JOBS[1].name).mkdir()
    (tmp_path / JOBS[1].name / "run.json").write_text('{"status": "stopped"}')
    assert is_finished(tmp_path / JOBS[0].name) and not is_finished(tmp_path / JOBS[1].name)
    found = []
    _work_through(tmp_path, JOBS[:2], 2, lambda runs, job: found.append(job.name))
    assert found == [JOBS[1].name]


def test_no_run_starts_during_a_pause(tmp_path):
    pause, trainings = tmp_path / "PAUSE", Trainings()
    pause.touch()
    workers = started(tmp_path, trainings)
    time.sleep(0.1)
    assert not trainings.names
    pause.unlink()
    for worker in workers:
        worker.join(20)
    assert len(trainings.names) == len(JOBS)


def test_mean_and_sample_deviation_by_hand():
    assert mean_and_spread([0.1, 0.3, None]) == (pytest.approx(0.2), pytest.approx(0.02**0.5))
    assert mean_and_spread([0.4]) == (0.4, None)
    assert mean_and_spread([None]) == (None, None)
    assert [percent(0.5), percent(0.5, 0.0125), percent(None, 0.1)] == ["50.0", "50.0 ± 1.2", "n/a"]


def test_accuracies_are_those_of_the_stage_asked_for(tmp_path):
    for place, value in (("evaluation", 0.1), ("evaluation/crt", 0.2)):
        (tmp_path / place).mkdir()
        top1 = dict.fromkeys(seeds.GROUPS, value)
        (tmp_path / place / "last.json").write_text(json.dumps({"members": {"ensemble": {"top1": top1}}}))
    found = accuracies([evaluation(tmp_path), evaluation(tmp_path, "crt")])
    assert found == {group: [0.1, 0.2] for group in seeds.GROUPS}
