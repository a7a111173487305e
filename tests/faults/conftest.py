"""What every fault leaves in docs/reliability.md: FAULT_RECORDS names a file that the tests' records are added to."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Record = Callable[..., None]


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
