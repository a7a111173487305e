"""What the verbs share: arguments, folders, search spaces by name, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import os
import pkgutil
import re
import shlex
import signal
import subprocess
import sys
import traceback
import types
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError, unknown
from orchestrator import fields
from orchestrator.dry_run import debugged
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, Objective, Trial, check_types, override, parse_assignments
from orchestrator.outage import DEFAULT_SECONDS
from orchestrator.redaction import redacted, redacted_traceback
from orchestrator.shared import SharedEntries

DEFAULT_SPACE = "cmr_collage"
FIELDS_TITLE = "fields that --set changes"
INPUT_ERROR_STATUS = 2
REPORT_SECONDS = 300.0  # a report that takes longer is given up
UNIT_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
A_TIME = "seconds, or a number with s, m, h or d, such as 48h"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of a run


@dataclass(frozen=True)
class SearchSpace:
    """A file of search_spaces/: an experiment, what to optimise, and which knobs are open. `doc` is its docstring.

    `variants` are what `compare` sets side by side: per name the fields to be changed; the file need not have any.
    """

    name: str
    base: Experiment
    objectives: tuple[Objective, ...]
    define: Callable[[Trial], None]
    doc: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class _Recorder:
    """A trial that answers every question with its lowest or its highest value, to learn which knobs a space opens."""

    def __init__(self, highest: bool) -> None:
        self._highest = highest
        self.values: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        _check_range(name, low, high, step, log and step == 1, int)
        return int(self._answer(name, low, high))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        _check_range(name, low, high, step, log, (int, float))
        return float(self._answer(name, low, high))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, choices[0], choices[-1])

    def _answer(self, name: str, low: Any, high: Any) -> Any:
        self.values[name] = high if self._highest else low
        return self.values[name]


def _check_range(name: str, low: Any, high: Any, step: Any, log: bool, kind: Any) -> None:
    """ValueError for a range that no sampler could draw from."""
    for word, value in (("low", low), ("high", high), ("step", 1 if step is None else step)):
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{word} of {name} must be a {'whole' if kind is int else 'finite'} number, not {value!r}")
    if low > high or (log and low <= 0) or (step is not None and step <= 0):
        more = f", step {step!r}" * (step is not None) + ", log" * log
        raise ValueError(f"the range of {name} is empty or does not fit its scale: {low!r} to {high!r}{more}")


def open_knobs(space: SearchSpace) -> dict[str, Any]:
    """Field path -> lowest value of every knob the space opens.

    InputError where the base has no such field or refuses either end of the knob's range.
    """
    low, high = _Recorder(highest=False), _Recorder(highest=True)
    for recorder in (low, high):
        try:
            space.define(recorder)
        except Exception as error:  # whatever a user's file does
            raise InputError(f"search space {space.name}: define(trial) failed: {type(error).__name__}: {error}") from error
        try:
            override(space.base, recorder.values)
        except InputError as error:
            raise InputError(f"search space {space.name}: {error}") from error
    return low.values


def load_space(name: str) -> SearchSpace:
    """A search space by name ("cmr_collage") or by the path of a Python file.

    InputError for an unknown name, with the known ones, a file that Python cannot load, with the line, or one without
    BASE, OBJECTIVES and define.
    """
    if name.endswith(".py"):
        path = Path(name).absolute()
        if not path.is_file():
            raise InputError(f"no search space at {path}")
        module = _loaded(path.stem, path)
    else:
        folder = importlib.import_module("search_spaces")
        known = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
        if name not in known:
            raise unknown("search space", name, [*known, "or the path of a .py file"])
        module = _loaded(f"search_spaces.{name}", Path(folder.__path__[0]) / f"{name}.py")
    for required, kind in (("BASE", Experiment), ("OBJECTIVES", tuple), ("define", Callable)):
        if not isinstance(getattr(module, required, None), kind):  # type: ignore[arg-type]
            raise InputError(f"search space {name} must define BASE (an Experiment), OBJECTIVES (a tuple) and define(trial)")
    if not module.OBJECTIVES or not all(isinstance(objective, Objective) for objective in module.OBJECTIVES):
        raise InputError(f"search space {name}: OBJECTIVES must hold one Objective or more")
    try:
        check_types(module.BASE)
    except InputError as error:
        raise InputError(f"search space {name}: BASE: {error}") from error
    variants = getattr(module, "VARIANTS", {})
    if not isinstance(variants, Mapping) or not all(isinstance(changes, Mapping) for changes in variants.values()):
        raise InputError(f'search space {name}: VARIANTS must map names to changed fields, {{"plop": {{"method": "plop"}}}}')
    return SearchSpace(Path(name).stem, module.BASE, module.OBJECTIVES, module.define, module.__doc__ or "", variants)


def _loaded(module_name: str, path: Path) -> types.ModuleType:
    """The module at a path under a name by which what it defines can be unpickled. InputError that names the file and line."""
    loaded = sys.modules.get(module_name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        raise InputError(f"{path}: another module is called {module_name!r}; rename the file")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file does
        del sys.modules[module_name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place, reason = (path, lines[-1] if lines else 1), f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError):
            place, reason = (Path(error.filename or path), error.lineno or 1), f"SyntaxError: {error.msg}"
        raise InputError(f"search space {place[0]}, line {place[1]}: {reason}") from error
    return module


def parser(verb: str, description: str, several: bool = False) -> argparse.ArgumentParser:
    """The arguments that every verb takes; `several` search spaces or one."""
    made = _Parser(prog=f"python -m orchestrator.{verb}", description=description, formatter_class=_Formatter)
    what = "a file of search_spaces/, by name or path"
    if several:
        made.add_argument("space", nargs="+", help=f"{what}; one or more")
    else:
        made.add_argument("space", nargs="?", default=DEFAULT_SPACE, help=f"{what} (%(default)s)")
    made.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="override a field of the experiment, such as method.samples_per_class=3 or method=plop; may be repeated",
    )  # fmt: skip
    made.add_argument("--outputs", type=Path, default=None, help="folder of all results (CAVS_OUTPUTS, else ./outputs)")
    made.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    made.add_argument("--help-fields", action="store_true", help="every field of this space's experiment, and what it means")
    return made


def add_store(made: argparse.ArgumentParser, default: str | None = None) -> None:
    """The argument of the verbs that use the store."""
    made.add_argument(
        "--store", default=default, metavar="PLACE",
        help="the store: a folder, or a URI such as s3://bucket/prefix (CAVS_STORE, else store/ in the outputs)",
    )  # fmt: skip


def add_patience(made: argparse.ArgumentParser) -> None:
    """The argument of the verbs that wait for outages to end."""
    made.add_argument("--wait-out", type=duration, default=DEFAULT_SECONDS, metavar="TIME",
                      help=f"how long to wait for room on a full disk, or for a store that does not answer; {A_TIME} "
                      "(%(default)g s)")  # fmt: skip


def duration(text: str) -> float:
    """A time of the command line in seconds: "90", "90s", "30m", "48h" or "2d"."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd]?)", text, re.ASCII)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write {A_TIME}")
    return float(found[1]) * UNIT_SECONDS[found[2]]


