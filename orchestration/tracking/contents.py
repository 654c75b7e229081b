"""What of a run folder goes to the tracking server: parameters, tags, files, names. Pure functions of the folder.

The folder may be incomplete (a young run, an interrupted one): what is missing is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.config.secrets import redact
from orchestration.results.tables import per_class_table
from orchestration.storage.files import evaluations, read_config, read_json

PER_CLASS_FILE = "per_class.json"
STUDY_FILE = "sweep.json"
"""What makes a folder a study's: its runs, and what they have in common."""
_PARAM_CHARACTERS = 250
_STATUS = {
    "running": "RUNNING", "started": "RUNNING", "resumed": "RUNNING",
    "finished": "FINISHED", "complete": "FINISHED", "completed": "FINISHED", "done": "FINISHED",
    "failed": "FAILED", "error": "FAILED",
    "killed": "KILLED", "stopped": "KILLED", "interrupted": "KILLED", "cancelled": "KILLED",
}  # fmt: skip


def study_folder(run_dir: Path) -> Path | None:
    """The folder of the study that a run belongs to; None for a run on its own."""
    name = read_json(run_dir / "run.json").get("study")
    folder = run_dir.parent / str(name)
    return folder if name and (folder / STUDY_FILE).exists() else None


def description(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a folder says of its run, its data and its config; of a study, what its runs have in common."""
    study = read_json(folder / STUDY_FILE)
    if not study:
        return read_json(folder / "run.json"), read_json(folder / "data.json"), read_config(folder)
    values = ",".join(run["value"] for run in study["runs"])
    run = {"seed": study["seed"], "status": study.get("status")}
    return run, {"dataset": study["dataset"]}, {**study["config"], "sweep": {"key": study["key"], "values": values}}


def metric_key(name: str, stage: str, stages: list[str]) -> str:
    """The server's name of a number: as in the journal, below its stage when the recipe has several.

    Steps are counted within a stage, so that two stages must not share a key.
    """
    key = name if len(stages) < 2 and stage in (*stages, "train") else f"{stage}/{name}"
    return re.sub(r"[^\w./ :-]", "_", key)[:250]


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The config as flat parameters, `method.stages.train.epochs: "200"`; long values are cut, secrets taken out."""

    def flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from flat(item, f"{key}.{name}" if key else str(name))
            return
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        text = redact(text)
        if len(text) > _PARAM_CHARACTERS:
            text = text[: _PARAM_CHARACTERS - 20] + " ... see config.yaml"
        yield re.sub(r"[^\w./ :-]", "_", key)[:250], text

    return dict(flat(config, ""))


def tags(run: Mapping[str, Any], data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """What made the run: commit, command, host, versions, dataset digest, config hash."""
    found: dict[str, Any] = {
        "command": run.get("command"),
        "mlflow.source.name": "expertail",
        "mlflow.source.git.commit": run.get("commit"),
        "mlflow.source.type": "LOCAL",
        "config_hash": run.get("config_hash") or _hash(config),
        "seed": run.get("seed", config.get("seed")),
        "status": run.get("status"),
        "dataset": data.get("dataset"),
        "dataset_digest": data.get("digest"),
        "dataset_images": data.get("total"),
        **{f"version.{name}": version for name, version in (run.get("versions") or {}).items()},
    }
    host = run.get("host")
    found |= {f"host.{name}": value for name, value in host.items()} if isinstance(host, Mapping) else {"host": host}
    return {key: redact(str(value))[:5000] for key, value in found.items() if value not in (None, "")}


def moment(run: Mapping[str, Any], name: str) -> int | None:
    """The time that run.json calls `created` or `ended`, in unix milliseconds; None where it does not say."""
    value = run.get(name)
    try:
        seconds = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else value
        return None if seconds is None else round(float(seconds) * 1000)
    except (TypeError, ValueError):
        return None


def summary(folder: Path) -> str | None:
    """What MLflow shows as a run's description: its final table; None where there is none yet."""
    for path in (folder / "report" / "table.txt", folder / "table.txt"):
        if path.exists():
            return f"```\n{path.read_text()[:4900].rstrip()}\n```"
    return None


def status_of(run: Mapping[str, Any]) -> str:
    """The server's word for the `status` of run.json: RUNNING, FINISHED, FAILED or KILLED."""
    return _STATUS.get(str(run.get("status", "running")).lower(), "RUNNING")


def model_name(config: Mapping[str, Any], experiment: str) -> str:
    """The name that the run's models are registered under: `<dataset>-<method>`."""

    def name(group: str) -> str | None:
        value = config.get(group)
        value = value.get("name") if isinstance(value, Mapping) else value
        return value if isinstance(value, str) else None

    words = [name("dataset") or experiment, name("method")]
    return re.sub(r"[^\w. -]", "_", "-".join(word for word in words if word))


def files(run_dir: Path) -> dict[str, str | Path]:
    """The artefacts: name on the server -> a file, or text where it differs from the file."""
    found: dict[str, str | Path] = {}
    for path in (run_dir / "config.yaml", run_dir / "run.json"):
        if path.exists():
            found[path.name] = redact(path.read_text())
    patterns = ("data.json", "evaluation/**/*.json", "report/*.png", "report/*.txt")
    of_a_study = (STUDY_FILE, "sweep.png", "table.txt")
    for path in sorted(path for pattern in patterns + of_a_study for path in run_dir.glob(pattern)):
        found[path.relative_to(run_dir).as_posix()] = path
    data, results = read_json(run_dir / "data.json"), evaluations(run_dir)
    if data and results:
        found[PER_CLASS_FILE] = json.dumps(per_class_table(results, data))
    return found


def digest(content: str | Path) -> str:
    """SHA-256 of a text or a file, hexadecimal."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exports(run_dir: Path) -> dict[str, tuple[Path, str]]:
    """The exported ensembles: "last" and "best" -> folder and digest of its files, where complete.

    None when the config says `tracking.log_model: false`.
    """
    found: dict[str, tuple[Path, str]] = {}
    if (read_config(run_dir).get("tracking") or {}).get("log_model") is False:
        return found
    for which in ("last", "best"):
        folder = run_dir / "export" / which
        parts = [folder / "model.json", folder / "model.safetensors"]
        if all(part.exists() for part in parts):
            found[which] = (folder, _hash([digest(part) for part in parts]))
    return found


def signature_shape(folder: Path) -> tuple[int, ...]:
    """Shape of the images that an exported model takes, batch first, -1 where any size will do."""
    height, width, channels = read_json(folder / "model.json")["image_shape"]
    sizes = tuple(-1 if size is None else int(size) for size in (height, width))
    return (-1, *sizes) if channels == 1 else (-1, *sizes, channels)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
