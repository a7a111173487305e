"""One vocabulary: overriding, flattening and fingerprinting an experiment by dotted field paths."""

import ast
import dataclasses
import os
import pathlib
import random
import subprocess
import sys
import types
import typing

import pytest

import cavs_model.datasets
import cavs_model.methods
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.collage import Collage
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.methods.base import Method
from cavs_model.methods.cmr import CMR
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.plop import PLOP
from cavs_model.methods.replay import Replay
from cavs_model.train import Schedule
from orchestrator.experiment import (
    Experiment,
    Objective,
    Resources,
    file_name,
    fingerprint,
    flatten,
    members,
    override,
    parse_assignments,
    plain,
)

METHOD_NAMES = ", ".join(sorted(members(cavs_model.methods, Method)))
BENCHMARK_NAMES = ", ".join(sorted(members(cavs_model.datasets, Benchmark)))

VALID = [  # path, as text, as a value
    ("schedule.epochs", "7", 7),
    ("resources.workers", "4", 4),
    ("schedule.learning_rate", "3e-3", 0.003),
    ("schedule.learning_rate", "1", 1.0),
    ("resources.gpus_per_worker", "0.5", 0.5),
    ("method.resampling_ratio", "0", 0.0),
    ("method.base.pod_schedule", "true", True),
    ("method.base.pseudo_labels", "False", False),
    ("method.base.pseudo_labels", "no", False),
    ("scenario.order", "random", "random"),
    ("scenario.class_order", "dog,cow", ("dog", "cow")),
    ("scenario.class_order", "", ()),
    ("precision", "fp32", "fp32"),
    ("schedule.decay", "cosine", "cosine"),
    ("method.selection", "mixed", "mixed"),
    ("seeds", "3,1,2", (3, 1, 2)),
    ("network.dilations", "1", (1,)),
    ("method.base.pod_scales", "1,2", (1, 2)),
    ("init_seed", "5", 5),
    ("init_seed", "none", None),
    ("benchmark.pack", "some/folder", "some/folder"),
    ("benchmark.pack", "none", None),
    ("method", "plop", PLOP()),
    ("method.base", "finetune", Finetune()),
    ("benchmark", "tones", Tones()),
    ("resources", None, Resources(2, 3)),
    ("schedule", None, Schedule(epochs=1)),
]


def at(value: object, path: str) -> object:
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("path", "text", "value"), VALID)
def test_a_field_is_set_by_text_and_by_value_alike(path, text, value):
    by_value = override(Experiment(), {path: value})
    assert at(by_value, path) == value
    assert type(at(by_value, path)) is type(value)
    if text is not None:
        by_text = override(Experiment(), parse_assignments([f"{path}={text}"]))
        assert by_text == by_value
        assert type(at(by_text, path)) is type(value)


def test_a_whole_number_will_do_for_a_float_and_becomes_one():
    changed = override(Experiment(), {"schedule.learning_rate": 1})
    assert type(changed.schedule.learning_rate) is float
    assert override(Experiment(), {"seeds": [1, 2]}).seeds == (1, 2)


def test_changes_go_together_in_any_order():
    changes = {
        "method.base.pod_weight": "0.5",
        "method.base": "plop",
        "method.samples_per_class": "3",
        "method": "cmr",
        "benchmark.num_classes": "6",
        "benchmark": "tones",
        "scenario.setting": "4-2",
    }
    base = dataclasses.replace(Experiment(), method=Replay())
    expected = dataclasses.replace(
        base,
        method=CMR(base=PLOP(pod_weight=0.5), samples_per_class=3),
        benchmark=Tones(num_classes=6),
        scenario=dataclasses.replace(base.scenario, setting="4-2"),
    )
    draw = random.Random(0)
    for _ in range(10):
        paths = draw.sample(list(changes), len(changes))
        assert override(base, {path: changes[path] for path in paths}) == expected


def test_fields_that_are_only_valid_together_change_together():
    base = dataclasses.replace(Experiment(), benchmark=Tones(num_classes=4, train_clips=4, val_clips=4, test_clips=4))
    clips = {f"benchmark.{split}_clips": 8 for split in ("train", "val", "test")}
    assert override(base, {"benchmark.num_classes": 8, **clips}).benchmark == Tones(8, 8, 8, 8)
    short = dataclasses.replace(Experiment(), benchmark=Tones(frames=2, short_clips=True))
    assert override(short, {"benchmark.frames": 1, "benchmark.short_clips": False}).benchmark == Tones(frames=1)


