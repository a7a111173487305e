"""What a sweep has done so far, on disk: the same command with the same --name goes on from it.

One JSON file in the sweep's folder, written as a whole after every change: the plan, the MLflow runs, and every trial with its
knobs, its state and its last metrics. Its trials are what Optuna is told of when the sweep goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cavs_model.errors import InputError
from cavs_model.untrusted import FaultError, read_json, shown, typed_fields
from orchestrator.entries import clear_unfinished, write_atomically
from orchestrator.store import Reuse

LEDGER_FILE = "sweep.json"
LOCK_FILE = "lock"
SHOWN_DIFFERENCES = 5
LARGEST_LEDGER_BYTES = 2**28

# RUNNING is also the state of a trial that was cut off. FAILED is final: it failed as often as it may, or would fail again.
State = Literal["RUNNING", "FINISHED", "FAILED", "PRUNED"]
# A trial's metrics: what it cost without what the store had, and what the store had.
COMPUTED, COMPUTED_OUTCOMES = "computed_worker_seconds", "computed_outcomes"
REUSED, REUSED_OUTCOMES = "reused_worker_seconds", "reused_outcomes"


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep."""

    config: Mapping[str, Any]  # knobs by field path
    state: State = "RUNNING"
    metrics: Mapping[str, Any] = field(default_factory=dict)  # of its last report
    error: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)  # what the sampler noted of it
    earlier_seconds: float = 0.0  # worker-seconds computed by attempts that were cut off or failed
    earlier_outcomes: int = 0
    run: str = ""  # in MLflow
    streams: Mapping[str, str] = field(default_factory=dict)  # seed -> run in MLflow
    logged: Mapping[str, int] = field(default_factory=dict)  # run in MLflow -> its last task that was logged

    @property
    def worker_seconds(self) -> float:
        """What it made workers compute, over all attempts that reported."""
        return self.earlier_seconds + float(self.metrics.get(COMPUTED, 0.0))

    @property
    def outcomes(self) -> int:
        """How many outcomes it computed, over all attempts that reported."""
        return self.earlier_outcomes + int(self.metrics.get(COMPUTED_OUTCOMES, 0))

    @property
    def reuse(self) -> Reuse:
        """The work that it asked for: an attempt finds in the store what those before it computed, which is not reuse."""
        return Reuse(
            self.outcomes,
            max(0, int(self.metrics.get(REUSED_OUTCOMES, 0)) - self.earlier_outcomes),
            self.worker_seconds,
            max(0.0, float(self.metrics.get(REUSED, 0.0)) - self.earlier_seconds),
        )


@dataclass(frozen=True)
class _Noted:
    """What the file holds."""

    plan: Mapping[str, Any]
    parent: str
    tested: int
    test_runs: Mapping[str, str]
    trials: Mapping[str, Mapping[str, Any]]
    test_logged: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Ledger:
    """The state of a sweep. Every change is on disk when the call returns; threads may share it."""

    folder: Path
    plan: Mapping[str, Any]
    parent: str = ""  # run in MLflow
    tested: int = 0  # the trial whose configuration was evaluated on test, 0 for none
    test_runs: dict[str, str] = field(default_factory=dict)  # "trial seed" -> run in MLflow
    test_logged: dict[str, int] = field(default_factory=dict)  # "trial seed", or "trial" for the mean -> last task logged
    trials: dict[int, Trial] = field(default_factory=dict)  # by number, from 1
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    @staticmethod
    def open(folder: Path, plan: Mapping[str, Any]) -> Ledger:
        """The ledger of a sweep that was begun, or a new one. InputError where the folder holds another or no sweep."""
        plan = json.loads(json.dumps(plan))  # as it will be read again
        if not is_begun(folder, LEDGER_FILE):
            return Ledger(folder, plan)
        found = Ledger.read(folder)
        refuse_changes(folder.name, found.plan, plan)
        return found

    @staticmethod
    def read(folder: Path) -> Ledger:
        """The ledger of a sweep that was begun. InputError where it is missing or damaged."""
        path = folder / LEDGER_FILE
        try:
            noted = typed_fields(_Noted, read_json(path, LARGEST_LEDGER_BYTES))
            for number, fields in noted["trials"].items():
                if not re.fullmatch(r"[1-9][0-9]{0,8}", number, re.ASCII):
                    raise FaultError(f"trials must be by number, not {shown(number)}")
                try:
                    noted["trials"][number] = Trial(**typed_fields(Trial, fields))
                except FaultError as fault:
                    raise FaultError(f"trial {number} {fault}") from None
        except FaultError as fault:
            raise InputError(f"damaged file {path} (it {fault}); delete the folder, or use --fresh") from None
        trials = {int(number): trial for number, trial in noted["trials"].items()}
        return Ledger(folder, **{**noted, "trials": trials})

    def update(self, **changes: Any) -> None:
        """Changes fields of the sweep."""
        with self._lock:
            for name, value in changes.items():
                setattr(self, name, value)
            self._save()

    def begin(self, number: int, config: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
        """A trial begins, or begins again."""
        with self._lock:
            before = self.trials.get(number, Trial(config))
            self.trials[number] = replace(
                before,
                state="RUNNING",
                metrics={},
                attrs=attrs,
                error="",
                earlier_seconds=before.worker_seconds,
                earlier_outcomes=before.outcomes,
            )
            self._save()

    def change(self, number: int, **changes: Any) -> None:
        """Changes fields of a trial."""
        with self._lock:
            self.trials[number] = replace(self.trials[number], **changes)
            self._save()

    def worker_seconds(self) -> float:
        """What all trials made workers compute."""
        with self._lock:
            return sum(trial.worker_seconds for trial in self.trials.values())

    def _save(self) -> None:
        content = {
            "plan": self.plan,
            "parent": self.parent,
            "tested": self.tested,
            "test_runs": self.test_runs,
            "test_logged": self.test_logged,
            "trials": {str(number): asdict(trial) for number, trial in sorted(self.trials.items())},
        }
        write_atomically(self.folder / LEDGER_FILE, json.dumps(content, indent=1).encode())


def refuse_changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError that shows the differences where what was begun under a name is not what is asked for now."""
    if different := sorted(differences(before, now)):
        more = len(different) - SHOWN_DIFFERENCES
        shown = "; ".join(different[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise InputError(f"--name {name!r} was begun with another configuration: {shown}; use another name or --fresh")


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """Where two plain values differ, as "path: before -> now"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {before!r} -> {now!r}"


def is_begun(folder: Path, file: str) -> bool:
    """Whether a folder that is held has its ledger. InputError where it holds something else instead."""
    if (folder / file).exists():
        return True
    if any(entry.name not in (LOCK_FILE, "status.json") for entry in folder.iterdir()):
        raise InputError(f"{folder} is there and holds no {file}; choose another --name, or use --fresh")
    return False


@contextmanager
def held(folder: Path, fresh: bool) -> Iterator[None]:
    """Holds the folder of a sweep or comparison for this process, emptied first where it is to start anew.

    What a killed process left half-written in it goes.

    InputError where another process on this machine has it. The kernel lets go of it when the process dies.
    """
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--name {folder.name!r} is running in another process; choose another name") from error
        if fresh:
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != LOCK_FILE:
                    entry.unlink()
        clear_unfinished(folder)
        yield
    finally:
        os.close(descriptor)
