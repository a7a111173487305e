"""What --help says of the fields: it comes from the source, and no field is without."""

import pytest

import cavs_model.datasets
import cavs_model.methods
from cavs_model.datasets.base import Benchmark
from cavs_model.methods.base import Method
from orchestrator import cli, fields
from orchestrator.experiment import Experiment, flatten, members, override


def test_every_path_is_listed_once_with_the_value_that_set_takes():
    listed = {each.path: each for each in fields.described()}
    assert list(listed) == list(flatten(Experiment()))
    again = override(Experiment(), {each.path: each.value for each in listed.values()})
    assert again == Experiment()
    assert listed["method.resampling_ratio"].kind == "float, at least 0, at most 1"
    assert listed["method.selection"].kind == "mss | random | largest | mixed"
    assert "plop" in listed["method"].kind
    assert listed["schedule.epochs"].doc == "of every task after the base task"
    assert listed["benchmark.frames"].doc == "T, the frames of every clip, one a second (shorter clips are padded)."
    assert listed["seeds"].value == "0"


@pytest.mark.parametrize(
    ("path", "name"),
    [("method", name) for name in members(cavs_model.methods, Method)]
    + [("benchmark", name) for name in members(cavs_model.datasets, Benchmark)],
)
def test_no_field_is_without_a_word(path, name):
    assert [each.path for each in fields.described(override(Experiment(), {path: name})) if not each.doc] == []


def test_help_ends_with_the_fields_and_help_fields_has_those_of_the_space(capsys):
    parser = cli.parser("run", "What it does.")
    text = parser.format_help()
    assert "What it does." in text
    assert "\n  method.samples_per_class=5  (int, at least 1)  k; paper: 5\n" in text
    with pytest.raises(SystemExit) as ended:
        cli.experiment_of(parser.parse_args(["tones", "--set", "method=plop", "--set", "schedule.epochs=7", "--help-fields"]))
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "  schedule.epochs=7  (int)" in told
    assert "  method.pod_weight=0.01  (float, at least 0)" in told
    assert "samples_per_class" not in told
