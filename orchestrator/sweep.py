"""`python -m orchestrator.sweep`: a search space over the cluster, everything in MLflow, the best configuration tested.

The same command with the same --name goes on where it was cut off, in the same MLflow runs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError, OutageError
from cavs_model.networks.av_segmenter import check_weights
from cavs_model.types import AUDIO_VISUAL
from orchestrator import cli
from orchestrator.dry_run import DEBUG_TRIALS, debug_name, plan_text
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, Objective, flatten, override, plain
from orchestrator.ledger import Ledger, Trial, held
from orchestrator.node_metrics import Watch
from orchestrator.notes import note
from orchestrator.notes import table as note_table
from orchestrator.outage import Patience
from orchestrator.progress import Event, Progress, planned_work, watched
from orchestrator.ray_backend import NodeProbe, RayBackend, connected, drain, new_mailbox
from orchestrator.readiness import ready
from orchestrator.redaction import redacted
from orchestrator.search import (
    MEMORY_BYTES,
    SAMPLERS,
    WORKER_SECONDS,
    Budgets,
    Plan,
    Search,
    Undertaker,
    described,
    mean_over_seeds,
    search,
)
from orchestrator.source import code_version
from orchestrator.status import StatusFile
from orchestrator.store import Reuse, StoredBackend, write_atomically
from orchestrator.stream import run_stream
from orchestrator.terminal import renderer
from orchestrator.tracker import DATA_PICTURE, Tracker, command, record_of, tags_of, tracking_uri, with_short_names

SHOWN_METRICS = ("miou/all", "miou/old", "miou/new", "miou/foreground")  # of the best configuration, without a split


@dataclass
class TrialLog:
    """Handles a sweep's events in the driver: prints progress, writes MLflow and the ledger, one writer for all trials.

    An event that MLflow does not take stays in the queue and is tried again with the next; `finish` raises what stays. The
    ledger hears of an event after MLflow, so that a sweep that goes on repeats what MLflow may not have, and no more.
    """

    tracker: Tracker
    ledger: Ledger
    progress: Progress
    retries: int = 0
    _attempts: dict[int, int] = field(default_factory=dict)  # trial -> how often it started
    _open: set[int] = field(default_factory=set)  # trials whose runs are open
    _queue: list[Event] = field(default_factory=list)
    _error: Exception | None = None

    def __call__(self, event: Event) -> None:
        if event["kind"] == "start":
            self._attempts[event["trial"]] = self._attempts.get(event["trial"], 0) + 1
        if event["kind"] == "trial" and event["status"] == "FAILED" and not event["final"]:
            attempt = self._attempts.get(event["trial"], 0)
            if attempt <= self.retries:
                self.progress.line(f"{event['label']}: {event['text']}; trying again, {attempt} of {self.retries}")
                return
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

    def finish(self, errors: Mapping[int, str]) -> None:
        """Ends every run that is still open: FAILED where there is an error by the trial's number, else KILLED.

        Raises what MLflow could not take.
        """
        self.flush()
        if self._error is not None:
            raise self._error
        for number, error in errors.items():  # a trial whose driver died never said how it ended
            if self.ledger.trials[number].state == "RUNNING":
                self._fail(number, error)
        for number in sorted(self._open):
            self._end(number, "KILLED")

    def _write(self, event: Event) -> None:
        kind, number = event["kind"], event["trial"]
        if kind == "start":
            if number in self._open:  # tried again
                trial = self.ledger.trials[number]
                self.ledger.begin(number, trial.config, trial.attrs)
            else:
                self._begin(number, event["experiment"])
        elif kind == "task":
            stream = self.ledger.trials[number].streams[str(event["seed"])]
            if self._is_new(number, stream, event["task"]):
                self.tracker.record(stream, event["record"])
                self._logged(number, stream, event["task"])
        elif kind == "report":
            run = self.ledger.trials[number].run
            if self._is_new(number, run, event["task"]):
                chosen_by = self.ledger.plan["objectives"][0]["metric"]
                metrics = with_short_names(event["metrics"]) | {"objective": event["metrics"][chosen_by]}
                self.tracker.metrics(run, metrics, event["task"])
            self._logged(number, run, event["task"], metrics=event["metrics"])
        elif kind == "trial":
            if event["status"] == "FAILED":
                self._fail(number, event["error"])
            else:
                if event["status"] == "PRUNED":  # no status of MLflow's
                    self.tracker.tag(self.ledger.trials[number].run, {"state": "PRUNED"})
                self._end(number, "FINISHED")
                self.ledger.change(number, state=event["status"])

    def _begin(self, number: int, experiment: Experiment) -> None:
        """Opens the runs of a trial and its streams: those it has, or new ones."""
        trial = self.ledger.trials[number]
        tags = {"trial": str(number)}
        run = trial.run or self.tracker.child(self.ledger.parent, tags)
        if run:
            self.tracker.resume(run)
        else:
            name = _trial_name(number, trial.config)
            run = self.tracker.start(name, "trial", flatten(experiment), self.ledger.parent, {**tags_of(experiment), **tags})
            self.tracker.dataset(run, experiment.benchmark)
        self.ledger.change(number, run=run)
        for seed in experiment.seeds:
            stream = trial.streams.get(str(seed)) or self.tracker.child(run, {"seed": str(seed)})
            if stream:
                self.tracker.resume(stream)
            else:
                stream = self.tracker.stream(experiment, seed, f"trial {number} seed {seed}", run)
            self.ledger.change(number, streams={**self.ledger.trials[number].streams, str(seed): stream})
        self._open.add(number)

    def _is_new(self, number: int, run: str, task: int) -> bool:
        return task > self.ledger.trials[number].logged.get(run, -1)

    def _logged(self, number: int, run: str, task: int, **changes: Any) -> None:
        logged = self.ledger.trials[number].logged
        self.ledger.change(number, logged={**logged, run: max(task, logged.get(run, -1))}, **changes)

    def _fail(self, number: int, error: str) -> None:
        error = redacted(error)
        if run := self.ledger.trials[number].run:
            self.tracker.tag(run, {"failure": error[:4000]})
            self._end(number, "FAILED")
        self.ledger.change(number, state="FAILED", error=error or "failed without a message")

    def _end(self, number: int, status: str) -> None:
        trial = self.ledger.trials[number]
        for run in (*trial.streams.values(), trial.run):
            self.tracker.end(run, status)
        self._open.discard(number)


def sweep() -> int:
    """The verb; 0, or 1 where a trial failed."""
    made = cli.parser("sweep", "Search a space's open knobs on a Ray cluster, with everything logged to MLflow.")
    made.add_argument("--trials", type=int, default=8, help="trials of the search (%(default)s)")
    made.add_argument("--name", default=None, help="name of the sweep; one that is there goes on (the space's name, numbered)")
    made.add_argument("--fresh", action="store_true", help="forget what was done under --name; the store is kept")
    made.add_argument("--sampler", choices=SAMPLERS, default="gp", help="Optuna's sampler (%(default)s)")
    made.add_argument("--search-seed", type=int, default=0, help="seed of the sampler (%(default)s)")
    made.add_argument("--retries", type=int, default=1, help="of a trial that failed, not for its input (%(default)s)")
    made.add_argument("--wall-clock", type=cli.duration, metavar="TIME",
                      help=f"end the search after this time of this command: {cli.A_TIME}")  # fmt: skip
    made.add_argument("--worker-seconds", type=cli.duration, metavar="TIME", help="end it when workers computed for this long")
    made.add_argument("--asha", type=int, default=0, metavar="N",
                      help="prune: after each of 1, N, N*N, ... tasks one trial in N goes on, so that 2 keeps the better half "
                      "after tasks 1, 2 and 4 (0: none is pruned)")  # fmt: skip
    made.add_argument("--target", type=float, metavar="VALUE", help="end it when the first objective is as good as this")
    made.add_argument("--plateau", type=int, metavar="N", help="end it after N trials that were no better than the best")
    made.add_argument("--at-once", type=int, metavar="N", help="trials at a time (as many as fit the cluster as it is now); "
                      "more than that make a cluster that grows by itself grow")  # fmt: skip
    cli.add_store(made)
    cli.add_patience(made)
    cli.add_training(made)
    cli.add_report_option(made)
    arguments = made.parse_args()
    if arguments.debug:
        arguments.trials = min(arguments.trials, DEBUG_TRIALS)
    wanted = search_of(arguments)
    space, experiment = cli.experiment_of(arguments)
    space = replace(space, base=experiment)
    if wanted.asha and len(space.objectives) > 1:
        raise InputError(f"--asha prunes by one objective, search space {space.name} has {len(space.objectives)}")
    knobs = cli.open_knobs(space)
    if not knobs:
        raise InputError(f"search space {space.name} opens no knob; use python -m orchestrator.run {space.name}")
    outputs = cli.outputs_folder(arguments.outputs)
    entries = cli.store_of(arguments.store, outputs)
    experiment.benchmark.check()
    if arguments.dry_run:
        before = f"; {arguments.name} goes on" if arguments.name and (outputs / "sweeps" / arguments.name).is_dir() else ""
        print(f"dry run, nothing is computed: {space.name}, {wanted.trials} trials by {wanted.sampler}{before}")
        print(f"over {', '.join(knobs)}")
        tested = ", ".join(split for split in experiment.benchmark.splits() if split.startswith("test"))
        print(plan_text(experiment, ("val",), entries, wanted.trials))
        print(f"then the best configuration alone on {tested}; of a trial's own tasks the store may have more than of the base")
        return 0
    entries.make()
    name = debug_name(arguments.name) if arguments.debug and arguments.name else arguments.name
    tracker = Tracker(tracking_uri(outputs), outputs / "artifacts")
    folder = cli.run_folder(outputs / "sweeps", name, debug_name(space.name) if arguments.debug else space.name)
    tracker.belongs_to("sweep", folder.name)
    with held(folder, arguments.fresh), entries.tidied():
        ledger = Ledger.open(folder, plan_of(space, wanted))
        shown = (renderer(sys.stdout, folder.name, arguments.plain), StatusFile(folder, "sweep"))
        mode = space.objectives[0].mode
        progress = Progress(sys.stdout, planned_work(experiment), experiment.seeds, wanted.trials, mode, renderers=shown)
        progress.where = (f"results: {folder}", f"MLflow: {tracker.open_hint}")
        progress.shared = lambda: shared_by(ledger.trials)
        with progress:
            progress.line(f"{space.name}: {wanted.trials} trials over {', '.join(knobs)}; results: {folder}")
            progress.line(f"MLflow: {tracker.open_hint}")
            patience = Patience(arguments.wait_out)
            made_of = _Sweep(space, wanted, outputs, entries, tracker, ledger, progress, patience, arguments.at_once)
            failed = made_of.run(arguments.verbose, reports=not arguments.no_report)
    if not arguments.no_report:
        cli.write_report(f"sweeps/{folder.name}", outputs)
    print(f"results: {folder}\nMLflow:  {tracker.open_hint}", flush=True)
    return 1 if failed else 0


def search_of(arguments: argparse.Namespace) -> Search:
    """How to search, from the command line. InputError for numbers out of range."""
    for name, least in (("trials", 1), ("retries", 0), ("search_seed", 0), ("at_once", 1)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(arguments, name)}")
    if arguments.fresh and arguments.name is None:
        raise InputError("--fresh starts a sweep of a given --name anew; without --name every sweep is a new one")
    if arguments.asha and arguments.asha < 2:
        raise InputError(f"--asha must be at least 2, or 0 for no pruning, not {arguments.asha}")
    budgets = Budgets(arguments.wall_clock, arguments.worker_seconds, arguments.target, arguments.plateau)
    return Search(arguments.trials, arguments.sampler, arguments.search_seed, arguments.retries, budgets, arguments.asha)


def plan_of(space: cli.SearchSpace, wanted: Search) -> dict[str, Any]:
    """What must stay the same where a sweep goes on: all that its numbers follow from, but not how many or where."""
    fields = flatten(space.base).items()
    return {
        "space": space.name,
        "knobs": described(space),
        "objectives": plain(space.objectives),
        "sampler": wanted.sampler,
        "search_seed": wanted.seed,
        "asha": wanted.asha,
        "experiment": plain({path: value for path, value in fields if not path.startswith("resources.")}),
        "splits": list(space.base.benchmark.splits()),
        "data": space.base.benchmark.fingerprint(),
        "code": code_version(),
    }


@dataclass(frozen=True)
class _Sweep:
    """A sweep from what its ledger knows to its end."""

    space: cli.SearchSpace
    wanted: Search
    outputs: Path
    entries: Entries
    tracker: Tracker
    ledger: Ledger
    progress: Progress
    patience: Patience
    at_once: int | None  # trials at a time; as many as fit

    def run(self, verbose: bool, reports: bool) -> bool:
        """Runs what is left, and concludes; whether a trial failed. `reports` says that a report will follow."""
        ledger, objective = self.ledger, self.space.objectives[0]
        for number, trial in sorted(ledger.trials.items()):
            if trial.state != "RUNNING":
                told = (
                    f"{objective.metric} {trial.metrics[objective.metric]:.4f}"
                    if not trial.error
                    else f"failed: {trial.error.splitlines()[-1]}"
                )
                value = trial.metrics[objective.metric] if trial.state == "FINISHED" else None
                self.progress({"kind": "trial", "trial": number, "label": f"trial {number}", "text": f"before: {told}",
                               "value": value})  # fmt: skip
        ended = [trial for trial in ledger.trials.values() if trial.state != "RUNNING"]
        reason = ""
        if len(ended) < max(self.wanted.trials, len(ledger.trials)) or ledger.tested != (
            best_of(ledger.trials, objective) or 0
        ):
            with connected(verbose) as cluster:
                ready(self.space.base, self.outputs, cluster, self.entries)
                fits = cluster.concurrent_jobs(self.space.base.resources)
                concurrency = min(self.at_once or fits, self.wanted.trials)
                self.progress.line(f"{cluster.describe()}; {concurrency} trials at a time")
                self.progress.where += cluster.where
                reason = self._compute(concurrency)
        self.progress.rest()
        try:
            self._begin()
            failed = conclude(self.space.objectives, ledger, self.tracker, reason)
            self.tracker.note(ledger.parent, note_of(self.space, ledger, self.tracker, reports))
        except BaseException:
            self._cut_off()
            raise
        best = best_of(ledger.trials, objective)
        self.tracker.end(ledger.parent, "FINISHED" if best is not None else "FAILED")
        self.progress.line(f"done; search, store and MLflow: {time.process_time():.0f} s of this process")
        return failed

    def _begin(self) -> None:
        """Opens the sweep's run in MLflow: the one it has, or a new one, with what is known of it before it is done."""
        ledger, tracker, experiment = self.ledger, self.tracker, self.space.base
        if ledger.parent:
            tracker.resume(ledger.parent)
        else:
            tags = {**tags_of(experiment), "space": self.space.name}
            parent = tracker.start(ledger.folder.name, "sweep", flatten(experiment), tags=tags)
            ledger.update(parent=parent)
        if not tracker.noted(ledger.parent):
            tracker.describe(ledger.parent, ledger.plan, experiment.benchmark)
            tracker.note(ledger.parent, note_of(self.space, ledger, tracker, reports=False))

    def _cut_off(self) -> None:
        """Ends the sweep's run as one that can go on."""
        if self.ledger.parent:
            self.tracker.end(self.ledger.parent, "KILLED")

    def _compute(self, concurrency: int) -> str:
        """Runs trials and tests the best one; the budget that ended the search, "" for the number of trials."""
        space, ledger, progress, experiment = self.space, self.ledger, self.progress, self.space.base
        backend = RayBackend(self.outputs / "data", self.outputs / "scratch", experiment.resources, new_mailbox())
        user = f"sweep/{ledger.folder.name}"
        store = StoredBackend(backend, self.entries, user=user, on_damage=progress.line)
        plan = Plan(experiment, space.objectives, backend, self.entries, user, self.patience)
        log = TrialLog(self.tracker, ledger, progress, self.wanted.retries)
        undertaker = Undertaker()
        nodes = Watch(NodeProbe(), lambda values, taken: self.tracker.system(ledger.parent, values, taken), progress.line)

        def idle() -> None:
            progress.heartbeat()
            nodes()
            undertaker()

        def prepare() -> None:
            store.prepare(experiment.benchmark, ("train", "val"), experiment.network.frozen_sound)

        try:
            self._begin()
            with watched(lambda: drain(backend.mailbox), log, idle):
                progress.line(f"preparing {experiment.benchmark.name}")
                check_weights(experiment.network)
                self.patience.through(prepare, progress.line)
                progress.line(f"{experiment.benchmark.name} is ready")
                ending = search(space, plan, self.wanted, concurrency, ledger, undertaker)
            log.finish(ending.errors)
            if ending.outage:
                raise OutageError(f"{ending.outage}; what was computed is kept, and the same command with --name goes on")
            best = best_of(ledger.trials, space.objectives[0])
            if best is not None and best != ledger.tested:
                chosen = override(experiment, ledger.trials[best].config)
                with watched(lambda: drain(backend.mailbox), log, idle):
                    progress.line("testing the best configuration, and it alone")
                    self.patience.through(lambda: test(chosen, best, store, self.tracker, ledger, progress), progress.line)
        except BaseException:
            try:
                log.finish({})
            finally:
                self._cut_off()
            raise
        return ending.reason


