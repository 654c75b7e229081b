"""The Ray actor: a thin shell round `StageTrainer`. One actor is one worker of a mesh; it can serve many in turn."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from experts.data.cpus import usable_cpus
from orchestration.cluster.hangs import own_stacks
from orchestration.cluster.reachability import Address, listen, unreachable_from_here
from orchestration.cluster.sending import carries_anything
from orchestration.cluster.transfer import Sent, received

if TYPE_CHECKING:  # these load torch, for which `load_libraries` prepares the process first
    from experts.data.dataset import Dataset
    from orchestration.config.run_config import DatasetConfig, RunConfig
    from orchestration.storage.checkpoint import FileEntry
    from orchestration.training.mesh import Mesh, MeshShape


@dataclass(frozen=True)
class Seat:
    """A worker's place in a mesh.

    Attributes:
        rank: in the torch world.
        shape: of the mesh.
        address, port: where the worker with rank 0 opened the world.
        timeout_s: how long an exchange may wait for a partner.
    """

    rank: int
    shape: MeshShape
    address: str
    port: int
    timeout_s: float


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory, up to 32 MiB per allocation, for the next step. Other C libraries do nothing.

    By default it gives activations back to the system in every backward pass and takes them again in the next forward
    pass: about 25,000 page faults, which are 4 to 6 % of a step of RIDE on a ResNet-32.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26), (_M_MMAP_THRESHOLD, 2**25)):
            mallopt(parameter, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


# Threads beside the one that trains: for what must answer while it trains or hangs, and for the files of a checkpoint.
@ray.remote(concurrency_groups={"watch": 1, "files": 1})  # type: ignore[call-overload]
@carries_anything
class Worker:
    """Holds some experts of an ensemble and trains them in step with the other workers."""

    def __init__(self, *, gpu: bool, threads: int) -> None:
        self.gpu, self.threads = gpu, threads
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch loads, in `load_libraries`
        self.trainer: Any = None
        self._rendezvous: Any = None
        self._listener: socket.socket | None = None
        self._dataset: tuple[Any, Any] | None = None  # what was asked for, and the dataset opened for it
        self._beat = time.monotonic()

    def load_libraries(self, engine: str) -> dict[str, Any]:
        """Import what training needs, which takes seconds. Return the process, node and device of this worker."""
        keep_freed_memory()  # before torch allocates anything
        import torch

        self._note_progress()
        if engine == "deepspeed":
            from orchestration.training.deepspeed_engine import import_deepspeed

            import_deepspeed(gpu=self.gpu)
            self._note_progress()
        import orchestration.training.trainer  # noqa: F401  (imported for its time)

        if self.gpu and not torch.cuda.is_available():
            raise ValueError(
                "cluster.gpus_per_worker = 1: this worker's torch finds no CUDA device; "
                "install a CUDA build of torch on every node, or set cluster.gpus_per_worker=0"
            )
        self._note_progress()
        return {
            "pid": os.getpid(),
            "node": ray.util.get_node_ip_address(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "cpus": usable_cpus(),
            "device": torch.cuda.get_device_name() if self.gpu else "cpu",
        }

    def warm_up(self, engine: str, dataset: DatasetConfig, left_out: Sequence[str] | None = None) -> dict[str, Any]:
        """Do ahead of time what takes long when a place is to be filled. Return what `load_libraries` does."""
        host = self.load_libraries(engine)
        self._open(dataset, left_out)
        return host

    def find_unreadable(self, dataset: DatasetConfig) -> list[dict[str, Any]]:
        """Open the data, and return the training images that cannot be read and are to be left out.

        Raises:
            ValueError: they are more than dataset.quarantine, or not only training images; or as `build`.
        """
        from experts.data.dataset import open_dataset

        self._note_progress()
        opened = open_dataset(dataset, beat=self._note_progress)
        self._dataset = (dataset, tuple(item.path for item in opened.left_out)), opened
        return [asdict(item) for item in opened.left_out]

    def sees(self, path: str, text: str) -> bool:
        """Say whether this worker finds a file with this text in it."""
        try:
            return text in Path(path).read_text()
        except OSError:
            return False

    def _open(self, config: DatasetConfig, left_out: Sequence[str] | None) -> Any:
        """Return a dataset, opened once for all stages."""
        from experts.data.dataset import open_dataset

        asked = config, None if left_out is None else tuple(left_out)
        if self._dataset is None or self._dataset[0] != asked:
            self._dataset = asked, open_dataset(config, left_out=left_out, beat=self._note_progress)
        return self._dataset[1]

    def _note_progress(self) -> None:
        self._beat = time.monotonic()

    def open_data(self, dataset: DatasetConfig, left_out: Sequence[str] | None = None) -> None:
        """Open the data ahead of `build`, with its arguments."""
        self._note_progress()
        self._open(dataset, left_out)

    def open_world(self, workers: int, timeout_s: float = 600.0) -> tuple[str, int]:
        """Open the meeting point of a world on a free port, and return its address and port. For rank 0 alone."""
        from orchestration.training.world import Rendezvous

        address = ray.util.get_node_ip_address()
        self._rendezvous = Rendezvous(address, workers, host_here=True, timeout_s=timeout_s)
        return address, self._rendezvous.port

    def listen(self) -> Address | None:
        """Listen until the next `leave`, for workers that try to reach this one.

        Returns:
            Where; None where this machine does not have the address that the node is known by.
        """
        if self._listener is not None:  # nobody accepts from it, so connections of earlier tries would fill its queue
            self._listener.close()
        self._listener = listen(ray.util.get_node_ip_address(), gpu=self.gpu)
        return None if self._listener is None else self._listener.getsockname()[:2]

    def unreachable_from_here(self, listeners: Mapping[str, Address]) -> list[str]:
        """Return the other nodes whose listeners cannot be reached."""
        own = ray.get_runtime_context().get_node_id()
        return unreachable_from_here({node: address for node, address in listeners.items() if node != own})

    def build(
        self,
        config: RunConfig,
        stage: str,
        seat: Seat,
        teachers: dict[str, str | Sent],
        left_out: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Open the data, join the world, build model and engine.

        Args:
            config: of the run.
            stage: its name.
            seat: this worker's place.
            teachers: folders of their exported models, by name.
            left_out: training images to do without, as `find_unreadable` found them; None where none may be left out.

        Returns:
            Facts of the data, the stage and this worker that the driver needs.

        Raises:
            ValueError: data or keys do not fit, as `open_dataset` and the pieces say.
        """
        import torch

        from orchestration.training.precision import use_precision
        from orchestration.training.trainer import StageTrainer

        self._note_progress()
        self.leave()
        torch.set_num_threads(self.threads)
        begun = time.perf_counter()
        dataset = self._open(config.dataset, left_out)
        self._note_progress()
        opened = time.perf_counter()
        mesh = self._join(seat)
        use_precision(config.engine, mesh.device)  # before the first product of matrices

        # Teachers are loaded while the trainer is built; their files are not needed after that.
        with contextlib.ExitStack() as held:
            folders = {name: held.enter_context(received(folder)) for name, folder in teachers.items()}
            self.trainer = StageTrainer(config, stage, dataset, mesh, folders)
        seconds = {"data_s": opened - begun, "engine_s": time.perf_counter() - opened}
        files = {} if seat.rank else dataset.fingerprints()  # for the driver, of what one worker sees
        return {**self._facts(dataset), "files": files, **seconds}

    def _join(self, seat: Seat) -> Mesh:
        """Join the world of this stage's workers, and return our place in it."""
        from orchestration.training.mesh import Mesh
        from orchestration.training.world import Rendezvous, use_network_of

        # Gloo and NCCL read the network's name when the world is joined.
        use_network_of(ray.util.get_node_ip_address())
        workers = seat.shape.workers
        if seat.rank:
            self._rendezvous = Rendezvous(
                seat.address, workers, port=seat.port, host_here=False, timeout_s=seat.timeout_s
            )
        self._rendezvous.join(seat.rank, workers, gpu=self.gpu, timeout_s=seat.timeout_s)
        return Mesh(seat.shape, seat.rank, "cuda" if self.gpu else "cpu", seat.timeout_s)

    def _facts(self, dataset: Dataset) -> dict[str, Any]:
        """Return what the driver needs to know of the data, the stage and this worker."""
        setup, training = self.trainer.setup, self.trainer.training
        return {
            "class_names": list(dataset.class_names),
            "counts": dataset.counts_C.tolist(),
            "digest": dataset.digest,
            "image_shape": dataset.raw_image_shape,
            "remarks": [asdict(remark) for remark in dataset.remarks],
            "has_val": dataset.val is not None,
            "test_images": len(dataset.test.labels),
            "val_images": 0 if dataset.val is None else len(dataset.val.labels),
            "prepares": training is not None and training.prepares,
            "observes": training is not None and training.stage.objective.observes,
            "steps_per_epoch": setup.steps_per_epoch,
            "parameters": sum(p.numel() for p in setup.model.parameters()),
            "trunk_parameters": sum(p.numel() for p in setup.model.trunk.parameters()),
        }

    def train(self, until: int) -> Any:
        """See `StageTrainer.train`."""
        import torch

        self._note_progress()  # the pause before this call was the driver's
        torch.set_num_threads(self.threads)
        trained = self.trainer.train(until)
        self._check_memory()
        return trained

    def evaluate(self, split: str) -> Any:
        """See `StageTrainer.evaluate`."""
        self._note_progress()
        scores = self.trainer.evaluate(split)
        self._check_memory()
        return scores

    def predict(self, split: str, logits: bool) -> Any:
        """See `StageTrainer.predict`."""
        self._note_progress()
        return self.trainer.predict(split, logits=logits)

    def _check_memory(self) -> None:
        """Refuse to hold more memory than the config allows. Ray only places by the number, and limits nothing."""
        limit, held = self.trainer.setup.config.cluster.memory_gib_per_worker, self.peak_memory_gib()
        if limit is not None and held > limit:
            raise MemoryError(
                f"it held {held:.2f} GiB, cluster.memory_gib_per_worker = {limit:g}; raise it, or use more workers, "
                f"fewer dataset.loader_processes or a smaller dataset.resident_mib"
            )

    def snapshot(self) -> dict[str, Any]:
        """Copy this worker's part of a checkpoint in memory; see `StageTrainer.take_snapshot`.

        Returns:
            The state that belongs to the files.
        """
        self._note_progress()
        state: dict[str, Any] = self.trainer.take_snapshot()
        return state

    @ray.method(concurrency_group="files")
    def write(self, folder: str | None) -> tuple[list[FileEntry], dict[str, bytes]]:
        """Write the files of the newest snapshot, beside the work. The next one may be taken once they are written.

        Args:
            folder: to write to; None where this worker does not see the run folder.

        Returns:
            The files, and, where there was no folder, their content.
        """
        self._note_progress()
        if folder is not None:
            return self.trainer.write_snapshot(folder), {}
        entries, files = self.trainer.snapshot.contents()
        return entries, files

    def load(self, folder: str | Sent, state: dict[str, Any]) -> None:
        """See `StageTrainer.load`."""
        self._note_progress()
        with received(folder, self._is_own) as path:
            self.trainer.load(path, state)

    def start_from(self, folder: str | Sent) -> None:
        """See `StageTrainer.start_from`."""
        self._note_progress()
        with received(folder, self._is_own) as path:
            self.trainer.start_from(path)

    def _is_own(self, file: str) -> bool:
        """Say whether a file of a checkpoint holds a part of this worker's."""
        return file.partition(".")[0] in ("trunk", "shared", "objective", *self.trainer.setup.model.names)

    def load_weights(self, folder: str | Sent) -> None:
        """See `StageTrainer.load_weights`."""
        self._note_progress()
        with received(folder, self._is_own) as path:
            self.trainer.load_weights(path)

    def start_from_model(self, folder: str | Sent) -> None:
        """See `StageTrainer.start_from_model`."""
        self._note_progress()
        with received(folder) as path:
            self.trainer.start_from_model(path)

    def prepare(self) -> None:
        """See `StageTrainer.prepare`."""
        self._note_progress()
        self.trainer.prepare()

    def observe(self, per_class: list[float | None]) -> None:
        """See `StageTrainer.observe`."""
        self.trainer.observe(per_class)

    def fit(self) -> Any:
        """See `StageTrainer.fit`."""
        self._note_progress()
        fitted = self.trainer.fit()
        self._check_memory()
        return fitted

    def leave(self) -> None:
        """Leave the mesh, if in one. The process and its libraries stay for the next."""
        from orchestration.training.world import leave_world

        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        leave_world()  # after the engine, which holds groups of it

    def renew(self) -> float:
        """Make ready for another run in this process. Return the memory that it holds now, MiB."""
        self._note_progress()
        self.leave()
        gc.collect()
        if self.gpu:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # the peak that `peak_memory_gib` tells is of one run
            Path("/proc/self/clear_refs").write_text("5")
        return psutil.Process().memory_info().rss / 2**20

    def peak_memory_gib(self) -> float:
        """Return the most memory this worker's process has held, GiB; not that of its GPU."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def gpu_peak_memory_gib(self) -> float | None:
        """Return the most memory of the GPU that torch has held, with the blocks that it keeps, GiB; None on a CPU."""
        if not self.gpu:
            return None
        import torch

        return torch.cuda.max_memory_reserved() / 2**30

    @ray.method(concurrency_group="watch")
    def stacks(self) -> str:
        """See `own_stacks`; answers beside the work."""
        return own_stacks()

    @ray.method(concurrency_group="watch")
    def heartbeat(self) -> tuple[int, float]:
        """Return the steps done, and the seconds since this worker last finished a step, an image batch or a file."""
        trainer = self.trainer
        beat = max(self._beat, trainer.beat) if trainer is not None else self._beat
        return (trainer.done if trainer is not None else 0), time.monotonic() - beat
