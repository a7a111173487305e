"""`python -m orchestrator.status NAME`: how far a sweep, comparison or run is, or how it ended, from any shell.

Whoever drives one keeps `status.json` in its folder, written anew every few seconds. Reading it needs neither Ray nor MLflow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError
from cavs_model.untrusted import FaultError, read_json
from orchestrator import cli
from orchestrator.dry_run import debug_name
from orchestrator.entries import clear_unfinished, write_atomically
from orchestrator.progress import View, clock
from orchestrator.redaction import redacted

STATUS_FILE = "status.json"
KINDS = {"sweep": "sweeps", "comparison": "comparisons", "run": "runs"}  # kind -> folder of outputs
WRITE_SECONDS = 3.0
SILENT_SECONDS = 60.0  # after which a process on another machine is given up
FOLLOW_SECONDS = 2.0
KEPT_LINES = 10


@dataclass
class StatusFile:
    """The renderer that keeps the file. A file that cannot be written is told once on stderr and stops nothing."""

    folder: Path
    kind: str
    now: Callable[[], float] = time.monotonic
    _lines: list[str] = field(default_factory=list)
    _written: float = -math.inf
    _beats: int = 0
    _begun: float = field(default_factory=time.time)
    _told: bool = False

    def line(self, text: str) -> None:
        self._lines = [*self._lines, text][-KEPT_LINES:]

    def beat(self, text: str) -> None:
        """The numbers say it."""

    def show(self, view: View) -> None:
        if self.now() - self._written >= WRITE_SECONDS:
            self._write(view, "running", "")

    def rest(self) -> None:
        """The file is in nobody's way."""

    def close(self, view: View, error: BaseException | None) -> None:
        if error is None:
            self._write(view, "ended", "")
        elif isinstance(error, KeyboardInterrupt):
            self._write(view, "interrupted", "")
        else:
            self._write(view, "failed", redacted(f"{type(error).__name__}: {error}")[:2000])

    def _write(self, view: View, state: str, error: str) -> None:
        self._beats += 1
        self._written = self.now()
        content = {
            "kind": self.kind, "name": self.folder.name, "state": state, "error": error,
            "command": [redacted(part) for part in sys.argv],
            "host": socket.gethostname(), "pid": os.getpid(), "process_began": _began(os.getpid()),
            "begun": self._begun, "beat": time.time(), "beats": self._beats,
            "view": view.plain(), "lines": self._lines,
        }  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / STATUS_FILE, json.dumps(content, indent=1).encode())
        except (OSError, InputError) as problem:  # progress is no part of a result
            if not self._told:
                print(f"warning: cannot write {self.folder / STATUS_FILE}: {problem}", file=sys.stderr, flush=True)
            self._told = True


@dataclass(frozen=True)
class Status:
    """What a status file says. `text` is the content."""

    path: Path
    text: Mapping[str, Any]

    @property
    def running(self) -> bool:
        """Whether it says that it runs, whether or not its process does."""
        return bool(self.text["state"] == "running")

    def alive(self) -> bool:
        """Whether its process is there: on this machine the process itself is looked for, on others its last sign of life."""
        if not self.running:
            return False
        if self.text["host"] == socket.gethostname() and self.text["process_began"]:
            return bool(_began(self.text["pid"]) == self.text["process_began"])
        return time.time() - float(self.text["beat"]) < SILENT_SECONDS

    def described(self) -> str:
        """All of it for a person."""
        text, view = self.text, self.text["view"]
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(text["beat"]))
        place = f"process {text['pid']} on {text['host']}"
        state = {"ended": f"ended {since}", "failed": f"failed {since}: {text['error']}", "interrupted": f"interrupted {since}"}
        told = state.get(text["state"], f"running, {place}")
        if self.running and not self.alive():
            told = f"no sign of life since {since} ({place}); the same command with the same --name goes on"
        left = "" if not self.alive() else (
            ", estimating" if view["seconds_left"] is None else f", about {clock(view['seconds_left'])} left"
        )  # fmt: skip
        failed = f", {view['failed']} failed" if view["failed"] else ""
        rows = [
            f"{text['kind']} {text['name']}: {told}",
            f"{view['unit']:7} {view['finished']} of {view['trials']}{failed}",
            f"tasks   {view['tasks_done']} of {view['tasks']}, {view['seeds']} seed{'s' * (view['seeds'] > 1)}",
            f"time    {clock(view['seconds'])}{left}",
        ]
        if view["best"] is not None:
            rows.append(f"best    {view['best']:.4f}")
        if view["shared"]:
            rows.append(f"shared  {view['shared']}")
        for fit in view["fits"] if self.alive() else ():
            loss = "" if fit["loss"] is None else f" loss {fit['loss']:.4f}"
            rows.append(f"  {fit['label']} epoch {fit['epoch']}/{fit['epochs']}{loss} {fit['clips_per_second']:.0f} clips/s")
        return "\n".join([*rows, *(f"  {line}" for line in text["lines"][-3:]), *view["where"]])


