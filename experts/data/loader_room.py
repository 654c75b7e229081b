"""What loader processes need of a machine beside processors: memory, shared memory for batches, and open files.

Without it a process dies in the middle of training, with a message of the system's at best. So it is looked at before.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experts.data.config import DatasetConfig
from experts.data.control_groups import HERE, group_folders, lines_of

SHARED_MEMORY = "/dev/shm"
"""The folder on Linux that shared memory is taken from."""
_MIB = 2**20
_AHEAD = 2  # batches that a process reads ahead, torch's default
_FILES_PER_PROCESS = 8  # of the training process: pipes of the queues, and a file for each batch on its way
_FILES_BESIDE = 32  # that may be opened later: logs, checkpoints, connections
_UNLIMITED = 2**60  # bytes, more than any machine has; control groups without a limit report a number above it
_OF_GROUPS = (  # limit of memory, how much is used, and the part of it that can be taken back; versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Room(NamedTuple):
    """Total and free: bytes of memory that processes here can have, of shared memory, and files of this process.

    Shared memory is None where there is none.
    """

    memory: tuple[int, int]
    shared_memory: tuple[int, int] | None
    open_files: tuple[int, int]


def room_here() -> Room:
    """Return what this machine has now. The limit of a container or job counts, not the node's memory."""
    memory = [_machine_memory(), *_group_memory()]
    shared = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = _UNLIMITED if files == resource.RLIM_INFINITY else files
    return Room(
        (min(total for total, _ in memory), min(free for _, free in memory)),
        shared and (shared.total, shared.free),
        (files, files - len(os.listdir("/dev/fd"))),
    )


def _machine_memory() -> tuple[int, int]:
    """Return all memory, and what new processes can have without swapping; bytes."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):  # not Linux: nothing is known of what is free
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, available


def _group_memory(process: Path = HERE) -> Iterator[tuple[int, int]]:
    """Yield the limit of each control group of a process, and how much of it is free; bytes.

    Files that were read are kept in memory as long as there is room, and count as used: what is not in use is free.
    """
    for folder in group_folders("memory", process):
        for names in _OF_GROUPS:
            with contextlib.suppress(OSError, ValueError):
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                if limit == "max" or int(limit) >= _UNLIMITED:
                    continue
                parts = dict(line.split(maxsplit=1) for line in lines_of(folder / "memory.stat") if " " in line)
                yield int(limit), int(limit) - int(used) + int(parts.get(names[2], 0))


def waiting_bytes(processes: int, streams: Sequence[int], image_size: int) -> int:
    """Return the bytes of batches that may wait in shared memory for one training process.

    Args:
        processes: loader processes of a stream.
        streams: for each stream of batches the images of a request, each of their crops counted.
        image_size: side of an image, pixels.
    """
    return (_AHEAD * processes + 1) * sum(streams) * 3 * image_size**2 if processes else 0


def missing_room(
    processes: int, streams: Sequence[int], image_size: int, room: Room | None = None, workers: int = 1
) -> str | None:
    """Say what loader processes lack on a machine, and what to set; None where they have all they need.

    Args:
        processes, streams, image_size: as `waiting_bytes`; no streams need nothing.
        room: of the machine; None for this one.
        workers: training processes there, which share memory but not the limit of open files.
    """
    if not processes or not streams:
        return None
    room = room or room_here()
    needed = workers * waiting_bytes(processes, streams, image_size)
    for_batches = f"loader processes hand over up to {needed / _MIB:,.1f} MiB of batches there"
    lower = "set a lower dataset.loader_processes; 0 needs none"
    if room.shared_memory is None:
        return f"{SHARED_MEMORY}: there is none, and loader processes hand batches over there; {lower}"
    total, free = room.shared_memory
    if free < needed:
        return (
            f"{SHARED_MEMORY}: {free / _MIB:,.1f} of {total / _MIB:,.1f} MiB are free; {for_batches}; "
            f"enlarge it (docker: --shm-size), or {lower}"
        )
    if room.memory[1] < needed:
        return f"memory: {room.memory[1] / _MIB:,.0f} MiB are free; {for_batches}, in memory; {lower}"
    files = _FILES_PER_PROCESS * processes * len(streams) + _FILES_BESIDE
    total, free = room.open_files
    if free < files:
        return (
            f"open files: {total - free} of {total} are open; loader processes need about {files} more; raise the "
            f"limit (ulimit -n), or {lower}"
        )
    return None


def refuse_little_room(config: DatasetConfig, streams: Sequence[int], workers: int = 1) -> None:
    """Refuse loader processes that this machine has no room for, before the first of them is started.

    Args:
        config: of the data set.
        streams, workers: as `missing_room`.

    Raises:
        ValueError: says what is missing.
    """
    if problem := missing_room(config.loader_processes, streams, config.image_size, workers=workers):
        raise ValueError(f"dataset.loader_processes = {config.loader_processes}: {problem}")
