"""A trained network on disk: `weights.safetensors` and `about.json`. Never a pickle, so that a stranger's file is only data.

What a method keeps of a network's parameters lies in a folder of its own: `method_state.safetensors`. So does what a task
that was interrupted goes on from: `interim.json` and the tensors that it names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig
from cavs_model.types import AUDIO_VISUAL, IGNORE, VISUAL_ONLY
from cavs_model.untrusted import FaultError, read_bounded, read_json, shown, typed, typed_fields

WEIGHTS = "weights.safetensors"
ABOUT = "about.json"
METHOD_STATE = "method_state.safetensors"
INTERIM = "interim.json"
LARGEST_BYTES = 2**33  # of the tensors; the largest network with all that its optimiser keeps has a quarter
CLASSIFIER = "classifier.conv.weight"


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself.

    `history` holds one record of mean loss terms per epoch; `clips` is how many clip passes the training took, `seconds` its
    wall time and `world_size` its workers: the cost, which later work is planned by.

    `classes` are the benchmark's in the order in which they are learned, those that come after `num_classes` too; with the size
    and number of the frames they are what a new clip is to be made like. Empty and 0 in checkpoints of earlier versions.
    """

    network: str
    num_classes: int
    config: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...] = ()
    clips: int = 0
    seconds: float = 0.0
    world_size: int = 1
    classes: tuple[str, ...] = ()
    image_size_px: int = 0
    frames: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, as bytes: what is put into the object store once and read by every scoring task."""

    about: About
    weights: bytes
    directory: str  # where it was read from, for messages

    def model(self, draws: bool = False) -> AVSegmenter:
        """The network on CPU, in evaluation mode, frozen. InputError where the weights do not fit its description.

        torch's random state stays, or with `draws` is as after the first weights of such a network.
        """
        try:
            config = NetworkConfig(**typed_fields(NetworkConfig, {**self.about.config, "visual_weights": "none"}))
        except (InputError, FaultError) as error:
            raise InputError(f"damaged checkpoint description {Path(self.directory) / ABOUT}: {error}") from error
        misfit = f"checkpoint {Path(self.directory) / WEIGHTS} of {self.about.network} does not fit its description"
        tensors = _decode(self.weights, misfit)
        # Looked at before a network is built that may be far larger than what the file holds.
        classifier, expected = tensors.get(CLASSIFIER), (self.about.num_classes, config.head_channels, 1, 1)
        if classifier is None or tuple(classifier.shape) != expected:
            has = "no classifier" if classifier is None else f"a classifier of shape {list(classifier.shape)}"
            raise InputError(f"{misfit}: it has {has}, expected {list(expected)}")
        try:
            with nullcontext() if draws else _WithoutFirstWeights():
                model = AVSegmenter(config, self.about.num_classes, self.about.network)
        except InputError as error:
            raise InputError(f"damaged checkpoint description {Path(self.directory) / ABOUT}: {error}") from error
        try:
            model.load_state_dict(tensors)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{misfit}: {' '.join(str(error).split())[:500]}") from error
        return model.eval().requires_grad_(False)


class _WithoutFirstWeights(TorchFunctionMode):
    """Networks that are built within it keep whatever lies in the memory of their parameters, for these to be overwritten.

    Drawing them takes most of the time it takes to load a large network.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


def save(directory: Path, state: Mapping[str, Tensor], about: About) -> None:
    """Writes a checkpoint; `about.json` is written last, so that a directory that has it is complete."""
    _write(directory, {WEIGHTS: _encode(state), ABOUT: json.dumps(asdict(about), indent=1).encode()})


def is_whole(directory: Path) -> bool:
    """Whether a checkpoint was written there to its end."""
    return (directory / ABOUT).is_file()


def read_about(directory: Path) -> About:
    """The description of a checkpoint alone. InputError that names a missing or damaged file."""
    path = directory / ABOUT
    try:
        about = About(**typed_fields(About, read_json(path)))
        if about.network not in (AUDIO_VISUAL, VISUAL_ONLY):
            raise FaultError(f"network must be {AUDIO_VISUAL} or {VISUAL_ONLY}, not {shown(about.network)}")
        if not 1 <= about.num_classes < IGNORE:
            raise FaultError(f"num_classes must be from 1 to {IGNORE - 1}, not {about.num_classes}")
        return replace(about, config=_tuples(about.config))
    except FaultError as fault:
        if not path.exists():
            raise InputError(f"no checkpoint at {directory}: {ABOUT} is missing") from None
        raise InputError(f"damaged checkpoint description {path}: {fault}") from None


