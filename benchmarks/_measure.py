"""What all benchmarks share: programs in alternation, medians and their ratios, peak memory, and a report with raw numbers.

A comparison is two or more programs in one run on the same machine, one after the other in every round, so that what else
runs there meets all of them alike. A ratio is the median of the rounds' own ratios, given with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "ray", "mlflow", "optuna", "numpy")
MIB = 2**20


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options of every script; a script adds its own."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a small form of the question that takes seconds")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<theme>_<hardware>_<date>.md")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"rounds of alternation (default {rounds})")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to leave the machine to others between rounds")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the report")
    return parser


@dataclass(frozen=True)
class Times:
    """Seconds of every program in every round: by the clock, and of all threads of this process on a processor.

    Without other work on the machine a program of one thread has the same number in both. With it the clock says more about
    that work than about the program.
    """

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    def row(self, name: str, first: str) -> list[str]:
        """Both of a program, and how many times as fast as the program `first` it is by both."""
        return [
            seconds_text(self.wall[name]),
            seconds_text(self.cpu[name]),
            str(Ratio.of(self.wall[first], self.wall[name])),
            str(Ratio.of(self.cpu[first], self.cpu[name])),
        ]

    @staticmethod
    def columns(first: str) -> list[str]:
        """What `row` gives."""
        return ["s by the clock", "s of processor", f"times as fast as {first}", "by processor time"]

    def raw(self) -> dict[str, Any]:
        return {"wall_s": self.wall, "cpu_s": self.cpu}


def alternate(programs: Mapping[str, Callable[[], object]], rounds: int, pause: float = 0.0, warm_up: int = 1) -> Times:
    """Times every program in every round; each runs `warm_up` times before the first.

    Every second round runs them in reverse order, so that none always follows the same one.
    """
    for _ in range(warm_up):
        for run in programs.values():
            run()
    times = Times({name: [] for name in programs}, {name: [] for name in programs})
    for turn in range(rounds):
        if turn and pause:
            time.sleep(pause)
        for name in list(programs)[:: -1 if turn % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            programs[name]()
            times.wall[name].append(time.perf_counter() - wall)
            times.cpu[name].append(time.process_time() - cpu)
    return times


@dataclass(frozen=True)
class Ratio:
    """A quotient over rounds: its median, least and greatest value."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(above: Sequence[float], below: Sequence[float]) -> Ratio:
        """Of two programs' numbers, round by round."""
        values = [a / b for a, b in zip(above, below, strict=True)]
        return Ratio(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g} to {self.greatest:.3g})"


def peak_memory(run: Callable[..., Any], *args: Any) -> float:
    """MiB that `run(*args)` needs at most, in a process of its own, beyond what it had when `run` was called.

    `run` is a top-level function that calls what it is given as its last argument, `mark()`, when what it does not want to be
    counted is there.
    """
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(child, run, args))
    process.start()
    child.close()
    try:
        peak: float = parent.recv()
    except EOFError:
        raise RuntimeError(f"the process that should have told its memory ended with {process.exitcode}") from None
    finally:
        process.join()
    return peak


def _peak(pipe: Any, run: Callable[..., Any], args: Sequence[Any]) -> None:
    first = [resident()]

    def mark() -> None:
        first[0] = resident()

    run(*args, mark)
    # Not ru_maxrss, which a process has from its parent.
    pipe.send(resident("VmHWM") - first[0])
    pipe.close()


def resident(field_name: str = "VmRSS") -> float:
    """MiB of this process by a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field_name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}")


def memory_maps(pid: int) -> dict[str, float]:
    """MiB of a process: "Rss", "Pss" (a page that n processes share counts 1 / n) and the shares of both, of all its maps."""
    sums: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        sums[name] = int(rest.split()[0]) / 1024
    return sums


def seconds_text(values: Sequence[float]) -> str:
    """The median of some seconds, with the least and the greatest."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def hardware() -> str:
    """The machine in a few words: processor or GPU, cores."""
    name, cores = gpu_name(), len(os.sched_getaffinity(0))
    return f"{name or processor()}, {cores} of {os.cpu_count()} cores"


def processor() -> str:
    """The processor's name as the system tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpu_name() -> str:
    """The name of the first GPU that torch sees, "" where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""


def commit() -> str:
    """The commit of the working tree, with "+" where tracked files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclass
class Report:
    """Tables and sentences, printed as they come and written to a file with what is needed to judge and repeat them."""

    theme: str
    question: str
    options: argparse.Namespace
    lines: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    load_at_start: float = field(default_factory=lambda: os.getloadavg()[0])

    def say(self, text: str = "") -> None:
        """A line of text."""
        print(text, flush=True)
        self.lines.append(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table, with an empty line after it."""
        self.say("| " + " | ".join(columns) + " |")
        self.say("|" + "---|" * len(columns))
        for row in rows:
            self.say("| " + " | ".join(map(str, row)) + " |")
        self.say()

    def end(self) -> None:
        """Writes the file where that was asked for."""
        if not self.options.write:
            return
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        kind = (gpu_name() or processor()).lower().replace(" ", "-").replace("/", "-")
        cores = os.cpu_count()
        path = RESULTS / f"{self.theme}{'_short' if self.options.short else ''}_{kind}-{cores}-cores_{today}.md"
        path.parent.mkdir(exist_ok=True)
        import torch

        words = " ".join(word for word in sys.argv[1:])
        settings = [
            f"# {self.question}",
            "",
            f"- command: `python -m benchmarks.{Path(sys.argv[0]).stem} {words}`".replace(" `", " `").rstrip(),
            f"- commit {commit()}; {hardware()}; torch threads {torch.get_num_threads()}; niceness {os.nice(0)}",
            f"- Python {platform.python_version()}, " + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
            f"- load average {self.load_at_start:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
            + (f"; {self.options.note}" if self.options.note else ""),
            "",
        ]
        raw = ["", "Raw numbers:", "", "```json", json.dumps(self.raw, indent=1, default=str), "```", ""]
        path.write_text("\n".join([*settings, *self.lines, *raw]))
        print(f"written: {path}")


def _version(name: str) -> str:
    return version(name)
