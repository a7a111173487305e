"""Predicting for real: a stream of one epoch on tones, a video made by PyAV, and what stands in the files afterwards."""

import json
import shutil
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from mlflow.entities import LoggedModelOutput
from mlflow.tracking import MlflowClient
from PIL import Image
from torch.nn import functional as F

from cavs_model import checkpoint
from cavs_model.datasets.log_mel import log_mel
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.predict import phases
from cavs_model.types import Batch
from orchestrator import predict, run, video

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning", "ignore::ResourceWarning")
NAMES = Tones().class_names()
SECONDS, RATE = 3, 10


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Two tasks of one epoch each on tones."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        short = [argument for name in ("base_epochs", "epochs") for argument in ("--set", f"schedule.{name}=1")]
        patch.setattr(sys, "argv", ["run", "tones", "--local", "--outputs", str(folder), "--set", "method=finetune", *short])
        assert run.run() == 0
    return folder


@pytest.fixture(scope="module")
def client(outputs):
    return MlflowClient(f"sqlite:///{outputs}/mlflow.db")


@pytest.fixture(scope="module")
def stream(client):
    (found,) = client.search_runs([client.get_experiment_by_name("cavs").experiment_id])
    return found.info.run_id


def pictures(count, size=(48, 64)):
    rng = np.random.default_rng(0)
    found = np.zeros((count, *size, 3), np.uint8)
    for number, picture in enumerate(found):
        picture[:] = rng.integers(0, 60, picture.shape)
        picture[8:32, 8 + number : 32 + number] = (217, 43, 43)
    return found


def tone(seconds=SECONDS, rate=16_000):
    return (0.3 * np.sin(2 * np.pi * Tones().pitch_hz(1) * np.arange(seconds * rate) / rate)).astype(np.float32)


