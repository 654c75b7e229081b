"""The command `expertail`, also where a folder of another project is named `orchestration` and would be found first.

Such a folder may lie on PYTHONPATH. What this file imports is found beside it (`orchestration/__init__.py` does the
same for our other packages).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent


def main() -> int:
    """Run one command. Returns the exit code."""
    try:
        found = importlib.util.find_spec("orchestration")
    except (ImportError, ValueError):  # ValueError: a module that somebody made by hand
        found = None
    places = [Path(place).resolve() for place in (found and found.submodule_search_locations) or []]
    if places[:1] != [_ROOT / "orchestration"]:
        if "orchestration" in sys.modules:  # loaded before this command, by a `sitecustomize` for example
            sys.exit(
                f"expertail: a package named orchestration is imported already, from {places or found}; needed our "
                f"own, {_ROOT / 'orchestration'}; rename the other, or take it off PYTHONPATH"
            )
        sys.path.insert(0, str(_ROOT))
    from orchestration.cli import main as expertail

    return expertail()


if __name__ == "__main__":
    sys.exit(main())
