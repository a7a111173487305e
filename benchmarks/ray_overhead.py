"""What Ray Train adds: per step against the same train_task without Ray, and per fit at its start and end.

Three launchers of one job, taking turns: LocalWorker in a fresh process, torchrun with that worker, and a fit by RayBackend.
All have the workers' environment and niceness (Ray starts its workers at nice 15). A step's time is that of the epochs after
the first, by the clock and by processor time of the process that trains. A fit is then broken down by stamps of the clock.
Every job is made anew from this file's constants, so nothing is handed over but numbers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks._measure import Ratio, Report, arguments, seconds_text
from cavs_model import checkpoint
from cavs_model.datasets import cache
from cavs_model.datasets.collage import Collage
from cavs_model.evaluate import Data
from cavs_model.methods.finetune import Finetune
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule, Seeds, TaskJob, train_task
from cavs_model.types import AUDIO_VISUAL
from cavs_model.worker import LocalWorker
from orchestrator.experiment import Resources
from orchestrator.ray_backend import WORKER_ENVIRONMENT, RayBackend, RayWorker, connected, in_an_actor, new_mailbox

BATCH = 16
STAMPS = "stamps.json"
IMPORTS = ("torch", "ray", "ray.train.torch", "cavs_model.train", "orchestrator.ray_backend")


def job(root: str, output: str, clips: int, epochs: int) -> TaskJob:
    """The light network on the base task of Collage."""
    benchmark, scenario = Collage(frames=1, train_clips=clips), Scenario(setting="16-8")
    task = scenario.tasks(benchmark)[0]
    data = Data(benchmark, root, scenario.learned_order(benchmark))
    schedule = Schedule(base_epochs=epochs, epochs=epochs, batch_size=BATCH)
    return TaskJob(
        AUDIO_VISUAL, task, data, (), Finetune(), NetworkConfig(), schedule, "fp32", Seeds(0, 0, 0), None, output=output
    )


@dataclass
class Stamps:
    """When what happened in the process that trains: seconds of the epoch (as the clock has it) and of its processor time."""

    path: str
    entered: float = field(default_factory=time.time)
    born: float = field(default_factory=lambda: _born())
    spent_before: float = field(default_factory=time.process_time)
    epochs: list[tuple[float, float]] = field(default_factory=list)
    reports: list[float] = field(default_factory=list)  # seconds that each took
    notes: list[float] = field(default_factory=list)

    def hear(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "epoch":
            self.epochs.append((time.time(), time.process_time()))

    def write(self) -> None:
        told = {name: value for name, value in vars(self).items() if name != "path"}  # of this machine, and in no report
        Path(self.path).write_text(json.dumps({**told, "left": time.time()}))


def _born() -> float:
    """When this process was started, in seconds of the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class StampedRayWorker(RayWorker):
    """A worker of a Ray Train group that notes when epochs end."""

    stamps: Any = None

    def report(self, record: Mapping[str, Any]) -> None:
        self.stamps.hear(record)
        began = time.perf_counter()
        super().report(record)  # type: ignore[arg-type]
        self.stamps.reports.append(time.perf_counter() - began)


def run_here(root: str, output: str, clips: int, epochs: int) -> None:
    """The job in this process; what torchrun and the plain process call."""
    torch.set_num_threads(1)
    stamps = Stamps(f"{output}.{STAMPS}")
    train_task(job(root, output, clips, epochs), LocalWorker(on_report=stamps.hear))
    stamps.write()


