"""The decoded cache: complete or refused, however it was interrupted; and batches against a loop over pixels."""

import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from cavs_model.datasets import cache
from cavs_model.datasets.cache import (
    DecodedSplit,
    build,
    cache_folder,
    missing_blocks,
    open_split,
    renumbering,
    verify,
    write_block,
)
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError, OutageError
from cavs_model.networks.vggish import feature_name
from cavs_model.types import IGNORE, LabelRule


@dataclass(frozen=True)
class StoredTones(Tones):
    """Tones that are kept on disk."""

    train_clips: int = 150  # blocks of 64, 64 and 22
    image_size_px: int = 16
    short_clips: bool = True
    first_frame_only: bool = True

    @property
    def cached(self) -> bool:
        return True


TONES = StoredTones()


def block_files(root, split="train"):
    return sorted(cache_folder(TONES, split, root).iterdir())


def assert_same_clips(left, right):
    for item in fields(left):
        np.testing.assert_array_equal(getattr(left, item.name), getattr(right, item.name))


def test_what_is_read_is_what_was_rendered(tmp_path):
    build(TONES, ["train", "val"], tmp_path)
    split = open_split(TONES, "train", tmp_path)
    assert split.sample_ids == tuple(sample.id for sample in TONES.samples("train"))
    positions = [149, 3, 64, 63, 3]
    assert_same_clips(split.read(positions), TONES.render("train", positions))
    assert cache_folder(TONES, "train", tmp_path).parent.name == f"tones-{TONES.fingerprint()[:16]}"
    assert len(block_files(tmp_path)) == 3
    with pytest.raises(IndexError, match="150"):
        split.read([150])


def test_an_opened_split_pickles_small_and_reads_again(tmp_path):
    build(TONES, ["train"], tmp_path)
    split = open_split(TONES, "train", tmp_path)
    split.read([0])
    stored = pickle.dumps(split)
    assert len(stored) < 1000
    assert_same_clips(pickle.loads(stored).read([7]), split.read([7]))


def test_building_resumes_and_calls_nothing_twice(tmp_path):
    assert missing_blocks(TONES, "train", tmp_path) == [0, 1, 2]
    write_block(TONES, "train", 1, tmp_path)
    (before,) = block_files(tmp_path)
    written = before.stat().st_mtime_ns
    assert missing_blocks(TONES, "train", tmp_path) == [0, 2]
    seen = []

    def pool(function, jobs):
        seen.extend(jobs)
        with ThreadPoolExecutor(2) as threads:
            return threads.map(pickle.loads(pickle.dumps(function)), jobs)

    build(TONES, ["train", "test"], tmp_path, pool)
    assert seen == [("train", 0), ("train", 2), ("test", 0)]
    assert before.stat().st_mtime_ns == written
    build(TONES, ["train", "test"], tmp_path, pool)
    assert len(seen) == 3


def test_an_incomplete_cache_is_refused_by_name(tmp_path):
    write_block(TONES, "train", 1, tmp_path)
    with pytest.raises(InputError) as caught:
        open_split(TONES, "train", tmp_path)
    assert str(cache_folder(TONES, "train", tmp_path)) in str(caught.value)
    assert "[0, 2]" in str(caught.value)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def scramble_header(path):
    path.write_bytes(b"nonsense" + path.read_bytes()[8:])


def another_shape(path):
    np.save(path, np.zeros((64, 3), np.uint8))


def another_type(path):
    records = np.load(path)
    with open(path, "wb") as file:
        np.save(file, records.view(f"V{records.itemsize}"))
        file.write(bytes(32))


def with_objects(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [truncate, empty, scramble_header, another_shape, another_type, with_objects])
def test_a_damaged_block_is_found_warned_of_and_rebuilt(tmp_path, caplog, damage):
    build(TONES, ["train"], tmp_path)
    victim = block_files(tmp_path)[1]
    damage(victim)
    assert missing_blocks(TONES, "train", tmp_path) == [1]
    assert str(victim) in caplog.text
    with pytest.raises(InputError, match=r"\[1\]"):
        open_split(TONES, "train", tmp_path)
    build(TONES, ["train"], tmp_path)
    assert_same_clips(open_split(TONES, "train", tmp_path).read([70]), TONES.render("train", [70]))


