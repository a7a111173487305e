"""Malformed configurations, tables, checkpoints and manifests by the hundred: each is told by file or field, and nothing else.

The cases are listed, not drawn, so that one that fails is found again. What is told is an InputError (a DamagedError in the
store, where it means: set aside and compute again) with the name of the file or field; any other exception fails the test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

import cavs_model.datasets
import cavs_model.methods
from cavs_model import checkpoint
from cavs_model.datasets.avsbench import CLASS_NAMES, AVSBench
from cavs_model.datasets.avsbench_object import AVSBenchObject
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.collage import SHIPPED_PACK, Collage
from cavs_model.errors import InputError
from cavs_model.methods.base import Method
from cavs_model.networks.av_segmenter import NetworkConfig, build
from cavs_model.types import AUDIO_VISUAL
from orchestrator import compare, ledger
from orchestrator.cli import load_space, open_knobs
from orchestrator.entries import DamagedError, Entries
from orchestrator.experiment import Experiment, fingerprint, flatten, members, override, parse_assignments
from orchestrator.search import described
from search_spaces.tones import BASE

SECONDS_A_CASE = 5.0  # of this process's own time: none of them may make it work for long
DEEP = b"[" * 100_000
NOT_JSON = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"\xff\xfe\x00",
    b"{}" * 2,
    DEEP,
    b'{"a":' * 100_000,
    bytes(100),
    b"NaN",
    b"9" * 5000,
]
NO_TEXT: list[Any] = [None, True, 3, 1.5, [], ["x"], {}, {"x": 1}]
NO_NUMBER: list[Any] = [None, True, "", "3", "x" * 1000, [], [1], {}, "\0"]


def refused(call: Callable[[], object], *named: str) -> bool:
    """Whether a case was refused; if so, as it has to be: by an InputError that names one of these."""
    started = time.process_time()
    told = None
    try:
        call()
    except (InputError, DamagedError) as error:
        told = str(error)
    assert time.process_time() - started < SECONDS_A_CASE
    if told is None:
        return False
    assert not named or any(name in told for name in named), (named, told)
    assert len(told) < 12_000, told[:300]
    return True


def all_refused(cases: list[tuple[str, Callable[[], object]]], *named: str) -> None:
    """Every case is refused, by one of these names or, where there is none, by its own."""
    accepted = [what for what, call in cases if not refused(call, *(named or (what,)))]
    assert accepted == []


# Configurations: every dotted path of every method and benchmark.

WRONG_VALUES: list[Any] = [
    None,
    True,
    -1,
    -0.5,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "nan",
    "-inf",
    "1e999",
    "x",
    "\0",
    "\ud800",
    "9" * 5000,
    "é" * 300,
    "../..",
    (),
    ("x",),
    (-1,),
    [[1]],
    {},
    {"a": 1},
    b"1",
    object(),
    2**40,
    "1,,x",
]


def configurations() -> Iterator[tuple[Experiment, str]]:
    """Every field of every method and of every benchmark, and all others once."""
    for path in flatten(BASE):
        yield BASE, path
    for field, package, kind in (("method", cavs_model.methods, Method), ("benchmark", cavs_model.datasets, Benchmark)):
        for name in members(package, kind):
            chosen = override(BASE, {field: name})
            for path in flatten(chosen):
                if path.startswith(f"{field}."):
                    yield chosen, path


CONFIGURATIONS = [(base, path, value) for base, path in configurations() for value in WRONG_VALUES]


def test_every_field_refuses_what_it_cannot_be() -> None:
    told = 0
    for base, path, value in CONFIGURATIONS:

        def use(base: Experiment = base, path: str = path, value: Any = value) -> None:
            changed = override(base, {path: value})
            fingerprint(changed)
            changed.scenario.learned_order(changed.benchmark)
            changed.scenario.class_counts(changed.benchmark)
            if not path.startswith("benchmark."):
                changed.scenario.tasks(changed.benchmark)

        # An order or a setting is told by the class or the count that does not fit.
        told += refused(use, path, "scenario.", "seeds", path.removeprefix("network."), path.rpartition(".")[2])
    assert told > 0.7 * len(CONFIGURATIONS) > 500


PATHS = [
    "",
    ".",
    "..",
    "x",
    "method",
    "method.",
    ".method",
    "method.x",
    "method.base",
    "method.samples_per_class.x",
    "schedule",
    "schedule.epochs.",
    " ",
    "\0",
    "é",
    "METHOD",
    "method..base",
    "a" * 10_000,
    ".".join("a" * 2000),
]
ASSIGNMENTS = [text for path in PATHS for text in (path, f"{path}=", f"{path}=x\0", f"{path}=={path}", f"={path}")]


def test_malformed_assignments_are_told() -> None:
    told = [
        text
        for text in ASSIGNMENTS
        if refused(lambda text=text: override(BASE, parse_assignments([text])), "--set", "field", "method", "schedule")
    ]  # type: ignore[misc]
    assert len(told) > 0.9 * len(ASSIGNMENTS)
    with pytest.raises(InputError, match="unknown field 5"):
        override(BASE, {5: 1})  # type: ignore[dict-item]


KNOBS = """
trial.suggest_int("method.samples_per_class", 4, 1)
trial.suggest_int("method.samples_per_class", 1, float("nan"))
trial.suggest_int("method.samples_per_class", 1, 10**400)
trial.suggest_int("method.samples_per_class", 1.5, 3)
trial.suggest_int("method.samples_per_class", "1", "3")
trial.suggest_int("method.samples_per_class", 0, 3)
trial.suggest_int("method.samples_per_class", -3, 3)
trial.suggest_int("method.samples_per_class", 1, 9, step=0)
trial.suggest_int("method.samples_per_class", 1, 9, step=-1)
trial.suggest_int("method.samples_per_class", 1, 9, step=2, log=True)
trial.suggest_int("method.samples_per_class", 1)
trial.suggest_int("method.samples_per_klass", 1, 3)
trial.suggest_int("", 1, 3)
trial.suggest_int(5, 1, 3)
trial.suggest_int(None, 1, 3)
trial.suggest_int("method", 1, 3)
trial.suggest_int("method.base", 1, 3)
trial.suggest_int("seeds", 1, 3)[0]
trial.suggest_float("method.resampling_ratio", 0.3, 0.1)
trial.suggest_float("method.resampling_ratio", float("nan"), 0.1)
trial.suggest_float("method.resampling_ratio", 0.0, float("inf"))
trial.suggest_float("method.resampling_ratio", 0.0, 0.1, log=True)
trial.suggest_float("method.resampling_ratio", 0.1, 0.2, step=0)
trial.suggest_float("method.resampling_ratio", 0.1, 0.2, step=float("nan"))
trial.suggest_float("method.resampling_ratio", 0.1, 0.2, step=0.01, log=True)
trial.suggest_float("method.resampling_ratio", 0.5, 1.5)
trial.suggest_float("method.resampling_ratio", "a", "b")
trial.suggest_float("method.resampling_ratio", True, True)
trial.suggest_categorical("method.selection", [])
trial.suggest_categorical("method.selection", ["mss", "best"])
trial.suggest_categorical("method.selection", 5)
trial.suggest_categorical("method.selection", [["mss"], ["random"]])
trial.suggest_categorical("method.selection", [object()])
trial.suggest_categorical("method", ["cmr", "nothing"])
trial.suggest_uniform("method.resampling_ratio", 0, 1)
trial.suggest_int("method.samples_per_class", 1, 3); trial.suggest_float("method.samples_per_class", 1.0, 3.0)
trial.suggest_int("method.samples_per_class", 1, 3); trial.suggest_categorical("method.samples_per_class", [1])
raise RuntimeError("no")
return trial.params["x"]
1 / 0
[0][1]
undefined
define(trial)
""".strip().splitlines()
BASES = """
5
None
"tones"
{}
Experiment
Experiment(seeds=())
Experiment(seeds=("a",))
Experiment(seeds=5)
Experiment(seeds=[0])
Experiment(seeds=(0, 0))
Experiment(seeds=(0.5,))
Experiment(method="cmr")
Experiment(method=None)
Experiment(method=CMR)
Experiment(benchmark="collage")
Experiment(benchmark=Scenario())
Experiment(network=None)
Experiment(schedule={})
Experiment(scenario="16-8")
Experiment(scenario=Scenario(setting=5))
Experiment(scenario=Scenario(order=None))
Experiment(scenario=Scenario(class_order="cow"))
Experiment(scenario=Scenario(order_seed="x"))
Experiment(precision="half")
Experiment(precision=32)
Experiment(per_frame="yes")
Experiment(init_seed="x")
Experiment(data_seed=-1)
Experiment(resources=3)
Experiment(schedule=Schedule(epochs="many"))
Experiment(schedule=Schedule(epochs=2.5))
Experiment(schedule=Schedule(learning_rate=float("nan")))
Experiment(schedule=Schedule(learning_rate="1e-3"))
Experiment(network=NetworkConfig(width="wide"))
Experiment(network=NetworkConfig(width=10**9))
Experiment(network=NetworkConfig(visual_encoder=5))
Experiment(network=NetworkConfig(dilations=(1,) * 10**6))
Experiment(benchmark=Collage(train_clips=10**15))
Experiment(benchmark=Collage(frames="2"))
Experiment(benchmark=Collage(pack=5))
""".strip().splitlines()
SPACE = """from cavs_model.datasets.collage import Collage
from cavs_model.methods.cmr import CMR
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule
from orchestrator.experiment import Experiment, Objective
BASE = {base}
OBJECTIVES = {objectives}
def define(trial):
    {knob}
