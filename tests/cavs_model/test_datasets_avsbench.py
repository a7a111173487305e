"""AVSBench in a folder: what is decoded, which rows count, and that nothing wrong with it is passed over."""

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import soundfile
from PIL import Image
from test_scenario import METADATA, PUBLISHED, SAMPLE_CSV, SAMPLE_SIZES, VIDEOS, sizes

from cavs_model.datasets import cache, clip_files
from cavs_model.datasets.avsbench import CLASS_NAMES, CO_OCCURRING, AVSBench, class_ids, palette
from cavs_model.datasets.cache import build, cache_folder, missing_blocks, open_split
from cavs_model.datasets.clip_files import Problem, read_quarantine, write_quarantine
from cavs_model.datasets.log_mel import log_mel
from cavs_model.errors import InputError
from cavs_model.evaluate import Data
from cavs_model.scenario import Scenario
from cavs_model.types import IGNORE

HEADER = "vid,uid,s_min,s_sec,a_obj,split,label"
# uid, a_obj, split, label, width and height of the frames
VIDEO_ROWS = [
    ("wide_s", "accordion", "train", "v1s", (48, 32)),
    ("tall_m", "man_woman", "train", "v1m", (32, 48)),
    ("long-2", "violin_boy", "train", "v2", (40, 60)),
    ("last_s", "woman", "train", "v1s", (32, 32)),
    ("noise", "background", "train", "v1m", (32, 32)),
    ("val_s", "bird", "val", "v1s", (64, 48)),
    ("val_2", "cat_dog", "val", "v2", (48, 64)),
    ("test_2", "off-the-screen", "test", "v2", (50, 30)),
    ("test_m", "utv_man", "test", "v1m", (32, 32)),
    ("test_s", "man", "test", "v1s", (96, 40)),
]
SECONDS = {"v1s": 5, "v1m": 5, "v2": 10}
RATE = 16000


def naive_colour(class_id):
    """Bit by bit: bits 0, 3, 6 of the id are the top bits of red, bits 1, 4, 7 of green, bits 2, 5 of blue."""
    bits = [(class_id >> n) % 2 for n in range(8)]
    red = 128 * bits[0] + 64 * bits[3] + 32 * bits[6]
    green = 128 * bits[1] + 64 * bits[4] + 32 * bits[7]
    return red, green, 128 * bits[2] + 64 * bits[5]


def write_csv(root, rows):
    lines = [f"vid,{uid},0,{n},{names},{split},{label}" for n, (uid, names, split, label, *_) in enumerate(rows)]
    (root / "metadata.csv").write_text("\n".join([HEADER, *lines, ""]))


def write_tree(root, rows=VIDEO_ROWS):
    """A tree in the release's layout. Returns per uid the class ids of its masks, [frames H W]."""
    root.mkdir(parents=True, exist_ok=True)
    write_csv(root, rows)
    (root / "label2idx.json").write_text(json.dumps({"background": 0, **{n: i + 1 for i, n in enumerate(CLASS_NAMES)}}))
    written = {}
    for n, (uid, names, split, label, (width, height)) in enumerate(rows):
        rng = np.random.default_rng(n)
        folder, count = root / label / uid, SECONDS[label]
        (folder / "frames").mkdir(parents=True)
        (folder / "labels_rgb").mkdir()
        choices = [0, *(CLASS_NAMES.index(name) + 1 for name in names.split("_") if name in CLASS_NAMES)]
        written[uid] = rng.choice(choices, (count, height, width))
        for t in range(count):
            pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((width, height)).save(folder / "frames" / f"{t}.jpg", quality=95)
            if t and (label, split) == ("v1s", "train"):
                continue
            mask = Image.fromarray(written[uid][t].astype(np.uint8))
            colours = [value for class_id in range(256) for value in naive_colour(class_id)]
            mask.putpalette(colours)
            (mask if n % 2 else mask.convert("RGB")).save(folder / "labels_rgb" / f"{t}.png")
        wave = rng.integers(-9000, 9000, count * RATE + (0, 37, -5000)[n % 3], dtype=np.int16)
        soundfile.write(folder / "audio.wav", wave, RATE)
    return written


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("avsbench") / "clean"
    return root, write_tree(root)


