"""Progress in plain lines with an estimate of what is left. Watches events; never part of a result.

Events are mappings with a "kind": "steps" and "epoch" (from training), "note" (anything worth a line), "task" (a trial's stream
finished a task) and "trial" (a trial ended).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from cavs_model.train import TEACHER_COST
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
    """What training each task of one stream takes, in clip passes of the base task, rehearsed rows left out.

    The plan that estimates of the time left rest on.
    """
    tasks, method = experiment.scenario.tasks(experiment.benchmark), experiment.method
    trained = [method.training_task(tasks[: index + 1]) for index in range(len(tasks))]
    return tuple(
        experiment.schedule.epochs_of(task)
        * len(task.train)
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


@dataclass
class Progress:
    """Prints events as lines and estimates the time left from the work done and still to be done.

    `plan` is planned_work of one stream; the base task is counted once per seed, later tasks once per trial and seed.
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
    _last_line: float = 0.0
    _working_since: float = 0.0
    _done: float = 0.0
    _running: dict[str, float] = field(default_factory=dict)  # label of a fit -> work done, until its task is finished
    _tasks: set[tuple[int, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.started = self._last_line = self.now()

    def __call__(self, event: Event) -> None:
        """Takes an event and prints a line where one is due."""
        kind = event["kind"]
        if kind in ("steps", "epoch"):
            if not self._done:
                self._working_since = self.now() - event["seconds"]
            self._done += event["work"]
            self._running[event["label"]] = self._running.get(event["label"], 0.0) + event["work"]
            pause = LINE_SECONDS if kind == "epoch" else STEPS_LINE_SECONDS
            if self.now() - self._last_line >= pause:
                loss = f" loss {event['loss']:.4f}" if "loss" in event else ""
                place = f"{event['label']} epoch {event['epoch']}/{event['epochs']}{loss}"
                self.line(f"{place} {event['clips_per_second']:.0f} clips/s | {self.state()}")
        elif kind == "task":
            self._tasks.add((0 if event["task"] == 0 else event["trial"], event["seed"], event["task"]))
            place = f"seed {event['seed']} task {event['task'] + 1}/"
            self._forget(lambda label: place in label and (event["task"] == 0 or self._of_trial(label, event)))
            self.line(f"{event['label']}: {event['text']} | {self.state()}")
        elif kind == "trial":
            self.finished += 1
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
        """Prints the state where nothing was printed for a while."""
        if self.now() - self._last_line >= HEARTBEAT_SECONDS:
            self.line(self.state())

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

    def line(self, text: str) -> None:
        """Prints a line with the time since the start."""
        self._last_line = self.now()
        print(f"[{clock(self._last_line - self.started)}] {redacted(text)}", file=self.out, flush=True)


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
