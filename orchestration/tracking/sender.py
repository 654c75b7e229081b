"""Sends a run's journal and results to MLflow, beside training and never in its way.

The run folder is the truth; this file reads it. During training a process of its own, at the lowest priority, follows
`metrics.jsonl` and sends it in batches (`python -m orchestration.tracking.sender RUN_DIR`, from `start_uploader`). A
server that is slow, broken or gone costs telemetry until it is back, and `expertail sync RUN` sends the rest later. The
uploader ends when its parent ends, however that happened.

Nothing is sent twice, whichever process is killed at whatever moment:
- the MLflow run carries a key that was saved in the run folder before the run was created, and is found by it again; a
  second one, created by a request whose answer came too late, is removed;
- the server itself says how far each metric is: points that are not beyond its last step are skipped. So when a run is
  resumed and repeats steps, the points sent first stay (on CPU the repeated ones are equal);
- a batch that arrived although its answer was lost has the journal's timestamps, by which MLflow recognises it;
- files are sent again only when they changed; models are found by the digest of their weights;
- nothing else repeats a request: MLflow's own retries, which do not check what arrived, are switched off.

A run of a study is a child of the MLflow run of its row, the runs that differ in their seed alone; the first of them
creates it. The folder of a study holds those of its runs and is uploaded like a run, with its own files and its rows.

MLflow is imported in the functions that need it: the import costs seconds, which no driver should pay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experts.data.names import readable
from orchestration.storage import journal
from orchestration.storage.files import read_config
from orchestration.storage.study_file import STUDY_FILE
from orchestration.tracking import contents
from orchestration.tracking.headline import FOR_TRAINING, VIEW, headline, in_words, selection_tag
from orchestration.tracking.mlflow_model import save_pyfunc
from orchestration.tracking.mlflow_runs import PARENT, find_experiment, find_row, find_run, update_views
from orchestration.tracking.process import (
    STATE_FILE,
    TIMEOUT,
    JournalTail,
    RedactedStream,
    State,
    Target,
    chunks,
    file_version,
    flush,
    follow,
    hold_lock,
    incomplete_message,
    request_timeout,
    schema_lock,
    set_priority,
)
from orchestration.tracking.study_rows import StudyRow, row_of
from orchestration.tracking.study_sender import StudySender
from orchestration.tracking.uri import check_uri

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_PAGE = "artifacts/report/index.html"
_BATCH = 1000  # points; MLflow takes no more at once
_ENVIRONMENT = {
    TIMEOUT: "5",  # seconds; the default of 120 would hold up the end of a run
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}

_NO_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # whatever the operator's environment says

_log = logging.getLogger("expertail.tracking")


def sync(
    run_dir: str | os.PathLike[str],
    uri: str,
    experiment: str = "expertail",
    run_name: str | None = None,
    *,
    wait_s: float = 60.0,
    status: str | None = None,
) -> str | None:
    """Upload everything of a run that the server does not have yet, in this process.

    Arguments and result are those of `start_uploader` and `Uploader.finish`.

    Raises:
        ValueError: the URI is not that of a tracking store, or `tracking.json` is damaged.
    """
    run_dir = Path(run_dir)
    target = Target(check_uri(uri), experiment, run_name or run_dir.name)
    with hold_lock(run_dir / f".{STATE_FILE}.lock", wait_s=2.0) as ours:
        if not ours:
            return incomplete_message(run_dir, uri, "another process is uploading this run; wait until it ends")
        with request_timeout():
            problem = flush(MlflowSender(run_dir, target), wait_s, status)
    return None if problem is None else incomplete_message(run_dir, uri, problem)


class MlflowSender:
    """The `Sender` of one run folder and an MLflow store; every call may raise."""

    def __init__(self, run_dir: Path, target: Target) -> None:
        os.environ.update({key: os.environ.get(key, value) for key, value in _ENVIRONMENT.items()} | _NO_RETRIES)
        self._run_dir = run_dir
        self._target = target
        self.state = State(run_dir, target)
        self._tail = JournalTail(run_dir / journal.FILE_NAME)
        self._client: Any = None
        self._run_id = ""
        self._steps: dict[str, int] = {}  # by metric: the last step that the server has, or that waits to be sent
        self._params: set[str] = set()
        self._stages: list[str] = []
        self._described: Any = None
        self._row: StudyRow | None = None  # of the study that the run belongs to
        self._rows: StudySender | None = None  # of the study that the folder is
        self._unsent: list[Any] = []

    @property
    def has_run(self) -> bool:
        """Whether the folder holds a run or a study yet."""
        return any((self._run_dir / name).exists() for name in ("config.yaml", STUDY_FILE))

    def connect(self) -> None:
        """Find or create the MLflow run; do nothing once that has succeeded."""
        if self._client is not None:
            return
        import mlflow

        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        with schema_lock(self._target.uri, self._run_dir.parent):
            given = os.environ.get(URI_VARIABLE)
            mlflow.set_tracking_uri(self._target.uri)  # a SQLite registry looks the models up by it
            mlflow.set_registry_uri(self._target.uri)
            # MLflow writes it to the environment, where a later run of this process would take it for the user's.
            os.environ.pop(URI_VARIABLE, None)
            os.environ.update({} if given is None else {URI_VARIABLE: given})
            client = mlflow.MlflowClient(self._target.uri, self._target.uri)
            experiment_id = find_experiment(client, self._target, self._run_dir)

        study = contents.study_folder(self._run_dir)
        self._row = None if study is None else row_of(self._run_dir)
        tags = {}
        if study is not None and self._row is not None:
            state = State(study, self._target)
            tags[PARENT] = find_row(client, experiment_id, study, state, self._row)
        self._run_id = find_run(client, experiment_id, self._run_dir, self.state, self._target, tags)
        run = client.get_run(self._run_id)
        self._steps = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
        self._params = set(run.data.params)
        if run.info.status != "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        if (self._run_dir / STUDY_FILE).exists():
            self._rows = StudySender(client, experiment_id, self._run_id, self._run_dir, self.state)
        self._client = client
        _log.info("run %s of experiment %s", self._run_id, self._target.experiment)

    def describe(self) -> None:
        """Send parameters, tags, dataset and files, once and whenever the files that describe the run change.

        Of a run that is finished, send its headline metrics too; of a study, its totals and rows.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag

        files = ("config.yaml", "run.json", "data.json", STUDY_FILE, "report/index.html")
        state = [file_version(self._run_dir / name) for name in files]
        if state == self._described:
            return

        run, data, config = contents.describe_folder(self._run_dir)
        self._stages = list((config.get("method") or {}).get("stages") or [])
        # Parameters cannot change on the server; those of the first start stay.
        known = contents.parameters(config, run) | contents.fitted_parameters(self._run_dir)
        params = {k: v for k, v in known.items() if k not in self._params}
        for chunk in chunks([Param(key, readable(value)) for key, value in params.items()], 100):
            self._client.log_batch(self._run_id, params=chunk, synchronous=True)
        self._params |= set(params)

        found = contents.tags(run, data, config) | contents.study_tags(self._run_dir) | selection_tag(self._run_dir)
        if self._row is not None:
            found |= {"recipe": self._row.name, "role": self._row.role}
        tags = [RunTag(key, readable(value)) for key, value in found.items()]
        if table := contents.note(self._run_dir, self._links()):
            tags.append(RunTag("mlflow.note.content", readable(table)))
        for chunk in chunks(tags, 100):
            self._client.log_batch(self._run_id, tags=chunk, synchronous=True)
        # With the time at which the run ended: sent again they are the same points.
        at = contents.time_ms(run, "ended") or 0
        if metrics := [Metric(name, value, at, 0) for name, value in headline(self._run_dir).items()]:
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
        if self._rows is not None:
            self._rows.send()

        if data.get("digest"):
            profile = {"images": data.get("total"), "classes": len(data.get("counts", []))}
            name = str(data.get("dataset", "dataset"))[:500]
            dataset = Dataset(
                name, str(data["digest"])[:36], "local", json.dumps({"dataset": name}), profile=json.dumps(profile)
            )
            inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
            self._client.log_inputs(self._run_id, inputs)
        self.send_files()
        self._described = state

    def _links(self) -> str:
        """Return links to the pages of a study, in Markdown."""
        page = f"#/experiments/{self.state.values['experiment_id']}/runs"
        rows = f"[Recipes, means over seeds]({page}?viewStateShareKey={VIEW}&{FOR_TRAINING})"
        return f"{rows} | [Report]({page}/{self._run_id}/{_PAGE}?{FOR_TRAINING})"

    def send_points(self, deadline: float) -> bool:
        """Send the journal's new lines; a batch that fails is kept and sent first the next time.

        Args:
            deadline: by `time.monotonic()`; no new batch is started after it.

        Returns:
            True where everything in the journal was sent.
        """
        from mlflow.entities import Metric

        records = self._tail.records()
        while time.monotonic() < deadline:
            for record in records:
                key = contents.metric_key(record.name, record.stage, self._stages)
                is_nan = record.value != record.value  # a missing value, as of a group without images
                if not is_nan and record.step > self._steps.get(key, -1):
                    self._unsent.append(Metric(key, record.value, round(record.time * 1000), record.step))
                    self._steps[key] = record.step
                if len(self._unsent) == _BATCH:
                    break  # `records` continues from here in the next turn
            if not self._unsent:
                return True
            self._client.log_batch(self._run_id, metrics=self._unsent, synchronous=True)
            self._unsent = []
        return False

    def send_system(self) -> None:
        """Send the load of this machine under MLflow's names of system metrics; lost when the request fails."""
        if self._rows is not None:  # a study's runs do
            return
        import psutil
        from mlflow.entities import Metric

        memory = psutil.virtual_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": memory.percent,
            "system/system_memory_usage_megabytes": memory.used / 1e6,
        }
        now, step = round(time.time() * 1000), 1 + max(self._steps.get(name, -1) for name in values)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._steps.update(dict.fromkeys(values, step))  # first: only the answer may be lost
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)

    def send_files(self) -> None:
        """Send the files that changed since they were last sent."""
        sent = self.state.values["files"]
        for name, content in contents.files(self._run_dir).items():
            digest = contents.digest(content)
            if sent.get(name) == digest:
                continue
            if isinstance(content, str):
                self._client.log_text(self._run_id, readable(content), name)
            else:
                folder = str(Path(name).parent)
                self._client.log_artifact(self._run_id, str(content), None if folder == "." else folder)
            if name == contents.PER_CLASS_FILE:
                table = [{"path": name, "type": "table"}]
                self._client.set_tag(self._run_id, "mlflow.loggedArtifacts", json.dumps(table))
            sent[name] = digest
            self.state.save()

    def send_models(self) -> None:
        """Register the exported ensembles; tags of a version say of which run and which of its models it is.

        No alias is set: `expertail promote` does that, so that no run takes one from another by ending later.
        """
        from mlflow.exceptions import MlflowException

        found = contents.exported_models(self._run_dir)
        if not found:
            return
        name = contents.model_name(read_config(self._run_dir), self._target.experiment)
        with contextlib.suppress(MlflowException):  # exists; anything else shows at the next call
            self._client.create_registered_model(name)

        versions = {}  # by digest; under the name that a run's models had when they were sent first
        for version in self._client.search_model_versions(f"run_id = '{self._run_id}'"):
            versions[version.tags.get("expertail.digest")] = version

        for digest in dict.fromkeys(digest for _, digest in found.values()):
            same = [which for which, (_, other) in found.items() if other == digest]
            if digest not in versions:
                model_id = self._send_model(same[-1], found[same[-1]][0], digest)
                versions[digest] = self._client.create_model_version(
                    name, f"models:/{model_id}", run_id=self._run_id, model_id=model_id,
                    tags={"expertail.digest": digest, "run": self._target.run_name}, await_creation_for=30,
                    description=in_words(contents.model_evaluation(self._run_dir, found[same[-1]][0])),
                )  # fmt: skip
            version, label = versions[digest], ", ".join(same)
            if version.tags.get("model") != label:
                self._client.set_model_version_tag(version.name, version.version, "model", label)
        current = {digest for _, digest in found.values()}
        for digest, version in versions.items():
            if digest not in current and version.tags.get("model"):  # of an earlier end of this run
                self._client.delete_model_version_tag(version.name, version.version, "model")
        self.state.values["models"] = {
            which: f"models:/{versions[digest].name}/{versions[digest].version}" for which, (_, digest) in found.items()
        }
        self.state.save()

    def _send_model(self, which: str, folder: Path, digest: str) -> str:
        """Upload an ensemble as a logged model, unless that was done before. Return the model's id."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        filters = f"source_run_id = '{self._run_id}' AND tags.`expertail.digest` = '{digest}'"
        experiment_id = self.state.values["experiment_id"]
        found = self._client.search_logged_models([experiment_id], filters)
        logged = found[0] if found else self._client.create_logged_model(
            experiment_id, name=which, source_run_id=self._run_id, tags={"expertail.digest": digest}
        )  # fmt: skip

        with tempfile.TemporaryDirectory() as scratch:
            model = Model(
                artifact_path=logged.artifact_location, run_id=self._run_id,
                model_uuid=logged.model_id, model_id=logged.model_id,
            )  # fmt: skip
            save_pyfunc(Path(scratch), folder, model)
            self._client.log_model_artifacts(logged.model_id, str(Path(scratch) / "model"))
        self._client.finalize_logged_model(logged.model_id, "READY")

        outputs = self._client.get_run(self._run_id).outputs
        if logged.model_id not in {output.model_id for output in outputs.model_outputs}:
            step = contents.model_step(self._run_dir, folder)
            self._client.log_outputs(self._run_id, [LoggedModelOutput(logged.model_id, step)])
        return logged.model_id

    def close(self, status: str | None) -> None:
        """Set the final status of the run; it stays as it is where the folder calls the run running."""
        run = contents.describe_folder(self._run_dir)[0]
        status = status or contents.mlflow_status(run)
        self._client.set_tag(self._run_id, "status", str(run.get("status", status.lower())))
        experiment_id = self.state.values["experiment_id"]
        find_run(self._client, experiment_id, self._run_dir, self.state, self._target, {})  # no strays
        update_views(self._client, self._client.get_experiment(experiment_id), self._run_dir)  # its data are known now
        if self._rows is not None and status in ("KILLED", "FAILED"):
            self._rows.send(ended=status)
        if status != "RUNNING":
            ended = contents.time_ms(run, "ended") if status == "FINISHED" else None
            self._client.set_terminated(self._run_id, status, ended)


def main(arguments: list[str]) -> int:
    """Upload a run until told to finish.

    Standard input holds the target as one line of JSON, later a line with `finish`. Where it ends without one, the
    driver was killed: send the rest for 10 s and call the run KILLED.

    Args:
        arguments: the run folder, and the number of an open file for lines that the driver is to say at once.
    """
    # Service managers and batch systems send these to everybody; the driver says when to end.
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    set_priority(10)  # before the workers, which Ray has at 15; `follow` yields to them
    run_dir = Path(arguments[0])
    target = Target(**json.loads(sys.stdin.readline()))
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.INFO)
    last: dict[str, Any] = {"finish": 10.0, "status": "KILLED"}  # unless the parent says otherwise
    wake = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            last.update(json.loads(line))
            break
        wake.set()
        set_priority(0)  # training is over; the driver waits

    def report(problem: str) -> None:
        with contextlib.suppress(OSError):  # the driver has gone
            os.write(int(arguments[1]), problem.encode() + b"\n")

    threading.Thread(target=listen, daemon=True).start()
    return 0 if upload(run_dir, target, wake, last, report) is None else 3


def upload(
    run_dir: Path, target: Target, wake: threading.Event, last: Mapping[str, Any], report: Callable[[str], None]
) -> str | None:
    """Upload a run until woken, and then the rest of it.

    Args:
        run_dir: the run folder, or that of a study.
        target: where to.
        wake: set when the run has ended.
        last: how it has ended, and how long the rest may take; read once woken.
        report: takes a problem that will not pass by itself.

    Returns:
        None, or what is missing and why.
    """
    # An uploader whose driver was killed ends by itself: wait for it.
    with hold_lock(run_dir / f".{STATE_FILE}.lock", wait_s=60.0) as ours:
        if not ours:
            _log.error("another process is uploading this run")
            return "another process is uploading this run"
        sender = MlflowSender(run_dir, target)
        follow(sender, wake, report=report)
        set_priority(0)  # whatever `follow` set last
        return flush(sender, last["finish"], last["status"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