@pytest.fixture
def own(tree, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(tree[0], tmp_path / "own")


def bench(root, **fields):
    return AVSBench(root=str(root), **{"image_size_px": 32, **fields})


def test_palette_against_a_loop_over_bits():
    colours = [naive_colour(class_id) for class_id in range(71)]
    assert [tuple(colour) for colour in palette().tolist()] == colours
    assert colours[:5] == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert colours[70] == (32, 128, 128)
    picture = np.random.default_rng(0).integers(0, 71, (9, 7))
    np.testing.assert_array_equal(class_ids(np.array(colours, np.uint8)[picture]), picture)
    for wrong in ((1, 0, 0), (255, 255, 255), naive_colour(71)):
        with pytest.raises(ValueError, match=r"colour \(\d+, \d+, \d+\) is of no class"):
            class_ids(np.array([[(0, 0, 0), wrong]], np.uint8))


def naive_label(ids, size, crop):
    """The nearest pixel of every place of the output, one at a time."""
    height, width = ids.shape
    scaled = (size * height // min(ids.shape), size * width // min(ids.shape)) if crop else (size, size)
    top, left = ((scaled[0] - size) // 2, (scaled[1] - size) // 2) if crop else (0, 0)
    out = np.empty((size, size), np.uint8)
    for y in range(size):
        for x in range(size):
            row = int((y + top + 0.5) * height / scaled[0])
            out[y, x] = ids[row, int((x + left + 0.5) * width / scaled[1])]
    return out


@pytest.mark.parametrize("size", [32, 16])  # at which no place falls between two pixels
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_clips_hold_what_was_written(tree, split, size):
    root, written = tree
    benchmark = bench(root, image_size_px=size)
    rows = [row for row in VIDEO_ROWS if row[2] == split]
    assert [sample.id for sample in benchmark.samples(split)] == [row[0] for row in rows]
    clips = benchmark.render(split, range(len(rows)))
    assert clips.image.shape == (len(rows), 10, 3, size, size)
    for n, (uid, _, _, label, (width, height)) in enumerate(rows):
        count = SECONDS[label]
        labelled = 1 if (label, split) == ("v1s", "train") else count
        assert clips.real_frame[n].tolist() == [t < count for t in range(10)]
        assert clips.labelled_frame[n].tolist() == [t < labelled for t in range(10)]
        for t in range(count):
            with Image.open(root / label / uid / "frames" / f"{t}.jpg") as frame:
                if split == "train":
                    short = min(width, height)
                    scaled = frame.resize((size * width // short, size * height // short), Image.Resampling.BILINEAR)
                    pixels = np.asarray(scaled)
                    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
                    pixels = pixels[top : top + size, left : left + size]
                else:
                    pixels = np.asarray(frame.resize((size, size), Image.Resampling.BILINEAR))
            np.testing.assert_array_equal(clips.image[n, t], pixels.transpose(2, 0, 1))
            expected = naive_label(written[uid][t], size, split == "train") if t < labelled else IGNORE
            np.testing.assert_array_equal(clips.label[n, t], expected)
        wave = np.zeros(count * RATE, np.float32)
        stored = soundfile.read(root / label / uid / "audio.wav", dtype="float32")[0][: len(wave)]
        wave[: len(stored)] = stored
        np.testing.assert_array_equal(clips.audio[n, :count], log_mel(wave.reshape(count, RATE)).astype(np.float16))
        assert not clips.image[n, count:].any()
        assert not clips.audio[n, count:].any()
        assert (clips.label[n, count:] == IGNORE).all()


def test_a_clip_without_scaling_is_the_middle_of_the_picture(tree):
    root, written = tree
    clips = bench(root).render("train", [0])
    np.testing.assert_array_equal(clips.label[0, 0], written["wide_s"][0, :, 8:40])


def test_longer_videos_give_their_first_frames_and_portions_do_not_matter(tree):
    root, _ = tree
    whole, few = bench(root), bench(root, frames=3)
    together, apart = whole.render("train", [0, 1, 2]), pickle.loads(pickle.dumps(few)).render("train", [2, 0])
    for item in dataclasses.fields(together):
        np.testing.assert_array_equal(getattr(together, item.name)[[2, 0], :3], getattr(apart, item.name))
    assert apart.real_frame.all()


def test_channels_are_averaged(own):
    path = own / "v1m" / "tall_m" / "audio.wav"
    left, right = np.random.default_rng(0).uniform(-0.4, 0.4, (2, 5 * RATE))
    soundfile.write(path, np.stack([left, right], 1), RATE, subtype="FLOAT")
    both = bench(own).render("train", [1]).audio
    soundfile.write(path, (left + right) / 2, RATE, subtype="FLOAT")
    np.testing.assert_allclose(bench(own).render("train", [1]).audio, both, atol=5e-3)


def test_the_stream_reads_it_through_the_cache(tree, tmp_path):
    benchmark = bench(tree[0], image_size_px=16)
    scenario = Scenario("60-10")
    tasks = scenario.tasks(benchmark)
    assert [[sample.id for sample in task.train] for task in tasks] == [
        ["wide_s", "tall_m", "long-2"],
        ["tall_m", "long-2", "last_s"],
    ]
    build(benchmark, ["train"], tmp_path)
    split = open_split(benchmark, "train", tmp_path)
    data = Data(benchmark, str(tmp_path), scenario.learned_order(benchmark))
    for task in tasks:
        ids = [sample.id for sample in task.train]
        batch = split.batch(ids, [False] * len(ids), [data.table(task.train_rule)] * len(ids))
        for n, sample in enumerate(task.train):
            wanted = {class_id for class_id in sample.classes if class_id in task.new_classes}
            assert set(batch.label[n][batch.labelled_frame[n]].unique().tolist()) == {0, *wanted}
    assert ids_of(benchmark, "test") == ["test_2", "test_m", "test_s"]  # sounds of no class count there
    assert [sample.classes for sample in benchmark.samples("test")] == [(), (41, 66), (41,)]


KILLED = """
import os, signal, sys
from cavs_model.datasets import cache
from cavs_model.datasets.avsbench import AVSBench
cache.BLOCK_CLIPS = 2
replace = os.replace
def replaced(source, target):
    if target.name.endswith("1.npy"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
cache.os.replace = replaced
cache.build(AVSBench(root=sys.argv[1], image_size_px=32), ["train"], sys.argv[2])
"""


def test_decoding_goes_on_where_it_was_killed(tree, tmp_path, monkeypatch):
    process = subprocess.run([sys.executable, "-c", KILLED, str(tree[0]), str(tmp_path)], check=False)
    assert process.returncode == -signal.SIGKILL
    monkeypatch.setattr(cache, "BLOCK_CLIPS", 2)
    benchmark = bench(tree[0])
    assert missing_blocks(benchmark, "train", tmp_path) == [1, 2]
    (first,) = cache_folder(benchmark, "train", tmp_path).glob("*.npy")
    written, told = first.stat().st_mtime_ns, []
    build(benchmark, ["train"], tmp_path, on_block=lambda done, missing: told.append((done, missing)))
    assert told == [(1, 2), (2, 2)]
    assert first.stat().st_mtime_ns == written
    read = open_split(benchmark, "train", tmp_path).read(range(5))
    for item in dataclasses.fields(read):
        np.testing.assert_array_equal(getattr(read, item.name), getattr(benchmark.render("train", range(5)), item.name))


def ids_of(benchmark, split):
    return [sample.id for sample in benchmark.samples(split)]


def published(folder):
    """A root with the published rows where they lie beside the repository, else a few; and the sizes to expect."""
    folder.mkdir(exist_ok=True)
    paths = [METADATA / name for name in ("metav2s.csv", "metav2m.csv")]
    if all(path.exists() for path in paths):
        single, multiple = (path.read_text() for path in paths)
        (folder / "metadata.csv").write_text(single + multiple.split("\n", 1)[1])
        return folder, PUBLISHED
    (folder / "metadata.csv").write_text(SAMPLE_CSV)
    return folder, SAMPLE_SIZES


@pytest.mark.parametrize("subset", ["ci", "cis", "cim"])
def test_subsets_and_tasks_have_their_published_sizes(subset, tmp_path):
    root, expected = published(tmp_path / "root")
    benchmark = bench(root, subset=subset)
    for (name, setting), (overlapped, disjoint) in expected.items():
        if name == subset.upper():
            assert sizes(benchmark, setting, "overlapped") == overlapped
            assert sizes(benchmark, setting, "disjoint") == disjoint
    counts = {split: len(benchmark.samples(split)) for split in benchmark.splits()}
    few = {"ci": (12, 1, 1), "cis": (7, 1, 0), "cim": (5, 0, 1)}[subset]
    assert counts == (VIDEOS[subset.upper()] if expected is PUBLISHED else dict(zip(benchmark.splits(), few, strict=True)))
    samples = [sample for split in benchmark.splits() for sample in benchmark.samples(split)]
    without = sum(not sample.classes for sample in samples)
    assert without == (0 if subset == "cim" else 32 if expected is PUBLISHED else 2)
    assert len({sample.id for sample in samples}) == len(samples)
    assert benchmark.videos() == tuple(video for video in bench(root).videos() if video.belongs_to(subset))


def test_the_rows_written_here_are_read_alike(tmp_path):
    (tmp_path / "metadata.csv").write_text(SAMPLE_CSV.replace("\n", "\r\n"), newline="")
    for (subset, setting), (overlapped, disjoint) in SAMPLE_SIZES.items():
        benchmark = bench(tmp_path, subset=subset.lower())
        assert (sizes(benchmark, setting, "overlapped"), sizes(benchmark, setting, "disjoint")) == (overlapped, disjoint)


def test_orders_and_names():
    benchmark = AVSBench(subset="cim")
    assert benchmark.name == "avsbench-cim"
    assert len(set(CLASS_NAMES)) == 70
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)
    orders = benchmark.orders()
    assert orders["alphabetical"] == CLASS_NAMES
    assert orders["co-occurring-last"][-10:] == CO_OCCURRING
    assert orders["co-occurring-last"][-5:] == ("accordion", "bassoon", "trumpet", "boy", "tuba")
    assert sorted(orders["co-occurring-last"]) == list(CLASS_NAMES)
    assert list(orders["co-occurring-last"][:60]) == sorted(orders["co-occurring-last"][:60])
    steps = [len(Scenario(setting).class_counts(benchmark)) for setting in benchmark.settings()]
    assert steps == [2, 3, 6]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"subset": "all"}, "choose one of: ci, cis, cim"),
        ({"frames": 0}, "AVSBench.frames must be a whole number from 1 to 10"),
        ({"frames": 11}, "AVSBench.frames"),
        ({"image_size_px": 8}, "AVSBench.image_size_px"),
    ],
)
def test_bad_fields_are_named(fields, named):
    with pytest.raises(InputError, match=named):
        AVSBench(**fields)


