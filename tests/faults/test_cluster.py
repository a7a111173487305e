"""Faults on a real Ray cluster. Each sweep must end like the undisturbed one, with nothing done twice that had been done."""

from __future__ import annotations

import csv
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from fault_namespaces import namespaces
from fault_nodes import port_of_nobody
from fault_stream import EPOCHS
from fault_tools import (
    EVENT_SECONDS,
    Here,
    Process,
    epochs_of,
    finished,
    left_behind,
    make_room,
    result_of,
    running,
    stream,
    verb,
)
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from random_kills import NAME, ending, kept, made
from random_kills import run as run_random_kills
from random_kills import undisturbed as undisturbed_sweep
from ray.job_submission import JobStatus, JobSubmissionClient

pytestmark = [
    pytest.mark.faults,
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning"),
]

LONG = ("--set", "schedule.base_epochs=20", "--set", "schedule.epochs=2")  # a base task long enough to be hit
SWEEP = ("tones", "--trials", "2", "--sampler", "tpe", "--no-report", *LONG)
IN_MIDDLE = "epoch "  # a line on an epoch: a worker trains the base task
INTERRUPTED, BAD_INPUT = 130, 2
NODES, NAMESPACES = (Path(__file__).parent / name for name in ("fault_nodes.py", "fault_namespaces.py"))


