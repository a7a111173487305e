"""Progress in plain lines with an estimate of what is left. Watches events; never part of a result.

Events are mappings with a "kind": "epoch" (from training), "note" (anything worth a line), "task" (a trial's stream finished
a task) and "trial" (a trial ended).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from orchestrator.experiment import Experiment

Event = Mapping[str, Any]
Observer = Callable[[Event], None]

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0  # at most one line of routine progress in this time
HEARTBEAT_SECONDS = 20.0  # at least one line of any kind in this time


def silent(event: Event) -> None:
    """The observer that tells nobody."""


def clip_passes(experiment: Experiment) -> tuple[int, ...]:
    """Clip passes that training each task of one stream takes, rehearsed rows left out: the plan that estimates rest on."""
    tasks, schedule = experiment.scenario.tasks(experiment.benchmark), experiment.schedule
    networks = [1 if task is tasks[-1] else len(experiment.method.networks) for task in tasks]
    return tuple(schedule.epochs_of(task) * len(task.train) * number for task, number in zip(tasks, networks, strict=True))


def clock(seconds: float) -> str:
    """hh:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


@dataclass
class Progress:
    """Prints events as lines and estimates the time left from clip passes done and still to be done.

    `plan` is clip_passes of one stream; the base task is counted once per seed, later tasks once per trial and seed.
    """

    out: TextIO
    plan: tuple[int, ...]
    seeds: tuple[int, ...]
    trials: int
    now: Callable[[], float] = time.monotonic
    finished: int = 0
    best: float | None = None
    started: float = 0.0
    _last_line: float = 0.0
    _done: float = 0.0
    _running: dict[str, float] = field(default_factory=dict)
    _tasks: set[tuple[int, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.started = self._last_line = self.now()

    def __call__(self, event: Event) -> None:
        """Takes an event and prints a line where one is due."""
        kind = event["kind"]
        if kind == "epoch":
            self._done += event["clips"]
            self._running[event["label"]] = self._running.get(event["label"], 0.0) + event["clips"]
            if self.now() - self._last_line >= LINE_SECONDS:
                place = f"{event['label']} epoch {event['epoch']}/{event['epochs']}"
                self.line(f"{place} loss {event['loss']:.4f} {event['clips_per_second']:.0f} clips/s | {self.state()}")
            if event["epoch"] == event["epochs"]:
                self._running.pop(event["label"])
        elif kind == "task":
            self._tasks.add((0 if event["task"] == 0 else event["trial"], event["seed"], event["task"]))
            self.line(f"{event['label']}: {event['text']} | {self.state()}")
        elif kind == "trial":
            self.finished += 1
            # What a trial that failed or was stopped leaves undone is no longer to be done.
            for seed in self.seeds:
                self._tasks.update((event["trial"], seed, task) for task in range(1, len(self.plan)))
            value = event.get("value")
            if value is not None and (self.best is None or value > self.best):
                self.best = value
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
        """Clip passes still to be done at the speed so far; None before anything is known."""
        if not self._done:
            return None
        planned = 0.0
        for seed in self.seeds:
            planned += self.plan[0] if (0, seed, 0) not in self._tasks else 0
            for trial in range(1, self.trials + 1):
                later = range(1, len(self.plan))
                planned += sum(self.plan[task] for task in later if (trial, seed, task) not in self._tasks)
        left = max(0.0, planned - sum(self._running.values()))
        return left * (self.now() - self.started) / self._done

    def line(self, text: str) -> None:
        """Prints a line with the time since the start."""
        self._last_line = self.now()
        print(f"[{clock(self._last_line - self.started)}] {text}", file=self.out, flush=True)


class Watcher:
    """A thread that hands events from a source to a handler, and calls `idle` in between."""

    def __init__(self, source: Callable[[], list[Event]], handle: Observer, idle: Callable[[], None]) -> None:
        self._source, self._handle, self._idle = source, handle, idle
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Handles what has arrived and ends the thread. Raises what the handler or the source raised."""
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._step()

    def _step(self) -> None:
        for event in self._source():
            self._handle(event)
        self._idle()

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_SECONDS):
                self._step()
        except BaseException as error:  # raised again by `stop`
            self._error = error