def test(
    experiment: Experiment, number: int, store: StoredBackend, tracker: Tracker, ledger: Ledger, progress: Progress
) -> None:
    """Evaluates the chosen trial's configuration, and it alone, on the test splits; the means over seeds go to the parent.

    So does the network of the seed that is best on validation, as the sweep's model.
    """
    splits = [split for split in experiment.benchmark.splits() if split.startswith("test")]
    runs: dict[int, str] = {}

    def log_once(name: str, task: int, log: Callable[[], None]) -> None:
        """Logs a task of a run, unless MLflow has it already."""
        if task > ledger.test_logged.get(name, -1):
            log()
            ledger.update(test_logged={**ledger.test_logged, name: task})

    try:
        for seed in experiment.seeds:
            name = f"{number} {seed}"
            if name in ledger.test_runs:
                tracker.resume(ledger.test_runs[name])
            else:
                run = tracker.stream(experiment, seed, f"best seed {seed}", ledger.parent)
                ledger.update(test_runs={**ledger.test_runs, name: run})
            runs[seed] = ledger.test_runs[name]
        streams = [run_stream(experiment, seed, store, ("val", *splits), label="best ") for seed in experiment.seeds]
        for outcomes in zip(*streams, strict=True):
            task = outcomes[0].task.index
            for outcome in outcomes:
                run, record = runs[outcome.seed], record_of(outcome)
                log_once(f"{number} {outcome.seed}", task, partial(tracker.record, run, record))
                progress.line(f"best: {outcome.headline()}")
            log_once(str(number), task, partial(tracker.metrics, ledger.parent, mean_over_seeds(outcomes), task))
    except BaseException:
        for run in runs.values():
            tracker.end(run, "KILLED")
        raise
    for run in runs.values():
        tracker.end(run)
    chosen_by = ledger.plan["objectives"][0]
    sign, found = (-1 if chosen_by["mode"] == "max" else 1), ledger.trials[number].metrics
    best = min(outcomes, key=lambda outcome: sign * outcome.metrics().get(chosen_by["metric"], 0.0))
    headline = {name: found[name] for name in (MEMORY_BYTES, WORKER_SECONDS) if name in found}
    headline |= {name: value for name, value in with_short_names(mean_over_seeds(outcomes)).items() if name in SHOWN_METRICS}
    tracker.model(
        ledger.parent,
        Path(best.state.checkpoints[AUDIO_VISUAL]),
        best.classes_json(experiment.benchmark),
        headline | {"objective": found[chosen_by["metric"]]},
        best.task.index,
    )
    ledger.update(tested=number)


