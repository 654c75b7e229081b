"""Where and when: plan, mesh, actors, engines, checkpoints, tracking, command line."""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parents[1]


def _find_own_packages() -> None:
    """Make sure that our other packages are imported, where folders of other projects have their names.

    Such a folder may lie in the current directory, or on PYTHONPATH, before ours.

    Raises:
        ImportError: another package with the name of one of ours is imported already; names it.
    """
    hidden = False
    for name in ("experts", "aggregation", "configs"):  # deploy is never imported by us
        places = _places_of(name)
        if not places or _ROOT / name in places[:1]:
            continue
        if name in sys.modules:
            raise ImportError(
                f"a package named {name} is imported already, from {places[0]}; needed expertail's own, "
                f"{_ROOT / name}; use expertail in a process of its own, or rename the other package"
            )
        hidden = True
    if hidden:
        sys.path.insert(0, str(_ROOT))


def _places_of(name: str) -> list[Path]:
    """Return the folders, or the file, that a package's name stands for in this process; none if it is not found."""
    loaded = sys.modules.get(name)
    try:
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    except (ImportError, ValueError):  # ValueError: a module that somebody made by hand
        spec = None
    paths = [*getattr(loaded, "__path__", [])] or [*((spec and spec.submodule_search_locations) or [])]
    origin = getattr(loaded, "__file__", None) or (spec and spec.origin)
    return [Path(path).resolve() for path in paths or ([origin] if origin else [])]


_find_own_packages()
