"""`python -m orchestrator.compare`: entries x settings x seeds as one job; a table with spread, differences and cost.

Every stream is one of run_stream's, over one store: the base task and whatever else two streams have in common is computed
once. The same command with the same --name goes on where it was cut off, in the same MLflow runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError, unknown
from cavs_model.untrusted import FaultError, read_json, typed, typed_fields
from orchestrator import cli
from orchestrator.comparison import (
    BACKGROUND_ALONE,
    PLAN_FILE,
    STREAMS_FILE,
    TABLE_FILE,
    StreamResult,
    background_alone,
    markdown,
    raw_csv,
    table,
    table_csv,
    values_of,
)
from orchestrator.dry_run import Lookup, debug_name, debugged, tasks_done
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, flatten, override, parse_assignments, plain
from orchestrator.fields import text
from orchestrator.ledger import LARGEST_LEDGER_BYTES, held, is_begun, refuse_changes
from orchestrator.local_backend import LocalBackend
from orchestrator.node_metrics import Probe, Watch, this_machine
from orchestrator.notes import note
from orchestrator.outage import Patience
from orchestrator.progress import Progress, planned_work, watched
from orchestrator.ray_backend import NodeProbe, RayBackend, connected, drain, new_mailbox
from orchestrator.readiness import ready
from orchestrator.redaction import redacted
from orchestrator.status import StatusFile
from orchestrator.store import Reuse, StoredBackend, write_atomically
from orchestrator.stream import Backend, TaskOutcome, run_stream
from orchestrator.terminal import renderer
from orchestrator.tracker import DATA_PICTURE, Tracker, command, record_of, tags_of, tracking_uri


@dataclass(frozen=True)
class Stream:
    """One stream of a comparison."""

    entry: str
    seed: int
    experiment: Experiment

    @property
    def setting(self) -> str:
        return self.experiment.scenario.setting

    @property
    def name(self) -> str:
        return f"{self.entry} {self.setting} seed {self.seed}"


@dataclass(frozen=True)
class _Asked:
    """What a comparison was asked; `questions` are the spaces' own words."""

    entries: Sequence[str]
    seeds: Sequence[int]
    reference: str
    questions: Sequence[str]


@dataclass
class Ledger:
    """What a comparison has done so far, on disk under `folder`: plan, MLflow runs, and every stream that ended well."""

    folder: Path
    plan: Mapping[str, Any]
    parent: str = ""
    runs: dict[str, str] = field(default_factory=dict)  # stream's name -> MLflow run
    done: dict[str, dict[str, Any]] = field(default_factory=dict)  # stream's name -> its values, and background alone's
    logged: dict[str, int] = field(default_factory=dict)  # stream's name -> its last task that MLflow has

    @staticmethod
    def open(folder: Path, plan: Mapping[str, Any]) -> Ledger:
        """The ledger of a comparison that was begun, or a new one. InputError where the folder holds another comparison."""
        path = folder / PLAN_FILE
        if not is_begun(folder, PLAN_FILE):
            return Ledger(folder, plan)
        try:
            noted = typed_fields(Ledger, read_json(path, LARGEST_LEDGER_BYTES), given={"folder": folder})
            for name, fields in noted["done"].items():
                for part in ("values", "background"):
                    typed(fields.get(part), Mapping[str, float], f"done.{name}.{part}")
        except FaultError as fault:
            raise InputError(f"damaged file {path} (it {fault}); delete the folder, or use --fresh") from None
        found = Ledger(**noted)
        refuse_changes(folder.name, found.plan, plan)
        return found

    def save(self) -> None:
        """Writes the ledger as it is."""
        content = {name: getattr(self, name) for name in ("plan", "parent", "runs", "done", "logged")}
        write_atomically(self.folder / PLAN_FILE, json.dumps(content, indent=1).encode())


def entries_of(spaces: Sequence[cli.SearchSpace], chosen: Sequence[str], changes: Mapping[str, str]) -> dict[str, Experiment]:
    """The entries by name: every variant of every space, or its base where it has none.

    Overrides of the command line come last. With several spaces a name is "space: variant". InputError for names in `chosen`
    that are not there.
    """
    found: dict[str, Experiment] = {}
    for space in spaces:
        variants = space.variants or {space.name: {}}
        for name, fields in variants.items():
            full = f"{space.name}: {name}" if len(spaces) > 1 and space.variants else name
            found[full] = override(override(space.base, fields), changes)
    for name in chosen:
        if name not in found:
            raise unknown("--only", name, list(found))
    return {name: experiment for name, experiment in found.items() if not chosen or name in chosen}