def test_the_original_stays_and_a_new_method_starts_from_its_defaults():
    base = override(Experiment(), {"method.samples_per_class": 9})
    assert override(base, {"method": "cmr"}).method == CMR()
    assert override(base, {}) == base
    assert base.method == CMR(samples_per_class=9)


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("bogus", ["'bogus'", "benchmark, scenario, network, method"]),
        ("bogus.path", ["'bogus.path'", "schedule"]),
        ("schedule.epoch", ["'schedule.epoch'", "did you mean 'schedule.epochs'", "schedule.base_epochs"]),
        ("method.base.pod_wieght", ["did you mean 'method.base.pod_weight'", "fields of PLOP", "method.base.pod_scales"]),
        ("schedule.epochs.more", ["'schedule.epochs.more'", "schedule.epochs has no fields"]),
        ("seeds.0", ["'seeds.0'", "no fields"]),
        ("", ["''"]),
        (".", ["'.'"]),
        ("schedule.", ["'schedule.'", "schedule.epochs"]),
        ("schedule..epochs", ["'schedule..epochs'"]),
        ("schedule.__class__", ["'schedule.__class__'"]),
        ("schedule.rate", ["'schedule.rate'"]),
        ("benchmark.num_classes", ["'benchmark.num_classes'", "fields of Collage", "benchmark.subset"]),
    ],
)
def test_an_unknown_path_is_told_with_the_nearest_and_the_valid_ones(path, named):
    with pytest.raises(InputError, match="unknown field") as error:
        override(Experiment(), {path: "1"})
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("schedule.epochs", "abc", "whole number"),
        ("schedule.epochs", "1.5", "whole number"),
        ("schedule.epochs", 1.5, "whole number"),
        ("schedule.epochs", True, "whole number"),
        ("schedule.epochs", None, "whole number"),
        ("schedule.epochs", float("inf"), "whole number"),
        ("schedule.epochs", float("nan"), "whole number"),
        ("schedule.epochs", "9" * 5000, "whole number"),
        ("method.samples_per_class", "9" * 400, "64 bits"),
        ("schedule.learning_rate", "fast", "a number"),
        ("schedule.learning_rate", "nan", "finite"),
        ("schedule.learning_rate", float("inf"), "finite"),
        ("schedule.learning_rate", 10**400, "a number"),
        ("schedule.learning_rate", False, "a number"),
        ("schedule.learning_rate", [1.0], "a number"),
        ("method.base.pod_schedule", "maybe", "true or false"),
        ("method.base.pod_schedule", 1, "true or false"),
        ("scenario.order", 3, "text"),
        ("scenario.order", ["random"], "text"),
        ("precision", "fp64", "auto, bf16, fp32"),
        ("precision", None, "auto, bf16, fp32"),
        ("method.selection", "best", "mss, random, largest, mixed"),
        ("seeds", 3, "a list"),
        ("seeds", {"a": 1}, "a list"),
        ("seeds", "1,x", "whole number"),
        ("seeds", (1.5,), "whole number"),
        ("scenario.class_order", (1, 2), "text"),
        ("init_seed", "x", "whole number"),
        ("method", "mcr", METHOD_NAMES),
        ("method", None, METHOD_NAMES),
        ("method", [], METHOD_NAMES),
        ("method", Tones(), METHOD_NAMES),
        ("benchmark", "avs", BENCHMARK_NAMES),
        ("schedule", "3", "one of its fields: schedule.<field>"),
        ("schedule", {"epochs": 3}, "one of its fields"),
        ("resources", Schedule(), "one of its fields"),
    ],
)
def test_a_value_of_the_wrong_type_names_the_path_and_what_is_valid(path, value, named):
    with pytest.raises(InputError) as error:
        override(Experiment(), {path: value})
    assert path in str(error.value)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"schedule.epochs": 0}, "schedule.epochs"),
        ({"schedule.learning_rate": -1e-3}, "schedule.learning_rate"),
        ({"schedule.selection_from": 1}, "schedule.selection_from"),
        ({"resources.workers": 0}, "resources.workers"),
        ({"resources.gpus_per_worker": 1.5}, "resources.gpus_per_worker"),
        ({"resources.gpus_per_worker": -1}, "resources.gpus_per_worker"),
        ({"resources.gpus_per_worker": 0.5, "resources.workers": 2}, r"resources.gpus_per_worker .* resources.workers is 2"),
        ({"network.width": 3}, "network.width"),
        ({"network.dilations": ""}, "network.dilations"),
        ({"benchmark.frames": 99}, "benchmark.frames"),
        ({"benchmark.subset": "x"}, "benchmark.subset"),
        ({"method.samples_per_class": 0}, "method.samples_per_class"),
        ({"method.base.pod_weight": -1}, "method.base.pod_weight"),
        ({"method.base": "cmr"}, "method.base"),
        ({"method.base": Replay()}, "method.base"),
        ({"method.base": "joint"}, "method.base = .*such as: ewc, finetune, ilt, lwf, lwf_mc, mib, plop"),
        ({"seeds": "1,1"}, "seeds"),
        ({"seeds": ""}, "seeds"),
        ({"seeds": "-1"}, "seeds"),
        ({"init_seed": -1}, "init_seed"),
        ({"data_seed": "-3"}, "data_seed"),
        ({"memory_seed": "-3"}, "memory_seed"),
    ],
)
def test_what_a_dataclass_refuses_is_an_input_error_that_names_the_path(changes, path):
    with pytest.raises(InputError, match=path):
        override(Experiment(), changes)


