"""A store behind a URI: entries that clusters without a common disk share, each through a working copy of its own.

    networks/KEY/entry.json   states/KEY/entry.json     the manifest; its files lie beside it in a folder named by its sha256
    scores/KEY.json   counts/KEY.json                   one file
    locks/KEY.lease                                     held while an entry is computed, set aside or deleted (lease.py)
    uses/KIND/NAME/KIND.KEY                             an empty file per entry that the run of this name used
    damaged/                                            entries set aside, as KIND-KEY-TIME

The working copy is a store as entries.py has it. What it lacks is fetched, verified and only then given its name; what is made
is sealed in it first, then uploaded, the manifest last. So an entry is whole wherever it has its name, and two that upload the
same entry at once never mix their files. An entry that the working copy alone has is uploaded when it is used next.

While the other side cannot be reached, or is full, the work goes on with the working copy and says so: at worst something is
computed twice. Only a store that cannot be written at the start is an error. Whoever makes it finds out, and the processes that
it is handed to, as those of a sweep's trials, do not ask again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cavs_model.errors import InputError
from orchestrator import lease
from orchestrator.entries import (
    FOLDER_KINDS,
    KINDS,
    MANIFEST,
    DamagedError,
    Entries,
    Entry,
    aside_name,
    check_value,
    digest_of,
    files_of,
    room_in,
    unsealed,
    users_of,
    verify,
    warn,
    write_atomically,
)
from orchestrator.lease import Lease
from orchestrator.remote import FileFacts, Remote, UnreachableError

MARK_SECONDS = 3600.0  # a process that uses an entry over and over notes it this often
REQUESTS_AT_ONCE = 16

# What this process knows of the other side: entries that are there, damaged ones that could not be moved and count as none, and
# when uses were noted.
_uploaded: set[tuple[str, str, str]] = set()
_passed_over: set[tuple[str, str, str]] = set()
_marked: dict[tuple[str, str], float] = {}


@dataclass(frozen=True)
class SharedEntries(Entries):
    """The entries behind a URI, with their working copy under `root`. Pickles.

    What a stream needs goes on without the other side, telling so; keeping house raises UnreachableError.
    """

    uri: str = field(repr=False)
    tell: Callable[[str], None] = warn
    _made: set[str] = field(default_factory=set, repr=False, compare=False)  # URIs that were written to; goes where this goes

    @property
    def remote(self) -> Remote:
        return Remote(self.uri)

    @property
    def name(self) -> str:
        return self.remote.shown

    def exists(self) -> bool:
        return self.remote.exists()

    def telling(self, tell: Callable[[str], None]) -> Entries:
        return replace(self, tell=tell)

    def make(self) -> None:
        """Makes the working copy's folders. UnreachableError where the other side cannot be written.

        InputError for a URI that can be no store.
        """
        super().make()
        (self.root / "fetched").mkdir(exist_ok=True)
        if self.uri in self._made:
            return
        with self.announced(uuid.uuid4().hex):
            pass  # written, and deleted again
        self._made.add(self.uri)

    @contextmanager
    def announced(self, word: str) -> Iterator[None]:
        with _advised():
            self.remote.write(_probe(word), word.encode())
        try:
            yield
        finally:
            with _advised():
                self.remote.remove(_probe(word))

    def find(self, word: str) -> None:
        with _advised():
            if self.remote.read(_probe(word)) != word.encode():
                raise InputError(
                    f"{self.name} does not hold what the driver wrote a moment ago: the same URI must lead every node to the "
                    "same store, and a store must show a write at once"
                )
            mine = Lease(self.remote, f".probe-{uuid.uuid4().hex}")
            try:
                if not mine.try_now():
                    raise InputError(f"{self.name} does not hold a lease: a store must show a write at once")
            finally:
                mine.release()

    def where(self, kind: str, key: str) -> str:
        return f"{self.name}/{_name(kind, key)}"

    # Reading and writing.

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        body = super().read(kind, key)
        with self._spared():
            if body is not None:
                self._publish(kind, key)
            elif (self.uri, kind, key) not in _passed_over:
                return self._fetched(kind, key)
        return body

    def check(self, kind: str, key: str) -> None:
        with TemporaryDirectory(dir=self.root / "fetched", prefix=f"{kind}.{key}.") as folder, room_in(self.root):
            self._download(kind, key, Path(folder))

    def write(self, kind: str, key: str, label: str, seconds: float, value: Any) -> None:
        super().write(kind, key, label, seconds, value)
        with self._spared():
            self._upload(kind, key)

    def keep(self, kind: str, key: str, folder: Path, label: str, seconds: float) -> None:
        super().keep(kind, key, folder, label, seconds)
        with self._spared():
            self._upload(kind, key)

    def set_aside(self, kind: str, key: str) -> str:
        """Moves a damaged entry out of the way: the working copy's, else the other side's; where it lies then.

        One that cannot be moved now is passed over by this process until it puts another in its place.
        """
        if os.path.lexists(self.path(kind, key)):
            return super().set_aside(kind, key)
        aside = self.where(kind, key)
        _passed_over.add((self.uri, kind, key))
        _uploaded.discard((self.uri, kind, key))
        with self._spared():
            aside = self.repair(kind, key)
            _passed_over.discard((self.uri, kind, key))
        return aside

    def repair(self, kind: str, key: str) -> str:
        name, aside = _name(kind, key), aside_name(kind, key)
        seal = _seal(kind, key)
        self.remote.move(seal, f"{aside}/{MANIFEST}" if kind in FOLDER_KINDS else aside)  # first: now it is no entry
        for file in self.remote.files(name) if kind in FOLDER_KINDS else ():
            self.remote.move(file, aside + file.removeprefix(name))
        self.remote.remove(name)
        _uploaded.discard((self.uri, kind, key))
        return f"{self.name}/{aside}"

    def use(self, kind: str, key: str, user: str) -> None:
        super().use(kind, key, user)
        mark = self._mark(user, kind, key)
        if user and time.monotonic() - _marked.get((self.uri, mark), -MARK_SECONDS) >= MARK_SECONDS:
            with self._spared():
                self.remote.write(mark, b"")
                _marked[(self.uri, mark)] = time.monotonic()

    # Keeping house: the other side's.

    def scan(self) -> list[Entry]:
        marked: dict[str, float] = {}
        for mark, facts in self.remote.files("uses").items():
            used = mark.rsplit("/", 1)[-1]
            marked[used] = max(marked.get(used, 0.0), facts.changed or 0.0)
        found: dict[tuple[str, str], dict[str, FileFacts]] = {}
        for kind in KINDS:
            for name, facts in self.remote.files(kind).items():
                _, first, *rest = name.split("/")
                if not first.startswith(".") and bool(rest) == (kind in FOLDER_KINDS):
                    found.setdefault((kind, first if rest else first.removesuffix(".json")), {})[name] = facts
        whole = {each: files for each, files in found.items() if _seal(*each) in files}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="scan") as pool:
            seals = pool.map(lambda each: self.remote.read(_seal(*each)), whole)
        entries = []
        for (kind, key), seal in zip(whole, seals, strict=True):
            body: dict[str, Any] = {}
            with suppress(DamagedError):
                body = unsealed(seal or b"")
            facts = whole[kind, key][_seal(kind, key)]
            used_at = max(facts.changed or body.get("made", time.time()), marked.get(f"{kind}.{key}", 0.0))
            size = sum(file.size_bytes for file in whole[kind, key].values())
            entries.append(Entry(kind, key, size, used_at, body.get("made"), body.get("label", "")))
        return entries

    def last_use(self, kind: str, key: str) -> float | None:
        if (seal := self.remote.facts(_seal(kind, key))) is None:
            return None
        marks = [facts for name, facts in self.remote.files("uses").items() if name.endswith(f"/{kind}.{key}")]
        return max((facts.changed for facts in (seal, *marks) if facts.changed is not None), default=None)

    def leftovers(self) -> list[tuple[str, str]]:
        found = set()
        for kind in (*KINDS, "locks"):
            names = self.remote.files(kind)
            for name in names:
                first = name.split("/")[1]
                if first.startswith("."):  # half written
                    found.add((f"{kind}/{first}", first[1:].split(".")[0]))
                elif kind in FOLDER_KINDS and _seal(kind, first) not in names:
                    found.add((f"{kind}/{first}", first))
        for name in self.remote.files("damaged"):
            first = name.split("/")[1]
            if first.count("-") >= 2:
                found.add((f"damaged/{first}", first.split("-")[1]))
        return sorted(found)

    def measure(self, leftover: str) -> tuple[int, float] | None:
        folder, _, _ = leftover.rpartition("/")
        files = {
            name: facts
            for name, facts in self.remote.files(folder).items()
            if name == leftover or name.startswith(f"{leftover}/")
        }
        if not files:
            return None
        changed = max(time.time() if facts.changed is None else facts.changed for facts in files.values())
        return sum(facts.size_bytes for facts in files.values()), changed

    def discard(self, leftover: str) -> None:
        self.remote.remove(leftover)

    def delete(self, kind: str, key: str) -> None:
        super().delete(kind, key)
        self.remote.remove(_seal(kind, key))  # first: now it is no entry
        if kind in FOLDER_KINDS:
            self.remote.remove(_name(kind, key))
        for mark in self.remote.files("uses"):
            if mark.endswith(f"/{kind}.{key}"):
                self.remote.remove(mark)
        _uploaded.discard((self.uri, kind, key))

    def users(self) -> dict[str, set[tuple[str, str]]]:
        return users_of(self.remote.files("uses"))

    def forget(self, user: str, kind: str, key: str) -> None:
        super().forget(user, kind, key)
        self.remote.remove(self._mark(user, kind, key))

    def end_dead_leases(self, on_wait: Callable[[str], None]) -> None:
        lease.end_dead(self.remote, lambda count: on_wait(f"watching {count} leases for {lease.LEASE_SECONDS:g} seconds"))

    # Locks: the working copy's, for those who share it, then the lease, so that one of each working copy asks for it.

    @contextmanager
    def locked(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        with self.locked_here(key, on_wait), self._leased(key) as mine:
            with self._spared():
                mine.acquire(on_wait)
            yield

    @contextmanager
    def locked_now(self, key: str) -> Iterator[bool]:
        with self.locked_here_now(key) as held, self._leased(key) as mine:
            yield held and mine.try_now()

    @contextmanager
    def _leased(self, key: str) -> Iterator[Lease]:
        """A lease that is released at the end, whatever happens."""
        mine = Lease(self.remote, key, self._identity())
        try:
            yield mine
        finally:
            with self._spared():
                mine.release()

    def _identity(self) -> str:
        """A word for this working copy, as seen from this machine."""
        stat = self.root.stat()
        known = (socket.gethostname(), str(self.root.resolve()), stat.st_dev, stat.st_ino)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    # The other side.

    def _fetched(self, kind: str, key: str) -> dict[str, Any] | None:
        """Copies an entry to the working copy: its description, None where there is none. DamagedError."""
        with TemporaryDirectory(dir=self.root / "fetched", prefix=f"{kind}.{key}.") as made, room_in(self.root):
            folder = Path(made) / key
            folder.mkdir()
            body = self._download(kind, key, folder)
            if body is None:
                return None
            try:
                os.replace(folder if kind in FOLDER_KINDS else folder / MANIFEST, self.path(kind, key))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was faster
                    raise
            _uploaded.add((self.uri, kind, key))
            return body

    def _download(self, kind: str, key: str, folder: Path) -> dict[str, Any] | None:
        """Copies an entry's files and its seal, as MANIFEST, into an empty folder, and verifies them. DamagedError."""
        seal = self.remote.read(_seal(kind, key))
        if seal is None:
            return None
        try:
            body = unsealed(seal)
            if kind in FOLDER_KINDS:
                beside = _beside(kind, key, body)
                for name in files_of(body):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not self.remote.download(f"{beside}/{name}", target):
                        raise DamagedError(f"{name} is missing")
                verify(folder, body)
            else:
                check_value(kind, body)
        except DamagedError as error:
            raise DamagedError(f"in {self.where(kind, key)}: {error}") from error
        write_atomically(folder / MANIFEST, seal)
        return body

    def _upload(self, kind: str, key: str) -> None:
        path, seal = self.path(kind, key), self.file(kind, key).read_bytes()
        if kind in FOLDER_KINDS:
            body = unsealed(seal)
            for name in files_of(body):
                self.remote.upload(path / name, f"{_beside(kind, key, body)}/{name}")
        self.remote.write(_seal(kind, key), seal)
        _uploaded.add((self.uri, kind, key))
        _passed_over.discard((self.uri, kind, key))

    def _publish(self, kind: str, key: str) -> None:
        """Uploads an entry that the working copy alone has, unless somebody is at it now."""
        if (self.uri, kind, key) in _uploaded:
            return
        with self.locked_here_now(key) as held:
            if not held:
                return
            if (self.uri, kind, key) in _passed_over or self.remote.read(_seal(kind, key)) is None:
                self._upload(kind, key)
            _uploaded.add((self.uri, kind, key))

    def _mark(self, user: str, kind: str, key: str) -> str:
        return f"{self.marks(user).relative_to(self.root).as_posix()}/{kind}.{key}"

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """Goes on without the other side where it cannot be reached, and says so."""
        try:
            yield
        except UnreachableError as error:
            self.tell(f"{error}; going on without, in {self.root}")


@contextmanager
def _advised() -> Iterator[None]:
    """Says of a store that cannot be reached what to look at."""
    try:
        yield
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; check --store, the network, and the credentials, which come from the environment, the "
            "provider's own files (such as ~/.aws) or the machine's role"
        ) from error


def _probe(word: str) -> str:
    """The file that holds a word for `find`."""
    return f"locks/.probe-{word}"


def _name(kind: str, key: str) -> str:
    """An entry's folder or file on the other side."""
    return f"{kind}/{key}" if kind in FOLDER_KINDS else f"{kind}/{key}.json"


def _seal(kind: str, key: str) -> str:
    """The file that seals the entry."""
    return f"{kind}/{key}/{MANIFEST}" if kind in FOLDER_KINDS else f"{kind}/{key}.json"


def _beside(kind: str, key: str, body: Mapping[str, Any]) -> str:
    """The folder of the files that a manifest speaks of."""
    return f"{_name(kind, key)}/{digest_of(body)}"