def store_of(chosen: str | None, outputs: Path) -> Entries:
    """The store that was chosen; one behind a URI has its working copy in the outputs. Not made, nor looked at."""
    place = chosen or os.environ.get("CAVS_STORE", "")
    if "://" in place:
        return SharedEntries(outputs / "store", place)
    return Entries(Path(os.path.expanduser(place)).absolute() if place else outputs / "store")


def add_training(made: argparse.ArgumentParser) -> None:
    """The arguments of verbs that train."""
    made.add_argument("--plain", action="store_true", help="progress as lines in a terminal too")
    made.add_argument("--dry-run", action="store_true", help="say what would be done and what the store has of it; do nothing")
    made.add_argument("--debug", action="store_true",
                      help="the whole way in as little as it takes: two clips of a class, one epoch, one seed, under a name "
                      "that begins with debug")  # fmt: skip


class _Formatter(argparse.HelpFormatter):
    """As wide as the listing of the fields below it, whose lines stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(FIELDS_TITLE) else super()._fill_text(text, width, indent)


class _Parser(argparse.ArgumentParser):
    """Whose help ends with the fields that --set changes, read from the classes only when it is asked for."""

    def format_help(self) -> str:
        told = f"{FIELDS_TITLE} (of {DEFAULT_SPACE}; --help-fields lists those of your space and --set):"
        self.epilog = f"{told}\n{fields.text(load_space(DEFAULT_SPACE).base)}"
        return super().format_help()


def experiment_of(arguments: argparse.Namespace) -> tuple[SearchSpace, Experiment]:
    """The space and its experiment with the overrides of the command line."""
    space = load_space(arguments.space)
    experiment = override(space.base, parse_assignments(arguments.assignments))
    if arguments.help_fields:
        print(fields.text(experiment))
        raise SystemExit(0)
    if getattr(arguments, "debug", False):
        experiment = debugged(experiment)
    experiment.scenario.tasks(experiment.benchmark)  # an impossible setting or order is told now
    return space, experiment


def outputs_folder(chosen: Path | None) -> Path:
    """The absolute folder of all results, made and found writable.

    A job's working directory is a copy that Ray deletes, so inside a job the default lies in the home directory.
    """
    if chosen is None:
        text = os.environ.get("CAVS_OUTPUTS", "")
        in_copy = "runtime_resources" in Path.cwd().parts
        chosen = Path(text) if text else (Path.home() / "cavs_outputs" if in_copy else Path("outputs"))
    folder = Path(os.path.expanduser(chosen)).absolute()  # Path.expanduser raises where there is no such user
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to the outputs folder {folder}: {error.strerror}; choose another by --outputs or CAVS_OUTPUTS"
        ) from error
    return folder


def new_folder(parent: Path, name: str | None, default: str) -> Path:
    """A folder for one run's results: the name given, which must be new, or the default with the next free number."""
    check_name(name)
    candidates = [default, *(f"{default}-{number}" for number in range(2, 10_000))] if name is None else [name]
    for candidate in candidates:
        try:
            (parent / candidate).mkdir(parents=True)
            return parent / candidate
        except FileExistsError:
            continue
    raise InputError(f"--name {name!r} is taken: {parent / str(name)} exists; choose another name or delete the folder")


