"""AVSBench-object in a folder: what is decoded from either subset's layout, and what is told of a damaged one."""

import shutil

import numpy as np
import pytest
import soundfile
from PIL import Image

from cavs_model.datasets.avsbench_object import AVSBenchObject
from cavs_model.datasets.cache import build, open_split
from cavs_model.datasets.clip_files import write_quarantine
from cavs_model.datasets.log_mel import log_mel
from cavs_model.errors import InputError
from cavs_model.scenario import Scenario
from cavs_model.types import IGNORE

RATE, SIZE = 16000, 16
ROWS = [
    ("bird-1_a", "train", "singing"),
    ("-dog2", "train", "barking"),
    ("val_1", "val", "singing"),
    ("test1", "test", "barking"),
]


def places(subset, name, split, category):
    """Where the published code looks for frames (t from 1), masks and sound."""
    if subset == "s4":
        inner = f"{split}/{category}/{name}"
        frames, masks = f"s4_data/visual_frames/{inner}/{name}_", f"s4_data/gt_masks/{inner}/{name}_"
        return frames, masks, f"s4_data/audio_wav/{inner}.wav"
    return (
        f"ms3_data/visual_frames/{name}/{name}.mp4_",
        f"ms3_data/gt_masks/{split}/{name}/{name}_",
        f"ms3_data/audio_wav/{split}/{name}.wav",
    )


def write_tree(root, subset):
    """A tree in the subset's layout. Returns per video its pictures, whether a pixel sounds, and the recording."""
    header = "name,start,category,split" if subset == "s4" else "video_id,split"
    written = {}
    lines = [header]
    for n, (name, split, category) in enumerate(ROWS):
        rng = np.random.default_rng(n)
        lines.append(f"{name},{n},{category},{split}" if subset == "s4" else f"{name},{split}")
        frames, masks, sound = (root / place for place in places(subset, name, split, category))
        for path in (frames, masks, sound):
            path.parent.mkdir(parents=True, exist_ok=True)
        pictures = rng.integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
        sounding = rng.random((5, SIZE, SIZE)) < 0.3
        for t in range(5):
            Image.fromarray(pictures[t]).save(f"{frames}{t + 1}.png")
            if subset == "s4" and split == "train" and t:
                continue
            if subset == "s4":
                mask = Image.fromarray(sounding[t]) if n % 2 else Image.fromarray(sounding[t].astype(np.uint8) * 255)
            else:  # indices with a palette, several objects
                mask = Image.fromarray(sounding[t] * rng.integers(1, 3, sounding[t].shape).astype(np.uint8))
                mask.putpalette([0, 0, 0, 128, 0, 0, 0, 0, 1])
            mask.save(f"{masks}{t + 1}.png")
        wave = rng.uniform(-0.5, 0.5, (5 * RATE, 2)).astype(np.float32)
        soundfile.write(sound, wave, RATE, subtype="FLOAT")
        written[name] = pictures, sounding, wave.mean(1)
    (root / f"{subset}_meta_data.csv").write_text("\n".join([*lines, ""]))
    return written


@pytest.fixture(params=["s4", "ms3"])
def subset(request):
    return request.param


