"""A trained network on disk: `weights.safetensors` and `about.json`. Never a pickle, so that a stranger's file is only data.

What a method keeps of a network's parameters lies in a folder of its own: `method_state.safetensors`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig

WEIGHTS = "weights.safetensors"
ABOUT = "about.json"
METHOD_STATE = "method_state.safetensors"


@dataclass(frozen=True)
class About:
    """What a checkpoint says of itself.

    `history` holds one record of mean loss terms per epoch; `clips` is how many clip passes the training took, `seconds` its
    wall time and `world_size` its workers: the cost, which later work is planned by.
    """

    network: str
    num_classes: int
    config: Mapping[str, Any]
    history: tuple[Mapping[str, float], ...] = ()
    clips: int = 0
    seconds: float = 0.0
    world_size: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory, as bytes: what is put into the object store once and read by every scoring task."""

    about: About
    weights: bytes
    directory: str  # where it was read from, for messages

    def model(self) -> AVSegmenter:
        """The network on CPU, in evaluation mode, frozen. InputError where the weights do not fit its description."""
        try:
            config = NetworkConfig(**{**self.about.config, "visual_weights": "none"})
            model = AVSegmenter(config, self.about.num_classes, self.about.network)
        except (InputError, TypeError) as error:
            raise InputError(f"damaged checkpoint description {Path(self.directory) / ABOUT}: {error}") from error
        try:
            model.load_state_dict(load_tensors(self.weights))
        except (SafetensorError, RuntimeError) as error:
            path = Path(self.directory) / WEIGHTS
            raise InputError(f"checkpoint {path} of {self.about.network} does not fit its description: {error}") from error
        return model.eval().requires_grad_(False)


def save(directory: Path, state: Mapping[str, Tensor], about: About) -> None:
    """Writes a checkpoint; `about.json` is written last, so that a directory that has it is complete."""
    _write(directory, {WEIGHTS: _encode(state), ABOUT: json.dumps(asdict(about), indent=1).encode()})


def read_about(directory: Path) -> About:
    """The description of a checkpoint alone. InputError that names a missing or damaged file."""
    path = directory / ABOUT
    try:
        fields = json.loads(path.read_text())
        return About(**{**fields, "config": _tuples(fields["config"]), "history": tuple(fields["history"])})
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {directory}: {ABOUT} is missing") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"damaged checkpoint description {path}: {error}") from error


def read(directory: Path) -> Checkpoint:
    """A checkpoint in full. InputError that names a missing or damaged file."""
    about = read_about(directory)
    try:
        return Checkpoint(about, (directory / WEIGHTS).read_bytes(), str(directory))
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {directory}: {WEIGHTS} is missing") from error


def load(directory: Path) -> AVSegmenter:
    """The network of a checkpoint, as `Checkpoint.model`."""
    return read(directory).model()


def save_method_state(directory: Path, state: Mapping[str, Tensor]) -> None:
    """Writes what a method keeps of a network's parameters."""
    _write(directory, {METHOD_STATE: _encode(state)})


def read_method_state(directory: Path) -> dict[str, Tensor]:
    """What a method kept, on the CPU. InputError that names a missing or damaged file."""
    path = directory / METHOD_STATE
    try:
        return load_tensors(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no method state at {directory}: {METHOD_STATE} is missing") from error
    except SafetensorError as error:
        raise InputError(f"damaged method state {path}: {error}") from error


def _encode(state: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files in this order, each as a whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        os.replace(temporary, directory / name)


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows only lists; the configuration's sequences are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
