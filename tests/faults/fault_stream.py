"""A stream of tones in a process of its own, for tests to kill: a line of JSON per event, and at the end what came out.

    python fault_stream.py ROOT [--epochs N] [--retreat] [--reach-for BYTES] [--workers N] [--plain] [--cached]

An interim is noted after every epoch. `--retreat` makes the clock of the day jump back and forth by days at every look.
`--reach-for` takes memory in the third epoch of the last task, where nothing but the task in flight can be lost. With
`--workers` it runs on the Ray cluster at RAY_ADDRESS instead of in this process. `--plain` is fine-tuning, a network per task,
at a rate at which last bits do not grow: with the space's one worker and two differ by 0.1 in the end, with this by 0.0005.
`--cached` keeps the clips on disk, as data sets do that are not drawn within milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.train import TaskJob
from orchestrator.experiment import Resources, override
from orchestrator.local_backend import LocalBackend
from orchestrator.store import StoredBackend
from orchestrator.stream import Backend, run_stream
from search_spaces.tones import BASE

DAY_SECONDS = 86_400.0
EPOCHS = 6  # of each task
DISK_FULL_STATUS = 2


class Noting:
    """Notes after every epoch what the task can go on from."""

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        return super().train([dataclasses.replace(job, resume_seconds=0.0) for job in jobs])  # type: ignore[misc]


class NotingBackend(Noting, LocalBackend):
    pass


@dataclasses.dataclass(frozen=True)
class CachedTones(Tones):
    """The same clips, kept on disk."""

    @property
    def cached(self) -> bool:
        return True


def go(
    root: Path,
    tell: Callable[..., None],
    workers: int = 0,
    epochs: int = EPOCHS,
    reach_for: int = 0,
    plain: bool = False,
    cached: bool = False,
) -> None:
    """Runs the stream. InputError where the store has no room."""
    taken = []

    def observe(event: Any) -> None:
        if event["kind"] in ("epoch", "note"):
            tell(kind=event["kind"], label=event.get("label"), epoch=event.get("epoch"), text=event.get("text"))
        if reach_for and event["kind"] == "epoch" and event["epoch"] == 3 and "task 2" in event["label"]:
            taken.append(b"\x01" * reach_for)

    def stored(backend: Backend) -> StoredBackend:
        return StoredBackend(
            backend,
            root / "store",
            on_wait=lambda what: tell(kind="wait", label=what),
            on_damage=lambda text: tell(kind="damage", text=text),
        )

    method = {"method": "finetune", "schedule.learning_rate": 1e-3} if plain else {}
    experiment = override(BASE, {"schedule.base_epochs": epochs, "schedule.epochs": epochs, **method})
    if cached:
        experiment = dataclasses.replace(experiment, benchmark=CachedTones())
    if workers:
        from fault_stream_on_ray import NotingRayBackend, cluster  # seconds of imports that few tests need

        with cluster(observe) as mailbox:
            backend = stored(NotingRayBackend(root / "data", root / "scratch", Resources(workers=workers), mailbox))
            outcomes = list(run_stream(experiment, 0, backend))
    else:
        backend = stored(NotingBackend(root / "data", Resources(), observe))
        outcomes = list(run_stream(experiment, 0, backend))
    weights = {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((root / "store" / "networks").glob("*/*.safetensors"))
    }
    result = {"metrics": [outcome.metrics() for outcome in outcomes], "weights": weights}
    tell(kind="result", result=result, computed=backend.reuse.computed, reused=backend.reuse.reused)


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--retreat", action="store_true")
    parser.add_argument("--reach-for", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--cached", action="store_true")
    chosen = parser.parse_args()
    if chosen.retreat:
        real, jumps = time.time, itertools.cycle((0.0, -400 * DAY_SECONDS, 3 * DAY_SECONDS, -DAY_SECONDS))
        time.time = lambda: real() + next(jumps)
    try:
        go(chosen.root, say, chosen.workers, chosen.epochs, chosen.reach_for, chosen.plain, chosen.cached)
    except InputError as error:
        say(kind="error", text=str(error))
        return DISK_FULL_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
