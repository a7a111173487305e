"""What the verbs share: arguments, folders, search spaces by name, and errors as one line with exit status 2."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import signal
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cavs_model.errors import InputError, unknown
from orchestrator.experiment import Experiment, Objective, Trial, override, parse_assignments

DEFAULT_SPACE = "cmr_collage"
INPUT_ERROR_STATUS = 2


@dataclass(frozen=True)
class SearchSpace:
    """A file of search_spaces/: an experiment, what to optimise, and which knobs are open. `doc` is its docstring."""

    name: str
    base: Experiment
    objectives: tuple[Objective, ...]
    define: Callable[[Trial], None]
    doc: str = ""


class _Recorder:
    """A trial that answers every question with its lowest value, to learn which knobs a space opens."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        return int(self._answer(name, low))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        return float(self._answer(name, low))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._answer(name, choices[0])

    def _answer(self, name: str, value: Any) -> Any:
        self.values[name] = value
        return value


def open_knobs(space: SearchSpace) -> dict[str, Any]:
    """Field path -> lowest value of every knob the space opens. InputError where the base has no such field."""
    recorder = _Recorder()
    space.define(recorder)
    override(space.base, recorder.values)
    return recorder.values


def load_space(name: str) -> SearchSpace:
    """A search space by name ("cmr_collage") or by the path of a Python file.

    InputError for an unknown name, with the known ones, or a file without BASE, OBJECTIVES and define.
    """
    if name.endswith(".py"):
        path = Path(name).absolute()
        if not path.is_file():
            raise InputError(f"no search space at {path}")
        # By its folder, so that what workers unpickle is found under the same name.
        module_name = path.stem
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise InputError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    else:
        folder = importlib.import_module("search_spaces")
        known = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
        if name not in known:
            raise unknown("search space", name, [*known, "or the path of a .py file"])
        module = importlib.import_module(f"search_spaces.{name}")
    for required, kind in (("BASE", Experiment), ("OBJECTIVES", tuple), ("define", Callable)):
        if not isinstance(getattr(module, required, None), kind):  # type: ignore[arg-type]
            raise InputError(f"search space {name} must define BASE (an Experiment), OBJECTIVES (a tuple) and define(trial)")
    if not module.OBJECTIVES:
        raise InputError(f"search space {name}: OBJECTIVES is empty")
    return SearchSpace(Path(name).stem, module.BASE, module.OBJECTIVES, module.define, module.__doc__ or "")


def parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The arguments that every verb takes."""
    made = argparse.ArgumentParser(prog=f"python -m orchestrator.{verb}", description=description)
    made.add_argument("space", nargs="?", default=DEFAULT_SPACE, help="a file of search_spaces/, by name or path (%(default)s)")
    made.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="override a field of the experiment, such as method.samples_per_class=3 or method=plop; may be repeated",
    )  # fmt: skip
    made.add_argument("--outputs", type=Path, default=None, help="folder of all results (CAVS_OUTPUTS, else ./outputs)")
    made.add_argument("--verbose", action="store_true", help="show Ray's own messages too")
    return made


def experiment_of(arguments: argparse.Namespace) -> tuple[SearchSpace, Experiment]:
    """The space and its experiment with the overrides of the command line."""
    space = load_space(arguments.space)
    experiment = override(space.base, parse_assignments(arguments.assignments))
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
    folder = chosen.expanduser().absolute()
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
    if name is not None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(f"--name {name!r}: use letters, digits, '.', '_' and '-'")
        candidates = [name]
    else:
        candidates = [default, *(f"{default}-{number}" for number in range(2, 10_000))]
    for candidate in candidates:
        try:
            (parent / candidate).mkdir(parents=True)
            return parent / candidate
        except FileExistsError:
            continue
    raise InputError(f"--name {name!r} is taken: {parent / str(name)} exists; choose another name or delete the folder")


def worker_environment(tracking: str) -> Mapping[str, str]:
    """What workers need of the driver's environment, which does not reach them by itself."""
    passed = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "OMP_NUM_THREADS") if name in os.environ}
    return {"MLFLOW_TRACKING_URI": tracking, **passed}


def main(verb: Callable[[], int]) -> int:
    """Runs a verb; bad input is one line on stderr and exit status 2, an interrupt is status 130."""
    signal.signal(signal.SIGTERM, _interrupt)  # `ray job stop`, batch systems
    try:
        return verb()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return INPUT_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted; what was computed is kept and will be reused", file=sys.stderr)
        return 130


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
