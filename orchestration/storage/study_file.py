"""The file that makes a folder a study's: which runs there are, what they are called and how they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestration.config.secrets import redact_all
from orchestration.storage.files import read_json, write_json

STUDY_FILE = "study.json"
SCHEMA = 1
"""Version of study.json. A file of a later one is refused: its meaning is not known here."""

RESTORE = "restore the file, or remove it: the study is laid out again then, and its finished runs stay"


def read_study_file(folder: Path) -> dict[str, Any]:
    """Read study.json of a folder; {} where there is none.

    Secrets in it, which earlier versions kept, are left out.

    Raises:
        ValueError: it is damaged, or of a later version.
    """
    path = folder / STUDY_FILE
    content = read_json(path)
    if not content:
        if path.exists():
            raise ValueError(f"{path}: found nothing in it; {RESTORE}")
        return {}
    if isinstance(schema := content.get("schema", SCHEMA), int) and schema > SCHEMA:
        raise ValueError(
            f"{path}: schema {schema}; needed {SCHEMA} or less; a later version of expertail wrote it: use that one, "
            f"or another study.name"
        )
    points = content.get("points")
    if not isinstance(points, list) or not all(
        isinstance(one, dict) and isinstance(one.get("run"), str) for one in points
    ):
        raise ValueError(f"{path}: found no list of runs under `points`; {RESTORE}")
    return dict(redact_all(content))


def write_study_file(folder: Path, content: dict[str, Any]) -> None:
    """Write study.json of a folder, without the passwords of URIs that its words, labels and problems may hold.

    A run gets its credential from the command, the configs or the environment at each start.
    """
    write_json(folder / STUDY_FILE, redact_all(content))