"""
GOOD_KNOB = 'trial.suggest_int("method.samples_per_class", 1, 3)'
OBJECTIVES = [
    "()",
    "5",
    "None",
    "(5,)",
    "Objective()",
    '(Objective("val/miou/all", "best"),)',
    "(Objective(5),)",
    '(Objective(""),)',
]
SPACES = [(base, "(Objective(),)", GOOD_KNOB) for base in BASES]
SPACES += [("Experiment()", "(Objective(),)", knob) for knob in KNOBS]
SPACES += [("Experiment()", objectives, GOOD_KNOB) for objectives in OBJECTIVES]


def test_search_spaces_that_misdefine_things_are_told(tmp_path: Path) -> None:
    def use(text: str, number: int) -> None:
        path = tmp_path / f"malformed_space_{number}.py"
        path.write_text(text)
        space = load_space(str(path))
        open_knobs(space)
        described(space)

    good = SPACE.format(base="Experiment()", objectives="(Objective(),)", knob=GOOD_KNOB)
    use(good, 0)
    texts = [SPACE.format(base=base, objectives=objectives, knob=knob) for base, objectives, knob in SPACES]
    cases = [(text, lambda text=text, n=n: use(text, n)) for n, text in enumerate(texts, start=1)]
    all_refused(cases, "malformed_space_")  # type: ignore[arg-type]


# Tables and class lists.

HEADER = ["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"]
ROW = {"vid": "v", "uid": "one", "s_min": "0", "s_sec": "0", "a_obj": "dog", "split": "train", "label": "v1s"}
LEADING_OUT = [
    "..",
    ".",
    "../up",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "~",
    "C:",
    "a\0b",
    "x" * 300,
    "..%2f",
    " ",
    "",
]
ROWS = [("uid", value) for value in [*LEADING_OUT, "é", "a\tb", "\ud800", "x" * 10_000, "x" * 200_000]]
ROWS += [("split", value) for value in [*LEADING_OUT, "Train", "dev", "test/unseen", "1"]]
ROWS += [("label", value) for value in [*LEADING_OUT, "v3", "V1S", "1"]]
ROWS += [("a_obj", value) for value in [*LEADING_OUT, "unicorn", "dog_dog", "dog_unicorn", "_dog", "dog_", "background_dog"]]
TABLES: list[bytes] = [
    b"",
    b"\n",
    b"\0" * 99,
    b'"',
    ",".join(HEADER).encode("utf-16"),
    DEEP,
    bytes(range(256)),
    b"\n" * 300_000,
]
TABLES += [",".join(column for column in HEADER if column != missing).encode() + b"\n" for missing in HEADER]
TABLES += [",".join([*HEADER, again]).encode() + b"\n" for again in HEADER]
CLASS_LISTS = [
    *NOT_JSON,
    b'{"background": 0}',
    b'{"dog": "1"}',
    json.dumps(dict.fromkeys(CLASS_NAMES, 1)).encode(),
    b'{"\\ud800": []}',
    json.dumps({"background": 0, **{n: float(i + 1.5) for i, n in enumerate(CLASS_NAMES)}}).encode(),
]


def table(cells: list[str]) -> bytes:
    return "\n".join([",".join(HEADER), ",".join(cells), ""]).encode("utf-8", "surrogatepass")


def test_malformed_rows_tables_and_class_lists_are_told(tmp_path: Path) -> None:
    contents = [(b"row 2", table([{**ROW, name: value}[column] for column in HEADER])) for name, value in ROWS]
    contents += [(b"row 2", table(list(ROW.values())[:count])) for count in range(7)[1:]]
    contents += [(b"row 3", table(list(ROW.values())) + ",".join(ROW.values()).encode())]  # the same uid twice
    contents += [(b"metadata.csv", content) for content in TABLES]
    benchmark = AVSBench(root=str(tmp_path))

    def use(content: bytes) -> None:
        (tmp_path / "metadata.csv").write_bytes(content)
        os.utime(tmp_path / "metadata.csv", ns=(0, hash(content) % 10**15))  # the file is read again where its time changes
        benchmark.samples("train")

    for named, content in contents:
        assert refused(lambda content=content: use(content), named.decode(), "metadata.csv must have the columns"), content[
            :200
        ]  # type: ignore[misc]
    use(table(list(ROW.values())))
    (tmp_path / "v1s" / "one").mkdir(parents=True)
    benchmark.check()
    for content in CLASS_LISTS:
        (tmp_path / "label2idx.json").write_bytes(content)
        assert refused(benchmark.check, "label2idx.json"), content[:200]


def test_malformed_rows_of_the_other_tables_are_told(tmp_path: Path) -> None:
    for number, value in enumerate(LEADING_OUT):
        for subset, row in (
            ("s4", f"{value},train,dog"),
            ("s4", f"one,{value},dog"),
            ("s4", f"one,train,{value}"),
            ("ms3", f"{value},train"),
        ):
            root = tmp_path / f"{number}"
            root.mkdir(exist_ok=True)
            columns = "name,split,category" if subset == "s4" else "name,split"
            (root / f"{subset}_meta_data.csv").write_text(f"{columns}\n{row}\n")
            os.utime(root / f"{subset}_meta_data.csv", ns=(0, hash(row) % 10**15))
            benchmark = AVSBenchObject(root=str(root), subset=subset)  # type: ignore[arg-type]
            assert refused(lambda benchmark=benchmark: benchmark.samples("train"), "row 2"), row  # type: ignore[misc]


PACK_ROWS = [
    ("path", value)
    for value in [*LEADING_OUT, "images/../../up", "images//x", "/", "images/", "-/../x", "é"]
    if value != "a/b"  # which is a path
]
PACK_ROWS += [("kind", value) for value in ("", "Image", "pickle", "..")] + [
    ("split", value) for value in ("", "dev", "../train")
]
PACK_ROWS += [("class", value) for value in ("unicorn", "..", "DOG")]
PACK_ROWS += [("sha256", value) for value in ("", "x", "0" * 63, "g" * 64, "0" * 65)]
PACK_TABLES: list[bytes] = [
    b"",
    b"\n",
    b"path\n",
    b"path,kind\nx,y\n",
    b"\xff\xfe\0",
    DEEP,
    bytes(range(256)),
    b"\n" * 200_000,
    b"path\n" + b"x" * 200_000,
]


def test_malformed_manifests_of_a_pack_are_told(tmp_path: Path) -> None:
    lines = (SHIPPED_PACK / "manifest.csv").read_text().splitlines()
    header = lines[0].split(",")
    first = dict(zip(header, lines[1].split(","), strict=True))
    contents = [
        ("\n".join([lines[0], ",".join({**first, name: value}.values())]).encode(), "row 2") for name, value in PACK_ROWS
    ]
    contents += [("\n".join([lines[0], lines[1], lines[1]]).encode(), "row 3"), ("\n".join([lines[0], "x"]).encode(), "row 2")]
    contents += [(content, "manifest.csv") for content in PACK_TABLES]
    for number, (content, named) in enumerate(contents):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "manifest.csv").write_bytes(content)
        assert refused(Collage(pack=str(folder)).check, named), content[:200]


# Checkpoints and what a training goes on from.

CONFIG = NetworkConfig(visual_encoder="tiny", visual_weights="none", audio_encoder="tiny", audio_dim=8, width=8)
MODEL = build(CONFIG, 3, AUDIO_VISUAL)
WEIGHTS = save_tensors({name: tensor.contiguous() for name, tensor in MODEL.state_dict().items()})
ABOUT = {
    "network": AUDIO_VISUAL,
    "num_classes": 3,
    "config": dataclasses.asdict(CONFIG),
    "history": [],
    "clips": 1,
    "seconds": 1.0,
    "world_size": 1,
}


def with_header(claimed: int, header: bytes = b"{}", data: bytes = b"") -> bytes:
    return struct.pack("<Q", claimed) + header + data


def tensor_header(shape: list[Any], offsets: list[int], dtype: str = "F32") -> bytes:
    header = json.dumps({"classifier.conv.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    return with_header(len(header), header, bytes(64))


UNREADABLE: list[bytes] = [WEIGHTS[:length] for length in range(0, len(WEIGHTS), max(1, len(WEIGHTS) // 40))]
UNREADABLE += [b"\x80\x04\x95" + bytes(50), b"PK\x03\x04" + bytes(99), b"nonsense" * 9, bytes(8), WEIGHTS + b"x", DEEP]
UNREADABLE += [with_header(claimed) for claimed in (0, 1, 3, 2**20, 2**31, 2**40, 2**63, 2**64 - 1)]
UNREADABLE += [with_header(len(text), text) for text in NOT_JSON if text]
TENSORS = list(UNREADABLE)
TENSORS += [
    tensor_header(shape, offsets)
    for shape in ([4, 4], [2**40, 2**40], [-1], ["x"], [16], [])
    for offsets in ([0, 64], [64, 0], [0, 2**60], [0])
]
TENSORS += [tensor_header([4, 4], [0, 64], dtype) for dtype in ("F4", "I128", "", "object", "F8_E8M0", "C64")]
TENSORS += [
    save_tensors({name: value for name, value in MODEL.state_dict().items() if name != left})
    for left in dict(MODEL.named_parameters())
]
TENSORS += [
    save_tensors({**MODEL.state_dict(), "classifier.conv.weight": torch.zeros(shape)})
    for shape in ((3,), (4, 16, 1, 1), (3, 8, 1, 1), ())
]

ABOUTS = [
    *NOT_JSON,
    *(
        json.dumps({name: value for name, value in ABOUT.items() if name != left}).encode()
        for left in ("network", "num_classes", "config")
    ),
]
WRONG = {
    "network": [*NO_TEXT, "nobody", "", "\0"],
    "num_classes": [*NO_NUMBER, 0, -1, 255, 2**31, 10**30, 3.0, 4],
    "config": [None, 5, [], "x", {"width": 8}],
    "history": [None, 5, "x", [5], [{"loss": "x"}], {"a": 1}],
    "clips": NO_NUMBER,
    "seconds": NO_NUMBER,
    "world_size": NO_NUMBER,
    "surprise": [1],
}
ABOUTS += [json.dumps({**ABOUT, name: value}).encode() for name, values in WRONG.items() for value in values]
WRONG_CONFIG = {
    "width": [*NO_NUMBER, 7, 0, -2, 10**9, 2**62, 16],
    "audio_dim": [*NO_NUMBER, 0, 10**9, 16],
    "visual_encoder": [*NO_TEXT, "nobody", "os.system"],
    "dilations": [None, 3, [], [0], ["x"], [1] * 10**5, [10**9]],
    "modalities": [*NO_TEXT, "smell"],
    "audio_encoder": [*NO_TEXT, "x"],
    "surprise": [1],
}
ABOUTS += [
    json.dumps({**ABOUT, "config": {**dataclasses.asdict(CONFIG), name: value}}).encode()
    for name, values in WRONG_CONFIG.items()
    for value in values
]


def test_malformed_checkpoints_are_told(tmp_path: Path) -> None:
    def use(weights: bytes, about: bytes) -> None:
        (tmp_path / checkpoint.WEIGHTS).write_bytes(weights)
        (tmp_path / checkpoint.ABOUT).write_bytes(about)
        checkpoint.load(tmp_path)

    good = json.dumps(ABOUT).encode()
    use(WEIGHTS, good)
    all_refused([(repr(each[:80]), lambda each=each: use(each, good)) for each in TENSORS], checkpoint.WEIGHTS)  # type: ignore[misc]
    cases = [(repr(each[-200:]), lambda each=each: use(WEIGHTS, each)) for each in ABOUTS]  # type: ignore[misc]
    all_refused(cases, checkpoint.ABOUT, checkpoint.WEIGHTS)  # a network of another size is told by the weights


STATES = UNREADABLE


def test_malformed_states_of_a_method_are_told(tmp_path: Path) -> None:
    def use(content: bytes) -> None:
        (tmp_path / checkpoint.METHOD_STATE).write_bytes(content)
        checkpoint.read_method_state(tmp_path)

    all_refused([(repr(each[:80]), lambda each=each: use(each)) for each in STATES], checkpoint.METHOD_STATE)  # type: ignore[misc]


NOTE = {
    "job": "j",
    "epochs": 1,
    "history": [{"loss": 1.0}],
    "worker_seconds": 1.0,
    "best": 0.5,
    "tensors": "interim-1.safetensors",
    "digest": hashlib.sha256(WEIGHTS).hexdigest(),
}
WRONG_NOTE = {
    "job": NO_TEXT,
    "epochs": NO_NUMBER,
    "history": [None, 5, "x", [5], [[]]],
    "worker_seconds": NO_NUMBER,
    "best": NO_NUMBER,
    "tensors": [
        *NO_TEXT,
        *LEADING_OUT,
        "interim.json",
        "interim-1.safetensors/..",
        "../interim-1.safetensors",
        "interim-2.safetensors",
    ],
    "digest": [*NO_TEXT, "", "0" * 64],
    "surprise": [1],
}
NOTES = [*NOT_JSON, *(json.dumps({**NOTE, name: value}).encode() for name, values in WRONG_NOTE.items() for value in values)]
NOTES += [json.dumps({name: value for name, value in NOTE.items() if name != left}).encode() for left in NOTE]


def test_malformed_notes_of_an_interrupted_task_are_told(tmp_path: Path) -> None:
    (tmp_path / "interim-1.safetensors").write_bytes(WEIGHTS)

    def use(content: bytes) -> None:
        (tmp_path / checkpoint.INTERIM).write_bytes(content)
        checkpoint.read_interim(tmp_path)

    use(json.dumps(NOTE).encode())
    all_refused([(repr(each[-200:]), lambda each=each: use(each)) for each in NOTES], "damaged interim")  # type: ignore[misc]


# The store and the ledgers.


def sealed(body: object) -> bytes:
    """As whoever can write to the store can seal it."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, **body} if isinstance(body, dict) else body).encode()


