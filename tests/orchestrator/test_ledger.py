"""What a sweep remembers, and what the driver makes of its trials' events."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cavs_model.errors import InputError
from orchestrator import sweep
from orchestrator.experiment import Objective
from orchestrator.ledger import LEDGER_FILE, LOCK_FILE, Ledger, Trial, held, is_begun
from orchestrator.progress import Progress
from orchestrator.store import Reuse
from orchestrator.sweep import TrialLog, best_of, pareto_front, shared_by
from search_spaces.tones import BASE

PLAN = {"experiment": {"schedule.epochs": 2, "seeds": (0, 1)}, "sampler": "gp"}


def test_what_was_noted_is_found_again(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, PLAN)
    ledger.update(parent="p", test_runs={"1 0": "t"})
    ledger.begin(1, {"a": 0.1}, {})
    ledger.change(1, metrics={"computed_worker_seconds": 3.0}, logged={"r": 1}, run="r")
    ledger.begin(1, {"a": 0.1}, {})  # cut off and begun again
    ledger.change(1, metrics={"computed_worker_seconds": 2.0})
    found = Ledger.open(tmp_path, PLAN)
    assert found == ledger
    assert found.trials[1].run == "r"
    assert found.worker_seconds() == 5.0


def test_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    Ledger.open(tmp_path, PLAN).update(parent="p")
    other = {**PLAN, "experiment": {"schedule.epochs": 3, "seeds": (0, 1)}}
    with pytest.raises(
        InputError, match=r"another configuration: experiment.schedule.epochs: 2 -> 3; use another name or --fresh"
    ):
        Ledger.open(tmp_path, other)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"trials": {"x": {}}}'])
def test_a_damaged_ledger_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(InputError, match=f"damaged file {tmp_path / LEDGER_FILE}.*--fresh"):
        Ledger.open(tmp_path, PLAN)


def test_a_folder_that_is_no_sweep_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"holds no sweep\.json"):
        Ledger.open(tmp_path, PLAN)


def test_one_process_at_a_time_and_fresh_forgets(tmp_path: Path) -> None:
    with held(tmp_path, fresh=False):
        Ledger.open(tmp_path, PLAN).update(parent="p")
        (tmp_path / "tune").mkdir()
        with pytest.raises(InputError, match="is running in another process"), held(tmp_path, fresh=True):
            pass
        assert (tmp_path / LEDGER_FILE).exists()
    with held(tmp_path, fresh=True):
        assert Ledger.open(tmp_path, {"another": "plan"}).parent == ""
        assert not (tmp_path / "tune").exists()


def test_what_a_kill_left_half_written_goes_and_hinders_nothing(tmp_path: Path) -> None:
    for name in ("status.json", LEDGER_FILE):  # SIGKILL before a sweep's first ledger was whole
        (tmp_path / f".{name}.0123abcd").touch()
    with held(tmp_path, fresh=False):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
        assert not is_begun(tmp_path, LEDGER_FILE)
    others = [tmp_path / name for name in (".report.html.0123abcd", ".gitignore")]
    for path in others:
        path.touch()
    with held(tmp_path, fresh=False):
        assert all(path.exists() for path in others)


class Recorder:
    """A tracker that notes what it was told; the next call of a name in `broken` fails."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.broken: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> str:
            if name in self.broken:
                self.broken.remove(name)
                raise OSError("no server")
            self.calls.append((name, *arguments))
            return {"child": ""}.get(name, f"run {len(self.calls)}")

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "trial": 1, "label": "trial 1", "text": "text", **fields}


START = event("start", experiment=BASE, config={})
FAILED = event("trial", status="FAILED", final=False, error="a worker died", value=None)


def log_of(folder: Path, retries: int) -> tuple[TrialLog, Recorder, io.StringIO]:
    ledger, tracker, out = Ledger(folder, {"objectives": [{"metric": "x", "mode": "max"}]}), Recorder(), io.StringIO()
    ledger.begin(1, {"method.samples_per_class": 1}, {})
    progress = Progress(out, (1.0, 1.0), (0,), 1)
    return TrialLog(tracker, ledger, progress, retries), tracker, out  # type: ignore[arg-type]


def test_a_failed_trial_is_tried_again_as_often_as_told(tmp_path: Path) -> None:
    log, tracker, out = log_of(tmp_path, retries=1)
    for each in (START, FAILED, START):
        log(each)
    assert log.ledger.trials[1].state == "RUNNING"
    assert "trying again, 1 of 1" in out.getvalue()
    assert len(tracker.named("start")) == 1  # one run for both attempts
    log(FAILED)
    assert log.ledger.trials[1].state == "FAILED"
    assert log.ledger.trials[1].error == "a worker died"
    assert {call[1] for call in tracker.named("end")} == {"FAILED"}