def test_a_root_must_be_given_and_be_there(tmp_path):
    for call in (AVSBench().check, AVSBench().fingerprint, AVSBench().problems, lambda: AVSBench().samples("val")):
        with pytest.raises(InputError, match=r"^benchmark\.root must name the folder"):
            call()
    with pytest.raises(InputError, match="by an absolute path"):
        bench("some/folder").check()
    with pytest.raises(InputError, match="by an absolute path"):
        bench("/a\0b").check()
    with pytest.raises(InputError, match=f"none at {tmp_path}/absent"):
        bench(tmp_path / "absent").check()
    with pytest.raises(InputError, match=r"cannot read .*metadata.csv: No such file"):
        bench(tmp_path).samples("train")
    with pytest.raises(InputError, match="choose one of: train, val, test"):
        AVSBench().samples("dev")


@pytest.mark.parametrize("text", ["", "\n", "vid,uid\n", HEADER.replace("a_obj", "obj"), HEADER + ",uid\n", '"', "\0" * 99])
def test_a_table_without_its_columns_is_refused(tmp_path, text):
    (tmp_path / "metadata.csv").write_text(text)
    for call in (bench(tmp_path).check, bench(tmp_path).problems):
        with pytest.raises(InputError, match=r"metadata.csv must have the columns vid, uid"):
            call()


