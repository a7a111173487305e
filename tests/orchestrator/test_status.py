"""The status file and who reads it: running, ended, failed, or gone without a word."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cavs_model.errors import InputError
from orchestrator import cli, status
from orchestrator.progress import Progress
from orchestrator.status import STATUS_FILE, StatusFile, find, read, run_status

ROOT = Path(__file__).parents[2]
CHILD = """
import sys, time
from pathlib import Path
from orchestrator.progress import Progress
from orchestrator.status import StatusFile
with Progress(sys.stdout, (10.0,), (0,), 4, renderers=(StatusFile(Path(sys.argv[1]), "sweep"),)) as progress:
    progress.heartbeat()
    print("there", flush=True)
    time.sleep(60)
"""


def watched(folder, kind="sweep", **fields):
    return Progress(io.StringIO(), (10.0, 5.0), (0,), 4, renderers=(StatusFile(folder, kind),), **fields)


def asked(monkeypatch, outputs, *arguments):
    monkeypatch.setattr(sys, "argv", ["status", *arguments, "--outputs", str(outputs)])
    return cli.main(status.status)


def test_a_running_one_tells_how_far_it_is_and_then_how_it_ended(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweeps" / "night"
    with watched(folder, where=("MLflow: make ui",), shared=lambda: "2 reused") as progress:
        progress.line("begun")
        progress({"kind": "epoch", "label": "trial 2 seed 0 task 1/2 n", "epoch": 2, "epochs": 4, "work": 5, "seconds": 1.0,
                  "clips_per_second": 5.0, "loss": 0.125})  # fmt: skip
        assert asked(monkeypatch, tmp_path, "night") == 0
        told = capsys.readouterr().out
        for part in ("sweep night: running, process", "trials  0 of 4", "tasks   0 of 5", "left", "MLflow: make ui",
                     "trial 2 seed 0 task 1/2 n epoch 2/4 loss 0.1250 5 clips/s", "2 reused", "begun"):  # fmt: skip
            assert part in told, part
        progress({"kind": "trial", "trial": 1, "label": "trial 1", "text": "x", "value": 0.5})
    assert asked(monkeypatch, tmp_path, "night") == 0
    told = capsys.readouterr().out
    assert "sweep night: ended" in told
    assert "trials  1 of 4" in told
    assert "best    0.5000" in told
    assert "epoch" not in told


@pytest.mark.parametrize(
    ("error", "state", "code"), [(RuntimeError("disk on fire"), "failed", 1), (KeyboardInterrupt(), "interrupted", 0)]
)
def test_an_error_and_an_interrupt_are_told_apart(tmp_path, monkeypatch, capsys, error, state, code):
    with pytest.raises(type(error)), watched(tmp_path / "comparisons" / "c", "comparison", unit="streams"):
        raise error
    assert asked(monkeypatch, tmp_path, "c") == code
    told = capsys.readouterr().out
    assert f"comparison c: {state}" in told
    assert "streams 0 of 4" in told
    assert ("disk on fire" in told) is (state == "failed")


def test_one_that_was_killed_gives_no_sign_of_life(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sweeps" / "night"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "there\n"
        assert asked(monkeypatch, tmp_path, "night") == 0
        assert f"running, process {child.pid} on" in capsys.readouterr().out
        child.send_signal(signal.SIGKILL)
    started = time.monotonic()
    assert asked(monkeypatch, tmp_path, "night", "--follow") == 1  # does not wait for a dead one
    assert time.monotonic() - started < 30
    assert "no sign of life since" in capsys.readouterr().out
    # Another process may have its number by now.
    text = json.loads((folder / STATUS_FILE).read_text())
    (folder / STATUS_FILE).write_text(json.dumps({**text, "pid": os.getpid()}))
    assert not read(folder / STATUS_FILE).alive()


def test_one_on_another_machine_is_believed_for_a_minute(tmp_path):
    folder = tmp_path / "sweeps" / "far"
    watched(folder).heartbeat()
    text = json.loads((folder / STATUS_FILE).read_text())
    for age, alive in ((5, True), (90, False)):
        (folder / STATUS_FILE).write_text(json.dumps({**text, "host": "elsewhere", "beat": time.time() - age}))
        assert read(folder / STATUS_FILE).alive() is alive


def test_follow_shows_every_change_until_the_end(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "r"
    progress = watched(folder, "run")
    progress.heartbeat()
    steps = iter(
        [lambda: progress.renderers[0]._write(progress.view(), "running", ""), lambda: progress.__exit__(None, None, None)]
    )
    monkeypatch.setattr(status.time, "sleep", lambda seconds: next(steps)())
    assert asked(monkeypatch, tmp_path, "r", "--follow") == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run r")]
    assert [head.split(":")[1].split()[0].strip(",") for head in heads] == ["running", "running", "ended"]


def test_the_file_is_written_every_few_seconds_only(tmp_path):
    now = [0.0]
    file = StatusFile(tmp_path, "run", now=lambda: now[0])
    progress = Progress(io.StringIO(), (1.0,), (0,), 1, renderers=(file,))
    for _ in range(20):
        now[0] += 0.5
        progress.heartbeat()
    assert json.loads((tmp_path / STATUS_FILE).read_text())["beats"] == 4


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with Progress(io.StringIO(), (1.0,), (0,), 1, renderers=(StatusFile(tmp_path / "file" / "x", "run"),)) as progress:
        progress.heartbeat()
    assert capsys.readouterr().err.count("warning: cannot write") == 1


def test_names_that_are_not_there_and_files_that_are_none_are_told(tmp_path, monkeypatch, capsys):
    watched(tmp_path / "sweeps" / "night").heartbeat()
    with pytest.raises(InputError, match=r"nothing called 'day'.*there is: night"):
        find("day", tmp_path)
    assert find(str(tmp_path / "sweeps" / "night"), tmp_path).text["name"] == "night"
    assert asked(monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out.startswith("sweep night: running")
    for content in ("{", "[]", '{"state": "running"}'):
        (tmp_path / "sweeps" / "night" / STATUS_FILE).write_text(content)
        with pytest.raises(InputError, match=r"cannot read .*status.json"):
            find("night", tmp_path)


def test_a_run_is_found_by_the_name_that_was_given_to_it_too(tmp_path, monkeypatch, capsys):
    for name in ("cmr tones 2-2", "debug-cmr tones 2-2"):
        with Progress(io.StringIO(), (1.0,), (0,), 1, renderers=(run_status(tmp_path, name),)):
            pass
    for spelling in ("cmr tones 2-2", "cmr-tones-2-2"):
        for more, folder in (((), "cmr-tones-2-2"), (("--debug",), "debug-cmr-tones-2-2")):
            assert asked(monkeypatch, tmp_path, spelling, *more) == 0
            assert capsys.readouterr().out.startswith(f"run {folder}: ended")
    watched(tmp_path / "sweeps" / "a-night").heartbeat()
    with pytest.raises(InputError, match="nothing called 'a night'"):  # a sweep has the name that its folder has
        find("a night", tmp_path)


def test_a_dry_run_names_the_files_and_debug_asks_for_what_ran_with_debug(tmp_path, monkeypatch, capsys):
    for name in ("night", "debug-night"):
        watched(tmp_path / "sweeps" / name).heartbeat()
    assert asked(monkeypatch, tmp_path, "--dry-run") == 0
    shown = [f"would show {tmp_path / 'sweeps' / name / STATUS_FILE}" for name in ("night", "debug-night")]
    assert capsys.readouterr().out.splitlines() == shown
    for name in ("night", "debug-night", str(tmp_path / "sweeps" / "night")):
        assert asked(monkeypatch, tmp_path, name, "--debug") == 0
        assert capsys.readouterr().out.startswith("sweep debug-night: running")
    assert asked(monkeypatch, tmp_path, "--debug", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == shown[1:]


def test_runs_of_one_name_at_once_do_not_share_a_file(tmp_path):
    first = run_status(tmp_path, "CMR: 16-8 / seed 0")
    assert first.folder == tmp_path / "runs" / "CMR-16-8-seed-0"
    progress = Progress(io.StringIO(), (1.0,), (0,), 1, renderers=(first,))
    progress.heartbeat()
    assert run_status(tmp_path, "CMR: 16-8 / seed 0").folder.name == "CMR-16-8-seed-0-2"
    progress.__exit__(None, None, None)
    (first.folder / f".{STATUS_FILE}.0123abcd").touch()  # left by a kill
    assert run_status(tmp_path, "CMR: 16-8 / seed 0").folder == first.folder
    assert [path.name for path in first.folder.iterdir()] == [STATUS_FILE]
    assert run_status(tmp_path, "../..").folder == tmp_path / "runs" / "run"
