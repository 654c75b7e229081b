"""The part of a run folder that goes to the tracking server: parameters, tags, files, names. Pure functions of it.

The folder of a young or an interrupted run is incomplete: missing files are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.config.secrets import redact, redact_all
from orchestration.results.fitted_table import choices
from orchestration.results.tables import per_class_table
from orchestration.storage.files import evaluations, file_sha256, final_evaluations, read_config, read_json
from orchestration.storage.study_file import STUDY_FILE

PER_CLASS_FILE = "per_class.json"
_MOST_CHARACTERS = 250  # of a name or a value: older servers take no more
_NOTE = 4900  # characters of a description; the server takes 5000
_STATUS = {
    "waiting": "RUNNING", "running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED",
}  # fmt: skip
"""The `status` of run.json -> the status of the MLflow run."""


def study_folder(run_dir: Path) -> Path | None:
    """Return the folder of the study that a run belongs to (`study` in run.json); None for a run on its own."""
    of_one = read_json(run_dir / "run.json").get("study") and (run_dir.parent / STUDY_FILE).exists()
    return run_dir.parent if of_one else None


def describe_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the run, the data and the config that a folder describes; for a study, what was asked for."""
    if study := read_json(folder / STUDY_FILE):
        return (
            {"status": overall_status(study["points"]), **times(folder, (one["run"] for one in study["points"]))},
            {},
            {},
        )
    return read_json(folder / "run.json"), read_json(folder / "data.json"), read_config(folder)


def times(study: Path, runs: Iterable[str]) -> dict[str, Any]:
    """Return when the first of some runs of a study was created, and when the last one ended, as run.json does."""
    facts = [read_json(study / run / "run.json") for run in runs]
    found: dict[str, Any] = {}
    for name, pick in (("created", min), ("ended", max)):
        known = {at: one[name] for one in facts if (at := time_ms(one, name)) is not None}
        found |= {name: known[pick(known)]} if known else {}
    return found


def overall_status(points: Iterable[Mapping[str, Any]]) -> str:
    """Return what became of runs of a study as a whole, by their records in study.json."""
    statuses = {point.get("status", "waiting") for point in points}
    return next((status for status in ("running", "stopped", "waiting", "failed") if status in statuses), "finished")


def study_tags(folder: Path) -> dict[str, str]:
    """Return what a study is made of: recipes and values, seeds, and how many runs have which state; {} for others.

    Tags and not parameters: they change when the study grows.
    """
    study = read_json(folder / STUDY_FILE)
    if not study:
        return {}
    statuses = [str(point.get("status", "waiting")) for point in study["points"]]
    found = {
        "study": folder.name,
        "role": "study",
        "words": " ".join(study.get("words") or ()),
        "axes": "; ".join(f"{key}={','.join(values)}" for key, values in (study.get("axes") or {}).items()),
        "seeds": ",".join(map(str, study.get("seeds") or ())),
        "baseline": str(study.get("baseline") or ""),
        "runs": ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)),
    }
    return {key: redact(value)[:5000] for key, value in found.items() if value}


def metric_key(name: str, stage: str, stages: list[str]) -> str:
    """Return the server's name of a metric: as in the journal, below its stage when the recipe has several.

    Steps are counted within a stage, so two stages must not share a key.
    """
    key = name if len(stages) < 2 and stage in (*stages, "train") else f"{stage}/{name}"
    return re.sub(r"[^\w./ :-]", "_", key)[:_MOST_CHARACTERS]


def parameters(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, str]:
    """Return the config as flat parameters, `method.stages.train.epochs: "200"`, long values cut, without secrets.

    Only the keys that run.json lists as `parameters`, which decide the result; none before it has a list. A run of an
    earlier version has none: every key.
    """

    def flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from flat(item, f"{key}.{name}" if key else str(name))
            return
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        text = redact(text)
        if len(text) > _MOST_CHARACTERS:
            text = text[: _MOST_CHARACTERS - 20] + " ... see config.yaml"
        yield re.sub(r"[^\w./ :-]", "_", key)[:_MOST_CHARACTERS], text

    found = dict(flat(config, ""))
    if "config_hash" in run and "parameters" not in run:
        return found
    listed = tuple(run.get("parameters") or ())
    return {key: value for key, value in found.items() if key in listed}


