"""Aliases of registered models: which run's model is the one to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestration.config.secrets import redact
from orchestration.storage.files import DATA, evaluations, read_json
from orchestration.storage.study_file import read_study_file
from orchestration.tracking.process import State, Target, request_timeout
from orchestration.tracking.uri import check_uri


def set_alias(run_dir: Path, uri: str, experiment: str, model: str, alias: str) -> str:
    """Point an alias at a model of a run, and return a line that says what it was and is.

    Args:
        run_dir: the run folder.
        uri: of the tracking store.
        experiment: that the run is tracked in.
        model: "best" or "last", of one of several final stages "crt-best".
        alias: the name to give.

    Raises:
        ValueError: the run or its model is not in the store, or the store refuses the alias.
    """
    shown = redact(uri)
    uri = check_uri(uri)
    state = State(run_dir, Target(uri, experiment, run_dir.name))
    models = state.values.get("models") or {}
    if model not in models:
        found = f"the run has {', '.join(models)} there" if models else "it has no model of the run"
        raise ValueError(
            f"{run_dir}: {model} is not in {shown}: {found}; send what is missing: expertail sync {run_dir}"
        )
    name, _, version = models[model].removeprefix("models:/").rpartition("/")

    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(uri, uri)
    try:
        with request_timeout():
            before = {str(key): str(value) for key, value in dict(client.get_registered_model(name).aliases).items()}
            client.get_model_version(name, version)
            client.set_registered_model_alias(name, alias, version)
    except MlflowException as problem:
        raise ValueError(f"{models[model]}: {redact(str(problem))}; alias {alias} is as it was in {shown}") from None
    was = before.get(alias)
    change = "as before" if was == version else f"before: version {was}" if was else "new"
    return f"models:/{name}@{alias} is version {version}, {model} of {run_dir.name} ({change})"


@dataclass(frozen=True)
class Choice:
    """The best run of a study for one registered model.

    Attributes:
        run: its folder.
        accuracy: on the split that chose its epoch, fraction.
        split: that one.
        compared: number of runs that it is the best of.
    """

    run: Path
    accuracy: float
    split: str
    compared: int

    @property
    def why(self) -> str:
        """Why it was chosen, as the end of a sentence."""
        shown = "TEST, which is optimistic" if self.split == "test" else self.split
        return f"the best of {self.compared} by accuracy on {shown}: {100 * self.accuracy:.2f} %"


def best_of_study(study: Path, uri: str, stage: str, model: str) -> list[Choice]:
    """Return the best run of a study by the split that chose the epochs, for each registered model that its runs have.

    Runs on the balanced variant of the data, references for relative accuracy, are left out.

    Args:
        study: its folder.
        uri: of the tracking store.
        stage: the final stage that the model is of; "" for the runs' own results.
        model: that the runs must have in the store, as for `set_alias`.

    Raises:
        ValueError: no finished run has such a model there, or runs of one registered model cannot be ranked: they saw
            different data, or were chosen on different splits.
    """
    found: dict[str, list[_Candidate]] = {}
    missing = list[str]()
    for point in read_study_file(study).get("points", ()):
        run = study / point["run"]
        if point.get("role") == "reference" or read_json(run / "run.json").get("status") != "finished":
            continue
        best = evaluations(run, stage).get("best") or {}
        sent = State(run, Target(check_uri(uri), "", run.name)).values.get("models") or {}
        if model not in sent or best.get("selected_value") is None:
            missing.append(run.name)
            continue
        name = sent[model].removeprefix("models:/").rpartition("/")[0]
        split = best.get("selected_on") or best.get("split", "test")
        digest = str(read_json(run / DATA).get("digest", ""))
        found.setdefault(name, []).append(_Candidate(run, float(best["selected_value"]), split, digest))
    if missing or not found:
        what = f"{', '.join(missing)} are without it" if missing else "no run of the study is finished"
        raise ValueError(
            f"{study}: needed {model} of every finished run in {redact(uri)}, but {what}; send what is missing: "
            f"expertail sync {study}"
        )
    return [_best(name, runs) for name, runs in found.items()]


@dataclass(frozen=True)
class _Candidate:
    """A run that may be the best: its folder, its accuracy as a fraction on a split, and the digest of its data."""

    run: Path
    accuracy: float
    split: str
    digest: str


def _best(name: str, candidates: list[_Candidate]) -> Choice:
    """Return the run with the highest accuracy.

    Raises:
        ValueError: accuracies are of different images, so that the highest is that of the easiest data.
    """
    data = {one.digest: one.run.name for one in reversed(candidates)}
    if len(data) > 1:
        told = "; ".join(f"{run} on {digest[:8] or 'unknown data'}" for digest, run in reversed(data.items()))
        raise ValueError(f"{name}: runs saw different data ({told}), so none is the best; promote a run by its folder")
    splits = {one.split: one.run.name for one in candidates}
    if len(splits) > 1:
        told = "; ".join(f"{run} on {split}" for split, run in splits.items())
        raise ValueError(f"{name}: epochs were chosen on different splits ({told}); promote a run by its folder")
    best = max(candidates, key=lambda one: one.accuracy)  # of equals the first, in the study's order
    return Choice(best.run, best.accuracy, best.split, len(candidates))