def launched(words: list[str], root: str, clips: int, epochs: int) -> dict[str, Any]:
    """Runs `run_here` in a process started by these words, as nicely as Ray's workers."""
    with tempfile.TemporaryDirectory(dir=root) as place:
        output = f"{place}/network"
        command = [
            "nice",
            "-n",
            str(15 - os.nice(0)),
            sys.executable,
            *words,
            "--as-worker",
            root,
            output,
            str(clips),
            str(epochs),
        ]
        began = time.time()
        subprocess.run(command, check=True, env={**os.environ, **WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"})
        return {**json.loads(Path(f"{output}.{STAMPS}").read_text()), "began": began, "ended": time.time()}


def fitted(root: str, clips: int, epochs: int, call: Callable[[Callable[[], Any]], Any], mailbox: Any = None) -> dict[str, Any]:
    """The same by a fit on the cluster, asked for by the actor that `call` calls in, as a sweep's trials do.

    With a mailbox the worker reports to it, and notes after every epoch what the task could go on from.
    """
    with tempfile.TemporaryDirectory(dir=root) as place:
        output = f"{place}/network"
        backend = RayBackend(Path(root), Path(place) / "scratch", Resources())

        def loop() -> None:
            torch.set_num_threads(1)
            stamps, this, save = Stamps(f"{output}.{STAMPS}"), job(root, output, clips, epochs), checkpoint.save_interim
            if mailbox is not None:
                this = dataclasses.replace(this, resume=f"{output}.interim", resume_seconds=0.0)

            def saved(*arguments: Any) -> None:
                began = time.perf_counter()
                save(*arguments)
                stamps.notes.append(time.perf_counter() - began)

            with patch.object(checkpoint, "save_interim", saved):
                train_task(this, StampedRayWorker(mailbox, stamps=stamps))
            stamps.write()

        began = time.time()
        error = call(partial(backend._try, loop, Path(place).name, workers=1))
        if error is not None:
            raise error
        return {**json.loads(Path(f"{output}.{STAMPS}").read_text()), "began": began, "ended": time.time()}


def per_step(run: Mapping[str, Any], clips: int) -> tuple[float, float]:
    """Seconds of a step by the clock and of processor, of the epochs after the first."""
    steps = -(-clips // BATCH) * (len(run["epochs"]) - 1)
    first, last = run["epochs"][0], run["epochs"][-1]
    return (last[0] - first[0]) / steps, (last[1] - first[1]) / steps


def import_seconds() -> dict[str, float]:
    """Processor seconds that a fresh process takes to import each, all that it imports itself included."""
    found = {}
    for name in ("sys", *IMPORTS):
        code = f"import time, {name}; print(time.process_time())"
        found[name] = float(
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()[-1]
        )
    return {name: found[name] - found["sys"] for name in IMPORTS}


def main() -> None:
    if "--as-worker" in sys.argv:
        place = sys.argv.index("--as-worker")
        root, output, clips_text, epochs_text = sys.argv[place + 1 : place + 5]
        run_here(root, output, int(clips_text), int(epochs_text))
        return
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--clips", type=int, default=320)
    options = parser.parse_args()
    clips, epochs = (48, 2) if options.short else (options.clips, options.epochs)
    report = Report("ray_overhead", "What Ray Train adds per step and per fit", options)
    script = ["-m", "benchmarks.ray_overhead"]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone", *script]
    imports = import_seconds()
    runs: dict[str, list[dict[str, Any]]] = {"a process": [], "torchrun": [], "Ray Train": []}
    with tempfile.TemporaryDirectory() as root:
        cache.build(Collage(frames=1, train_clips=clips), ["train"], root)
        tasks = len(job(root, "", clips, epochs).task.train)
        with connected() as cluster, in_an_actor(2) as call:
            report.say(f"{cluster.describe()}; {tasks} clips, batches of {BATCH}, {epochs} epochs.\n")
            launchers: dict[str, Callable[[], dict[str, Any]]] = {
                "a process": lambda: launched(script, root, clips, epochs),
                "torchrun": lambda: launched(torchrun, root, clips, epochs),
                "Ray Train": lambda: fitted(root, clips, epochs, call),
            }
            for turn in range(options.rounds):
                for name in list(launchers)[:: -1 if turn % 2 else 1]:
                    runs[name].append(launchers[name]())
            pairs = []
            for _ in range(options.rounds):
                with ThreadPoolExecutor(2) as pool:
                    pairs += list(pool.map(lambda _: fitted(root, clips, epochs, call), range(2)))
            mailbox = new_mailbox()
            noting = [fitted(root, clips, epochs, call, mailbox) for _ in range(options.rounds)]
    report.raw |= {"pairs": pairs, "noting": noting}
    report.raw |= {"runs": runs, "import_cpu_s": imports}
    steps = {name: [per_step(run, tasks) for run in all_] for name, all_ in runs.items()}
    report.table(
        ["launcher", "a step, s by the clock", "s of processor", "Ray's time as a multiple, clock", "processor"],
        [(name, *(seconds_text([step[kind] for step in each]) for kind in (0, 1)),
          *(Ratio.of([step[kind] for step in steps["Ray Train"]], [step[kind] for step in each]) for kind in (0, 1)))
         for name, each in steps.items()],
    )  # fmt: skip

    def row(label: str, start: Callable[[Mapping[str, Any]], float], end: Callable[[Mapping[str, Any]], float]) -> list[str]:
        return [label, *(seconds_text([end(run) - start(run) for run in all_]) for all_ in runs.values())]

    report.table(
        ["s by the clock", *runs],
        [
            row("asked for -> the training process exists", lambda run: run["began"], lambda run: run["born"]),
            row("... -> train_task begins (imports, group, job)", lambda run: run["born"], lambda run: run["entered"]),
            row("both together", lambda run: run["began"], lambda run: run["entered"]),
            row("processor time in these of the training process", lambda run: 0.0, lambda run: run["spent_before"]),
            row("train_task begins -> first epoch ends", lambda run: run["entered"], lambda run: run["epochs"][0][0]),
            row("train_task ends -> all is handed back", lambda run: run["left"], lambda run: run["ended"]),
        ],
    )
    report.say(
        "Ray keeps idle worker processes: one that existed before the fit was asked for shows as a negative first row.\n"
    )
    report.table(["import in a fresh process", "s of processor"], [(name, f"{value:.2f}") for name, value in imports.items()])
    report.say(
        f"Median of a whole fit but for its epochs: {_around(runs['Ray Train']):.1f} s; "
        f"of two at once, as a task's two networks are: {_around(pairs):.1f} s."
    )
    report.say()
    ends = {"a report to the driver's mailbox": "reports", "a note of what the task can go on from": "notes"}
    report.table(
        ["at the end of an epoch", "s by the clock"],
        [(name, seconds_text([each for run in noting for each in run[kind]])) for name, kind in ends.items()],
    )
    report.end()


def _around(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["entered"] - run["began"] + run["ended"] - run["left"] for run in runs)


if __name__ == "__main__":
    main()
