"""What a report is made from: the ledgers of sweeps and comparisons, the artifacts of their streams in MLflow, the store.

Everything over tasks follows from the confusion counts that every stream logs, by the formulas of cavs_model.metrics, so a
report's numbers are those of the run.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cavs_model.errors import InputError
from cavs_model.metrics import diagnoses, iou, numbers, stream_summary, summary, task_matrix
from cavs_model.untrusted import FaultError, read_json
from orchestrator.comparison import BACKGROUND_ALONE, PLAN_FILE, STREAMS_FILE, TABLE_FILE, StreamResult
from orchestrator.entries import DamagedError, Entries
from orchestrator.ledger import LARGEST_LEDGER_BYTES, LEDGER_FILE, Ledger
from orchestrator.status import folder_name
from orchestrator.tracker import ENVIRONMENT_FILE, Look, Tracker

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_SEED_OF_RUN = re.compile(r" seed \d+$")
_FOLDERS = (("sweeps", LEDGER_FILE), ("comparisons", PLAN_FILE))  # in the outputs, with what each of them holds
MOST_LISTED = 10  # names of a kind in a message


@dataclass(frozen=True)
class TaskData:
    """What a stream logged of one task. `counts` maps a split to its confusion counts int64 [C C].

    `scores` has the columns of the method's scores by name and "sample_ids"; `networks` the store's keys of the checkpoints.
    """

    counts: Mapping[str, Tensor]
    memory: Sequence[Mapping[str, Any]] = ()
    collisions: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamData:
    """One stream. `classes` are the names seen by its last task, background first; `config` its field paths."""

    run: Look
    entry: str
    config: Mapping[str, Any]
    classes: tuple[str, ...]
    tasks: tuple[TaskData, ...]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def setting(self) -> str:
        return str(self.config["scenario.setting"])

    @property
    def splits(self) -> list[str]:
        return sorted(self.tasks[-1].counts, key=lambda split: (split != "val", split))

    def history(self, split: str) -> list[Tensor]:
        """The split's confusion counts after every task."""
        return [task.counts[split] for task in self.tasks]

    def kept(self, task: int) -> list[Mapping[str, Any]]:
        """The rows of the memory after a task that it kept itself: of its new classes. Those of others are from before."""
        seen = [1, *(len(next(iter(each.counts.values()))) for each in self.tasks)]  # background alone before the first
        new = self.classes[seen[task] : seen[task + 1]]
        return [row for row in self.tasks[task].memory if row["class"] in new]

    @property
    def num_base(self) -> int:
        return len(next(iter(self.tasks[0].counts.values())))

    def metrics(self, split: str) -> list[dict[str, float]]:
        """All metrics after every task, by the names of docs/metrics.md."""
        history = self.history(split)
        return [
            {**summary(counts, self.num_base), **diagnoses(counts, self.num_base), **stream_summary(history[: task + 1])}
            for task, counts in enumerate(history)
        ]

    def matrix(self, split: str) -> list[list[float | None]]:
        """The task x task matrix."""
        return [numbers(row) for row in task_matrix(self.history(split))]

    def class_ious(self, split: str) -> list[list[float | None]]:
        """IoU per class (row) after every task (column); None before it is learned, and without a pixel of truth."""
        columns = [numbers(iou(counts)) for counts in self.history(split)]
        return [[column[row] if row < len(column) else None for column in columns] for row in range(len(self.classes))]


@dataclass(frozen=True)
class Job:
    """Something that workers computed, by the store: start and end in seconds since the epoch."""

    start: float
    end: float
    kind: str
    label: str


@dataclass(frozen=True)
class Source:
    """All that a report tells. `parent` is the run the report belongs to; a sweep or a comparison has its ledger."""

    kind: str  # "sweep", "comparison", "run"
    name: str
    outputs: Path
    folder: Path  # where the report goes
    parent: Look
    streams: tuple[StreamData, ...]
    environment: Mapping[str, Any]
    jobs: tuple[Job, ...]
    sweep: Ledger | None = None
    results: tuple[StreamResult, ...] = ()  # of a comparison
    reference: str = ""
    splits: tuple[str, ...] = ()

    @property
    def entries(self) -> list[str]:
        return list(dict.fromkeys(stream.entry for stream in self.streams))

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(stream.setting for stream in self.streams))

    def of(self, entry: str, setting: str) -> list[StreamData]:
        """An entry's streams in a setting, by seed."""
        found = [stream for stream in self.streams if (stream.entry, stream.setting) == (entry, setting)]
        return sorted(found, key=lambda stream: stream.seed)


