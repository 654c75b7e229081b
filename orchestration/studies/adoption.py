"""Finished runs that were trained elsewhere: which are runs of a study, and how they become that.

find          runs in the folders of `adopt`; those that cannot be taken over, and why
Adoption      which points they are, by the identity that tells the same run twice; what the others lend or lack
carry_out     take over what can be taken
    take_over     a verified copy in the study's folder, under the name of the point

A run is copied, not linked: both folders may move or go, and what is evaluated later in one leaves the other alone. The
copy is made beside its place and renamed, so that a run is there whole or not at all. It says where it came from in
run.json under `adopted`. Its config is the one that it was trained with, but for folder, name and tracking. A
tracking.json comes with it: by what that says, the copy gets an MLflow run of its own (tracking/ownership.py).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experts.data.config import DatasetConfig
from experts.data.dataset import selection_digest
from orchestration.config.compose import compose, from_yaml
from orchestration.config.identity import config_hash, difference, identity
from orchestration.config.paths import expand
from orchestration.config.run_config import RunConfig
from orchestration.reports.records import LeftOut, read_run
from orchestration.results.text import plural
from orchestration.runs.finished import with_threads
from orchestration.storage.checkpoint import Checkpoints
from orchestration.storage.files import CONFIG, DATA, LOCK, RUN, read_json, sync_folder
from orchestration.storage.run_folder import RunFolder, has_started
from orchestration.studies.points import Point
from orchestration.studies.shared_stages import stage_digests
from orchestration.studies.study_folder import StudyFolder, refuse

_COPYING = ".adopting-"
_LISTS = ("train_list", "val_list", "test_list")
_NAMED = 12  # runs that are told one by one
_CHARACTERS = 300  # of a problem
_NEAR = 3  # keys in which a run may differ to be told as nearly a run of the study


@dataclass(frozen=True)
class Donor:
    """A finished run that was trained elsewhere.

    Attributes:
        folder: of the run.
        commit: of the code that trained it, as far as it is known.
        config: that it was trained with; keys that are newer have their defaults.
        digest: of the data that it saw.
        identities: digests of its config, as it is, then with its threads left open.
        stages: digests of its stages, of both kinds, with their names.
    """

    folder: Path
    commit: str | None
    config: RunConfig
    digest: str
    identities: tuple[str, ...]
    stages: Mapping[str, str]


@dataclass
class Found:
    """The runs that lie in the folders of `adopt`.

    Attributes:
        donors: finished runs, in order.
        refused: a line for each run that cannot be taken over.
    """

    donors: list[Donor] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def find(folders: Sequence[str], study: StudyFolder) -> Found:
    """Read the runs in some folders, each a run or a folder of runs, but for those that a study has taken over.

    Raises:
        ValueError: a folder is missing, or holds no run.
    """
    found = Found()
    origins = [record["adopted"] for record in study.finished() if record.get("adopted")]
    known = {Path(origin["folder"], origin["run"]) for origin in origins}
    for given in folders:
        folder = expand(given)
        runs = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
        if not runs:
            what = "nothing there" if not folder.exists() else "holds no run"
            raise ValueError(f"study.adopt = {given}: {what}; needed a folder of finished runs, or one of them")
        for run in (run for run in runs if run.absolute() not in known):
            try:
                found.donors.append(_donor(run))
            except (ValueError, OSError, KeyError) as problem:
                found.refused.append(f"{run}: {_short(problem, run)}")
    return found


def _donor(run: Path) -> Donor:
    facts = read_json(run / RUN)
    if (status := facts.get("status", "not begun")) != "finished":
        raise ValueError(f"not finished ({status})")
    config = from_yaml(run / CONFIG)
    both = _as_asked(config)
    stages = {digest: stage for one in both for stage, digest in stage_digests(one).items()}
    if any(source.sibling for stage in config.method.stages.values() for source in stage.sources):
        stages = {}  # their digests have names of siblings, which may be others in the study
    digest = read_json(run / DATA).get("digest")
    if not digest:
        raise ValueError(f"{DATA} is missing, or says nothing about the run's images")
    commit = (facts.get("adopted") or facts).get("commit")
    return Donor(run.absolute(), commit, config, str(digest), tuple(map(config_hash, both)), stages)


def _as_asked(config: RunConfig) -> tuple[RunConfig, RunConfig]:
    """Return a stored config as a study may have asked for it: with its threads, and with open ones."""
    return config, config.model_copy(update={"engine": config.engine.model_copy(update={"threads": None})})


def _short(problem: object, run: Path) -> str:
    """Return a problem in one line, with paths from the folder of the run on."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return " ".join(line.strip() for line in lines).replace(f"{run}/", "")[:_CHARACTERS]


