"""Collage: scenes recomposed from their plan by a loop, sources kept apart, and a pack that is verified."""

import csv
import dataclasses
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cavs_model.datasets import collage as collage_module
from cavs_model.datasets.cache import build, open_split
from cavs_model.datasets.collage import CLASS_NAMES, FAMILIES, MIN_VISIBLE, SHIPPED_PACK, Collage, _recording
from cavs_model.errors import InputError

SPLITS = ("train", "val", "test/unseen", "test/seen")
SUBSETS = ("both", "single", "multi")
SMALL = Collage(image_size_px=64)


@pytest.fixture(scope="module")
def manifest():
    with open(SHIPPED_PACK / "manifest.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.fixture
def pack(tmp_path):
    shutil.copytree(SHIPPED_PACK, tmp_path / "pack")
    return tmp_path / "pack"


def owners(scene, frames, size):
    """Per frame the index of the object on top (-1: none) and per object its pixels, pasted one pixel at a time."""
    top = np.full((frames, size, size), -1)
    areas = []
    for n, placed in enumerate(scene.objects):
        with Image.open(SHIPPED_PACK / placed.image) as image:
            pixels = image.convert("RGBA").resize((placed.width_px, placed.height_px), Image.Resampling.BILINEAR)
        alpha = np.asarray(pixels)[..., 3]
        alpha = alpha[:, ::-1] if placed.flipped else alpha
        areas.append(int((alpha / 255 >= 0.5).sum()))
        for t, (left, upper) in enumerate(placed.corners):
            for row, column in np.argwhere(alpha / 255 >= 0.5):
                y, x = upper + row, left + column
                if 0 <= y < size and 0 <= x < size:
                    top[t, y, x] = n
    return top, areas


@pytest.mark.parametrize("subset", ["both", "multi"])
def test_label_is_what_sounds_and_is_on_top_and_every_object_is_visible(subset):
    collage = Collage(subset=subset, image_size_px=64, frames=3)
    positions = range(12)
    clips = collage.render("train", positions)
    silent_seen = 0
    for n in positions:
        scene = collage.scene("train", n)
        top, areas = owners(scene, 3, 64)
        shown = np.array([placed.class_id if placed.sounding else 0 for placed in scene.objects] + [0])
        np.testing.assert_array_equal(clips.label[n], shown[top])
        for t in range(3):
            for index, area in enumerate(areas):
                assert (top[t] == index).sum() >= MIN_VISIBLE * area > 0
        sounding = sorted(placed.class_id for placed in scene.objects if placed.sounding)
        assert collage.samples("train")[n].classes == tuple(sounding)
        for index, placed in enumerate(scene.objects):
            if not placed.sounding:
                silent_seen += 1
                assert placed.class_id not in sounding
                covered = top == index
                assert covered.any()
                assert not clips.label[n][covered].any()
    assert silent_seen


@pytest.mark.parametrize("size", [48, 96])
def test_the_last_resort_of_the_layout_shows_all_objects_in_full(monkeypatch, size):
    monkeypatch.setattr(collage_module, "_LAYOUTS", 0)
    crowded = Collage(subset="multi", image_size_px=size)
    for position in range(30):
        scene = crowded.scene("train", position)
        top, areas = owners(scene, 2, size)
        assert [(top[1] == n).sum() for n in range(len(areas))] == areas


def test_labels_hold_exactly_the_sounding_classes_in_every_frame():
    for split in SPLITS:
        clips = SMALL.render(split, range(8))
        for n, sample in enumerate(SMALL.samples(split)[:8]):
            for t in range(SMALL.frames):
                assert set(np.unique(clips.label[n, t])) == {0, *sample.classes}


def test_portions_and_processes_do_not_matter():
    together = SMALL.render("val", [0, 1, 130, 131])
    again = pickle.loads(pickle.dumps(SMALL)).render("val", [131, 0])
    for item in dataclasses.fields(together):
        np.testing.assert_array_equal(getattr(together, item.name)[[3, 0]], getattr(again, item.name))


def test_seed_split_and_position_each_give_another_scene():
    scenes = {
        Collage(seed=seed).scene(split, position) for seed in (0, 1) for split in ("train", "test/seen") for position in (0, 1)
    }
    assert len(scenes) == len({scene.crop for scene in scenes}) == len({scene.objects[0].brightness for scene in scenes}) == 8


def test_other_counts_leave_a_clip_as_it_is():
    assert Collage(train_clips=24, test_clips=48).scene("test/seen", 40) == Collage().scene("test/seen", 40)


@pytest.mark.parametrize(
    ("split", "positions", "source"),
    [
        ("train", range(60), "train"),
        ("val", range(40), "val"),
        ("val", range(120, 160), "train"),
        ("test/unseen", range(60), "test"),
        ("test/seen", range(60), "train"),
    ],
)
def test_splits_use_only_their_own_sources(manifest, split, positions, source):
    collage = Collage(image_size_px=48)
    names = collage.class_names()
    for position in positions:
        scene = collage.scene(split, position)
        assert {manifest[path]["split"] for path in collage.sources(split, position)} == {source}
        assert manifest[scene.background]["kind"] == "background"
        for placed in scene.objects:
            row = manifest[placed.image]
            assert (row["kind"], row["class"]) == ("image", names[placed.class_id - 1])
        heard = [manifest[path]["class"] for path in scene.sounds]
        assert heard == [names[class_id - 1] for class_id in collage.samples(split)[position].classes]
        assert collage.styles(split, position) == tuple(manifest[placed.image]["style"] for placed in scene.objects)


def test_ids_tell_the_part_and_are_unique():
    collage = Collage(val_clips=49)
    samples = [sample.id for split in SPLITS for sample in collage.samples(split)]
    assert len(set(samples)) == len(samples) == 1440 + 49 + 2 * 240
    parts = Counter(sample.id.rsplit("-", 1)[0] for sample in collage.samples("val"))
    assert parts == {"val-unseen": 25, "val-seen": 24}


@pytest.mark.parametrize("subset", SUBSETS)
def test_every_class_is_in_every_split_and_none_rules(subset):
    smallest = Collage(subset=subset, train_clips=24, val_clips=48, test_clips=24)
    for split in SPLITS:
        assert {c for sample in smallest.samples(split) for c in sample.classes} == set(range(1, 25))
    counts = Counter(c for sample in Collage(subset=subset).samples("train") for c in sample.classes)
    assert max(counts.values()) < 4 * min(counts.values())
    if subset == "single":
        assert set(counts.values()) == {60}


def test_subsets_differ_in_the_number_of_sounds():
    sizes = {subset: Counter(len(s.classes) for s in Collage(subset=subset).samples("train")) for subset in SUBSETS}
    assert set(sizes["single"]) == {1}
    assert set(sizes["multi"]) == {2, 3}
    assert set(sizes["both"]) == {1, 2, 3}
    assert [Collage(subset=subset).name for subset in SUBSETS] == ["collage", "collage-s", "collage-m"]


@pytest.mark.parametrize("subset", SUBSETS)
def test_about_half_of_the_clips_show_a_silent_object(subset):
    collage = Collage(subset=subset, image_size_px=48)
    scenes = [collage.scene("train", position) for position in range(200)]
    share = np.mean([any(not placed.sounding for placed in scene.objects) for scene in scenes])
    assert 0.4 < share < 0.6
    assert {len(scene.objects) for scene in scenes} <= {1, 2, 3}


def test_who_is_met_together_is_of_one_family():
    collage = Collage(image_size_px=48)
    for position in range(60):
        cast = {CLASS_NAMES[placed.class_id - 1] for placed in collage.scene("train", position).objects}
        assert any(cast <= set(family) for family in FAMILIES.values())
    assert len(CLASS_NAMES) == 24
    assert all(len(family) > 3 for family in FAMILIES.values())


def test_orders_are_permutations_and_the_entangled_come_last():
    orders = Collage().orders()
    for order in orders.values():
        assert sorted(order) == list(CLASS_NAMES)
    assert orders["alphabetical"] == CLASS_NAMES == tuple(sorted(CLASS_NAMES))
    assert orders["co-occurring-last"][-5:] == ("car", "dog", "songbird", "horse", "person")
    assert orders == Collage(seed=5, subset="multi").orders()
    beside = Counter(c for s in Collage(subset="multi", train_clips=4800).samples("train") for c in s.classes)
    assert {CLASS_NAMES[c - 1] for c, _ in beside.most_common(5)} == set(orders["co-occurring-last"][-5:])


def test_settings_divide_the_classes():
    for setting in Collage().settings():
        base, step = map(int, setting.split("-"))
        assert (24 - base) % step == 0


@pytest.mark.parametrize("corner", [(-9, 3), (3, -9), (40, 3), (3, 40), (-2, 30), (30, -2), (8, 9)])
def test_overlap_of_objects_inside_across_and_beyond_the_border(corner):
    frame, piece = collage_module._overlap(corner, (5, 4), 32)
    pasted = np.zeros((32, 32), int)
    pasted[frame] = np.arange(1, 21).reshape(5, 4)[piece]
    expected = np.zeros((32, 32), int)
    for row, column in np.ndindex(5, 4):
        y, x = corner[1] + row, corner[0] + column
        if 0 <= y < 32 and 0 <= x < 32:
            expected[y, x] = 4 * row + column + 1
    np.testing.assert_array_equal(pasted, expected)


def test_every_default_scene_can_be_laid_out():
    collage = Collage()
    for split in SPLITS:
        for position in range(len(collage.samples(split))):
            objects = collage.scene(split, position).objects
            assert 1 <= len(objects) <= 3
            assert all(30 <= max(placed.width_px, placed.height_px) <= 63 for placed in objects)  # 0.35 and 0.65 of 96 px


def test_tracks_are_loud_windows_that_follow_each_other(manifest):
    followed = 0
    for relative in [path for path, row in manifest.items() if row["kind"] == "sound"][::7]:
        recording = _recording(str(SHIPPED_PACK / relative))
        windows = [recording.wave[start : start + 16000] for start in recording.starts]
        energies = [np.sqrt((window**2).mean()) for window in windows]
        assert all(len(window) == 16000 for window in windows)
        assert min(energies) >= 0.29 * max(energies) > 0
        for seed in range(4):
            first, second = recording.track(2, np.random.default_rng(seed))
            start = next(s for s, window in zip(recording.starts, windows, strict=True) if np.array_equal(window, first))
            assert any(np.array_equal(second, window) for window in windows)
            if start + 16000 in recording.starts:
                followed += 1
                np.testing.assert_array_equal(second, recording.wave[start + 16000 : start + 32000])
    assert followed > 20


def test_audio_is_finite_and_depends_on_the_clip():
    audio = SMALL.render("train", range(6)).audio
    assert audio.shape == (6, 2, 96, 64)
    assert np.isfinite(audio).all()
    assert (audio.astype(np.float32).std(axis=(1, 2, 3)) > 0.3).all()
    assert np.abs(np.diff(audio.astype(np.float32).mean(axis=(1, 2)), axis=0)).max(axis=1).min() > 0.1


def test_frames_move_and_one_frame_is_enough():
    clips = Collage(frames=4, image_size_px=48).render("train", [0])
    assert (np.diff(clips.image.astype(int), axis=1) != 0).any(axis=(0, 2, 3, 4)).all()
    assert Collage(frames=1, image_size_px=48).render("train", [0]).image.shape == (1, 1, 3, 48, 48)


def test_every_cut_out_keeps_pixels_at_the_smallest_size(manifest):
    for path in [path for path, row in manifest.items() if row["kind"] == "image"]:
        with Image.open(SHIPPED_PACK / path) as image:
            factor = 0.35 * 48 / max(image.size)
            small = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
        assert (np.asarray(small)[..., 3] >= 128).any(), path


def test_each_field_changes_the_fingerprint_but_not_the_place_of_the_pack(pack):
    collage = Collage()
    changes = {"subset": "single", "frames": 3, "image_size_px": 97, "seed": 1}
    changes |= {"train_clips": 1441, "val_clips": 241, "test_clips": 241}
    assert set(changes) == {item.name for item in dataclasses.fields(collage)} - {"pack"}
    prints = {dataclasses.replace(collage, **{name: value}).fingerprint() for name, value in changes.items()}
    assert len(prints | {collage.fingerprint()}) == len(changes) + 1
    assert Collage(pack=str(pack)).fingerprint() == Collage().fingerprint()
    with open(pack / "manifest.csv", "a") as file:
        file.write("\n")
    assert Collage(pack=str(pack)).fingerprint() != Collage().fingerprint()


def test_the_shipped_pack_is_whole_and_attributed(manifest):
    Collage().check()
    assert len(manifest) == 1028
    assert (SHIPPED_PACK / "ATTRIBUTION.md").is_file()
    shipped = {path.relative_to(SHIPPED_PACK).as_posix() for path in SHIPPED_PACK.rglob("*") if path.is_file()}
    assert shipped - set(manifest) == {"manifest.csv", "README.md", "ATTRIBUTION.md"}


def test_check_names_a_damaged_or_missing_file(pack):
    victim = pack / "sounds" / "cow" / "001.ogg"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"cow/001\.ogg is damaged"):
        Collage(pack=str(pack)).check()
    victim.unlink()
    with pytest.raises(InputError, match=r"cow/001\.ogg is missing"):
        Collage(pack=str(pack)).check()


