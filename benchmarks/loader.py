"""Measure how fast images are loaded from a JPEG tree, against torchvision's ImageFolder and a DataLoader.

    python benchmarks/loader.py ROOT OUT.json [--processes 0 1] [--images 10000] [--passes 5]

ROOT holds train/<class>/*.jpg and test/<class>/*.jpg of 32x32 images, as CIFAR-10's tree. Both sides do the same:
decode, RandomCrop with padding 4, mirror, scale, normalise, batches of 128; one torch thread per process. Passes
alternate between the sides, so that a change in the machine's speed affects all of them; medians are compared: images
per second of wall time, and images per second of processor time of the process and its loader processes (`per core`).
Our first resident epoch includes listing the tree and decoding its whole test set, which the others do before the
clock starts or not at all.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import torchvision
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

from experts.batches import StreamConfig, TrainBatches
from experts.data.config import DatasetConfig
from experts.data.dataset import open_dataset
from experts.samplers.instance_balanced import InstanceBalanced

BATCH_SIZE = 128
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def config(root: str, images: int, processes: int, resident: str) -> DatasetConfig:
    """Return the config of `images` images of the tree by the published selection, equally many of ten classes."""
    return DatasetConfig(
        name="jpeg tree",
        source="image_folder",
        root=root,
        max_per_class=images // 10,
        mean=MEAN,
        std=STD,
        augment={"crop_padding": 4, "horizontal_flip": 0.5},
        resident=resident,
        loader_processes=processes,
    )


def ours(root: str, images: int, processes: int, resident: str) -> TrainBatches:
    """Open our loader; if resident, decode everything first."""
    chosen = config(root, images, processes, resident)
    dataset = open_dataset(chosen)
    sampler = InstanceBalanced(InstanceBalanced.Config(), dataset.train.labels, dataset.num_classes)
    stream = StreamConfig(seed=0, stage="train", stream="main", epochs=1000, batch_size=BATCH_SIZE)
    return TrainBatches(dataset.train, sampler, chosen, stream)


def torchvisions(root: str, images: int, processes: int) -> DataLoader:
    """Make torchvision's usual loader over as many random images."""
    steps = [
        transforms.RandomCrop(32, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = torchvision.datasets.ImageFolder(str(Path(root) / "train"), transforms.Compose(steps))
    chosen = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))[:images].tolist()
    return DataLoader(
        Subset(folder, chosen), BATCH_SIZE, shuffle=True, num_workers=processes, persistent_workers=processes > 0
    )


def cpu_s() -> float:
    """Return the processor time of this process and its children so far, in seconds."""
    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])


def timed(batches: Callable[[], Iterator[Any]]) -> dict[str, float]:
    """Run one epoch and return images per second of wall time and of processor time."""
    gc.collect()
    cpu, wall, images = cpu_s(), time.perf_counter(), 0
    for batch in batches():
        images += len(batch[0] if isinstance(batch, list) else batch.images_B3HW)
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    return {"images_per_s": images / wall, "images_per_s_per_core": images / cpu}


def measure(root: str, images: int, processes: int, passes: int) -> dict[str, Any]:
    """Time every way of loading `passes` times, alternating."""
    streaming, usual = ours(root, images, processes, "never"), torchvisions(root, images, processes)
    resident = ours(root, images, processes, "always")
    epoch = 0  # the functions below read it when they are called

    def first_epoch() -> Iterator[Any]:
        yield from ours(root, images, processes, "always").iterate(1)

    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "torchvision": lambda: iter(usual),
        "ours streaming": lambda: streaming.iterate(epoch),
        "ours resident, first epoch with decoding": first_epoch,
        "ours resident, later epochs": lambda: resident.iterate(epoch),
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for epoch in range(1, passes + 2):  # the first pass warms file caches and processes up, and is not counted
        for name, way in ways.items():
            result = timed(way)
            if epoch > 1:
                results[name].append(result)
    streaming.close()

    medians = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in results.items()
    }
    ratios = {
        name: {key: value / medians["torchvision"][key] for key, value in median.items()}
        for name, median in medians.items()
    }
    return {"processes": processes, "medians": medians, "ratios to torchvision": ratios, "passes": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("out")
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = [measure(arguments.root, arguments.images, p, arguments.passes) for p in arguments.processes]
    made_by = {
        "images": arguments.images,
        "batch_size": BATCH_SIZE,
        "passes": arguments.passes,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "processors": psutil.cpu_count(),
    }
    Path(arguments.out).write_text(json.dumps({"made_by": made_by, "runs": runs}, indent=1) + "\n")
    for run in runs:
        print(f"loader processes: {run['processes']}")
        for name, median in run["medians"].items():
            ratio = run["ratios to torchvision"][name]
            print(
                f"  {name:42s} {median['images_per_s']:9.0f} images/s ({ratio['images_per_s']:5.2f}x)   per core "
                f"{median['images_per_s_per_core']:9.0f} ({ratio['images_per_s_per_core']:5.2f}x)"
            )


if __name__ == "__main__":
    main()