FACTS: dict[str, Any] = {"label": "x", "made": 1.0, "seconds": 1.0}
FILE = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
WRONG_FACTS = [
    {**FACTS, name: value}
    for name, values in (("label", NO_TEXT), ("made", NO_NUMBER), ("seconds", NO_NUMBER))
    for value in values
]
WRONG_FILES: list[Any] = [
    None,
    5,
    "x",
    [],
    ["a"],
    {"a": 5},
    {"a": None},
    {"a": []},
    {"a": {}},
    {"a": {"bytes": 3}},
    {"a": {"bytes": "3"}},
]
WRONG_FILES += [{"a": {**FILE, "bytes": value}} for value in (-1, 4, True, 10**30, 3.0, None)]
WRONG_FILES += [{"a": {**FILE, "sha256": value}} for value in (None, 5, "", "0" * 64, [])]
WRONG_FILES += [{name: FILE} for name in [*LEADING_OUT, "absent", "link", "linked/a", "a/", "./a", "a/../a", "folder"]]
WRONG_VALUES_OF = {
    "counts": [
        None,
        5,
        "x",
        {},
        [5],
        {"counts": None},
        {"counts": "x"},
        {"counts": 5},
        {"counts": [[1], [1, 2]]},
        {"counts": [["x"]]},
        {"counts": [[2**70]]},
        {"counts": {}},
    ],
    "scores": [
        None,
        5,
        [],
        {},
        {"sample_ids": 5, "columns": {}},
        {"sample_ids": ["a"], "columns": []},
        {"sample_ids": ["a"], "columns": {"x": 5}},
        {"sample_ids": ["a"], "columns": {"x": ["y"]}},
        {"sample_ids": ["a"], "columns": {"x": []}},
        {"sample_ids": [5], "columns": {"x": [1]}},
        {"sample_ids": "a", "columns": {"x": [1]}},
        {"columns": {}},
        {"sample_ids": []},
    ],
}
MANIFESTS = [("networks", content) for content in NOT_JSON]
MANIFESTS += [("networks", sealed({**facts, "files": {}})) for facts in WRONG_FACTS]
MANIFESTS += [("networks", sealed({**FACTS, "files": files})) for files in WRONG_FILES]
MANIFESTS += [("counts", content) for content in NOT_JSON]
MANIFESTS += [(kind, sealed({**FACTS, "value": value})) for kind, values in WRONG_VALUES_OF.items() for value in values]


