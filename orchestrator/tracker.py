"""MLflow: runs, parameters, batched metrics, artifacts. The only module that imports mlflow.

One process writes, the driver: trials send it their records. A sweep is a parent run (tag kind=sweep), each trial its child
(kind=trial), each seed's stream a grandchild (kind=stream). A metric's step is the task, or the epoch under `train/`.
"""

from __future__ import annotations

import fcntl
import getpass
import importlib
import importlib.metadata
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models.model import Model
from mlflow.models.signature import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec
from PIL import Image
from sqlalchemy import create_engine
from torch import Tensor

import cavs_model
from cavs_model.checkpoint import ABOUT, WEIGHTS
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.contact_sheet import contact_sheet
from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES
from cavs_model.errors import InputError
from cavs_model.metrics import added_classes, backward_transfer, f_score, forgetting, iou, numbers, task_matrix
from cavs_model.types import AUDIO_VISUAL
from orchestrator.environment import environment
from orchestrator.experiment import Experiment, file_name, fingerprint, flatten, plain
from orchestrator.redaction import redacted
from orchestrator.stream import TaskOutcome

EXPERIMENT = "cavs"
ENVIRONMENT_FILE = "environment.json"
METRICS_A_REQUEST = 1000  # limits of MLflow's log_batch
PARAMS_A_REQUEST = 100
PARAM_CHARACTERS = 6000
CONNECT_SECONDS = 8
TAG_CHARACTERS = 4900  # of 5000
VIEW = "cavs"  # the key of our view of the run table, as `?viewStateShareKey=cavs` in its address
COLUMNS = (
    "tags.`kind`", "tags.`method`", "tags.`setting`", "tags.`seed`",
    "metrics.`objective`", "metrics.`miou/all`", "metrics.`miou/old`", "metrics.`miou/new`",
    "metrics.`memory/bytes`", "metrics.`cost/worker_seconds`", "tags.`commit`",
)  # fmt: skip
DATA_PICTURE, SHOWN_CLIPS = "data_train.png", 6
MODEL = "model"  # the name of a run's model: runs:/<run>/model
MODEL_CODE = Path(__file__).with_name("model_code.py")
MODEL_PACKAGES = ("mlflow", "torch", "torchvision", "torchaudio", "numpy", "safetensors", "efficientnet-lite-pytorch")


@dataclass(frozen=True)
class Record:
    """What one task of a stream has to log: plain values, so that it travels from a trial to the driver."""

    metrics: Mapping[str, float] = field(default_factory=dict)  # step = task
    losses: tuple[tuple[str, float, int], ...] = ()  # (name, value, epoch over all tasks)
    task: int = 0
    artifacts: Mapping[str, Any] = field(default_factory=dict)  # path -> JSON value


def record_of(outcome: TaskOutcome) -> Record:
    """The record of a task."""
    folder, names = f"task_{outcome.task.index}", outcome.class_names
    metrics = outcome.metrics() | outcome.diagnoses()
    metrics = with_short_names(metrics)
    metrics["memory/rows"] = float(len(outcome.state.memory.rows))
    metrics["memory/bytes"] = float(outcome.memory_bytes)
    metrics["cost/worker_seconds"] = sum(about.seconds * about.world_size for about in outcome.trained.values())
    losses = tuple(
        (f"train/{network}/{term}", value, outcome.first_epoch + epoch)
        for network, about in outcome.trained.items()
        for epoch, terms in enumerate(about.history)
        for term, value in terms.items()
    )
    artifacts: dict[str, Any] = {}
    for split in outcome.counts:
        file, history = f"{split.replace('/', '_')}.json", outcome.history(split)
        artifacts[f"{folder}/confusion_{file}"] = _confusion(history[-1], names)
        artifacts[f"{folder}/matrix_{file}"] = _matrix(history, names)
    rows = [{"sample_id": row.sample_id, "class": names[row.class_id], **row.scores} for row in outcome.state.memory.rows]
    artifacts[f"{folder}/memory.json"] = {
        "rows": rows,
        "samples": len(outcome.state.memory.sample_ids),
        "bytes": outcome.memory_bytes,
        "hash": fingerprint(rows),
    }
    # By these the report and predict find the networks in the store, and the report sees what the memory was chosen from.
    artifacts[f"{folder}/networks.json"] = {network: Path(path).name for network, path in outcome.state.checkpoints.items()}
    if outcome.after is not None:
        columns = {name: list(column) for name, column in outcome.after.columns.items()}
        artifacts[f"{folder}/scores.json"] = {"sample_ids": list(outcome.after.sample_ids), "columns": columns}
    if not outcome.task.is_base:
        rehearsal = outcome.rehearsal
        artifacts[f"{folder}/collisions.json"] = {
            "classes": [_named(record, names) for record in rehearsal.table],
            "pairs": [_named(record, names) for record in rehearsal.pairs],
            "drawn": [{"sample_id": row.sample_id, "class": names[row.class_id]} for row in rehearsal.drawn],
            "rows": len(rehearsal.rows),
        }
    return Record(metrics, losses, outcome.task.index, artifacts)


