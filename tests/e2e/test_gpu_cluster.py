"""Experts that live apart on GPUs: workers on Ray, with NCCL between them, give the numbers of one process.

A machine with fewer GPUs than workers lends its first one to all of them. NCCL refuses two processes on one GPU of one
host, so each says that it is a host of its own (NCCL_HOSTID), and they talk through sockets as hosts do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from datetime import datetime

import numpy as np
import pytest
import torch

from experts.data.dataset import open_dataset
from orchestration.cli import main
from orchestration.cluster.warm import end_kept, kept_warm
from orchestration.config.compose import load_config
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.trainer import StageTrainer
from tests import runs
from tests.e2e.test_placement import train_on
from tests.e2e.test_placement_systems import STEPS, SYSTEMS, train_here, words_of

ray = pytest.importorskip("ray")  # a GPU may be tried without it

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.xdist_group("gpus"),
]  # fmt: skip

WORKERS = 6  # the most that a test asks for
GPU = ["cluster.gpus_per_worker=1", "cluster.cpus_per_worker=1", "engine.threads=1"]
RIDE = [
    *GPU, "method=ride", "dataset=digits_lt", "dataset.image_size=8", "method.stages.train.batch_size=50",
    "method.stages.train.objective.reweight_epoch=1", "engine.precision=float64", "tracking.enabled=false",
]  # fmt: skip
PLACEMENTS = {
    "packed, DeepSpeed": ["engine.name=deepspeed"],
    "spread": ["cluster.workers=3", "engine.name=torch"],
    "spread, DeepSpeed": ["cluster.workers=3", "engine.name=deepspeed"],
    "two replicas of all": ["cluster.workers=2", "cluster.experts_per_worker=3", "engine.name=torch"],
    "3 x 2, ZeRO 2": ["cluster.workers=6", "engine.name=deepspeed", "engine.zero_stage=2"],
}
RUN = [
    *(word for word in runs.SMALL if "epochs" not in word), *GPU, "method.stages.train.epochs=60",
    "run.evaluate_every_epochs=20", "cluster.workers=3", "engine.deterministic=true", "engine.name=torch",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def gpus(tmp_path_factory):
    """Start a Ray with a GPU for each worker."""
    from orchestration.cluster.ray_internals import no_fixed_ports, own_code_in_workers

    if ray.is_initialized():
        pytest.skip("a Ray without these GPUs runs in this process: run this file alone")
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.device_count() < WORKERS:
            place = tmp_path_factory.mktemp("hosts")
            (place / "sitecustomize.py").write_text("import os\nos.environ['NCCL_HOSTID'] = str(os.getpid())\n")
            patch.setenv("PYTHONPATH", os.pathsep.join([str(place), *sys.path]))
            patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
        with no_fixed_ports(), own_code_in_workers():
            ray.init(
                address="local", num_cpus=2 * WORKERS, num_gpus=WORKERS, include_dashboard=False,
                object_store_memory=2**28, logging_level="ERROR", log_to_driver=False,
            )  # fmt: skip
        with kept_warm():
            yield
        ray.shutdown()


def assert_equal(found, expected):
    """Compare losses, weights, momentum and BatchNorm's statistics in float64."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-9)
    assert found[1].keys() == expected[1].keys()
    for name, values in expected[1].items():
        np.testing.assert_allclose(found[1][name], values, rtol=0, atol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Train RIDE in this process, on one GPU, without an exchange."""
    config = load_config([*RIDE, "engine.name=torch"])
    mesh = Mesh(mesh_shape(3, 1), device="cuda")
    return here(config, "train", mesh, tmp_path_factory.mktemp("ride"))


def here(config, stage, mesh, folder):
    trainer = StageTrainer(config, stage, open_dataset(config.dataset), mesh)
    with contextlib.closing(trainer):
        return train_here(trainer, folder)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_losses_weights_and_statistics_are_those_of_one_process(placement, together, tmp_path):
    assert_equal(train_on([*RIDE, *PLACEMENTS[placement]], tmp_path / "saved", "train", STEPS), together)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if load_config(words_of(name)).method.num_experts > 1])
def test_experts_that_learn_from_each_other_do_so_apart(name, tmp_path):
    """Every system and combination, spread, against one process; processes of one test serve the next."""
    stage, _ = SYSTEMS[name]
    words = [*(word for word in words_of(name) if not word.startswith("cluster.")), *GPU, "engine.name=torch"]
    config = load_config(words)
    experts = config.method.num_experts
    mesh = Mesh(mesh_shape(experts, 1), device="cuda")
    expected = here(config, stage, mesh, tmp_path)
    assert_equal(train_on([*words, f"cluster.workers={experts}"], tmp_path / "apart", stage, STEPS), expected)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Carry out a whole run on three GPUs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("calm") / "run"
    assert runs.train(folder, *GPU, common=RUN) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_whose_worker_is_lost_ends_with_the_same_bits(number, calm, tmp_path):
    """Killed, or stopped so that the others wait for it: losses, weights and scores are the same.

    cuDNN is held to algorithms that repeat.
    """
    folder = tmp_path / "run"
    process = runs.start(folder, "cluster.heartbeat_timeout_s=15", common=RUN)
    try:
        runs.wait_for_step(folder, 5)
        os.kill(run_json(folder)["workers"][1]["pid"], number)
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, output
    found = run_json(folder)
    assert found["failures"] == 1, output
    # The others hang, too: whose time is over first, that worker's or theirs, is open.
    messages = {signal.SIGKILL: "died", signal.SIGSTOP: "has not answered|has finished nothing"}
    assert re.search(messages[number], found["last_failure"]["what"]), output
    assert_same_run(folder, calm)


def test_a_stopped_run_goes_on_with_the_same_bits(calm, tmp_path):
    folder = tmp_path / "run"
    process = runs.start(folder, common=RUN)
    try:
        runs.wait_for_step(folder, 5)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert runs.train(folder, common=RUN) == 0
    assert_same_run(folder, calm)


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def assert_same_run(folder, calm):
    assert runs.points(folder) == runs.points(calm)
    assert runs.weights(folder) == runs.weights(calm)
    assert (folder / "evaluation" / "best.json").read_text() == (calm / "evaluation" / "best.json").read_text()


def test_a_finished_run_is_evaluated_where_it_has_a_gpu(calm, capsys):
    assert main(["evaluate", str(calm)]) == 0
    saved = json.loads((calm / "evaluation" / "last.json").read_text())["members"]["ensemble"]["top1"]["all"]
    assert f"{100 * saved:.2f}" in capsys.readouterr().out


def test_a_study_shares_the_gpus(tmp_path, capsys):
    """Runs of one worker each, side by side; the first GPU's memory is free again when all have ended."""
    end_kept()  # a study's runs have workers of their own
    time.sleep(3)  # until those that were kept have left the GPU
    before = used_mib()
    words = [
        "method=ce,ride", "seed=0,1", "dataset=digits_lt", *runs.SMALL, "cluster.gpus_per_worker=1",
        "engine.name=torch", "study.name=gpus", f"run.dir={tmp_path}",
    ]  # fmt: skip
    assert main(["study", *words]) == 0, capsys.readouterr()
    records = json.loads((tmp_path / "gpus" / "study.json").read_text())["points"]
    assert [record["status"] for record in records] == ["finished"] * 4
    assert (tmp_path / "gpus" / "report").is_dir()
    times = [run_json(tmp_path / "gpus" / record["run"]) for record in records]
    assert max(time_s(one["created"]) for one in times[:2]) < min(one["ended"] for one in times), "side by side"
    for record in records:
        workers = run_json(tmp_path / "gpus" / record["run"])["workers"]
        assert all(worker["device"] != "cpu" for worker in workers), workers
    with contextlib.suppress(TimeoutError):
        runs.wait_until(lambda: used_mib() < before + 200, "free memory", 30)
    assert used_mib() < before + 200


def time_s(created):
    return datetime.fromisoformat(created).timestamp()


def used_mib():
    """Return the memory of the first GPU that is taken, MiB."""
    free, total = torch.cuda.mem_get_info(0)
    return (total - free) / 2**20


def test_the_doctor_finds_the_gpus(capsys):
    address = ray.get_runtime_context().gcs_address
    main(["doctor", *RIDE, "cluster.workers=3", f"cluster.address={address}"])  # what else it finds is of the machine
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.split()[1:2] == ["gpus"]]
    assert line.startswith("ok"), said


def test_placements_are_timed_on_gpus(capsys):
    assert main(["plan", "--probe", *RIDE, "cluster.workers=3"]) == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert "NCCL" in said and "n/a: nothing was run" not in said


def test_a_gpu_that_is_not_there_is_refused(tmp_path, capsys):
    begun = time.monotonic()
    assert main(["train", *RIDE, f"cluster.workers={3 * WORKERS}", f"run.dir={tmp_path}"]) == 1
    assert "GPU" in capsys.readouterr().err
    assert time.monotonic() - begun < 30
