"""What would be done is told and nothing is; and the smallest way through every verb."""

import sys

import pytest
import ray
from mlflow.tracking import MlflowClient
from PIL import Image

from cavs_model.datasets.collage import Collage
from orchestrator import check, cli, compare, contact_sheet, run, sweep
from orchestrator.dry_run import Lookup, debugged, tasks_done
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, override

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning")
SHORT = ("--set", "schedule.base_epochs=1", "--set", "schedule.epochs=1", "--set", "method=finetune")


def called(verb, monkeypatch, outputs, *arguments):
    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", [verb.__name__, *arguments, "--outputs", str(outputs)])
    return cli.main(verb)


def test_a_dry_run_does_nothing_and_says_what_the_store_has(tmp_path, monkeypatch, capsys):
    assert called(run.run, monkeypatch, tmp_path, "tones", *SHORT, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "in all 1 configuration x 1 seed x 2 tasks, 2 networks" in told
    assert "no network of this shape" in told
    assert "the store has 0 of 2 tasks of seed 0; the first that is missing: seed 0 task 1/2 audio_visual" in told
    assert list(tmp_path.iterdir()) == []

    assert called(run.run, monkeypatch, tmp_path, "tones", *SHORT, "--local") == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert called(run.run, monkeypatch, tmp_path, "tones", *SHORT, "--dry-run", "--set", "seeds=0,1") == 0
    told = capsys.readouterr().out
    assert "the store has 2 of 2 tasks of seed 0\n" in told
    assert "the store has 0 of 2 tasks of seed 1" in told
    assert "clips a second of such networks in the store" in told
    # A later task's epochs leave the first task what it was.
    assert called(run.run, monkeypatch, tmp_path, "tones", *SHORT, "--dry-run", "--set", "schedule.epochs=2") == 0
    assert "the store has 1 of 2 tasks of seed 0; the first that is missing: seed 0 task 2/2" in capsys.readouterr().out
    assert called(compare.compare, monkeypatch, tmp_path, "tones", *SHORT, "--seeds", "0,1", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "2 streams" in told
    assert "tones 2-2 seed 0: the store has 2 of 2 tasks\n" in told
    assert called(sweep.sweep, monkeypatch, tmp_path, "tones", "--trials", "3", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "3 trials" in told
    assert "method.resampling_ratio" in told
    assert "in all 3 configurations x 1 seed x 2 tasks" in told
    assert called(check.check, monkeypatch, tmp_path, "tones", "--trials", "3", "--dry-run") == 0
    planned = capsys.readouterr().out
    assert "no node, data, weights or MLflow is looked at" in planned
    assert "in all 3 configurations x 1 seed x 2 tasks" in planned
    assert called(check.check, monkeypatch, tmp_path, "tones", "--debug", "--dry-run") == 0
    assert "5 clips, 1 epochs" not in planned
    assert "5 clips, 1 epochs" in capsys.readouterr().out
    assert called(contact_sheet.draw, monkeypatch, tmp_path, "tones", "--dry-run", "--count", "7") == 0
    assert f"7 scenes of tones's train would be {tmp_path / 'contact_sheet_tones_train.png'}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_debugging_run_goes_the_whole_way_under_a_name_that_says_so(tmp_path, monkeypatch, capsys):
    assert called(run.run, monkeypatch, tmp_path, "tones", "--debug", "--local", "--test", "--set", "seeds=3,4") == 0
    told = capsys.readouterr().out
    assert "seed 3 task 2/2 learned" in told
    assert "seed 4" not in told
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (stream,) = client.search_runs([client.get_experiment_by_name("cavs").experiment_id])
    assert stream.info.run_name.startswith("debug-cmr tones 2-2 seed 3")
    assert stream.data.params["schedule.base_epochs"] == "1"
    assert (tmp_path / "runs" / "debug-cmr-tones-2-2" / "status.json").is_file()
    assert called(compare.compare, monkeypatch, tmp_path, "tones", "--debug", "--local", "--set", "method=finetune") == 0
    assert (tmp_path / "comparisons" / "debug-tones" / "table.md").is_file()


@pytest.mark.parametrize("setting", ["16-8", "16-4", "20-1", "24"])
def test_the_shipped_benchmark_is_cut_to_two_clips_of_a_class(setting):
    small = debugged(override(Experiment(seeds=(5, 6)), {"scenario.setting": setting}))
    assert isinstance(small.benchmark, Collage)
    assert (small.benchmark.train_clips, small.benchmark.val_clips, small.benchmark.test_clips) == (48, 48, 48)
    assert (small.schedule.epochs, small.schedule.base_epochs, small.seeds) == (1, 1, (5,))
    assert all(len(task.train) for task in small.scenario.tasks(small.benchmark))


def test_a_store_that_is_not_there_has_nothing(tmp_path):
    experiment = cli.load_space("tones").base
    assert tasks_done(experiment, 0, ("val",), Lookup(Entries(tmp_path / "none"))) == (0, "seed 0 task 1/2 audio_visual")
    assert not (tmp_path / "none").exists()


def test_a_contact_sheet_for_debugging_has_two_scenes(tmp_path, monkeypatch, capsys):
    sizes = []
    for arguments in (["--count", "2"], ["--debug"], ["--count", "6"]):
        assert called(contact_sheet.draw, monkeypatch, tmp_path, "tones", *arguments) == 0
        with Image.open(capsys.readouterr().out.strip()) as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] != sizes[2]