def sweep(outputs: Path) -> list[str]:
    return verb("sweep", *SWEEP, "--name", NAME, "--outputs", str(outputs))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed sweep; FAULT_UNDISTURBED names one to be kept from one call of pytest to the next."""
    kept_at = os.environ.get("FAULT_UNDISTURBED")
    return undisturbed_sweep(Path(kept_at) if kept_at else tmp_path_factory.mktemp("undisturbed"), SWEEP)


def runs(outputs: Path, kind: str) -> list[Run]:
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("cavs")
    return list(client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'"))


def below(process: Process, title: str) -> list[psutil.Process]:
    """The processes under a verb, whose local cluster is its child, that carry a title."""
    found = []
    for child in psutil.Process(process.popen.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is one of these
            if title in " ".join(child.cmdline()):
                found.append(child)
    return found


def ended_alike(outputs: Path, undisturbed: Path) -> None:
    assert ending(outputs) == ending(undisturbed)
    assert sorted(made(outputs)) == sorted(made(undisturbed))
    assert not left_behind(outputs)
    assert {run.info.status for kind in ("sweep", "trial", "stream") for run in runs(outputs, kind)} == {"FINISHED"}


@pytest.mark.parametrize(("name", "arguments", "number"), [
    ("compare", ("tones", "--seeds", "0,1", "--name", NAME, "--no-report", *LONG), signal.SIGTERM),
    ("sweep", SWEEP, signal.SIGTERM),
    ("sweep", SWEEP, signal.SIGINT),
    ("run", ("tones", *LONG), signal.SIGINT),
])  # fmt: skip
def test_an_interrupt_ends_a_verb_cleanly(
    name: str, arguments: tuple[str, ...], number: signal.Signals, tmp_path: Path, record: Callable[..., None]
) -> None:
    with running(verb(name, *arguments, "--outputs", str(tmp_path))) as process:
        process.until(IN_MIDDLE)
        process.signal(number)
        begun = time.monotonic()
        assert process.end() == INTERRUPTED, process.output
        seconds = time.monotonic() - begun
    assert process.lines[-1] == "interrupted; what was computed is kept and will be reused\n"
    assert "Traceback" not in process.output
    assert "***" not in process.output  # Ray's own handlers
    assert not process.outlived_by()
    left = [each for each in left_behind(tmp_path) if "/partial/" not in each and "/scratch/" not in each]
    assert not left, left
    assert {run.info.status for kind in ("sweep", "comparison", "trial", "stream") for run in runs(tmp_path, kind)} == {
        "KILLED"
    }
    record(f"{number.name} to `{name}`", "in the base task", f"status 130 after {seconds:.0f} s", "runs are KILLED")


@pytest.mark.parametrize(("title", "what"), [("RayTrainWorker", "the train workers"), ("ImplicitFunc", "the trials' drivers")])
def test_sigkill_below_a_sweep(title: str, what: str, undisturbed: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    with running(sweep(tmp_path)) as process:
        process.until(IN_MIDDLE)
        before = made(tmp_path)
        for each in below(process, title):  # of the drivers one trains, and it alone holds placement groups
            each.kill()
        assert process.end() == 0, process.output
    assert kept(before, made(tmp_path))
    ended_alike(tmp_path, undisturbed)
    record(f"SIGKILL of {what}", "in the base task", "at most the networks in flight", "trials.csv, best.json: all bytes")


def test_train_workers_killed_for_memory_below_a_sweep(
    undisturbed: Path, tmp_path: Path, record: Callable[..., None], memory_limit: Callable[[int], Path]
) -> None:
    """By the kernel: from their first epoch on they may not have a page more."""
    with running(sweep(tmp_path)) as process:
        process.until(IN_MIDDLE)
        before, workers, members = made(tmp_path), below(process, "RayTrainWorker"), memory_limit(2**16)
        assert workers
        for each in workers:
            members.write_text(str(each.pid))
        psutil.wait_procs(workers, timeout=EVENT_SECONDS)
        assert not any(each.is_running() for each in workers)
        assert process.end() == 0, process.output
    assert "a worker failed and is replaced" in process.output
    assert kept(before, made(tmp_path))
    ended_alike(tmp_path, undisturbed)
    record("train workers killed by the kernel for memory", "in the base task", "at most the networks in flight",
           "trials.csv, best.json: all bytes")  # fmt: skip


@pytest.mark.parametrize("patient", [True, False], ids=["waits", "ends"])
def test_a_full_disk_below_a_sweep(
    patient: bool, undisturbed: Path, small_disk: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """The store's disk. The sweep waits until there is room; without patience it ends, and the same command goes on."""
    command = [*sweep(tmp_path), "--wait-out", "10m" if patient else "0"]
    with running(command) as process:
        if patient:
            process.until("no space left while writing to")
            make_room(small_disk)
        status = process.end()
    assert status == (0 if patient else BAD_INPUT), process.output
    if not patient:
        assert "error: no space left while writing to" in process.output
        assert "the same command with --name goes on" in process.output
        ledger = json.loads((tmp_path / "sweeps" / NAME / "sweep.json").read_text())
        assert {trial["state"] for trial in ledger["trials"].values()} == {"RUNNING"}  # none has failed for good
        assert {run.info.status for kind in ("sweep", "trial", "stream") for run in runs(tmp_path, kind)} == {"KILLED"}
        make_room(small_disk)
        with running(command) as process:
            assert process.end() == 0, process.output
    ended_alike(tmp_path, undisturbed)
    record("a sweep's store has no room (tmpfs of 400 KiB), then a larger disk", "while networks are written",
           f"the networks in flight; the sweep {'waited' if patient else 'ended with status 2 and went on'}",
           "trials.csv, best.json: all bytes")  # fmt: skip


