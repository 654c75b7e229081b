"""Aliases of registered models: which run's model is the one to use."""

from __future__ import annotations

from pathlib import Path

from orchestration.config.secrets import redact
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
