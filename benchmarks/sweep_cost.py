"""What a sweep costs: worker-seconds against separate streams, and the driver's own time, memory and writes as it grows.

The simulation runs the real protocol, store and (with --mlflow) tracker over a backend that works not at all and adds up what
its work would have cost, from `Prices`: trials of the default search on 16-8 through one store against each trial alone. Its
times are the orchestration's, on one thread of this process. `--real` trains the tones streams of as many trials on this
machine, through a store, and reads from it what was computed and what was reused. `--sweep` looks at one that was run.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks._measure import Report, arguments, resident
from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.base import Benchmark
from cavs_model.evaluate import ConsolidateJob, EvaluateJob, ScoreJob
from cavs_model.methods.cmr import CMR
from cavs_model.train import TaskJob
from cavs_model.types import BACKGROUND, LabelRule, Memory, Row, Sample, ScoreTable, Task
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, override
from orchestrator.local_backend import LocalBackend
from orchestrator.store import StoredBackend
from orchestrator.stream import run_stream
from orchestrator.tracker import Tracker, record_of
from search_spaces import cmr_collage, tones


@dataclass(frozen=True)
class Prices:
    """Worker-seconds of work, as measured on one core of an AMD EPYC with the light network at 96 px (README, docs/log.md)."""

    train_clip: float = 1 / 44  # a training pass without a teacher
    score_clip: float = 1 / 130  # a pass of one network without gradients


@dataclass
class Imagined:
    """A backend without work: its answers depend on what it is asked alone, and `spent` adds up what they would have cost."""

    prices: Prices = field(default_factory=Prices)
    spent: dict[str, float] = field(default_factory=dict)
    scratch: str = ""
    count: int = 0

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        return "/nowhere"

    def _spend(self, kind: str, seconds: float) -> None:
        self.spent[kind] = self.spent.get(kind, 0.0) + seconds

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        paths = []
        for job in jobs:
            clips = job.schedule.epochs_of(job.task) * job.num_samples
            seconds = clips * job.cost_per_clip * self.prices.train_clip
            self._spend("train", seconds)
            self.count += 1
            path = job.output or f"{self.scratch}/{self.count}"
            about = About(job.network, job.task.num_classes, {}, ({"loss": 1.0, "cross_entropy": 1.0},), clips, seconds, 1)
            checkpoint.save(Path(path), {"weight": torch.zeros(1)}, about)
            paths.append(path)
        return paths

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        ids = job.sample_ids
        self._spend("score", len(ids) * len(checkpoints) * self.prices.score_clip)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{job.stage}{job.task.index}".encode()).digest()[:8]))
        if job.stage == "after":
            columns = {name: rng.random(len(ids)) for name in ("delta", "audio_visual", "visual_only")}
            columns["frames"] = np.ones(len(ids))
        else:
            columns = {
                "old_class": rng.integers(1, job.task.num_old, len(ids)),
                "new_class": rng.integers(job.task.num_old, job.task.num_classes, len(ids)),
                "pixels": rng.integers(0, 500, len(ids)),
                "share": rng.random(len(ids)),
            }
        return ScoreTable(ids, {name: tuple(map(float, column)) for name, column in columns.items()})

    def consolidate(self, job: ConsolidateJob, checkpoint: str, previous: str | None) -> str:
        raise AssertionError("CMR over PLOP does not consolidate")

    def evaluate(self, job: EvaluateJob, checkpoint: str) -> np.ndarray:
        self._spend("evaluate", len(job.sample_ids) * self.prices.score_clip)
        return np.eye(job.num_classes, dtype=np.int64)

    def about(self, path: str) -> About:
        return checkpoint.read_about(Path(path))


def trials(base: Experiment, count: int, most: int) -> list[Experiment]:
    """Configurations of the default search's two knobs, drawn at random; `most` samples per class at most."""
    rng = np.random.default_rng(0)
    return [
        override(
            base,
            {"method.samples_per_class": int(rng.integers(1, most + 1)), "method.resampling_ratio": rng.uniform(0.05, 0.3)},
        )
        for _ in range(count)
    ]


