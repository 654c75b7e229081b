"""What happens between experts, and how results are measured."""

from pathlib import Path

import experts

# A served model brings both packages into a process that may have imported another `experts`.
_NEEDED = Path(__file__).resolve().parents[1] / "experts"
_FOUND = [Path(path).resolve() for path in getattr(experts, "__path__", [experts.__file__])]
if _FOUND[:1] != [_NEEDED]:
    raise ImportError(
        f"the package named experts that is imported here lies in {', '.join(map(str, _FOUND))}; needed expertail's "
        f"own, {_NEEDED}; load the model in a process of its own, or rename the other package"
    )