def test_verify_finds_a_flipped_bit(tmp_path):
    build(TONES, ["train"], tmp_path)
    verify(TONES, "train", tmp_path)
    victim = block_files(tmp_path)[2]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert missing_blocks(TONES, "train", tmp_path) == []  # a look at headers cannot see it
    with pytest.raises(InputError, match=victim.name):
        verify(TONES, "train", tmp_path)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_block_with_a_flipped_bit_is_told_of_and_rebuilt_when_it_is_read(tmp_path, caplog, monkeypatch):
    build(TONES, ["train"], tmp_path)
    victim = block_files(tmp_path)[1]
    flip_a_bit(victim)
    hashed, real = [], cache._checksum_matches
    monkeypatch.setattr(cache, "_checksum_matches", lambda path: hashed.append(path) or real(path))
    split = open_split(TONES, "train", tmp_path)
    assert_same_clips(split.read([5]), TONES.render("train", [5]))
    assert victim not in hashed  # each block when it is needed
    assert_same_clips(split.read([70, 71]), TONES.render("train", [70, 71]))
    assert f"{victim} is damaged (its checksum differs) and is rebuilt" in caplog.text
    assert real(victim)
    for again in (split, open_split(TONES, "train", tmp_path), pickle.loads(pickle.dumps(split))):
        again.read(range(len(again)))
    assert sorted(hashed) == sorted([block_files(tmp_path)[0], victim, victim, block_files(tmp_path)[2]])  # once a content


def test_vectors_of_sound_with_a_flipped_bit_are_found_by_the_next_build(tmp_path, caplog):
    tones = StoredTones(val_clips=4)
    build(tones, ["val"], tmp_path, audio_weights="none")
    name = feature_name("none")
    [victim] = [path for path in cache_folder(tones, "val", tmp_path).iterdir() if path.name.startswith(name)]
    before = victim.read_bytes()
    flip_a_bit(victim)
    split = DecodedSplit(tones, "val", tmp_path, name)
    with pytest.raises(OutageError, match=victim.name):  # it is over with the next build
        split.batch(split.sample_ids[:1], [False], [np.arange(256, dtype=np.uint8)])
    build(tones, ["val"], tmp_path, audio_weights="none")
    assert f"{victim} is damaged (its checksum differs) and will be rebuilt" in caplog.text
    assert victim.read_bytes() == before


def test_writers_of_the_same_block_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: write_block(TONES, "train", 0, tmp_path), range(8)))
    assert [path.name for path in block_files(tmp_path)] == [f"clips-v{cache.FORMAT_VERSION}-00000.npy"]
    assert missing_blocks(TONES, "train", tmp_path) == [1, 2]