def test_what_an_attempt_computed_is_no_reuse_of_the_next(tmp_path: Path) -> None:
    """Neither of one that Tune tries again nor of a sweep that goes on: both find in the store what was computed before."""
    log, _, _ = log_of(tmp_path, retries=1)

    def report(computed: int, reused: int) -> dict[str, Any]:
        found = {"computed_outcomes": computed, "computed_worker_seconds": 10.0 * computed}
        return {**found, "reused_outcomes": reused, "reused_worker_seconds": 10.0 * reused, "x": 1.0}

    log(START)
    log(event("report", metrics=report(computed=2, reused=3), task=0))
    log(FAILED)
    log(START)
    log(event("report", metrics=report(computed=1, reused=5), task=1))  # two of the five are its own
    trial = log.ledger.trials[1]
    assert trial.reuse == Reuse(3, 3, 30.0, 30.0)
    assert log.ledger.worker_seconds() == 30.0
    again = Ledger.open(tmp_path, log.ledger.plan)
    again.begin(1, trial.config, trial.attrs)
    again.change(1, metrics=report(computed=1, reused=6))
    assert again.trials[1].reuse == Reuse(4, 3, 40.0, 30.0)
    assert shared_by(again.trials) == "4 outcomes computed (40 worker-seconds), 3 reused (30 worker-seconds)"


@dataclass
class Outcome:
    """As much of a task's outcome as a test of the best configuration looks at."""

    seed: int
    task: Any

    def headline(self) -> str:
        return f"task {self.task.index}"


def test_testing_that_is_cut_off_ends_its_runs_and_logs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, tracker, _ = log_of(tmp_path, retries=0)
    log.ledger.update(parent="parent")
    cut = [True]

    def stream(*arguments: Any, **options: Any) -> Iterator[Outcome]:
        yield Outcome(0, SimpleNamespace(index=0))
        if cut[0]:
            raise KeyboardInterrupt
        yield Outcome(0, SimpleNamespace(index=1))
        raise RuntimeError("far enough")

    monkeypatch.setattr(sweep, "run_stream", stream)
    monkeypatch.setattr(sweep, "record_of", lambda outcome: outcome.task.index)
    monkeypatch.setattr(sweep, "mean_over_seeds", lambda outcomes: {"miou": 1.0})
    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            sweep.test(BASE, 1, None, tracker, log.ledger, log.progress)  # type: ignore[arg-type]
        cut[0] = False
    run = log.ledger.test_runs["1 0"]
    assert tracker.named("record") == [(run, 0), (run, 1)]
    assert [call[2] for call in tracker.named("metrics")] == [0, 1]
    assert tracker.named("end") == [(run, "KILLED"), (run, "KILLED")]
    assert tracker.named("resume") == [(run,)]
    assert Ledger.open(tmp_path, log.ledger.plan).test_logged == {"1 0": 1, "1": 1}


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    log, _, _ = log_of(tmp_path, retries=5)
    log(START)
    log({**FAILED, "final": True})
    assert log.ledger.trials[1].state == "FAILED"


def test_a_trial_whose_driver_died_is_failed_and_one_that_was_stopped_goes_on(tmp_path: Path) -> None:
    log, tracker, _ = log_of(tmp_path, retries=0)
    log(START)
    log.finish({1: "the actor died"})
    assert (log.ledger.trials[1].state, log.ledger.trials[1].error) == ("FAILED", "the actor died")
    log, tracker, _ = log_of(tmp_path, retries=0)
    log(START)
    log.finish({})
    assert log.ledger.trials[1].state == "RUNNING"
    assert {call[1] for call in tracker.named("end")} == {"KILLED"}


def test_what_mlflow_has_is_not_logged_again_and_what_it_refused_is(tmp_path: Path) -> None:
    log, tracker, _ = log_of(tmp_path, retries=0)
    log(START)
    report = event("report", metrics={"x": 1.0}, task=0)
    log(report)
    tracker.broken = {"metrics"}
    log({**report, "task": 1, "metrics": {"x": 2.0}})
    assert json.loads((tmp_path / LEDGER_FILE).read_text())["trials"]["1"]["metrics"] == {"x": 1.0}  # MLflow first
    log(report)  # as of a trial that began again
    assert [call[1:] for call in tracker.named("metrics")] == [
        ({"x": 1.0, "objective": 1.0}, 0),
        ({"x": 2.0, "objective": 2.0}, 1),
    ]


def trial(state: Any = "FINISHED", **metrics: float) -> Trial:
    return Trial({}, state, metrics)


def test_the_front_is_what_nothing_beats() -> None:
    objectives = (Objective("score", "max"), Objective("bytes", "min"))
    trials = {
        1: trial(score=0.5, bytes=10.0),
        2: trial(score=0.5, bytes=20.0),  # beaten by 1
        3: trial(score=0.9, bytes=90.0),
        4: trial(score=0.1, bytes=10.0),  # beaten by 1
        5: trial(score=0.5, bytes=10.0),  # equals 1
        6: trial("FAILED", score=2.0, bytes=1.0),
        7: trial("RUNNING", score=2.0, bytes=1.0),
        8: trial(score=float("nan"), bytes=0.0),
    }
    assert pareto_front(trials, objectives) == [3, 1, 5]
    assert best_of(trials, objectives[0]) == 3
    assert best_of(trials, objectives[1]) == 8  # has no score, but that is not asked for
    assert best_of({}, objectives[0]) is None