@pytest.fixture
def tree(subset, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    return root, write_tree(root, subset)


def bench(root, subset, **fields):
    return AVSBenchObject(root=str(root), subset=subset, **{"image_size_px": SIZE, **fields})


def test_clips_hold_what_was_written(tree, subset):
    root, written = tree
    benchmark = bench(root, subset)
    benchmark.check()
    assert benchmark.problems() == ()
    for split in benchmark.splits():
        names = [name for name, where, _ in ROWS if where == split]
        assert [(sample.id, sample.classes) for sample in benchmark.samples(split)] == [(name, (1,)) for name in names]
        clips = benchmark.render(split, range(len(names)))
        assert clips.real_frame.all()
        labelled = 1 if (subset, split) == ("s4", "train") else 5
        assert clips.labelled_frame.sum(1).tolist() == [labelled] * len(names)
        for n, name in enumerate(names):
            pictures, sounding, wave = written[name]
            np.testing.assert_array_equal(clips.image[n], pictures.transpose(0, 3, 1, 2))
            np.testing.assert_array_equal(clips.label[n, :labelled], sounding[:labelled])
            assert (clips.label[n, labelled:] == IGNORE).all()
            np.testing.assert_array_equal(clips.audio[n], log_mel(wave.reshape(5, RATE)).astype(np.float16))


def test_it_is_one_task_read_through_the_cache(tree, subset, tmp_path):
    benchmark = bench(tree[0], subset, frames=2)
    (setting,) = benchmark.settings()
    (task,) = Scenario(setting).tasks(benchmark)
    assert [sample.id for sample in task.train] == ["bird-1_a", "-dog2"]
    with pytest.raises(InputError, match=r'"1" for one task, for example: 1'):
        Scenario().tasks(benchmark)
    build(benchmark, ["train"], tmp_path / "cache")
    np.testing.assert_array_equal(
        open_split(benchmark, "train", tmp_path / "cache").read([1]).label, benchmark.render("train", [1]).label
    )


def test_what_is_damaged_is_told_by_file_and_left_out_by_quarantine(tree, subset):
    root, _ = tree
    name, split, category = ROWS[0]
    frames, masks, sound = places(subset, name, split, category)
    (root / f"{frames}2.png").unlink()
    (root / f"{frames}4.png").write_bytes(b"nothing")
    Image.new("L", (SIZE, 2 * SIZE)).save(root / f"{masks}1.png")
    soundfile.write(root / sound, np.zeros(5 * RATE), 44100)
    problems = bench(root, subset).problems()
    assert [(each.row, each.uid, each.file) for each in problems] == [
        (2, name, f"{frames}2.png"),
        (2, name, f"{frames}4.png"),
        (2, name, f"{masks}1.png"),
        (2, name, sound),
    ]
    for problem, what in zip(
        problems, ("is missing", "cannot be decoded", "not the shape of its frame", "44100 Hz"), strict=True
    ):
        assert what in problem.what
    with pytest.raises(InputError) as caught:
        bench(root, subset).render("train", [0])
    assert f"{subset}_meta_data.csv, row 2 ('{name}'): {masks}1.png has" in str(caught.value)
    write_quarantine(root / "out.json", [name])
    kept = bench(root, subset, quarantine=str(root / "out.json"))
    assert [sample.id for sample in kept.samples("train")] == ["-dog2"]
    kept.render("train", [0])
    shutil.rmtree((root / places(subset, *ROWS[2])[0]).parent)
    with pytest.raises(InputError, match=r"row 4 .'val_1'.: folder .* is missing"):
        kept.check()


def test_rows_that_cannot_be_used_are_told(tree, subset):
    root, _ = tree
    table = root / f"{subset}_meta_data.csv"
    rows = ["../up,0,barking,train", "again,0,../barking,val", "other,0,barking,dev", "test1,0,barking,test", "short"]
    if subset == "ms3":
        rows = ["../up,train", "again,VAL", "other,dev", "test1,test", "short"]
    with table.open("a") as file:
        file.write("\n".join([*rows, ""]))
    faults = [video.faults for video in bench(root, subset).videos() if video.faults]
    second = "category '../barking' is no plain name" if subset == "s4" else "unknown split 'VAL'"
    expected = ["uid '../up' is no plain name", second, "unknown split 'dev'", "the uid stands in row 5 too", "has 1 columns"]
    for (fault,), what in zip(faults, expected, strict=True):
        assert what in fault
    with pytest.raises(InputError, match=rf"{subset}_meta_data\.csv, row 6 \('../up'\)"):
        bench(root, subset).samples("test")
    table.write_text("name,part\nx,train\n")
    with pytest.raises(InputError, match=r"must have the columns split.*wrong or missing: split"):
        bench(root, subset).check()
    table.unlink()
    with pytest.raises(InputError, match=rf"cannot read .*{subset}_meta_data\.csv"):
        bench(root, subset).check()


def test_fields_and_fingerprint(tree, subset):
    root, _ = tree
    assert bench(root, subset).name == f"avsbench-{subset}"
    assert len({bench(root, subset, frames=frames).fingerprint() for frames in (4, 5, 5)}) == 2
    for fields, told in (({"subset": "s3"}, "one of: s4, ms3"), ({"frames": 6}, r"AVSBenchObject\.frames .* from 1 to 5")):
        with pytest.raises(InputError, match=told):
            AVSBenchObject(**fields)
    with pytest.raises(InputError, match=rf"^benchmark\.root must name the folder that holds {subset}_meta_data\.csv"):
        AVSBenchObject(subset=subset).check()
