"""The published networks: their encoders against their packages, AVSBench's sizes, weights from files and from the network."""

import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_networks import make_batch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from cavs_model.errors import InputError
from cavs_model.networks import visual_encoders
from cavs_model.networks.av_segmenter import NetworkConfig, build
from cavs_model.networks.visual_encoders import build_visual_encoder, download
from cavs_model.types import AUDIO_VISUAL

AVSBENCH = NetworkConfig("resnet50", visual_weights="none", audio_encoder="vggish", audio_dim=128, width=256)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def picture(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)


def theirs(name: str) -> tuple[nn.Module, nn.Module]:
    """A published classifier with random weights and the module that gives its four maps, both in evaluation mode."""
    if name == "resnet50":
        whole: nn.Module = resnet50().eval()
        return whole, create_feature_extractor(whole, ["layer1", "layer2", "layer3", "layer4"])
    whole = timm.create_model("pvt_v2_b5").eval()
    maps = timm.create_model("pvt_v2_b5", features_only=True).eval()
    maps.load_state_dict(
        {re.sub(r"^stages\.(\d)", r"stages_\1", key): value for key, value in whole.state_dict().items() if "head." not in key}
    )
    return whole, maps


@pytest.mark.parametrize(
    ("name", "channels"), [("resnet50", (256, 512, 1024, 2048)), ("pvt_v2_b5", (64, 128, 320, 512))], ids=["resnet50", "pvt"]
)
def test_maps_equal_the_packages_from_a_published_file(name: str, channels: tuple[int, ...], tmp_path: Path) -> None:
    whole, maps = theirs(name)
    # Files of old, such as AVSBench's for ResNet-50, have no batch counters.
    stored = {key: value for key, value in whole.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(stored, tmp_path / "published.pth")
    encoder = build_visual_encoder(name, str(tmp_path / "published.pth")).eval()
    image = picture(64)
    with torch.no_grad():
        found = encoder(image)
        expected = maps((image / 255 - MEAN) / STD)
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    assert encoder.channels == channels
    for item, other, width, stride in zip(found, expected, channels, (4, 8, 16, 32), strict=True):
        assert item.shape == (2, width, 64 // stride, 64 // stride)
        assert item.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(item, other, rtol=1e-3, atol=1e-4)


def authors_name(name: str) -> str:
    """PVT-v2's own name for a tensor of timm's."""
    name = name.replace(".dwconv.", ".dwconv.dwconv.")
    name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", lambda found: f"patch_embed{int(found[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", lambda found: f"block{int(found[1]) + 1}.", name)
    return re.sub(r"^stages\.(\d)\.norm\.", lambda found: f"norm{int(found[1]) + 1}.", name)


def test_the_authors_names_of_pvt_load_too(tmp_path: Path) -> None:
    stored = timm.create_model("pvt_v2_b5").state_dict()
    renamed = {authors_name(name): value for name, value in stored.items()}
    expected = ("patch_embed1.proj.weight", "patch_embed4.norm.bias", "block3.39.mlp.dwconv.dwconv.weight", "norm2.weight")
    assert set(expected) <= set(renamed)  # names of the authors' release
    torch.save(renamed, tmp_path / "pvt_v2_b5.pth")
    own = build_visual_encoder("pvt_v2_b5", str(tmp_path / "pvt_v2_b5.pth")).body().state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in own.items())


def test_pvt_drops_no_paths() -> None:
    encoder = build_visual_encoder("pvt_v2_b5", "none").train()
    image = picture(32)
    with torch.no_grad():
        for one, other in zip(encoder(image), encoder(image), strict=True):
            assert torch.equal(one, other)


def test_the_network_of_avsbench_has_its_sizes() -> None:
    model = build(AVSBENCH, 71, AUDIO_VISUAL).eval()
    sizes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    for level, channels in enumerate((256, 512, 1024, 2048)):
        for branch in range(4):
            assert sizes[f"reduce.{level}.branches.{branch}.weight"] == (256, channels, 3, 3)
        for transform in ("theta", "phi", "g"):
            assert sizes[f"fuse.{level}.{transform}.weight"] == (128, 256)
            assert sizes[f"fuse.{level}.{transform}.bias"] == (128,)
        assert sizes[f"fuse.{level}.w_z.weight"] == (256, 128)
        assert sizes[f"fuse.{level}.align.weight"] == (256, 128)
        assert f"fuse.{level}.align.bias" not in sizes
        assert sizes[f"fuse.{level}.norm.weight"] == sizes[f"fuse.{level}.bn.weight"] == (256,)
    convolutions = [shape for name, shape in sizes.items() if name.startswith("decoder.blocks.") and name.endswith("weight")]
    assert set(convolutions) == {(256, 256, 3, 3)}
    assert len(convolutions) == 14  # four blocks of two units of two, less the coarsest block's first unit
    assert sizes["decoder.conv1.weight"] == (128, 256, 3, 3)
    assert sizes["decoder.conv2.weight"] == (32, 128, 3, 3)
    assert sizes["classifier.conv.weight"] == (71, 32, 1, 1)
    dilations = [branch.dilation for branch in model.reduce[0].branches]  # type: ignore[union-attr]
    assert dilations == [branch.padding for branch in model.reduce[0].branches]  # type: ignore[union-attr]
    assert dilations == [(3, 3), (6, 6), (12, 12), (18, 18)]
    spread = torch.cat([branch.weight.flatten() for branch in model.reduce[0].branches]).std()  # type: ignore[union-attr]
    assert spread.item() == pytest.approx(0.01, rel=0.01)
    with torch.no_grad():
        prediction = model(make_batch(1, 2, size=64))
    assert prediction.logits.shape == (1, 2, 71, 64, 64)
    assert [item.shape[2:] for item in prediction.features] == [(256, side, side) for side in (16, 8, 4, 2, 32)]


@pytest.mark.parametrize("name", ["resnet50", "pvt_v2_b5"])
def test_published_encoders_learn(name: str) -> None:
    encoder = build_visual_encoder(name, "none").train()
    sum(item.square().sum() for item in encoder(picture(64))).backward()  # type: ignore[union-attr]
    assert [key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()] == []


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes) -> tuple[str, list[str]]:
    """Addresses at which `content` lies (with its hash in the name), and the list of what is downloaded."""
    source = folder / f"tiny-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    source.write_bytes(content)
    monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
    asked: list[str] = []
    fetch = torch.hub.download_url_to_file
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda url, *rest, **more: asked.append(url) or fetch(url, *rest, **more)
    )
    return source.as_uri(), asked


def test_a_download_is_made_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = serve(monkeypatch, tmp_path, b"weights")
    for _ in range(2):
        file = download(url)
        assert file.read_bytes() == b"weights"
        assert file.parent == tmp_path / "home" / "hub" / "checkpoints"
    assert asked == [url]
    wrong = tmp_path / "tiny-00000000.pth"
    wrong.write_bytes(b"weights")
    with pytest.raises(InputError, match="invalid hash"):
        download(wrong.as_uri())
    assert not (file.parent / wrong.name).exists()


def test_imagenet_weights_of_resnet_are_those_of_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "resnet50.pth"
    torch.save(resnet50().state_dict(), file)
    asked: list[str] = []
    monkeypatch.setattr(visual_encoders, "download", lambda url: asked.append(url) or file)
    own = build_visual_encoder("resnet50", "imagenet").body().state_dict()
    stored = torch.load(file, weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in own.items())
    assert asked == ["https://download.pytorch.org/models/resnet50-0676ba61.pth"]


HUB_CLIENT = """
import sys, torch
from safetensors.torch import load_file
from cavs_model.networks.visual_encoders import build_visual_encoder
own, stored = build_visual_encoder("pvt_v2_b5", "imagenet").body().state_dict(), load_file(sys.argv[1])
print(len(own), all(torch.equal(value, stored[name]) for name, value in own.items()))
"""


@contextmanager
def hub(file: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that speaks the hub's protocol of downloads, for one file: its address, and what it was asked for."""
    asked: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(200)
            for name, value in (("X-Repo-Commit", "a" * 40), ("ETag", '"weights"'), ("Content-Length", file.stat().st_size)):
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            with open(file, "rb") as content:
                shutil.copyfileobj(content, self.wfile)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_imagenet_weights_of_pvt_come_from_its_hub_once_and_then_without_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model("pvt_v2_b5").state_dict(), file)
    with hub(file) as (address, asked):
        # In a process of its own: the hub's client reads its settings when it is imported.
        settings = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", HUB_CLIENT, str(file)]
        first = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert first.stdout.split() == [str(len(timm.create_model("pvt_v2_b5").state_dict()) - 2), "True"], first.stderr
    path = "/timm/pvt_v2_b5.in1k/resolve/main/model.safetensors"
    assert [each for each in asked if each.endswith(path)] == [f"HEAD {path}", f"GET {path}"]
    again = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert again.stdout == first.stdout, again.stderr


def test_no_network_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(InputError, match=r"no route.*put it here as .*resnet50-0676ba61.pth.*set visual_weights"):
        build_visual_encoder("resnet50", "imagenet")
    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = unreachable  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(InputError, match=r"timm/pvt_v2_b5.in1k .*no route.*set visual_weights"):
        build_visual_encoder("pvt_v2_b5", "imagenet")


def test_without_timm_the_other_encoders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs the package timm.*\[pvt\].*resnet50"):
        build_visual_encoder("pvt_v2_b5", "none")
