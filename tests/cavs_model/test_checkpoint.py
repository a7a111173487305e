"""Checkpoints: what is written is what is read, damage is named, and nothing is a pickle."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from cavs_model.checkpoint import ABOUT, WEIGHTS, About, load, read, read_about, save
from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import NetworkConfig, build
from cavs_model.networks.visual_encoders import VISUAL_ENCODERS
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY

CONFIG = NetworkConfig(visual_encoder="tiny", visual_weights="none", audio_encoder="tiny", audio_dim=8, width=8)


def written(folder, network=AUDIO_VISUAL, num_classes=3, **changes):
    torch.manual_seed(1)
    model = build(CONFIG, num_classes, network)
    about = About(network, num_classes, asdict(CONFIG), ({"loss": 0.5}, {"loss": 0.25}), clips=7, seconds=1.5, world_size=2)
    about = replace(about, **changes)
    save(folder, model.state_dict(), about)
    return model, about


@pytest.mark.parametrize("network", [AUDIO_VISUAL, VISUAL_ONLY])
def test_round_trip(tmp_path, network):
    model, about = written(tmp_path / "deep" / "folder", network)
    assert read_about(tmp_path / "deep" / "folder") == about
    again = load(tmp_path / "deep" / "folder")
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("encoder", VISUAL_ENCODERS)
def test_loading_draws_nothing_and_leaves_nothing_undone(tmp_path, encoder):
    """Parameters get no first weights on the way; what a checkpoint does not hold is made as ever."""
    config = replace(CONFIG, visual_encoder=encoder)
    torch.manual_seed(1)
    model = build(config, 3, AUDIO_VISUAL)
    save(tmp_path, model.state_dict(), About(AUDIO_VISUAL, 3, asdict(config)))
    before = torch.get_rng_state()
    again = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(each, kind)()) for each in (again, model))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(ours[name].stride() == theirs[name].stride() for name in ours)
    assert len(set(dict(model.named_buffers())) - set(model.state_dict())) >= 2  # mean and std, at least


def test_loading_may_draw_what_a_new_network_would(tmp_path):
    model, _ = written(tmp_path)
    after = torch.get_rng_state()  # `written` seeds and builds
    torch.manual_seed(1)
    again = load(tmp_path, draws=True)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_files_are_tensors_and_json_and_no_others_remain(tmp_path):
    model, _ = written(tmp_path)
    written(tmp_path)  # over the first
    assert sorted(os.listdir(tmp_path)) == [ABOUT, WEIGHTS]
    assert set(load_file(tmp_path / WEIGHTS)) == set(model.state_dict())
    assert json.loads((tmp_path / ABOUT).read_text())["network"] == AUDIO_VISUAL


def test_any_memory_format_can_be_saved(tmp_path):
    model, about = written(tmp_path / "plain")
    placed = build(CONFIG, 3, AUDIO_VISUAL).to(memory_format=torch.channels_last)
    placed.load_state_dict(model.state_dict())
    save(tmp_path / "placed", placed.state_dict(), about)
    assert (tmp_path / "placed" / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_loading_does_not_ask_for_the_first_weights_again(tmp_path):
    written(tmp_path, config=asdict(replace(CONFIG, visual_weights=str(tmp_path / "gone.pth"))))
    load(tmp_path)


def test_a_pickle_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    written(tmp_path)
    torch.save(Trap(), tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=WEIGHTS):
        load(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", [WEIGHTS, ABOUT])
def test_a_missing_file_is_named(tmp_path, name):
    written(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(InputError) as caught:
        read(tmp_path)
    assert name in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04\x95" + bytes(50), None])
def test_damaged_weights_are_named(tmp_path, content):
    written(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"network": "audio_visual", "num_classes": 3}',
        b'{"network": "audio_visual", "num_classes": 3, "config": 5}',
        b'{"network": "audio_visual", "num_classes": 3, "config": {}, "history": 5}',
        b'{"network": "audio_visual", "num_classes": 3, "config": {}, "surprise": 1}',
    ],
)
def test_a_damaged_description_is_named(tmp_path, content):
    written(tmp_path)
    (tmp_path / ABOUT).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_about(tmp_path)
    assert str(tmp_path / ABOUT) in str(caught.value)


def refused(folder, changes):
    """What is said of a checkpoint whose description was changed."""
    _, about = written(folder)
    (folder / ABOUT).write_text(json.dumps(asdict(replace(about, **changes))))
    with pytest.raises(InputError) as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {**asdict(CONFIG), "surprise": 1}},
        {"config": {**asdict(CONFIG), "width": 7}},
        {"config": {**asdict(CONFIG), "visual_encoder": "nobody"}},
        {"network": "nobody"},
        {"num_classes": "three"},
    ],
)
def test_a_description_of_no_network_is_named(tmp_path, changes):
    caught = refused(tmp_path, changes)
    assert str(tmp_path / ABOUT) in caught


@pytest.mark.parametrize(
    "changes", [{"num_classes": 4}, {"network": VISUAL_ONLY}, {"config": asdict(replace(CONFIG, width=16))}]
)
def test_weights_of_another_shape_are_named(tmp_path, changes):
    caught = refused(tmp_path, changes)
    assert str(tmp_path / WEIGHTS) in caught
    assert "does not fit its description" in caught
