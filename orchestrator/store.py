"""Outcomes by fingerprint: nothing that was computed once is computed again, by any trial, method or sweep.

`StoredBackend` speaks the backend's verbs and looks each outcome up before it asks the backend behind it. An outcome's
address is a hash of all that can influence it: the job's own inputs, the addresses of the checkpoints it starts from, the
knobs of the method that act in its stage, and the source that it follows from (source.py). Place and number of workers are
not part of it.

Every outcome is verified when it is read. A damaged one is set aside, told of, and computed again. entries.py has the files,
shared.py those of a store behind a URI.
`python -m orchestrator.store` lists, verifies and prunes them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.base import Benchmark
from cavs_model.errors import OutageError
from cavs_model.evaluate import ConsolidateJob, Data, EvaluateJob, ScoreJob
from cavs_model.methods.base import acting
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.networks.vggish import weights_digest
from cavs_model.train import Schedule, TaskJob
from cavs_model.types import ScoreTable, Task
from orchestrator.entries import DamagedError, Entries, room_in, warn, write_atomically
from orchestrator.experiment import fingerprint, plain
from orchestrator.source import code_of
from orchestrator.stream import Backend

__all__ = ["Reuse", "StoredBackend", "write_atomically"]

FORMAT = 2


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
    """The network with the content of weight files in place of their names: first weights at the start, frozen ones always.

    A task that starts from a checkpoint has no first weights.
    """
    config, file = job.config, Path(job.config.visual_weights)
    if job.start is not None:
        config = replace(config, visual_weights="none")
    elif file.is_file():
        config = replace(config, visual_weights=hashlib.sha256(file.read_bytes()).hexdigest())
    if config.frozen_sound is not None:
        config = replace(config, audio_weights=weights_digest(config.audio_weights))
    return config


def train_key(job: TaskJob) -> str:
    """The address of a trained network."""
    return _address(
        "train",
        job,
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
        job,
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
        job,
        {
            "stage": job.stage,
            "method": acting(job.method, "score_before" if job.stage == "before" else "score_after"),
            "task": job.task,
            "data": _data_key(job.data),
            "batch_size": job.batch_size,
            "precision": job.precision if checkpoints else None,  # scores of labels alone have none
            "checkpoints": {network: Path(path).name for network, path in checkpoints.items()},
        },
    )


def evaluate_key(job: EvaluateJob, path: str) -> str:
    """The address of confusion counts."""
    return _address(
        "counts",
        job,
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


def _address(kind: str, job: TaskJob | ScoreJob | ConsolidateJob | EvaluateJob, inputs: Mapping[str, Any]) -> str:
    code = code_of(job.data.benchmark, *([] if isinstance(job, EvaluateJob) else [job.method]))
    return fingerprint({"format": FORMAT, "code": code, "kind": kind, **plain(inputs)})[:40]


@dataclass
class Reuse:
    """How much of the work asked for was done already. Seconds are those of the workers that did it, once.

    An outcome counts when it is asked for first, whatever becomes of an attempt that is made again.
    """

    computed: int = 0
    reused: int = 0
    computed_seconds: float = 0.0
    reused_seconds: float = 0.0
    _counted: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)

    def count(self, kind: str, key: str, computed: float | None, seconds: float) -> None:
        """Notes an outcome that took `computed` seconds just now, or `seconds` when somebody computed it before."""
        if (kind, key) in self._counted:
            return
        self._counted.add((kind, key))
        if computed is not None:
            self.computed += 1
            self.computed_seconds += computed
        else:
            self.reused += 1
            self.reused_seconds += seconds

    def __add__(self, other: Reuse) -> Reuse:
        return Reuse(
            self.computed + other.computed,
            self.reused + other.reused,
            self.computed_seconds + other.computed_seconds,
            self.reused_seconds + other.reused_seconds,
        )

    def describe(self) -> str:
        """One line: outcomes and worker-seconds."""
        return (
            f"{self.computed} outcomes computed ({self.computed_seconds:.0f} worker-seconds), "
            f"{self.reused} reused ({self.reused_seconds:.0f} worker-seconds)"
        )


@dataclass(frozen=True)
class StoredBackend:
    """A backend that remembers. `place` is the store's entries or their folder. InputError where it cannot be written.

    `user` is on whose account entries are used, a kind and a name such as "sweep/cmr": what `prune --sweep cmr` goes by.
    """

    backend: Backend
    place: Entries | Path
    on_wait: Callable[[str], None] = lambda label: None
    reuse: Reuse = field(default_factory=Reuse)
    user: str = ""
    on_damage: Callable[[str], None] = warn

    def __post_init__(self) -> None:
        self._entries.make()

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        label = f"data of {benchmark.name}"
        with self._entries.locked_here(f"data-{benchmark.fingerprint()[:40]}", lambda: self.on_wait(label)):
            return self.backend.prepare(benchmark, splits, audio_weights)

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        entries, by_key = self._entries, {train_key(job): job for job in jobs}
        with ExitStack() as locks, room_in(self._entries.root):
            absent = {key for key in by_key if self._found("networks", key) is None}
            # In sorted order, so that two trials that want the same two networks never wait for each other.
            for key in sorted(absent):
                locks.enter_context(self._locked(key, by_key[key].label))
            missing = [key for key in by_key if key in absent and self._found("networks", key, locked=True) is None]
            if missing:
                self._train({key: by_key[key] for key in missing})
        for key in by_key:
            if key not in missing:
                body = self._found("networks", key)
                if body is None:
                    path = entries.path("networks", key)
                    raise OutageError(f"the store entry {path} was deleted as soon as it was found")
                self._count("networks", key, None, body)
        return [str(entries.path("networks", key)) for key in by_key]

    def _train(self, jobs: Mapping[str, TaskJob]) -> None:
        """Trains what is missing and keeps every network that is whole, whatever becomes of the others."""
        entries = self._entries
        partial = {key: entries.new_folder("networks", key) for key in jobs}
        with ExitStack() as at_the_end:
            for key in jobs:
                at_the_end.callback(self._clear, key, partial[key])
            for key in jobs:
                entries.resume(key).mkdir(exist_ok=True)
            try:
                self.backend.train(
                    [replace(job, output=str(partial[key]), resume=str(entries.resume(key))) for key, job in jobs.items()]
                )
            finally:
                for key, job in jobs.items():
                    if checkpoint.is_whole(partial[key]):
                        about = checkpoint.read_about(partial[key])
                        seconds = about.seconds * about.world_size
                        entries.keep("networks", key, partial[key], job.label, seconds)
                        self._count("networks", key, seconds)

    def _clear(self, key: str, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # there is something to go on from, or nothing at all
            self._entries.resume(key).rmdir()

    def consolidate(self, job: ConsolidateJob, checkpoint: str, previous: str | None) -> str:
        key = consolidate_key(job, checkpoint, previous)
        entries = self._entries

        def compute() -> None:
            partial, started = entries.new_folder("states", key), time.monotonic()
            try:
                self.backend.consolidate(replace(job, output=str(partial)), checkpoint, previous)
                entries.keep("states", key, partial, job.label, time.monotonic() - started)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

        self._computed_once("states", key, job.label, compute)
        return str(entries.path("states", key))

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

    @property
    def _entries(self) -> Entries:
        entries = self.place if isinstance(self.place, Entries) else Entries(self.place)
        return entries.telling(self.on_damage)

    def _json(self, kind: str, key: str, label: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An outcome kept as one file."""

        def write() -> None:
            started = time.monotonic()
            value = compute()
            self._entries.write(kind, key, label, time.monotonic() - started, value)

        return dict(self._computed_once(kind, key, label, write)["value"])

    def _computed_once(self, kind: str, key: str, label: str, compute: Callable[[], None]) -> dict[str, Any]:
        """An entry's description; `compute` writes the entry where there is none that is whole."""
        body, computed = self._found(kind, key), False
        if body is None:
            with self._locked(key, label), room_in(self._entries.root):
                body = self._found(kind, key, locked=True)
                if body is None:
                    compute()
                    body, computed = self._entries.read(kind, key), True
        if body is None:
            raise OutageError(f"the store entry {self._entries.path(kind, key)} was deleted as soon as it was written")
        self._count(kind, key, body["seconds"] if computed else None, body)
        return body

    def _found(self, kind: str, key: str, locked: bool = False) -> dict[str, Any] | None:
        """An entry's description, None where there is none that is whole. Who holds the lock sets a damaged one aside."""
        try:
            return self._entries.read(kind, key)
        except DamagedError as error:
            if not locked:
                return None
            aside = self._entries.set_aside(kind, key)
            path = self._entries.path(kind, key)
            self.on_damage(
                f"damaged store entry {path}: {error}; set aside as {aside}, computing it again if there is no other"
            )
            return self._found(kind, key, locked)

    def _count(self, kind: str, key: str, computed: float | None, body: Mapping[str, Any] | None = None) -> None:
        """Notes a use of an entry, which took `computed` seconds just now or was there already."""
        self._entries.use(kind, key, self.user)
        self.reuse.count(kind, key, computed, (body or {}).get("seconds", 0.0))

    @contextmanager
    def _locked(self, key: str, label: str) -> Iterator[None]:
        with self._entries.locked(key, lambda: self.on_wait(label)):
            yield


if __name__ == "__main__":
    from orchestrator import cli, housekeeping

    sys.exit(cli.main(housekeeping.housekeeping))
