"""Measure training, evaluation and checkpoints on one GPU. About 4 minutes; Ray is needed for `cli` alone.

    DS_ACCELERATOR=cuda python benchmarks/gpu.py [--only SECTION ...] [--out benchmarks/results/gpu.json]
    DS_ACCELERATOR=cuda python benchmarks/gpu.py --only whole cli [--precision autocast] [--epochs 200] [--compile]

RIDE-3, ResNet-32, batch 128, on images of the form of CIFAR-100-LT at ratio 100 (10,847 for training, 10,000 for the
test), made up so that a network can learn them. Each side is the product's own `StageTrainer`:
  bare        a bare PyTorch loop of the same network and loss on batches that are made already
  plain       the plain engine in float32, in TF32 and with autocast, each with graphs and without
  deepspeed   ZeRO 1 with one worker
  epochs      some epochs, the test scored after each, with either engine
  whole       a whole run of --epochs epochs in --precision, the test scored after each (only if asked for)
  cli         the same by `expertail train`: Ray, one worker, checkpoints, a report (only if asked for)
--device cpu --tiny tries the script on a CPU. What holds a GPU to a CPU's numbers is tests/contract/test_gpu.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aggregation.metrics import Scores
from experts.augmentation.stack import Stack
from experts.data.dataset import Dataset, open_dataset
from experts.data.keyed_random import uniforms
from experts.ensemble import build_ensemble
from experts.objective import StepContext
from experts.progress import Progress
from experts.registry import build
from orchestration.config.compose import load_config
from orchestration.config.run_config import RunConfig
from orchestration.training.mesh import Mesh, mesh_shape
from orchestration.training.precision import use_precision
from orchestration.training.trainer import StageTrainer
from orchestration.training.world import Rendezvous, leave_world

NUM_CLASSES = 100
WARM_UP = 5  # steps before those that are timed
BLOCKS = 3  # of timed steps; the median is shown
PRECISIONS = ("float32", "tf32", "autocast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "gpu.json"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS, *OF_A_RUN], default=list(SECTIONS))
    parser.add_argument("--precision", default="autocast", choices=PRECISIONS)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--compile", action="store_true", help="the network of the whole run")
    options = parser.parse_args()
    record = {"command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), **machine(options.device)}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), **({"per_class": 20, "test": 300} if options.tiny else {}))
        bench = Bench(options.device, options.tiny, folder)
        for name in options.only:
            try:  # a section that fails is a finding, and the device's time is short
                record[name] = OF_A_RUN[name](bench, options) if name in OF_A_RUN else SECTIONS[name](bench)
            except Exception as problem:
                record[name] = {"failed": f"{type(problem).__name__}: {problem}"[:2000]}
            print(json.dumps({name: record[name]}), flush=True)
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


def machine(device: str) -> dict[str, Any]:
    """Return the date, the device and the libraries."""
    found = {"date": str(datetime.date.today()), "torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cpu":
        return {**found, "device": "cpu", "cpus": os.cpu_count()}
    card = torch.cuda.get_device_properties(0)
    return {**found, "device": card.name, "gib": round(card.total_memory / 2**30, 1), "cpus": os.cpu_count()}


def write_images(folder: Path, *, per_class: int = 500, test: int = 10_000) -> None:
    """Write cifar-100-binary: each class has a pattern of its own, under noise."""
    place = folder / "cifar-100-binary"
    place.mkdir()
    draws = np.random.default_rng(0)
    patterns = draws.integers(60, 196, (NUM_CLASSES, 3, 4, 4), dtype=np.int16)
    for name, images in (("train", per_class * NUM_CLASSES), ("test", test)):
        rows = np.zeros((images, 2 + 3 * 32 * 32), np.uint8)
        rows[:, 1] = labels = np.arange(images) % NUM_CLASSES
        smooth = patterns[labels].repeat(8, axis=2).repeat(8, axis=3).reshape(images, -1)
        rows[:, 2:] = np.clip(smooth + draws.integers(-48, 49, smooth.shape, dtype=np.int16), 0, 255)
        rows.tofile(place / f"{name}.bin")
    (place / "fine_label_names.txt").write_text("".join(f"class{i}\n" for i in range(NUM_CLASSES)))


@dataclass
class Bench:
    """The device and the data of all sections."""

    device: str
    tiny: bool
    root: str

    def words(self, gpus: int = 1) -> list[str]:
        """Return what makes a run RIDE-3 on these images."""
        common = ["method=ride", "dataset=cifar100_lt", f"dataset.root={self.root}", "engine.name=torch"]
        if self.tiny:
            common += ["backbone=resnet8", "method.stages.train.batch_size=16", "dataset.max_per_class=20",
                       "dataset.imbalance_ratio=10"]  # fmt: skip
        return [*common, f"cluster.gpus_per_worker={gpus}"]

    def config(self, *words: str) -> RunConfig:
        """Return the config of RIDE-3 with some keys changed."""
        return load_config([*self.words(), *words])

    def trainer(self, *words: str) -> StageTrainer:
        """Return a new trainer."""
        config = self.config(*words)
        return StageTrainer(config, "train", self.dataset(config), Mesh(mesh_shape(3, 1), device=self.device))

    def dataset(self, config: RunConfig) -> Dataset:
        """Open the data."""
        return open_dataset(config.dataset)

    def timed(self, work: Callable[[int], object], steps: int, images: int, blocks: int = BLOCKS) -> dict[str, Any]:
        """Time blocks of steps; milliseconds of one step, and images per second."""
        steps, blocks = (3, 2) if self.tiny else (steps, blocks)
        took = []
        for _ in range(blocks):
            self.wait()
            start = time.perf_counter()
            work(steps)
            self.wait()
            took.append(1000 * (time.perf_counter() - start) / steps)
        ms = statistics.median(took)
        spread = {"ms_lowest": round(min(took), 3), "ms_highest": round(max(took), 3)}
        return {"ms": round(ms, 3), **spread, "images_per_s": round(1000 * images / ms)}

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def memory(self, into: dict[str, Any]) -> Iterator[None]:
        """Note the most memory of the device that a block takes."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device == "cuda":
            into["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)

    def launches(self, step: Callable[[], object]) -> dict[str, Any]:
        """Count the kernels of a step and the waits of the host, and sum the kernels' own time."""
        if self.device == "cpu":
            return {}
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            step()
            self.wait()
        events = list(seen.events())
        ran = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in ran)
        waits = sum(e.name.endswith("Synchronize") for e in events) - 1  # one is ours
        device_ms = round(sum(e.time_range.elapsed_us() for e in ran) / 1000, 3)
        return {"kernels": len(ran) - copies, "copies": copies, "waits": waits, "device_ms": device_ms}