class Adoption:
    """Finished runs from elsewhere, held against the runs of a study.

    Args:
        found: the runs.
        points: of the study.
        begun: by name, of those without a result: whether training has begun.

    Attributes:
        taken: the run that each point is, by the name of the point.
        lent: a run that has trained a stage that points need, by digest of the stage.
        lines: for the operator: what is not taken, and why.
    """

    def __init__(self, found: Found, points: Sequence[Point], begun: Mapping[str, bool]) -> None:
        self.taken: dict[str, Donor] = {}
        self.lent: dict[str, Path] = {}
        self.lines = [f"not taken over: {line}" for line in found.refused[:_NAMED]]
        if len(found.refused) > _NAMED:
            self.lines.append(f"not taken over: {plural(len(found.refused) - _NAMED, 'more run')}")
        by_identity, by_name = {p.identity: p for p in points}, {p.run: p for p in points}
        left = {point.run: point for point in points if point.run in begun}
        others = list[Donor]()
        for donor in found.donors:
            point = next((by_identity[one] for one in donor.identities if one in by_identity), None)
            if point is None:
                others.append(donor)
            elif point.run in self.taken:
                first = self.taken[point.run].folder
                self.lines.append(f"not taken over: {donor.folder}: the same run as {first}, which is taken")
            elif point.run in left:
                if begun[point.run]:
                    self.lines.append(f"not taken over: {donor.folder}: {point.run} has begun here, and goes on")
                elif problem := _other_data(donor, point) or _other_siblings(donor.folder, point, by_name):
                    self.lines.append(f"not taken over: {donor.folder}: {problem}")
                else:
                    self.taken[left.pop(point.run).run] = donor
        unseen = sum(_digest_for(donor, by_name[run]) is None for run, donor in self.taken.items())
        if unseen:
            self.lines.append(f"images of {plural(unseen, 'run')} are not here, and were not compared")
        self._lend(others, list(left.values()))
        self.lines += _nearly(others, list(left.values()))

    def _lend(self, donors: Sequence[Donor], points: Sequence[Point]) -> None:
        """Find out which stages that points need others have trained."""
        needed = {digest: point for point in points for digest in point.stages.values()}
        for donor in donors:
            for digest, stage in donor.stages.items():
                if digest not in needed or digest in self.lent:
                    continue
                problem = _other_data(donor, needed[digest]) or _damage(donor.folder, donor.config, [stage])
                if problem:
                    self.lines.append(f"stage {stage} not taken over: {donor.folder}: {problem}")
                else:
                    self.lent[digest] = donor.folder


def carry_out(
    found: Found, study: StudyFolder, points: Sequence[Point], defaults: Sequence[str], say: Callable[[str], None]
) -> dict[str, Path]:
    """Take over the finished runs that are runs of a study.

    Args:
        found: runs that may be taken.
        study: with its points taken and settled.
        points: of the study.
        defaults: words of every run beside its own.
        say: takes a line for the operator.

    Returns:
        Folders of runs that lend a stage, by its digest; see `Adoption.lent`.
    """
    for copy in study.path.glob(f"{_COPYING}*"):  # of a start that was killed
        shutil.rmtree(copy, ignore_errors=True)
    adoption = held_against(found, study, points)
    by_name = {point.run: point for point in points}
    taken = list[str]()
    for run, donor in adoption.taken.items():
        if problem := take_over(donor, by_name[run], study.path, defaults):
            adoption.lines.append(f"not taken over: {problem}")
        else:
            taken.append(run)
    refuse(study.path.name, study.settle([by_name[run] for run in taken], retry=False))
    for line in adoption.lines:
        say(line)
    sources = Counter(adoption.taken[run].folder.parent for run in taken)
    for folder, count in sources.items():
        say(f"taken over: {plural(count, 'finished run')} of {folder}")
    if adoption.lent:
        say(f"lent: {plural(len(adoption.lent), 'stage')} by {plural(len(set(adoption.lent.values())), 'run')}")
    return adoption.lent


def held_against(found: Found, study: StudyFolder, points: Sequence[Point]) -> Adoption:
    """Hold runs from elsewhere against the points of a study, which need not exist yet."""
    done = {record["identity"] for record in study.finished()}
    left = [point.run for point in points if point.identity not in done]
    return Adoption(found, points, {run: has_started(study.path / run) for run in left})


