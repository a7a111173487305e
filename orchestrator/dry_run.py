"""What a command would do, without doing it (`--dry-run`), and the same command made as small as it gets (`--debug`).

What the store has is found by the protocol itself: a stream is run against a backend that only looks things up, until the first
outcome that is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.base import Benchmark
from cavs_model.errors import InputError
from cavs_model.evaluate import ConsolidateJob, EvaluateJob, ScoreJob
from cavs_model.train import TaskJob
from cavs_model.types import ScoreTable
from orchestrator.entries import DamagedError, Entries
from orchestrator.experiment import Experiment, file_name, override
from orchestrator.progress import clock, planned_work
from orchestrator.store import consolidate_key, evaluate_key, score_key, train_key
from orchestrator.stream import run_stream

DEBUG_CLIPS = 2  # of every class, in every split
DEBUG_TRIALS = 2


class _AbsentError(Exception):
    """The store has no such outcome; the message is its label."""


@dataclass(frozen=True)
class Lookup:
    """A backend that computes nothing and writes nothing. It does not wait for what another process is just computing."""

    entries: Entries
    told: Callable[[str], None] = lambda text: None  # of damaged entries
    trained: list[About] = field(default_factory=list)  # of the networks that were there, in the order they were asked for

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        return ""

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        paths = [self._folder("networks", train_key(job), job.label) for job in jobs]
        self.trained.extend(self.about(path) for path in paths)
        return paths

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        value = self._value("scores", score_key(job, checkpoints), job.label)
        return ScoreTable(tuple(value["sample_ids"]), {name: tuple(column) for name, column in value["columns"].items()})

    def consolidate(self, job: ConsolidateJob, checkpoint: str, previous: str | None) -> str:
        return self._folder("states", consolidate_key(job, checkpoint, previous), job.label)

    def evaluate(self, job: EvaluateJob, checkpoint: str) -> np.ndarray:
        return np.array(self._value("counts", evaluate_key(job, checkpoint), job.label)["counts"], dtype=np.int64)

    def about(self, path: str) -> About:
        return checkpoint.read_about(Path(path))

    def _folder(self, kind: str, key: str, label: str) -> str:
        self._value(kind, key, label)
        return str(self.entries.path(kind, key))

    def _value(self, kind: str, key: str, label: str) -> Any:
        try:
            body = self.entries.read(kind, key)
        except DamagedError as error:
            self.told(f"damaged store entry {self.entries.where(kind, key)}: {error}; it would be set aside and computed again")
            body = None
        if body is None:
            raise _AbsentError(label)
        return body.get("value")


def tasks_done(experiment: Experiment, seed: int, splits: Sequence[str], lookup: Lookup) -> tuple[int, str]:
    """How many tasks of a stream the store has in full, and what is the first outcome that it has not ("" where it has all)."""
    count = 0
    try:
        for _ in run_stream(experiment, seed, lookup, splits):
            count += 1
    except _AbsentError as absent:
        return count, str(absent)
    return count, ""


def plan_text(experiment: Experiment, splits: Sequence[str], entries: Entries, trials: int = 1) -> str:
    """Tasks, networks, work, and what is there already: of one experiment, in as many configurations as there are trials."""
    tasks, work = experiment.scenario.tasks(experiment.benchmark), planned_work(experiment)
    names = experiment.scenario.learned_order(experiment.benchmark)
    method, schedule, seeds = experiment.method, experiment.schedule, experiment.seeds
    rows = [
        f"{file_name(method)} on {experiment.benchmark.name} {experiment.scenario.setting} ({experiment.scenario.filter}, "
        f"{experiment.scenario.order}), seeds {', '.join(map(str, seeds))}; tested on {', '.join(splits)}"
    ]
    networks = 0
    for task, passes in zip(tasks, work, strict=True):
        learned = method.training_task(tasks[: task.index + 1])
        trained = 1 if task is tasks[-1] else len(method.networks)
        networks += trained * (1 if task.index == 0 else trials) * len(seeds)
        added = [names[class_id - 1] for class_id in task.new_classes]
        shown = ", ".join(added[:6]) + (f" and {len(added) - 6} more" if len(added) > 6 else "")
        rows.append(
            f"  task {task.index + 1}: {shown}; {len(learned.train)} clips, {schedule.epochs_of(learned)} epochs, "
            f"{trained} network{'s' * (trained > 1)}: {passes:.0f} clip passes"
        )
    total = len(seeds) * (work[0] + trials * sum(work[1:]))
    rows.append(
        f"in all {trials} configuration{'s' * (trials > 1)} x {len(seeds)} seed{'s' * (len(seeds) > 1)} x {len(tasks)} tasks, "
        f"{networks} networks, {total:.0f} clip passes; the first task is trained once for all"
    )
    speed = _speed(experiment, entries.root)
    rows.append(
        "the store has no network of this shape to tell the time by" if speed is None else
        f"about {clock(total / speed)} of one worker, at the {speed:.0f} clips a second of such networks in the store"
    )  # fmt: skip
    for seed in seeds:
        count, absent = tasks_done(experiment, seed, splits, Lookup(entries))
        first = f"; the first that is missing: {absent}" if absent else ""
        rows.append(f"  the store has {count} of {len(tasks)} tasks of seed {seed}{first}")
    return "\n".join(rows)


def debugged(experiment: Experiment) -> Experiment:
    """The experiment with one epoch a task, one seed, and two clips of every class in every split, where its data can be cut.

    InputError where a task is left without a sample.
    """
    benchmark = experiment.benchmark
    names = {item.name for item in dataclasses.fields(benchmark)}  # type: ignore[arg-type]
    changes: dict[str, object] = {"schedule.epochs": 1, "schedule.base_epochs": 1, "seeds": experiment.seeds[:1]}
    if "clips_per_class" in names:
        changes["benchmark.clips_per_class"] = DEBUG_CLIPS
    few = DEBUG_CLIPS * len(benchmark.class_names())
    for name in ("train_clips", "val_clips", "test_clips"):
        if name in names:
            changes[f"benchmark.{name}"] = min(few, getattr(benchmark, name))
    small = override(experiment, changes)
    small.scenario.tasks(small.benchmark)
    return small


def debug_name(name: str) -> str:
    """The name of a debugging run in folders and MLflow."""
    return name if name.startswith("debug") else f"debug-{name}"


def _speed(experiment: Experiment, store: Path) -> float | None:
    """Median clip passes a second and worker of the store's networks of this shape; None where there is none.

    Frames and their size count where the checkpoint says them.
    """
    config, benchmark = dataclasses.asdict(experiment.network), experiment.benchmark
    wanted = (config, benchmark.image_size_px, benchmark.frames)
    speeds = [
        about.clips / (about.seconds * about.world_size)
        for about in _abouts(store)
        if about.seconds > 0 and (dict(about.config), about.image_size_px, about.frames) == wanted
    ]
    return median(speeds) if speeds else None


def _abouts(store: Path) -> Iterator[About]:
    for path in sorted((store / "networks").glob(f"*/{checkpoint.ABOUT}")):
        try:
            yield checkpoint.read_about(path.parent)
        except InputError:  # a damaged one tells no speed
            continue