def test_three_random_kills_of_a_sweep(undisturbed: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    found = run_random_kills(tmp_path, undisturbed, 3, 0, SWEEP)
    record("SIGKILL of the sweep, three times", f"{', '.join(found['killed_after'])} of {found['undisturbed_seconds']} s",
           f"what was in flight; {found['outcomes_there']} of {found['outcomes']} outcomes were there",
           "trials.csv, best.json: all bytes")  # fmt: skip


@dataclass(frozen=True)
class Nodes:
    """A cluster that outlives its drivers. `joined` is the environment of a driver that is to join it, behind `inside`."""

    process: Process
    joined: Mapping[str, str]
    dashboard: str
    inside: tuple[str, ...] = ()


def cluster(*cpus: str) -> AbstractContextManager[Nodes]:
    """A cluster with a node per number of CPUs, on one address."""
    return _cluster([sys.executable, str(NODES), *cpus])


@contextmanager
def cluster_of_namespaces() -> Iterator[Nodes]:
    """Two nodes of a CPU each, with an address each. Skips where no namespaces can be made."""
    with ExitStack() as open_now:
        try:
            head, node = open_now.enter_context(namespaces())
        except PermissionError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        folder = open_now.enter_context(TemporaryDirectory(prefix="ray"))  # sockets lie there, whose paths must be short
        inside = ("ip", "netns", "exec", head)
        yield open_now.enter_context(_cluster([*inside, sys.executable, str(NAMESPACES), head, node, folder], inside))


@contextmanager
def _cluster(command: list[str], inside: tuple[str, ...] = ()) -> Iterator[Nodes]:
    """At the end no driver may have left a placement group or hold a CPU."""
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    patience = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}  # three seconds are few on a machine that others use too
    with running(command, secret | patience, stdin=subprocess.PIPE) as process:
        process.until("ready ")
        _, address, dashboard = next(line for line in process.lines if line.startswith("ready ")).split()
        yield Nodes(process, secret | {"RAY_ADDRESS": address}, dashboard, inside)
        tell(process, "left")
        process.until("left ")
        assert "left 0 groups, 0 CPUs\n" in process.lines, process.output
        tell(process, "end")
        process.end()


def tell(process: Process, order: str) -> None:
    assert process.popen.stdin is not None
    process.popen.stdin.write(f"{order}\n")
    process.popen.stdin.flush()


