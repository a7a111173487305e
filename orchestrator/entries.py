"""The store on disk: sealed entries, their locks, who used them, and what became of damaged ones.

    networks/KEY/   states/KEY/             a folder of files; its manifest entry.json lists their sizes and sha256
    scores/KEY.json   counts/KEY.json       one file
    locks/KEY.lock                          held while an entry is computed, set aside or deleted; empty, never deleted
    partial/KEY/                            what a training that was cut off goes on from
    uses/KIND/NAME/                         an empty file per entry that the run of this name used
    damaged/                                entries set aside, as KIND-KEY-TIME

Manifest and file say what the entry is called, when it was made, what it cost, and their own sha256. They are written last, and
an entry gets its name by one rename, so that what has the name is whole. When an entry was last used is its file's mtime.

Locks are flock's. The kernel gives back those of a process that dies, whatever kills it, and no clock is asked. They hold among
the processes of a machine on any local file system, and between machines on NFSv4 (and v3 with its lock daemon), where the
server frees the locks of a machine that vanished after its lease, about 90 seconds. They hold on one machine only where a
file system is mounted with local locks: NFS with nolock or local_lock, Lustre with localflock, most mounts of object stores.
Machines that share such a store would compute the same outcome at once, and clear away each other's unfinished folders: give
each its own. A file system that has no locks at all, as Lustre without `-o flock`, is refused. shared.py has the store behind a
URI, where leases stand in for locks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from cavs_model.errors import FULL, InputError, OutageError
from cavs_model.untrusted import FaultError, shown, typed

FOLDER_KINDS = ("networks", "states")
FILE_KINDS = ("scores", "counts")
KINDS = (*FOLDER_KINDS, *FILE_KINDS)
MANIFEST = "entry.json"
LOCK_POLL_SECONDS = 0.2
KILLED_SECONDS = 2.0  # for which processes that were told to die may still hold their locks; `ray job stop` gives 3 in all
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}")  # of write_atomically

# Folders that were verified, each with its manifest and its files' sizes and times. A network is read many times in the life of
# a process and is large; what changes its files changes their times.
_verified: set[tuple[str, str, tuple[tuple[str, int, int], ...]]] = set()


class DamagedError(Exception):
    """An entry is not what was written."""


@dataclass(frozen=True)
class Entry:
    """What the folder tells of an entry without verifying it. `label` and `made` are empty where its description is damaged."""

    kind: str
    key: str
    size_bytes: int
    used: float  # seconds since the epoch, as `made`
    made: float | None
    label: str


@dataclass(frozen=True)
class Entries:
    """The entries under a root. Pickles.

    InputError where the root cannot be read, written or locked, OutageError where it is full.
    """

    root: Path

    @property
    def name(self) -> str:
        """The store as it is shown."""
        return str(self.root)

    def exists(self) -> bool:
        """Whether there is a store."""
        return self.root.is_dir()

    def telling(self, tell: Callable[[str], None]) -> Entries:
        """The same entries, with somebody to tell what went wrong and was got around."""
        return self

    def make(self) -> None:
        """Makes the folders."""
        for name in (*KINDS, "locks", "partial", "uses", "damaged"):
            try:
                (self.root / name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _refused(f"cannot write the store {self.root}", error) from error

    def announced(self, word: str) -> AbstractContextManager[None]:
        """Leaves a word where `find` looks for it, as long as the block lasts."""
        return nullcontext()

    def find(self, word: str) -> None:
        """InputError where this process cannot use what lies elsewhere than in `root`, or does not find the word there."""

    def path(self, kind: str, key: str) -> Path:
        """The entry's folder or file."""
        return self.root / kind / (key if kind in FOLDER_KINDS else f"{key}.json")

    def where(self, kind: str, key: str) -> str:
        """Where the entry lies, as it is shown."""
        return str(self.path(kind, key))

    def resume(self, key: str) -> Path:
        """The folder of what a training that was cut off goes on from."""
        return self.root / "partial" / key

    # Reading and writing.

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """The verified description of an entry, and the value in it; None where there is none. DamagedError."""
        path = self.path(kind, key)
        try:
            content = _content(self.file(kind, key))
        except PermissionError as error:
            raise InputError(f"cannot read the store entry {path}: {error.strerror}") from error
        except FileNotFoundError:
            if os.path.lexists(path):
                raise DamagedError(f"{MANIFEST} is missing") from None
            return None
        except OSError as error:
            raise DamagedError(str(error)) from error
        body = unsealed(content)
        if kind in FOLDER_KINDS:
            verify(path, body)
        else:
            check_value(kind, body)
        return body

    def check(self, kind: str, key: str) -> None:
        """DamagedError for an entry that is not what was written."""
        self.read(kind, key)

    def describe(self, kind: str, key: str) -> dict[str, Any] | None:
        """The description of an entry, whose files are not verified; None where there is none. DamagedError."""
        try:
            return unsealed(self.file(kind, key).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedError(str(error)) from error

    def write(self, kind: str, key: str, label: str, seconds: float, value: Any) -> None:
        """Writes an entry that is one file. `seconds` of worker time is what it took."""
        write_atomically(self.path(kind, key), sealed({**_facts(label, seconds), "value": value}))

    def new_folder(self, kind: str, key: str) -> Path:
        """A name for a folder to be kept under this key; what killed processes left of earlier ones is deleted."""
        for leftover in (self.root / kind).glob(f".{key}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return self.root / kind / f".{key}.{uuid.uuid4().hex[:8]}"

    def keep(self, kind: str, key: str, folder: Path, label: str, seconds: float) -> None:
        """Makes a written folder an entry."""
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path, sync=True)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_atomically(folder / MANIFEST, sealed({**_facts(label, seconds), "files": files}))
        os.replace(folder, self.path(kind, key))
        shutil.rmtree(self.resume(key), ignore_errors=True)

    def set_aside(self, kind: str, key: str) -> str:
        """Moves a damaged entry out of the way, for whoever wants to know what happened to it; where it lies then."""
        target = self.root / aside_name(kind, key)
        try:
            os.replace(self.path(kind, key), target)
        except OSError as error:
            raise _refused(f"cannot move the damaged store entry {self.path(kind, key)}", error) from error
        return str(target)

    def repair(self, kind: str, key: str) -> str:
        """As `set_aside`, for an entry that `check` found damaged."""
        return self.set_aside(kind, key)

    def use(self, kind: str, key: str, user: str) -> None:
        """Notes that the entry was used now, by `user` ("sweep/cmr"; "" for nobody of a name)."""
        with suppress(OSError):  # the time is for pruning alone: a store that one may only read is used all the same
            os.utime(self.file(kind, key))
        if user:
            mark = self.marks(user) / f"{kind}.{key}"
            with room_in(self.root):
                try:
                    if not mark.exists():
                        mark.parent.mkdir(parents=True, exist_ok=True)
                        mark.touch()
                except PermissionError as error:
                    raise InputError(f"cannot write the store {self.root}: {error.strerror}") from error

    # Keeping house.

    def scan(self) -> list[Entry]:
        """All entries, damaged ones too, by kind and key. Those that vanish meanwhile are left out."""
        found = []
        for kind in KINDS:
            for path in sorted((self.root / kind).glob("[!.]*")):
                key = path.name if kind in FOLDER_KINDS else path.name.removesuffix(".json")
                with suppress(FileNotFoundError):
                    body: dict[str, Any] = {}
                    used = path.stat().st_mtime
                    with suppress(DamagedError, NotADirectoryError, IsADirectoryError, PermissionError, FileNotFoundError):
                        file = self.file(kind, key)
                        used = file.stat().st_mtime
                        body = unsealed(file.read_bytes())
                    found.append(Entry(kind, key, size_of(path), used, body.get("made"), body.get("label", "")))
        return found

    def last_use(self, kind: str, key: str) -> float | None:
        """When an entry was used last, in seconds since the epoch; None where what seals it is gone."""
        try:
            return self.file(kind, key).stat().st_mtime
        except OSError:
            return None

    @contextmanager
    def tidied(self) -> Iterator[None]:
        """For a verb that writes here: what killed processes left half-written is deleted before the block and after it.

        After an error, also an interrupt, it waits a little for processes of a cluster that ended with the block.
        """
        self.clear_half_written()
        patience = KILLED_SECONDS
        try:
            yield
            patience = 0.0
        finally:
            self.clear_half_written(patience)

    def clear_half_written(self, patience_seconds: float = 0.0) -> None:
        """Deletes what killed processes left half-written in this folder, and leaves alone what somebody is writing now.

        Those who write are waited for as long as `patience_seconds`: they may be dying.
        """
        deadline = time.monotonic() + patience_seconds
        while half_written := self._half_written():
            for path, key in half_written:
                # Nothing is lost where it stays: this may be a store that one may only read, or a full disk.
                with suppress(InputError, OSError), self.locked_here_now(key) as held:
                    if held:
                        remove(path)
            if time.monotonic() >= deadline:
                return
            time.sleep(LOCK_POLL_SECONDS)

    def _half_written(self) -> list[tuple[Path, str]]:
        """Paths and the keys whose locks their writers hold."""
        return [(path, path.name[1:].split(".")[0]) for kind in KINDS for path in (self.root / kind).glob(".*")]

    def leftovers(self) -> list[tuple[str, str]]:
        """What belongs to no entry, by name and the key whose lock guards it: unfinished, to be resumed, damaged."""
        found = self._half_written()
        found += [(path, path.name) for path in (self.root / "partial").glob("*")]
        found += [(path, path.name.split("-")[1]) for path in (self.root / "damaged").glob("*-*-*")]
        found += [(path, path.name.split(".")[1]) for path in (self.root / "fetched").glob("*.*.*")]
        return sorted((path.relative_to(self.root).as_posix(), key) for path, key in found)

    def measure(self, leftover: str) -> tuple[int, float] | None:
        """Bytes of a leftover and when it last changed, in seconds since the epoch; None where it is gone."""
        path = self.root / leftover
        with suppress(FileNotFoundError):
            return size_of(path), max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
        return None

    def discard(self, leftover: str) -> None:
        """Deletes a leftover. Its lock must be held."""
        remove(self.root / leftover)

    def end_dead_leases(self, on_wait: Callable[[str], None]) -> None:
        """Frees what dead processes hold, where no kernel does that."""

    def delete(self, kind: str, key: str) -> None:
        """Deletes an entry and every note of its use. Its lock must be held."""
        path = self.path(kind, key)
        going = path.with_name(f".{key}.{uuid.uuid4().hex[:8]}")  # half of a folder must not have an entry's name
        with suppress(FileNotFoundError):
            os.replace(path, going)
            remove(going)
        for mark in (self.root / "uses").glob(f"*/*/{kind}.{key}"):
            mark.unlink(missing_ok=True)

    def users(self) -> dict[str, set[tuple[str, str]]]:
        """User -> (kind, key) of the entries it used."""
        return users_of(path.relative_to(self.root).as_posix() for path in sorted((self.root / "uses").glob("*/*/*.*")))

    def forget(self, user: str, kind: str, key: str) -> None:
        """Deletes the note that `user` used an entry."""
        (self.marks(user) / f"{kind}.{key}").unlink(missing_ok=True)
        with suppress(OSError):  # it has others
            self.marks(user).rmdir()

    # Locks.

    def locked(self, key: str, on_wait: Callable[[], None]) -> AbstractContextManager[None]:
        """Holds the lock of a key, so that who needs the same waits instead of computing it again; waits for whoever has it."""
        return self.locked_here(key, on_wait)

    @contextmanager
    def locked_here(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """As `locked`, for what concerns only those who share this folder."""
        with self._lock_file(key) as descriptor:
            if not self._taken(descriptor):
                on_wait()
                while not self._taken(descriptor):
                    time.sleep(LOCK_POLL_SECONDS)
            yield

    def locked_now(self, key: str) -> AbstractContextManager[bool]:
        """Holds the lock of a key if nobody else does: whether it is held."""
        return self.locked_here_now(key)

    @contextmanager
    def locked_here_now(self, key: str) -> Iterator[bool]:
        """As `locked_now`, for what concerns only those who share this folder."""
        with self._lock_file(key) as descriptor:
            yield self._taken(descriptor)

    @contextmanager
    def _lock_file(self, key: str) -> Iterator[int]:
        with room_in(self.root):
            try:
                descriptor = os.open(self.root / "locks" / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            except PermissionError as error:
                raise InputError(f"cannot write the store {self.root}: {error.strerror}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _taken(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise InputError(f"the store {self.root} lies on a file system without locks; put it on another") from error
            raise
        return True

    def file(self, kind: str, key: str) -> Path:
        """The file that seals the entry."""
        path = self.path(kind, key)
        return path / MANIFEST if kind in FOLDER_KINDS else path

    def marks(self, user: str) -> Path:
        """The folder of the notes of what `user` used."""
        kind, _, name = user.partition("/")
        quoted = quote(name, safe=" ")
        return self.root / "uses" / kind / (f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted)


def warn(text: str) -> None:
    """Tells of trouble on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def aside_name(kind: str, key: str) -> str:
    """A new name for a damaged entry."""
    return f"damaged/{kind}-{key}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S.%fZ')}"


def users_of(marks: Iterable[str]) -> dict[str, set[tuple[str, str]]]:
    """User -> (kind, key) from the names of marks, "uses/sweep/cmr/networks.KEY"."""
    found: dict[str, set[tuple[str, str]]] = {}
    for mark in marks:
        _, user, name, used = mark.split("/", 3)
        kind, _, key = used.partition(".")
        if kind in KINDS:  # and not what a killed process left
            found.setdefault(f"{user}/{unquote(name)}", set()).add((kind, key))
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """The whole file or none of it, whatever happens meanwhile. OutageError where the disk is full."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with room_in(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path) -> None:
    """Deletes what processes that were killed within `write_atomically` left in a folder. For its only writer.

    But for the report's, which a process of its own may be writing.
    """
    for path in folder.glob(".*"):
        if _UNFINISHED.fullmatch(path.name) and not path.name.startswith(".report.html."):
            path.unlink(missing_ok=True)


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Makes of an error that a full disk caused an OutageError that names the folder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            # A worker's error comes from Ray as text, the number lost.
            if (isinstance(cause, OSError) and cause.errno in FULL) or os.strerror(errno.ENOSPC) in str(cause):
                raise OutageError(
                    f"no space left while writing to {folder}; free some, or delete what is no longer needed by "
                    "`python -m orchestrator.store prune`"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _refused(text: str, error: OSError) -> InputError:
    """The error for what the system refused: of a kind that may pass where there was no room."""
    kind = OutageError if error.errno in FULL else InputError
    return kind(f"{text}: {error.strerror}")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files under a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file())


def remove(path: Path) -> None:
    """Deletes a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _facts(label: str, seconds: float) -> dict[str, Any]:
    return {"label": label, "made": time.time(), "seconds": float(seconds)}


def sealed(body: Mapping[str, Any]) -> bytes:
    """The file that holds a description and its sha256."""
    return json.dumps({"sha256": digest_of(body), **body}).encode()


def _content(path: Path) -> bytes:
    """A file's content. DamagedError for what is no file: a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path.name} is not a file")
    return path.read_bytes()


def unsealed(content: bytes) -> dict[str, Any]:
    """What was sealed. DamagedError where it is something else, in any way."""
    try:
        body = dict(json.loads(content))
        said = body.pop("sha256")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedError(f"not an entry: {type(error).__name__}: {error}") from error
    if said != digest_of(body):
        raise DamagedError("its checksum differs")
    try:  # whoever can write here can seal it too
        for name, hint in (("label", str), ("made", float), ("seconds", float)):
            typed(body.get(name), hint, name)
    except FaultError as fault:
        raise DamagedError(str(fault)) from None
    return body


def check_value(kind: str, body: Mapping[str, Any]) -> None:
    """DamagedError unless the value of an entry that is one file has the form that its kind has."""
    try:
        value = typed(body.get("value"), Mapping[str, Any], "value")
        if kind == "scores":
            ids = typed(value.get("sample_ids"), tuple[str, ...], "sample_ids")
            for name, column in typed(value.get("columns"), Mapping[str, tuple[float, ...]], "columns").items():
                if len(column) != len(ids):
                    raise FaultError(f"column {shown(name)} has {len(column)} rows, expected {len(ids)}")
        elif np.array(value.get("counts"), dtype=np.int64).ndim == 0:
            raise FaultError("counts must be a list")
    except (FaultError, ValueError, TypeError, OverflowError) as error:
        raise DamagedError(f"{kind}: {shown(str(error))}") from None


def digest_of(body: Mapping[str, Any]) -> str:
    """The sha256 of a description."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def files_of(body: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The files that a manifest lists, by names within the entry. DamagedError for another form, and for other names."""
    try:
        files: Mapping[str, Mapping[str, Any]] = typed(body.get("files"), Mapping[str, Mapping[str, Any]], "files")
        for name, facts in files.items():
            typed(facts.get("bytes"), int, f"files.{name}.bytes")
    except FaultError as fault:
        raise DamagedError(f"{MANIFEST}: {fault}") from None
    for name in files:
        if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedError(f"{name!r} lies outside of it")
    return files


def verify(folder: Path, body: Mapping[str, Any]) -> None:
    """DamagedError unless the files of a manifest are what was written; hashed once per process as long as none changes."""
    seen, files = [], files_of(body)
    for name, facts in files.items():
        if folder.is_symlink() or os.path.realpath(folder / name) != os.path.join(os.path.realpath(folder), name):
            raise DamagedError(f"{name!r} is reached by a link")
        try:
            stat = (folder / name).stat()
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from error
        if stat.st_size != facts["bytes"]:
            raise DamagedError(f"{name} has {stat.st_size} bytes, not {facts['bytes']}")
        seen.append((name, stat.st_size, stat.st_mtime_ns))
    state = (str(folder), digest_of(body), tuple(seen))
    if state in _verified:
        return
    for name, facts in files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise DamagedError(f"{name}: {error.strerror}") from error
        if found != facts.get("sha256"):
            raise DamagedError(f"the checksum of {name} differs")
    _verified.add(state)


def _sha256(path: Path, sync: bool = False) -> str:
    """A file's digest; with `sync` the file is on the disk before its digest is."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