def read(directory: Path) -> Checkpoint:
    """A checkpoint in full. InputError that names a missing or damaged file."""
    about = read_about(directory)
    try:
        return Checkpoint(about, read_bounded(directory / WEIGHTS, LARGEST_BYTES), str(directory))
    except FaultError as fault:
        raise InputError(f"no checkpoint at {directory}: {WEIGHTS} {fault}") from None


def load(directory: Path, draws: bool = False) -> AVSegmenter:
    """The network of a checkpoint, as `Checkpoint.model`."""
    return read(directory).model(draws)


def save_method_state(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Writes what a method keeps of a network's parameters."""
    _write(directory, {METHOD_STATE: _encode(state)})


def read_method_state(directory: Path) -> dict[str, Tensor]:
    """What a method kept, on the CPU. InputError that names a missing or damaged file."""
    path = directory / METHOD_STATE
    try:
        return _decode(read_bounded(path, LARGEST_BYTES), f"damaged method state {path}")
    except FaultError as fault:
        raise InputError(f"no method state at {directory}: {METHOD_STATE} {fault}") from None


@dataclass(frozen=True)
class Interim:
    """A task after some of its epochs: all that the next one depends on, and what the ended ones cost.

    `job` is a digest of the job that left it; `best` is the score of the weights chosen so far. `tensors` are on the CPU.
    """

    job: str
    epochs: int
    history: tuple[Mapping[str, float], ...]
    worker_seconds: float
    best: float
    tensors: Mapping[str, Tensor]


def save_interim(directory: Path, interim: Interim) -> None:
    """Puts an interim in place of the last one. OSError where it cannot be written; the last one is then still whole.

    `interim.json` names the tensors' file and their digest and is replaced after they are there, so that who is killed at any
    point leaves one of the two.
    """
    content = _encode(interim.tensors)
    name = f"interim-{interim.epochs}.safetensors"
    fields: dict[str, Any] = {item.name: getattr(interim, item.name) for item in dataclasses.fields(interim)}
    fields |= {"tensors": name, "digest": hashlib.sha256(content).hexdigest()}
    try:
        _write(directory, {name: content, INTERIM: json.dumps(fields).encode()})
    finally:
        try:
            kept = {INTERIM, json.loads((directory / INTERIM).read_text())["tensors"]}
        except (OSError, ValueError, KeyError, TypeError):
            kept = set()
        _clear_interim(directory, kept)


def read_interim(directory: Path) -> Interim | None:
    """The interim in a directory, None where there is none. InputError that names a missing or damaged file."""
    path = directory / INTERIM
    if not os.path.lexists(path):
        return None
    try:
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise FaultError("holds no fields")
        name, digest = typed(fields.pop("tensors", None), str, "tensors"), fields.pop("digest", None)
        if not re.fullmatch(r"interim-\d{1,18}\.safetensors", name, re.ASCII):
            raise FaultError(f"tensors must be the name of a file beside it, not {shown(name)}")
        facts = typed_fields(Interim, fields, given={"tensors": {}})
        path = directory / name
        content = read_bounded(path, LARGEST_BYTES)
        if hashlib.sha256(content).hexdigest() != digest:
            raise FaultError("its digest is not the one that was noted")
        return Interim(**{**facts, "tensors": _decode(content, f"damaged interim {path}")})
    except FaultError as fault:
        raise InputError(f"damaged interim {path}: it {fault}") from None


def remove_interim(directory: Path) -> None:
    """Removes the interim in a directory, if there is one, and pieces of others; nothing else."""
    _clear_interim(directory, set())


def _clear_interim(directory: Path, kept: set[str]) -> None:
    # The description goes first: without it the rest is nothing.
    for path in (directory / INTERIM, *directory.glob("interim-*.safetensors"), *directory.glob(".interim*")):
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _decode(content: bytes, told: str) -> dict[str, Tensor]:
    """The tensors of a file. InputError that begins with `told` where they cannot be read."""
    try:
        return load_tensors(content)
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{told}: {shown(str(error))}") from error


def _encode(state: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files in this order, each as a whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a node that loses its power must not leave the new name with nothing in it
        os.replace(temporary, directory / name)


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows only lists; the configuration's sequences are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