def test_ray_job_stop(undisturbed: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    with cluster("2") as nodes:
        stop_a_job(nodes, tmp_path)
    ended_alike(tmp_path, undisturbed)
    record("`ray job stop`, then the same command", "in the base task", "the networks in flight",
           "trials.csv, best.json: all bytes")  # fmt: skip


class Job:
    """A sweep as a job on a cluster."""

    def __init__(self, nodes: Nodes, outputs: Path) -> None:
        token = {"Authorization": f"Bearer {nodes.joined['RAY_AUTH_TOKEN']}"}
        self.client = JobSubmissionClient(f"http://{nodes.dashboard}", headers=token)
        self.entry = " ".join([sys.executable, *sweep(outputs)[1:]])
        self.name = ""
        self.until(self._submitted)

    def _submitted(self) -> bool:
        variables = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        with suppress(RuntimeError):  # the node's agent, which takes jobs, starts some seconds after its raylet
            self.name = self.client.submit_job(entrypoint=self.entry, runtime_env={"env_vars": variables})
        return bool(self.name)

    @property
    def logs(self) -> str:
        return str(self.client.get_job_logs(self.name))

    @property
    def status(self) -> JobStatus:
        return self.client.get_job_status(self.name)

    def until(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs if self.name else "no job was taken"
            time.sleep(0.2)


def stop_a_job(nodes: Nodes, tmp_path: Path) -> None:
    job = Job(nodes, tmp_path)
    job.until(lambda: IN_MIDDLE in job.logs)
    job.client.stop_job(job.name)
    job.until(lambda: job.status.is_terminal())
    assert job.status == JobStatus.STOPPED
    job.until(lambda: "interrupted; what was computed is kept" in job.logs)
    assert {run.info.status for kind in ("sweep", "trial", "stream") for run in runs(tmp_path, kind)} == {"KILLED"}
    left = [each for each in left_behind(tmp_path) if "/partial/" not in each and "/scratch/" not in each]
    assert not left, left
    before = made(tmp_path)
    with running(sweep(tmp_path), nodes.joined) as process:  # placement groups that were left would starve it
        assert process.end() == 0, process.output
    assert kept(before, made(tmp_path))


def test_a_sweep_as_a_job_on_two_nodes(undisturbed: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """Two raylets of a CPU each: the base task's two networks are trained side by side, one on either."""
    used: set[int] = set()

    def ended() -> bool:
        used.update(worker.ppid() for worker in below(nodes.process, "RayTrainWorker"))
        return job.status.is_terminal()

    with cluster("1", "1") as nodes:
        job = Job(nodes, tmp_path)
        job.until(ended, 600.0)
        assert job.status == JobStatus.SUCCEEDED, job.logs
    assert len(used) == 2  # the raylets that had train workers
    ended_alike(tmp_path, undisturbed)
    record("a sweep as a job on two nodes (no fault)", "", "nothing", "trials.csv, best.json: all bytes, as on one node")


def test_two_sweeps_at_once(undisturbed: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """The same trials by two drivers of one cluster, over one store and one MLflow: each outcome is computed by one of them."""
    names = (NAME, "other")
    with cluster("2") as nodes, ExitStack() as both:
        commands = [verb("sweep", *SWEEP, "--name", name, "--outputs", str(tmp_path)) for name in names]
        processes = [both.enter_context(running(command, nodes.joined)) for command in commands]
        assert [process.end() for process in processes] == [0, 0], "".join(process.output for process in processes)
    computed, alone = (
        sum(run.data.metrics["computed_outcomes"] for run in runs(outputs, "trial")) for outputs in (tmp_path, undisturbed)
    )
    assert computed == alone > 0
    for name in names:
        for file in ("trials.csv", "best.json"):
            ours, theirs = (tmp_path / "sweeps" / name / file).read_text(), (undisturbed / "sweeps" / NAME / file).read_text()
            assert ours == theirs
    ended_alike(tmp_path, undisturbed)
    record("two sweeps at once on a cluster and its store", "from the start",
           f"nothing: {computed:.0f} outcomes by the trials of both, as by those of one",
           "trials.csv, best.json: all bytes, of both")  # fmt: skip


@pytest.mark.parametrize(
    ("nodes_of", "fault"),
    [(lambda: cluster("1", "1"), "SIGKILL of a node of two"),
     (cluster_of_namespaces, "cable pulled, then SIGKILL of all on that node; two nodes with addresses of their own")],
    ids=["one-address", "namespaces"],
)  # fmt: skip
def test_a_node_is_lost(
    nodes_of: Callable[[], AbstractContextManager[Nodes]], fault: str, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Two nodes of a CPU each hold a worker each; the task goes on with the one that is left."""
    epochs_of_a_task = 3 * EPOCHS  # their events arrive in bursts
    reference = result_of(Here(tmp_path / "calm", plain=True, epochs=epochs_of_a_task))
    root, impatient = tmp_path / "killed", {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    with (
        nodes_of() as nodes,
        running(
            [*nodes.inside, *stream(root, "--workers", "2", "--plain", "--epochs", str(epochs_of_a_task))],
            {**nodes.joined, **impatient},
        ) as process,
    ):
        process.until(lambda: any(epochs[-1] >= 3 for epochs in epochs_of(process).values()))
        tell(nodes.process, "kill")
        assert process.end() == 0, process.output
    result = result_of(process)
    notes = [event["text"] for event in process.events("note")]
    assert any("goes on with 1 of 2 workers" in text for text in notes)
    assert any("goes on after epoch" in text for text in notes)
    for ours, theirs in zip(result["metrics"], reference["metrics"], strict=True):
        assert ours == pytest.approx(theirs, abs=0.005)  # sums over two workers are rounded in another order
    trained = epochs_of(process)
    again = sum(len(epochs) - len(set(epochs)) for epochs in trained.values())
    assert again <= len(trained)
    assert not left_behind(root)
    pairs = zip(result["metrics"], reference["metrics"], strict=True)
    difference = max(abs(ours[name] - theirs[name]) for ours, theirs in pairs for name in ours)
    record(fault, f"after epoch 3 of {epochs_of_a_task}, base task", f"{again} epochs; on with 1 of 2 workers",
           f"metrics, largest difference to one worker {difference:.1g}")  # fmt: skip


def test_asha_prunes_on_ray(tmp_path: Path, record: Callable[..., None]) -> None:
    """Three tasks: after the first one all trials are equal, for they share the base task; later few epochs are too few."""
    space = tmp_path / "epochs.py"
    space.write_text(
        "from search_spaces.tones import BASE, OBJECTIVES\ndef define(trial):\n    trial.suggest_int('schedule.epochs', 1, 8)\n"
    )
    process = finished(
        verb("sweep", str(space), "--trials", "6", "--asha", "2", "--sampler", "tpe", "--search-seed", "2", "--name", NAME,
             "--outputs", str(tmp_path), "--no-report", "--set", "scenario.setting=2-1", "--set", "schedule.base_epochs=8")
    )  # fmt: skip
    assert process.popen.returncode == 0, process.output
    with open(tmp_path / "sweeps" / NAME / "trials.csv") as file:
        states = {row["trial"]: row["state"] for row in csv.DictReader(file)}
    pruned = {number for number, state in states.items() if state == "PRUNED"}
    assert pruned
    assert set(states.values()) == {"PRUNED", "FINISHED"}
    assert process.output.count("pruned after 2 of 3 tasks") == len(pruned)
    tagged = {run.data.tags["trial"] for run in runs(tmp_path, "trial") if run.data.tags.get("state") == "PRUNED"}
    assert tagged == pruned
    journal = (tmp_path / "sweeps" / NAME / "study.journal").read_text().splitlines()
    told = [json.loads(line).get("state") for line in journal]
    assert told.count(2) == len(pruned)  # optuna.trial.TrialState.PRUNED
    assert not left_behind(tmp_path)
    record("ASHA stops trials (no fault)", "after task 2 of 3", "nothing", f"{len(pruned)} of 6 trials PRUNED")


@pytest.mark.parametrize("name", ["compare", "sweep"])
def test_the_mlflow_server_is_away_for_a_while(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    away = float(os.environ.get("FAULT_MLFLOW_SECONDS", "60"))
    port, database = port_of_nobody(), tmp_path / "server.db"
    server = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
              "--backend-store-uri", f"sqlite:///{database}", "--artifacts-destination", str(tmp_path / "served")]  # fmt: skip
    own = {"compare": ("--seeds", "0,1,2", "--local"), "sweep": ("--trials", "2", "--sampler", "tpe")}[name]
    command = verb(name, "tones", *own, "--no-report", "--name", NAME,
                   "--set", "schedule.base_epochs=6", "--set", "schedule.epochs=6")  # fmt: skip
    with running(server) as first:
        first.until("startup complete")
        with running(
            [*command, "--outputs", str(tmp_path / "a")], {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
        ) as process:
            process.until("task 1/2 learned")
            first.kill()
            first.end()
            time.sleep(away)
            with running(server) as second:
                assert process.end() == 0, process.output
                second.signal(signal.SIGTERM)
                second.end()
    calm = finished([*command, "--outputs", str(tmp_path / "b")])
    assert calm.popen.returncode == 0, calm.output
    table = Path("comparisons", NAME, "table.csv") if name == "compare" else Path("sweeps", NAME, "trials.csv")
    without_cost = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(text.splitlines())]
        for text in ((tmp_path / each / table).read_text() for each in "ab")
    ]
    assert without_cost[0] == without_cost[1]
    logged = []
    for uri in (f"sqlite:///{database}", f"sqlite:///{tmp_path}/b/mlflow.db"):
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name("cavs").experiment_id
        found = {}
        for run in (each for kind in ("stream", "trial") for each in client.search_runs([experiment], f"tags.kind = '{kind}'")):
            assert run.info.status == "FINISHED"
            found[run.data.tags["mlflow.runName"]] = {
                metric: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric))
                for metric in run.data.metrics if "seconds" not in metric and "outcomes" not in metric
            }  # fmt: skip
        logged.append(found)
    assert logged[0] == logged[1]
    assert len(logged[0]) == {"compare": 3, "sweep": 5}[name]  # streams; two trials, their streams, the best one's
    record(
        f"MLflow's server is killed and away for {away:.0f} s below {name}", "after the first task", "nothing",
        "every metric of every step, each once",
    )  # fmt: skip