def test_malformed_manifests_of_the_store_are_damage(tmp_path: Path) -> None:
    entries = Entries(tmp_path / "store")
    entries.make()
    folder, outside = entries.path("networks", "k"), tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"abc")
    (folder / "folder").mkdir(parents=True)
    (folder / "a").write_bytes(b"abc")
    (folder / "link").symlink_to(outside / "a")
    (folder / "linked").symlink_to(outside)

    def read(kind: str, content: bytes) -> None:
        path = folder / "entry.json" if kind == "networks" else entries.path(kind, "k")
        path.write_bytes(content)
        assert entries.scan()  # listing goes on
        try:
            entries.read(kind, "k")
        except DamagedError:
            raise
        except InputError as error:
            raise AssertionError(f"an entry that ends the run: {error}") from error

    read("networks", sealed({**FACTS, "files": {"a": FILE}}))
    read("counts", sealed({**FACTS, "value": {"counts": [[1, 2]]}}))
    all_refused([(repr(each[-200:]), lambda kind=kind, each=each: read(kind, each)) for kind, each in MANIFESTS], "")  # type: ignore[misc]
    (folder / "entry.json").write_bytes(sealed({**FACTS, "files": {"a": FILE}}))
    folder.rename(outside / "k")
    folder.symlink_to(outside / "k")
    with pytest.raises(DamagedError, match="by a link"):
        entries.read("networks", "k")