def test_a_gpu_is_shared_by_jobs_of_one_worker_alone():
    shared = override(Experiment(), {"resources.gpus_per_worker": 0.5})
    assert shared.resources == Resources(gpus_per_worker=0.5)
    apart = override(Experiment(), {"resources.workers": 2, "resources.gpus_per_worker": 1})
    assert apart.resources == Resources(workers=2, gpus_per_worker=1.0)


@pytest.mark.parametrize("text", ["", "=", "=1", "schedule.epochs", "--trials"])
def test_an_assignment_needs_a_path_and_an_equals_sign(text):
    with pytest.raises(InputError, match="path=value"):
        parse_assignments([text])


def test_assignments_keep_later_equals_signs_and_lose_outer_blanks():
    assert parse_assignments([" a.b = x=y ", "c=", "a.b=2"]) == {"a.b": "2", "c": ""}
    assert parse_assignments(["a=x=y"]) == {"a": "x=y"}


def test_random_malformed_assignments_raise_input_errors_only():
    draw = random.Random(0)
    paths = [*flatten(Experiment()), "method.base", "schedule", "benchmark", "network"]
    letters = "abz019.,=-+_ \t\n'\"[]{}()\\é\u202e\ud800\x00∞"
    words = [
        "",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "none",
        "None",
        "true",
        "1_0",
        "0x1",
        "9" * 400,
        "-0",
        ",",
        ",,",
        "1,",
        "cmr",
        "tones",
    ]
    refused = 0
    for _ in range(500):
        path = draw.choice(paths)
        kind = draw.randrange(4)
        if kind == 0:
            path += draw.choice(["x", ".", ".x", "." + draw.choice(paths), " "])
        elif kind == 1:
            position = draw.randrange(len(path))
            path = path[:position] + draw.choice(letters) + path[position + 1 :]
        value = draw.choice(words) if draw.random() < 0.5 else "".join(draw.choices(letters, k=draw.randrange(6)))
        text = draw.choice([f"{path}={value}", f"{path}={value}", f"{path}={value}", path + value])
        try:
            changed = override(Experiment(), parse_assignments([text]))
        except InputError:
            refused += 1
        else:
            assert isinstance(changed, Experiment)
            fingerprint(changed)
    assert 250 < refused < 500


def test_flatten_lists_every_field_and_names_methods_and_benchmarks_by_file():
    flat = flatten(Experiment())
    assert (flat["method"], flat["method.base"], flat["benchmark"]) == ("cmr", "plop", "collage")
    assert flat["method.base.pod_scales"] == (1, 2, 4)
    assert flat["resources.workers"] == 1
    assert flat["init_seed"] is None
    assert "schedule" not in flat
    assert flatten(dataclasses.replace(Experiment(), method=Finetune()))["method"] == "finetune"


OTHER_EXPERIMENTS = [
    Experiment(),
    dataclasses.replace(Experiment(), method=Replay(base=PLOP(pod_weight=0.3), samples_per_class=2), seeds=(4, 7)),
    dataclasses.replace(
        Experiment(), method=CMR(base=Finetune(), delta="sum_released"), benchmark=Tones(short_clips=True), init_seed=3
    ),
    dataclasses.replace(Experiment(), method=PLOP(pod_scales=(2,)), resources=Resources(1, 2, 0.5), precision="fp32"),
]


@pytest.mark.parametrize("goal", OTHER_EXPERIMENTS)
@pytest.mark.parametrize("start", OTHER_EXPERIMENTS)
def test_the_difference_of_two_flat_experiments_overrides_one_into_the_other(start, goal):
    before, after = flatten(start), flatten(goal)
    difference = {path: value for path, value in after.items() if path not in before or before[path] != value}
    # A method that is replaced starts from its defaults, so its fields are told in full.
    for path in [path for path in difference if path in ("method", "method.base", "benchmark")]:
        difference.update({other: value for other, value in after.items() if other.startswith(f"{path}.")})
    assert override(start, difference) == goal
    as_text = {
        path: ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for path, value in difference.items()
    }
    assert override(start, as_text) == goal


