"""Files that somebody else may have written: read as data only, within bounds, and inside the folder they belong to.

Nothing here waits (a pipe, a device) or allocates more than the caller allows, whatever a file claims of itself. What is wrong
is a FaultError without the file's name, which whoever asked for it knows and adds.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import stat
import types
import typing
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

LARGEST_JSON_BYTES = 2**24
LARGEST_PICTURE_BYTES = 2**26
LARGEST_SIDE_PX = 4096
MOST_SCANS = 200  # of a progressive JPEG: each one may pass over the whole picture for a few bytes


class FaultError(Exception):
    """What is wrong with a file, without its name."""


def shown(text: str) -> str:
    """Text of unknown origin, quoted, on one line and of bounded length."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


def reason(error: Exception) -> str:
    """Why something failed, on one line and without the path, which whoever reports it knows."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is not the expected one"
    text = getattr(error, "error_string", None)  # libsndfile's
    text = text or (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def inside(root: str, relative: str) -> str:
    """The real path of something below the root, which may itself be a link. FaultError where it leads elsewhere."""
    if "\0" in relative:
        raise FaultError("is no path: it has a null character")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, relative))
    if os.path.commonpath([base, path]) != base:
        raise FaultError("leads out of the root, by a link" if _stays_below(relative) else "leads out of the root")
    return path


def _stays_below(relative: str) -> bool:
    return not os.path.isabs(relative) and ".." not in relative.split("/")


def file_status(path: str) -> os.stat_result:
    """A file's status; a pipe or a device would never end."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise FaultError("is missing") from None
    except OSError as error:
        raise FaultError(f"cannot be read: {reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise FaultError("is not a file")
    return status


def read_bounded(path: str | Path, most: int) -> bytes:
    """A file's content. FaultError where it cannot be read or has more than `most` bytes."""
    size = file_status(str(path)).st_size
    if size > most:
        raise FaultError(f"is larger than {most} bytes")
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise FaultError(f"cannot be read: {reason(error)}") from None


def parsed_json(content: bytes) -> Any:
    """What JSON text says. FaultError for anything else, and for text nested too deeply."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FaultError(f"cannot be read as JSON: {reason(error)}") from None


def read_json(path: str | Path, most: int = LARGEST_JSON_BYTES) -> Any:
    """`parsed_json` of `read_bounded`."""
    return parsed_json(read_bounded(path, most))


def picture(path: str, formats: tuple[str, ...], mode: str, ratio: float = math.inf) -> Image.Image:
    """A decoded image of one of these formats of Pillow's. Its size is looked at before its pixels are.

    FaultError where it cannot be decoded, has a side of more than LARGEST_SIDE_PX or sides of more than `ratio` to 1.
    """
    content = read_bounded(path, LARGEST_PICTURE_BYTES)
    if content.count(b"\xff\xda") > MOST_SCANS and content.startswith(b"\xff\xd8"):
        raise FaultError(f"has more than {MOST_SCANS} scans")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=formats) as image:
                width, height = image.size
                if max(image.size) > min(LARGEST_SIDE_PX, ratio * min(image.size)):
                    limits = f"at most {LARGEST_SIDE_PX} px a side" + ("" if math.isinf(ratio) else f" and {ratio:g} to 1")
                    raise FaultError(f"has {width} x {height} px, allowed are {limits}")
                return image.convert(mode)
    except FaultError:
        raise
    except Exception as error:  # whatever a damaged file makes of a decoder
        raise FaultError(f"cannot be decoded: {reason(error)}") from None


def typed_fields(kind: type, fields: object, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them, each of the declared type, with tuples for lists. FaultError naming a field.

    Fields of `given` are not to be in `fields` and are taken as they are. Optional ones may be absent.
    """
    if not isinstance(fields, dict):
        raise FaultError(f"holds no fields but {_kind_of(fields)}")
    hints, given = _hints(kind), given or {}
    known = {item.name: item for item in dataclasses.fields(kind) if item.init and item.name not in given}
    for name in fields:
        if name not in known:
            raise FaultError(f"has an unknown field {shown(str(name))}; the fields are: {', '.join(known)}")
    found = dict(given)
    for name, item in known.items():
        if name in fields:
            found[name] = typed(fields[name], hints[name], name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise FaultError(f"lacks the field {name}")
    return found


def typed(value: Any, hint: Any, name: str) -> Any:
    """A value as JSON has it, as a type hint wants it. FaultError that calls it by `name`.

    Known are str, bool, int, float (a whole number will do), Any, Literal, unions, tuple[X, ...], list and mappings by text.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Literal:
        if not isinstance(value, (str, int)) or value not in arguments:
            raise FaultError(f"{name} must be one of {', '.join(map(str, arguments))}, not {_brief(value)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return typed(value, next(argument for argument in arguments if argument is not type(None)), name)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise FaultError(f"{name} must be a list, not {_brief(value)}")
        return origin(typed(each, arguments[0], f"{name}[{place}]") for place, each in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise FaultError(f"{name} must map names to values, not {_brief(value)}")
        return {key: typed(each, arguments[1], f"{name}.{shown(key)[1:-1]}") for key, each in value.items()}
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if hint is int and type(value) is int and abs(value) >= 2**63:
        raise FaultError(f"{name} must be of less than 64 bits")
    if type(value) is not hint:
        words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise FaultError(f"{name} must be {words.get(hint, str(hint))}, not {_brief(value)}")
    return value


@lru_cache(maxsize=32)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _kind_of(value: object) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), "a value")


def _brief(value: object) -> str:
    return shown(str(value)) if isinstance(value, (str, int, float, type(None))) else _kind_of(value)