SWEEP = {"plan": {}, "parent": "p", "tested": 0, "test_runs": {}, "trials": {"1": {"config": {}}}}
TRIAL: dict[str, Any] = {
    "config": {},
    "state": "RUNNING",
    "metrics": {},
    "error": "",
    "attrs": {},
    "earlier_seconds": 0.0,
    "run": "",
    "streams": {},
    "logged": {},
}
WRONG_SWEEP: dict[str, list[Any]] = {
    "plan": [None, 5, [], "x"],
    "parent": NO_TEXT,
    "tested": NO_NUMBER,
    "test_runs": [None, [], {"a": 5}, "x"],
    "trials": [None, [], "x", {"x": TRIAL}, {"0": TRIAL}, {"-1": TRIAL}, {"1": 5}, {"1": []}, {"1": {}}, {"9" * 50: TRIAL}],
    "surprise": [1],
}
WRONG_TRIAL: dict[str, list[Any]] = {
    "config": [None, 5, [], "x"],
    "state": [*NO_TEXT, "BOGUS", ""],
    "metrics": [None, [], 5],
    "error": NO_TEXT[:-2],
    "attrs": [None, []],
    "earlier_seconds": NO_NUMBER,
    "run": NO_TEXT,
    "streams": [None, [], {"0": 5}],
    "logged": [None, [], {"r": "x"}, {"r": 1.5}],
    "surprise": [1],
}
LEDGERS = [
    *NOT_JSON,
    *(json.dumps({**SWEEP, name: value}).encode() for name, values in WRONG_SWEEP.items() for value in values),
]
LEDGERS += [json.dumps({name: value for name, value in SWEEP.items() if name != left}).encode() for left in SWEEP]
LEDGERS += [
    json.dumps({**SWEEP, "trials": {"1": {**TRIAL, name: value}}}).encode()
    for name, values in WRONG_TRIAL.items()
    for value in values
]
COMPARISON = {"plan": {}, "parent": "p", "runs": {}, "done": {"s": {"values": {"x": 1.0}, "background": {}}}}
WRONG_COMPARISON: dict[str, list[Any]] = {
    "plan": [None, 5, []],
    "parent": NO_TEXT,
    "runs": [None, [], {"a": 5}],
    "surprise": [1],
    "done": [
        None,
        [],
        "x",
        {"s": 5},
        {"s": {}},
        {"s": {"values": 5, "background": {}}},
        {"s": {"values": {"x": "y"}, "background": {}}},
        {"s": {"values": {}}},
    ],
}
COMPARISONS = [
    *NOT_JSON,
    *(json.dumps({**COMPARISON, name: value}).encode() for name, values in WRONG_COMPARISON.items() for value in values),
]


def test_malformed_ledgers_are_told(tmp_path: Path) -> None:
    def use(kind: Any, name: str, content: bytes) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / name).write_bytes(content)
        kind.open(tmp_path / name, {})

    for kind, name, good, contents in (
        (ledger.Ledger, ledger.LEDGER_FILE, SWEEP, LEDGERS),
        (compare.Ledger, compare.PLAN_FILE, COMPARISON, COMPARISONS),
    ):
        use(kind, name, json.dumps(good).encode())
        cases = [(repr(each[-300:]), lambda each=each: use(kind, name, each)) for each in contents]  # type: ignore[misc]  # noqa: B023
        all_refused(cases, f"damaged file {tmp_path / name / name}")


def test_there_are_more_than_500_cases_beside_those_of_the_fields() -> None:
    kinds = (
        ASSIGNMENTS,
        SPACES,
        ROWS,
        TABLES,
        CLASS_LISTS,
        PACK_ROWS,
        PACK_TABLES,
        TENSORS,
        ABOUTS,
        STATES,
        NOTES,
        MANIFESTS,
        LEDGERS,
        COMPARISONS,
    )
    assert sum(map(len, kinds)) > 500
    assert len(CONFIGURATIONS) > 500
