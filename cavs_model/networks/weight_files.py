"""Weight files of other projects: state_dicts read as tensors only, and copied where every name and shape fits."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from cavs_model.errors import InputError


def read_bytes(file: Path, field: str, choices: str) -> bytes:
    """A file's content. InputError naming the configuration's `field` and its valid `choices` where there is no such file."""
    if not file.is_file():
        raise InputError(f"{field}: no file {str(file)!r}; choose {choices}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{field}: cannot read {str(file)!r} ({error.strerror or error})") from error


def decode(content: bytes, file: Path, field: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a state_dict saved by torch. InputError for anything else."""
    try:
        stored: object = (
            load_safetensors(content)
            if file.suffix == ".safetensors"
            else torch.load(io.BytesIO(content), "cpu", weights_only=True)
        )
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{field}: {str(file)!r} is not a state_dict of tensors ({reason})") from None
    if not isinstance(stored, dict) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise InputError(f"{field}: {str(file)!r} is not a state_dict of tensors")
    return stored


def read_weights(file: Path, field: str, choices: str) -> dict[str, Tensor]:
    """`decode` of `read_bytes`."""
    return decode(read_bytes(file, field, choices), file, field)


def copy_weights(module: nn.Module, stored: Mapping[str, Tensor], source: str, kind: str) -> None:
    """Copies tensors into a module of that `kind`. InputError that starts with `source` unless every name and shape fits."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in stored and not name.endswith("num_batches_tracked")]
    problems += [f"{name} is not part of the encoder" for name in stored if name not in own]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in stored and stored[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit {kind}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(dict(stored), strict=False)
