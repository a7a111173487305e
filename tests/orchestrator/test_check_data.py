"""The verb that checks an AVSBench folder: its table, its counts, its exit status, and the quarantine it writes."""

import io
import json
import signal
import sys

import numpy as np
import pytest
import soundfile
from PIL import Image

from cavs_model.datasets.avsbench import AVSBench
from cavs_model.errors import InputError
from cavs_model.scenario import Scenario
from orchestrator import check_data, cli
from orchestrator.check_data import ProcessMap
from orchestrator.experiment import Experiment, file_name, flatten, override

HEADER = "vid,uid,s_min,s_sec,a_obj,split,label"
ROWS = [
    ("one", "man", "train"),
    ("two", "woman", "train"),
    ("duo", "man_woman", "train"),
    ("val", "man", "val"),
    ("test", "cat", "test"),
]


@pytest.fixture(autouse=True)
def keep_handler():
    """`cli.main` sets one."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [f"v,{uid},0,0,{names},{split},v1m" for uid, names, split in ROWS]
    (folder / "metadata.csv").write_text("\n".join([HEADER, *lines, ""]))
    for uid, *_ in ROWS:
        for name in ("frames", "labels_rgb"):
            (folder / "v1m" / uid / name).mkdir(parents=True)
        for t in range(5):
            Image.new("RGB", (32, 32), (200, 100, 9)).save(folder / "v1m" / uid / "frames" / f"{t}.jpg")
            Image.new("RGB", (32, 32)).save(folder / "v1m" / uid / "labels_rgb" / f"{t}.png")
        soundfile.write(folder / "v1m" / uid / "audio.wav", np.zeros(80000), 16000)
    return folder


@pytest.fixture
def check(monkeypatch, capsys):
    """Runs the verb: status, what it printed, what it said on the side."""

    def started(*arguments, processes=1):
        monkeypatch.setattr(sys, "argv", ["check_data", *map(str, arguments), "--processes", str(processes)])
        try:
            status = cli.main(check_data.check_data)
        except SystemExit as error:  # argparse
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return started


def damage(root):
    (root / "v1m/two/audio.wav").unlink()
    (root / "v1m/duo/frames/3.jpg").write_bytes(b"nothing")
    with (root / "metadata.csv").open("a") as file:
        file.write("v,more,0,0,\x1bunicorn,val,v1m\n")


def test_a_clean_folder_is_status_0(root, check):
    status, out, err = check(root)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "no problems", "", "split  videos  with problems", "train  3       0", "val    1       0", "test   1       0",
    ]  # fmt: skip


def test_every_problem_is_a_line_and_status_is_1(root, check):
    damage(root)
    status, out, _ = check(root)
    assert status == 1
    lines = out.splitlines()
    assert lines[0].split() == ["row", "uid", "file", "what"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["3", "two", "v1m/two/audio.wav"],
        ["4", "duo", "v1m/duo/frames/3.jpg"],
        ["7", "more", "metadata.csv"],
        ["7", "more", "v1m/more"],
    ]
    assert r"'\x1bunicorn'" in lines[3]
    assert out.replace("\n", "").isprintable()
    assert [line.split() for line in lines[7:]] == [["train", "3", "2"], ["val", "2", "1"], ["test", "1", "0"]]


def test_a_dry_run_reads_the_table_alone_and_writes_nothing(root, check, tmp_path):
    damage(root)
    status, out, _ = check(root, "--dry-run", "--quarantine", tmp_path / "held_back.json")
    assert status == 0
    assert "the files of 6 videos would be (test 1, train 3, val 2)" in out
    assert f"{tmp_path / 'held_back.json'} would be written" in out
    assert not (tmp_path / "held_back.json").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_debugging_reads_two_videos_of_a_split(root, check, tmp_path, processes):
    damage(root)
    status, out, _ = check(root, "--debug", processes=processes)
    assert status == 1
    assert "v1m/two/audio.wav" in out
    assert "v1m/duo" not in out  # the third of train
    status, _, err = check(root, "--debug", "--quarantine", tmp_path / "held_back.json")
    assert status == 2
    assert "leave out one of the two" in err
    assert not (tmp_path / "held_back.json").exists()


def test_a_subset_reads_its_own_videos(root, check):
    damage(root)
    status, out, _ = check(root, "--subset", "cim")
    assert status == 1
    assert "v1m/two" not in out
    assert "v1m/duo/frames/3.jpg" in out
    assert "unicorn" in out  # a malformed row concerns every subset


def test_a_folder_of_avsbench_object_is_read_by_its_subset(tmp_path, check):
    (tmp_path / "ms3_meta_data.csv").write_text("video_id,split\none,test\n")
    for folder in ("visual_frames/one", "gt_masks/test/one", "audio_wav/test"):
        (tmp_path / "ms3_data" / folder).mkdir(parents=True)
    for t in range(1, 6):
        Image.new("RGB", (32, 32)).save(tmp_path / f"ms3_data/visual_frames/one/one.mp4_{t}.png")
        Image.new("1", (32, 32)).save(tmp_path / f"ms3_data/gt_masks/test/one/one_{t}.png")
    soundfile.write(tmp_path / "ms3_data/audio_wav/test/one.wav", np.zeros(80000), 16000)
    assert check(tmp_path, "--subset", "ms3", processes=2)[0] == 0
    (tmp_path / "ms3_data/gt_masks/test/one/one_5.png").unlink()
    status, out, _ = check(tmp_path, "--subset", "ms3")
    assert status == 1
    assert out.splitlines()[1].split() == ["2", "one", "ms3_data/gt_masks/test/one/one_5.png", "is", "missing"]
    status, _, err = check(tmp_path, "--subset", "s4")
    assert status == 2
    assert "cannot read" in err
    assert "s4_meta_data.csv" in err


def test_processes_find_the_same(root):
    damage(root)
    benchmark = AVSBench(root=str(root))
    assert benchmark.problems(ProcessMap(2, io.StringIO())) == benchmark.problems()


def test_progress_is_told_every_few_seconds():
    clock = iter(range(0, 1000, 2))
    out = io.StringIO()
    mapped = ProcessMap(1, out, now=lambda: next(clock))(lambda video: ("a problem",) * (video % 2), list(range(9)))
    assert len(list(mapped)) == 9
    assert out.getvalue().splitlines() == [
        "checked 3 of 9 videos, 1 problems, about 00:00:12 left",
        "checked 6 of 9 videos, 3 problems, about 00:00:06 left",
        "checked 9 of 9 videos, 4 problems, about 00:00:00 left",
    ]


def test_the_quarantine_makes_the_rest_usable(root, check, tmp_path):
    damage(root)
    with pytest.raises(InputError, match="row 7"):
        AVSBench(root=str(root)).check()
    target = tmp_path / "out.json"
    status, out, _ = check(root, "--quarantine", target)
    assert status == 1
    assert f"quarantined, by {target}: 3 videos" in out
    assert json.loads(target.read_text()) == {"uids": ["duo", "more", "two"]}
    changes = {"benchmark": "avsbench", "benchmark.root": str(root), "benchmark.quarantine": str(target)}
    benchmark = override(Experiment(), changes).benchmark
    benchmark.check()
    assert [sample.id for split in benchmark.splits() for sample in benchmark.samples(split)] == ["one", "val", "test"]
    benchmark.render("train", [0])
    assert check(root, "--quarantine", target)[0] == 1  # the folder is as bad as it was; its own file may be written again


def test_lines_without_a_uid_must_be_mended(root, check, tmp_path):
    with (root / "metadata.csv").open("a") as file:
        file.write('v,"open\n')
    status, out, _ = check(root, "--quarantine", tmp_path / "out.json")
    assert status == 1
    assert "1 problems belong to no uid and must be mended in place" in out
    assert ["(none)", "1", "1"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["ABSENT"], "there is none at"),
        (["EMPTY"], "cannot read"),
        (["ROOT", "--quarantine", "ROOT/metadata.csv"], "metadata.csv"),
        (["ROOT", "--quarantine", "ROOT"], "cannot read the quarantine file"),
        (["ROOT", "--quarantine", "ABSENT/out.json"], "not a folder that can be written"),
        (["ROOT", "--subset", "all"], "invalid choice: 'all'"),
        ([], "ROOT"),
    ],
)
def test_bad_input_is_told_before_anything_is_read(root, check, tmp_path, arguments, told):
    (tmp_path / "EMPTY").mkdir()
    before = (root / "metadata.csv").read_bytes()
    places = {"ROOT": str(root), "ABSENT": str(tmp_path / "absent"), "EMPTY": str(tmp_path / "EMPTY")}
    for word, place in places.items():
        arguments = [argument.replace(word, place) for argument in arguments]
    status, out, err = check(*arguments)
    assert (status, out) == (2, "")
    assert told in err
    assert (root / "metadata.csv").read_bytes() == before


@pytest.mark.parametrize("processes", [0, -1, 257])
def test_processes_have_a_range(root, check, processes):
    status, _, err = check(root, processes=processes)
    assert status == 2
    assert f"got {processes}" in err


def test_a_relative_root_is_understood(root, check, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert check("data")[0] == 0


def test_the_benchmark_is_chosen_by_name():
    experiment = override(
        Experiment(), {"benchmark": "avsbench", "benchmark.root": "/data/avsbench", "benchmark.subset": "cim"}
    )
    assert experiment.benchmark == AVSBench(root="/data/avsbench", subset="cim")
    assert file_name(experiment.benchmark) == "avsbench"
    assert flatten(experiment)["benchmark.root"] == "/data/avsbench"
    with pytest.raises(InputError, match=r"benchmark\.subset.*ci, cis, cim"):
        override(Experiment(), {"benchmark": "avsbench", "benchmark.subset": "all"})
    with pytest.raises(InputError, match=r"^benchmark\.root must name"):
        Scenario("60-10").tasks(override(Experiment(), {"benchmark": "avsbench"}).benchmark)