def write_video(path, count=SECONDS * RATE, sound=True, size=(48, 64)):
    """A file as a camera makes it: mpeg4, and stereo sound at 44.1 kHz."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"qscale": "2"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        heard = container.add_stream("aac", rate=44_100, layout="stereo") if sound else None
        for picture in pictures(count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
        if heard is not None:
            frame = av.AudioFrame.from_ndarray(np.stack([tone(rate=44_100)] * 2), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 44_100, 0, Fraction(1, 44_100)
            container.mux(heard.encode(frame))
            container.mux(heard.encode(None))
    return path


def write_folder(path, seconds=SECONDS, rate=16_000):
    path.mkdir()
    for number, picture in enumerate(pictures(seconds)):
        Image.fromarray(picture).save(path / f"clip_{number + 8}.png")  # _10 comes after _9
    soundfile.write(path / "sound.wav", tone(seconds, rate), rate)
    return path


def predicted(monkeypatch, outputs, *arguments):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments), "--outputs", str(outputs), "--device", "cpu"])
    assert predict.predict() == 0


def told(folder):
    return json.loads((folder / "prediction.json").read_text())


def test_a_video_becomes_an_overlay_masks_a_legend_and_classes_per_second(outputs, stream, tmp_path, monkeypatch, capsys):
    clip, folder = write_video(tmp_path / "clip.mp4"), tmp_path / "out"
    for _ in range(2):  # in the place of an earlier prediction
        predicted(monkeypatch, outputs, stream, clip, "--output", folder)
    found = told(folder)
    assert (found["frames_per_second"], found["classes"], found["never_learned"]) == (5, list(NAMES), [])
    assert [(each["second"], each["frames"]) for each in found["seconds"]] == [(0, 5), (1, 5), (2, 5)]
    for each in (*found["seconds"], found["whole"]):
        shares = [each["background"]["share"], *(entry["share"] for entry in each["classes"])]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
    masks = [Image.open(path) for path in sorted((folder / "masks").iterdir())]
    assert (len(masks), masks[0].mode, masks[0].size) == (15, "P", (64, 48))
    legend = json.loads((folder / "legend.json").read_text())
    assert [(entry["index"], entry["name"]) for entry in legend] == list(enumerate(("background", *NAMES)))
    colours = np.array(masks[0].getpalette("RGB")).reshape(-1, 3)
    assert [f"#{bytes(colours[entry['index']].tolist()).hex()}" for entry in legend] == [entry["colour"] for entry in legend]
    assert legend[1]["colour"] == "#800000"  # as in VOC
    background = np.mean([np.asarray(mask) == 0 for mask in masks[:5]])
    assert found["seconds"][0]["background"]["share"] == pytest.approx(background, abs=1e-6)
    with av.open(str(folder / "overlay.mp4")) as container:
        assert (len(container.streams.video), len(container.streams.audio)) == (1, 1)
        assert float(container.duration / av.time_base) == pytest.approx(SECONDS, abs=0.2)
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(container.streams.audio[0])])
    assert np.sqrt(np.mean(heard[4000:40_000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
    assert "after task 2" in capsys.readouterr().out


def test_a_dry_run_writes_nothing_and_debug_answers_two_pictures(outputs, stream, tmp_path, monkeypatch, capsys):
    clip, folder = write_video(tmp_path / "clip.mp4"), tmp_path / "out"
    predicted(monkeypatch, outputs, stream, clip, "--output", folder, "--dry-run")
    assert not folder.exists()
    assert f"results would lie in {folder}" in capsys.readouterr().out
    predicted(monkeypatch, outputs, stream, clip, "--output", folder, "--debug")
    assert [(each["second"], each["frames"]) for each in told(folder)["seconds"]] == [(0, 2)]
    before = told(folder)
    predicted(monkeypatch, outputs, stream, clip, "--output", folder, "--dry-run")
    assert told(folder) == before


def test_a_second_is_what_the_network_says_of_its_frame_and_sound(outputs, stream, tmp_path, monkeypatch):
    plain = ("--precision", "fp32", "--as", "frames")
    predicted(monkeypatch, outputs, stream, write_folder(tmp_path / "clip"), "--output", tmp_path / "out", *plain)
    tracker = predict._tracker(outputs)
    model = checkpoint.load(outputs / "store" / tracker.networks_of(stream)[1])
    # Two seconds in a pass, as the network was trained with; the third is alone.
    frames, wave, answers = pictures(SECONDS), tone(), []
    for part in ([0, 1], [2]):
        image = np.stack([np.asarray(Image.fromarray(frames[t]).resize((32, 32), Image.Resampling.BILINEAR)) for t in part])
        audio = log_mel(np.stack([wave[16_000 * t : 16_000 * (t + 1)] for t in part])).astype(np.float16).astype(np.float32)
        every = torch.ones(1, len(part), dtype=torch.bool)
        batch = Batch(("x",), torch.from_numpy(image.transpose(0, 3, 1, 2).copy())[None], torch.from_numpy(audio)[None],
                      torch.zeros(1, len(part), 32, 32), every, every, every[:, 0])  # fmt: skip
        with torch.no_grad():
            answers += F.interpolate(model(batch).logits[0], (48, 64), mode="bilinear").softmax(1)
    found = told(tmp_path / "out")
    assert len(found["seconds"]) == SECONDS
    for t, probabilities in enumerate(answers):
        sure, label = probabilities.max(0)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "masks" / f"{t:06d}.png")), label.numpy())
        expected = {
            (["background", *NAMES][c]): (float((label == c).float().mean()), float(sure[label == c].mean()))
            for c in label.unique().tolist()
        }
        second = found["seconds"][t]
        entries = [{"name": "background", **second["background"]}, *second["classes"]]
        assert {each["name"] for each in entries if each["share"]} == set(expected)
        for each in entries:
            if each["share"]:
                assert (each["share"], each["confidence"]) == pytest.approx(expected[each["name"]], abs=2e-6)
    drawn = np.asarray(Image.open(tmp_path / "out" / "overlay" / "000000.png")).astype(int)
    changed, shown = (drawn != frames[0]).any(-1), np.asarray(Image.open(tmp_path / "out" / "masks" / "000000.png")) > 0
    assert not changed[~shown].any()


def test_the_sound_makes_a_difference_and_silence_is_none(outputs, stream, tmp_path, monkeypatch):
    clip = write_folder(tmp_path / "clip")
    for name, more in (("heard", ()), ("silent", ("--silent",))):
        predicted(monkeypatch, outputs, stream, clip, "--output", tmp_path / name, *more)
    heard, silent = told(tmp_path / "heard"), told(tmp_path / "silent")
    assert heard["sound"]
    assert not silent["sound"]
    assert heard["whole"] != silent["whole"]
    with av.open(str(tmp_path / "silent" / "overlay.mp4")) as container:
        assert not container.streams.audio


def test_every_name_of_a_network_leads_to_it(outputs, stream, client, tmp_path, monkeypatch):
    networks = predict._tracker(outputs).networks_of(stream)
    base, last = (outputs / "store" / networks[task] for task in (0, 1))
    (tmp_path / "model" / "data").mkdir(parents=True)
    for name in (checkpoint.WEIGHTS, checkpoint.ABOUT):
        shutil.copy(last / name, tmp_path / "model" / "data")
    client.log_artifacts(stream, str(tmp_path / "model"), "plain")
    logged = client.create_logged_model(client.get_run(stream).info.experiment_id, "model", stream)
    client.log_model_artifacts(logged.model_id, str(tmp_path / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(stream, [LoggedModelOutput(logged.model_id, 1)])
    sweep = client.create_run(client.get_run(stream).info.experiment_id, tags={"kind": "sweep"}).info.run_id
    winner = client.create_logged_model(client.get_run(stream).info.experiment_id, "model", sweep)
    client.log_model_artifacts(winner.model_id, str(tmp_path / "model"))
    client.finalize_logged_model(winner.model_id, "READY")
    client.log_outputs(sweep, [LoggedModelOutput(winner.model_id, 1)])
    client.create_registered_model("best")
    client.create_model_version("best", logged.artifact_location, stream)
    client.set_registered_model_alias("best", "champion", "1")
    weights = (last / checkpoint.WEIGHTS).read_bytes()
    uris = (
        "models:/best/1",
        "models:/best@champion",
        f"models:/{logged.model_id}",
        f"runs:/{stream}/model",
        f"runs:/{stream}/plain",
    )
    for name in (stream, sweep, *uris, last.name[:12], f"networks/{last.name}", str(last)):
        model = predict.load_model(name, outputs, tmp_path / f"downloads {name.replace('/', ' ')}")
        assert (model.checkpoint.weights, model.classes, model.never_learned) == (weights, NAMES, ())
        assert (model.image_size_px, model.frames) == (32, 2)
    # A store that is elsewhere: the run's own model, which is that after the last task.
    (outputs / "store").rename(outputs / "elsewhere")
    try:
        assert predict.load_model(stream, outputs, tmp_path / "again").checkpoint.weights == weights
        with pytest.raises(InputError, match="none of this key"):
            predict.load_model(stream, outputs, tmp_path / "again", task=2)
    finally:
        (outputs / "elsewhere").rename(outputs / "store")
    # What it never learned: the classes of the second task.
    first = predict.load_model(stream, outputs, tmp_path, task=1)
    assert (first.names, first.never_learned) == (("background", *NAMES[:2]), NAMES[2:])
    assert first.checkpoint.weights == (base / checkpoint.WEIGHTS).read_bytes()


def test_a_checkpoint_of_an_earlier_version_is_told_what_it_does_not_say(outputs, stream, tmp_path, monkeypatch):
    key = predict._tracker(outputs).networks_of(stream)[1]
    old = shutil.copytree(outputs / "store" / key, tmp_path / "old")
    about = json.loads((old / checkpoint.ABOUT).read_text())
    for name in ("classes", "image_size_px", "frames"):
        del about[name]
    (old / checkpoint.ABOUT).write_text(json.dumps(about))
    clip = write_folder(tmp_path / "clip")
    with pytest.raises(InputError, match=r"4 classes and does not say their names; give all by --classes"):
        predicted(monkeypatch, outputs, old, clip)
    with pytest.raises(InputError, match="give --size"):
        predicted(monkeypatch, outputs, old, clip, "--classes", "a,b,c,d")
    predicted(
        monkeypatch, outputs, old, clip, "--classes", "a,b,c,d,e", "--size", 32, "--frames", 2, "--output", tmp_path / "out"
    )
    assert told(tmp_path / "out")["never_learned"] == ["e"]
    (old / "classes.json").write_text(json.dumps({"classes": ["v", "w", "x", "y"], "image_size_px": 32, "frames": 2}))
    predicted(monkeypatch, outputs, old, clip, "--output", tmp_path / "out")
    assert told(tmp_path / "out")["classes"] == ["v", "w", "x", "y"]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path, "no video file and no folder of frames at"),
        (lambda path: write_video(path, sound=False), "has no sound; --silent"),
        (lambda path: [path.write_bytes(b"not a video"), path][1], "is no video that can be read"),
        (lambda path: [soundfile.write(path.with_suffix(".wav"), tone(), 16_000), path.with_suffix(".wav")][1],
         "no video stream"),
        (lambda path: [path.mkdir(), path][1], "has no frames"),
        (lambda path: [write_folder(path), (path / "sound.wav").unlink(), path][2], "has no wav file; --silent"),
        (lambda path: [write_folder(path), soundfile.write(path / "sound.wav", tone(1), 16_000), path][2],
         r"3 frames at 1 a second are 3.0 s, sound.wav has 1.0 s; say by --frame-rate"),
        (lambda path: [write_folder(path), soundfile.write(path / "sound.wav", tone()[:0], 16_000), path][2], "no sound in it"),
        (lambda path: [write_folder(path), (path / "clip_9.png").write_bytes(b"x"), path][2], "clip_9.png cannot be decoded"),
        (lambda path: [write_folder(path), shutil.copy(path / "sound.wav", path / "b.wav"), path][2], "has 2 wav files"),
        (lambda path: [write_folder(path), Image.new("RGB", (32, 32)).save(path / "clip_9.png"), path][2], "different sizes"),
    ],
)  # fmt: skip
def test_bad_input_is_named(outputs, stream, tmp_path, monkeypatch, make, match):
    with pytest.raises(InputError, match=match):
        predicted(monkeypatch, outputs, stream, make(tmp_path / "clip.mp4"), "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("f" * 32, "has no run"),
        ("models:/nobody/1", "has no model 'models:/nobody/1'"),
        ("abcd", "none of this key"),
        ("hello", "no model 'hello'; give a run"),
        (".", r"checkpoint"),
    ],
)
def test_an_unknown_model_is_told_with_what_may_be_given(outputs, tmp_path, monkeypatch, model, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=match):
        predict.load_model(str(tmp_path / "empty") if model == "." else model, outputs, tmp_path)


def test_a_run_above_streams_names_them(outputs, stream, client):
    parent = client.create_run(client.get_run(stream).info.experiment_id, tags={"kind": "trial"}).info.run_id
    client.set_tag(stream, "mlflow.parentRunId", parent)
    with pytest.raises(InputError, match=rf"no stream but a trial; choose one of its streams: {stream} \(finetune tones"):
        predict.load_model(parent, outputs, outputs)
    with pytest.raises(InputError, match="unknown --task 3"):
        predict.load_model(stream, outputs, outputs, task=3)


def test_nothing_that_is_not_a_predictions_is_deleted(outputs, stream, tmp_path, monkeypatch):
    clip = write_folder(tmp_path / "clip")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"holds 'thesis.tex'"):
        predicted(monkeypatch, outputs, stream, clip, "--output", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_another_rate_is_resampled_and_large_pictures_are_made_smaller(tmp_path):
    folder = write_folder(tmp_path / "clip", rate=48_000)
    clip = video.open_clip(folder, 5, 1.0, True)
    assert clip.per_second == 1
    middle = slice(4000, -4000)
    assert np.abs(clip.wave[middle] - tone()[middle]).max() < 0.01
    large = write_video(tmp_path / "large.mp4", count=3, size=(1000, 2000))
    assert next(video.open_clip(large, 5, 1.0, True).pictures()).shape == (640, 1280, 3)


def test_frames_a_second_apart_are_answered_together():
    assert list(phases(10, per_second=2, seconds=2)) == [[0, 2], [1, 3], [4, 6], [5, 7], [8], [9]]
    assert list(phases(3, per_second=5, seconds=2)) == [[0], [1], [2]]
    assert sorted(number for numbers in phases(37, 4, 3) for number in numbers) == list(range(37))


def test_a_picture_is_shown_until_the_next_one_comes():
    timed = [(0.0, "a"), (0.5, "b"), (2.2, "c")]
    shown = video._sampled(iter(timed), 2, None, 1.0)
    assert list(shown) == ["a", "b", "b", "b", "b", "c", "c"]
    assert list(video._sampled(iter(timed[:1]), 1, 3.0)) == ["a", "a", "a"]
    assert list(video._sampled(iter([]), 1, 3.0)) == []
