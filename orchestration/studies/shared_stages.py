"""Stages that are the same in several runs: found by their digests, trained once, copied to the other runs.

Two stages with equal digests are trained bitwise equally: data, seed, backbone and whatever else lies outside the
stages agree, and so do their own keys, their place in the recipe, and the stages that they begin with or learn from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from orchestration.config.compose import from_yaml
from orchestration.config.identity import identity
from orchestration.config.messages import say
from orchestration.config.run_config import RunConfig
from orchestration.runs.finished import with_threads
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.files import CONFIG, DATA, RUN, read_json, write_atomic
from orchestration.storage.journal import FILE_NAME as JOURNAL
from orchestration.storage.journal import read_journal
from orchestration.storage.run_folder import RunFolder, origin_name

_STAGES = "method.stages."


def stage_digests(config: RunConfig) -> dict[str, str]:
    """Return a digest of each stage, in the order of the recipe.

    A difference outside the stages, in seed or backbone say, changes all of them; the recipe's name changes none. Later
    stages change nothing about those before them.
    """
    flat = identity(config)
    common = {key: value for key, value in flat.items() if not key.startswith(_STAGES) and key != "method.name"}
    digests: dict[str, str] = {}
    for stage, own in config.method.stages.items():
        start = config.method.starts_from(stage)
        sources = [*own.teachers.values(), *([start] if start else [])]
        needed = [digests.get(source.stage, source.stage) for source in sources if source.stage]
        prefix = f"{_STAGES}{stage}."
        keys = {key: value for key, value in flat.items() if key.startswith(prefix)}
        digests[stage] = _digest([common, [*digests, stage], keys, needed])
    return digests


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def untouched_stages(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the stages that are bitwise equal in two runs: they, their initial weights and their teachers agree."""
    a, b = stage_digests(one), stage_digests(other)
    return [stage for stage, digest in a.items() if b.get(stage) == digest]


def take_over_stages(config: RunConfig, path: Path, donors: Iterable[Path]) -> dict[str, str]:
    """Copy the stages that other runs have trained to a run that has not begun them.

    Args:
        config: of the run.
        path: its folder.
        donors: folders of the other runs; those that do not exist or are the run's own are passed over.

    Returns:
        Name of the run that each stage was taken from, with folder and commit of a run that lies elsewhere.
    """
    taken: dict[str, str] = {}
    with contextlib.closing(RunFolder(path)) as folder:
        for donor in donors:
            if donor != path and (donor / CONFIG).exists():
                for stage in _take(donor, config, folder):
                    taken[stage] = _name_of(donor, path)
                    say(f"stage {stage}: taken from run {taken[stage]}, where the same was trained")
    return taken


def _take(donor: Path, wanted: RunConfig, folder: RunFolder) -> list[str]:
    """Copy the finished stages that two runs share. If it is killed at any moment, it can be repeated."""
    # The donor's stored config has the threads that it computed with, which are part of what is compared.
    stored = from_yaml(donor / CONFIG)
    config = folder.stored_config() if folder.started else with_threads(wanted, stored)
    stages = list(config.method.stages)
    source, target = Checkpoints(donor, list(stored.method.stages)), Checkpoints(folder.path, stages)
    target.clean()

    finished = {}
    for stage in untouched_stages(stored, config):
        newest = source.newest_finished(stage, say)
        if newest is not None and target.newest(stage, say) is None:
            finished[stage] = newest
    if not finished:
        return []

    # The order makes it repeatable: a stage counts as trained once its checkpoint is there, which is written last.
    if not folder.started:
        folder.write_config(config)
        write_atomic(folder.path / DATA, (donor / DATA).read_text())
    taken = folder.read_run().get("stages_taken", {})
    folder.update_run(stages_taken=taken | dict.fromkeys(finished, _name_of(donor, folder.path)))
    merge_journals(donor, folder.path, stages, set(finished))
    for stage, newest in finished.items():
        evaluations = donor / "evaluation" / stage
        if evaluations.is_dir():
            shutil.copytree(evaluations, folder.path / "evaluation" / stage, dirs_exist_ok=True)
        if best := newest.state["best"]:
            target.copy_weights(source.folder / best["checkpoint"], best["checkpoint"])
        target.copy_weights(newest.folder, newest.folder.name)  # last: the stage counts as trained from here on
    return list(finished)


def _name_of(donor: Path, ours: Path) -> str:
    """Return what a run is called in another: its name, and with folder and commit if it lies elsewhere."""
    if donor.parent.absolute() == ours.parent.absolute():
        return donor.name
    folder, commit = str(donor.parent.absolute()), read_json(donor / RUN).get("commit")
    return origin_name({"run": donor.name, "folder": folder, "commit": commit})


def merge_journals(donor: Path, ours: Path, stages: list[str], taken: set[str]) -> None:
    """Merge the donor's lines of the stages taken into our journal, in the order of the recipe."""
    lines: dict[str, list[str]] = {stage: [] for stage in stages}
    for folder, is_donor in ((donor, True), (ours, False)):
        for record in read_journal(folder):
            if (record.stage in taken) == is_donor:
                value = record.value if record.value == record.value else None  # NaN is null in the journal
                lines[record.stage].append(json.dumps(record._asdict() | {"value": value}) + "\n")
    write_atomic(ours / JOURNAL, "".join(line for own in lines.values() for line in own))