def test_columns_may_stand_in_another_order_with_others_between(tree, tmp_path):
    write_csv(tmp_path, VIDEO_ROWS)
    lines = (tmp_path / "metadata.csv").read_text().splitlines()
    turned = [",".join([*reversed(line.split(",")), '"a, b"']) for line in lines]
    (tmp_path / "metadata.csv").write_bytes(("\ufeff" + "\r\n".join(turned)).encode())
    for split in ("train", "val", "test"):
        assert bench(tmp_path).samples(split) == bench(tree[0]).samples(split)


def test_a_clean_tree_has_no_problem(tree):
    benchmark = bench(tree[0])
    benchmark.check()
    assert benchmark.problems() == ()


def test_position_out_of_range(tree):
    with pytest.raises(IndexError, match="position 5"):
        bench(tree[0]).render("train", [5])


def bomb(path):
    """A few bytes that claim to be a picture of 30000 x 30000 pixels."""
    Image.new("RGB", (8, 8)).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 30000, 30000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_every_kind_of_problem_is_in_one_report(own):
    csv_lines = [
        "v,short_row,0,0,dog,train",  # line 12
        "v,long_row,0,0,dog,train,v2,extra",
        "v,what,0,0,unicorn_man_unicorn,train,v2",
        "v,where,0,0,dog,dev,v2",
        "v,which,0,0,dog,train,v3",
        "v,wide_s,0,0,dog,train,v1s",
        "v,../../up,0,0,dog,train,v1s",
        'v,"open,0,0,dog,train,v1s',
        "v,gone,0,0,dog,train,v1s",
        "v,\u00e9t\u00e9,0,0,background_dog,train,v1s",
    ]
    with (own / "metadata.csv").open("a") as file:
        file.write("\n".join(csv_lines) + "\n")
    with (own / "label2idx.json").open("w") as file:
        json.dump({"background": 0}, file)
    (own / "v1s/wide_s/labels_rgb/0.png").unlink()
    (own / "v1m/tall_m/frames/1.jpg").write_bytes(b"\xff\xd8 nothing")
    shutil.copy(own / "v1m/tall_m/frames/0.jpg", own / "v1m/tall_m/frames/5.jpg")
    (own / "v1m/tall_m/frames/2.jpg").unlink()
    Image.new("RGB", (50, 4)).save(own / "v1m/tall_m/frames/3.jpg")
    frame = (own / "v1m/tall_m/frames/4.jpg").read_bytes()
    (own / "v1m/tall_m/frames/4.jpg").write_bytes(frame[: len(frame) // 2])
    labels = own / "v2/long-2/labels_rgb"
    Image.new("RGB", (40, 60), (1, 2, 3)).save(labels / "0.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)).save(labels / "1.png")
    Image.new("RGB", (40, 40)).save(labels / "2.png")
    bomb(labels / "3.png")
    Image.new("RGB", (40, 60)).save(labels / "4.png", "JPEG")
    Image.new("1", (5000, 5000)).save(labels / "5.png")
    (labels / "6.png").write_bytes(b"")
    (labels / "7.png").unlink()
    os.mkfifo(labels / "7.png")
    shutil.rmtree(own / "v1s/last_s/frames")
    (own / "v1m/noise/audio.wav").unlink()
    soundfile.write(own / "v1s/val_s/audio.wav", np.zeros(5 * 44100), 44100)
    soundfile.write(own / "v2/val_2/audio.wav", np.zeros(9 * RATE), RATE)
    (own / "v2/test_2/audio.wav").write_bytes(b"RIFF")
    soundfile.write(own / "v1m/test_m/audio.wav", np.full(5 * RATE, np.nan), RATE, subtype="FLOAT")
    soundfile.write(own / "v1s/test_s/audio.wav", np.zeros((5 * RATE, 9)), RATE)

    expected = [
        (0, "label2idx.json", "differs from the class list, first at 'accordion'"),
        (2, "v1s/wide_s/labels_rgb", "holds 0 images, expected 1: lacks 0.png"),
        (3, "v1m/tall_m/frames", "holds 5 images, expected 5: lacks 2.jpg, has 5.jpg too many"),
        (3, "v1m/tall_m/frames/1.jpg", "cannot be decoded"),
        (3, "v1m/tall_m/frames/3.jpg", "has 50 x 4 px, allowed"),
        (3, "v1m/tall_m/frames/4.jpg", "cannot be decoded"),
        (4, "v2/long-2/labels_rgb/0.png", "has a colour (1, 2, 3) is of no class"),
        (4, "v2/long-2/labels_rgb/1.png", "has more than 256 colours"),
        (4, "v2/long-2/labels_rgb/2.png", "has 40 x 40 px, not the shape of its frame of 40 x 60 px"),
        (4, "v2/long-2/labels_rgb/3.png", "exceeds limit"),
        (4, "v2/long-2/labels_rgb/4.png", "cannot be decoded"),
        (4, "v2/long-2/labels_rgb/5.png", "has 5000 x 5000 px, allowed"),
        (4, "v2/long-2/labels_rgb/6.png", "cannot be decoded"),
        (4, "v2/long-2/labels_rgb/7.png", "is not a file"),
        (5, "v1s/last_s/frames", "is missing"),
        (6, "v1m/noise/audio.wav", "is missing"),
        (7, "v1s/val_s/audio.wav", "has 44100 Hz, expected 16000 Hz"),
        (8, "v2/val_2/audio.wav", "is 9.00 s long: of 10 s"),
        (9, "v2/test_2/audio.wav", "cannot be decoded"),
        (10, "v1m/test_m/audio.wav", "no finite numbers"),
        (11, "v1s/test_s/audio.wav", "has 9 channels"),
        (12, "metadata.csv", "has 6 columns, expected 7"),
        (13, "metadata.csv", "has 8 columns, expected 7"),
        (14, "metadata.csv", "unknown class 'unicorn' in a_obj"),
        (14, "metadata.csv", "class 'unicorn' repeated in a_obj"),
        (14, "v2/what", "is missing"),
        (15, "metadata.csv", "unknown split 'dev'; one of: train, val, test"),
        (16, "metadata.csv", "unknown label 'v3'; one of: v1s, v1m, v2"),
        (17, "metadata.csv", "the uid stands in row 2 too"),
        (18, "metadata.csv", "uid '../../up' is no plain name"),
        (19, "metadata.csv", "is not a line of comma-separated values"),
        (20, "v1s/gone", "is missing"),
        (21, "metadata.csv", r"uid '\xe9t\xe9' is no plain name"),
        (21, "metadata.csv", "unknown class 'background' in a_obj"),
    ]
    problems = bench(own).problems()
    assert [(each.row, each.file) for each in problems] == [(row, file) for row, file, _ in expected]
    for problem, (_, _, what) in zip(problems, expected, strict=True):
        assert what in problem.what
        assert str(own) not in problem.what
    for benchmark in (bench(own), bench(own, subset="cim")):
        with pytest.raises(InputError, match=r"row 12 .'short_row'.: has 6 columns.*check_data"):
            benchmark.check()
    # What can be rendered does not depend on who asks: quarantined videos are out, the rest is as it was.
    keep_out = own / "quarantine.json"
    write_quarantine(keep_out, [each.uid for each in problems if each.uid])
    with pytest.raises(InputError, match=r"row 19"):  # a line without a uid cannot be quarantined
        bench(own, quarantine=str(keep_out)).samples("train")


DAMAGES = {
    "frames/2.jpg": lambda path: path.write_bytes(b"x"),
    "frames/0.jpg": lambda path: path.unlink(),
    "labels_rgb/1.png": lambda path: Image.new("RGB", (32, 48), (9, 9, 9)).save(path),
    "labels_rgb/4.png": lambda path: Image.new("RGB", (48, 32)).save(path),
    "labels_rgb/3.png": bomb,
    "audio.wav": lambda path: soundfile.write(path, np.zeros(4 * RATE), RATE),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_rendering_names_what_cannot_be_used_and_quarantine_leaves_it_out(own, tree, name):
    DAMAGES[name](own / "v1m" / "tall_m" / name)
    benchmark = bench(own)
    (problem, *_) = problems = benchmark.problems()
    assert {each.uid for each in problems} == {"tall_m"}
    with pytest.raises(InputError) as caught:
        benchmark.render("train", [0, 1])
    assert f"{own / 'metadata.csv'}, row 3 ('tall_m'): v1m/tall_m/{name} " in str(caught.value)
    write_quarantine(own / "out.json", {problem.uid})
    kept = bench(own, quarantine=str(own / "out.json"))
    kept.check()
    assert ids_of(kept, "train") == ["wide_s", "long-2", "last_s", "noise"]
    np.testing.assert_array_equal(kept.render("train", [1]).image, bench(tree[0]).render("train", [2]).image)
    assert kept.problems() == problems  # the report hides nothing
    assert kept.fingerprint() != benchmark.fingerprint()


def test_check_names_a_missing_folder(own):
    shutil.rmtree(own / "v2" / "test_2")
    with pytest.raises(InputError, match=r"row 9 .'test_2'.: folder .*v2/test_2 is missing"):
        bench(own).check()
    bench(own, subset="cim").check()
    (own / "label2idx.json").write_text("[1")
    with pytest.raises(InputError, match=r"label2idx\.json cannot be read"):
        bench(own, subset="cim").check()
    write_csv(own, VIDEO_ROWS[:1])
    with pytest.raises(InputError, match="no video of subset 'cim'"):
        bench(own, subset="cim").check()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"uids": 3}', '{"uids": [3]}', '{"uids": [""]}', "\0", "[" * 99999])
def test_a_file_that_is_no_quarantine_is_refused(tmp_path, text):
    write_csv(tmp_path, VIDEO_ROWS)
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"out\.json"):
        bench(tmp_path, quarantine=str(path)).samples("train")


def test_a_quarantine_must_be_there_and_fit(tmp_path):
    write_csv(tmp_path, VIDEO_ROWS)
    with pytest.raises(InputError, match=r"absent\.json: No such file"):
        bench(tmp_path, quarantine=str(tmp_path / "absent.json")).samples("train")
    with pytest.raises(InputError, match=r"benchmark.quarantine must name .* by an absolute path"):
        bench(tmp_path, quarantine="out.json").samples("train")
    write_quarantine(tmp_path / "out.json", ["wide_s", "other"])
    with pytest.raises(InputError, match=r"uid 'other' is not in metadata\.csv"):
        bench(tmp_path, quarantine=str(tmp_path / "out.json")).samples("train")
    with pytest.raises(InputError, match="cannot write the quarantine file"):
        write_quarantine(tmp_path / "absent" / "out.json", [])
    write_quarantine(tmp_path / "out.json", ["b", "a", "b"])
    assert read_quarantine(tmp_path / "out.json") == {"a", "b"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "uid", ["..", ".", "../up", "/etc", "a/b", "a/../../b", "a\\b", "", " ", "a\0b", "~", "C:", "x" * 300, "..%2f", "a\tb"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, uid):
    root = tmp_path / "root"
    root.mkdir()
    write_csv(root, [("fine", "man", "train", "v2"), (uid, "man", "train", "v2")])
    with pytest.raises(InputError, match=r"row 3 \(.*is no plain name"):
        bench(root).samples("val")
    assert [each.file for each in bench(root).problems()] == ["v2/fine", "metadata.csv"]


@pytest.mark.parametrize("label", ["..", "../v2", "/", "", "v2/..", "V2"])
def test_labels_that_lead_elsewhere_are_refused(tmp_path, label):
    write_csv(tmp_path, [("x", "man", "train", label)])
    with pytest.raises(InputError, match=r"row 2 \('x'\): unknown label"):
        bench(tmp_path).samples("val")


@pytest.mark.parametrize("name", ["", "frames", "frames/0.jpg", "labels_rgb", "labels_rgb/3.png", "audio.wav"])
def test_links_out_of_the_root_are_refused_and_links_within_followed(own, tmp_path, name):
    victim, elsewhere = own / "v1m" / "tall_m" / name, tmp_path / "elsewhere"
    victim.rename(elsewhere)
    victim.symlink_to(elsewhere)
    first = "frames/0.jpg" if name in ("", "frames") else "labels_rgb/0.png" if name == "labels_rgb" else name
    with pytest.raises(InputError) as caught:
        bench(own).render("train", [1])
    assert f"row 3 ('tall_m'): v1m/tall_m/{first} leads out of the root" in str(caught.value)
    (problem,) = bench(own).problems()
    assert (problem.row, problem.file) == (3, f"v1m/tall_m/{name}".rstrip("/"))
    assert "leads out of the root" in problem.what
    elsewhere.rename(own / "inside")
    victim.unlink()
    victim.symlink_to(own / "inside")
    (tmp_path / "link").symlink_to(own)
    assert bench(tmp_path / "link").problems() == ()
    bench(tmp_path / "link").render("train", [1])


def test_a_table_outside_the_root_is_refused(own, tmp_path):
    for name in ("metadata.csv", "label2idx.json"):
        (own / name).rename(tmp_path / name)
        (own / name).symlink_to(tmp_path / name)
        with pytest.raises(InputError, match=f"{name} leads out of the root"):
            bench(own).check()
        (own / name).unlink()
        shutil.copy(tmp_path / name, own / name)
    bench(own).check()


def test_fingerprint_follows_content_sizes_and_fields_but_not_the_place(tree, own, tmp_path):
    root, _ = tree
    seen = {
        benchmark.fingerprint()
        for benchmark in [bench(root)]
        + [bench(root, **change) for change in ({"frames": 9}, {"image_size_px": 33}, {"subset": "cis"}, {"subset": "cim"})]
    }
    assert len(seen) == 5
    before = bench(root).fingerprint()
    assert bench(own).fingerprint() == before
    for name in ("a.json", "b.json"):
        write_quarantine(own / name, ["wide_s"])
    left_out = {bench(own, quarantine=str(own / name)).fingerprint() for name in ("a.json", "b.json")}
    assert len(left_out) == 1
    assert before not in left_out
    write_quarantine(own / "a.json", [])
    assert bench(own, quarantine=str(own / "a.json")).fingerprint() == before

    frame = own / "v1m/tall_m/frames/0.jpg"
    frame.write_bytes(frame.read_bytes() + b"\0")
    assert bench(own).fingerprint() == before  # looked up once in a process
    clip_files._fingerprint.cache_clear()
    changed = bench(own).fingerprint()
    frame.unlink()
    clip_files._fingerprint.cache_clear()
    gone = bench(own).fingerprint()
    (own / "metadata.csv").write_text((own / "metadata.csv").read_text() + "\n")
    assert len({before, changed, gone, bench(own).fingerprint()}) == 4


MUTATIONS = [
    "",
    ",",
    '"',
    "\0",
    "\r",
    "_",
    "..",
    "/",
    "man",
    "unicorn",
    "train",
    "dev",
    "v1s",
    "v9",
    "\ud800",
    "é",
    "\u2028",
    "u1",
    "9" * 200,
]


def mutated(rng):
    """The sample's lines after a few accidents with cells, characters and bytes."""
    lines = SAMPLE_CSV.splitlines()
    for _ in range(rng.randint(1, 4)):
        row = rng.randrange(0 if rng.random() < 0.05 else 1, len(lines))
        cells, kind = lines[row].split(","), rng.randrange(6)
        if kind == 0:
            cells[rng.randrange(len(cells))] = rng.choice(MUTATIONS)
        elif kind == 1:
            cells.insert(rng.randrange(len(cells) + 1), rng.choice(MUTATIONS))
        elif kind == 2:
            del cells[rng.randrange(len(cells))]
        elif kind == 3:
            rng.shuffle(cells)
        elif kind == 4:
            cells = rng.choice(lines).split(",")
        else:
            place = rng.randrange(len(lines[row]) + 1)
            cells = [lines[row][:place] + rng.choice(MUTATIONS) + lines[row][place + 1 :]]
        lines[row] = ",".join(cells)
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.2:
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def test_malformed_rows_are_told_and_never_anything_else(tmp_path):
    outcomes = {"header": 0, "fault": 0, "fine": 0}
    for seed in range(300):
        root = tmp_path / str(seed)
        root.mkdir()
        (root / "metadata.csv").write_bytes(mutated(random.Random(seed)))
        benchmark = bench(root)
        try:
            problems = benchmark.problems()
        except InputError:
            outcomes["header"] += 1
            with pytest.raises(InputError, match="must have the columns"):
                benchmark.samples("train")
            continue
        assert all(isinstance(each, Problem) and each.what.isprintable() for each in problems)
        faults = [each for each in problems if each.file == "metadata.csv"]
        files = {each.file for each in problems} - {"metadata.csv"}
        assert all(file.count("/") == 1 and file.split("/")[0] in SECONDS and ".." not in file for file in files)
        if not faults:
            outcomes["fine"] += 1
            assert sum(len(benchmark.samples(split)) for split in benchmark.splits()) == len(files)
            continue
        outcomes["fault"] += 1
        with pytest.raises(InputError, match=rf"row {faults[0].row} "):
            benchmark.samples("train")
        write_quarantine(root / "out.json", [each.uid for each in faults if each.uid])
        mended = bench(root, quarantine=str(root / "out.json"))
        if all(each.uid for each in faults):
            left = [sample.id for split in mended.splits() for sample in mended.samples(split)]
            assert set(left).isdisjoint(each.uid for each in faults)
        else:
            with pytest.raises(InputError, match=r"row \d+ \(''\)"):
                mended.samples("train")
    assert outcomes["header"] > 3
    assert outcomes["fault"] > 200
    assert outcomes["fine"] > 3


def test_a_few_of_each_class_are_the_first_ones_and_a_benchmark_of_their_own(tree):
    whole, few = bench(tree[0]), bench(tree[0], clips_per_class=1)
    assert [sample.id for sample in few.samples("train")] == ["wide_s", "tall_m", "long-2"]  # last_s has nothing new
    assert [sample.id for sample in few.samples("test")] == ["test_m"]
    assert few.samples("val") == whole.samples("val")
    assert len(bench(tree[0], clips_per_class=2).samples("train")) == 4
    assert len({whole.fingerprint(), few.fingerprint(), bench(tree[0], clips_per_class=2).fingerprint()}) == 3
    assert np.array_equal(few.render("train", [2]).image, whole.render("train", [2]).image)
    with pytest.raises(InputError, match="clips_per_class"):
        bench(tree[0], clips_per_class=-1)