def fitted_parameters(run_dir: Path) -> dict[str, str]:
    """Return the numbers that stages without steps chose, and where: `fitted.tau.head.gamma: "0.7"`."""
    found = {}
    for one in choices(evaluations(run_dir), final_evaluations(run_dir)):
        key = f"fitted.{one.stage}.{one.key}"
        found[key] = f"{one.value:g}"
        found[f"{key}.chosen_on"] = one.split or "published default, no validation split"
    return found


def recipe_tags(run: Mapping[str, Any], data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a recipe is called by: method, mix, then, dataset, ratio, experts; `none` for no mixing or stage.

    They are those that chose the config, by run.json; without it, method is the recipe's whole name.
    """
    chosen: dict[str, list[str]] = {}
    for name in run.get("recipe") or ():
        group, _, choice = name.partition("/")
        chosen.setdefault(group, []).append(choice.partition(" on ")[0])
    method, dataset = config.get("method") or {}, config.get("dataset") or {}
    counts = [count for count in data.get("counts") or () if count]
    ratio = dataset.get("imbalance_ratio") if not dataset.get("balanced") else None
    ratio = ratio or (max(counts) / min(counts) if counts else None)
    found = {
        "method": "+".join(chosen.get("method", [])) or method.get("name"),
        "dataset": data.get("dataset") or dataset.get("name"),
        "ratio": None if ratio is None else f"{ratio:.4g}",
        "experts": method.get("num_experts"),
    }
    found |= {group: "+".join(dict.fromkeys(chosen.get(group, ()))) or "none" for group in ("mix", "then") if chosen}
    return {key: str(value) for key, value in found.items() if value is not None}


def tags(run: Mapping[str, Any], data: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return what a run was made with: recipe, commit, command, host, versions, dataset digest, config hash."""
    found: dict[str, Any] = {
        **recipe_tags(run, data, config),
        "study": run.get("study"),
        "command": run.get("command"),
        "mlflow.source.name": "expertail",
        "mlflow.source.git.commit": run.get("commit"),
        "mlflow.source.type": "LOCAL",
        "config_hash": run.get("config_hash") or (_hash(config) if config else None),
        "seed": run.get("seed", config.get("seed")),
        "status": run.get("status"),
        # A tag cannot be taken back: that of an earlier start is overwritten.
        **{name: run[name] or "none" for name in ("problem", "waits_for") if name in run},
        "dataset_digest": data.get("digest"),
        "dataset_images": data.get("total"),
        "resume": run.get("resume"),
        "never_reached": "; ".join(run.get("never_reached") or ()),
        **{what: max(run[what]) for what in ("peak_memory_gib", "gpu_peak_memory_gib") if run.get(what)},
        **{f"version.{name}": version for name, version in (run.get("versions") or {}).items()},
    }
    host = run.get("host")
    found |= {f"host.{name}": value for name, value in host.items()} if isinstance(host, Mapping) else {"host": host}
    return {key: redact(str(value))[:5000] for key, value in found.items() if value not in (None, "")}


def time_ms(run: Mapping[str, Any], name: str) -> int | None:
    """Return the time `created` or `ended` of run.json in unix milliseconds; None where it is missing."""
    value = run.get(name)
    try:
        seconds = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else value
        return None if seconds is None else round(float(seconds) * 1000)
    except (TypeError, ValueError):
        return None


def note(folder: Path, links: str = "") -> str | None:
    """Return the text that MLflow shows as a run's description: its final table; None where there is none yet.

    Of a study it is the beginning of its report, which is Markdown, as far as whole paragraphs fit. Its answers come
    first, before the headings: the page shows few lines at once.

    Args:
        folder: of a run or a study.
        links: a line of Markdown for a study's.
    """
    report, path = folder / "report" / "report.md", folder / "report" / "table.txt"
    if (folder / STUDY_FILE).exists():
        lines = report.read_text().splitlines() if report.exists() else []
        answers = [line for line in lines if line.startswith("- Best ")]
        rest = "\n".join(line for line in lines if line not in answers)
        text = "\n\n".join(filter(None, [links, "\n".join(answers), rest]))
        if len(text) <= _NOTE:
            return text or None
        kept = text[:_NOTE].rpartition("\n\n")[0] or text[:_NOTE]
        return re.sub(r"(\n+#+ [^\n]*)+$", "", kept) or None  # no heading of what is cut off
    return f"```\n{path.read_text()[:_NOTE].rstrip()}\n```" if path.exists() else None


def mlflow_status(run: Mapping[str, Any]) -> str:
    """Return the server's word for the `status` of run.json: RUNNING, FINISHED, FAILED or KILLED."""
    return _STATUS.get(str(run.get("status")), "RUNNING")


def model_name(config: Mapping[str, Any], experiment: str) -> str:
    """Return the name that the run's models are registered under: `<experiment>-<dataset>`.

    All recipes of an experiment that answer with the same classes share it, so that an alias can name the best of them.
    """
    value = config.get("dataset")
    value = value.get("name") if isinstance(value, Mapping) else value
    words = [experiment, value if isinstance(value, str) else None]
    # MLflow takes no name that might be a path.
    return re.sub(r"[^\w. -]|^\.", "_", "-".join(word for word in words if word))


def files(run_dir: Path) -> dict[str, str | Path]:
    """Return the artefacts: name on the server -> a file, or text where secrets are removed or no file exists."""
    found: dict[str, str | Path] = {}
    for path in (run_dir / "config.yaml", run_dir / "run.json"):
        if path.exists():
            found[path.name] = redact(path.read_text())

    patterns = ("data.json", "evaluation/**/*.json", "report/**/*.png", "report/*.txt", "report/*.html")
    of_a_study = ("report/report.*",)
    if study := read_json(run_dir / STUDY_FILE):
        found[STUDY_FILE] = json.dumps(redact_all(study), indent=1) + "\n"
    for path in sorted(path for pattern in patterns + of_a_study for path in run_dir.glob(pattern)):
        found[path.relative_to(run_dir).as_posix()] = path
    data, results = read_json(run_dir / "data.json"), evaluations(run_dir)
    if finals := final_evaluations(run_dir):
        results = {f"{stage}/{which}": one for stage, own in finals.items() for which, one in own.items()}
    if data and results:
        found[PER_CLASS_FILE] = json.dumps(per_class_table(results, data))
    return found


def digest(content: str | Path) -> str:
    """Return the SHA-256 of a text or of a file, hexadecimal."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode()).hexdigest()
    return file_sha256(content)


def exported_models(run_dir: Path) -> dict[str, tuple[Path, str]]:
    """Return the exported ensembles that are complete: name on the server -> folder and digest of its files.

    The names are "last" and "best"; where the recipe has several final stages, first those of each: "crt-last".
    The result is empty when the config says `tracking.log_model: false`.
    """
    found: dict[str, tuple[Path, str]] = {}
    if (read_config(run_dir).get("tracking") or {}).get("log_model") is False:
        return found
    for stage in (*final_evaluations(run_dir), ""):
        for which in ("last", "best"):
            folder = run_dir / "export" / stage / which
            parts = [folder / "model.json", folder / "model.safetensors"]
            if all(part.exists() for part in parts):
                name = f"{stage}-{which}" if stage else which
                found[re.sub(r"[^\w-]", "_", name)] = (folder, _hash([digest(part) for part in parts]))
    return found


def model_evaluation(run_dir: Path, folder: Path) -> dict[str, Any]:
    """Return the evaluation of an exported ensemble; {} where there is none."""
    return read_json((run_dir / "evaluation" / folder.relative_to(run_dir / "export")).with_suffix(".json"))


def model_step(run_dir: Path, folder: Path) -> int:
    """Return the step at which an exported ensemble was evaluated; 0 where that is not known."""
    return int(model_evaluation(run_dir, folder).get("step", 0))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
