"""`python -m orchestrator.sweep`: a search space over the cluster, everything in MLflow, the best configuration tested."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import check_weights
from orchestrator import cli
from orchestrator.experiment import Experiment, Objective, flatten, override
from orchestrator.progress import Event, Progress, planned_work, watched
from orchestrator.ray_backend import RayBackend, connected, drain, new_mailbox
from orchestrator.search import SAMPLERS, Plan, TrialResult, mean_over_seeds, search
from orchestrator.store import StoredBackend
from orchestrator.stream import run_stream
from orchestrator.tracker import Tracker, record_of, tags_of, tracking_uri


@dataclass
class TrialLog:
    """Handles a sweep's events in the driver: prints progress and writes MLflow, one writer for all trials.

    An event that MLflow does not take stays in the queue and is tried again with the next; `finish` raises what stays.
    """

    tracker: Tracker
    parent: str
    progress: Progress
    _runs: dict[int, str] = field(default_factory=dict)  # trial -> run id
    _streams: dict[tuple[int, int], str] = field(default_factory=dict)  # (trial, seed) -> run id
    _ended: set[int] = field(default_factory=set)
    _queue: list[Event] = field(default_factory=list)
    _error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if event["kind"] in ("steps", "epoch", "note", "task", "trial"):
            self.progress(event)
        if event["kind"] in ("start", "task", "report", "trial"):
            self._queue.append(event)
            self.flush()

    def flush(self) -> None:
        """Writes the events that wait."""
        while self._queue:
            try:
                self._write(self._queue[0])
            except Exception as error:  # kept for the next try; `finish` raises it if it stays
                if self._error is None:
                    self.progress.line(f"MLflow did not take an event, it will be tried again: {error}")
                self._error = error
                return
            self._error = None
            self._queue.pop(0)

    def finish(self, status: str) -> None:
        """Ends every run that is still open with `status`. Raises what MLflow could not take."""
        self.flush()
        if self._error is not None:
            raise self._error
        for number in set(self._runs) - self._ended:
            self._end(number, status)

    def _write(self, event: Event) -> None:
        kind, number = event["kind"], event.get("trial", 0)
        if kind == "start" and number not in self._runs:
            experiment: Experiment = event["experiment"]
            name = _trial_name(number, event["config"])
            self._runs[number] = self.tracker.start(name, "trial", flatten(experiment), self.parent, tags_of(experiment))
            for seed in experiment.seeds:
                self._streams[number, seed] = self.tracker.stream(
                    experiment, seed, f"trial {number} seed {seed}", self._runs[number]
                )
        elif kind == "task":
            self.tracker.record(self._streams[number, event["seed"]], event["record"])
        elif kind == "report":
            self.tracker.metrics(self._runs[number], event["metrics"], event["task"])
        elif kind == "trial":
            if event["status"] == "FAILED":
                self.tracker.tag(self._runs[number], {"failure": event["text"][:4000]})
            self._end(number, event["status"])

    def _end(self, number: int, status: str) -> None:
        for (trial, _), stream in self._streams.items():
            if trial == number:
                self.tracker.end(stream, status)
        self.tracker.end(self._runs[number], status)
        self._ended.add(number)


def sweep() -> int:
    """The verb; 0, or 1 where a trial failed."""
    made = cli.parser("sweep", "Search a space's open knobs on a Ray cluster, with everything logged to MLflow.")
    made.add_argument("--trials", type=int, default=8, help="trials of the search (%(default)s)")
    made.add_argument("--name", default=None, help="name of the sweep (the space's name, numbered)")
    made.add_argument("--sampler", choices=SAMPLERS, default="gp", help="Optuna's sampler (%(default)s)")
    made.add_argument("--search-seed", type=int, default=0, help="seed of the sampler (%(default)s)")
    arguments = made.parse_args()
    if arguments.trials < 1:
        raise InputError(f"--trials must be at least 1, not {arguments.trials}")
    space, experiment = cli.experiment_of(arguments)
    knobs = cli.open_knobs(cli.SearchSpace(space.name, experiment, space.objectives, space.define))
    if not knobs:
        raise InputError(f"search space {space.name} opens no knob; use python -m orchestrator.run {space.name}")
    outputs = cli.outputs_folder(arguments.outputs)
    experiment.benchmark.check()
    tracking = tracking_uri(outputs)
    tracker = Tracker(tracking, outputs / "artifacts")
    folder = cli.new_folder(outputs / "sweeps", arguments.name, space.name)
    objective = space.objectives[0]
    progress = Progress(sys.stdout, planned_work(experiment), experiment.seeds, arguments.trials, objective.mode)
    progress.line(f"{space.name}: {arguments.trials} trials over {', '.join(knobs)}; results: {folder}")
    progress.line(f"MLflow: {tracker.open_hint}")

    with connected(arguments.verbose) as cluster:
        concurrency = min(cluster.concurrent_jobs(experiment.resources), arguments.trials)
        progress.line(f"{cluster.describe()}; {concurrency} trials at a time")
        parent = tracker.start(folder.name, "sweep", flatten(experiment), tags={**tags_of(experiment), "space": space.name})
        tracker.artifact(parent, "config.json", {"command": sys.argv, "knobs": list(knobs), **flatten(experiment)})
        backend = RayBackend(outputs / "data", outputs / "scratch", experiment.resources, new_mailbox())
        store = StoredBackend(backend, outputs / "store")
        plan = Plan(experiment, space.objectives, backend, outputs / "store")
        log = TrialLog(tracker, parent, progress)
        try:
            with watched(lambda: drain(backend.mailbox), log, progress.heartbeat):
                progress.line(f"preparing {experiment.benchmark.name}")
                check_weights(experiment.network)
                store.prepare(experiment.benchmark, ("train", "val"), experiment.network.frozen_sound)
                progress.line(f"{experiment.benchmark.name} is ready")
                results = search(space, plan, arguments.trials, concurrency, arguments.sampler, arguments.search_seed, folder)
                best = best_of(results, objective)
                if best is not None:
                    progress.line("testing the best configuration, and it alone")
                    test(override(experiment, best.config), store, tracker, parent, progress)
            log.finish("FAILED")  # a trial that never said how it ended
        except BaseException:
            log.finish("KILLED")
            tracker.end(parent, "KILLED")
            raise
        conclude(objective, results, best, folder, tracker, parent)
        tracker.end(parent, "FINISHED" if best is not None else "FAILED")
    progress.line("done")
    print(f"results: {folder}\nMLflow:  {tracker.open_hint}", flush=True)
    return 1 if any(result.error for result in results) else 0


def test(experiment: Experiment, store: StoredBackend, tracker: Tracker, parent: str, progress: Progress) -> None:
    """Evaluates the chosen configuration, and it alone, on the test splits; the means over seeds go to the parent run."""
    splits = [split for split in experiment.benchmark.splits() if split.startswith("test")]
    runs = {seed: tracker.stream(experiment, seed, f"best seed {seed}", parent) for seed in experiment.seeds}
    streams = [run_stream(experiment, seed, store, ("val", *splits), label="best ") for seed in experiment.seeds]
    for outcomes in zip(*streams, strict=True):
        for outcome in outcomes:
            tracker.record(runs[outcome.seed], record_of(outcome))
            progress.line(f"best: {outcome.headline()}")
        tracker.metrics(parent, mean_over_seeds(outcomes), outcomes[0].task.index)
    for run in runs.values():
        tracker.end(run)


def best_of(results: Sequence[TrialResult], objective: Objective) -> TrialResult | None:
    """The trial with the best objective among those that ended well; None where none did."""
    ended = [result for result in results if not result.error and objective.metric in result.metrics]
    return min(ended, key=lambda result: _rank(result.metrics, objective), default=None)


def _rank(metrics: Mapping[str, Any], objective: Objective) -> float:
    """Smaller is better; a row without the metric comes last."""
    if objective.metric not in metrics:
        return math.inf
    return float(metrics[objective.metric]) * (-1 if objective.mode == "max" else 1)


def conclude(
    objective: Objective,
    results: Sequence[TrialResult],
    best: TrialResult | None,
    folder: Path,
    tracker: Tracker,
    parent: str,
) -> None:
    """Writes and prints the table of trials and the best configuration."""
    metric = objective.metric
    knobs = sorted({name for result in results for name in result.config})
    columns = [*knobs, metric, "val/miou/old", "val/miou/new", "val/miou/foreground", "error"]
    rows = [{**result.config, **result.metrics, "error": result.error} for result in results]
    rows.sort(key=lambda row: (bool(row["error"]), _rank(row, objective)))
    with open(folder / "trials.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    tracker.artifact(parent, "trials.csv", (folder / "trials.csv").read_text())
    print("\n" + _table(columns, rows) + "\n", flush=True)
    if best is None:
        print("no trial ended well", flush=True)
        return
    content = {"config": dict(best.config), metric: best.metrics[metric]}
    (folder / "best.json").write_text(json.dumps(content, indent=1))
    tracker.artifact(parent, "best.json", content)
    shown = " ".join(f"--set {name}={value}" for name, value in best.config.items())
    print(f"best: {metric} {best.metrics[metric]:.4f} with {shown}", flush=True)


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value).splitlines()[-1][:60] if value != "" else ""

    cells = [list(columns), *([cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells)


def _trial_name(number: int, config: Mapping[str, Any]) -> str:
    knobs = " ".join(
        f"{name.rsplit('.', 1)[-1]}={value:.3g}" if isinstance(value, float) else f"{name.rsplit('.', 1)[-1]}={value}"
        for name, value in config.items()
    )
    return f"trial {number} {knobs}"


if __name__ == "__main__":
    sys.exit(cli.main(sweep))