def take_over(donor: Donor, point: Point, folder: Path, defaults: Sequence[str]) -> str | None:
    """Copy a finished run to its place in a study. Return why it was not done; None if it was.

    Args:
        donor: the run.
        point: that it is.
        folder: of the study.
        defaults: words of every run of the study beside its own: where it is tracked.
    """
    place, copy = folder / point.run, folder / f"{_COPYING}{point.run}"
    try:
        shutil.copytree(donor.folder, copy, ignore=shutil.ignore_patterns(LOCK, ".*.lock", "*.lock", ".writing-*"))
        problem = _damage(copy, donor.config, list(donor.config.method.stages)) or _unreadable(copy)
    except (OSError, shutil.Error) as error:
        problem = str(error)
    if problem:
        shutil.rmtree(copy, ignore_errors=True)
        return f"{donor.folder}: {_short(problem, copy)}"
    origin = {"run": donor.folder.name, "folder": str(donor.folder.parent), "commit": donor.commit}
    with contextlib.closing(RunFolder(copy)) as run:
        run.write_config(_in_study(donor.config, point, folder, defaults))
        run.update_run(study=folder.name, adopted=origin)
    sync_folder(copy)
    if place.exists():  # of a start that was refused; nothing was trained there
        shutil.rmtree(place)
    copy.rename(place)
    sync_folder(folder)
    return None


def _in_study(stored: RunConfig, point: Point, folder: Path, defaults: Sequence[str]) -> RunConfig:
    """Return the config of a run with folder, name and tracking of the study."""
    ours = compose([*point.words, *defaults]).config
    run = stored.run.model_copy(update={"dir": str(folder), "name": point.run})
    return stored.model_copy(update={"run": run, "tracking": ours.tracking})


def _damage(run: Path, config: RunConfig, stages: Sequence[str]) -> str | None:
    """Say what is wrong with the checkpoints of stages; every byte is read. None if they are whole."""
    checkpoints = Checkpoints(run, list(config.method.stages))
    for stage in stages:
        said: list[str] = []
        try:
            newest = checkpoints.newest_finished(stage, said.append)
        except (ValueError, OSError) as problem:
            return _short(problem, run)
        if newest is None:
            return said[0] if said else f"stage {stage} has no checkpoint of its end"
    return None


def _unreadable(run: Path) -> str | None:
    """Say why a report cannot read a run; None if it can."""
    result = read_run(run)
    return f"{result.state}: {result.why}" if isinstance(result, LeftOut) else None


# Data


def _other_data(donor: Donor, point: Point) -> str | None:
    """Say that a run saw other images than those that a point of the study would; None if not, or if none are here."""
    here = _digest_for(donor, point)
    if here is None or here == donor.digest:
        return None
    return f"trained on other images than those at dataset.root (digest {donor.digest[:12]}, here {here[:12]})"


def _other_siblings(folder: Path, point: Point, points: Mapping[str, Point]) -> str | None:
    """Say that a run learnt from another run than the one that the study has by this name; None if it did not.

    Args:
        folder: of the run.
        point: that it is, but for those that it learnt from.
        points: of the study, by name.
    """
    for name in point.after:
        sibling = folder.parent / name
        try:
            config = from_yaml(sibling / CONFIG)
        except ValueError:
            return f"it learnt from {name}, which is not beside it, so that it cannot be compared"
        same = points[name].identity in {config_hash(one) for one in _as_asked(config)}
        if not same:
            return f"it learnt from another run called {name} than the study has"
        if problem := _other_siblings(sibling, points[name], points):
            return problem
    return None


def _digest_for(donor: Donor, point: Point) -> str | None:
    """Return the digest of the data of a run where a point of the study has them; None if they are not there."""
    words = tuple(word for word in point.words if word.startswith("dataset"))
    here = _data_of(words)
    places = {key: getattr(here, key) for key in ("root", *(k for k in _LISTS if any(f".{k}=" in w for w in words)))}
    config = donor.config.dataset.model_copy(update={**places, "download": False})
    left_out = tuple(str(one["path"]) for one in read_json(donor.folder / DATA).get("left_out") or ())
    return _digest_here(config.model_dump_json(), left_out)


@functools.lru_cache(maxsize=64)
def _data_of(words: tuple[str, ...]) -> DatasetConfig:
    return compose(list(words)).config.dataset


@functools.lru_cache(maxsize=64)
def _digest_here(dataset: str, left_out: tuple[str, ...]) -> str | None:
    """Return the digest of a data set on this machine; None where it is not."""
    try:
        return selection_digest(DatasetConfig.model_validate_json(dataset), left_out)
    except (ValueError, OSError):
        return None


# What is not taken


def _nearly(donors: Sequence[Donor], points: Sequence[Point]) -> Iterator[str]:
    """Yield a line for each run that differs in few keys from one that is to be trained; of the first ones."""
    composed = functools.cache(lambda words: compose(list(words)).config)
    told = 0
    for donor in donors:
        prefix, own = f"{donor.config.method.name}-", identity(donor.config)
        for point in points:
            if told >= _NAMED or point.seed != donor.config.seed or not point.run.startswith(prefix):
                continue
            lines = difference(own, identity(with_threads(composed(point.words), donor.config)))
            if len(lines) <= _NEAR:
                told += 1
                yield f"not taken over: {donor.folder} as {point.run}: {'; '.join(lines)}"
