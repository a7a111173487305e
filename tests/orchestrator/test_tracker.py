"""What reaches MLflow, read back through its client from a real database."""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient

from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.cache import open_split
from cavs_model.datasets.contact_sheet import contact_sheet
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.methods.finetune import Finetune
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY, Memory, Rehearsal, Row, ScoreTable, State
from orchestrator import tracker as tracker_module
from orchestrator.experiment import Experiment, fingerprint, flatten
from orchestrator.stream import TaskOutcome, run_stream
from orchestrator.tracker import EXPERIMENT, Record, Tracker, record_of, tags_of, tracking_uri, without_password

# MLflow's own, with the SQLAlchemy it allows.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

TONES = Tones()
BASE_TASK, TASK = Scenario(setting="2-2").tasks(TONES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("out puts")


@pytest.fixture(scope="module")
def tracker(folder):
    return Tracker(f"sqlite:///{folder}/deep er/mlflow.db", folder / "artifacts")


@pytest.fixture(scope="module")
def client(tracker):
    return MlflowClient(tracking_uri=tracker.uri)


def text_of(client, run_id, path, tmp_path):
    return Path(client.download_artifacts(run_id, path, str(tmp_path))).read_text()


def test_a_fresh_database_is_set_up_once(tracker, client, folder):
    assert (folder / "deep er" / "mlflow.db").is_file()
    again = Tracker(tracker.uri, folder / "elsewhere")
    assert again.experiment_id == tracker.experiment_id
    assert [found.name for found in client.search_experiments() if found.name == EXPERIMENT] == [EXPERIMENT]
    assert client.get_experiment(tracker.experiment_id).artifact_location == (folder / "artifacts").as_uri()
    assert not (folder / "elsewhere").exists()


def test_processes_set_a_database_up_one_after_another(tracker, folder):
    done = threading.Event()
    thread = threading.Thread(target=lambda: (Tracker(tracker.uri, folder), done.set()), daemon=True)
    with open(folder / "deep er" / ".mlflow.db.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        assert not done.wait(0.5)
        fcntl.flock(file, fcntl.LOCK_UN)
        thread.join(20)
    assert done.is_set()


def test_runs_are_parent_child_and_grandchild(tracker, client):
    experiment = dataclasses.replace(Experiment(), benchmark=TONES)
    sweep = tracker.start("a sweep", "sweep", {"a": 1}, tags={"space": "tones"})
    trial = tracker.start("trial 1", "trial", {}, sweep)
    stream = tracker.stream(experiment, 3, "trial 1 seed 3", trial)
    runs = [client.get_run(run) for run in (sweep, trial, stream)]
    assert [run.data.tags["kind"] for run in runs] == ["sweep", "trial", "stream"]
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs] == [None, sweep, trial]
    assert [run.info.run_name for run in runs] == ["a sweep", "trial 1", "trial 1 seed 3"]
    assert runs[0].data.tags["space"] == "tones"
    tags = {"method": "cmr", "benchmark": "tones", "setting": "16-8", "seed": "3"}
    assert tags.items() <= runs[2].data.tags.items()
    assert runs[2].data.tags["benchmark.fingerprint"] == TONES.fingerprint()[:16]
    assert tags_of(experiment)["benchmark"] == "tones"
    found = client.search_runs([tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{sweep}'")
    assert [run.info.run_id for run in found] == [trial]


def test_a_stream_has_its_configuration_as_parameters_and_as_an_artifact(tracker, client, tmp_path):
    run = tracker.stream(Experiment(), 0, "x")
    params = client.get_run(run).data.params
    assert params.keys() == {*flatten(Experiment()), "seed"}
    assert (params["method"], params["method.base.pod_scales"], params["init_seed"]) == ("cmr", "1,2,4", "None")
    config = json.loads(text_of(client, run, "config.json", tmp_path))
    assert config == json.loads(json.dumps({**flatten(Experiment()), "seed": 0}))


def test_many_and_long_parameters(tracker, client):
    params = {f"p.{index}": index for index in range(250)} | {"long": "x" * 20_000, "tuple": ("a", "b"), "empty": ()}
    read = client.get_run(tracker.start("many", "run", params)).data.params
    assert len(read) == 253
    assert (read["p.249"], read["tuple"], read["empty"]) == ("249", "a,b", "")
    assert read["long"] == "x" * tracker_module.PARAM_CHARACTERS


def test_metrics_have_steps_and_come_in_any_number(tracker, client):
    run = tracker.start("metrics", "run", {})
    for step in range(3):
        tracker.metrics(run, {"val/miou/all": 0.25 * step, "count": step}, step)
    history = client.get_metric_history(run, "val/miou/all")
    assert [(point.step, point.value) for point in history] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    losses = tuple(("train/audio_visual/loss", 1 / (epoch + 1), epoch) for epoch in range(2500))
    tracker.record(run, Record({"miou/all": 0.5}, losses, task=4))
    read = client.get_metric_history(run, "train/audio_visual/loss")
    assert sorted((point.step, point.value) for point in read) == [(epoch, value) for _, value, epoch in losses]
    assert [(point.step, point.value) for point in client.get_metric_history(run, "miou/all")] == [(4, 0.5)]
    tracker.metrics(run, {}, 0)


def test_artifacts_are_read_back(tracker, client, tmp_path):
    run = tracker.start("artifacts", "run", {})
    tracker.record(run, Record(artifacts={"task_0/memory.json": {"rows": [1]}, "notes.txt": "plain é"}))
    assert json.loads(text_of(client, run, "task_0/memory.json", tmp_path)) == {"rows": [1]}
    assert text_of(client, run, "notes.txt", tmp_path) == "plain é"
    assert [item.path for item in client.list_artifacts(run)] == ["notes.txt", "task_0"]


def test_statuses_and_tags(tracker, client):
    for status in ("FINISHED", "FAILED", "KILLED"):
        run = tracker.start("status", "run", {})
        assert client.get_run(run).info.status == "RUNNING"
        tracker.tag(run, {"failure": "x" * 4000})
        tracker.end(run, status)
        assert client.get_run(run).info.status == status
        assert len(client.get_run(run).data.tags["failure"]) == 4000
    tracker.end(run := tracker.start("status", "run", {}))
    assert client.get_run(run).info.status == "FINISHED"


def test_no_run_is_left_active_and_the_default_store_is_not_touched(tracker):
    tracker.start("x", "run", {})
    assert mlflow.active_run() is None


def test_a_deleted_experiment_is_told(tracker, client, folder, tmp_path):
    shutil.copy(folder / "deep er" / "mlflow.db", tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(tracking_uri=uri).delete_experiment(tracker.experiment_id)
    with pytest.raises(InputError, match=r"'cavs' is deleted; restore it"):
        Tracker(uri, tmp_path)


def test_runs_carry_what_they_are_filtered_by(tracker, client, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/x/orchestrator/sweep.py", "tones", "--set", "a b=1"])
    tracker_module._origin.cache_clear()
    tracker.belongs_to("sweep", "weekend")
    tags = client.get_run(tracker.start("tagged", "trial", {})).data.tags
    tracker.belongs_to("", "")
    tracker._common, _ = {}, tracker_module._origin.cache_clear()
    assert (tags["sweep"], tags["kind"]) == ("weekend", "trial")
    assert tags["command"] == "python -m orchestrator.sweep tones --set 'a b=1'"
    assert tags["mlflow.source.name"] == "python -m orchestrator.sweep"
    if "commit" in tags:
        assert tags["mlflow.source.git.commit"] == tags["commit"].removesuffix("-dirty")


def test_the_experiment_offers_a_table_with_the_columns_that_matter(tracker, client):
    tags = client.get_experiment(tracker.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.cavs"])
    assert {"tags.`method`", "metrics.`objective`", "metrics.`miou/old`", "metrics.`memory/bytes`"} <= set(
        view["selectedColumns"]
    )
    assert tracker.view_path in tags["mlflow.note.content"]
    assert tracker.view_path in tracker.open_hint


def test_a_stream_names_its_data_set_with_the_fingerprint(tracker, client):
    run = tracker.stream(dataclasses.replace(Experiment(), benchmark=TONES), 0, "data")
    (logged,) = client.get_run(run).inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("tones", TONES.fingerprint()[:16])
    assert json.loads(logged.dataset.source)["benchmark"]["train_clips"] == TONES.train_clips
    assert json.loads(logged.dataset.profile)["clips of val"] == TONES.val_clips


def test_notes_are_cut_at_a_line_and_pictures_are_artifacts(tracker, client, tmp_path):
    run = tracker.start("noted", "sweep", {})
    tracker.note(run, "line\n" * 2000)
    text = client.get_run(run).data.tags["mlflow.note.content"]
    assert set(text.splitlines()) == {"line", "..."}
    tracker.image(run, "figures/data.png", contact_sheet(TONES, "train", 2))
    assert Path(client.download_artifacts(run, "figures/data.png", str(tmp_path))).read_bytes().startswith(b"\x89PNG")


def test_system_metrics_have_the_seconds_since_the_run_began_as_step(tracker, client):
    run = tracker.start("system", "sweep", {})
    began = client.get_run(run).info.start_time / 1000
    for seconds in (2, 17):
        tracker.system(run, {"system/10.0.0.1/cpu_utilization_percentage": 50.0}, began + seconds + 0.5)
    history = client.get_metric_history(run, "system/10.0.0.1/cpu_utilization_percentage")
    assert [point.step for point in history] == [2, 17]


@pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's, of its own classes
def test_a_model_is_loaded_and_registered_without_a_pickle(tracker, client, tmp_path, monkeypatch):
    config = NetworkConfig("tiny", "none", "tiny", audio_dim=16, width=16)
    network = AVSegmenter(config, 3, AUDIO_VISUAL).eval()
    about = About(AUDIO_VISUAL, 3, dataclasses.asdict(config))
    checkpoint.save(tmp_path / "network", network.state_dict(), about)
    run = tracker.start("with a model", "sweep", {"method": "cmr"})
    facts = {"classes": ["background", "a", "b"], "image_size_px": 32, "frames": 2}
    for _ in range(2):  # what goes on does not log it twice
        tracker.model(run, tmp_path / "network", facts, {"objective": 0.5}, 1)
    assert len(client.get_run(run).outputs.model_outputs) == 1
    clips = TONES.render("val", [0, 1])
    # A model's files are looked up in the store of this variable, whatever store is given besides.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"runs:/{run}/model", dst_path=str(tmp_path)))
    version = mlflow.register_model(f"runs:/{run}/model", "segmenter")
    loaded = mlflow.pyfunc.load_model(f"models:/segmenter/{version.version}")
    answer = loaded.predict({"image": clips.image, "audio": clips.audio.astype(np.float32)})
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    (found,) = [path.parent for path in files if path.name == "about.json"]
    assert checkpoint.read(found).about == about
    assert json.loads((found / "classes.json").read_text()) == facts
    with torch.no_grad():
        batch = open_split(TONES, "val", tmp_path).batch(["val-00000", "val-00001"], [False] * 2, [TASK.seen_rule.table()] * 2)
        assert np.array_equal(answer, network(batch).logits.argmax(dim=2).numpy())


# The record of a task.


def outcome(base=False):
    rows = {
        1: (Row("train-00001", 1, {"delta": 0.01, "frames": 2.0}), Row("train-00005", 1, {"delta": -0.02, "frames": 1.0})),
        2: (Row("train-00001", 2, {"delta": 0.01, "frames": 2.0}),),
    }
    memory = Memory(rows)
    abouts = {
        AUDIO_VISUAL: About(AUDIO_VISUAL, 5, {}, ({"loss": 2.0, "pod": 0.5}, {"loss": 1.0, "pod": 0.25}), 20, 3.0, 2),
        VISUAL_ONLY: About(VISUAL_ONLY, 5, {}, ({"loss": 4.0}, {"loss": 3.0}), 20, 5.0, 1),
    }
    rehearsal = Rehearsal(
        rows=memory.rows + rows[2],
        drawn=rows[2],
        table=tuple(
            {"class": float(c), "collisions": 3.0 - c, "frequency": 0.6, "probability": 0.5, "stored": 1.0, "drawn": 1.0}
            for c in (1, 2)
        ),
        pairs=({"old_class": 2.0, "new_class": 3.0, "videos": 7.0},),
    )
    classes = 3 if base else 5
    counts = {"val": np.eye(classes, dtype=np.int64) * 10, "test/unseen": np.ones((classes, classes), dtype=np.int64)}
    counts["val"][1, 2] = 10
    # After the base task half of the background is taken for class 2.
    earlier = {split: np.array([[10, 0, 10], [0, 10, 0], [0, 0, 10]]).tolist() for split in counts}
    return TaskOutcome(
        4, BASE_TASK if base else TASK, 2, ("background", *TONES.class_names()), 3, State({AUDIO_VISUAL: "x"}, memory),
        ScoreTable(()), Rehearsal() if base else rehearsal, None, abouts, counts, 1234,
        first_epoch=0 if base else 6, earlier=() if base else (earlier,),
    )  # fmt: skip


def test_the_metrics_of_a_task():
    metrics = record_of(outcome()).metrics
    # 10 of 20 pixels of class 1 are taken for class 2.
    ious = [1.0, 0.5, 0.5, 1.0, 1.0]
    expected = {"miou/all": sum(ious) / 5, "miou/old": 2 / 3, "miou/new": 1.0, "miou/foreground": 0.75}
    for name, value in expected.items():
        assert metrics[name] == metrics[f"val/{name}"] == pytest.approx(value)
        assert f"test/unseen/{name}" in metrics
    assert metrics["test/unseen/miou/all"] == pytest.approx(1 / 9)
    assert (metrics["memory/rows"], metrics["memory/bytes"], metrics["cost/worker_seconds"]) == (3.0, 1234.0, 11.0)
    assert "test/miou/all" not in metrics
    assert record_of(outcome()).task == 1


def test_the_diagnoses_of_a_task():
    metrics = record_of(outcome()).metrics
    expected = {
        "miou/old_foreground": 0.5,
        "drift/old": 0.0,
        "confusion/old_as_new": 0.0,
        "confusion/new_as_old": 0.0,
        "stream/forgetting": (1 + 0.5) / 2 - 0.5,
        "stream/backward_transfer": 0.5 - (1 + 0.5) / 2,
        "stream/average_miou": ((0.5 + 1 + 0.5) / 3 + 0.8) / 2,
    }
    for name, value in expected.items():
        assert metrics[name] == metrics[f"val/{name}"] == pytest.approx(value)
        assert f"test/unseen/{name}" in metrics
    shares = {name: metrics[f"test/unseen/{name}"] for name in expected if name.startswith(("drift", "confusion"))}
    assert shares == pytest.approx({"drift/old": 0.2, "confusion/old_as_new": 0.4, "confusion/new_as_old": 0.4})
    # Class 1: P = 1, R = 1/2; class 2: P = 1/2, R = 1.
    scores = [1.3 * 0.5 / (0.3 + 0.5), 1.3 * 0.5 / (0.15 + 1)]
    assert metrics["f_score/all"] == pytest.approx((sum(scores) + 3) / 5)
    assert metrics["f_score/foreground"] == pytest.approx((sum(scores) + 2) / 4)
    assert "miou/old_foreground" not in outcome().metrics()  # what a search reports stays as it is


def test_the_base_task_has_no_new_classes_and_no_collisions():
    record = record_of(outcome(base=True))
    assert not any(name.endswith("miou/new") for name in record.metrics)
    assert not any("confusion/" in name or "forgetting" in name or "transfer" in name for name in record.metrics)
    assert record.metrics["stream/average_miou"] == record.metrics["miou/all"]
    assert set(record.artifacts) == {
        "task_0/memory.json", "task_0/confusion_val.json", "task_0/confusion_test_unseen.json",
        "task_0/matrix_val.json", "task_0/matrix_test_unseen.json", "task_0/networks.json",
    }  # fmt: skip
    matrix = record.artifacts["task_0/matrix_val.json"]
    assert matrix == {"classes": [list(TONES.class_names()[:2])], "miou": [[0.5]], "forgetting": [], "backward_transfer": []}


def test_losses_of_all_tasks_form_one_curve():
    base, later = record_of(outcome(base=True)), record_of(outcome())
    assert base.losses[0] == ("train/audio_visual/loss", 2.0, 0)
    assert set(later.losses) == {
        ("train/audio_visual/loss", 2.0, 6),
        ("train/audio_visual/pod", 0.5, 6),
        ("train/audio_visual/loss", 1.0, 7),
        ("train/audio_visual/pod", 0.25, 7),
        ("train/visual_only/loss", 4.0, 6),
        ("train/visual_only/loss", 3.0, 7),
    }


def test_the_artifacts_of_a_task():
    artifacts = record_of(outcome()).artifacts
    assert set(artifacts) == {
        "task_1/memory.json", "task_1/collisions.json", "task_1/confusion_val.json", "task_1/confusion_test_unseen.json",
        "task_1/matrix_val.json", "task_1/matrix_test_unseen.json", "task_1/networks.json",
    }  # fmt: skip
    first, second = TONES.class_names()[:2]
    memory = artifacts["task_1/memory.json"]
    assert memory["rows"] == [
        {"sample_id": "train-00001", "class": first, "delta": 0.01, "frames": 2.0},
        {"sample_id": "train-00005", "class": first, "delta": -0.02, "frames": 1.0},
        {"sample_id": "train-00001", "class": second, "delta": 0.01, "frames": 2.0},
    ]
    assert (memory["samples"], memory["bytes"], memory["hash"]) == (2, 1234, fingerprint(memory["rows"]))
    collisions = artifacts["task_1/collisions.json"]
    assert [(record["class"], record["collisions"], record["frequency"]) for record in collisions["classes"]] == [
        (first, 2.0, 0.6), (second, 1.0, 0.6),
    ]  # fmt: skip
    assert collisions["pairs"] == [{"old_class": second, "new_class": TONES.class_names()[2], "videos": 7.0}]
    assert collisions["drawn"] == [{"sample_id": "train-00001", "class": second}]
    assert collisions["rows"] == 4
    confusion = artifacts["task_1/confusion_val.json"]
    assert confusion["classes"] == ("background", *TONES.class_names())
    assert confusion["counts"][1] == [0, 10, 10, 0, 0]
    assert list(confusion["iou"]) == list(confusion["f_score"]) == list(confusion["classes"])
    assert (confusion["iou"][first], confusion["iou"]["background"]) == (0.5, 1.0)
    assert confusion["f_score"][first] == pytest.approx(1.3 * 0.5 / (0.3 + 0.5))
    matrix = artifacts["task_1/matrix_val.json"]
    assert matrix["classes"] == [[first, second], list(TONES.class_names()[2:])]
    assert matrix["miou"] == [[0.75, None], [0.5, 1.0]]
    assert (matrix["forgetting"], matrix["backward_transfer"]) == ([0.25], [-0.25])
    json.dumps(artifacts, allow_nan=False)


def test_a_class_without_truth_is_null():
    counts = np.zeros((5, 5), dtype=np.int64)
    counts[0, 0] = 1
    empty = dataclasses.replace(outcome(), counts={"val": counts}, earlier=({"val": counts[:3, :3].tolist()},))
    record = record_of(empty)
    second = TONES.class_names()[1]
    assert record.artifacts["task_1/confusion_val.json"]["iou"][second] is None
    assert record.artifacts["task_1/matrix_val.json"]["miou"] == [[None, None], [None, None]]
    assert record.metrics["stream/average_miou"] == 1.0
    assert "stream/forgetting" not in record.metrics
    json.dumps(record.artifacts, allow_nan=False)


class Canned:
    """A backend that trains nothing and knows its counts beforehand."""

    def prepare(self, benchmark, splits, audio_weights=None):
        return ""

    def train(self, jobs):
        return [f"{job.network} {job.task.index}" for job in jobs]

    def about(self, checkpoint):
        return About(AUDIO_VISUAL, 5, {})

    def evaluate(self, job, checkpoint):
        draw = np.random.default_rng([job.num_classes, job.split == "val"])
        return draw.integers(1, 99, (job.num_classes, job.num_classes))


def test_a_stream_hands_its_counts_on():
    experiment = Experiment(benchmark=TONES, scenario=Scenario(setting="2-1"), method=Finetune())
    outcomes = list(run_stream(experiment, 0, Canned(), ("val", "test")))
    assert [len(each.earlier) for each in outcomes] == [0, 1, 2]
    for split in ("val", "test"):
        found = [each.tolist() for each in outcomes[-1].history(split)]
        assert found == [each.counts[split].tolist() for each in outcomes]
        rows = [record_of(each).artifacts[f"task_{index}/matrix_{split}.json"]["miou"] for index, each in enumerate(outcomes)]
        assert [len(row) for row in rows] == [1, 2, 3]
        # Later matrices begin with the earlier ones: what was measured once is not measured again.
        assert [row[:2] for row in rows[2][:2]] == rows[1]
        lost = [max(rows[2][t][k] for t in range(k, 2)) - rows[2][2][k] for k in range(2)]
        metrics = record_of(outcomes[-1]).metrics
        assert metrics[f"{split}/stream/forgetting"] == pytest.approx(sum(lost) / 2)
        moved = [rows[2][2][k] - rows[2][k][k] for k in range(2)]
        assert metrics[f"{split}/stream/backward_transfer"] == pytest.approx(sum(moved) / 2)
        means = [record_of(each).metrics[f"{split}/miou/all"] for each in outcomes]
        assert metrics[f"{split}/stream/average_miou"] == pytest.approx(sum(means) / 3)
    assert metrics["stream/forgetting"] == metrics["val/stream/forgetting"] != metrics["test/stream/forgetting"]


def test_the_memory_hash_changes_with_what_is_kept():
    one, other = outcome(), outcome()
    kept = Memory({1: one.state.memory.by_class[1]})
    other = dataclasses.replace(other, state=State({}, kept))
    hashes = [record_of(each).artifacts["task_1/memory.json"]["hash"] for each in (one, outcome(), other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_record_reaches_mlflow_whole(tracker, client, tmp_path):
    record = record_of(outcome())
    run = tracker.start("record", "stream", {})
    tracker.record(run, record)
    read = client.get_run(run).data.metrics
    assert read.keys() == {*record.metrics, *(name for name, *_ in record.losses)}
    assert all(math.isclose(read[name], value) for name, value in record.metrics.items())
    assert [point.step for point in client.get_metric_history(run, "miou/all")] == [1]
    for path, content in record.artifacts.items():
        assert json.loads(text_of(client, run, path, tmp_path)) == json.loads(json.dumps(content))


# Where it writes.


def test_the_default_is_a_database_among_the_outputs(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:5000", "https://u:p@host/x", "sqlite:////a/b.db", "postgresql://h/db"])
def test_the_environment_decides(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri(Path("out")) == uri


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/abs/mlruns", "file:///abs/mlruns", "http://[::1", "//u:secret@h/x"])
def test_a_folder_and_what_is_no_uri_are_refused(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI.*sqlite:///absolute/path.db or http://host:port") as error:
        tracking_uri(Path("out"))
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host:5000/x", "http://host:5000/x"),
        ("https://token@host", "https://host"),
        ("http://user:se@cret@host", "http://host"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////a@b/c.db", "sqlite:////a@b/c.db"),
        (
            "postgresql://host/db?user=u&password=secret&sslmode=require",
            "postgresql://host/db?user=u&password=***&sslmode=require",
        ),
        ("user:secret@host/db", "host/db"),
    ],
)
def test_a_password_is_never_shown(uri, shown):
    assert without_password(uri) == shown


@pytest.mark.parametrize("uri", ["http://user:secret@127.0.0.1:9", "http://user:secret@127.0.0.1:9/", "bogus://user:secret@x"])
def test_an_unreachable_store_is_told_within_seconds_and_without_the_password(uri, tmp_path):
    before, started = dict(os.environ), time.monotonic()
    with pytest.raises(InputError, match=r"MLflow cannot be reached at .*set MLFLOW_TRACKING_URI") as error:
        Tracker(uri, tmp_path)
    assert time.monotonic() - started < 10
    assert "secret" not in str(error.value)
    assert dict(os.environ) == before


def test_a_server_that_never_answers_is_given_less_than_ten_seconds(tmp_path, monkeypatch):
    asked = []

    class Silent:
        def __init__(self, tracking_uri):
            pass

        def get_experiment_by_name(self, name):
            asked.append({name: float(os.environ[f"MLFLOW_HTTP_REQUEST_{name}"]) for name in ("MAX_RETRIES", "TIMEOUT")})
            raise TimeoutError

    monkeypatch.setattr(tracker_module, "MlflowClient", Silent)
    with pytest.raises(InputError, match="TimeoutError"):
        Tracker("http://127.0.0.1:5000", tmp_path)
    assert (asked[0]["MAX_RETRIES"] + 1) * asked[0]["TIMEOUT"] < 10
    assert os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") is None


def test_a_server_that_is_something_else_is_told(tmp_path):
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(InputError, match=r"MLflow cannot be reached.*403"):
                Tracker(f"http://127.0.0.1:{server.server_port}", tmp_path)
        finally:
            server.shutdown()
            thread.join()


def test_a_database_below_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"MLflow cannot be reached at sqlite:///.*file"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db", tmp_path)


def test_the_hint_names_the_store(tracker):
    assert f"--backend-store-uri {tracker.uri}" in tracker.open_hint
