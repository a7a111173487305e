"""The tracker on a real PostgreSQL, started on loopback with password authentication: direct, and behind an MLflow server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from orchestrator.experiment import Experiment, flatten
from orchestrator.tracker import Record, Tracker

# MLflow's own, with the SQLAlchemy it allows.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:DeprecationWarning", "ignore:starlette.middleware.wsgi is deprecated"
)

PASSWORD = "correct-horse"
EXPERIMENT = Experiment(benchmark=Tones())
RECORD = Record(
    {"miou/all": 0.25, "val/miou/new": float("nan")},
    tuple(("train/audio_visual/loss", 1 / (epoch + 1), epoch) for epoch in range(1200)),
    task=1,
    artifacts={"task_1/memory.json": {"rows": [1, 2]}},
)


def tool(name: str) -> str:
    """A program of PostgreSQL's server; skips where there is none."""
    for folder in (*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True), *map(Path, os.get_exec_path())):
        if (folder / name).is_file():
            return str(folder / name)
    pytest.skip(f"no PostgreSQL server on this machine: {name} is neither in /usr/lib/postgresql/*/bin nor on the PATH")


def unprivileged() -> list[str]:
    """What to put before a command so that it does not run as root, which PostgreSQL refuses."""
    if os.geteuid():
        return []
    if shutil.which("runuser") is None or subprocess.run(["id", "postgres"], capture_output=True, check=False).returncode:
        pytest.skip("PostgreSQL does not run as root, and there is no runuser or no user postgres")
    return ["runuser", "-u", "postgres", "--"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """HOST:PORT/DATABASE of a server of our own, whose user is cavs."""
    initdb, server, ready, prefix = tool("initdb"), tool("postgres"), tool("pg_isready"), unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="cavs-postgres-"))
    try:
        (folder / "password").write_text(PASSWORD)
        if prefix:
            shutil.chown(folder / "password", "postgres")
            shutil.chown(folder, "postgres")
        made = [*prefix, initdb, "-D", str(folder / "data"), "-U", "cavs", f"--pwfile={folder / 'password'}"]
        subprocess.run(
            [*made, "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8", "--no-locale"], check=True, capture_output=True
        )
        port = free_port()
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off"}
        flags = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(folder / "log", "wb") as log:
            # runuser hands SIGTERM on to the server, which then ends without waiting for its clients.
            process = subprocess.Popen([*prefix, server, "-D", str(folder / "data"), *flags], stdout=log, stderr=log)
        try:
            for _ in range(100):
                if not subprocess.run(
                    [ready, "-h", "127.0.0.1", "-p", str(port), "-t", "1"], capture_output=True, check=False
                ).returncode:
                    break
                assert process.poll() is None, (folder / "log").read_text()
                threading.Event().wait(0.1)
            yield f"127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*prefix, tool("pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop"], check=True,
                           capture_output=True)  # fmt: skip
            process.wait(20)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def uri(address: str) -> str:
    return f"postgresql://cavs:{PASSWORD}@{address}"


@pytest.fixture(scope="module")
def tracker(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(uri, tmp_path_factory.mktemp("tracker") / "artifacts")


def log_a_stream(tracker: Tracker) -> tuple[str, str]:
    """A trial with a stream that is cut off and goes on; their runs."""
    trial = tracker.start("trial 1", "trial", {"method": "cmr"}, tags={"trial": "1"})
    stream = tracker.stream(EXPERIMENT, 3, "trial 1 seed 3", trial)
    tracker.end(stream, "KILLED")
    assert tracker.child(trial, {"seed": "3"}) == stream
    tracker.resume(stream)
    tracker.record(stream, RECORD)
    tracker.end(stream)
    tracker.end(trial)
    return trial, stream


def check_the_stream(client: MlflowClient, trial: str, stream: str, folder: Path) -> None:
    read = client.get_run(stream)
    assert read.info.status == "FINISHED"
    assert read.data.tags["mlflow.parentRunId"] == trial
    assert read.data.params.keys() == {*flatten(EXPERIMENT), "seed"}
    losses = client.get_metric_history(stream, "train/audio_visual/loss")
    assert sorted((point.step, point.value) for point in losses) == [(epoch, value) for _, value, epoch in RECORD.losses]
    assert [(point.step, point.value) for point in client.get_metric_history(stream, "miou/all")] == [(1, 0.25)]
    memory = Path(client.download_artifacts(stream, "task_1/memory.json", str(folder))).read_text()
    assert json.loads(memory) == {"rows": [1, 2]}


def test_a_stream_is_read_back(tracker: Tracker, uri: str, tmp_path: Path) -> None:
    trial, stream = log_a_stream(tracker)
    check_the_stream(MlflowClient(tracking_uri=uri), trial, stream, tmp_path)
    assert PASSWORD not in tracker.open_hint


def test_the_password_may_stay_in_a_file(
    tracker: Tracker, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq's own way, by which no URI holds it."""
    host, port = address.partition("/")[0].split(":")
    file = tmp_path / "pgpass"
    file.write_text(f"{host}:{port}:*:cavs:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert Tracker(f"postgresql://cavs@{address}", tmp_path).experiment_id == tracker.experiment_id


@pytest.mark.parametrize("form", ["postgresql://cavs:WRONG@{}", "postgresql://{}?user=cavs&password=WRONG"])
def test_a_wrong_password_is_told_and_not_shown(address: str, form: str, tmp_path: Path) -> None:
    wrong, started = "battery%20staple", time.monotonic()
    with pytest.raises(
        InputError, match=r"MLflow cannot be reached at postgresql://127.*password authentication failed"
    ) as error:
        Tracker(form.format(address).replace("WRONG", wrong), tmp_path)
    assert time.monotonic() - started < 10
    assert "staple" not in str(error.value)


def test_a_server_on_it_takes_a_stream_over_http(
    tracker: Tracker, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own REST handlers on a loopback port, with the artifacts kept by the server."""
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", uri)
    monkeypatch.setenv("_MLFLOW_SERVER_REGISTRY_STORE", uri)
    monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(tmp_path / "kept"))
    from mlflow.server import app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        over_http = Tracker(f"http://somebody:{PASSWORD}@127.0.0.1:{server.server_port}", tmp_path / "unused")
        assert over_http.experiment_id == tracker.experiment_id
        trial, stream = log_a_stream(over_http)
        check_the_stream(MlflowClient(tracking_uri=uri), trial, stream, tmp_path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    # The server is gone in the middle of a run.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(Exception, match="API request to") as error:
        over_http.metrics(stream, {"miou/all": 0.5}, 2)
    assert PASSWORD not in "".join(str(each) for each in (error.value, error.value.__cause__, error.getrepr(style="long")))