def status() -> int:
    """The verb; 0, or 1 where what was asked for failed or shows no sign of life."""
    made = argparse.ArgumentParser(prog="python -m orchestrator.status", description="How far a sweep, comparison or run is.")
    made.add_argument("name", nargs="?", help="its name, or the path of its folder; without it all are listed")
    made.add_argument("--outputs", type=Path, default=None, help="folder of all results (CAVS_OUTPUTS, else ./outputs)")
    made.add_argument("--follow", action="store_true", help="show it again whenever it changes, until it ends")
    made.add_argument("--dry-run", action="store_true", help="say of which files; show none")
    made.add_argument("--debug", action="store_true", help="of what ran with --debug, whose name begins with debug")
    arguments = made.parse_args()
    outputs = cli.outputs_folder(arguments.outputs)
    if arguments.name is not None and arguments.debug:
        path = Path(arguments.name)
        arguments.name = str(path.parent / debug_name(path.name))
    listed = arguments.name is None
    asked = everything(outputs) if listed else [find(arguments.name, outputs)]
    if arguments.debug:
        asked = [each for each in asked if each.path.parent.name.startswith("debug")]
    if arguments.dry_run or listed:
        for each in asked:
            print(f"would show {each.path}" if arguments.dry_run else each.described().splitlines()[0])
        return 0
    [found] = asked
    print(found.described(), flush=True)
    while arguments.follow and found.alive():
        time.sleep(FOLLOW_SECONDS)
        before, found = found, read(found.path)
        if found.text["beats"] != before.text["beats"] or not found.alive():
            print(f"\n{found.described()}", flush=True)
    return 1 if found.text["state"] == "failed" or (found.running and not found.alive()) else 0


def everything(outputs: Path) -> list[Status]:
    """All that have a status file, the one that spoke last at the end."""
    paths = [path for folder in KINDS.values() for path in (outputs / folder).glob(f"*/{STATUS_FILE}")]
    return sorted((read(path) for path in paths), key=lambda each: float(each.text["beat"]))


def find(name: str, outputs: Path) -> Status:
    """The status of a name or folder; of several of this name the one that spoke last. InputError with what there is.

    A run's name is found as it was given to it, too.
    """
    direct = Path(name) / STATUS_FILE
    if direct.is_file():
        return read(direct)
    listed = everything(outputs)
    found = [each for each in listed if name in (each.text["name"], each.path.parent.name)]
    if not found:
        found = [each for each in listed if each.text["kind"] == "run" and each.path.parent.name == folder_name(name)]
    if not found:
        known = ", ".join(sorted({str(each.text["name"]) for each in listed})) or "none"
        raise InputError(f"nothing called {name!r} tells its status under {outputs}; there is: {known}")
    return found[-1]


def read(path: Path) -> Status:
    """InputError for a file that is none."""
    try:
        text = read_json(path)
        found = Status(path, text)
        found.described()
    except (FaultError, OverflowError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    return found


def folder_name(name: str) -> str:
    """A run's name, which may be any text, as its folders have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def run_status(outputs: Path, name: str) -> StatusFile:
    """The file of a run: under the first name like its own that no living run has."""
    plain = folder_name(name)
    folder, number = outputs / KINDS["run"] / plain, 1
    with suppress(InputError):
        while (folder / STATUS_FILE).is_file() and read(folder / STATUS_FILE).alive():
            number += 1
            folder = folder.with_name(f"{plain}-{number}")
    clear_unfinished(folder)
    return StatusFile(folder, "run")


def _began(pid: int) -> str:
    """When a process of this machine began, in the kernel's own count since boot; "" where there is none.

    A number is given to other processes later; the two together are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot} {fields[19]}"


if __name__ == "__main__":
    sys.exit(cli.main(status))
