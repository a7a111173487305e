"""References for results: a network that only sees and one that only hears."""

from dataclasses import replace

import pytest
import torch
from test_networks import TINY, make_batch, stir

from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import build
from cavs_model.types import AUDIO_VISUAL, VISUAL_ONLY


def network(modalities, kind=AUDIO_VISUAL):
    torch.manual_seed(0)
    model = build(replace(TINY, modalities=modalities), 3, kind)
    stir(model)
    return model.eval()


def other(batch, *names):
    """The batch with other contents of the same kind in these fields."""
    return replace(batch, **{name: getattr(batch, name).flip(0) for name in names})


def test_picture_is_the_visual_only_network():
    model, twin, batch = network("picture"), network("both", VISUAL_ONLY), make_batch()
    assert list(model.state_dict()) == list(twin.state_dict())
    expected = model(batch).logits
    assert torch.equal(expected, twin(batch).logits)
    assert torch.equal(expected, model(other(batch, "audio")).logits)
    assert not torch.allclose(expected, model(other(batch, "image")).logits)


def test_sound_sees_mid_grey():
    model, both, batch = network("sound"), network("both"), make_batch()
    grey = replace(batch, image=torch.full_like(batch.image, 128))
    expected = model(batch).logits
    assert torch.equal(expected, model(other(batch, "image")).logits)
    assert torch.equal(expected, both(grey).logits)  # the same network, shown nothing
    assert not torch.allclose(expected, model(other(batch, "audio")).logits)
    assert not torch.allclose(expected, both(batch).logits)


def test_modalities_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="unknown modalities 'smell'; choose one of: both, picture, sound"):
        replace(TINY, modalities="smell")
    with pytest.raises(InputError, match=r'network\.modalities = "sound" leaves the visual-only network nothing'):
        network("sound", VISUAL_ONLY)