def best_of(trials: Mapping[int, Trial], objective: Objective) -> int | None:
    """The number of the trial with the best objective among those that ended well; None where none did."""
    costs = {number: _cost(trial, objective) for number, trial in sorted(trials.items())}
    ended = [number for number, cost in costs.items() if math.isfinite(cost)]
    return min(ended, key=lambda number: costs[number], default=None)


def pareto_front(trials: Mapping[int, Trial], objectives: Sequence[Objective]) -> list[int]:
    """The numbers of the trials that ended well and that no other one beats in one objective and equals in the rest.

    Best by the first objective first.
    """
    costs = {number: [_cost(trial, objective) for objective in objectives] for number, trial in sorted(trials.items())}
    ended = {number: cost for number, cost in costs.items() if all(math.isfinite(value) for value in cost)}

    def beaten(number: int) -> bool:
        mine = ended[number]
        return any(
            other != mine and all(theirs <= ours for theirs, ours in zip(other, mine, strict=True)) for other in ended.values()
        )

    return sorted((number for number in ended if not beaten(number)), key=lambda number: ended[number])


def _cost(trial: Trial, objective: Objective) -> float:
    """Smaller is better; infinite for a trial that did not end well."""
    if trial.state != "FINISHED" or objective.metric not in trial.metrics:
        return math.inf
    return float(trial.metrics[objective.metric]) * (-1 if objective.mode == "max" else 1)


