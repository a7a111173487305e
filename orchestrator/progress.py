"""Progress with an estimate of what is left. Watches events; never part of a result.

`Progress` knows how far everything is and hands it to its renderers: `Lines` prints plain lines, terminal.py draws a panel,
status.py keeps a file that `python -m orchestrator.status` reads.

Events are mappings with a "kind": "steps" and "epoch" (from training), "note" (anything worth a line), "task" (a trial's stream
finished a task) and "trial" (a trial ended).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Protocol, TextIO

from cavs_model.train import TEACHER_COST, planned_samples
from orchestrator.experiment import Experiment
from orchestrator.redaction import redacted

Event = Mapping[str, Any]
Observer = Callable[[Event], None]

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0  # at most one line on an epoch in this time
STEPS_LINE_SECONDS = 15.0  # and on steps within an epoch
HEARTBEAT_SECONDS = 20.0  # at least one line of any kind in this time


def silent(event: Event) -> None:
    """The observer that tells nobody."""


def planned_work(experiment: Experiment) -> tuple[float, ...]:
    """What training each task of one stream takes, in clip passes of the base task, with the rehearsed rows expected.

    The plan that estimates of the time left rest on.
    """
    tasks, method = experiment.scenario.tasks(experiment.benchmark), experiment.method
    trained = [method.training_task(tasks[: index + 1]) for index in range(len(tasks))]
    return tuple(
        experiment.schedule.epochs_of(task)
        * planned_samples(method, task)
        * (1 if task is trained[-1] else len(method.networks))
        * (1.0 if task.is_base or not method.needs_teacher else TEACHER_COST)
        for task in trained
    )


def clock(seconds: float) -> str:
    """hh:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class BlockNotes:
    """Tells an observer every few seconds how many blocks of a benchmark's clips are there, and once all are."""

    def __init__(self, name: str, observer: Observer, now: Callable[[], float] = time.monotonic) -> None:
        self._name, self._observer, self._now = name, observer, now
        self._started = self._told = now()

    def __call__(self, done: int, missing: int) -> None:
        """`done` of the `missing` blocks were rendered or decoded."""
        now = self._now()
        if done == missing or now - self._told >= LINE_SECONDS:
            self._told = now
            left = clock((now - self._started) / done * (missing - done))
            self._observer(
                {"kind": "note", "text": f"{self._name}: {done} of {missing} missing blocks done, about {left} left"}
            )


@dataclass(frozen=True)
class Fit:
    """A network that is being trained: what its last event said."""

    label: str
    epoch: int
    epochs: int
    loss: float | None
    clips_per_second: float


@dataclass(frozen=True)
class View:
    """How far everything is, in plain values."""

    seconds: float  # since the start
    seconds_left: float | None  # None before anything is known
    unit: str  # what the trials are called: a comparison has streams
    trials: int  # 1 for a run
    finished: int
    failed: int
    tasks: int  # of all trials and seeds, base tasks of a seed once
    tasks_done: int
    seeds: int
    best: float | None
    fits: tuple[Fit, ...] = ()
    shared: str = ""  # what did not have to be computed
    where: tuple[str, ...] = ()  # where to look

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


class Renderer(Protocol):
    """Who shows progress. Called by one thread at a time."""

    def line(self, text: str) -> None:
        """Something happened."""

    def beat(self, text: str) -> None:
        """A sign of life, at most every few seconds, for who has nothing but lines."""

    def show(self, view: View) -> None:
        """How far everything is now; twice a second and more."""

    def rest(self) -> None:
        """Nothing happens for a while, and others print."""

    def close(self, view: View, error: BaseException | None) -> None:
        """The end, and by what error if by one. Nothing is called afterwards."""