def take(trainer: StageTrainer, steps: int) -> list[float]:
    """Take steps, over the ends of epochs; return their losses."""
    losses: list[float] = []
    while len(losses) < steps:
        room = trainer.setup.steps_per_epoch - trainer.done % trainer.setup.steps_per_epoch
        losses += trainer.train(trainer.done + min(room, steps - len(losses))).losses
    return losses


def bare(bench: Bench) -> dict[str, Any]:
    """Time the least that trains the same network: its modules, the loss, torch's SGD, each loss read at once."""
    config = bench.config()
    dataset, stage = bench.dataset(config), config.method.stages["train"]
    device, now = torch.device(bench.device), Progress(1, 200)
    model = build_ensemble(config.ensemble("train", dataset.num_classes), seed=0).to(device).train()
    objective = build("objective", stage.objective, torch.from_numpy(dataset.counts_C), 3).to(device, torch.float32)
    batch = stage.batch_size
    assert batch is not None
    order = np.random.default_rng(0).permutation(len(dataset.train.labels))[: 8 * batch]
    raw = dataset.train.to(device).take(order)  # type: ignore[union-attr]
    stack = Stack.of(config.dataset)
    images = stack(raw, stack.draw(lambda _, width: uniforms(1, 0, len(order), width)))
    labels = torch.from_numpy(dataset.train.labels[order]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    use_precision(config.engine, device)

    def run(steps: int) -> None:
        for n in range(steps):
            part = slice(n % 8 * batch, (n % 8 + 1) * batch)
            context = StepContext(objective.denominators(labels[part], now), now)
            loss, _ = objective(model(images[part]), labels[part], context)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()

    run(WARM_UP)
    return {**bench.timed(run, 40, batch), "step": bench.launches(lambda: run(1))}


def plain(bench: Bench) -> dict[str, Any]:
    """Time steps with the plain engine, in each precision with and without graphs; the rest of an epoch in float32."""
    found = {}
    for precision in PRECISIONS:
        for graphs in ("auto", "false"):
            entry: dict[str, Any] = {}
            with bench.memory(entry):
                trainer = bench.trainer(f"engine.precision={precision}", f"engine.graphs={graphs}")
                entry |= steps_of(bench, trainer)
            if precision == "float32" and graphs == "auto":
                entry["evaluation"] = evaluations(bench, trainer)
                bench.wait()
                start = time.perf_counter()
                trainer.take_snapshot()
                entry["checkpoint_copy_ms"] = round(1000 * (time.perf_counter() - start), 1)
            trainer.close()
            found[f"{precision}, graphs={graphs}"] = entry
    return found


def steps_of(bench: Bench, trainer: StageTrainer) -> dict[str, Any]:
    """Time the steps of a trainer and look at one."""
    batch = trainer.setup.stage.batch_size
    assert batch is not None
    take(trainer, WARM_UP)
    timing = bench.timed(lambda steps: take(trainer, steps), 85, batch)
    return {**timing, "step": bench.launches(lambda: take(trainer, 1))}


def evaluations(bench: Bench, trainer: StageTrainer) -> dict[str, Any]:
    """Time passes over the test, by images per batch."""
    found = {}
    config, images = trainer.setup.config, len(trainer.setup.dataset.test)
    for size in (256, 2000):
        run = config.run.model_copy(update={"evaluation_batch_size": size})
        trainer.setup.config = config.model_copy(update={"run": run})
        trainer.evaluate("test")
        found[f"batch_{size}"] = bench.timed(lambda _: trainer.evaluate("test"), 1, images)
    return found


@contextlib.contextmanager
def world(device: str) -> Iterator[None]:
    """Join a torch world of this process alone, which DeepSpeed needs."""
    Rendezvous("127.0.0.1", 1, host_here=True).join(0, 1, gpu=device == "cuda", timeout_s=60)
    try:
        yield
    finally:
        leave_world()


def deepspeed(bench: Bench) -> dict[str, Any]:
    """Time steps with DeepSpeed in float32."""
    entry: dict[str, Any] = {}
    with world(bench.device), bench.memory(entry):
        trainer = bench.trainer("engine.name=deepspeed")
        entry |= steps_of(bench, trainer)
        trainer.close()
    return entry


def epochs(bench: Bench) -> dict[str, Any]:
    """Train some epochs and score the test after each, with either engine."""
    found = {}
    for engine, count in (("torch", 8), ("deepspeed", 3)):
        with world(bench.device):
            found[engine] = trained(bench.trainer(f"engine.name={engine}"), 2 if bench.tiny else count)
    return found


def whole(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Train a whole run and score the test after each epoch."""
    start, count = time.perf_counter(), options.epochs
    words = (f"engine.precision={options.precision}", f"engine.compile={str(options.compile).lower()}")
    trainer = bench.trainer(*words, f"method.stages.train.epochs={count}")
    images, built = count * trainer.setup.batches.draws_per_epoch, time.perf_counter()  # type: ignore[attr-defined]
    found = trained(trainer, count)
    took = time.perf_counter() - built
    found |= {"words": words, "epochs": count, "built_s": round(built - start, 2), "s": round(took, 2)}
    return found | {"images_per_s_evaluation_included": round(images / took)}


def cli(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Carry out a whole run as users do: `expertail train`, the test scored after each epoch, a report at its end."""
    words = [
        *bench.words(gpus=int(bench.device == "cuda")), f"engine.precision={options.precision}",
        f"engine.compile={str(options.compile).lower()}", f"method.stages.train.epochs={options.epochs}",
        "run.evaluate_every_epochs=1", "tracking.enabled=false", f"run.dir={bench.root}", "run.name=cli",
    ]  # fmt: skip
    start = time.perf_counter()
    command = [sys.executable, "-m", "orchestration", "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    run = json.loads((Path(bench.root) / "cli" / "run.json").read_text())
    return {"s": round(took, 1), "startup_s": run["startup_s"], "cost": run["cost"], "workers": run["workers"],
            "last_lines": done.stderr.splitlines()[-4:-1]}  # fmt: skip


def trained(trainer: StageTrainer, count: int) -> dict[str, Any]:
    """Train epochs, score the test after each, and close the trainer."""
    seconds: list[tuple[float, float]] = []
    losses, top1 = [], []
    for _ in range(count):
        start = time.perf_counter()
        losses.append(trainer.train(trainer.done + trainer.setup.steps_per_epoch).epoch_means["loss"])
        middle = time.perf_counter()
        states = trainer.evaluate("test")
        assert states is not None
        scores = Scores.from_state(states[0]).result(trainer.setup.dataset.counts_C.tolist(), None)
        top1.append(scores["members"]["ensemble"]["top1"]["all"])
        seconds.append((middle - start, time.perf_counter() - middle))
    trainer.close()
    training_s, scoring_s = (round(statistics.median(times), 3) for times in zip(*seconds[1:], strict=True))
    return {
        "training_s": training_s, "scoring_s": scoring_s, "loss_by_epoch": losses, "test_top1_by_epoch": top1,
        "predicted_s_for_200_epochs": round(200 * (training_s + scoring_s)),
    }  # fmt: skip


SECTIONS = {"bare": bare, "plain": plain, "deepspeed": deepspeed, "epochs": epochs}
OF_A_RUN = {"whole": whole, "cli": cli}


if __name__ == "__main__":
    main()
