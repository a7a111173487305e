"""Outcomes by fingerprint: nothing that was computed once is computed again, by any trial, method or sweep.

`StoredBackend` speaks the backend's verbs and looks each outcome up before it asks the backend behind it. An outcome's
address is a hash of all that can influence it: the job's own inputs, the addresses of the checkpoints it starts from, the
knobs of the method that act in its stage, and the code of `cavs_model`. Place and number of workers are not part of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import cavs_model
from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.base import Benchmark
from cavs_model.errors import InputError
from cavs_model.evaluate import ConsolidateJob, Data, EvaluateJob, ScoreJob
from cavs_model.methods.base import acting
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.networks.vggish import weights_digest
from cavs_model.train import Schedule, TaskJob
from cavs_model.types import ScoreTable, Task
from orchestrator.experiment import fingerprint, plain
from orchestrator.stream import Backend

FORMAT = 1
COST = "cost.json"  # of a method's state: what it took; written last, so that a folder that has it is complete
LOCK_POLL_SECONDS = 0.2


@lru_cache(maxsize=1)
def code_version() -> str:
    """A digest of the science's source: numbers made by other code are other numbers."""
    digest = hashlib.sha256()
    root = Path(cavs_model.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _data_key(data: Data) -> dict[str, Any]:
    return {"benchmark": data.benchmark.fingerprint(), "order": data.learned_order}


def _schedule_key(schedule: Schedule, task: Task) -> dict[str, Any]:
    """What of a schedule acts on a task: a base task does not depend on the epochs of later ones, nor the other way round."""
    looks = {"from": schedule.selection_from} if schedule.selection == "best_val" else {}
    return {
        "epochs": schedule.epochs_of(task),
        "batch_size": schedule.batch_size,
        "learning_rate": schedule.learning_rate,
        "decay": schedule.decay,
        "selection": schedule.selection,
        **looks,
    }


def _config_key(job: TaskJob) -> NetworkConfig:
    """The network with the content of weight files in place of their names: first weights at the start, frozen ones always."""
    config, file = job.config, Path(job.config.visual_weights)
    if job.start is None and file.is_file():
        config = replace(config, visual_weights=hashlib.sha256(file.read_bytes()).hexdigest())
    if config.frozen_sound is not None:
        config = replace(config, audio_weights=weights_digest(config.audio_weights))
    return config


def train_key(job: TaskJob) -> str:
    """The address of a trained network."""
    return _address(
        "train",
        {
            "network": job.network,
            "task": job.task,
            "data": _data_key(job.data),
            "rows": [(row.sample_id, row.class_id) for row in job.rows],
            "pastes": [(paste.sample_id, paste.instance_id, paste.class_id) for paste in job.pastes],
            "method": acting(job.method, "train"),
            "config": _config_key(job),
            "schedule": _schedule_key(job.schedule, job.task),
            "precision": job.precision,
            "seeds": [job.seeds.init, job.seeds.data],
            "start": Path(job.start).name if job.start else None,
            "method_state": Path(job.method_state).name if job.method_state else None,
        },
    )


def consolidate_key(job: ConsolidateJob, path: str, previous: str | None) -> str:
    """The address of what a method keeps of a network."""
    return _address(
        "state",
        {
            "method": acting(job.method, "consolidate"),
            "task": job.task,
            "data": _data_key(job.data),
            "precision": job.precision,
            "checkpoint": Path(path).name,
            "previous": Path(previous).name if previous else None,
        },
    )


def score_key(job: ScoreJob, checkpoints: Mapping[str, str]) -> str:
    """The address of a score table."""
    return _address(
        "score",
        {
            "stage": job.stage,
            "method": acting(job.method, "score_before" if job.stage == "before" else "score_after"),
            "task": job.task,
            "data": _data_key(job.data),
            "batch_size": job.batch_size,
            "precision": job.precision,
            "checkpoints": {network: Path(path).name for network, path in checkpoints.items()},
        },
    )


def evaluate_key(job: EvaluateJob, path: str) -> str:
    """The address of confusion counts."""
    return _address(
        "counts",
        {
            "split": job.split,
            "measure": job.measure,
            "samples": job.sample_ids,
            "rule": job.rule,
            "num_classes": job.num_classes,
            "data": _data_key(job.data),
            "batch_size": job.batch_size,
            "precision": job.precision,
            "checkpoint": Path(path).name,
        },
    )


def _address(kind: str, inputs: Mapping[str, Any]) -> str:
    return fingerprint({"format": FORMAT, "code": code_version(), "kind": kind, **plain(inputs)})[:40]


@dataclass
class Reuse:
    """How much of the work asked for was done already. Seconds are those of the workers that did it, once."""

    computed: int = 0
    reused: int = 0
    computed_seconds: float = 0.0
    reused_seconds: float = 0.0


@dataclass(frozen=True)
class StoredBackend:
    """A backend that remembers. InputError where `root` cannot be written."""

    backend: Backend
    root: Path
    on_wait: Callable[[str], None] = lambda label: None
    reuse: Reuse = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        for name in ("networks", "states", "scores", "counts", "locks"):
            try:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write the store {self.root}: {error.strerror}") from error

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        with self._locked(f"data-{benchmark.fingerprint()[:40]}", f"data of {benchmark.name}"):
            return self.backend.prepare(benchmark, splits, audio_weights)

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        folders = {train_key(job): (self.root / "networks" / train_key(job), job) for job in jobs}
        with ExitStack() as locks:
            # In sorted order, so that two trials that want the same two networks never wait for each other.
            for key in sorted(folders):
                if not _complete(folders[key][0]):
                    locks.enter_context(self._locked(key, folders[key][1].label))
            missing = [(folder, job) for folder, job in folders.values() if not _complete(folder)]
            partial = [_cleared(folder) for folder, _ in missing]
            try:
                if missing:
                    named = zip(missing, partial, strict=True)
                    self.backend.train([replace(job, output=str(target)) for (_, job), target in named])
                for (folder, _), target in zip(missing, partial, strict=True):
                    os.replace(target, folder)
            finally:
                for target in partial:
                    shutil.rmtree(target, ignore_errors=True)
        for folder, _ in folders.values():
            about = checkpoint.read_about(folder)
            self._count(folder not in [folder for folder, _ in missing], about.seconds * about.world_size)
        return [str(folder) for folder, _ in folders.values()]

    def consolidate(self, job: ConsolidateJob, checkpoint: str, previous: str | None) -> str:
        key = consolidate_key(job, checkpoint, previous)
        folder = self.root / "states" / key
        if not (folder / COST).exists():
            with self._locked(key, job.label):
                if not (folder / COST).exists():
                    partial, started = _cleared(folder), time.monotonic()
                    try:
                        self.backend.consolidate(replace(job, output=str(partial)), checkpoint, previous)
                        seconds = time.monotonic() - started
                        write_atomically(partial / COST, json.dumps({"seconds": seconds}).encode())
                        os.replace(partial, folder)
                    finally:
                        shutil.rmtree(partial, ignore_errors=True)
                    self._count(False, seconds)
                    return str(folder)
        try:
            seconds = float(json.loads((folder / COST).read_text())["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"damaged store entry {folder / COST}: {error}; delete it to have it computed again") from error
        self._count(True, seconds)
        return str(folder)

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        def compute() -> dict[str, Any]:
            table = self.backend.score(job, checkpoints)
            return {"sample_ids": table.sample_ids, "columns": {name: list(c) for name, c in table.columns.items()}}

        entry = self._json("scores", score_key(job, checkpoints), job.label, compute)
        columns = {name: tuple(column) for name, column in entry["columns"].items()}
        return ScoreTable(tuple(entry["sample_ids"]), columns)

    def evaluate(self, job: EvaluateJob, checkpoint: str) -> np.ndarray:
        def compute() -> dict[str, Any]:
            return {"counts": self.backend.evaluate(job, checkpoint).tolist()}

        return np.array(self._json("counts", evaluate_key(job, checkpoint), job.label, compute)["counts"], dtype=np.int64)

    def about(self, checkpoint: str) -> About:
        return self.backend.about(checkpoint)

    def _json(self, kind: str, key: str, label: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An outcome kept as one JSON file {"seconds": ..., "value": ...}."""
        path = self.root / kind / f"{key}.json"
        if not path.exists():
            with self._locked(key, label):
                if not path.exists():
                    started = time.monotonic()
                    value = compute()
                    seconds = time.monotonic() - started
                    write_atomically(path, json.dumps({"seconds": seconds, "value": value}).encode())
                    self._count(False, seconds)
                    return value
        try:
            entry = json.loads(path.read_text())
            seconds, value = float(entry["seconds"]), dict(entry["value"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"damaged store entry {path}: {error}; delete it to have it computed again") from error
        self._count(True, seconds)
        return value

    def _count(self, reused: bool, seconds: float) -> None:
        if reused:
            self.reuse.reused += 1
            self.reuse.reused_seconds += seconds
        else:
            self.reuse.computed += 1
            self.reuse.computed_seconds += seconds

    @contextmanager
    def _locked(self, key: str, label: str) -> Iterator[None]:
        """Holds an outcome's lock, so that who needs it too waits instead of computing it again.

        The kernel releases the lock of a process that dies, whatever kills it.
        """
        descriptor = os.open(self.root / "locks" / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            waited = False
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waited:
                        self.on_wait(label)
                    waited = True
                    time.sleep(LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it, whatever happens meanwhile."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _cleared(folder: Path) -> Path:
    """A new partial folder's name, for an outcome of which a process that was killed, or a person, left only pieces."""
    for leftover in (folder, *folder.parent.glob(f".{folder.name}.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")


def _complete(folder: Path) -> bool:
    return (folder / checkpoint.ABOUT).exists()
