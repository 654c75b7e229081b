"""Launcher for `ray submit`, which copies one file to the head node and runs it there:

    ray submit CLUSTER.yaml deploy/launch.py -- train method=ride dataset=cifar100_lt dataset.root=/data/cifar

The run uses the Ray of that node, unless RAY_ADDRESS or cluster.address names another. If expertail is not installed on
the nodes, a checkout is looked for in the parent of this file's folder, in EXPERTAIL_ROOT and in the current folder. It
must have the same path on every node.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Run one expertail command and return its exit code."""
    os.environ.setdefault("RAY_ADDRESS", "auto")
    if not _is_installed():
        root = _checkout()
        if root is None:
            print(
                "expertail: not installed, and no checkout found beside this launcher, in EXPERTAIL_ROOT or in "
                f"{Path.cwd()}; needed either; install expertail on every node, or set EXPERTAIL_ROOT to a checkout",
                file=sys.stderr,
            )
            return 1
        sys.path.insert(0, str(root))
        # Ray's workers and the uploader are other processes, which find it through PYTHONPATH.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    from orchestration.cli import main as expertail

    return expertail(arguments[1:] if arguments[:1] == ["--"] else arguments)


def _is_installed() -> bool:
    """Return whether expertail is found, and not a folder of another project that has the name of a package of ours."""
    found = importlib.util.find_spec("orchestration")
    return any((Path(place) / "cli.py").is_file() for place in (found and found.submodule_search_locations) or [])


def _checkout() -> Path | None:
    named = os.environ.get("EXPERTAIL_ROOT")
    places = [Path(__file__).resolve().parent.parent, *([Path(named).expanduser()] if named else []), Path.cwd()]
    return next((place for place in places if (place / "orchestration" / "cli.py").is_file()), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