def other_values(experiment: Experiment, path: str) -> typing.Iterator[object]:
    """Values that differ from the field's own; not all are valid."""
    owner, name = (at(experiment, path.rpartition(".")[0]), path.rpartition(".")[2]) if "." in path else (experiment, path)
    value, kind = getattr(owner, name), typing.get_type_hints(type(owner))[name]
    if typing.get_origin(kind) is typing.Literal:
        yield from (choice for choice in typing.get_args(kind) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, (Method, Benchmark)):
        yield from (choice for choice in ("finetune", "tones") if choice != file_name(value))
    elif isinstance(value, (int, float)):
        yield from (value + 1, value + 2, value / 2)
    elif isinstance(value, str):
        yield from ("single", "other")
    elif value is None:
        yield from (1, "folder")
    else:
        yield from ((*value, 77), (*value, "other"))


@pytest.mark.parametrize("path", [path for path in flatten(Experiment()) if path != "method.base"] + ["method.base"])
def test_every_field_is_part_of_the_fingerprint(path):
    for value in other_values(Experiment(), path):
        try:
            changed = override(Experiment(), {path: value})
        except InputError:
            continue
        assert fingerprint(changed) != fingerprint(Experiment())
        return
    pytest.fail(f"no other valid value for {path}")


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "from orchestrator.experiment import *;"
        "print(fingerprint(Experiment()), fingerprint({'b': range(3), 'a': {'y': (1.5, None), 'x': 'é'}}))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    mapping = {"a": {"x": "é", "y": [1.5, None]}, "b": range(3)}
    assert told.stdout.split() == [fingerprint(Experiment()), fingerprint(mapping)]


def test_plain_keeps_kinds_apart_and_refuses_what_json_cannot_hold():
    assert plain(Finetune()) == {"class": "Finetune"}
    assert fingerprint(Finetune()) != fingerprint({})
    assert fingerprint((1,)) == fingerprint([1])
    assert fingerprint(True) != fingerprint(1)
    assert fingerprint("1") != fingerprint(1)
    for value in (object(), {1, 2}, pathlib.Path("a"), Finetune, b"x"):
        with pytest.raises(TypeError, match=type(value).__name__):
            plain(value)


@pytest.mark.parametrize(("package", "base"), [(cavs_model.methods, Method), (cavs_model.datasets, Benchmark)])
def test_members_are_exactly_the_files_that_define_one(package, base):
    defining = set()
    for path in pathlib.Path(package.__path__[0]).glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            parents = {ast.unparse(parent) for parent in getattr(node, "bases", ())}
            if parents & {base.__name__, "RehearsalMethod", "VideoFolder"} and path.stem not in ("base", "clip_files"):
                defining.add(path.stem)
    found = members(package, base)
    assert set(found) == defining
    for name, kind in found.items():
        assert issubclass(kind, base)
        assert file_name(kind()) == name
        assert dataclasses.is_dataclass(kind)


def test_members_skip_helpers_and_imported_classes(tmp_path, monkeypatch):
    folder = tmp_path / "some_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "helper.py").write_text(
        "from cavs_model.methods.base import Method\nfrom cavs_model.methods.plop import PLOP\nclass Half(Method): ...\n"
    )  # abstract
    (folder / "mine.py").write_text("from cavs_model.methods.plop import PLOP\nclass Unrelated: ...\nclass Mine(PLOP): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = types.ModuleType("some_methods")
    package.__path__ = [str(folder)]
    monkeypatch.setitem(sys.modules, "some_methods", package)
    found = members(package, Method)
    assert {name: kind.__name__ for name, kind in found.items()} == {"mine": "Mine"}
    for name in ("helper", "mine"):
        sys.modules.pop(f"some_methods.{name}")


def test_seeds_follow_the_stream_unless_they_are_fixed():
    seeds = dataclasses.replace(Experiment(), init_seed=0, memory_seed=9).seeds_of(5)
    assert (seeds.init, seeds.data, seeds.memory) == (0, 5, 9)


def test_an_objective_is_a_maximum_or_a_minimum():
    assert Objective().mode == "max"
    with pytest.raises(InputError, match="max, min"):
        Objective("val/miou/all", "maximum")


def test_default_experiment_is_collage_and_cmr():
    assert (Experiment().benchmark, Experiment().method) == (Collage(), CMR())