def streams_of(entries: Mapping[str, Experiment], settings: Sequence[str], seeds: Sequence[int]) -> list[Stream]:
    """All streams, seed by seed, so that a comparison that is cut off has whole seeds. InputError for an impossible setting."""
    streams = []
    for seed in seeds:
        for setting in settings or ("",):
            for name, experiment in entries.items():
                chosen = override(experiment, {"scenario.setting": setting} if setting else {})
                chosen.scenario.tasks(chosen.benchmark)
                streams.append(Stream(name, seed, override(chosen, {"seeds": (seed,)})))
    return streams


def compare() -> int:
    """The verb; 0, or 1 where a stream failed."""
    made = cli.parser(
        "compare",
        "Compare methods, or variants of one, over settings and seeds: one job, shared work, one table.",
        several=True,
    )
    made.add_argument("--seeds", default="0,1,2", help="seeds of every entry (%(default)s)")
    made.add_argument("--setting", default="", help="settings such as 16-4,16-8 (each space's own)")
    made.add_argument("--only", action="append", default=[], metavar="ENTRY", help="an entry to run; may be repeated (all)")
    made.add_argument("--reference", default="", help="the entry the others' differences are to (the first)")
    made.add_argument("--name", default=None, help="name of the comparison; one that is there goes on (numbered)")
    made.add_argument("--fresh", action="store_true", help="forget what was done under --name; the store is kept")
    made.add_argument("--test", action="store_true", help="report on the test splits: only for what is settled")
    made.add_argument("--local", action="store_true", help="in this process, without Ray, one stream after the other")
    cli.add_store(made)
    cli.add_patience(made)
    cli.add_training(made)
    cli.add_report_option(made)
    arguments = made.parse_args()
    spaces = [cli.load_space(name) for name in arguments.space]
    seeds = _numbers(arguments.seeds)
    settings = [part.strip() for part in arguments.setting.split(",") if part.strip()]
    entries = entries_of(spaces, arguments.only, parse_assignments(arguments.assignments))
    if arguments.help_fields:
        print(text(next(iter(entries.values()))))
        return 0
    if arguments.debug:
        seeds, entries = seeds[:1], {name: debugged(experiment) for name, experiment in entries.items()}
    reference = arguments.reference or next(iter(entries))
    if reference not in entries:
        raise unknown("--reference", reference, list(entries))
    streams = streams_of(entries, settings, seeds)
    outputs = cli.outputs_folder(arguments.outputs)
    store = cli.store_of(arguments.store, outputs)
    for experiment in entries.values():
        experiment.benchmark.check()
    benchmark = streams[0].experiment.benchmark
    splits = [split for split in benchmark.splits() if split.startswith("test") == arguments.test and split != "train"]
    for stream in streams:
        if missing := set(splits) - set(stream.experiment.benchmark.splits()):
            raise InputError(
                f"{stream.entry}: benchmark {stream.experiment.benchmark.name} has no split {sorted(missing)[0]!r}"
            )
    if arguments.dry_run:
        tell_plan(streams, splits, store)
        return 0
    store.make()
    tracker = Tracker(tracking_uri(outputs), outputs / "artifacts")
    name = debug_name(arguments.name) if arguments.debug and arguments.name else arguments.name
    default = debug_name(spaces[0].name) if arguments.debug else spaces[0].name
    folder = cli.run_folder(outputs / "comparisons", name, default)
    plan = {"splits": splits, "streams": {stream.name: plain(_scientific(stream)) for stream in streams}}
    with held(folder, arguments.fresh), store.tidied():
        ledger = Ledger.open(folder, plan)
        tracker.belongs_to("comparison", folder.name)
        todo = [stream for stream in streams if stream.name not in ledger.done]
        # Streams stand for a search's trials here: one task each, of the mean stream's work.
        shown = (renderer(sys.stdout, folder.name, arguments.plain), StatusFile(folder, "comparison"))
        progress = Progress(sys.stdout, (0.0, mean_work(todo)), (0,), len(todo), renderers=shown, unit="streams")
        progress.where = (f"results: {folder}", f"MLflow: {tracker.open_hint}")
        progress.line(f"{folder.name}: {len(streams)} streams, {len(streams) - len(todo)} done before; results: {folder}")
        progress.line(f"MLflow: {tracker.open_hint}")
        job = _Job(tracker, ledger, progress, splits, store, Patience(arguments.wait_out))
        progress.shared = job.shared
        with progress:
            asked = _Asked(list(entries), seeds, reference, [space.doc for space in spaces])
            failed = _run(arguments, streams, todo, job, outputs, asked)
    print(f"results: {folder}\nMLflow:  {tracker.open_hint}", flush=True)
    return 1 if failed else 0