def test_a_block_is_rendered_by_one_thread_of_blas_whatever_was_set(tmp_path, monkeypatch):
    seen = []

    def threads():
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    render = StoredTones.render
    monkeypatch.setattr(StoredTones, "render", lambda *given: seen.append(threads()) or render(*given))
    with threadpool_limits(2, "blas"):
        before = threads()
        write_block(TONES, "train", 0, tmp_path)
        assert threads() == before
    assert before
    assert all(count == 1 for counts in seen for count in counts)
    assert seen


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the write itself fails half way, as on a full disk
    try:
        with pytest.raises(OutageError) as caught:
            write_block(TONES, "train", 0, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(cache_folder(TONES, "train", tmp_path)) in str(caught.value)
    assert block_files(tmp_path) == []
    assert missing_blocks(TONES, "train", tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_only_a_full_disk_may_pass(tmp_path, monkeypatch, number):
    monkeypatch.setattr(cache.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(InputError, match=f"cannot write the cache folder .*: {os.strerror(number)}") as caught:
        write_block(TONES, "train", 0, tmp_path)
    assert isinstance(caught.value, OutageError) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_an_interrupted_write_leaves_no_block(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_block(TONES, "train", 0, tmp_path)
    assert block_files(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the cache folder .*file.tones-"):
        build(TONES, ["train"], tmp_path / "file")

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.tempfile, "mkstemp", refused)  # file modes do not stop root, so the refusal is played
    with pytest.raises(InputError, match=r"cannot write the cache folder .*Permission denied"):
        build(TONES, ["train"], tmp_path)


def parts(root):
    return list(cache_folder(TONES, "train", root).glob(".*.part"))


def _write_until_killed(root, mends):
    """Half of a block, by a build or by a reader that mends it."""

    def fsync(_):
        (root / "began").touch()
        time.sleep(600)

    cache.os.fsync = fsync
    DecodedSplit(TONES, "train", root).read([70]) if mends else write_block(TONES, "train", 1, root)


@pytest.mark.parametrize("mends", [False, True])
def test_what_a_killed_process_left_half_written_goes_with_the_next_build_and_no_living_ones(tmp_path, mends):
    build(TONES, ["train"], tmp_path)
    victim = block_files(tmp_path)[1]
    if mends:
        flip_a_bit(victim)
    else:
        victim.unlink()
    child = multiprocessing.get_context("spawn").Process(target=_write_until_killed, args=(tmp_path, mends))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [part] = parts(tmp_path)
        build(TONES, ["train"], tmp_path)
        assert parts(tmp_path) == [part]
    finally:
        child.kill()  # SIGKILL
        child.join()
        child.close()
    assert parts(tmp_path) == [part]
    build(TONES, ["train"], tmp_path)
    assert len(block_files(tmp_path)) == 3


def test_who_is_taken_for_dead_before_the_lock_is_held_begins_anew(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def late(file, how):
        if not taken:
            [part] = parts(tmp_path)
            part.unlink()
            taken.append(part)
        return real(file, how)

    monkeypatch.setattr(cache.fcntl, "flock", late)
    write_block(TONES, "train", 0, tmp_path)
    assert taken
    assert missing_blocks(TONES, "train", tmp_path) == [1, 2]
    assert parts(tmp_path) == []


def test_without_locks_blocks_are_written_and_nobody_is_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    folder = cache_folder(TONES, "train", tmp_path)
    folder.mkdir(parents=True)
    left = folder / ".clips-v1-00000.npy.abc.part"
    left.write_bytes(b"half")
    build(TONES, ["train"], tmp_path)
    assert missing_blocks(TONES, "train", tmp_path) == []
    assert parts(tmp_path) == [left]


def test_leftovers_of_a_killed_writer_are_not_blocks(tmp_path):
    folder = cache_folder(TONES, "val", tmp_path)
    folder.mkdir(parents=True)
    (folder / ".clips-v1-00000.npy.abc.part").write_bytes(b"half")
    assert missing_blocks(TONES, "val", tmp_path) == [0]


def test_a_benchmark_that_renders_another_shape_is_a_bug(tmp_path):
    class Broken(StoredTones):
        def render(self, split, positions):
            return Tones(image_size_px=24).render(split, positions)

    with pytest.raises(ValueError, match="expected"):
        write_block(Broken(), "val", 0, tmp_path)


def test_tones_need_no_cache(tmp_path):
    tones = Tones()
    build(tones, tones.splits(), tmp_path)
    verify(tones, "train", tmp_path)
    assert not list(tmp_path.iterdir())
    split = open_split(tones, "val", tmp_path / "absent")
    assert len(split) == tones.val_clips
    assert_same_clips(split.read([2, 9]), tones.render("val", [2, 9]))


def test_unknown_split_names_the_choices(tmp_path):
    for call in (missing_blocks, open_split, cache_folder):
        with pytest.raises(InputError, match="choose one of: train, val, test"):
            call(TONES, "dev", tmp_path)
    with pytest.raises(InputError, match="dev"):
        open_split(Tones(), "dev", tmp_path)


def test_renumbering_follows_the_order():
    table = renumbering(("ant", "bee", "cat"), ("cat", "ant", "bee"))
    assert table[:4].tolist() == [0, 2, 3, 1]
    assert table[IGNORE] == IGNORE
    assert (table[4:] == IGNORE).all()
    for wrong in (("ant", "bee"), ("ant", "bee", "dog"), ("ant", "ant", "bee", "cat")):
        with pytest.raises(InputError, match="every class once"):
            renumbering(("ant", "bee", "cat"), wrong)


def test_batch_against_a_loop_over_pixels(tmp_path):
    build(TONES, ["train"], tmp_path)
    split = open_split(TONES, "train", tmp_path)
    learned = renumbering(TONES.class_names(), TONES.orders()["reversed"])
    new = LabelRule(range(3, 5), 0)
    seen = LabelRule(range(1, 3), IGNORE)
    positions, rehearsed = [0, 103, 65, 147, 0, 99], [False, True, False, True, True, False]
    ids = [split.sample_ids[position] for position in positions]
    batch = split.batch(ids, rehearsed, [(seen if again else new).table()[learned] for again in rehearsed])

    clips = TONES.render("train", positions)
    expected = np.empty_like(clips.label)
    for n, t, y, x in np.ndindex(expected.shape):
        rule = seen if rehearsed[n] else new
        benchmark_id = int(clips.label[n, t, y, x])
        if not clips.real_frame[n, t] or not clips.labelled_frame[n, t]:
            expected[n, t, y, x] = IGNORE
        elif benchmark_id == 0:
            expected[n, t, y, x] = 0
        else:
            learned_id = 5 - benchmark_id
            expected[n, t, y, x] = learned_id if learned_id in rule.keep else rule.otherwise
    assert {0, IGNORE} < set(np.unique(expected))
    np.testing.assert_array_equal(batch.label.numpy(), expected)
    np.testing.assert_array_equal(batch.image.numpy(), clips.image)
    np.testing.assert_array_equal(batch.audio.numpy(), clips.audio.astype(np.float32))
    np.testing.assert_array_equal(batch.real_frame.numpy(), clips.real_frame)
    np.testing.assert_array_equal(batch.labelled_frame.numpy(), clips.labelled_frame)
    assert batch.sample_id == tuple(ids)
    assert batch.rehearsed.tolist() == rehearsed
    types = (batch.image.dtype, batch.audio.dtype, batch.label.dtype, batch.real_frame.dtype, batch.rehearsed.dtype)
    assert types == (torch.uint8, torch.float32, torch.uint8, torch.bool, torch.bool)


def test_labels_of_frames_that_do_not_count_are_ignored_even_where_the_data_have_some():
    class Careless(Tones):
        def render(self, split, positions):
            clips = super().render(split, positions)
            clips.label[...] = 1
            clips.labelled_frame[...] |= ~clips.real_frame
            return clips

    split = open_split(Careless(short_clips=True, first_frame_only=True, frames=4), "train", "")
    batch = split.batch(split.sample_ids[:2], [False, False], np.stack([np.arange(256, dtype=np.uint8)] * 2))
    assert not (batch.labelled_frame & ~batch.real_frame).any()
    assert (batch.label[batch.labelled_frame] == 1).all()
    assert (batch.label[~batch.labelled_frame] == IGNORE).all()


def test_changing_a_batch_leaves_the_cache_alone(tmp_path):
    build(TONES, ["val"], tmp_path)
    split = open_split(TONES, "val", tmp_path)
    table = [np.arange(256, dtype=np.uint8)]
    batch = split.batch(split.sample_ids[:1], [False], table)
    kept = batch.image.clone()
    batch.image.zero_()
    assert torch.equal(split.batch(split.sample_ids[:1], [False], table).image, kept)


def test_batch_refuses_what_does_not_fit():
    split = open_split(Tones(), "val", "")
    table = np.arange(256, dtype=np.uint8)
    with pytest.raises(KeyError, match="nobody"):
        split.batch(["nobody"], [False], [table])
    with pytest.raises(ValueError, match="zip"):
        split.batch(split.sample_ids[:2], [False, True], [table])