def conclude(objectives: Sequence[Objective], ledger: Ledger, tracker: Tracker, reason: str) -> bool:
    """Writes and prints the table of trials, the best configuration and, of several objectives, the Pareto front.

    Whether a trial failed. `reason` is the budget that ended the search, "" for the number of trials.
    """
    ended = {number: trial for number, trial in sorted(ledger.trials.items()) if trial.state != "RUNNING"}
    metrics = [objective.metric for objective in objectives]
    knobs = sorted({name for trial in ended.values() for name in trial.config})
    columns = [
        "trial",
        *knobs,
        *dict.fromkeys([*metrics, "val/miou/old", "val/miou/new", "val/miou/foreground"]),
        "state",
        "error",
    ]
    order = sorted(ended, key=lambda number: (_cost(ended[number], objectives[0]), number))
    rows = {number: {"trial": number, **ended[number].config, **ended[number].metrics,
                     "state": ended[number].state, "error": ended[number].error}
            for number in order}  # fmt: skip
    _keep(ledger, tracker, "trials.csv", _csv(columns, list(rows.values())))
    print("\n" + _table(columns, list(rows.values())) + "\n", flush=True)
    stopped = len(ledger.trials) - len(ended)
    why = reason or f"all {len(ledger.trials)} trials were run"
    more = f"; {stopped} trials were stopped between tasks, a larger budget goes on with them" if stopped else ""
    print(f"the search ended: {why}{more}", flush=True)
    print(shared_by(ledger.trials), flush=True)
    tracker.tag(ledger.parent, {"ended": why})
    if len(objectives) > 1:
        front = pareto_front(ended, objectives)
        _keep(ledger, tracker, "pareto.csv", _csv(columns, [rows[number] for number in front]))
        for number, trial in ended.items():
            if trial.run:
                tracker.tag(trial.run, {"pareto": str(number in front).lower()})
        print(f"Pareto front of {', '.join(metrics)}:", flush=True)
        print(_table(["trial", *knobs, *metrics], [rows[number] for number in front]) + "\n", flush=True)
    best = best_of(ended, objectives[0])
    if best is None:
        print("no trial ended well", flush=True)
    else:
        config, value = dict(ended[best].config), ended[best].metrics[metrics[0]]
        _keep(ledger, tracker, "best.json", json.dumps({"config": config, metrics[0]: value}, indent=1))
        shown = " ".join(f"--set {name}={setting}" for name, setting in config.items())
        print(f"best: {metrics[0]} {value:.4f} with {shown}", flush=True)
    return any(trial.state == "FAILED" for trial in ended.values())


