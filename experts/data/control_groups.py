"""The control groups of this process, by which Linux limits containers and batch jobs. Elsewhere there are none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

HERE = Path("/proc/self")


def group_folders(controller: str, process: Path = HERE) -> Iterator[Path]:
    """Yield the folders of a process's group that count one resource, and of each group above it that can be seen.

    Args:
        controller: "cpu" or "memory".
        process: folder of the process in proc.
    """
    groups, mounts = lines_of(process / "cgroup"), [_Mount(line) for line in lines_of(process / "mountinfo")]
    for line in (line for line in groups if line.count(":") >= 2):
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            if (not controllers and mount.kind == "cgroup2") or (
                controller in controllers.split(",") and mount.kind == "cgroup" and controller in mount.options
            ):
                yield from mount.folders(path)


class _Mount:
    """A line of mountinfo: `id parent device root place options ... - kind source options`."""

    def __init__(self, line: str) -> None:
        before, _, after = line.partition(" - ")
        self._root, self._place = before.split()[3:5]
        self.kind, _, options = (*after.split(), "", "", "")[:3]
        self.options = options.split(",")

    def folders(self, path: str) -> Iterator[Path]:
        """Yield the folder of a group and of each one above it that can be seen from here."""
        place = Path(self._place)
        inside = Path(path)
        with contextlib.suppress(ValueError):  # a container may see its own group as the root
            inside = inside.relative_to(self._root)
        folder = place / str(inside).lstrip("/")
        while True:
            yield folder
            if folder == place or place not in folder.parents:
                return
            folder = folder.parent


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file of the system's; none where it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