def _run(
    arguments: argparse.Namespace,
    streams: Sequence[Stream],
    todo: Sequence[Stream],
    job: _Job,
    outputs: Path,
    asked: _Asked,
) -> dict[str, str]:
    """Runs what is left and concludes; the streams that failed, with their errors."""
    tracker, ledger, progress, splits = job.tracker, job.ledger, job.progress, job.splits

    def idle_with(probe: Probe) -> Callable[[], None]:
        nodes = Watch(probe, lambda values, taken: tracker.system(ledger.parent, values, taken), progress.line)

        def idle() -> None:
            progress.heartbeat()
            nodes()

        return idle

    try:
        _begin(asked, streams, job)
        if arguments.local:
            with watched(list, progress, idle_with(this_machine())):
                failed = job.run(todo, lambda each: LocalBackend(outputs / "data", each.experiment.resources, progress), 1)
        elif todo:
            with connected(arguments.verbose) as cluster:
                ready(todo[0].experiment, outputs, cluster, job.store)
                fits = min(cluster.concurrent_jobs(stream.experiment.resources) for stream in todo)
                progress.line(f"{cluster.describe()}; {fits} streams at a time")
                progress.where += cluster.where
                mailbox = new_mailbox()

                def on_ray(stream: Stream) -> Backend:
                    return RayBackend(outputs / "data", outputs / "scratch", stream.experiment.resources, mailbox)

                with watched(lambda: drain(mailbox), progress, idle_with(NodeProbe())):
                    failed = job.run(todo, on_ray, fits)
        else:
            failed = {}
        progress.rest()
        text = conclude(streams, ledger, failed, asked.seeds, asked.reference, splits, tracker)
        beside = {"the table as numbers": "table.csv", "the data": DATA_PICTURE}
        beside |= {} if arguments.no_report else {"the report": "report.html"}
        _note(asked, streams, job, text, beside)
    except BaseException as error:
        killed = isinstance(error, KeyboardInterrupt)
        job.stop("KILLED" if killed else "FAILED")
        if ledger.parent:
            tracker.end(ledger.parent, "KILLED" if killed else "FAILED")
        raise
    tracker.end(ledger.parent, "FAILED" if failed else "FINISHED")
    if not arguments.no_report:
        cli.write_report(f"comparisons/{ledger.folder.name}", outputs)
    return failed


def _begin(asked: _Asked, streams: Sequence[Stream], job: _Job) -> None:
    """Opens the comparison's run in MLflow: the one it has, or a new one, with what is known of it before it is done."""
    tracker, ledger, experiment = job.tracker, job.ledger, streams[0].experiment
    if ledger.parent:
        tracker.resume(ledger.parent)
    else:
        shared = {name: value for name, value in tags_of(experiment).items() if name.startswith("benchmark")}
        params = {"entries": list(asked.entries), "seeds": asked.seeds, "splits": job.splits}
        ledger.parent = tracker.start(ledger.folder.name, "comparison", params, tags=shared)
        ledger.save()
    if not tracker.noted(ledger.parent):
        tracker.describe(ledger.parent, ledger.plan, experiment.benchmark)
        _note(asked, streams, job, "It has not ended yet.", {"the data": DATA_PICTURE})


def _note(asked: _Asked, streams: Sequence[Stream], job: _Job, result: str, artifacts: Mapping[str, str]) -> None:
    """Sets the run's note; `artifacts` by what they are."""
    parent, seeds = job.ledger.parent, ", ".join(map(str, asked.seeds))
    facts = {"benchmark": streams[0].experiment.benchmark.name, "seeds": seeds, "reference": asked.reference}
    links = {what: job.tracker.address(parent, f"artifacts/{file}").removeprefix("/") for what, file in artifacts.items()}
    question = "\n\n".join(each.strip() for each in asked.questions)
    job.tracker.note(parent, note(question, facts, result, command(), links))