def run_folder(parent: Path, name: str | None, default: str) -> Path:
    """The folder of a run that goes on under its name: the one that is there, or a new one. InputError as `new_folder`."""
    check_name(name)
    return parent / name if name is not None and (parent / name).is_dir() else new_folder(parent, name, default)


def check_name(name: str | None) -> None:
    """InputError for a run's name that is more than a name: as a path it would lead elsewhere."""
    if name is not None and not re.fullmatch(NAME, name):
        raise InputError(f"--name {name!r}: use letters, digits, '.', '_' and '-'")


def add_report_option(made: argparse.ArgumentParser) -> None:
    """The argument by which a verb that ends with a report leaves it out."""
    made.add_argument("--no-report", action="store_true", help="end without writing report.html")


def write_report(name: str, outputs: Path) -> None:
    """Writes the report of what has ended, in a process of its own: what fails there fails alone, and is told."""
    command = ["-m", "orchestrator.report", name, "--outputs", str(outputs)]
    try:
        told = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=REPORT_SECONDS, check=False)
        lines = (told.stdout if told.returncode == 0 else told.stderr).strip().splitlines()
        reason = "" if told.returncode == 0 else lines[-1] if lines else f"status {told.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, reason = [], str(error)
    if reason:
        print(f"no report ({reason}); nothing else is missing. Try: python {shlex.join(command)}", flush=True)
    else:
        print("\n".join(lines), flush=True)


def main(verb: Callable[[], int]) -> int:
    """Runs a verb; bad input is one line on stderr and exit status 2, an interrupt is status 130.

    What is told of an error, also of one that nobody expects, is without secrets.
    """
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop`, batch systems
    sys.excepthook = redacted_traceback
    try:
        return verb()
    except InputError as error:
        text = redacted(str(error))
        print("error:", "; ".join(line.strip() for line in text.splitlines() if line.strip()), file=sys.stderr)
        return INPUT_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted; what was computed is kept and will be reused", file=sys.stderr)
        return 130


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever repeats it within seconds must not cut off the orderly end
    raise KeyboardInterrupt
