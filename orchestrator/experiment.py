"""An experiment as one frozen value, and its one vocabulary: the dotted field path.

`method.base.pod_weight` is at once the command-line override (`--set`), the Optuna parameter and the MLflow parameter.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import pkgutil
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cavs_model.datasets
import cavs_model.methods
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.collage import Collage
from cavs_model.errors import InputError, unknown
from cavs_model.methods.base import Method
from cavs_model.methods.cmr import CMR
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule, Seeds
from cavs_model.worker import PRECISIONS, Precision

LARGEST_INT = 2**63  # larger ones overflow in whoever computes with them


@dataclass(frozen=True)
class Resources:
    """What one training job of one network asks of the cluster. Never changes the result."""

    workers: int = 1  # data-parallel processes
    cpus_per_worker: int = 1  # threads of each
    gpus_per_worker: float = 0.0  # may be a fraction where there is one worker; 0 trains on CPU
    min_workers: int = 1  # where nodes are lost, a task goes on with no fewer than these; as many as `workers` or more: all
    note_seconds: float = 60.0  # after which a task notes what it can go on from, at the next end of an epoch; 0: at each

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"resources.workers must be at least 1, not {self.workers}")
        if self.min_workers < 1:
            raise InputError(f"resources.min_workers must be at least 1, not {self.min_workers}")
        if not self.note_seconds >= 0:
            raise InputError(f"resources.note_seconds must not be negative, not {self.note_seconds}")
        if self.cpus_per_worker < 1:
            raise InputError(f"resources.cpus_per_worker must be at least 1, not {self.cpus_per_worker}")
        if self.gpus_per_worker < 0 or not (self.gpus_per_worker <= 1 or float(self.gpus_per_worker).is_integer()):
            raise InputError(f"resources.gpus_per_worker must be a fraction up to 1 or whole, not {self.gpus_per_worker}")
        if 0 < self.gpus_per_worker < 1 and self.workers > 1:
            raise InputError(
                f"resources.gpus_per_worker must be 0 or whole where resources.workers is {self.workers}, "
                f"not {self.gpus_per_worker}: NCCL connects no two workers that share a GPU"
            )


@dataclass(frozen=True)
class Experiment:
    """Everything that determines a run: a search space with no free knob."""

    benchmark: Benchmark = field(default_factory=Collage)
    scenario: Scenario = field(default_factory=Scenario)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: Method = field(default_factory=CMR)
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = "auto"  # bf16 where the hardware has it
    per_frame: bool = False  # means over frames too, as AVSBench has them: a second pass over every split evaluated
    seeds: tuple[int, ...] = (0,)  # one stream each
    init_seed: int | None = None  # of new layers' weights; none: the stream's seed, here and in the next two
    data_seed: int | None = None  # of the order of the samples
    memory_seed: int | None = None  # of what is drawn for and from the memory
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds must be distinct and not negative, at least one: {self.seeds}")
        for name in ("init_seed", "data_seed", "memory_seed"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} must not be negative: {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)

    def seeds_of(self, seed: int) -> Seeds:
        """The sources of chance of the stream with this seed."""
        return Seeds(
            init=seed if self.init_seed is None else self.init_seed,
            data=seed if self.data_seed is None else self.data_seed,
            memory=seed if self.memory_seed is None else self.memory_seed,
        )


@dataclass(frozen=True)
class Objective:
    """A metric that a search optimises."""

    metric: str = "val/miou/all"
    mode: typing.Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            raise InputError(f"an objective's metric must be its name, such as val/miou/all, not {self.metric!r}")
        if self.mode not in ("max", "min"):
            raise unknown("mode of an objective", self.mode, ("max", "min"))


class Trial(typing.Protocol):
    """What a search space may ask of a trial (Optuna's own trials fit)."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = ..., log: bool = ...) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = ..., log: bool = ...) -> float: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


BASE_FILE = "base"  # of every such package: what its other files build on


def members(package: types.ModuleType, base: type) -> dict[str, type]:
    """File name -> the concrete subclass of `base` that the file defines, for every file of a package."""
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name == BASE_FILE:
            continue
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for value in vars(module).values():
            defined = isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
            if defined and not inspect.isabstract(value):
                found[info.name] = value
    return found


def choices_of(kind: type) -> dict[str, type] | None:
    """The classes that may stand in a field of this type by the name of their file, or None for an ordinary type."""
    if kind is Method:
        return members(cavs_model.methods, Method)
    if kind is Benchmark:
        return members(cavs_model.datasets, Benchmark)
    return None


def file_name(value: Method | Benchmark) -> str:
    """The name by which a method or benchmark is chosen: that of its file, such as "plop"."""
    return type(value).__module__.rsplit(".", 1)[-1]


def override(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with fields replaced by dotted path; values are typed ones, or text as on the command line.

    The order of the changes never matters: a value comes before its own fields (`method=cmr`, `method.samples_per_class=3`),
    and fields of one value change together. InputError for an unknown path (with the nearest and all valid ones), a value
    of the wrong type, or one that the value it belongs to refuses.
    """
    for path in changes:
        if not isinstance(path, str):
            raise InputError(f"unknown field {path!r}: a field's path is text, such as method.samples_per_class")
    changed: Experiment = _changed(experiment, changes, "")
    return changed


def check_types(value: Any, prefix: str = "") -> None:
    """InputError that names a field of an experiment whose value has not the field's type: Python itself does not look."""
    hints = typing.get_type_hints(type(value))
    for item in dataclasses.fields(value):
        path, content = f"{prefix}{item.name}", getattr(value, item.name)
        kind = hints[item.name]
        if isinstance(kind, type) and (choices_of(kind) is not None or dataclasses.is_dataclass(kind)):
            if not isinstance(content, kind):
                raise InputError(f"{path} must be a {kind.__name__}, not {content!r}")
            check_types(content, f"{path}.")
        elif _typed(content, kind, path) != content:
            raise InputError(f"{path} must be {_typed(content, kind, path)!r}, not {content!r}")


def parse_assignments(assignments: typing.Sequence[str]) -> dict[str, str]:
    """`["a.b=1", ...]` as a mapping. InputError for text without "="."""
    changes: dict[str, str] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise InputError(f'--set {text!r}: write path=value, for example "method.samples_per_class=3"')
        changes[path.strip()] = value.strip()
    return changes


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> plain value of every field; a method's or benchmark's own path holds the name of its file."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(value):
        path, content = f"{prefix}{item.name}", getattr(value, item.name)
        if isinstance(content, (Method, Benchmark)):
            flat[path] = file_name(content)
        if dataclasses.is_dataclass(content):
            flat.update(flatten(content, f"{path}."))
        else:
            flat[path] = content
    return flat


def fingerprint(value: Any) -> str:
    """A hex digest of a value made of dataclasses, mappings, sequences and plain values; the same in every process."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain(value: Any) -> Any:
    """The value as JSON types; a dataclass becomes its class name and fields. TypeError for anything else."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(content) for content in value]
    if isinstance(value, range):
        return [value.start, value.stop, value.step]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")


def _changed(value: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """The dataclass with the fields at these paths, relative to it, replaced. `prefix` is its own path and a dot."""
    hints = typing.get_type_hints(type(value))
    valid = [f"{prefix}{item.name}" for item in dataclasses.fields(value)]
    new: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for relative, content in changes.items():
        name, dot, rest = relative.partition(".")
        if f"{prefix}{name}" not in valid:
            close = difflib.get_close_matches(f"{prefix}{name}", valid, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(
                f"unknown field {prefix + relative!r}{hint}; the fields of {type(value).__name__} are: {', '.join(valid)}"
            )
        if dot:
            inner.setdefault(name, {})[rest] = content
        else:
            new[name] = _typed(content, hints[name], prefix + name)
    for name, rest_of in inner.items():
        current = new.get(name, getattr(value, name))
        if not dataclasses.is_dataclass(current):
            raise InputError(
                f"unknown field {f'{prefix}{name}.{next(iter(rest_of))}'!r}: {prefix}{name} has no fields of its own"
            )
        new[name] = _changed(current, rest_of, f"{prefix}{name}.")
    try:
        return dataclasses.replace(value, **new)
    except (InputError, ValueError, TypeError) as error:
        paths = [prefix + name for name in new]
        if isinstance(error, InputError) and any(path in str(error) for path in paths):
            raise
        raise InputError(f"{', '.join(paths)}: {error}") from error


def _typed(new: Any, kind: Any, path: str) -> Any:
    """The value as the field's type wants it. InputError that names the path, the value and what would be valid."""
    choices = choices_of(kind) if isinstance(kind, type) else None
    if choices is not None:
        if isinstance(new, kind):
            return new
        if not isinstance(new, str) or new not in choices:
            raise unknown(path, new, sorted(choices))
        return choices[new]()
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if new is None or (type(None) in arguments and new in ("none", "None", "")):
            return None
        return _typed(new, next(argument for argument in arguments if argument is not type(None)), path)
    if origin is typing.Literal:
        for argument in arguments:
            if new == argument or (isinstance(new, str) and new == str(argument)):
                return argument
        raise unknown(path, new, arguments)
    if origin is tuple:
        if not isinstance(new, (str, tuple, list)):
            raise InputError(f"{path} must be a list, not {new!r}")
        parts = [part for part in new.split(",") if part] if isinstance(new, str) else new
        return tuple(_typed(part, arguments[0], path) for part in parts)
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(new, bool):
            return new
        if isinstance(new, str) and new.lower() in words:
            return words[new.lower()]
        raise InputError(f"{path} must be true or false, not {new!r}")
    if kind in (int, float):
        try:
            number = kind(new)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is None or isinstance(new, bool) or (kind is int and isinstance(new, float) and new != number):
            raise InputError(f"{path} must be {'a whole number' if kind is int else 'a number'}, not {new!r}")
        if number != number or number in (float("inf"), float("-inf")):
            raise InputError(f"{path} must be finite, not {new!r}")
        if kind is int and abs(number) >= LARGEST_INT:
            raise InputError(f"{path} must be a whole number of less than 64 bits, not {new!r}")
        return number
    if kind is str:
        if not isinstance(new, str):
            raise InputError(f"{path} must be text, not {new!r}")
        return new
    if isinstance(kind, type) and isinstance(new, kind):
        return new
    raise InputError(f"{path} cannot be set as a whole; set one of its fields: {path}.<field>")
