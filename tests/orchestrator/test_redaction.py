"""No secret leaves a process: not in messages, tracebacks, progress, ledgers, or what goes to MLflow."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cavs_model.errors import InputError
from orchestrator import cli, sweep
from orchestrator.ledger import LEDGER_FILE, Ledger
from orchestrator.progress import Progress
from orchestrator.redaction import redacted
from orchestrator.sweep import TrialLog

URI = "postgresql://user:s3cret@127.0.0.1:1/db"


BROKEN = """
import os, sys
from orchestrator import cli

def verb():
    try:
        open(os.environ["URI"])
    except OSError as error:
        raise RuntimeError("lost " + os.environ["URI"]) from error

sys.exit(cli.main(verb))
"""


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"no answer from {URI}: refused", "no answer from postgresql://127.0.0.1:1/db: refused"),
        (f"'{URI}' and \"{URI}\"", "'postgresql://127.0.0.1:1/db' and \"postgresql://127.0.0.1:1/db\""),
        ("http://us@er:s3/cr@et@host:5000/x y@z", "http://host:5000/x y@z"),
        ("https://s3cret@host", "https://host"),
        ("user:s3cret@host/db", "host/db"),
        ("s3://key:s3cret@bucket/a", "s3://bucket/a"),
        ("postgresql://h/db?user=u&password=s3cret&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("http://h/?Token=s3cret", "http://h/?Token=***"),
        ("a@b.c wrote 3:4", "a@b.c wrote 3:4"),
        ("[00:12] trial 1: val/miou/all 0.5 method.x=3", "[00:12] trial 1: val/miou/all 0.5 method.x=3"),
        ("sqlite:////a@b/c.db", "sqlite:////a@b/c.db"),
    ],
)
def test_credentials_are_cut_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_secrets_of_the_environment_are_hidden_however_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "gr/een+tea")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://user:p%40ss@h/db")
    monkeypatch.setenv("RAY_TOKEN_REFRESH", "100")  # a figure
    monkeypatch.setenv("SSH_TOKEN_FILE", os.devnull)  # a place
    text = f"gr/een+tea gr%2Feen%2Btea p@ss p%40ss 100 {os.devnull}"
    assert redacted(text) == f"*** *** *** *** 100 {os.devnull}"


def test_an_unreachable_database_is_told_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 0)  # MLflow itself would try for two minutes
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    monkeypatch.setattr(sys, "argv", ["sweep", "tones", "--outputs", str(tmp_path)])
    assert cli.main(sweep.sweep) == 2
    told = capfd.readouterr()
    assert "error: MLflow cannot be reached at postgresql://127.0.0.1:1/db" in told.err
    assert "MLFLOW_TRACKING_URI" in told.err
    assert_nowhere("s3cret", told.out + told.err, tmp_path)


def assert_nowhere(secret: str, text: str, folder: Path) -> None:
    assert secret not in text
    for path in folder.rglob("*"):
        assert secret not in path.name
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def test_bad_input_and_errors_that_nobody_expects_are_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> int:
        raise InputError(f"cannot write to {URI}")

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert cli.main(refused) == 2
    assert capsys.readouterr().err == "error: cannot write to postgresql://127.0.0.1:1/db\n"
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    environment = {**os.environ, "URI": URI, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 1
    assert "RuntimeError: lost postgresql://127.0.0.1:1/db" in told.stderr
    assert told.stderr.count("Traceback") == 2
    assert "s3cret" not in told.stderr + told.stdout


def test_the_link_to_mlflows_table_stays_whole() -> None:
    link = "open http://127.0.0.1:5000/#/experiments/1/runs?viewStateShareKey=cavs&access_key=s3cret"
    assert redacted(link) == link.replace("s3cret", "***")


class Refusing:
    """A tracker whose store fails, and says so with its URI; it notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def metrics(self, *_: object) -> None:
        raise OSError(f"connection to {URI} lost")

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> str:
            self.told.append(f"{name} {arguments}")
            return ""

        return call


def test_progress_and_ledger_of_a_sweep_hold_no_secret(tmp_path: Path) -> None:
    ledger, tracker, out = Ledger(tmp_path, {"objectives": [{"metric": "x", "mode": "max"}]}), Refusing(), io.StringIO()
    ledger.begin(1, {}, {})
    ledger.change(1, run="r")
    log = TrialLog(tracker, ledger, Progress(out, (1.0,), (0,), 1), 0)  # type: ignore[arg-type]
    log({"kind": "report", "trial": 1, "label": "trial 1", "text": "", "metrics": {"x": 1.0}, "task": 0})
    assert "connection to postgresql://127.0.0.1:1/db lost" in out.getvalue()
    log._queue.clear()
    failure = f"OSError: {URI} is gone"
    event = {"kind": "trial", "trial": 1, "label": "trial 1", "status": "FAILED", "final": True, "value": None}
    log({**event, "text": failure, "error": failure})
    assert "postgresql://127.0.0.1:1/db is gone" in (tmp_path / LEDGER_FILE).read_text()
    assert any("is gone" in each for each in tracker.told)
    assert_nowhere("s3cret", out.getvalue() + "".join(tracker.told), tmp_path)
