"""Decoding ahead of training: loader processes read the files of coming batches, and batches arrive in order.

Which process reads a batch changes nothing: a request carries the positions of its images and where their random crops
are drawn, so no process keeps a generator.

A loader process hands over its error as text, and the training process raises it. Where even that fails, because the
process was ended or cannot hand anything over, it ends, and the training process says so within seconds.
"""

from __future__ import annotations

import errno
import multiprocessing.queues
import os
import re
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from experts.data.decode import CROP_UNIFORMS
from experts.data.images import FileImages
from experts.data.keyed_random import uniforms
from experts.data.loader_room import SHARED_MEMORY


class CropKey(NamedTuple):
    """A random crop of images: least and greatest share of the area, and the stream that its draws are from."""

    scale: tuple[float, float]
    key: int


class Request(NamedTuple):
    """Images to read: their positions in the store, crops to make of each, and the row that their draws begin at.

    A crop of None is the image's frame.
    """

    positions: np.ndarray
    crops: tuple[CropKey | None, ...] = (None,)
    first_draw: int = 0


def read(store: FileImages, request: Request) -> Tensor:
    """Return the images of a request, decoded, uint8 [V B, 3, S, S]; crops depend on the request alone.

    Raises:
        ValueError: an image is missing or damaged; names its file.
    """
    first, count = request.first_draw, len(request.positions)
    crops = [crop and (crop.scale, uniforms(crop.key, first, count, CROP_UNIFORMS)) for crop in request.crops]
    return store.read(request.positions, crops)


_OUT_OF_ROOM = {errno.ENOSPC: "shared memory", errno.EMFILE: "open files", errno.ENFILE: "open files of the system"}
_CODES = 100  # exit codes from here on are numbers of a system's error


class LoaderLost(RuntimeError):
    """A loader process has ended. The run can go on from its newest checkpoint, with new ones."""


class _Problem(NamedTuple):
    """An error of a loader process. Text alone, which no type and no constructor can keep from arriving."""

    kind: str
    text: str


class _Reader(Dataset):
    """Reads requests in a loader process.

    An error comes back as its message. The training process raises it, so the operator sees one line instead of a
    traceback of another process.
    """

    def __init__(self, store: FileImages) -> None:
        self.store = store

    def __getitem__(self, request: Any) -> Tensor | _Problem:
        try:
            images = read(self.store, request)
        except (ValueError, MemoryError, OSError) as error:
            return _Problem("MemoryError" if isinstance(error, MemoryError) else "ValueError", str(error))
        except Exception:
            return _Problem("RuntimeError", f"in a loader process:\n{traceback.format_exc()}")
        try:
            return images.share_memory_()  # here: a thread of the queue would lose the error
        except (RuntimeError, OSError) as error:
            return _Problem("ValueError", _out_of_room(str(error), images.nbytes))


def _out_of_room(text: str, size: int | None = None) -> str:
    """Return a message for images that could not be handed over, by the system's error in a text."""
    batch = "a batch" if size is None else f"a batch of {size / 2**20:.1f} MiB"
    number = _number_of(text)
    found = f"{_OUT_OF_ROOM[number]} at their limit" if number in _OUT_OF_ROOM else text.strip().partition("\n")[0]
    if number == errno.ENOSPC:
        disk = shutil.disk_usage(SHARED_MEMORY)
        found = f"{disk.free / 2**20:.1f} of {disk.total / 2**20:.1f} MiB of {SHARED_MEMORY} are free"
    return (
        f"a loader process cannot hand over {batch}: {found}; enlarge {SHARED_MEMORY} (docker: --shm-size) or the "
        f"limit of open files (ulimit -n), or set a lower dataset.loader_processes; 0 needs neither"
    )


def _number_of(text: str) -> int:
    """Return the number of the system's error that a message of torch or Python ends with or names; 0 without one."""
    found = re.search(r"\((\d+)\)\s*$|Errno (\d+)", text.strip())
    return int(found[1] or found[2]) if found else 0


