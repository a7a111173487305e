"""`python -m orchestrator.check`: whether a search space can run here, and what it will take. All problems in one report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from cavs_model.errors import InputError
from orchestrator import cli, readiness
from orchestrator.dry_run import plan_text
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment
from orchestrator.ray_backend import Cluster, Node, connected, nodes
from orchestrator.readiness import Finding, in_store, problem

PROBLEMS_STATUS = 2
POLL_SECONDS = 2.0


def check() -> int:
    """The verb; 2 where there is a problem."""
    made = cli.parser("check", "Report whether a search space can run here, and the plan: size, time, disk and memory.")
    made.add_argument("--trials", type=int, default=8, help="trials of the search to be planned (%(default)s)")
    made.add_argument("--nodes", type=int, default=0, metavar="N", help="wait until the cluster has N nodes")
    made.add_argument("--wait", type=float, default=300, metavar="SECONDS", help="for so long at most (%(default)s)")
    made.add_argument("--local", action="store_true", help="of a run with --local: in this process, without Ray")
    made.add_argument("--dry-run", action="store_true", help="the plan alone, by what the store has; no cluster is looked at")
    made.add_argument("--debug", action="store_true", help="of a run with --debug: two clips of a class, one epoch, one seed")
    cli.add_store(made)
    arguments, others = made.parse_known_args()
    if arguments.trials < 1:
        raise InputError(f"--trials must be at least 1, not {arguments.trials}")
    if arguments.dry_run:
        return _only_the_plan(arguments)
    report = Report()
    if others:  # so that the arguments of a sweep can be given as they are
        report.tell([Finding("arguments", f"not looked at, they are the sweep's own: {' '.join(others)}")])
    experiment, knobs, outputs = None, False, None
    try:
        space, experiment = cli.experiment_of(arguments)
        knobs = _is_searched(space, experiment)
        report.tell([Finding("experiment", f"{space.name}: every field and setting fits")])
    except InputError as error:
        report.tell([problem("experiment", error)])
    try:
        outputs = cli.outputs_folder(arguments.outputs)
    except InputError as error:
        report.tell([problem("outputs", error)])
    with ExitStack() as stack:
        cluster, there = None, list[Node]()
        if not arguments.local:
            try:
                cluster = stack.enter_context(connected(arguments.verbose))
                there = _nodes(arguments.nodes, arguments.wait)
                report.tell(readiness.of_cluster(cluster, there, None if experiment is None else experiment.resources))
                if len(there) < arguments.nodes:
                    report.tell([problem("nodes", f"{len(there)} of {arguments.nodes} came in {arguments.wait:.0f} s; look at "
                                                  "the output of ray start on the others")])  # fmt: skip
            except InputError as error:
                report.tell([problem("cluster", error)])
        if outputs is None:
            report.tell([Finding("versions", ", ".join(f"{what} {value}" for what, value in readiness.versions().items()))])
        else:
            store = cli.store_of(arguments.store, outputs)
            _of_outputs(report, outputs, store, experiment, cluster, there, arguments.trials if knobs else 1, knobs)
    return report.conclude()


def _is_searched(space: cli.SearchSpace, experiment: Experiment) -> bool:
    """Whether knobs are left open where the space's experiment is this one."""
    return bool(cli.open_knobs(cli.SearchSpace(space.name, experiment, space.objectives, space.define)))


def _only_the_plan(arguments: argparse.Namespace) -> int:
    """Of --dry-run: no cluster is started or joined, and nothing is written into the outputs."""
    space, experiment = cli.experiment_of(arguments)
    trials = arguments.trials if _is_searched(space, experiment) else 1
    outputs = cli.outputs_folder(arguments.outputs)
    print(f"dry run, no node, data, weights or MLflow is looked at\n{space.name}: every field and setting fits")
    print(plan_text(experiment, ("val",), cli.store_of(arguments.store, outputs), trials))
    return 0


def _of_outputs(
    report: Report,
    outputs: Path,
    store: Entries,
    experiment: Experiment | None,
    cluster: Cluster | None,
    there: list[Node],
    trials: int,
    knobs: bool,
) -> None:
    """What is known of the folder, the nodes and MLflow, and the plan where nothing stands in its way."""
    memory, made = 0, None
    try:
        store.make()
        made = store
    except InputError as error:
        report.tell([problem("store", error)])
    try:
        found, memory = readiness.on_nodes(outputs, experiment, weights=True, where=there, store=made)
        report.tell(found)
    except InputError as error:
        report.tell([problem("outputs", error)])
    report.tell(readiness.of_mlflow(outputs, there))
    if experiment is None or report.problems & {"experiment", "outputs", "store", "data", "weights", "nodes", "resources"}:
        report.tell([Finding("plan", "none before the problems above are solved")])
        return
    damaged: list[str] = []
    stored = in_store(experiment, store, damaged.append)
    report.tell(Finding("store", text) for text in damaged)
    work = readiness.work_of(experiment, trials, outputs, stored, knobs)
    at_once = 1 if cluster is None else min(cluster.concurrent_jobs(experiment.resources), max(1, work.left))
    report.tell(readiness.plan(experiment, work, outputs, at_once, memory, on_ray=cluster is not None))


class Report:
    """Prints findings as they come and counts the problems."""

    def __init__(self) -> None:
        self.problems: set[str] = set()  # their topics
        self._count = 0

    def tell(self, findings: Iterable[Finding]) -> None:
        """Prints them."""
        for finding in findings:
            print(finding, flush=True)
            if not finding.ok:
                self.problems.add(finding.topic)
                self._count += 1

    def conclude(self) -> int:
        """Prints the sum; the exit status."""
        print(f"{self._count} problems" if self._count else "no problems", flush=True)
        return PROBLEMS_STATUS if self._count else 0


def _nodes(wanted: int, seconds: float) -> list[Node]:
    """The cluster's nodes, once there are as many as wanted, or after this time."""
    end = time.monotonic() + seconds
    while len(there := nodes()) < wanted and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    return there


if __name__ == "__main__":
    sys.exit(cli.main(check))
