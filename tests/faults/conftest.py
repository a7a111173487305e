"""What every fault leaves in docs/reliability.md: FAULT_RECORDS names a file that the tests' records are added to."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

Record = Callable[..., None]
CGROUPS = Path("/sys/fs/cgroup")


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A shell has what it starts in the background ignore SIGINT, and that is inherited; these tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A store's folder below `tmp_path`, on a file system with room for the base task, roughly."""
    folder = tmp_path / "store"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def memory_limit() -> Iterator[Callable[[int], Path]]:
    """Makes a cgroup with so many bytes; the file into which its pids are written. The kernel kills what asks for more.

    What a process had before it came counts to where it was.
    """
    with ExitStack() as stack:

        def limited(limit_bytes: int) -> Path:
            second = (CGROUPS / "cgroup.controllers").exists()  # version 2 has one tree for all kinds of limits
            group = (CGROUPS if second else CGROUPS / "memory") / f"cavs-{os.getpid()}"
            try:
                group.mkdir()
                stack.callback(group.rmdir)
                (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit_bytes))
            except OSError as error:
                pytest.skip(f"no memory cgroup can be made here: {error}")
            return group / "cgroup.procs"

        yield limited


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Notes what was done to what, when, what was computed again, and what was equal. Written only where the test passes."""
    noted: list[tuple[str, ...]] = []

    def note(fault: str, when: str, again: str, equal: str) -> None:
        noted.append((fault, when, again, equal))

    failed = request.session.testsfailed
    yield note
    path = os.environ.get("FAULT_RECORDS")
    if path and request.session.testsfailed == failed:
        with open(Path(path), "a") as file:
            for cells in noted:
                print("|", " | ".join(cells), "|", file=file)
