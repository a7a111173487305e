"""Processes to be killed at a chosen event, and what must hold after every fault."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from fault_stream import EPOCHS, go

ROOT = Path(__file__).parents[2]
STREAM = Path(__file__).parent / "fault_stream.py"
EVENT_SECONDS = 500.0  # on a machine that others use too


class Process:
    """A command under way, its output read line by line by a thread, so that it never waits for a reader."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None, **options: Any) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.lines: list[str] = []
        self.popen = subprocess.Popen(
            command, cwd=ROOT, env={**kept, **paths, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, **options,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._children: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def until(self, what: str | Callable[[], bool], seconds: float = EVENT_SECONDS) -> None:
        """Waits for a line that holds a text, or for a condition. AssertionError where the process ends before."""
        deadline = time.monotonic() + seconds
        while not (what() if callable(what) else any(what in line for line in self.lines)):
            assert self.popen.poll() is None, f"ended with {self.popen.returncode} before {what!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {what!r} in {seconds} s:\n{self.output}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Sends a signal, and remembers which processes there were below."""
        for child in psutil.Process(self.popen.pid).children(recursive=True):
            self._children[child.pid] = child
        self.popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, to it and to all below it."""
        self.signal(signal.SIGKILL)
        for child in self._children.values():
            with suppress(psutil.NoSuchProcess):
                child.kill()

    def end(self, seconds: float = EVENT_SECONDS) -> int:
        """Waits for the process to end; its status."""
        try:
            self.popen.wait(seconds)
        finally:
            self.close()
        return int(self.popen.returncode)

    def close(self) -> None:
        """Kills it where it still runs, and reads what it said last."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()
        self._reader.join(10)  # a child of it that lives on may hold the pipe
        if not self._reader.is_alive() and self.popen.stdout is not None:
            self.popen.stdout.close()
        if self.popen.stdin is not None:
            with suppress(BrokenPipeError):
                self.popen.stdin.close()

    def outlived_by(self, seconds: float = 15.0) -> list[str]:
        """The processes below it that still run after this time."""
        _, alive = psutil.wait_procs(list(self._children.values()), timeout=seconds)
        return [" ".join(each.cmdline()) for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind that a fault_stream.py told."""
        found = [json.loads(line) for line in self.lines if line.startswith("{")]
        return [event for event in found if event["kind"] == kind]

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.lines.append(line)


@contextmanager
def running(command: list[str], environment: Mapping[str, str] | None = None, **options: Any) -> Iterator[Process]:
    """A command that does not outlive the block."""
    process = Process(command, environment, **options)
    try:
        yield process
    finally:
        process.close()


def stream(root: Path, *arguments: str) -> list[str]:
    """The command of a fault_stream.py."""
    return [sys.executable, str(STREAM), str(root), *arguments]


def verb(name: str, *arguments: str) -> list[str]:
    """The command of a verb."""
    return [sys.executable, "-m", f"orchestrator.{name}", *arguments]


def finished(command: list[str], environment: Mapping[str, str] | None = None) -> Process:
    """Runs a command to its end."""
    with running(command, environment) as process:
        process.end()
        return process


class Here:
    """A stream run in this process, with the events it told. InputError where the store has no room."""

    def __init__(self, root: Path, plain: bool = False, epochs: int = EPOCHS, cached: bool = False) -> None:
        self._events: list[dict[str, Any]] = []
        go(root, lambda **fields: self._events.append(fields), plain=plain, epochs=epochs, cached=cached)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self._events if event["kind"] == kind]


def result_of(stream: Process | Here) -> dict[str, Any]:
    """What a stream that ended well told last."""
    (event,) = stream.events("result")
    return dict(event["result"])


def epochs_of(*streams: Process | Here) -> dict[str, list[int]]:
    """Per network and task the epochs that were trained, in order, over several streams."""
    found: dict[str, list[int]] = {}
    for each in streams:
        for event in each.events("epoch"):
            found.setdefault(event["label"], []).append(event["epoch"])
    return found


def make_room(disk: Path) -> None:
    """Makes the file system of the fixture `small_disk` large enough for everything."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def left_behind(outputs: Path) -> list[str]:
    """Unfinished files, things to resume, locks that are held and scratch under a folder of results."""
    store = outputs / "store"
    found = [str(path) for path in outputs.rglob(".*") if path.name != ".mlflow.db.lock" and "tune" not in path.parts]
    found += [str(path) for folder in (store / "partial", outputs / "scratch") if folder.exists() for path in folder.iterdir()]
    for path in (store / "locks").glob("*.lock"):
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"{path} is held")
    return found
