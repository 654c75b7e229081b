"""`expertail sweep`: a study of plain words in which something varies: one key, several, seeds, or all of these."""

from __future__ import annotations

from collections.abc import Sequence

from orchestration.studies.study_config import read_study


def refuse_one_run(words: Sequence[str]) -> None:
    """Refuse words that are no sweep: those of a file, and those in which nothing varies.

    Raises:
        ValueError: what is needed; also where they are no study (`read_study`).
    """
    if named := next((word for word in words if word.startswith("study=")), None):
        raise ValueError(f"{named}: a sweep has no file; needed `expertail study {named}`, or the keys themselves")
    asked = read_study(words)
    if len(asked.seeds) < 2 and not any(len(values) > 1 for values in asked.axes.values()):
        raise ValueError(
            f"{' '.join(words)}: one value for every key; needed a key with several, e.g. method=ce,ldam or "
            f"method.stages.h2t.flow.ratio=0,0.5,1 or seed=0,1,2; `expertail train` trains one run"
        )