def find(name: str, outputs: Path, tracker: Tracker) -> Source:
    """What a name stands for: a sweep, a comparison, a run's id, or the --name of `orchestrator.run`, also as folders have it.

    InputError where it stands for nothing, with the names that there are, or for two things.
    """
    folders = [
        folder
        for kind, file in _FOLDERS
        for folder in [outputs / kind / name.removeprefix(f"{kind}/")]
        if "/" not in name.removeprefix(f"{kind}/") and (folder / file).is_file()
    ]
    if len(folders) > 1:
        raise InputError(f"{name!r} is a sweep and a comparison; say sweeps/{name} or comparisons/{name}")
    if folders:
        return (
            _of_sweep(folders[0], outputs, tracker)
            if folders[0].parent.name == "sweeps"
            else _of_comparison(folders[0], outputs, tracker)
        )
    if _RUN_ID.fullmatch(name):
        return _of_run(tracker.look(name), outputs, tracker)
    runs: dict[str, list[Look]] = {}  # by the name that was given to them, the one that was used last at the end
    for run in tracker.looks({"kind": "stream"}):
        if "mlflow.parentRunId" not in run.tags:
            given = _SEED_OF_RUN.sub("", run.name)
            runs[given] = [*runs.pop(given, []), run]
    alike = [each for each in runs if folder_name(each) == folder_name(name)]
    if meant := name if name in runs else next(reversed(alike), ""):
        latest = {run.tags.get("seed", ""): run for run in runs[meant]}  # a name that was used again: the last run of each seed
        return _of_streams(meant, list(latest.values()), outputs, tracker)
    raise InputError(f"{name!r} is no sweep or comparison in {outputs}, and no run in MLflow; {_known(outputs, list(runs))}")


def _known(outputs: Path, runs: Sequence[str]) -> str:
    """What `find` would find, in words; of each kind the latest. `runs` are names, the latest at the end."""
    kinds = []
    for kind, file in _FOLDERS:
        ledgers = sorted((outputs / kind).glob(f"*/{file}"), key=lambda path: path.stat().st_mtime, reverse=True)
        kinds.append([f"{kind}/{path.parent.name}" for path in ledgers])
    kinds.append([repr(run) for run in reversed(runs)])
    told = [
        ", ".join(names[:MOST_LISTED]) + (f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else "")
        for names in kinds
        if names
    ]
    return f"there are: {'; '.join(told)}" if told else "there is none of them"


def _of_sweep(folder: Path, outputs: Path, tracker: Tracker) -> Source:
    ledger = Ledger.read(folder)
    if not ledger.parent:
        raise InputError(f"the sweep {folder.name} has not begun yet")
    parent = tracker.look(ledger.parent)
    tested = [run for name, run in ledger.test_runs.items() if name.split()[0] == str(ledger.tested)]
    streams = [_stream(tracker, run, f"trial {ledger.tested}") for run in tested]
    return Source(
        "sweep", folder.name, outputs, folder, parent, _usable(streams), _environment(tracker, parent),
        _jobs(outputs, f"sweep/{folder.name}", parent), ledger, splits=tuple(ledger.plan["splits"]),
    )  # fmt: skip


def _of_comparison(folder: Path, outputs: Path, tracker: Tracker) -> Source:
    path = folder / PLAN_FILE
    try:
        entry = read_json(path, LARGEST_LEDGER_BYTES)
        splits, runs, done, run = tuple(entry["plan"]["splits"]), entry["runs"], entry["done"], entry["parent"]
    except (FaultError, KeyError, TypeError) as error:
        raise InputError(f"damaged file {path} ({error})") from error
    parent = tracker.look(run)
    results = _results(folder / STREAMS_FILE)
    streams = [_stream(tracker, runs[name]) for name in done]
    reference = _reference(folder / TABLE_FILE)
    return Source(
        "comparison", folder.name, outputs, folder, parent, _usable(streams), _environment(tracker, parent),
        _jobs(outputs, f"comparison/{folder.name}", parent), None, results, reference, splits,
    )  # fmt: skip


def _of_run(run: Look, outputs: Path, tracker: Tracker) -> Source:
    """By a run's id: what the run is the parent of, or the run itself."""
    kind = run.tags.get("kind", "")
    if kind in ("sweep", "comparison"):
        folder = outputs / f"{kind}s" / run.name
        if (folder / (LEDGER_FILE if kind == "sweep" else PLAN_FILE)).is_file():
            return (_of_sweep if kind == "sweep" else _of_comparison)(folder, outputs, tracker)
        raise InputError(f"run {run.run} is the {kind} {run.name!r}, whose folder is not in {outputs}; say --outputs")
    if kind == "trial":
        children = tracker.looks({"mlflow.parentRunId": run.run, "kind": "stream"})
        return _of_streams(run.name, children, outputs, tracker, run)
    if kind == "stream":
        return _of_streams(run.name, [run], outputs, tracker)
    raise InputError(f"run {run.run} is none of ours: it has no tag kind=sweep, comparison, trial or stream")


