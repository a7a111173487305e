"""Tones: what a clip shows and sounds, and its contact sheet."""

import dataclasses
import pickle

import numpy as np
import pytest
from PIL import Image

from cavs_model.datasets.base import digest
from cavs_model.datasets.contact_sheet import contact_sheet
from cavs_model.datasets.log_mel import mel_matrix
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.types import IGNORE


def all_clips(tones, split):
    return tones.render(split, range(len(tones.samples(split))))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_hold_exactly_the_sounding_classes(split):
    tones = Tones()
    clips = all_clips(tones, split)
    for n, sample in enumerate(tones.samples(split)):
        for t in range(tones.frames):
            assert set(np.unique(clips.label[n, t])) == {0, *sample.classes}


def test_clips_have_one_or_two_sounds_and_some_silent_shapes():
    tones = Tones(train_clips=64)
    samples = tones.samples("train")
    assert {len(sample.classes) for sample in samples} == {1, 2}
    silent = [tones.silent_classes("train", n) for n in range(64)]
    assert 15 < sum(map(bool, silent)) < 50
    assert all(set(sample.classes).isdisjoint(hidden) for sample, hidden in zip(samples, silent, strict=True))


@pytest.mark.parametrize("num_classes", [2, 4, 12])
def test_every_split_has_every_class(num_classes):
    tones = Tones(num_classes=num_classes)
    for split in tones.splits():
        assert {c for sample in tones.samples(split) for c in sample.classes} == set(range(1, num_classes + 1))


def colour_segmentation(tones, image):
    """The class whose colour is nearest, or 0 where it is dark. image [3 H W]."""
    palette = np.stack([tones._colour(c) for c in range(1, tones.num_classes + 1)])
    distance = np.abs(image[None].astype(float) - palette[:, :, None, None]).sum(1)
    return np.where(image.max(0) > 100, distance.argmin(0) + 1, 0)


def test_picture_and_sound_together_tell_the_label_and_the_picture_alone_does_not():
    tones = Tones()
    clips = all_clips(tones, "train")
    bins = {c: int(mel_matrix()[round(tones.pitch_hz(c) * 512 / 16000)].argmax()) for c in range(1, 5)}
    both = picture = 0.0
    foreground = 0
    for n, t in np.ndindex(clips.label.shape[:2]):
        seen = colour_segmentation(tones, clips.image[n, t])
        loud = [c for c, i in bins.items() if clips.audio[n, t, :, i].mean() > 0]
        truth = clips.label[n, t]
        shown = seen != 0
        foreground += shown.sum()
        both += (np.where(np.isin(seen, loud), seen, 0) == truth)[shown].sum()
        picture += (seen == truth)[shown].sum()
    assert both / foreground > 0.99
    assert picture / foreground < 0.85


def test_portions_and_processes_do_not_matter():
    tones = Tones()
    together = tones.render("val", range(6))
    apart = pickle.loads(pickle.dumps(tones)).render("val", [5, 2])
    for item in dataclasses.fields(together):
        np.testing.assert_array_equal(getattr(together, item.name)[[5, 2]], getattr(apart, item.name))
    assert (Tones(seed=1).render("val", [5]).image != together.image[5]).any()


def test_short_clips_and_first_frame_annotation():
    tones = Tones(frames=3, short_clips=True, first_frame_only=True)
    clips = tones.render("train", [0, 1])
    assert clips.real_frame.tolist() == [[True, True, True], [True, True, False]]
    assert clips.labelled_frame.tolist() == [[True, False, False], [True, False, False]]
    assert (clips.label[~clips.labelled_frame] == IGNORE).all()
    assert (clips.label[clips.labelled_frame] != IGNORE).all()
    assert not clips.image[1, 2].any()
    assert not clips.audio[1, 2].any()
    assert tones.render("test", [1]).labelled_frame.tolist() == [[True, True, False]]


def test_orders_and_settings_fit_the_classes():
    for tones in (Tones(), Tones(num_classes=6), Tones(num_classes=2)):
        for order in tones.orders().values():
            assert sorted(order) == sorted(tones.class_names())
        for setting in tones.settings():
            base, step = map(int, setting.split("-"))
            assert (tones.num_classes - base) % step == 0
    assert Tones().settings() == ("2-1", "2-2")


def test_each_field_changes_the_fingerprint():
    tones = Tones()
    others = [
        dataclasses.replace(tones, **{item.name: not value if isinstance(value, bool) else value + 1})
        for item in dataclasses.fields(tones)
        for value in [getattr(tones, item.name)]
    ]
    assert len({tones.fingerprint(), *(other.fingerprint() for other in others)}) == 1 + len(dataclasses.fields(tones))
    assert Tones().fingerprint() == tones.fingerprint()
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_classes": 1}, "Tones.num_classes"),
        ({"num_classes": 13}, "from 2 to 12"),
        ({"train_clips": 0}, "Tones.train_clips"),
        ({"frames": 0}, "Tones.frames"),
        ({"frames": 1, "short_clips": True}, "Tones.frames"),
        ({"image_size_px": 8}, "Tones.image_size_px"),
        ({"seed": -1}, "Tones.seed"),
        ({"seed": 0.5}, "whole number"),
    ],
)
def test_bad_fields_are_named(change, named):
    with pytest.raises(InputError, match=named):
        Tones(**change)


def test_unknown_split_and_position():
    with pytest.raises(InputError, match="choose one of: train, val, test"):
        Tones().samples("dev")
    with pytest.raises(IndexError, match="position 16"):
        Tones().render("val", [16])


def test_contact_sheet_tints_labelled_pixels_only():
    tones = Tones(train_clips=5)
    sheet = contact_sheet(tones, "train", 3)
    assert isinstance(sheet, Image.Image)
    row_height = sheet.height // 3
    assert row_height * 3 == sheet.height
    picture = np.asarray(sheet)[14 : 14 + 128 : 4, :128:4]  # the first frame, not enlarged
    masked = np.asarray(sheet)[14 : 14 + 128 : 4, 132 : 132 + 128 : 4]
    clip = tones.render("train", [0])
    np.testing.assert_array_equal(picture, clip.image[0, 0].transpose(1, 2, 0))
    plain = (picture * 0.6).astype(np.uint8)
    np.testing.assert_array_equal((masked != plain).any(-1), clip.label[0, 0] != 0)


def test_contact_sheet_refuses_nonsense():
    with pytest.raises(InputError, match="count 0"):
        contact_sheet(Tones(), "train", 0)
    with pytest.raises(InputError, match="dev"):
        contact_sheet(Tones(), "dev", 1)