@dataclass
class _Job:
    """Runs streams side by side in threads: they wait for the backend, which does the work. One writes at a time."""

    tracker: Tracker
    ledger: Ledger
    progress: Progress
    splits: Sequence[str]
    store: Entries
    patience: Patience
    _open: set[str] = field(default_factory=set)  # names of the streams that run
    _stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _reuses: list[Reuse] = field(default_factory=list)  # of the streams begun

    def shared(self) -> str:
        """What all streams computed and what the store had."""
        return sum(list(self._reuses), Reuse()).describe()

    def run(self, todo: Sequence[Stream], backend: Callable[[Stream], Backend], at_once: int) -> dict[str, str]:
        """Runs the streams; the name of every one that failed, with its error. The others go on.

        InputError ends all of them: what the user has to mend is told at once.
        """
        failed: dict[str, str] = {}
        waiting = list(todo)
        running: dict[Future[None], Stream] = {}
        pool = ThreadPoolExecutor(at_once, thread_name_prefix="stream")
        try:
            while waiting or running:
                if at_once == 1:  # in this thread, which is the one that an interrupt reaches
                    stream = waiting.pop(0)
                    ended = {_called(self._stream, stream, backend): stream}
                else:
                    while waiting and len(running) < at_once:
                        stream = waiting.pop(0)
                        running[pool.submit(self._stream, stream, backend)] = stream
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    ended = {future: running.pop(future) for future in done}
                for future, stream in ended.items():
                    error = future.exception()
                    if isinstance(error, InputError):
                        raise error
                    if error is not None:
                        failed[stream.name] = redacted(f"{type(error).__name__}: {error}")
        except BaseException as error:
            # Before the cluster ends, which streams that are cut off would take for a failure of their own.
            self.stop("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        finally:
            # A stream that is cut off waits inside the backend; it ends when the cluster does.
            pool.shutdown(wait=False, cancel_futures=True)
        return failed

    def stop(self, status: str) -> None:
        """Ends the MLflow runs of streams that were cut off; nothing more is written. A second call does nothing."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                for name in self._open:
                    self.tracker.end(self.ledger.runs[name], status)

    def _stream(self, stream: Stream, backend: Callable[[Stream], Backend]) -> None:
        label = {"label": stream.name, "trial": stream.name}
        try:
            with self._writing():
                self._begin(stream)
            reuse = Reuse()
            self._reuses.append(reuse)

            def learn() -> list[TaskOutcome]:
                return self._outcomes(stream, backend(stream), reuse)

            outcomes = self.patience.through(learn, self.progress.line, lambda: self.ledger.logged.get(stream.name))
            values = values_of(outcomes)
            with self._writing():
                self.ledger.done[stream.name] = {"values": values, "background": background_alone(outcomes[-1])}
                self.ledger.save()
                self._end(stream, "FINISHED")
            text = f"done; {reuse.describe()}"
            self.progress({"kind": "trial", "text": text, **label})
        except Exception as error:
            with self._writing():
                failure = redacted(f"{type(error).__name__}: {error}")[:4000]
                self.tracker.tag(self.ledger.runs[stream.name], {"failure": failure})
                self._end(stream, "FAILED")
            text = f"failed: {type(error).__name__}: {error}"
            self.progress({"kind": "trial", "status": "FAILED", "text": text, **label})
            raise

    def _outcomes(self, stream: Stream, backend: Backend, reuse: Reuse) -> list[TaskOutcome]:
        """The stream's outcomes; MLflow gets those that it does not have."""
        user = f"comparison/{self.ledger.folder.name}"
        stored = StoredBackend(backend, self.store, reuse=reuse, user=user, on_damage=self.progress.line)
        outcomes, label = [], f"{stream.entry} {stream.setting} "
        for outcome in run_stream(stream.experiment, stream.seed, stored, self.splits, label=label):
            outcomes.append(outcome)
            with self._writing():
                if outcome.task.index > self.ledger.logged.get(stream.name, -1):
                    self.tracker.record(self.ledger.runs[stream.name], record_of(outcome))
                    self.ledger.logged[stream.name] = outcome.task.index
                    self.ledger.save()
            self.progress({"kind": "note", "text": f"{label.strip()}: {outcome.headline()}"})
        return outcomes

    def _begin(self, stream: Stream) -> None:
        """Starts the stream's run, or goes on with the one it has."""
        run = self.ledger.runs.get(stream.name)
        if run is None:
            run = self.tracker.stream(stream.experiment, stream.seed, stream.name, self.ledger.parent)
            self.ledger.runs[stream.name] = run
            self.ledger.save()
        else:
            self.tracker.resume(run)
        self.tracker.tag(run, {"entry": stream.entry})
        self._open.add(stream.name)

    def _end(self, stream: Stream, status: str) -> None:
        self.tracker.end(self.ledger.runs[stream.name], status)
        self._open.discard(stream.name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time, and none after `stop`."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("the comparison was stopped")
            yield


def tell_plan(streams: Sequence[Stream], splits: Sequence[str], store: Entries) -> None:
    """Prints what would be run: every stream with its work and the tasks that the store has."""
    work = mean_work(streams) * len(streams)
    print(f"dry run, nothing is computed: {len(streams)} streams, {work:.0f} clip passes; tested on {', '.join(splits)}")
    for stream in streams:
        count, absent = tasks_done(stream.experiment, stream.seed, splits, Lookup(store))
        first = f"; the first that is missing: {absent}" if absent else ""
        total = len(planned_work(stream.experiment))
        print(f"  {stream.name}: the store has {count} of {total} tasks{first}")


def mean_work(streams: Sequence[Stream]) -> float:
    """What a stream takes on average, in clip passes; the base task, which all streams of a setting and seed share, once."""
    bases: dict[tuple[str, int], float] = {}
    later = 0.0
    for stream in streams:
        base, *others = planned_work(stream.experiment)
        key = (stream.setting, stream.seed)
        bases[key] = max(base, bases.get(key, 0.0))
        later += sum(others)
    return (later + sum(bases.values())) / max(1, len(streams))


def _called(function: Callable[..., None], *arguments: Any) -> Future[None]:
    """The future of a call made here and now. What is no Exception, such as an interrupt, is raised."""
    future: Future[None] = Future()
    try:
        function(*arguments)
        future.set_result(None)
    except Exception as error:
        future.set_exception(error)
    return future


def conclude(
    streams: Sequence[Stream],
    ledger: Ledger,
    failed: Mapping[str, str],
    seeds: Sequence[int],
    reference: str,
    splits: Sequence[str],
    tracker: Tracker,
) -> str:
    """Writes and prints the tables: table.md, table.csv, streams.csv, beside the ledger and in MLflow; table.md's text."""
    results = []
    for stream in streams:
        done = ledger.done.get(stream.name)
        error = "" if done else failed.get(stream.name, "not run")
        results.append(StreamResult(stream.entry, stream.setting, stream.seed, done["values"] if done else {}, error))
    for setting, seed in dict.fromkeys((stream.setting, stream.seed) for stream in streams):
        # The labels of a setting are the same whoever answers: any stream that ended knows them.
        names = [stream.name for stream in streams if (stream.setting, stream.seed) == (setting, seed)]
        known = next((ledger.done[name]["background"] for name in names if name in ledger.done), None)
        if known is not None:
            results.append(StreamResult(BACKGROUND_ALONE, setting, seed, known))
    rows = table(results, seeds, reference)
    text = "\n".join(markdown(rows, split, reference) for split in splits)
    for file, content in (("table.md", text), (TABLE_FILE, table_csv(rows)), (STREAMS_FILE, raw_csv(results))):
        write_atomically(ledger.folder / file, content.encode())
        tracker.artifact(ledger.parent, file, content)
    for row in rows:
        if row.mean:
            name = f"{row.entry} {row.setting}"
            shown = {f"{split}/miou/all": row.mean[f"{split}/miou/all"] for split in splits}
            tracker.metrics(ledger.parent, {f"{_metric_name(name)}/{metric}": value for metric, value in shown.items()}, 0)
    print(text, flush=True)
    return text


def _metric_name(text: str) -> str:
    """The text with what MLflow's names do not take replaced."""
    return "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in text)


def _scientific(stream: Stream) -> dict[str, Any]:
    """What determines the stream's result: resources do not."""
    return {path: value for path, value in flatten(stream.experiment).items() if not path.startswith("resources.")}


def _numbers(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"--seeds {text!r}: write whole numbers, such as 0,1,2") from None
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise InputError(f"--seeds {text!r}: distinct numbers that are not negative, at least one")
    return seeds


if __name__ == "__main__":
    sys.exit(cli.main(compare))