def _of_streams(name: str, runs: Sequence[Look], outputs: Path, tracker: Tracker, parent: Look | None = None) -> Source:
    entry = str(runs[0].tags.get("method", name)) if runs else name
    streams = _usable([_stream(tracker, run.run, entry) for run in runs])
    if not streams:
        raise InputError(f"{name!r} has not finished a task yet: there is nothing to report")
    above = parent or runs[0]
    user = f"run/{_SEED_OF_RUN.sub('', name)}"
    return Source(
        "run", name, outputs, outputs / "reports" / folder_name(name), above, streams,
        _environment(tracker, above), _jobs(outputs, user, above), splits=tuple(streams[0].splits),
    )  # fmt: skip


def _usable(streams: Sequence[StreamData | None]) -> tuple[StreamData, ...]:
    return tuple(stream for stream in streams if stream is not None)


def _environment(tracker: Tracker, parent: Look) -> dict[str, Any]:
    """Where the numbers came from. Runs from before that was noted have their command alone, or nothing."""
    contents = tracker.contents(parent.run)
    command = contents.get("config.json", {}).get("command")
    return dict(contents.get(ENVIRONMENT_FILE) or ({"command": command} if command else {}))


def _stream(tracker: Tracker, run_id: str, entry: str = "") -> StreamData | None:
    """A stream from its artifacts; None where no task of it was logged."""
    run, contents = tracker.look(run_id), tracker.contents(run_id)
    tasks: list[TaskData] = []
    classes: tuple[str, ...] = ()
    while True:
        folder = f"task_{len(tasks)}"
        counts = {}
        for path, content in contents.items():
            if path.startswith(f"{folder}/confusion_"):
                classes = tuple(content["classes"])
                name = path.removeprefix(f"{folder}/confusion_").removesuffix(".json")
                counts[_split(name)] = torch.tensor(content["counts"], dtype=torch.int64)
        if not counts:
            break
        tasks.append(
            TaskData(
                counts,
                contents.get(f"{folder}/memory.json", {}).get("rows", ()),
                contents.get(f"{folder}/collisions.json", {}),
                contents.get(f"{folder}/scores.json", {}),
                contents.get(f"{folder}/networks.json", {}),
            )
        )
    if not tasks:
        return None
    name = entry or run.tags.get("entry") or run.tags.get("method", run.name)
    return StreamData(run, name, contents.get("config.json", {}), classes, tuple(tasks))


def _split(name: str) -> str:
    """The split of an artifact's name, in which a slash is an underscore."""
    return name.replace("_", "/", 1) if name.startswith("test_") else name


def _lines(path: Path) -> list[dict[str, str]]:
    """The lines of a csv file. InputError where it is missing or no text."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}): let the comparison end first, with the same command") from error


def _results(path: Path) -> tuple[StreamResult, ...]:
    """The streams of a comparison from its csv. InputError where it is missing or damaged."""
    lines = _lines(path)
    try:
        return tuple(
            StreamResult(
                line.pop("entry"),
                line.pop("setting"),
                int(line.pop("seed")),
                error=line.pop("error"),
                values={name: float(value) for name, value in line.items() if value},
            )
            for line in lines
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"damaged file {path} ({error}): run the comparison again, with the same command") from error


def _reference(path: Path) -> str:
    """The entry that a table's differences are to: the one that has a mean and no difference. Empty without differences."""
    able = [line for line in _lines(path) if not line.get("failed")]
    differing = {line["entry"] for line in able if any(line[name] for name in line if name.endswith("/difference"))}
    return next((line["entry"] for line in able if line["entry"] not in differing), "") if differing else ""


def _jobs(outputs: Path, user: str, parent: Look) -> tuple[Job, ...]:
    """What was computed for a user of the store while the run went on, by what each entry says of itself."""
    entries = Entries(outputs / "store")
    found = []
    for kind, key in sorted(entries.users().get(user, ())):
        try:
            body = entries.describe(kind, key)
        except DamagedError:
            continue  # `orchestrator.store verify` tells of it
        if body is None:
            continue
        made, seconds = float(body["made"]), float(body["seconds"])
        if made >= parent.started:
            found.append(Job(max(made - seconds, parent.started), made, kind, str(body["label"])))
    return tuple(found)


def without_background(results: Sequence[StreamResult]) -> list[StreamResult]:
    """The results of streams, without what needs no network."""
    return [result for result in results if result.entry != BACKGROUND_ALONE]