def with_short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, and the validation split's without its name: it is the one that chooses, and every run has it."""
    short = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
    return {**metrics, **short}


def _confusion(counts: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Pixel counts with the classes' names, and what they say of each class; null where a class has no pixel of truth."""
    seen = names[: len(counts)]
    return {
        "classes": seen,
        "counts": counts.tolist(),
        "iou": dict(zip(seen, numbers(iou(counts)), strict=True)),
        "f_score": dict(zip(seen, numbers(f_score(counts)), strict=True)),
    }


def _matrix(history: Sequence[Tensor], names: Sequence[str]) -> dict[str, Any]:
    """The task x task matrix, and forgetting and backward transfer of each earlier task; null where there is no value."""
    matrix = task_matrix(history)
    return {
        "classes": [list(names[span.start : span.stop]) for span in added_classes(history)],
        "miou": [numbers(row) for row in matrix],
        "forgetting": numbers(forgetting(matrix)),
        "backward_transfer": numbers(backward_transfer(matrix)),
    }


def _named(record: Mapping[str, float], names: Sequence[str]) -> dict[str, Any]:
    """The record with names in place of class ids."""
    fields: dict[str, Any] = dict(record)
    for key in ("class", "old_class", "new_class"):
        if key in record:
            fields[key] = names[int(record[key])]
    return fields


class Tracker:
    """Writes to one MLflow tracking store. InputError from the constructor, within seconds, where it cannot be reached."""

    def __init__(self, uri: str, artifact_root: Path) -> None:
        self.uri = uri
        self._common: dict[str, str] = {}  # tags of every run that begins
        self._started: dict[str, float] = {}  # run -> when it began, in seconds since the epoch
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # a line per table at first contact
        try:
            with _patience(), _alone(uri):
                _try(uri)
                self._client: Any = _Discreet(MlflowClient(tracking_uri=uri))
                self.experiment_id = self._experiment(artifact_root)
                self._describe_experiment()
        except Exception as error:  # whatever the store's driver raises: HTTP, SQLAlchemy, file system
            reason = (redacted(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
            if isinstance(error, ModuleNotFoundError):  # of the database's driver
                reason += " (pip install -e '.[postgres]' has PostgreSQL's)"
            raise InputError(
                f"MLflow cannot be reached at {without_password(uri)}: {reason}; set MLFLOW_TRACKING_URI to a running "
                "server (http://host:port) or a database (sqlite:///absolute/path.db), or unset it for the default"
            ) from (error if redacted(str(error)) == str(error) else None)

    def _experiment(self, artifact_root: Path) -> str:
        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is not None and found.lifecycle_stage == "active":
            return str(found.experiment_id)
        if found is not None:
            raise InputError(f"its experiment {EXPERIMENT!r} is deleted; restore it with: mlflow experiments restore")
        # A server knows where its artifacts go; beside a database of our own they lie beside it.
        location = None if self.uri.startswith(("http://", "https://")) else artifact_root.absolute().as_uri()
        return str(self._client.create_experiment(EXPERIMENT, artifact_location=location))

    @property
    def shown(self) -> str:
        """The URI without its password."""
        return without_password(self.uri)

    @contextmanager
    def checked(self) -> Iterator[str]:
        """A run that this process has tried, for others to try; deleted afterwards. InputError where that fails."""
        with self._trying():
            run = self.start("check", "check", {"a": 1})
        try:
            self.try_run(run, "driver")
            yield run
        finally:
            with self._trying():
                self._client.delete_run(run)

    def try_run(self, run_id: str, name: str) -> None:
        """Writes a metric and an artifact of this name into `checked`'s run and reads both. InputError where that fails."""
        with self._trying():
            self.metrics(run_id, {name: 0.5}, 0)
            self.artifact(run_id, f"{name}.txt", "written by orchestrator.check")
            read = self._client.get_run(run_id).data
            files = [file.path for file in self._client.list_artifacts(run_id)]
        if (read.params, read.metrics.get(name)) != ({"a": "1"}, 0.5) or f"{name}.txt" not in files:
            raise InputError(f"MLflow at {self.shown} took a run and gives back something else: {read.metrics}, {files}")

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            with _patience():
                yield
        except Exception as error:  # whatever the store's driver raises: HTTP, SQLAlchemy, file system
            reason = (redacted(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
            raise InputError(f"MLflow at {self.shown} is reached, but does not take a run: {reason}") from None

    def _describe_experiment(self) -> None:
        """The experiment's page: which columns its table has under `view_path`, and what is in it."""
        # By this order alone does the page put runs below their parents.
        view = {"orderByKey": "attributes.start_time", "orderByAsc": False, "selectedColumns": list(COLUMNS)}
        wanted = {
            "mlflow.experimentKind": "custom_model_development",
            f"mlflow.sharedViewState.{VIEW}": json.dumps(view),
            "mlflow.note.content": (
                "Continual audio-visual segmentation. A sweep's or comparison's run holds its trials, and these their streams, "
                f"one per seed.\n\n[The table with the columns that matter]({self.view_path})\n\n"
                "Filters: `tags.kind = 'sweep'`, `tags.kind = 'trial' and metrics.objective > 0.1`, `tags.method = 'cmr'`, "
                "`tags.setting = '16-8'`, `tags.benchmark = 'collage'`, `tags.seed = '0'`, `tags.sweep = 'NAME'`, "
                "`tags.comparison = 'NAME'`, `tags.commit LIKE 'abc%'`.\n"
            ),
        }
        there = self._client.get_experiment(self.experiment_id).tags
        for key, value in wanted.items():
            if there.get(key) != value:
                self._client.set_experiment_tag(self.experiment_id, key, value)

    @property
    def view_path(self) -> str:
        """The run table with our columns, as a path behind the server's address."""
        return f"/#/experiments/{self.experiment_id}/runs?viewStateShareKey={VIEW}"

    def belongs_to(self, kind: str, name: str) -> None:
        """Every run that begins from now on is tagged with the name of what it is part of: "sweep" or "comparison"."""
        self._common = {kind: name}

    def start(
        self, name: str, kind: str, params: Mapping[str, Any], parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Starts a run below `parent` and logs its parameters; the run's id."""
        all_tags = {"kind": kind, **_origin(), **self._common, **(tags or {})}
        if parent:
            all_tags["mlflow.parentRunId"] = parent
        run = self._client.create_run(self.experiment_id, run_name=name, tags=all_tags)
        run_id = str(run.info.run_id)
        entries = [Param(key, _text(value)) for key, value in params.items()]
        for start in range(0, len(entries), PARAMS_A_REQUEST):
            self._client.log_batch(run_id, params=entries[start : start + PARAMS_A_REQUEST])
        return run_id

    def metrics(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        """Logs metrics at one step, in one request."""
        self._batch(run_id, [(name, value, step) for name, value in values.items()])

    def record(self, run_id: str, record: Record) -> None:
        """Logs all that a task has to log."""
        self._batch(run_id, [*((name, value, record.task) for name, value in record.metrics.items()), *record.losses])
        for path, content in record.artifacts.items():
            self.artifact(run_id, path, content)

    def artifact(self, run_id: str, path: str, content: Any) -> None:
        """Logs a JSON value, or text as it is, as the artifact `path`."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        self._client.log_text(run_id, text, path)

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def stream(self, experiment: Experiment, seed: int, name: str, parent: str | None = None) -> str:
        """Starts the run of one seed's stream, with its configuration as parameters and as an artifact; the run's id."""
        params = {**flatten(experiment), "seed": seed}
        run = self.start(name, "stream", params, parent, {**tags_of(experiment), "seed": str(seed)})
        self.artifact(run, "config.json", params)
        self.dataset(run, experiment.benchmark)
        if parent is None:
            self.origin(run)
        return run

    def origin(self, run_id: str) -> None:
        """Logs where the numbers of a run and of those below it come from: command, versions, hardware, commit."""
        self.artifact(run_id, ENVIRONMENT_FILE, environment())

    def dataset(self, run_id: str, benchmark: Benchmark) -> None:
        """Logs the benchmark as the run's data set, its fingerprint as digest."""
        tag = InputTag("mlflow.data.context", "training")
        self._client.log_inputs(run_id, [DatasetInput(_dataset(benchmark), [tag])])

    def image(self, run_id: str, path: str, image: Image.Image) -> None:
        """Logs a picture as the artifact `path`, which ends with its format."""
        self._client.log_image(run_id, image, artifact_file=path)

    def data_picture(self, run_id: str, benchmark: Benchmark) -> None:
        """Logs a few training clips with their masks and sound, as DATA_PICTURE."""
        self.image(run_id, DATA_PICTURE, contact_sheet(benchmark, "train", SHOWN_CLIPS))

    def note(self, run_id: str, text: str) -> None:
        """Sets the run's description, markdown; what is too long for MLflow is cut at a line."""
        if len(text) > TAG_CHARACTERS:
            text = text[:TAG_CHARACTERS].rpartition("\n")[0] + "\n..."
        self.tag(run_id, {"mlflow.note.content": text})

    def describe(self, run_id: str, plan: Mapping[str, Any], benchmark: Benchmark) -> None:
        """Logs what is known of a sweep or comparison before it is done: command and plan, where it comes from, its data."""
        self.artifact(run_id, "config.json", {"command": [redacted(each) for each in sys.argv], **plan})
        self.origin(run_id)
        self.dataset(run_id, benchmark)
        self.data_picture(run_id, benchmark)

    def noted(self, run_id: str) -> bool:
        """Whether the run has a description. InputError where there is no such run."""
        return "mlflow.note.content" in self.tags(run_id)

    def address(self, run_id: str, part: str = "") -> str:
        """A run's page, or "artifacts/report.html" of it, as a path behind the server's address."""
        return f"/#/experiments/{self.experiment_id}/runs/{run_id}" + (f"/{part}" if part else "")

    def system(self, run_id: str, metrics: Mapping[str, float], taken: float) -> None:
        """Logs what nodes did at a time, in seconds since the epoch; the step is seconds since the run began."""
        if run_id not in self._started:
            self._started[run_id] = self._client.get_run(run_id).info.start_time / 1000
        step = max(0, int(taken - self._started[run_id]))
        self._batch(run_id, [(name, value, step) for name, value in metrics.items()], taken=taken)

    def model(self, run_id: str, checkpoint: Path, classes: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Logs a checkpoint as the run's model, with metrics that the run does not have yet, unless the run has a model.

        `mlflow.pyfunc.load_model("runs:/<run>/model")` loads it, and a registry takes it from there. It holds the checkpoint's
        files, `classes` as classes.json beside them, and our code, but no pickle.
        """
        run = self._client.get_run(run_id)
        if run.outputs is not None and run.outputs.model_outputs:
            return
        about = {name: value for name, value in run.data.params.items() if not name.startswith("resources.")}
        logged = self._client.create_logged_model(self.experiment_id, MODEL, run_id, params=about, model_type="segmentation")
        with TemporaryDirectory() as folder:
            path = write_model(Path(folder), checkpoint, classes, Model(run_id=run_id, model_id=logged.model_id))
            self._client.log_model_artifacts(logged.model_id, str(path))
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        if metrics:
            self._batch(run_id, [(name, value, step) for name, value in metrics.items()], model=logged.model_id)

    @property
    def open_hint(self) -> str:
        """How to look at the runs."""
        if self.uri.startswith(("http://", "https://")):
            return f"open {without_password(self.uri).rstrip('/')}{self.view_path}"
        return (
            f"make ui (or: mlflow ui --host 127.0.0.1 --backend-store-uri {without_password(self.uri)}), "
            f"then open http://127.0.0.1:5000{self.view_path}"
        )

    def child(self, parent: str, tags: Mapping[str, str]) -> str:
        """The run below `parent` that has these tags, "" where there is none: begun by a process that could not note its id."""
        wanted = {"mlflow.parentRunId": parent, **tags}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        found = self._client.search_runs([self.experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else ""

    def resume(self, run_id: str) -> None:
        """Sets a run that was cut off to running again. InputError where there is no such run."""
        try:
            self._client.update_run(run_id, "RUNNING")
        except MlflowException as error:
            raise InputError(
                f"MLflow at {without_password(self.uri)} has no run {run_id}, which is to go on: {error}"
            ) from error

    # What `predict` reads.

    def tags(self, run_id: str) -> dict[str, str]:
        """A run's tags. InputError where there is no such run."""
        try:
            return dict(self._client.get_run(run_id).data.tags)
        except MlflowException as error:
            raise InputError(f"MLflow at {without_password(self.uri)} has no run {run_id!r}") from error

    def streams_below(self, run_id: str) -> dict[str, str]:
        """Id -> name of the streams below a sweep, a trial or a comparison."""
        children = self._client.search_runs([self.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
        found: dict[str, str] = {}
        for child in reversed(children):  # MLflow's order is the newest first
            if child.data.tags.get("kind") == "stream":
                found[child.info.run_id] = child.info.run_name
            else:
                found |= self.streams_below(child.info.run_id)
        return found

    def networks_of(self, run_id: str) -> dict[int, str]:
        """Task, from 0 -> the store's address of the audio-visual network after it, "networks/KEY", as far as a stream came."""
        found = {}
        for item in self._client.list_artifacts(run_id):
            number = item.path.removeprefix("task_")
            path = f"{item.path}/networks.json"
            if number.isdecimal() and path in {inner.path for inner in self._client.list_artifacts(run_id, item.path)}:
                with _quiet_downloads(), TemporaryDirectory() as folder:
                    text = Path(self._client.download_artifacts(run_id, path, folder)).read_text()
                found[int(number)] = f"networks/{json.loads(text)[AUDIO_VISUAL]}"
        return found

    def download_model(self, uri: str, folder: Path) -> Path:
        """The files of a model, by "models:/NAME/VERSION" or "runs:/ID/PATH", in `folder`. InputError where there is none."""
        try:
            with _quiet_downloads():
                source = self._source(uri) if uri.startswith("models:/") else self._of_run(uri)
                return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=self.uri))
        except (MlflowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise InputError(f"MLflow at {without_password(self.uri)} has no model {uri!r}: {reason}") from error

    def _of_run(self, uri: str) -> str:
        """Where the model "runs:/ID/NAME" lies: a logged model of this name, or else an artifact of this path."""
        run_id, _, name = uri.removeprefix("runs:/").partition("/")
        outputs = self._client.get_run(run_id).outputs
        for output in (outputs.model_outputs or ()) if outputs else ():
            model = self._client.get_logged_model(output.model_id)
            if model.name == name:
                return str(model.artifact_location)
        return uri

    def _source(self, uri: str) -> str:
        """Where the files of "models:/NAME/VERSION", "models:/NAME@ALIAS" or "models:/ID" lie.

        MLflow's own way there asks the process's registry, whatever store is named.
        """
        name, slash, version = uri.removeprefix("models:/").rpartition("/")
        if slash:
            uri = self._client.get_model_version_download_uri(name, version)
        elif "@" in version:
            name, _, alias = version.rpartition("@")
            found = self._client.get_model_version_by_alias(name, alias)
            uri = self._client.get_model_version_download_uri(name, found.version)
        if uri.startswith("models:/"):
            return str(self._client.get_logged_model(uri.removeprefix("models:/")).artifact_location)
        return uri

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        """Ends a run: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status)

    # Reading, for reports.

    def look(self, run_id: str) -> Look:
        """A run. InputError where there is none of this id."""
        try:
            return _look(self._client.get_run(run_id))
        except MlflowException as error:
            raise InputError(f"MLflow at {without_password(self.uri)} has no run {run_id}: {error}") from error

    def looks(self, tags: Mapping[str, str]) -> list[Look]:
        """The runs that have these tags, in the order in which they began."""
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], query, order_by=["attributes.start_time ASC"], page_token=token
            )
            found += [_look(run) for run in page]
            token = page.token
            if not token:
                return found

    def contents(self, run_id: str) -> dict[str, Any]:
        """Path -> value of a run's JSON artifacts, those of its tasks' folders among them; nothing else is fetched."""
        with tempfile.TemporaryDirectory() as folder, _environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}):
            for item in self._client.list_artifacts(run_id):
                if item.path.endswith(".json") or (item.is_dir and item.path.startswith("task_")):
                    self._client.download_artifacts(run_id, item.path, folder)
            files = sorted(Path(folder).rglob("*.json"))
            return {path.relative_to(folder).as_posix(): json.loads(path.read_text()) for path in files}

    def attach(self, run_id: str, path: Path) -> None:
        """Logs a file as an artifact under its own name."""
        self._client.log_artifact(run_id, str(path))

    def _batch(
        self, run_id: str, values: Sequence[tuple[str, float, int]], taken: float | None = None, model: str | None = None
    ) -> None:
        now = int((time.time() if taken is None else taken) * 1000)
        entries = [Metric(name, float(value), now, step, model_id=model) for name, value, step in values]
        for start in range(0, len(entries), METRICS_A_REQUEST):
            self._client.log_batch(run_id, metrics=entries[start : start + METRICS_A_REQUEST])


@dataclass(frozen=True)
class Look:
    """A run as it is read again. Times are in seconds since the epoch; `ended` is None while it runs."""

    run: str
    name: str
    status: str
    started: float
    ended: float | None
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]  # their last values


def _look(run: Run) -> Look:
    about, data = run.info, run.data
    ended = about.end_time / 1000 if about.end_time else None
    name = data.tags.get("mlflow.runName", "")
    return Look(about.run_id, name, about.status, about.start_time / 1000, ended, data.tags, data.params, data.metrics)


def write_model(folder: Path, checkpoint: Path, classes: Mapping[str, Any], model: Model) -> Path:
    """Writes a model as MLflow reads it into `folder`; where it lies. The checkpoint is in its artifacts/checkpoint."""
    copied, code = folder / "checkpoint", folder / "code" / "cavs_model"
    copied.mkdir()
    for name in (WEIGHTS, ABOUT):
        shutil.copyfile(checkpoint / name, copied / name)
    (copied / "classes.json").write_text(json.dumps(classes, indent=1))
    package = Path(cavs_model.__file__).parent
    for file in package.rglob("*.py"):
        target = code / file.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    frames, size = classes["frames"], classes["image_size_px"]
    signature = ModelSignature(
        inputs=Schema(
            [
                TensorSpec(np.dtype(np.uint8), (-1, frames, 3, size, size), "image"),
                TensorSpec(np.dtype(np.float32), (-1, frames, NUM_FRAMES, NUM_BINS), "audio"),
            ]
        ),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, frames, size, size))]),
    )
    path = folder / "model"
    # MLflow warns of its own classes' type hints when they are loaded, of ours, which have none, and of an example's absence.
    with warnings.catch_warnings(), _quiet_downloads():
        warnings.simplefilter("ignore", UserWarning)
        importlib.import_module("mlflow.pyfunc").save_model(
            path=str(path),
            python_model=str(MODEL_CODE),
            artifacts={"checkpoint": str(copied)},
            code_paths=[str(code)],
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in MODEL_PACKAGES],
            signature=signature,
            mlflow_model=model,
        )
    return path


@lru_cache(maxsize=16)
def _dataset(benchmark: Benchmark) -> Dataset:
    """The benchmark as MLflow's data set: parameters as source, sizes as profile."""
    frames, size = benchmark.frames, benchmark.image_size_px
    image = TensorSpec(np.dtype(np.uint8), (-1, frames, 3, size, size), "image")
    audio = TensorSpec(np.dtype(np.float32), (-1, frames, NUM_FRAMES, NUM_BINS), "audio")
    label = TensorSpec(np.dtype(np.uint8), (-1, frames, size, size), "label")
    schema = {"features": Schema([image, audio]).to_json(), "targets": Schema([label]).to_json()}
    profile = {"classes": len(benchmark.class_names()), "frames": frames, "image_size_px": size}
    return Dataset(
        name=benchmark.name,
        digest=benchmark.fingerprint()[:16],
        source_type="code",
        source=json.dumps({"benchmark": plain(benchmark)}),
        schema=json.dumps({"mlflow_tensorspec": schema}),
        profile=json.dumps(profile | {f"clips of {split}": len(benchmark.samples(split)) for split in benchmark.splits()}),
    )


@lru_cache(maxsize=1)
def _origin() -> dict[str, str]:
    """Who began the runs of this process, by which command and with which code."""
    verb = f"python -m orchestrator.{Path(sys.argv[0]).stem}"
    found = {"mlflow.source.name": verb, "mlflow.source.type": "LOCAL", "command": command()[:TAG_CHARACTERS]}
    with suppress(OSError, KeyError):  # a user without a name, as in some containers
        found["mlflow.user"] = getpass.getuser()
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout: a job's copy
        return found
    return found | {"commit": commit, "mlflow.source.git.commit": commit.removesuffix("-dirty")}


def command() -> str:
    """The command of this process, as it can be typed again; secrets are hidden."""
    return shlex.join(["python", "-m", f"orchestrator.{Path(sys.argv[0]).stem}", *map(redacted, sys.argv[1:])])


def tags_of(experiment: Experiment) -> dict[str, str]:
    """What runs are filtered by."""
    return {
        "method": file_name(experiment.method),
        "benchmark": experiment.benchmark.name,
        "benchmark.fingerprint": experiment.benchmark.fingerprint()[:16],
        "setting": experiment.scenario.setting,
    }


def tracking_uri(outputs: Path) -> str:
    """MLFLOW_TRACKING_URI where it is set, else a database under `outputs`. InputError for a store that cannot hold runs."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{outputs.absolute()}/mlflow.db"
    try:
        scheme = urlsplit(uri).scheme
    except ValueError as error:
        raise InputError(
            f"MLFLOW_TRACKING_URI is no URI ({error}); use sqlite:///absolute/path.db or http://host:port"
        ) from error
    if scheme in ("", "file"):
        raise InputError(
            f"MLFLOW_TRACKING_URI={without_password(uri)!r} is a folder, which MLflow no longer writes; "
            "use sqlite:///absolute/path.db or http://host:port"
        )
    return uri


def database_file(uri: str) -> Path | None:
    """The file of an SQLite database, None for whatever else a URI names."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def without_password(uri: str) -> str:
    """The URI without user and password, for messages."""
    return redacted(f"any:{uri}").removeprefix("any:") if uri.startswith("//") else redacted(uri)


class _Discreet:
    """MLflow's client, whose errors do not show the password of its URI: a sweep prints them, and tracebacks are logged."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            except Exception as error:
                text = redacted(str(error))
                if text == str(error):
                    raise
                raise MlflowException(text) from None

        return call


def _text(value: Any) -> str:
    text = ",".join(str(part) for part in value) if isinstance(value, (tuple, list)) else str(value)
    return text[:PARAM_CHARACTERS]


def _patience() -> AbstractContextManager[None]:
    """Few retries while the store is probed: an unreachable server is told within seconds, not minutes."""
    return _environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "4"})


def _quiet_downloads() -> AbstractContextManager[None]:
    """No bar on stderr for each file."""
    return _environment({"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"})


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """These environment variables for a while: MLflow has no other place for such settings."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _try(uri: str) -> None:
    """Connects to a database server once: MLflow itself would try a wrong password for two minutes."""
    if uri.startswith("postgresql"):
        engine = create_engine(uri, connect_args={"connect_timeout": CONNECT_SECONDS})
        try:
            engine.connect().close()
        finally:
            engine.dispose()


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time: a fresh SQLite database that two of them set up at once is broken for good."""
    if (database := database_file(uri)) is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f".{database.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
