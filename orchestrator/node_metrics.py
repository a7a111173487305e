"""What the machines do while a run computes: processor, memory, disk and GPUs of every node, for MLflow's "System metrics".

The driver alone writes MLflow. On Ray it asks an actor that owns no CPU on every living node; in one process it looks itself.
Never part of a result: a node that does not answer is left out, and what MLflow does not take is tried again.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import psutil

INTERVAL_SECONDS = 15.0
WAITING = 240  # samples kept while MLflow does not answer: an hour's
MEGABYTE = 1e6

Sample = Mapping[str, float]  # "cpu_utilization_percentage" and so on
Probe = Callable[[], Mapping[str, Sample]]  # node -> its sample; nothing while answers are awaited


class Sampler:
    """Looks at the machine it lives on. On Ray an actor, one a node."""

    def __init__(self, disk: str = "/") -> None:
        self._disk = disk
        psutil.cpu_percent(interval=0.5)  # the next call tells of the time since this one

    def sample(self) -> dict[str, float]:
        """This machine now: percent of all cores since the last sample, megabytes of 10^6 bytes, percent of each GPU."""
        memory, used = psutil.virtual_memory(), psutil.disk_usage(self._disk)
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": used.percent,
            "disk_available_megabytes": used.free / MEGABYTE,
        }
        return found | gpus(_nvidia_smi())


def gpus(text: str) -> dict[str, float]:
    """Lines "utilization, megabytes used, megabytes in all", one a GPU, as metrics; a value that is no number is left out."""
    found: dict[str, float] = {}
    for index, line in enumerate(text.strip().splitlines()):
        values = [part.strip() for part in line.split(",")]
        names = (f"gpu_{index}_utilization_percentage", f"gpu_{index}_memory_usage_megabytes", f"gpu_{index}_memory_megabytes")
        found |= {name: float(value) for name, value in zip(names, values, strict=False) if value.replace(".", "").isdigit()}
    return found


def _nvidia_smi() -> str:
    """What the driver's tool says; nothing where there is no GPU, or none that answers in time."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = ["--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run([tool, *query], capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def this_machine() -> Probe:
    """The probe of a run in one process."""
    sampler = Sampler()
    return lambda: {"driver": sampler.sample()}


@dataclass
class Watch:
    """To be called often, by a thread that must not wait: every INTERVAL_SECONDS it takes samples and hands them to `write`.

    `write` gets {"system/<node>/<metric>": value} and when they were taken, in seconds since the epoch. When they are due is
    told by another clock, which nobody sets.
    """

    probe: Probe
    write: Callable[[Mapping[str, float], float], None]
    tell: Callable[[str], None]
    now: Callable[[], float] = time.time
    passed: Callable[[], float] = time.monotonic
    _next: float = -math.inf
    _queue: list[tuple[dict[str, float], float]] = field(default_factory=list)
    _told: bool = False

    def __call__(self) -> None:
        """Samples where one is due. Raises nothing: a run does not end for want of these numbers."""
        if self.passed() < self._next:
            return
        try:
            found = {f"system/{node}/{name}": value for node, each in self.probe().items() for name, value in each.items()}
            if not found:
                return
            self._next = self.passed() + INTERVAL_SECONDS
            self._queue.append((found, self.now()))
            del self._queue[:-WAITING]
            while self._queue:
                self.write(*self._queue[0])
                self._queue.pop(0)
            self._told = False
        except Exception as error:  # whatever Ray or MLflow's store raise
            self._next = self.passed() + INTERVAL_SECONDS
            if not self._told:
                self.tell(f"system metrics wait: {type(error).__name__}: {error}")
            self._told = True