@dataclass
class Lines:
    """The renderer for logs and jobs."""

    out: TextIO

    def line(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    beat = line

    def show(self, view: View) -> None:
        """Lines say it."""

    def rest(self) -> None:
        """Lines are in nobody's way."""

    def close(self, view: View, error: BaseException | None) -> None:
        """Lines need no end."""


@dataclass
class Progress:
    """Hands events to its renderers as lines and estimates the time left from the work done and still to be done.

    `plan` is planned_work of one stream; the base task is counted once per seed, later tasks once per trial and seed. A
    context manager: at its end the renderers are closed. Threads may share it.
    """

    out: TextIO
    plan: tuple[float, ...]
    seeds: tuple[int, ...]
    trials: int
    mode: str = "max"  # which of two values of trials is the better
    now: Callable[[], float] = time.monotonic
    finished: int = 0
    best: float | None = None
    started: float = 0.0
    renderers: Sequence[Renderer] = ()  # Lines on `out` by default
    where: tuple[str, ...] = ()
    shared: Callable[[], str] = str  # what did not have to be computed, in words
    failed: int = 0
    unit: str = "trials"
    _last_line: float = 0.0
    _working_since: float = 0.0
    _done: float = 0.0
    _running: dict[str, float] = field(default_factory=dict)  # label of a fit -> work done, until its task is finished
    _tasks: set[tuple[int, int, int]] = field(default_factory=set)
    _fits: dict[str, Fit] = field(default_factory=dict)  # by label, as _running
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self.started = self._last_line = self.now()
        self.renderers = self.renderers or (Lines(self.out),)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            for renderer in self.renderers:
                renderer.close(self.view(), error)

    def __call__(self, event: Event) -> None:
        """Takes an event and prints a line where one is due."""
        with self._lock:
            self._take(event)
            self._show()

    def _take(self, event: Event) -> None:
        kind = event["kind"]
        if kind in ("steps", "epoch"):
            if not self._done:
                self._working_since = self.now() - event["seconds"]
            self._done += event["work"]
            self._running[event["label"]] = self._running.get(event["label"], 0.0) + event["work"]
            before = self._fits.get(event["label"])
            loss = event.get("loss", before.loss if before else None)
            self._fits[event["label"]] = Fit(event["label"], event["epoch"], event["epochs"], loss, event["clips_per_second"])
            pause = LINE_SECONDS if kind == "epoch" else STEPS_LINE_SECONDS
            if self.now() - self._last_line >= pause:
                loss = f" loss {event['loss']:.4f}" if "loss" in event else ""
                place = f"{event['label']} epoch {event['epoch']}/{event['epochs']}{loss}"
                self._tell(f"{place} {event['clips_per_second']:.0f} clips/s | {self.state()}", beat=True)
        elif kind == "task":
            self._tasks.add((0 if event["task"] == 0 else event["trial"], event["seed"], event["task"]))
            place = f"seed {event['seed']} task {event['task'] + 1}/"
            self._forget(lambda label: place in label and (event["task"] == 0 or self._of_trial(label, event)))
            self.line(f"{event['label']}: {event['text']} | {self.state()}")
        elif kind == "trial":
            self.finished += 1
            self.failed += event.get("status") == "FAILED"
            # What a trial that failed or was stopped leaves undone is no longer to be done.
            for seed in self.seeds:
                self._tasks.update((event["trial"], seed, task) for task in range(1, len(self.plan)))
            self._forget(lambda label: self._of_trial(label, event))
            value = event.get("value")
            if value is not None:
                better = max if self.mode == "max" else min
                self.best = value if self.best is None else better(self.best, value)
            self.line(f"{event['label']}: {event['text']} | {self.state()}")
        else:
            self.line(str(event["text"]))

    def heartbeat(self) -> None:
        """Shows the state, in a line where there was none for a while."""
        with self._lock:
            if self.now() - self._last_line >= HEARTBEAT_SECONDS:
                self._tell(self.state(), beat=True)
            self._show()

    def state(self) -> str:
        """How many trials are done, the best value, and the time left."""
        best = "" if self.best is None else f", best {self.best:.4f}"
        left = self.seconds_left()
        return f"{self.finished}/{self.trials} trials done{best}, " + (
            "estimating" if left is None else f"about {clock(left)} left"
        )

    def seconds_left(self) -> float | None:
        """Work still to be done at the speed so far; None before anything is known."""
        if self.finished >= self.trials:
            return 0.0
        if not self._done:
            return None
        planned = 0.0
        for seed in self.seeds:
            planned += self.plan[0] if (0, seed, 0) not in self._tasks else 0
            for trial in range(1, self.trials + 1):
                later = range(1, len(self.plan))
                planned += sum(self.plan[task] for task in later if (trial, seed, task) not in self._tasks)
        left = max(0.0, planned - sum(self._running.values()))
        # Since the first step: what came before it, data and processes, comes only once.
        return left * (self.now() - self._working_since) / self._done

    def _of_trial(self, label: str, event: Event) -> bool:
        """Whether a fit is the event's trial's: its label starts with the trial's, or it is the only one (no search)."""
        return label.startswith(f"{event['label']} ") or self.trials == 1

    def _forget(self, ended: Callable[[str], bool]) -> None:
        """Drops fits from those that run: their work is no longer part of the plan."""
        self._running = {label: work for label, work in self._running.items() if not ended(label)}
        self._fits = {label: fit for label, fit in self._fits.items() if label in self._running}

    def rest(self) -> None:
        """Clears the way for what others print."""
        with self._lock:
            for renderer in self.renderers:
                renderer.rest()

    def view(self) -> View:
        """How far everything is."""
        seeds, later = len(self.seeds), max(0, len(self.plan) - 1)
        return View(
            seconds=self.now() - self.started,
            seconds_left=self.seconds_left(),
            unit=self.unit,
            trials=self.trials,
            finished=self.finished,
            failed=self.failed,
            tasks=seeds * (bool(self.plan[0]) + later * self.trials),
            tasks_done=len(self._tasks),
            seeds=seeds,
            best=self.best,
            fits=tuple(self._fits.values()),
            shared=self.shared(),
            where=self.where,
        )

    def line(self, text: str) -> None:
        """Prints a line with the time since the start."""
        with self._lock:
            self._tell(text)

    def _tell(self, text: str, beat: bool = False) -> None:
        self._last_line = self.now()
        for renderer in self.renderers:
            (renderer.beat if beat else renderer.line)(f"[{clock(self._last_line - self.started)}] {redacted(text)}")

    def _show(self) -> None:
        view = self.view()
        for renderer in self.renderers:
            renderer.show(view)


@contextmanager
def watched(source: Callable[[], list[Event]], handle: Observer, idle: Callable[[], None]) -> Iterator[None]:
    """A thread that hands events from a source to a handler, and calls `idle` in between, while the block runs.

    What has arrived when the block ends is still handled. An error of source or handler is raised then.
    """
    stop = threading.Event()
    errors: list[BaseException] = []

    def step() -> None:
        for event in source():
            handle(event)
        idle()

    def run() -> None:
        try:
            while not stop.wait(POLL_SECONDS):
                step()
        except BaseException as error:  # raised again when the block ends
            errors.append(error)

    thread = threading.Thread(target=run, name="watcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if not errors:
            step()
    if errors:
        raise errors[0]