def against_separate(report: Report, count: int) -> None:
    """Worker-seconds of the sweep and of the same trials alone, imagined."""
    rows = []
    for setting in ("16-8", "16-4"):
        base = override(cmr_collage.BASE, {"scenario.setting": setting})
        with tempfile.TemporaryDirectory() as root:
            shared, alone = Imagined(), Imagined(scratch=f"{root}/alone")
            store = StoredBackend(shared, Path(root) / "store")
            for experiment in trials(base, count, 10):
                list(run_stream(experiment, 0, store))
                list(run_stream(experiment, 0, alone))
        sweep, separate = sum(shared.spent.values()), sum(alone.spent.values())
        report.raw[f"imagined {setting}"] = {"sweep": shared.spent, "separate": alone.spent}
        by_kind = ", ".join(f"{kind} {shared.spent[kind]:.0f} of {alone.spent[kind]:.0f}" for kind in shared.spent)
        rows.append((setting, f"{sweep:.0f}", f"{separate:.0f}", f"{sweep / separate:.3f}", by_kind))
    schedule = cmr_collage.BASE.schedule
    epochs = f"{schedule.base_epochs} + {schedule.epochs} epochs"
    report.say(f"{count} trials of the default search (CMR, {epochs}), imagined worker-seconds:")
    report.say()
    report.table(["setting", "sweep", "separate streams", "share", "of this"], rows)


