"""The Ray actor: a thin shell round `StageTrainer`. One actor is one worker of a mesh; it can serve many in turn."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from orchestration.cluster.hangs import own_stacks
from orchestration.cluster.reachability import answering, open_door
from orchestration.cluster.transfer import Sent, received, save_to_send


@dataclass(frozen=True)
class Seat:
    """A worker's place in a mesh, as plain data.

    Attributes:
        rank: in the torch world.
        num_experts, experts_per_worker, replicas: the mesh's shape.
        address, port: where the worker with rank 0 opened the world.
        timeout_s: how long an exchange may wait for a partner.
    """

    rank: int
    num_experts: int
    experts_per_worker: int
    replicas: int
    address: str
    port: int
    timeout_s: float


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed, up to 32 MiB an allocation, for the next step; elsewhere, nothing.

    By default it gives activations back to the system in every backward pass and takes them again in the next forward
    pass: 25,000 page faults and 4 to 6 % of a step of RIDE on a ResNet-32, and as many as the heap happens to lie.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26), (_M_MMAP_THRESHOLD, 2**25)):
            mallopt(parameter, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


@ray.remote(concurrency_groups={"watch": 1})  # type: ignore[call-overload]
class Worker:
    """Holds some experts of an ensemble and trains them in step with the other workers."""

    def __init__(self, *, gpu: bool, threads: int) -> None:
        self.gpu, self.threads = gpu, threads
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch loads, in `load_libraries`
        self.trainer: Any = None
        self._rendezvous: Any = None
        self._door: Any = None
        self._dataset: tuple[Any, Any] | None = None
        self._beat = time.monotonic()

    def load_libraries(self, engine: str) -> dict[str, Any]:
        """Import what training needs, which takes seconds, and say who and where this worker is."""
        keep_freed_memory()
        import torch

        self._beat = time.monotonic()
        if engine == "deepspeed":
            from orchestration.training.deepspeed_engine import import_deepspeed

            import_deepspeed(gpu=self.gpu)
            self._beat = time.monotonic()
        import orchestration.training.trainer  # noqa: F401  (imported for its time)

        if self.gpu and not torch.cuda.is_available():
            raise ValueError(
                "cluster.gpus_per_worker = 1: this worker's torch finds no CUDA device; "
                "install a CUDA build of torch on every node, or set cluster.gpus_per_worker=0"
            )
        self._beat = time.monotonic()
        return {
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
        }

    def warm_up(self, engine: str, dataset: dict[str, Any], left_out: Sequence[str] | None = None) -> dict[str, Any]:
        """Do ahead of time what takes long when a place is to be filled. Returns what `load_libraries` does."""
        found = self.load_libraries(engine)
        from orchestration.config.run_config import DatasetConfig

        self._open(DatasetConfig.model_validate(dataset), left_out)
        return found

    def find_unreadable(self, dataset: dict[str, Any]) -> list[dict[str, Any]]:
        """Open the data and say which training images cannot be read and are to be left out (dataset.quarantine).

        Raises:
            ValueError: there are more than that, or others than training images; or as `build`.
        """
        from experts.data.dataset import open_dataset
        from orchestration.config.run_config import DatasetConfig

        self._beat = time.monotonic()
        config = DatasetConfig.model_validate(dataset)
        opened = open_dataset(config, beat=self._finished_something)
        self._dataset = (config, tuple(item.path for item in opened.left_out)), opened
        return [asdict(item) for item in opened.left_out]

    def sees(self, path: str, text: str) -> bool:
        """Whether a file is there for this worker, with this text in it."""
        try:
            return text in Path(path).read_text()
        except OSError:
            return False

    def _open(self, config: Any, left_out: Sequence[str] | None) -> Any:
        """A dataset, opened once for all stages."""
        from experts.data.dataset import open_dataset

        asked = config, None if left_out is None else tuple(left_out)
        if self._dataset is None or self._dataset[0] != asked:
            self._dataset = asked, open_dataset(config, left_out=left_out, beat=self._finished_something)
        return self._dataset[1]

    def _finished_something(self) -> None:
        self._beat = time.monotonic()

    def open_data(self, dataset: dict[str, Any], left_out: Sequence[str] | None = None) -> None:
        """Open the data ahead of `build`, with its arguments."""
        from orchestration.config.run_config import DatasetConfig

        self._beat = time.monotonic()
        self._open(DatasetConfig.model_validate(dataset), left_out)

    def open_world(self, workers: int, timeout_s: float = 600.0) -> tuple[str, int]:
        """Rank 0 only: open the meeting point on a free port and say where it is."""
        from orchestration.training.world import Rendezvous

        address = ray.util.get_node_ip_address()
        self._rendezvous = Rendezvous(address, workers, host_here=True, timeout_s=timeout_s)
        return address, self._rendezvous.port

    def open_door(self) -> tuple[str, int] | None:
        """Where workers of other nodes may knock until the next `leave`; None where this node lacks its address."""
        self._door = open_door(ray.util.get_node_ip_address(), gpu=self.gpu)
        return None if self._door is None else self._door.getsockname()[:2]

    def silent(self, doors: dict[str, tuple[str, int]]) -> list[str]:
        """The other nodes whose doors do not answer from here."""
        own = ray.get_runtime_context().get_node_id()
        others = {node: door for node, door in doors.items() if node != own}
        answers = answering(list(others.values()))
        return [node for node, answered in zip(others, answers, strict=True) if not answered]

    def build(
        self,
        config_tree: dict[str, Any],
        stage: str,
        seat: Seat,
        teachers: dict[str, str | Sent],
        left_out: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Open the data, join the world, build model and engine.

        Args:
            left_out: training images to do without, as `find_unreadable` found them; None where none may be left out.

        Returns:
            What the driver wants to know of the data and of this worker.

        Raises:
            ValueError: data or keys do not fit, as `open_dataset` and the pieces say.
        """
        import torch

        from orchestration.config.run_config import RunConfig
        from orchestration.training.mesh import Mesh, MeshShape
        from orchestration.training.trainer import StageTrainer
        from orchestration.training.world import Rendezvous, use_network_of

        self._beat = time.monotonic()
        self.leave()
        torch.set_num_threads(self.threads)
        config = RunConfig.model_validate(config_tree)
        marks = [time.perf_counter()]
        dataset = self._open(config.dataset, left_out)
        self._beat = time.monotonic()
        marks.append(time.perf_counter())
        shape = MeshShape(seat.num_experts, seat.experts_per_worker, seat.replicas)
        use_network_of(ray.util.get_node_ip_address())
        if seat.rank:
            self._rendezvous = Rendezvous(
                seat.address, shape.workers, port=seat.port, host_here=False, timeout_s=seat.timeout_s
            )
        self._rendezvous.join(seat.rank, shape.workers, gpu=self.gpu, timeout_s=seat.timeout_s)
        mesh = Mesh(shape, seat.rank, "cuda" if self.gpu else "cpu", seat.timeout_s)
        with contextlib.ExitStack() as held:
            folders = {name: held.enter_context(received(folder)) for name, folder in teachers.items()}
            self.trainer = StageTrainer(config, stage, dataset, mesh, folders)
        marks.append(time.perf_counter())
        parameters = sum(p.numel() for p in self.trainer.setup.model.parameters())
        return {
            "class_names": list(dataset.class_names),
            "counts": dataset.counts_C.tolist(),
            "digest": dataset.digest,
            "image_shape": dataset.raw_image_shape,
            "has_val": dataset.val is not None,
            "test_images": len(dataset.test.labels),
            "prepares": self.trainer.setup.objective.prepares,
            "observes": self.trainer.setup.objective.observes,
            "steps_per_epoch": self.trainer.setup.steps_per_epoch,
            "parameters": parameters,
            "trunk_parameters": sum(p.numel() for p in self.trainer.setup.model.trunk.parameters()),
            "device": torch.cuda.get_device_name() if self.gpu else "cpu",
            "data_s": marks[1] - marks[0],
            "engine_s": marks[2] - marks[1],
        }

    def train(self, until: int) -> Any:
        """See `StageTrainer.train`."""
        import torch

        self._beat = time.monotonic()  # the pause before this call was the driver's
        torch.set_num_threads(self.threads)
        trained = self.trainer.train(until)
        self._check_memory()
        return trained

    def evaluate(self, split: str) -> Any:
        """See `StageTrainer.evaluate`."""
        self._beat = time.monotonic()
        found = self.trainer.evaluate(split)
        self._check_memory()
        return found

    def _check_memory(self) -> None:
        limit, held = self.trainer.setup.config.cluster.memory_gib_per_worker, self.peak_memory_gib()
        if limit is not None and held > limit:
            raise MemoryError(
                f"it held {held:.2f} GiB, cluster.memory_gib_per_worker = {limit:g}; raise it, or use more workers, "
                f"fewer dataset.loader_processes or a smaller dataset.resident_mib"
            )

    def save(self, folder: str | None) -> tuple[list[Any], dict[str, Any], dict[str, bytes]]:
        """Files written, the state that belongs to them, and, where there is no folder to write to, their content."""
        self._beat = time.monotonic()
        if folder is not None:
            return self.trainer.save(folder), self.trainer.state(), {}
        entries, files = save_to_send(self.trainer.save)
        return entries, self.trainer.state(), files

    def load(self, folder: str | Sent, state: dict[str, Any]) -> None:
        """See `StageTrainer.load`."""
        self._beat = time.monotonic()
        with received(folder, self._is_own) as path:
            self.trainer.load(path, state)

    def start_from(self, folder: str | Sent) -> None:
        """See `StageTrainer.start_from`."""
        self._beat = time.monotonic()
        with received(folder, self._is_own) as path:
            self.trainer.start_from(path)

    def _is_own(self, file: str) -> bool:
        """Whether a file of a checkpoint holds something of this worker's."""
        return file.partition(".")[0] in ("trunk", "shared", "objective", *self.trainer.setup.model.names)

    def start_from_model(self, folder: str | Sent) -> None:
        """See `StageTrainer.start_from_model`."""
        self._beat = time.monotonic()
        with received(folder) as path:
            self.trainer.start_from_model(path)

    def prepare(self) -> None:
        """See `StageTrainer.prepare`."""
        self._beat = time.monotonic()
        self.trainer.prepare()

    def observe(self, per_class: list[float | None]) -> None:
        """See `StageTrainer.observe`."""
        self.trainer.observe(per_class)

    def leave(self) -> None:
        """Give up the mesh, if in one; the process and its libraries stay for the next."""
        from orchestration.training.world import leave_world

        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None
        if self._door is not None:
            self._door.close()
            self._door = None
        leave_world()

    def peak_memory_gib(self) -> float:
        """Most memory this worker's process has held, GiB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """See `own_stacks`; answers beside the work."""
        return own_stacks()

    @ray.method(concurrency_group="watch")
    def heartbeat(self) -> tuple[int, float]:
        """Steps done, and seconds since this worker last finished a step, an image batch or a file."""
        trainer = self.trainer
        beat = max(self._beat, trainer.beat) if trainer is not None else self._beat
        return (trainer.done if trainer is not None else 0), time.monotonic() - beat
