"""`compare` on toys: shared work, one table, resumed where it was cut off, failures told and the others finished."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cavs_model import train
from cavs_model.errors import InputError, OutageError
from orchestrator import cli, compare, local_backend, outage
from orchestrator.cli import load_space
from orchestrator.compare import entries_of, mean_work, streams_of
from orchestrator.comparison import PLAN_FILE
from orchestrator.experiment import file_name
from orchestrator.ledger import held
from orchestrator.progress import planned_work

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning")

ROOT = Path(__file__).parents[2]
SPACE = '''
"""Toys."""
import dataclasses
from search_spaces.tones import BASE as TONES, OBJECTIVES, define
from cavs_model.train import Schedule
from cavs_model.datasets.tones import Tones
BASE = dataclasses.replace(
    TONES,
    benchmark=Tones(num_classes=4, train_clips=16, val_clips=8, test_clips=8),
    schedule=Schedule(base_epochs=1, epochs=1, batch_size=8),
)
VARIANTS = {"lwf": {"method": "lwf"}, "plain": {"method": "finetune"}, "cmr": {"method.samples_per_class": 2}}
'''


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("spaces") / "compared_toys.py"
    path.write_text(SPACE)
    return str(path)


def run(monkeypatch: pytest.MonkeyPatch, outputs: Path, *arguments: str) -> int:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", ["compare", *arguments, "--local", "--no-report", "--outputs", str(outputs)])
    return cli.main(compare.compare)


def runs(outputs: Path, kind: str) -> list:
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("cavs")
    return list(client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'"))


def test_entries_are_the_variants_with_the_command_lines_overrides_last(space: str) -> None:
    entries = entries_of([load_space(space)], (), {"schedule.epochs": "2"})
    assert [file_name(each.method) for each in entries.values()] == ["lwf", "finetune", "cmr"]
    assert entries["cmr"].method.samples_per_class == 2  # type: ignore[attr-defined]
    assert {each.schedule.epochs for each in entries.values()} == {2}


def test_a_comparison_ends_with_a_table_and_everything_in_mlflow(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, space, "--seeds", "0,1", "--name", "toys", "--reference", "plain") == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "comparisons" / "toys"
    assert (folder / "table.md").read_text() in shown
    with open(folder / "streams.csv") as file:
        lines = list(csv.DictReader(file))
    assert {(line["entry"], line["seed"]) for line in lines} == {
        (entry, seed) for entry in ("lwf", "plain", "cmr", "background alone") for seed in ("0", "1")
    }
    (parent,) = runs(tmp_path, "comparison")
    assert parent.info.status == "FINISHED"
    streams = runs(tmp_path, "stream")
    assert {run.data.tags["mlflow.parentRunId"] for run in streams} == {parent.info.run_id}
    assert {run.data.tags["mlflow.runName"] for run in streams} == {
        f"{entry} 2-2 seed {seed}" for entry in ("lwf", "plain", "cmr") for seed in (0, 1)
    }
    in_csv = {(line["entry"], line["seed"]): float(line["val/miou/all"]) for line in lines}
    for each in streams:
        assert each.data.metrics["miou/all"] == in_csv[each.data.tags["entry"], each.data.tags["seed"]]
    assert "lwf 2-2/val/miou/all" in parent.data.metrics
    # Two seeds' base tasks, audio-visual and visual-only, and what each entry learns later: nothing else is trained.
    assert len(list((tmp_path / "store" / "networks").iterdir())) <= 2 * (2 + 3)


def test_on_a_cluster_streams_run_side_by_side_with_the_same_numbers(space: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    shared = [sys.executable, "-m", "orchestrator.compare", space, "--seeds", "0", "--only", "plain", "--only", "lwf",
              "--no-report"]  # fmt: skip
    for arguments in (
        ["--name", "ray", "--outputs", str(tmp_path / "a")],
        ["--local", "--name", "ray", "--outputs", str(tmp_path / "b")],
    ):
        process = subprocess.run(
            shared + arguments, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
    tables = [(tmp_path / each / "comparisons" / "ray" / "streams.csv").read_text() for each in "ab"]
    on_ray, here = ([_without_cost(line) for line in csv.DictReader(io.StringIO(text))] for text in tables)
    assert on_ray == here


def _without_cost(line: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in line.items() if name != "worker_seconds"}


def test_what_was_cut_off_goes_on_in_the_same_runs(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (space, "--seeds", "0", "--name", "cut", "--only", "plain", "--only", "lwf")
    seen = []

    def interrupted(*given: object) -> dict[str, float]:
        seen.append(given)
        if len(seen) == 2:
            half_written.touch()  # as by a process of its cluster that ends with it
            raise KeyboardInterrupt
        return values_of(*given)

    values_of = compare.values_of
    folder = tmp_path / "comparisons" / "cut"
    folder.mkdir(parents=True)
    half_written = tmp_path / "store" / "scores" / ".abc.json.0123abcd"
    (folder / f".{PLAN_FILE}.0123abcd").touch()  # killed once before its first ledger was whole
    with held(folder, fresh=False):
        assert run(monkeypatch, tmp_path, *arguments) == 2
        assert "is running in another process" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(compare, "values_of", interrupted)
        assert run(patch, tmp_path, *arguments) == 130
    assert not half_written.exists()
    before = {each.info.run_id: each.info.status for each in runs(tmp_path, "stream")}
    assert sorted(before.values()) == ["FINISHED", "KILLED"]
    capsys.readouterr()
    assert run(monkeypatch, tmp_path, *arguments) == 0
    assert "2 streams, 1 done before" in capsys.readouterr().out
    after = {each.info.run_id: each.info.status for each in runs(tmp_path, "stream")}
    assert after == dict.fromkeys(before, "FINISHED")
    (parent,) = runs(tmp_path, "comparison")
    assert parent.info.status == "FINISHED"
    assert not logged_twice(tmp_path)


def logged_twice(outputs: Path) -> list[tuple[str, str]]:
    """Runs and metrics of them that have a step twice."""
    client, found = MlflowClient(f"sqlite:///{outputs}/mlflow.db"), []
    for each in runs(outputs, "stream"):
        for name in each.data.metrics:
            steps = [point.step for point in client.get_metric_history(each.info.run_id, name)]
            if len(steps) != len(set(steps)):
                found.append((each.info.run_id, name))
    return found


def test_an_interrupt_while_the_run_is_described_leaves_no_second_one(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (space, "--seeds", "0", "--name", "cut", "--only", "plain")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare.Tracker, "data_picture", interrupted)
        assert run(patch, tmp_path, *arguments) == 130
    (parent,) = runs(tmp_path, "comparison")
    assert parent.info.status == "KILLED"
    assert run(monkeypatch, tmp_path, *arguments) == 0
    (again,) = runs(tmp_path, "comparison")
    assert (again.info.run_id, again.info.status) == (parent.info.run_id, "FINISHED")
    assert {"data_train.png", "environment.json", "config.json"} <= {
        each.path for each in MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").list_artifacts(again.info.run_id)
    }


def test_an_outage_is_waited_for_in_the_same_runs(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [2]  # the first stream's first try, and the first of the second task

    def full(job: object, *more: object) -> object:
        if left[0] and (left[0] == 2 or job.task.index == 1):  # type: ignore[attr-defined]
            left[0] -= 1
            raise OutageError("no space left")
        return trained(job, *more)

    trained = local_backend.train_task
    monkeypatch.setattr(local_backend, "train_task", full)
    monkeypatch.setattr(outage, "RETRY_SECONDS", 0.01)
    assert run(monkeypatch, tmp_path, space, "--seeds", "0", "--name", "full", "--only", "plain") == 0
    shown = capsys.readouterr().out
    assert shown.count("no space left; tried again") == 2
    assert len(runs(tmp_path, "stream")) == 1
    assert not logged_twice(tmp_path)
    assert re.search(r"4 outcomes computed \(\d+ worker-seconds\), 0 reused \(0", shown)


def test_an_outage_that_lasts_ends_with_what_to_do(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OutageError("no space left")

    arguments = (space, "--seeds", "0", "--name", "full", "--only", "plain")
    with monkeypatch.context() as patch:
        patch.setattr(local_backend, "train_task", full)
        assert run(patch, tmp_path, *arguments, "--wait-out", "0") == 2
    assert "error: no space left" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, *arguments) == 0


def test_another_configuration_under_the_same_name_is_refused_with_the_difference(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (space, "--seeds", "0", "--name", "one", "--only", "plain")
    assert run(monkeypatch, tmp_path, *arguments) == 0
    assert run(monkeypatch, tmp_path, *arguments, "--set", "resources.workers=2") == 0  # no part of the result
    assert run(monkeypatch, tmp_path, *arguments, "--set", "schedule.epochs=2") == 2
    message = capsys.readouterr().err
    assert "schedule.epochs: 1 -> 2" in message
    assert "--fresh" in message
    assert run(monkeypatch, tmp_path, *arguments, "--set", "schedule.epochs=2", "--fresh") == 0
    plan = json.loads((tmp_path / "comparisons" / "one" / "comparison.json").read_text())["plan"]
    assert plan["streams"]["plain 2-2 seed 0"]["schedule.epochs"] == 2


def test_a_failed_stream_is_told_and_the_others_finish(
    space: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train.global_means

    def diverging(terms, worker):  # type: ignore[no-untyped-def]
        if len(terms) > 1:  # lwf beyond its base task
            return {name: value * float("nan") for name, value in whole(terms, worker).items()}
        return whole(terms, worker)

    with monkeypatch.context() as patch:
        patch.setattr(train, "global_means", diverging)
        assert run(patch, tmp_path, space, "--seeds", "0", "--name", "half", "--only", "plain", "--only", "lwf") == 1
    shown = capsys.readouterr().out
    assert "DivergedError" in shown
    assert "seeds 0 failed" in shown
    states = {each.data.tags["entry"]: each.info.status for each in runs(tmp_path, "stream")}
    assert states == {"plain": "FINISHED", "lwf": "FAILED"}
    (parent,) = runs(tmp_path, "comparison")
    assert parent.info.status == "FAILED"
    # The same command tries again what failed, and only that.
    assert run(monkeypatch, tmp_path, space, "--seeds", "0", "--name", "half", "--only", "plain", "--only", "lwf") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "plop"), ("--only", "'plop'", "lwf")),
        (("--reference", "plop"), ("--reference", "'plop'", "plain")),
        (("--seeds", "0,x"), ("--seeds", "0,1,2")),
        (("--seeds", "1,1"), ("--seeds", "distinct")),
        (("--setting", "3-2"), ("3-2", "2-2")),
        (("--name", "a/b"), ("--name", "a/b")),
    ],
)
def test_bad_arguments_are_told_with_the_valid_ones(
    space: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, str],
    words: tuple[str, ...],
) -> None:
    assert run(monkeypatch, tmp_path, space, *arguments) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_the_base_task_is_planned_once_a_setting_and_seed(space: str) -> None:
    streams = streams_of(entries_of([load_space(space)], (), {}), ("2-2",), (0, 1))
    plans = {each.entry: planned_work(each.experiment) for each in streams}
    bases, later = max(base for base, _ in plans.values()), sum(other for _, other in plans.values())
    assert mean_work(streams) == pytest.approx((2 * bases + 2 * later) / 6)


def test_several_spaces_name_their_variants(space: str) -> None:
    entries = entries_of([load_space(space), load_space("tones")], (), {})
    assert list(entries) == ["compared_toys: lwf", "compared_toys: plain", "compared_toys: cmr", "tones"]


def test_streams_come_seed_by_seed_over_settings(space: str) -> None:
    entries = entries_of([load_space(space)], ("plain",), {})
    streams = streams_of(entries, ("2-2", "3-1"), (0, 1))
    assert [(each.setting, each.seed) for each in streams] == [("2-2", 0), ("3-1", 0), ("2-2", 1), ("3-1", 1)]
    with pytest.raises(InputError, match="5-5"):
        streams_of(entries, ("5-5",), (0,))