def real(report: Report, count: int) -> None:
    """Tones streams, trained here through a store."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        store = StoredBackend(LocalBackend(Path(root) / "cache"), Path(root) / "store")
        started, cpu = time.perf_counter(), time.process_time()
        for experiment in trials(tones.BASE, count, 4):
            list(run_stream(experiment, 0, store))
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    reuse = store.reuse
    everything = reuse.computed_seconds + reuse.reused_seconds
    report.raw["real tones"] = {**vars(reuse), "wall_s": wall, "cpu_s": cpu}
    report.say(f"{count} trials on tones (2-2), trained here through a store, seconds by the clock of who did the work:")
    report.say()
    report.table(
        ["computed", "with what was reused", "share", "wall time", "wall time outside the backend's work"],
        [(f"{reuse.computed_seconds:.1f}", f"{everything:.1f}", f"{reuse.computed_seconds / everything:.3f}", f"{wall:.1f}",
          f"{wall - reuse.computed_seconds:.1f} ({(wall - reuse.computed_seconds) / wall:.1%})")],
    )  # fmt: skip


def busy(report: Report, folder: Path, cores: int) -> None:
    """How much of the cores' time between its first outcome's beginning and its last one's end a finished sweep's work took."""
    entries = Entries(folder.absolute().parents[1] / "store")
    used = entries.users()[f"sweep/{folder.name}"]
    bodies = [body for kind, key in sorted(used) if (body := entries.read(kind, key)) is not None]
    ends, seconds = [body["made"] for body in bodies], [body["seconds"] for body in bodies]
    # Outcomes of one worker, but for scores and counts, whose chunks may run side by side: these begin later, if at all.
    first = min(end - each for end, each in zip(ends, seconds, strict=True))
    span, work = max(ends) - first, sum(seconds)
    report.raw["sweep"] = {"outcomes": len(bodies), "span_s": span, "worker_s": work, "cores": cores}
    report.say(f"The sweep {folder.name!r}, its store to itself, {len(bodies)} outcomes, {cores} cores of one worker each:")
    report.say()
    report.table(
        ["worker-seconds", "from the first task's beginning to the last one's end, s", "share of the cores"],
        [(f"{work:.0f}", f"{span:.0f}", f"{work / span / cores:.3f}")],
    )


def growth(report: Report, count: int, mlflow: bool) -> None:
    """Driver's time per trial without work, its memory and its writes, over blocks of trials."""
    size, rows = max(count // 10, 1), []
    seconds: list[float] = []
    writes: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        store = StoredBackend(Imagined(), Path(root) / "store")
        tracker = Tracker(f"sqlite:///{root}/mlflow.db", Path(root) / "artifacts") if mlflow else None
        parent = tracker.start("growth", "sweep", {}) if tracker else ""
        for number, experiment in enumerate(trials(cmr_collage.BASE, count, 10)):
            begun = time.process_time()
            outcomes = list(run_stream(experiment, 0, store))
            seconds.append(time.process_time() - begun)
            if tracker:
                begun = time.process_time()
                run = tracker.stream(experiment, 0, f"trial {number}", parent)
                for outcome in outcomes:
                    tracker.record(run, record_of(outcome))
                tracker.end(run)
                writes.append(time.process_time() - begun)
            if (number + 1) % size == 0:
                last = slice(number + 1 - size, number + 1)
                entries = sum(1 for _ in (Path(root) / "store").rglob("*.json"))
                rows.append(
                    (f"{last.start + 1} to {last.stop}", f"{1000 * statistics.median(seconds[last]):.0f}",
                     f"{1000 * statistics.median(writes[last]):.0f}" if writes else "not run", f"{resident():.0f}", entries)
                )  # fmt: skip
    report.raw["growth"] = {"protocol_and_store_s": seconds, "mlflow_s": writes}
    report.say(f"{count} trials of 16-8 without work, processor time of the driver:")
    report.say()
    report.table(["trials", "protocol and store, ms a trial", "MLflow, ms a trial", "memory, MiB", "files of the store"], rows)


def scoring_plan(report: Report, samples: int) -> None:
    """What the driver does with the scores of many samples: cutting into chunks, joining, F and F', drawing, choosing."""
    rng = np.random.default_rng(0)
    task = Task(
        1, 61, 71, tuple(Sample(f"clip-{n:07d}", (int(rng.integers(61, 71)),)) for n in range(samples)),
        LabelRule(range(61, 71), BACKGROUND),
    )  # fmt: skip
    memory = Memory({c: tuple(Row(f"old-{c}-{n}", c) for n in range(5)) for c in range(1, 61)})
    ids, method, chunk = [sample.id for sample in task.train], CMR(), 512
    timings: dict[str, float] = {}

    def timed(name: str, run: object) -> object:
        begun = time.process_time()
        result = run()  # type: ignore[operator]
        timings[name] = time.process_time() - begun
        return result

    first = resident()
    chunks = timed("cut into chunks", lambda: [tuple(ids[start : start + chunk]) for start in range(0, samples, chunk)])
    assert isinstance(chunks, list)

    def answer(names: Sequence[str], part: Sequence[str]) -> ScoreTable:
        return ScoreTable(tuple(part), {name: tuple(rng.random(len(part)).tolist()) for name in names})

    after = [answer(("delta", "audio_visual", "visual_only", "frames"), part) for part in chunks]
    before = [answer(("old_class", "new_class", "pixels", "share"), part) for part in chunks]
    joined = timed("join the scores of MSS", lambda: ScoreTable.concatenate(after))
    collided = timed("join the collisions", lambda: ScoreTable.concatenate(before))
    assert isinstance(joined, ScoreTable)
    assert isinstance(collided, ScoreTable)
    timed("F, F' and the draw", lambda: method.rehearse(collided, memory, task, np.random.default_rng(0)))
    timed("MSS of ten classes", lambda: method.remember(joined, memory, task, np.random.default_rng(0)))
    report.raw["scoring plan"] = timings
    report.say(f"{samples} samples scored, in {len(chunks)} chunks; {resident() - first:.0f} MiB more in the driver:")
    report.say()
    report.table(["the driver's part", "s of processor"], [(name, f"{value:.3f}") for name, value in timings.items()])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=20, help="trials against separate streams")
    parser.add_argument("--growth", type=int, default=1000, help="trials without work")
    parser.add_argument("--mlflow", action="store_true", help="write the trials without work to a fresh MLflow database, too")
    parser.add_argument("--real", action="store_true", help="train the tones streams of as many trials")
    parser.add_argument("--sweep", type=Path, metavar="FOLDER", help="how busy a sweep (OUTPUTS/sweeps/NAME) kept this machine")
    options = parser.parse_args()
    report = Report("sweep_cost", "What a sweep costs", options)
    if options.sweep:
        busy(report, options.sweep, len(os.sched_getaffinity(0)))
    against_separate(report, options.trials)
    if options.real:
        real(report, 5 if options.short else options.trials)
    growth(report, 20 if options.short else options.growth, options.mlflow)
    scoring_plan(report, 5_000 if options.short else 100_000)
    report.end()


if __name__ == "__main__":
    main()