def _end_when_unheard(worker: int) -> None:
    """Let this loader process end when it cannot hand something over. By default it would go on, and be waited for."""
    del worker

    def end(error: Exception, item: Any) -> None:
        del item
        number = getattr(error, "errno", None) or _number_of(str(error))
        os._exit(_CODES + number if 0 < number < 256 - _CODES else 1)

    # Python's own hook for it; torch hands results over through such a queue.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)  # type: ignore[attr-defined]


class _Requests(Sampler):
    """The requests of one pass. They are replaced between passes, so that the loader processes can stay."""

    def __init__(self) -> None:
        self.pass_requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pass_requests)


def _unchanged(item: Any) -> Any:
    """Collate nothing: a request is already a batch."""
    return item


class Prefetcher:
    """Reads requests in order, and ahead of time where there are loader processes."""

    def __init__(self, store: FileImages, processes: int, *, pin_memory: bool = False) -> None:
        """Start nothing yet.

        Args:
            processes: loader processes; with 0, this process decodes a request when it is asked for.
            pin_memory: put batches in page-locked memory, from which a GPU can copy while it computes.
        """
        self.store = store
        self.processes = processes
        self.pin_memory = pin_memory
        self._requests = _Requests()
        self._loader: DataLoader | None = None

    def read_all(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """Yield the images of each request, as `read`. A caller may stop early and call again.

        Raises:
            ValueError: an image is missing or damaged, and the message names its file; or a loader process has no room.
            MemoryError: a loader process has too little memory, or was ended as for that.
            LoaderLost: a loader process was ended otherwise.
        """
        if not self.processes:
            for request in requests:
                images = read(self.store, request)
                yield images.pin_memory() if self.pin_memory else images
            return
        self._requests.pass_requests = requests
        if self._loader is None:
            self._loader = DataLoader(
                _Reader(self.store),
                batch_size=None,
                sampler=self._requests,
                num_workers=self.processes,
                collate_fn=_unchanged,
                worker_init_fn=_end_when_unheard,
                persistent_workers=True,
                pin_memory=self.pin_memory,
                generator=torch.Generator().manual_seed(0),  # else it advances torch's global generator
            )
        batches = iter(self._loader)
        for _ in requests:
            try:
                item = next(batches)
            except (RuntimeError, OSError) as error:  # torch's, for a process that has ended
                item = _ended(batches, error)
            if isinstance(item, _Problem):
                del batches  # the traceback of the error would keep the processes alive
                self.close()
                _raise(item)
            yield item

    def close(self) -> None:
        """Stop the loader processes."""
        self._loader = None


_TYPES = {"ValueError": ValueError, "MemoryError": MemoryError, "LoaderLost": LoaderLost}


def _raise(problem: _Problem) -> NoReturn:
    raise _TYPES.get(problem.kind, RuntimeError)(problem.text)


def _ended(batches: Any, error: Exception) -> _Problem:
    """Return why a pass over the loader ended: by the exit codes of its processes, or else by the error itself."""
    processes = getattr(batches, "_workers", [])
    for process in processes:
        process.join(0.5)  # one that is ending has no code yet
        code = process.exitcode
        if code is None:
            continue
        if code == -signal.SIGKILL:
            return _Problem(
                "MemoryError", f"a loader process ({process.pid}) was killed, as the system does when memory is short"
            )
        if code == -signal.SIGBUS:
            return _Problem("ValueError", _out_of_room(f"({errno.ENOSPC})"))
        if code > _CODES:
            return _Problem("ValueError", _out_of_room(f"{os.strerror(code - _CODES)} ({code - _CODES})"))
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _Problem("LoaderLost", f"a loader process ({process.pid}) has ended: {how}")
    if _number_of(str(error)) in _OUT_OF_ROOM:
        return _Problem("ValueError", _out_of_room(str(error)))
    return _Problem("RuntimeError", f"{type(error).__name__} of the loader: {error}")
