"""What the verbs share, and that bad input ends in one line and status 2 before anything is started."""

import argparse
import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import ray

from cavs_model.datasets.collage import SHIPPED_PACK
from cavs_model.errors import InputError
from orchestrator import cli, run, sweep
from orchestrator.experiment import Experiment, Objective

SPACE = """\"\"\"A question.\"\"\"
from orchestrator.experiment import Experiment, Objective
BASE = Experiment()
OBJECTIVES = (Objective(),)
def define(trial):
    trial.suggest_int("method.samples_per_class", 1, 4)
"""


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
    """`main` sets a handler and `load_space` adds modules: both are undone."""
    before, modules = signal.getsignal(signal.SIGTERM), set(sys.modules)
    for name in ("CAVS_OUTPUTS", "CAVS_STORE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    yield
    signal.signal(signal.SIGTERM, before)
    for name in set(sys.modules) - modules:
        if name.startswith("space_"):
            del sys.modules[name]


def write(tmp_path, text, name="space_a.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_space_is_loaded_by_name_and_by_path(tmp_path):
    assert cli.load_space("tones").name == "tones"
    assert cli.load_space("tones").objectives == (Objective("val/miou/all", "max"),)
    loaded = cli.load_space(write(tmp_path, SPACE))
    assert (loaded.name, loaded.base, loaded.doc) == ("space_a", Experiment(), "A question.")
    assert cli.open_knobs(loaded) == {"method.samples_per_class": 1}
    again = cli.load_space(str(tmp_path / "space_a.py"))
    assert again.define is loaded.define  # what is pickled by name must be found again


def test_a_relative_path_is_loaded_too(tmp_path, monkeypatch):
    write(tmp_path, SPACE, "space_b.py")
    monkeypatch.chdir(tmp_path)
    assert cli.load_space("space_b.py").name == "space_b"


@pytest.mark.parametrize("name", ["nonexistent", "", "../tones", "tones.sub", "search_spaces.tones"])
def test_an_unknown_space_is_told_with_the_known_ones(name):
    with pytest.raises(InputError, match=r"unknown search space .*cmr_collage.*tones.*\.py"):
        cli.load_space(name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    (tmp_path / "folder.py").mkdir()
    for name in ("absent.py", "folder.py"):
        with pytest.raises(InputError, match=f"no search space at {tmp_path / name}"):
            cli.load_space(str(tmp_path / name))


@pytest.mark.parametrize("missing", ["BASE", "OBJECTIVES", "define"])
def test_a_file_must_define_all_three(tmp_path, missing):
    path = write(tmp_path, f"{SPACE}\ndel {missing}\n")
    with pytest.raises(InputError, match=r"must define BASE \(an Experiment\), OBJECTIVES \(a tuple\) and define"):
        cli.load_space(path)


@pytest.mark.parametrize("value", ["()", "(1,)", "('val/miou/all',)"])
def test_objectives_must_be_objectives(tmp_path, value):
    with pytest.raises(InputError, match="OBJECTIVES must hold"):
        cli.load_space(write(tmp_path, SPACE.replace("(Objective(),)", value)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("BASE = Experiment((", "line 3: SyntaxError"),
        ("BASE = Experimnt()", "line 3: NameError: name 'Experimnt'"),
        ("import no_such_module", "line 3: ModuleNotFoundError: No module named 'no_such_module'"),
        ("BASE = Experiment(seeds=())", "line 3: InputError: seeds must be distinct"),
        ("BASE = Experiment(sedes=(1,))", "line 3: TypeError"),
        ("BASE = Experiment()\n  x = 1", "line 4: SyntaxError: unexpected indent"),
    ],
)
def test_a_file_that_python_cannot_load_is_named_with_the_line(tmp_path, line, told):
    path = write(tmp_path, SPACE.replace("BASE = Experiment()", line), "space_broken.py")
    with pytest.raises(InputError) as error:
        cli.load_space(path)
    assert path in str(error.value)
    assert told in str(error.value)
    assert "space_broken" not in sys.modules
    pathlib.Path(path).write_text(SPACE)
    assert cli.load_space(path).base == Experiment()


def test_a_file_never_takes_the_place_of_another_module(tmp_path):
    with pytest.raises(InputError, match="another module is called 'json'; rename"):
        cli.load_space(write(tmp_path, SPACE, "json.py"))
    assert not hasattr(sys.modules["json"], "BASE")


@pytest.mark.parametrize(
    ("knob", "told"),
    [
        ('trial.suggest_int("method.samples_per_klass", 1, 4)', "did you mean 'method.samples_per_class'"),
        ('trial.suggest_int("method.samples_per_class", 0, 4)', "method.samples_per_class"),
        ('trial.suggest_float("method.resampling_ratio", 0.1, 1.5)', "method.resampling_ratio"),
        ('trial.suggest_float("method.samples_per_class", 0.5, 4)', "whole number"),
        ('trial.suggest_categorical("method.selection", ["mss", "best"])', "mss, random, largest, mixed"),
        ('trial.suggest_uniform("method.resampling_ratio", 0, 1)', "define(trial) failed: AttributeError"),
        ("trial.suggest_categorical('method.selection', [])", "define(trial) failed: IndexError"),
    ],
)
def test_a_knob_must_be_a_field_of_the_base_and_stay_in_range(tmp_path, knob, told):
    text = SPACE.replace('trial.suggest_int("method.samples_per_class", 1, 4)', knob)
    with pytest.raises(InputError) as error:
        cli.open_knobs(cli.load_space(write(tmp_path, text)))
    assert told in str(error.value)


def test_conditional_knobs_are_found_by_their_lowest_values():
    def define(trial):
        if trial.suggest_categorical("method", ["plop", "cmr"]) == "plop":
            trial.suggest_float("method.pod_weight", 1e-4, 1e-1, log=True)
        else:
            trial.suggest_int("method.samples_per_class", 1, 8, step=1)

    space = cli.SearchSpace("x", Experiment(), (Objective(),), define)
    assert cli.open_knobs(space) == {"method": "plop", "method.pod_weight": 1e-4}


def test_the_outputs_folder_is_made_absolute_and_left_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.outputs_folder(pathlib.Path("a/b")) == tmp_path / "a" / "b"
    assert cli.outputs_folder(None) == tmp_path / "outputs"
    monkeypatch.setenv("CAVS_OUTPUTS", str(tmp_path / "elsewhere"))
    assert cli.outputs_folder(None) == tmp_path / "elsewhere"
    assert cli.outputs_folder(pathlib.Path("a")) == tmp_path / "a"
    assert [list(folder.iterdir()) for folder in (tmp_path / "a" / "b", tmp_path / "elsewhere")] == [[], []]


def test_the_home_folder_is_the_default_inside_a_job_and_tilde_means_it(tmp_path, monkeypatch):
    home, copy = tmp_path / "home", tmp_path / "runtime_resources" / "working_dir_files" / "x"
    copy.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(copy)
    assert cli.outputs_folder(None) == home / "cavs_outputs"
    monkeypatch.setenv("CAVS_OUTPUTS", "~/mine")
    assert cli.outputs_folder(None) == home / "mine"
    assert cli.outputs_folder(pathlib.Path("~no_such_user_here/x")) == copy / "~no_such_user_here" / "x"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot write to the outputs folder {tmp_path / 'file'}.*--outputs or CAVS_OUTPUTS"):
        cli.outputs_folder(tmp_path / "file" / below)


def test_new_folders_are_numbered(tmp_path):
    made = [cli.new_folder(tmp_path / "sweeps", None, "tones") for _ in range(3)]
    assert [folder.name for folder in made] == ["tones", "tones-2", "tones-3"]
    assert all(folder.is_dir() for folder in made)
    made[1].rmdir()
    assert cli.new_folder(tmp_path / "sweeps", None, "tones").name == "tones-2"


def test_a_name_is_taken_as_it_is_or_refused(tmp_path):
    assert cli.new_folder(tmp_path, "a.B_c-1", "x") == tmp_path / "a.B_c-1"
    with pytest.raises(InputError, match=r"'a\.B_c-1' is taken"):
        cli.new_folder(tmp_path, "a.B_c-1", "x")
    for name in ("", ".", "..", "../up", "a/b", "a b", ".hidden", "-x", "ä", "a\n"):
        for folder_of in (cli.new_folder, cli.run_folder):
            with pytest.raises(InputError, match="use letters, digits"):
                folder_of(tmp_path, name, "x")


def test_a_run_that_goes_on_has_the_folder_of_its_name(tmp_path):
    first = cli.run_folder(tmp_path, "mine", "x")
    assert cli.run_folder(tmp_path, "mine", "x") == first == tmp_path / "mine"
    assert [cli.run_folder(tmp_path, None, "x").name for _ in range(2)] == ["x", "x-2"]  # without a name each is a new one


def test_main_tells_bad_input_in_one_line_with_status_2(capsys):
    def verb():
        raise InputError("first\n  second\n\nthird")

    assert cli.main(verb) == 2
    told = capsys.readouterr()
    assert told.err == "error: first; second; third\n"
    assert told.out == ""
    assert cli.main(lambda: 1) == 1


def test_an_interrupt_and_a_sigterm_are_status_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert cli.main(interrupted) == 130
    assert cli.main(lambda: signal.raise_signal(signal.SIGTERM) or 0) == 130
    assert capsys.readouterr().err.count("\n") == 2


def test_other_errors_keep_their_traceback():
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.main(broken)


def test_the_command_line_overrides_the_space():
    arguments = cli.parser("run", "").parse_args(["tones", "--set", "seeds=3", "--set", "method=replay"])
    space, experiment = cli.experiment_of(arguments)
    assert experiment == dataclasses.replace(space.base, seeds=(3,), method=experiment.method)
    assert type(experiment.method).__name__ == "Replay"
    assert cli.parser("run", "").parse_args([]).space == cli.DEFAULT_SPACE


# The verbs with bad input: in this process with Ray out of reach, and twice for real.


@pytest.fixture
def pack(tmp_path):
    """A copy of the shipped pack, so that one of its files can be damaged."""
    return pathlib.Path(shutil.copytree(SHIPPED_PACK, tmp_path / "pack"))


def command(verb, arguments, monkeypatch):
    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    monkeypatch.setattr(sys, "argv", [f"orchestrator.{verb.__name__}", *arguments])
    try:
        return cli.main(verb)
    except SystemExit as error:  # argparse
        return error.code


BAD = [
    (["nonexistent"], ["'nonexistent'", "cmr_collage", "tones"]),
    (["--set", "bogus.path=1"], ["'bogus.path'", "benchmark, scenario"]),
    (["--set", "method.samples_per_class=abc"], ["method.samples_per_class", "'abc'", "whole number"]),
    (["--set", "method.samples_per_class"], ["path=value"]),
    (["--set", "scenario.setting=99-1"], ["'99-1'", "24 classes of collage", "16-8, 16-4, 20-1"]),
    (["--set", "scenario.order=x"], ["'x'", "alphabetical", "random"]),
    (["tones", "--set", "scenario.class_order=a"], ["'a'", "a-disc"]),
    (["--set", "method=unknown"], ["'unknown'", "plop"]),
    (["tones", "--set", "seeds=1,1"], ["seeds", "distinct"]),
    (["tones", "--outputs", "FILE/below"], ["FILE/below", "--outputs or CAVS_OUTPUTS"]),
    (["--set", "benchmark.pack=ABSENT"], ["ABSENT"]),
]


@pytest.mark.parametrize("verb", [sweep.sweep, run.run])
@pytest.mark.parametrize(("arguments", "told"), BAD)
def test_bad_input_is_one_line_before_anything_starts(verb, arguments, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    assert command(verb, arguments, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [text for text in told if text not in error] == []
    assert sorted(path.name for path in tmp_path.iterdir()) in (["FILE"], ["FILE", "outputs"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tones", "--trials", "0"], "--trials must be at least 1"),
        (["tones", "--retries", "-1"], "--retries must be at least 0"),
        (["tones", "--plateau", "0"], "--plateau must be positive"),
        (["tones", "--fresh"], "--fresh starts a sweep of a given --name anew"),
        (["tones", "--trials", "many"], "invalid int value: 'many'"),
        (["tones", "--sampler", "grid"], "choose from"),
        (["tones", "--bogus"], "unrecognized arguments: --bogus"),
        (["tones", "--set", "method=replay"], "unknown field 'method.resampling_ratio'"),
        (["tones", "--set", "method=plop"], "unknown field 'method.samples_per_class'"),
    ],
)
def test_a_sweep_refuses_its_own_bad_arguments(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(sweep.sweep, arguments, monkeypatch) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("harm", ["damage", "remove", "no manifest"])
def test_a_damaged_pack_is_found_before_anything_starts(harm, pack, tmp_path, monkeypatch, capsys):
    victim = "manifest.csv" if harm == "no manifest" else next(pack.glob("sounds/**/*.*")).relative_to(pack)
    (pack / victim).unlink()
    if harm == "damage":
        (pack / victim).write_bytes(b"something else")
    arguments = ["--outputs", str(tmp_path / "outputs"), "--set", f"benchmark.pack={pack}"]
    assert command(sweep.sweep, arguments, monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(pack / victim) in error


def test_a_tracking_server_that_does_not_answer_is_found_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    assert command(sweep.sweep, ["tones", "--outputs", str(tmp_path)], monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: MLflow cannot be reached at http://127.0.0.1:9:" in error
    assert "MLFLOW_TRACKING_URI" in error
    assert "secret" not in error


def test_a_folder_as_tracking_store_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    assert command(run.run, ["tones", "--outputs", str(tmp_path / "outputs")], monkeypatch) == 2
    assert "sqlite:///absolute/path.db or http://host:port" in capsys.readouterr().err
    assert not (tmp_path / "mlruns").exists()


def test_the_real_command_ends_with_status_2_and_one_line(tmp_path):
    command_line = [sys.executable, "-m", "orchestrator.sweep", "--set", "bogus.path=1", "--outputs", str(tmp_path / "outputs")]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    told = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr.startswith("error: unknown field 'bogus.path'; the fields of Experiment are: benchmark,")
    assert told.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("48h", 48 * 3600), ("2d", 2 * 86400), ("0", 0)]
)
def test_a_time_has_a_unit_or_is_in_seconds(text, seconds):
    assert cli.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1", "1 h", "1w", "1e3", "inf", "nan", "٣", "1h30m"])
def test_what_is_no_time_is_told(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="is no time: write seconds, or a number with s, m, h or d"):
        cli.duration(text)
    made = argparse.ArgumentParser()
    cli.add_patience(made)
    with pytest.raises(SystemExit):
        made.parse_args(["--wait-out=" + text])
    assert "argument --wait-out: " in capsys.readouterr().err