def test_check_names_what_a_manifest_lacks(pack):
    lines = (pack / "manifest.csv").read_text().splitlines()
    (pack / "manifest.csv").write_text("\n".join(line for line in lines if ",sound,wolf," not in line))
    with pytest.raises(InputError, match="no sound wolf for train"):
        Collage(pack=str(pack)).check()


def test_an_undecodable_file_is_named_when_rendering(pack):
    for path in (pack / "backgrounds").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"backgrounds/.* cannot be decoded"):
        Collage(pack=str(pack)).render("train", [0])


def test_an_absent_pack_is_named(tmp_path):
    collage = Collage(pack=str(tmp_path / "nowhere"))
    for call in (collage.check, collage.fingerprint, lambda: collage.render("train", [0])):
        with pytest.raises(InputError, match=r"nowhere.manifest\.csv"):
            call()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"subset": "all"}, "choose one of: both, single, multi"),
        ({"frames": 0}, "Collage.frames"),
        ({"frames": 11}, "from 1 to 10"),
        ({"image_size_px": 16}, "Collage.image_size_px"),
        ({"train_clips": 0}, "Collage.train_clips"),
        ({"val_clips": 47}, "from 48 to 1000000"),
        ({"test_clips": 23}, "Collage.test_clips"),
        ({"seed": -1}, "Collage.seed"),
    ],
)
def test_bad_fields_are_named(change, named):
    with pytest.raises(InputError, match=named):
        Collage(**change)


def test_unknown_split_and_position():
    with pytest.raises(InputError, match="choose one of: train, val, test/unseen, test/seen"):
        Collage().samples("test")
    with pytest.raises(IndexError, match="240"):
        Collage().scene("val", 240)


def test_collage_through_the_cache(tmp_path):
    collage = Collage(image_size_px=48, test_clips=24)
    build(collage, ["test/unseen"], tmp_path)
    stored = open_split(collage, "test/unseen", tmp_path).read([3, 20])
    rendered = collage.render("test/unseen", [3, 20])
    for item in dataclasses.fields(stored):
        np.testing.assert_array_equal(getattr(stored, item.name), getattr(rendered, item.name))
    assert [path.name for path in Path(tmp_path).glob("*/*")] == ["test-unseen"]
