"""One run of a study: its words, its label in reports, its name, and digests of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Need = tuple[tuple[tuple[str, float], ...], int]
"""Resources of a worker, and the number of workers."""


@dataclass(frozen=True)
class Point:
    """One run of a study. It holds text alone, so that a study of many runs stays small.

    Attributes:
        run: name of the run and of its folder.
        label: what makes it differ from the others but for the seed, by key, as {"mix": "none"}.
        seed: of the run.
        words: that `expertail train` takes, without run.dir and run.name.
        identity: digest of what determines its results (`config_hash`).
        stages: digest of each stage, in order; see shared_stages.py.
        role: "run", or "reference" for relative accuracy alone.
        need: resources of a worker and the number of workers, for counting places.
        after: names of runs of the study that it learns from or begins with.
    """

    run: str
    label: Mapping[str, str]
    seed: int
    words: tuple[str, ...]
    identity: str
    stages: Mapping[str, str] = field(default_factory=dict)
    role: str = "run"
    need: Need = ((), 1)
    after: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return what study.json keeps of it."""
        return {
            "run": self.run,
            "label": dict(self.label),
            "seed": self.seed,
            "role": self.role,
            "words": list(self.words),
            "identity": self.identity,
        }
