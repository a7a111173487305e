"""`python -m orchestrator.run`: the streams of one experiment, with no free knob."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cavs_model.types import AUDIO_VISUAL
from orchestrator import cli
from orchestrator.dry_run import debug_name, plan_text
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, file_name
from orchestrator.local_backend import LocalBackend
from orchestrator.node_metrics import Probe, Watch, this_machine
from orchestrator.outage import Patience
from orchestrator.progress import Progress, planned_work, watched
from orchestrator.ray_backend import NodeProbe, RayBackend, connected, drain, new_mailbox
from orchestrator.status import run_status
from orchestrator.store import Reuse, StoredBackend
from orchestrator.stream import Backend, run_stream
from orchestrator.terminal import renderer
from orchestrator.tracker import Tracker, record_of, tracking_uri


def run() -> int:
    """The verb."""
    made = cli.parser("run", "Run the streams of one experiment: the space's base with the overrides given.")
    made.add_argument("--name", default=None, help="name of the runs in MLflow (method and setting)")
    made.add_argument(
        "--test", action="store_true", help="evaluate the test splits too: only for a configuration that is settled"
    )
    made.add_argument("--local", action="store_true", help="in this process, without Ray")
    cli.add_store(made)
    cli.add_patience(made)
    cli.add_training(made)
    arguments = made.parse_args()
    _, experiment = cli.experiment_of(arguments)
    outputs = cli.outputs_folder(arguments.outputs)
    entries = cli.store_of(arguments.store, outputs)
    experiment.benchmark.check()
    splits = [
        split for split in experiment.benchmark.splits() if split == "val" or (arguments.test and split.startswith("test"))
    ]
    if arguments.dry_run:
        print(f"dry run, nothing is computed\n{plan_text(experiment, splits, entries)}")
        return 0
    entries.make()
    tracking = tracking_uri(outputs)
    tracker = Tracker(tracking, outputs / "artifacts")
    name = arguments.name or f"{file_name(experiment.method)} {experiment.benchmark.name} {experiment.scenario.setting}"
    name = debug_name(name) if arguments.debug else name
    shown = (renderer(sys.stdout, name, arguments.plain), run_status(outputs, name))
    progress = Progress(sys.stdout, planned_work(experiment), experiment.seeds, trials=1, renderers=shown)
    progress.where = (f"MLflow: {tracker.open_hint}",)
    with entries.tidied(), progress:
        _run(arguments, experiment, splits, outputs, entries, tracker, progress, name, Patience(arguments.wait_out))
    print(f"MLflow: {tracker.open_hint}", flush=True)
    return 0


def _run(
    arguments: argparse.Namespace,
    experiment: Experiment,
    splits: Sequence[str],
    outputs: Path,
    entries: Entries,
    tracker: Tracker,
    progress: Progress,
    name: str,
    patience: Patience,
) -> None:
    current: list[str] = []  # the stream's run

    def idle_with(probe: Probe) -> Callable[[], None]:
        nodes = Watch(probe, lambda values, taken: tracker.system(current[-1], values, taken), progress.line)

        def idle() -> None:
            progress.heartbeat()
            if current:
                nodes()

        return idle

    if arguments.local:
        backend = LocalBackend(outputs / "data", experiment.resources, progress)
        with watched(list, progress, idle_with(this_machine())):
            _streams(experiment, splits, backend, entries, tracker, progress, name, patience, current)
    else:
        with connected(arguments.verbose) as cluster:
            progress.line(cluster.describe())
            progress.where += cluster.where
            cluster.concurrent_jobs(experiment.resources)
            on_ray = RayBackend(outputs / "data", outputs / "scratch", experiment.resources, new_mailbox())
            with watched(lambda: drain(on_ray.mailbox), progress, idle_with(NodeProbe())):
                _streams(experiment, splits, on_ray, entries, tracker, progress, name, patience, current)
    progress({"kind": "trial", "trial": 1, "label": name, "text": "done"})


def _streams(
    experiment: Experiment,
    splits: Sequence[str],
    backend: Backend,
    entries: Entries,
    tracker: Tracker,
    progress: Progress,
    name: str,
    patience: Patience,
    current: list[str],
) -> None:
    """Runs the streams one after the other; `current` gets the MLflow run of each as it begins."""
    reuse, logged = Reuse(), dict.fromkeys(experiment.seeds, -1)
    progress.shared = reuse.describe

    def learn(seed: int, run_id: str) -> None:
        store = StoredBackend(
            backend,
            entries,
            on_wait=lambda what: progress.line(f"waiting for another process: {what}"),
            reuse=reuse,
            user=f"run/{name}",
            on_damage=progress.line,
        )
        for outcome in run_stream(experiment, seed, store, splits):
            if outcome.task.index <= logged[seed]:  # before an outage
                continue
            tracker.record(run_id, record_of(outcome))
            logged[seed] = outcome.task.index
            task = {"kind": "task", "trial": 1, "seed": seed, "task": outcome.task.index}
            progress({**task, "label": name, "text": outcome.headline()})
            if outcome.is_last:
                network = Path(outcome.state.checkpoints[AUDIO_VISUAL])
                tracker.model(run_id, network, outcome.classes_json(experiment.benchmark), {}, outcome.task.index)

    for seed in experiment.seeds:
        run_id = tracker.stream(experiment, seed, f"{name} seed {seed}")
        current.append(run_id)
        try:
            patience.through(partial(learn, seed, run_id), progress.line, lambda: sum(logged.values()))
        except BaseException as error:
            tracker.end(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracker.end(run_id)
    progress.line(reuse.describe())


if __name__ == "__main__":
    sys.exit(cli.main(run))
