"""VGGish: its equations, the published names, never trained or stored, and its answers kept beside the decoded clips."""

import copy
import hashlib
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_datasets_cache import TONES as STORED
from test_networks import TINY, make_batch, stir
from test_train import SCHEDULE, base_job, later_job, left, mean_square, same, trained
from test_worker import on_two_workers
from torch.nn import functional as F

from cavs_model import checkpoint
from cavs_model.datasets import cache
from cavs_model.datasets.cache import DecodedSplit, build, missing_blocks, open_split, verify
from cavs_model.errors import InputError
from cavs_model.evaluate import Data
from cavs_model.methods.finetune import Finetune
from cavs_model.networks import av_segmenter, vggish
from cavs_model.networks.audio_encoders import build_audio_encoder
from cavs_model.networks.av_segmenter import check_weights
from cavs_model.networks.vggish import FrozenVGGish, VGGish, feature_name, load_vggish, weights_digest
from cavs_model.train import train_task
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY
from cavs_model.worker import LocalWorker

HEARS = replace(TINY, audio_encoder="vggish", audio_dim=128)
CPU = torch.device("cpu")
SIZES = {  # of the published state_dict, torchvggish's
    "features.0": (64, 1, 3, 3),
    "features.3": (128, 64, 3, 3),
    "features.6": (256, 128, 3, 3),
    "features.8": (256, 256, 3, 3),
    "features.11": (512, 256, 3, 3),
    "features.13": (512, 512, 3, 3),
    "embeddings.0": (4096, 12288),
    "embeddings.2": (4096, 4096),
    "embeddings.4": (128, 4096),
}


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as torchvggish publishes it, with weights that keep the size of what passes through."""
    draw = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in SIZES.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=draw) * math.sqrt(2 / math.prod(shape[1:]))
        state[f"{name}.bias"] = torch.randn(shape[0], generator=draw) * 0.1
    file = tmp_path_factory.mktemp("vggish") / "vggish.pth"
    torch.save(state, file)
    yield str(file)
    file.unlink()  # 288 MB


def seconds(count):
    return torch.randn(count, 96, 64)


def test_vggish_against_its_definition(published):
    state = torch.load(published, weights_only=True)
    audio = seconds(2)

    def layer(x, name):
        return F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))

    x = F.max_pool2d(layer(audio[:, None], "features.0"), 2)
    x = F.max_pool2d(layer(x, "features.3"), 2)
    x = F.max_pool2d(layer(layer(x, "features.6"), "features.8"), 2)
    x = F.max_pool2d(layer(layer(x, "features.11"), "features.13"), 2)
    assert x.shape == (2, 512, 6, 4)
    flat = torch.empty(2, 12288)
    for time, frequency in np.ndindex(6, 4):
        for channel in range(512):
            flat[:, (time * 4 + frequency) * 512 + channel] = x[:, channel, time, frequency]
    for name in ("embeddings.0", "embeddings.2", "embeddings.4"):
        flat = F.relu(F.linear(flat, state[f"{name}.weight"], state[f"{name}.bias"]))
    found = load_vggish(published, CPU)(audio)
    assert found.shape == (2, 128)
    assert found.std() > 0.1
    torch.testing.assert_close(found, flat, rtol=1e-3, atol=1e-4)


def test_files_that_are_not_vggish_are_refused(published, tmp_path):
    with torch.device("meta"):
        assert {name: tuple(value.shape) for name, value in VGGish().state_dict().items() if name.endswith("weight")} == {
            f"{name}.weight": shape for name, shape in SIZES.items()
        }
    state = torch.load(published, weights_only=True)
    for name, content, message in (
        ("part", {key: value for key, value in state.items() if key != "features.13.bias"}, r"features\.13\.bias is missing"),
        ("pca", {**state, "pproc.pca_means": torch.zeros(1)}, r"pproc\.pca_means is not part"),
        ("shape", {**state, "embeddings.4.bias": torch.zeros(64)}, r"embeddings\.4\.bias has shape \[64\], expected \[128\]"),
        ("list", [1, 2], "not a state_dict"),
    ):
        file = tmp_path / f"{name}.pth"
        torch.save(content, file)
        with pytest.raises(InputError, match=f"audio_weights: .*{message}"):
            load_vggish(str(file), CPU)
        file.unlink()
    with pytest.raises(InputError, match=r"audio_weights: cannot read .*absent.*choose"):
        check_weights(replace(HEARS, audio_weights=str(tmp_path / "absent.pth")))


def test_what_does_not_go_with_vggish_is_refused(published):
    with pytest.raises(InputError, match="audio_dim must be 128"):
        build_audio_encoder("vggish", 64)
    with pytest.raises(InputError, match="audio_weights"):
        build_audio_encoder("log_mel_cnn", 128, published)


def test_random_weights_are_always_the_same():
    state = torch.get_rng_state()
    vggish._loaded.cache_clear()
    one = load_vggish("none", CPU)
    vggish._loaded.cache_clear()
    torch.manual_seed(5)
    assert same(one.state_dict(), load_vggish("none", CPU).state_dict())
    assert weights_digest("none") == "0" * 64
    torch.set_rng_state(state)


def test_no_network_trains_or_stores_it(published):
    model = av_segmenter.build(replace(HEARS, audio_weights=published), 3, AUDIO_VISUAL)
    stir(model)
    state = model.state_dict()
    assert not [name for name, _ in model.named_parameters() if name.startswith("audio_encoder")]
    assert [name for name in state if name.startswith("audio_encoder")] == ["audio_encoder._extra_state"]
    with open(published, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    assert bytes(state["audio_encoder._extra_state"].tolist()) == digest
    heard = model.train().requires_grad_(True)(make_batch()).logits  # what train.py does to a network that it continues
    (heard * torch.randn_like(heard)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    network = load_vggish(published, CPU)
    assert not network.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert build_audio_encoder("vggish", 128, published)(seconds(1)).requires_grad is False


def test_a_checkpoint_knows_its_weight_file_by_content(published, tmp_path):
    moved = tmp_path / "moved.pth"
    moved.symlink_to(published)
    config = replace(HEARS, audio_weights=str(moved))
    model = av_segmenter.build(config, 3, AUDIO_VISUAL).eval()
    checkpoint.save(tmp_path / "saved", model.state_dict(), checkpoint.About(AUDIO_VISUAL, 3, asdict(config)))
    assert sum(file.stat().st_size for file in (tmp_path / "saved").iterdir()) < 200_000
    batch = make_batch()
    assert torch.equal(checkpoint.load(tmp_path / "saved")(batch).logits, model(batch).logits)

    moved.unlink()
    loaded = checkpoint.load(tmp_path / "saved")  # nothing is read before it has to run
    loaded(replace(batch, audio_feature=torch.rand(3, 2, 128)))
    with pytest.raises(InputError, match=r"audio_weights: cannot read .*moved"):
        loaded(batch)
    moved.write_bytes(b"other weights")
    with pytest.raises(InputError, match="not the file that this network was trained with"):
        loaded(batch)


def test_kept_answers_stand_for_the_network(published):
    model = av_segmenter.build(replace(HEARS, audio_weights=published), 3, AUDIO_VISUAL).eval()
    stir(model)
    with torch.no_grad():
        for fuse in model.fuse:
            fuse.align.weight.mul_(100)  # so that the sound is heard above rounding
    batch = make_batch(3, 2, real=[2, 1, 2])
    with torch.no_grad():
        kept = load_vggish(published, CPU)(batch.audio.flatten(0, 1)).view(3, 2, 128)
        expected = model(batch).logits
        batch.audio[batch.real_frame] = float("nan")  # with kept answers nobody listens
        torch.testing.assert_close(model(replace(batch, audio_feature=kept)).logits, expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(model(replace(batch, audio_feature=kept.flip(0))).logits, expected, atol=1e-2)
        other = av_segmenter.build(TINY, 3, AUDIO_VISUAL).eval()
        batch = make_batch()
        assert torch.equal(other(batch).logits, other(replace(batch, audio_feature=kept)).logits)


def test_autocast_does_not_change_what_is_heard():
    encoder, audio = FrozenVGGish("none"), seconds(2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(audio)
    assert rough.dtype == torch.float32
    assert torch.equal(rough, encoder(audio))


def test_what_is_heard_is_in_fp32_proper_like_what_is_kept(monkeypatch):
    seen, network = [], load_vggish("none", CPU)
    handle = network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    FrozenVGGish("none")(seconds(1))
    handle.remove()
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32


def test_it_pickles_and_copies():
    model = av_segmenter.build(HEARS, 3, AUDIO_VISUAL)
    content = pickle.dumps(model)
    assert len(content) < 200_000
    batch = make_batch()
    expected = model.eval()(batch).logits
    for again in (pickle.loads(content), copy.deepcopy(model)):
        assert torch.equal(again.eval()(batch).logits, expected)


# What is kept on disk.


def test_answers_lie_beside_the_clips(published, tmp_path):
    name = feature_name(published)
    build(STORED, ["train", "val"], tmp_path)
    with pytest.raises(InputError, match=rf"incomplete.*missing {name} blocks \[0, 1, 2\]"):
        open_split(STORED, "train", tmp_path, name)
    seen = []

    def pool(function, jobs):
        seen.extend(jobs)
        with ThreadPoolExecutor(1) as threads:
            return list(threads.map(pickle.loads(pickle.dumps(function)), jobs))

    for _ in range(2):
        build(STORED, ["train", "val"], tmp_path, pool, published)
    assert seen == [("train", 0), ("train", 1), ("train", 2), ("val", 0)]
    assert missing_blocks(STORED, "train", tmp_path, name) == []
    assert missing_blocks(STORED, "train", tmp_path, feature_name("none")) == [0, 1, 2]  # other weights, other answers

    split = pickle.loads(pickle.dumps(open_split(STORED, "train", tmp_path, name)))
    positions = [149, 3, 64, 63]
    ids = [split.sample_ids[position] for position in positions]
    tables = [np.arange(256, dtype=np.uint8)] * 4
    batch = split.batch(ids, [False] * 4, tables)
    assert not batch.real_frame.all()
    network = load_vggish(published, CPU)
    for clip, real in enumerate(batch.real_frame):
        for frame, counts in enumerate(real):
            expected = network(batch.audio[clip, frame][None])[0] if counts else torch.zeros(128)
            torch.testing.assert_close(batch.audio_feature[clip, frame], expected, rtol=1e-4, atol=1e-4)
    assert batch.audio_feature.std() > 0.1
    assert open_split(STORED, "train", tmp_path).batch(ids, [False] * 4, tables).audio_feature is None
    verify(STORED, "train", tmp_path, name)
    victim = next(cache.cache_folder(STORED, "train", tmp_path).glob(f"{name}-00001.npy"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(InputError, match=rf"missing {name} blocks \[1\]"):
        verify(STORED, "train", tmp_path, name)


def test_threads_are_as_before_and_do_not_matter(published, tmp_path):
    contents = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        build(STORED, ["val"], tmp_path / str(threads), audio_weights=published)
        assert torch.get_num_threads() == threads
        split = DecodedSplit(STORED, "val", tmp_path / str(threads), feature_name(published))
        ids = split.sample_ids
        contents.append(split.batch(ids, [False] * len(ids), [np.arange(256, dtype=np.uint8)] * len(ids)).audio_feature)
    assert torch.equal(*contents)


def test_a_benchmark_that_is_not_cached_is_heard_anew(tmp_path):
    tones = base_job(tmp_path).data.benchmark
    build(tones, ["train"], tmp_path, audio_weights="none")
    assert not list(tmp_path.iterdir())
    split = open_split(tones, "train", tmp_path, "whatever")
    assert split.batch(split.sample_ids[:1], [False], [np.arange(256, dtype=np.uint8)]).audio_feature is None


# Training.

SHORT = replace(SCHEDULE, base_epochs=1, epochs=1)


def tasks(folder):
    """A base task and one after it that starts from its checkpoint, heard through VGGish."""
    first = base_job(folder / "first", config=HEARS, schedule=SHORT)
    return first, later_job(folder / "second", folder / "first", Finetune(), config=HEARS, schedule=SHORT)


def train_second(worker, folder):
    train_task(tasks(folder)[1], worker)


def test_two_workers_learn_what_one_learns_with_vggish(tmp_path):
    first, second = tasks(tmp_path)
    trained(first)
    alone, _ = trained(second)
    on_two_workers(train_second, tmp_path, tmp_path)  # over it
    together, about = left(second.output)
    assert about.world_size == 2
    assert mean_square(alone, together) < 1e-5**2
    assert "audio_encoder._extra_state" in together


def test_training_and_evaluation_run_vggish_never_where_its_answers_are_kept(tmp_path, monkeypatch):
    stored = replace(STORED, image_size_px=32)
    build(stored, ["train", "val"], tmp_path / "cache", audio_weights="none")
    monkeypatch.setattr(FrozenVGGish, "forward", lambda *_: pytest.fail("VGGish ran"))
    first, second = tasks(tmp_path)
    data = Data(stored, str(tmp_path / "cache"), first.data.learned_order, feature_name("none"))
    schedule = replace(SHORT, selection="best_val")
    known = {sample.id for sample in stored.samples("train")}
    for job in (first, second):
        assert {sample.id for sample in job.task.train} <= known
        train_task(replace(job, data=data, schedule=schedule), LocalWorker())


def test_the_visual_only_network_has_no_vggish():
    model = av_segmenter.build(replace(HEARS, audio_weights="absent.pth"), 3, VISUAL_ONLY)
    assert not [name for name in model.state_dict() if "audio" in name]
