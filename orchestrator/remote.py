"""Files behind a URI: object stores and other file systems that pyarrow or an installed fsspec package speaks to.

What is written under a name appears whole or not at all: object stores publish an object when its stream is closed, elsewhere a
temporary file is renamed. Whatever goes wrong on the other side is an UnreachableError, and a URI by which nothing can ever be
reached an InputError, both without credentials in their text.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow
from pyarrow import fs

from cavs_model.errors import FULL, InputError, OutageError
from orchestrator.redaction import redacted

OBJECT_STORES = ("s3", "gcs", "abfs")  # by pyarrow's type names
# What is raised for a URI that cannot be read, or whose package is not installed. Anything else may be the network's: of a
# bucket without a region pyarrow asks AWS for it.
NEVER = (ValueError, TypeError, ImportError, NotImplementedError)


class UnreachableError(OutageError):
    """What lies behind the URI cannot be had now."""


@dataclass(frozen=True)
class FileFacts:
    """What the other side says of a file. `changed` is by its clock, in seconds since the epoch; None where it does not say."""

    size_bytes: int
    changed: float | None


@dataclass(frozen=True)
class Remote:
    """The files under a URI such as s3://bucket/prefix, by names relative to it. Pickles.

    UnreachableError, which a disk that is full on the other side is too; InputError for a URI by which nothing can be reached.
    """

    uri: str = field(repr=False)

    @property
    def shown(self) -> str:
        """The URI without credentials."""
        return _shown(self.uri)

    def exists(self) -> bool:
        """Whether anything is there."""
        system, base = self._there()
        with self._reached("read", ""):
            return bool(system.get_file_info(base).type != fs.FileType.NotFound)

    def read(self, name: str) -> bytes | None:
        """A file's content, None where there is none."""
        system, base = self._there()
        with self._reached("read", name):
            try:
                with system.open_input_stream(f"{base}/{name}", compression=None) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes or replaces a file."""
        with self._written(name) as stream:
            stream.write(content)

    def upload(self, path: Path, name: str) -> None:
        """Writes or replaces a file by one of this machine's."""
        with self._written(name) as stream, open(path, "rb") as source:
            shutil.copyfileobj(source, stream, 1 << 22)

    def download(self, name: str, path: Path) -> bool:
        """Copies a file to this machine; whether there is one. OSError where this machine's disk is full."""
        system, base = self._there()
        with self._reached("read", name, but=FULL):
            try:
                stream = system.open_input_stream(f"{base}/{name}", compression=None)
            except FileNotFoundError:
                return False
            with stream, open(path, "wb") as target:
                shutil.copyfileobj(stream, target, 1 << 22)
        return True

    def files(self, name: str) -> dict[str, FileFacts]:
        """All files under a folder, by name; none where there is no such folder."""
        system, base = self._there()
        with self._reached("list", name):
            found = system.get_file_info(fs.FileSelector(f"{base}/{name}", recursive=True, allow_not_found=True))
        start = len(base) + 1
        return {info.path[start:]: _facts(info) for info in sorted(found, key=lambda info: str(info.path)) if info.is_file}

    def facts(self, name: str) -> FileFacts | None:
        """What the other side says of a file, None where there is none."""
        system, base = self._there()
        with self._reached("read", name):
            info = system.get_file_info(f"{base}/{name}")
        return _facts(info) if info.is_file else None

    def move(self, name: str, target: str) -> None:
        """Renames a file."""
        system, base = self._there()
        with self._reached("move", name):
            self._make_folder(f"{base}/{target}")
            system.move(f"{base}/{name}", f"{base}/{target}")

    def remove(self, name: str) -> None:
        """Deletes a file, or a folder with all that is in it, if it is there."""
        system, base = self._there()
        with self._reached("delete", name):
            kind = system.get_file_info(f"{base}/{name}").type
            try:
                if kind == fs.FileType.Directory:
                    system.delete_dir(f"{base}/{name}")
                elif kind != fs.FileType.NotFound:
                    system.delete_file(f"{base}/{name}")
            except FileNotFoundError:  # another process was faster
                return

    @contextmanager
    def _written(self, name: str) -> Iterator[Any]:
        system, base = self._there()
        path = temporary = f"{base}/{name}"
        with self._reached("write", name):
            self._make_folder(path)
            if system.type_name not in OBJECT_STORES:
                temporary = str(PurePosixPath(path).with_name(f".{PurePosixPath(path).name}.{uuid.uuid4().hex[:8]}"))
            try:
                with system.open_output_stream(temporary, compression=None) as stream:
                    yield stream
                if temporary != path:
                    system.move(temporary, path)
            except BaseException:
                if temporary != path:  # a full disk would get one more at every try
                    with suppress(Exception):
                        system.delete_file(temporary)
                raise

    def _make_folder(self, path: str) -> None:
        """Makes the folder a file is to lie in, where there are such things."""
        system, _ = self._there()
        if system.type_name not in OBJECT_STORES:
            system.create_dir(str(PurePosixPath(path).parent), recursive=True)

    def _there(self) -> tuple[Any, str]:
        return _file_system(self.uri)

    @contextmanager
    def _reached(self, doing: str, name: str, but: Sequence[int] = ()) -> Iterator[None]:
        """Makes an UnreachableError of any error, `but` of a system's with one of these numbers."""
        try:
            yield
        except Exception as error:  # every library behind fsspec has errors of its own
            if isinstance(error, OSError) and error.errno in but:
                raise
            # The cause is left out: its text may hold what was stripped here.
            where = f"{self.shown}/{name}".rstrip("/")
            raise UnreachableError(f"cannot {doing} {where}: {_reason(error, self.uri)}") from None


def _facts(info: Any) -> FileFacts:
    return FileFacts(info.size or 0, info.mtime.timestamp() if info.mtime else None)


def _shown(uri: str) -> str:
    """A URI without credentials and options."""
    return redacted(uri).partition("?")[0].rstrip("/")


@lru_cache(maxsize=8)
def _file_system(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it, without a slash at its end. InputError, UnreachableError."""
    try:
        try:
            system, path = fs.FileSystem.from_uri(uri)
        except pyarrow.ArrowInvalid as error:
            if "Unrecognized filesystem type" not in str(error):
                raise
            found, path = fsspec.core.url_to_fs(uri)
            system = fs.PyFileSystem(fs.FSSpecHandler(found))
    except Exception as error:  # as above
        known = "file, s3, gs, abfs, hdfs, or one of an installed fsspec package such as memory"
        kind = InputError if isinstance(error, NEVER) else UnreachableError
        raise kind(
            f"cannot open the store {_shown(uri)}: {_reason(error, uri)}; a store is a folder or a URI of one of: {known}"
        ) from None
    if not path.strip("/"):
        raise InputError(f"the store {_shown(uri)} names no bucket or folder: write scheme://bucket/prefix")
    return system, path.rstrip("/")


def _reason(error: Exception, uri: str) -> str:
    """An error in a line, without the URI's credentials."""
    secrets = re.match(r"\w+://(?:([^/]*?):(.*)@)?[^?]*(?:\?(.*))?", uri)
    text = redacted(" ".join(str(error).split()))
    for secret in secrets.groups() if secrets else ():
        for each in filter(None, (secret, unquote(secret or ""))):
            text = text.replace(each, "***")
    return text[:500] or type(error).__name__
