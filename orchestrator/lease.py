"""Who computes an entry of a store that has no locks: leases, kept alive by a heartbeat.

A lease is a file that says who holds it and how often it was renewed. Its holder renews it every BEAT_SECONDS. Who waits takes
it over when its content has not changed for LEASE_SECONDS by the waiter's own monotonic clock: no two clocks are ever compared,
and setting one changes nothing. To take a lease is to write it, wait SETTLE_SECONDS and read it again: who is in there has it.
Processes that share a working copy ask for a lease one after another, by a lock of the kernel's, so one that was left there by
the same working copy is a dead process's and is taken over at once.

What that guarantees. A holder that lives and reaches the store keeps its lease, and a dead one's is free LEASE_SECONDS after
somebody began to wait. Two hold the same lease only if a write took longer than SETTLE_SECONDS to arrive, or if a holder was
stopped or cut off for LEASE_SECONDS and came back. Both then finish: one computes in vain, and no result is harmed, for an
entry appears by its manifest alone and names its own files. Who finds another in its lease lets it be, and does not remove it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from orchestrator.remote import Remote, UnreachableError

BEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0  # without a sign of life
SETTLE_SECONDS = 0.5
POLL_SECONDS = 2.0


class Lease:
    """A lease on a key, held from `acquire` or `try_now` to `release`, which is to follow whatever happens.

    `group` is shared by processes of which a kernel's lock lets one at a time ask for this key; a word, "" for none.
    """

    def __init__(self, remote: Remote, key: str, group: str = "") -> None:
        self._remote, self._name, self._group = remote, name_of(key), group
        self._owner = uuid.uuid4().hex
        self._beats = 0
        self._ending = threading.Event()
        self._heart: threading.Thread | None = None

    def acquire(self, on_wait: Callable[[], None]) -> None:
        """Takes the lease, waiting for whoever has it. UnreachableError after LEASE_SECONDS without the store."""
        told, seen, since, reached = False, None, time.monotonic(), time.monotonic()
        while True:
            try:
                found, now = self._remote.read(self._name), time.monotonic()
                if found != seen:
                    seen, since = found, now
                if (self._is_free(found) or now - since >= LEASE_SECONDS) and self._claimed():
                    break
                reached = now  # not where it could be read alone
            except UnreachableError:
                if time.monotonic() - reached >= LEASE_SECONDS:
                    raise
            if not told:
                on_wait()
                told = True
            time.sleep(POLL_SECONDS)
        self._live()

    def try_now(self, dead: bytes | None = None) -> bool:
        """Takes the lease if nobody has it, or if it holds what is known to be `dead`: whether it is held."""
        found = self._remote.read(self._name)
        if not (self._is_free(found) or found == dead) or not self._claimed():
            return False
        self._live()
        return True

    def release(self) -> None:
        """Removes the lease, unless it is another's by now."""
        self._ending.set()
        if self._heart is not None:
            self._heart.join()
        if self._beats and self._is_mine():
            self._remote.remove(self._name)

    def _is_free(self, found: bytes | None) -> bool:
        return found is None or (bool(self._group) and found.split()[2:3] == [self._group.encode()])

    def _claimed(self) -> bool:
        self._write()
        time.sleep(SETTLE_SECONDS)
        return self._is_mine()

    def _live(self) -> None:
        self._heart = threading.Thread(target=self._beat, name=f"lease {self._name}", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_SECONDS):
            try:
                if not self._is_mine():
                    return
                self._write()
            except UnreachableError:  # or full; tried again at the next beat, and who computes will find out by itself
                continue

    def _write(self) -> None:
        self._beats += 1
        words = (self._owner, self._beats, self._group or "-", socket.gethostname(), os.getpid())
        self._remote.write(self._name, " ".join(map(str, words)).encode())

    def _is_mine(self) -> bool:
        content = self._remote.read(self._name)
        return content is not None and content.startswith(f"{self._owner} ".encode())


def end_dead(remote: Remote, on_wait: Callable[[int], None]) -> None:
    """Removes the leases of dead processes, after watching all that there are for LEASE_SECONDS."""
    names = [name for name in remote.files("locks") if name.endswith(".lease")]
    before = {name: remote.read(name) for name in names}
    if not before:
        return
    on_wait(len(before))
    time.sleep(LEASE_SECONDS)
    for name, content in before.items():
        if content is None or remote.read(name) != content:
            continue
        lease = Lease(remote, name.removeprefix("locks/").removesuffix(".lease"))
        try:
            lease.try_now(dead=content)
        finally:
            lease.release()


def name_of(key: str) -> str:
    """The name of a key's lease."""
    return f"locks/{key}.lease"
