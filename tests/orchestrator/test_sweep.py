"""The main job for real, on toys: a cluster, trials, MLflow, the best configuration tested; and a sweep whose trials fail."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, browser, mlflow_server, shown
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning")

TRIALS = 3
# As many trials as are drawn before a model of the objective decides: the order in which they end cannot matter.
SHORT = ("--set", "schedule.base_epochs=2", "--set", "schedule.epochs=2")
COMMAND = ("--trials", str(TRIALS), "--name", "toy", "--sampler", "tpe", *SHORT, "--no-report")
ROOT = Path(__file__).parents[2]
PICTURE = "//img[contains(@src, 'data_train.png') or starts-with(@src, 'blob:')]"
CHART = "//*[contains(@class, 'js-plotly-plot')]//*[name()='svg']"


def started(outputs: Path, *arguments: str, space: str = "tones") -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.sweep", space, "--outputs", str(outputs), *arguments],
        cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def sweep(outputs: Path, *arguments: str, space: str = "tones") -> subprocess.CompletedProcess[str]:
    with started(outputs, *arguments, space=space) as process:
        try:
            stdout, stderr = process.communicate(timeout=500)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    outputs = tmp_path_factory.mktemp("outputs")
    return outputs, sweep(outputs, *COMMAND[:-1])


def runs(outputs: Path, kind: str) -> list[Run]:
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("cavs")
    return list(client.search_runs([experiment.experiment_id], f"tags.kind = '{kind}'"))


def test_a_sweep_ends_well_and_says_where_to_look(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    outputs, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{TRIALS}/{TRIALS} trials done" in process.stdout
    assert "best: val/miou/all" in process.stdout
    assert str(outputs / "sweeps" / "toy") in process.stdout
    assert "make ui" in process.stdout
    assert f"report: {outputs / 'sweeps' / 'toy' / 'report.html'}" in process.stdout
    with open(outputs / "sweeps" / "toy" / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == TRIALS
    values = [float(row["val/miou/all"]) for row in rows]
    assert values == sorted(values, reverse=True)
    best = json.loads((outputs / "sweeps" / "toy" / "best.json").read_text())
    assert best["val/miou/all"] == values[0]
    assert set(best["config"]) == {"method.samples_per_class", "method.resampling_ratio"}


def test_mlflow_holds_parent_trials_and_streams(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    outputs, _ = done
    (parent,) = runs(outputs, "sweep")
    trials, streams = runs(outputs, "trial"), runs(outputs, "stream")
    assert parent.info.status == "FINISHED"
    assert len(trials) == TRIALS
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {parent.info.run_id}
    of_trials = [stream for stream in streams if stream.data.tags["mlflow.parentRunId"] != parent.info.run_id]
    (tested,) = [stream for stream in streams if stream not in of_trials]
    assert {stream.data.tags["mlflow.parentRunId"] for stream in of_trials} == {trial.info.run_id for trial in trials}
    assert {run.info.status for run in [*trials, *streams]} == {"FINISHED"}
    for run in [*trials, *of_trials]:
        assert "method.samples_per_class" in run.data.params
        assert {"val/miou/all", "val/drift/old", "val/stream/forgetting"} <= set(run.data.metrics)
        assert not any(name.startswith("test/") for name in run.data.metrics)  # validation alone chooses
    assert "test/miou/all" in tested.data.metrics
    assert "test/miou/all" in parent.data.metrics
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    for stream in of_trials:
        assert {"miou/all", "miou/old", "miou/new", "miou/foreground"} <= set(stream.data.metrics)
        assert [point.step for point in client.get_metric_history(stream.info.run_id, "miou/all")] == [0, 1]
        losses = client.get_metric_history(stream.info.run_id, "train/audio_visual/cross_entropy")
        assert [point.step for point in losses] == [0, 1, 2, 3]
        assert "train/visual_only/cross_entropy" in stream.data.metrics
        listed = {
            item.path for folder in ("", "task_0", "task_1") for item in client.list_artifacts(stream.info.run_id, folder)
        }
        assert {"config.json", "task_0/memory.json", "task_1/collisions.json", "task_1/confusion_val.json"} <= listed


def test_the_sweeps_run_says_what_came_out_and_how_to_do_it_again(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    outputs, _ = done
    (parent,) = runs(outputs, "sweep")
    tags, metrics = parent.data.tags, parent.data.metrics
    text = tags["mlflow.note.content"]
    best = json.loads((outputs / "sweeps" / "toy" / "best.json").read_text())
    assert f"val/miou/all {best['val/miou/all']:.4f}" in text
    assert "python -m orchestrator.sweep tones --outputs" in text
    assert metrics["objective"] == best["val/miou/all"] == metrics["miou/all"]
    assert {"miou/old", "miou/new", "memory/bytes", "cost/worker_seconds"} <= set(metrics)
    assert any(name.startswith("system/") and name.endswith("/cpu_utilization_percentage") for name in metrics)
    assert parent.inputs.dataset_inputs[0].dataset.name == "tones"
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    assert "data_train.png" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    (output,) = parent.outputs.model_outputs
    folder = Path(client.get_logged_model(output.model_id).artifact_location.removeprefix("file://"))
    names = json.loads((folder / "artifacts" / "checkpoint" / "classes.json").read_text())["classes"]
    assert (len(names), names[0]) == (5, "background")
    for trial in runs(outputs, "trial"):
        assert trial.data.tags["sweep"] == "toy"
        assert trial.data.metrics["objective"] == trial.data.metrics["miou/all"] == trial.data.metrics["val/miou/all"]


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # selenium's sockets
def test_mlflows_pages_show_table_chart_and_picture(
    done: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    outputs, _ = done
    (parent,), stream = runs(outputs, "sweep"), runs(outputs, "stream")[0]
    place = f"#/experiments/{parent.info.experiment_id}/runs"
    with mlflow_server(outputs / "mlflow.db") as address, browser(tmp_path) as page:
        shown(page, f"{address}/version", "body")
        # The assistant opens by itself at the first visit, over the table's columns.
        page.execute_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
        shown(page, f"{address}/{place}?viewStateShareKey=cavs", f"//a[contains(@href, '{parent.info.run_id}')]")
        assert page.find_elements("css selector", ".ag-row button")  # to unfold the trials below it
        for column in ("objective", "miou/all", "miou/old", "miou/new", "memory/bytes", "worker_seconds", "method", "setting"):
            assert page.find_elements("css selector", f'[role="columnheader"][col-id*="{column}"]'), column
        run = f"{address}/{place}/{parent.info.run_id}"
        shown(page, run, "//h3[text()='Again']")
        picture = shown(page, f"{run}/artifacts/data_train.png", PICTURE)
        WebDriverWait(page, 60).until(lambda _: page.execute_script("return arguments[0].naturalWidth", picture) > 100)
        shown(page, f"{address}/{place}/{stream.info.run_id}/model-metrics", CHART)


def test_the_base_task_is_trained_once_for_all_trials(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    outputs, _ = done
    networks = [json.loads(path.read_text()) for path in (outputs / "store" / "networks").glob("*/about.json")]
    base = [about for about in networks if about["num_classes"] == 3]
    assert sorted(about["network"] for about in base) == ["audio_visual", "visual_only"]
    assert all(about["network"] == "audio_visual" for about in networks if about not in base)
    assert 1 <= len(networks) - len(base) <= TRIALS


def test_nothing_is_left_behind(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    outputs, _ = done
    assert not list((outputs / "scratch").iterdir())
    assert not [path for path in outputs.rglob(".*") if path.name != ".mlflow.db.lock" and "tune" not in path.parts]


def test_a_trial_that_fails_is_marked_and_the_sweep_says_so(
    done: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    process = sweep(tmp_path, "--trials", "1", "--set", "schedule.learning_rate=1e30", "--set", "schedule.base_epochs=2")
    assert process.returncode == 1, process.stdout + process.stderr
    assert "loss is not finite" in process.stdout
    assert "no trial ended well" in process.stdout
    assert "report.html" in process.stdout  # of what there is
    (trial,) = runs(tmp_path, "trial")
    assert trial.info.status == "FAILED"
    assert "loss is not finite" in trial.data.tags["failure"]
    assert {run.info.status for run in runs(tmp_path, "stream")} == {"FAILED"}
    assert runs(tmp_path, "sweep")[0].info.status == "FAILED"


@pytest.mark.faults
def test_a_sweep_killed_in_the_middle_goes_on_and_ends_like_an_undisturbed_one(
    done: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    process = started(tmp_path, *COMMAND)
    assert process.stdout is not None
    for line in process.stdout:
        if f"1/{TRIALS} trials done" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    ledger = json.loads((tmp_path / "sweeps" / "toy" / "sweep.json").read_text())
    ended = [number for number, trial in ledger["trials"].items() if trial["state"] == "FINISHED"]
    assert len(ended) < TRIALS
    again = sweep(tmp_path, *COMMAND)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [number for number in ledger["trials"] if f"trial {number}: before" in again.stdout] == ended
    undisturbed, _ = done
    ours, theirs = ((root / "sweeps" / "toy" / "trials.csv").read_text() for root in (tmp_path, undisturbed))
    assert ours == theirs
    (parent,) = runs(tmp_path, "sweep")
    trials = runs(tmp_path, "trial")
    assert sorted(trial.data.tags["trial"] for trial in trials) == ["1", "2", "3"]
    streams = runs(tmp_path, "stream")
    assert len(streams) == TRIALS + 1  # and the best one on test
    assert {run.info.status for run in (parent, *trials, *streams)} == {"FINISHED"}
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run in (*trials, *streams):
        assert [point.step for point in client.get_metric_history(run.info.run_id, "val/miou/all")] == [0, 1]


def test_a_finished_sweep_has_nothing_to_do_and_another_configuration_is_refused(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    outputs, first = done
    before = (outputs / "sweeps" / "toy" / "trials.csv").read_text()
    again = sweep(outputs, *COMMAND, "--set", "resources.cpus_per_worker=2")  # resources never change a result
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Ray cluster" in first.stdout
    assert "Ray cluster" not in again.stdout
    assert (outputs / "sweeps" / "toy" / "trials.csv").read_text() == before
    assert len(runs(outputs, "trial")) == TRIALS
    assert runs(outputs, "sweep")[0].info.status == "FINISHED"
    other = sweep(outputs, *COMMAND, "--set", "schedule.epochs=3")
    assert other.returncode == 2
    assert "'toy' was begun with another configuration: experiment.schedule.epochs: 2 -> 3" in other.stderr


def test_more_workers_than_the_cluster_has(tmp_path: Path) -> None:
    process = sweep(tmp_path, "--set", "resources.workers=512")
    assert process.returncode == 2
    assert "512 workers need 512 CPUs, the cluster has" in process.stderr
    assert "Traceback" not in process.stderr