def shared_by(trials: Mapping[int, Trial]) -> str:
    """What the trials computed and what the store had of it: networks, states, scores and counts, and worker-seconds."""
    return sum((trial.reuse for trial in list(trials.values())), Reuse()).describe()


def note_of(space: cli.SearchSpace, ledger: Ledger, tracker: Tracker, reports: bool) -> str:
    """What the sweep's run says of itself in MLflow; `reports` says that it has a report."""
    objective, experiment = space.objectives[0], space.base
    ended = {number: trial for number, trial in sorted(ledger.trials.items()) if trial.state != "RUNNING"}
    best = best_of(ended, objective)
    order = sorted(ended, key=lambda number: (_cost(ended[number], objective), number))
    knobs = sorted({name for trial in ended.values() for name in trial.config})
    metrics = list(dict.fromkeys([*(each.metric for each in space.objectives), "val/miou/old", "val/miou/new"]))
    rows = [
        {"trial": number, **ended[number].config, **ended[number].metrics, "state": ended[number].state} for number in order
    ]
    result = "No trial ended well." if ended else "No trial has ended yet."
    if best is not None:
        chosen = " ".join(f"--set {name}={value}" for name, value in ended[best].config.items())
        result = f"Best: **{objective.metric} {ended[best].metrics[objective.metric]:.4f}** by trial {best}, `{chosen}`."
    tags = tags_of(experiment)
    seeds = ", ".join(map(str, experiment.seeds))
    facts = {"method": tags["method"], "benchmark": f"{tags['benchmark']} {tags['setting']}", "seeds": seeds}
    links = {
        "all trials": tracker.address(ledger.parent, "artifacts/trials.csv"),
        "the data": tracker.address(ledger.parent, f"artifacts/{DATA_PICTURE}"),
        **({"the report": tracker.address(ledger.parent, "artifacts/report.html")} if reports else {}),
    }
    text = f"{result}\n\n{note_table(['trial', *knobs, *metrics, 'state'], rows)}" if ended else result
    return note(space.doc, facts, text, command(), {name: link.removeprefix("/") for name, link in links.items()})


def _keep(ledger: Ledger, tracker: Tracker, name: str, content: str) -> None:
    """Writes a file beside the ledger and into the sweep's run."""
    write_atomically(ledger.folder / name, content.encode())
    tracker.artifact(ledger.parent, name, content)


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
