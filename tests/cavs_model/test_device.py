"""Nothing stays on the CPU by mistake: networks, losses, scores and answers on a CUDA device that is only pretended.

torch's fake tensors have a shape and a device but no values, and refuse to mix devices as CUDA does, so this needs no GPU. What
depends on values has a stand-in of the same shape and device. Backward passes need a real device and are not seen here.
"""

import numpy as np
import pytest
import torch
from method_cases import CLASSES, OLD, task
from test_methods import every_method
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cavs_model.evaluate import count, frozen
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.networks.fusion import RealFrames
from cavs_model.networks.visual_encoders import VISUAL_ENCODERS
from cavs_model.predict import answers
from cavs_model.train import global_means
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY, Batch, Step
from cavs_model.worker import Arithmetic, LocalWorker

GPU = torch.device("cuda", 0)
CLIPS, SIZE = 2, 32
TINY = NetworkConfig("tiny", "none", "tiny", audio_dim=8, width=8)


def place(self, module):
    """Arithmetic.place, whose Module.to does not move what is fake."""
    for each in module.modules():
        for name, value in list(each._parameters.items()):
            if value is not None:
                each._parameters[name] = nn.Parameter(value.detach().to(self.device), value.requires_grad)
        for name, value in list(each._buffers.items()):
            if value is not None:
                each._buffers[name] = value.to(self.device)
    return module


def values(tensor, *args, **kwargs):
    """Tensor.numpy, which CUDA refuses too."""
    assert tensor.device.type == "cpu", "numpy() of a tensor on the GPU"
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def counted(index, weights=None, minlength=0):
    """torch.bincount, whose length depends on values; nothing here counts beyond `minlength`."""
    return torch.zeros(minlength, dtype=torch.int64, device=index.device)


def real_frames(real_frame, real_frame_cpu):
    """RealFrames.of for the batches made here, whose last frame is padding where a clip has several."""
    clips, frames = real_frame.shape
    assert real_frame_cpu.device.type == "cpu"
    index = None if frames == 1 else torch.arange(clips * frames - 1).to(real_frame.device)
    return RealFrames(clips, frames, index, torch.ones(clips).to(real_frame.device))


@pytest.fixture
def numbers(monkeypatch):
    """Arithmetic on a pretended GPU: tensors that are made while it is there are fake."""
    monkeypatch.setattr(Arithmetic, "place", place)
    monkeypatch.setattr(torch.Tensor, "numpy", values)
    monkeypatch.setattr(torch, "bincount", counted)
    monkeypatch.setattr(RealFrames, "of", real_frames)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        yield Arithmetic(GPU, bf16=False)


def batch(frames=1):
    every = torch.ones(CLIPS, frames, dtype=torch.bool)
    made = Batch(
        tuple("ab"), torch.zeros(CLIPS, frames, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(CLIPS, frames, 96, 64),
        torch.zeros(CLIPS, frames, SIZE, SIZE, dtype=torch.uint8), every, every.clone(), torch.zeros(CLIPS, dtype=torch.bool),
    )  # fmt: skip
    return made.to(GPU)


def network(config, num_classes, numbers, name=AUDIO_VISUAL):
    with unset_fake_temporarily():  # building may depend on values
        built = AVSegmenter(config, num_classes, name)
    return frozen(built, numbers)


def test_what_is_pretended_refuses_what_a_gpu_refuses(numbers):
    on_gpu = torch.zeros(3).to(GPU)
    with pytest.raises(RuntimeError, match="device"):
        on_gpu + torch.zeros(3)
    with pytest.raises(AssertionError, match="GPU"):
        on_gpu.numpy()


@pytest.mark.parametrize("name", [AUDIO_VISUAL, VISUAL_ONLY])
@pytest.mark.parametrize("encoder", VISUAL_ENCODERS)
def test_networks(encoder, name, numbers):
    said = network(NetworkConfig(encoder, "none"), CLASSES, numbers, name)(batch(frames=3))
    assert said.logits.shape == (CLIPS, 3, CLASSES, SIZE, SIZE)
    assert {each.device for each in (said.logits, *said.features, *said.encoder)} == {GPU}


@every_method
def test_losses_and_what_they_are_prepared_from(method, numbers, monkeypatch):
    given, learned = batch(), network(TINY, CLASSES, numbers)
    teacher = network(TINY, OLD, numbers) if method.needs_teacher else None
    prepared = method.prepare(teacher, iter([given]), task(), lambda tensor: tensor) if teacher else None
    step = Step(given, learned(given), teacher(given) if teacher else None, task(), prepared)
    monkeypatch.setattr(torch, "bincount", lambda *_, **__: pytest.fail("every step would wait for the GPU"))
    terms = global_means(method.loss(step), LocalWorker(GPU))
    assert terms
    assert {value.device for value in terms.values()} == {GPU}


@every_method
def test_scores(method, numbers):
    models = {name: network(TINY, CLASSES, numbers, name) for name in (AUDIO_VISUAL, VISUAL_ONLY)}
    old = {name: network(TINY, OLD, numbers, name) for name in (AUDIO_VISUAL, VISUAL_ONLY)}
    asked = [(method.scores_before, method.score_before, old), (method.scores_after, method.score_after, models)]
    for wanted, score, given in asked:
        if wanted:
            assert score(given, batch(), task()).sample_ids == ("a", "b")


def test_counts(numbers):
    found = count(network(TINY, CLASSES, numbers), iter([batch()]), CLASSES, GPU)
    assert found.device == GPU


def test_answers_to_a_clip_of_no_data_set(numbers):
    pictures = [np.zeros((20, 30, 3), np.uint8)] * 2
    learned = network(TINY, CLASSES, numbers)
    with pytest.raises(AssertionError, match="GPU"):  # the answer itself has not come yet
        learned(batch()).classes.numpy()
    [first, second] = answers(learned, pictures, np.zeros((2, 16000), np.float32), SIZE, GPU)
    assert first.label.shape == second.confidence.shape == (20, 30)
