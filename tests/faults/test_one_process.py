"""Faults where Ray adds nothing: a stream on the local backend is killed, starved, misled about time, or shares its store."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_stream import DISK_FULL_STATUS, EPOCHS
from fault_tools import Here, Process, epochs_of, finished, left_behind, make_room, result_of, running, stream

LAST = "seed 0 task 2/2 audio_visual"
NETWORKS = 3  # two of the base task, one of the last
OUTCOMES = NETWORKS + 4  # and scores before and after, counts after either task

Reference = tuple[dict[str, Any], Here]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    calm = Here(tmp_path_factory.mktemp("undisturbed"))
    return result_of(calm), calm


def goes_on(root: Path, *cut: Process) -> tuple[dict[str, Any], Here]:
    """The result of the same stream started again, nothing computed twice but at most an epoch a cut."""
    last = Here(root)
    result = result_of(last)
    trained = epochs_of(*cut, last)
    assert len(trained) == NETWORKS
    for label, epochs in trained.items():
        # The epoch in flight, and one that was told of before it was noted.
        assert sorted(set(epochs)) == list(range(1, EPOCHS + 1)), label
        assert len(epochs) <= EPOCHS + len(cut), label
    assert not left_behind(root)
    return result, last


def test_sigkill_in_mid_epoch(undisturbed: Reference, tmp_path: Path, record: Callable[..., None]) -> None:
    with running(stream(tmp_path)) as process:
        process.until(lambda: epochs_of(process).get(LAST) == [1, 2, 3])
        process.signal(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
    result, last = goes_on(tmp_path, process)
    assert result == undisturbed[0]
    assert any("goes on after epoch" in event["text"] for event in last.events("note"))
    again = epochs_of(process, last)[LAST]
    record("SIGKILL of a process that trains", "in epoch 4 of 6, last task", f"{len(again) - EPOCHS} epochs", "all bits")


def test_killed_for_memory(
    undisturbed: Reference, tmp_path: Path, record: Callable[..., None], memory_limit: Callable[[int], Path]
) -> None:
    """By the kernel, in a group of processes with a limit."""
    members = memory_limit(2**31)
    join = lambda: members.write_text(str(os.getpid()))  # noqa: E731
    with running(stream(tmp_path, "--reach-for", str(2**32)), preexec_fn=join) as process:
        assert process.end() == -signal.SIGKILL, process.output
    result, last = goes_on(tmp_path, process)
    assert result == undisturbed[0]
    again = epochs_of(process, last)[LAST]
    record("killed by the kernel for memory", "in epoch 3 of 6, last task", f"{len(again) - EPOCHS} epochs", "all bits")


def test_disk_full(undisturbed: Reference, small_disk: Path, record: Callable[..., None]) -> None:
    process = finished(stream(small_disk))
    assert process.popen.returncode == DISK_FULL_STATUS, process.output
    (error,) = process.events("error")
    assert f"no space left while writing to {small_disk}" in error["text"]
    assert not [path for path in left_behind(small_disk) if "/partial/" not in path]  # those are what it goes on from
    make_room(small_disk)
    last = Here(small_disk)
    assert result_of(last) == undisturbed[0]
    assert not left_behind(small_disk)
    twice = sum(max(0, len(epochs) - EPOCHS) for epochs in epochs_of(process, last).values())
    assert 0 < len(epochs_of(process)) <= NETWORKS
    assert twice <= 2 * EPOCHS  # both networks of the task in flight
    record("disk full (tmpfs of 400 KiB), then made larger", "while a network is written", f"{twice} epochs", "all bits")


def test_the_clock_jumps_by_days(undisturbed: Reference, tmp_path: Path, record: Callable[..., None]) -> None:
    with running(stream(tmp_path, "--retreat")) as process:
        process.until(lambda: epochs_of(process).get(LAST) == [1, 2])
        process.signal(signal.SIGKILL)
        process.end()
    result, last = goes_on(tmp_path, process)
    assert result == undisturbed[0]
    again = epochs_of(process, last)[LAST]
    record("the clock jumps by -400 to +3 days, then SIGKILL", "at every look; in epoch 3", f"{len(again) - EPOCHS} epochs",
           "all bits")  # fmt: skip


def test_two_on_one_store(undisturbed: Reference, tmp_path: Path, record: Callable[..., None]) -> None:
    with running(stream(tmp_path)) as one, running(stream(tmp_path)) as other:
        assert (one.end(), other.end()) == (0, 0), one.output + other.output
    for process in (one, other):
        assert result_of(process) == undisturbed[0]
    assert {label: sorted(epochs) for label, epochs in epochs_of(one, other).items()} == epochs_of(undisturbed[1])
    computed = [process.events("result")[0]["computed"] for process in (one, other)]
    assert sum(computed) == OUTCOMES
    assert not left_behind(tmp_path)
    record("two runs on one store", "from the start", f"nothing: {computed[0]} and {computed[1]} of {OUTCOMES} outcomes",
           "all bits")  # fmt: skip


def flip(path: Path) -> None:
    """Flips the lowest bit of the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["networks", "scores", "counts", "interim"])
def test_damage(kind: str, undisturbed: Reference, tmp_path: Path, record: Callable[..., None]) -> None:
    with running(stream(tmp_path)) as process:
        process.until(lambda: epochs_of(process).get(LAST) == [1, 2, 3])
        process.signal(signal.SIGKILL)
        process.end()
    folder, pattern = ("partial", "*/*.safetensors") if kind == "interim" else (kind, "*/*.safetensors")
    flip(sorted((tmp_path / "store" / folder).glob(pattern if kind in ("networks", "interim") else "*.json"))[0])
    last = Here(tmp_path)
    assert result_of(last) == undisturbed[0]
    damage = last.events("damage") or [event for event in last.events("note") if "damaged" in event["text"]]
    assert len(damage) == 1
    trained, computed = epochs_of(last), last.events("result")[0]["computed"]
    whole = [label for label, epochs in trained.items() if epochs == list(range(1, EPOCHS + 1))]
    assert len(whole) == (kind in ("networks", "interim"))  # the damaged one, or the one that could not go on
    left = OUTCOMES - 5  # in flight and after it: the last network and its counts
    assert computed == left + (kind != "interim")
    assert not left_behind(tmp_path)
    what = {"networks": "a checkpoint", "scores": "a score file", "counts": "a file of counts",
            "interim": "what a task goes on from"}[kind]  # fmt: skip
    record(f"a bit of {what} flips", "after SIGKILL in epoch 4 of 6, last task", f"{len(whole)} networks' training, "
           f"{computed - left} outcomes", "all bits")  # fmt: skip


@pytest.mark.faults
def test_damage_to_a_cache_block(
    undisturbed: Reference, tmp_path: Path, record: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """A block of decoded clips is drawn again; the task in flight goes on, for the store's outcomes do not depend on it."""
    with running(stream(tmp_path, "--cached")) as process:
        process.until(lambda: epochs_of(process).get(LAST) == [1, 2, 3])
        process.signal(signal.SIGKILL)
        process.end()
    (block,) = (tmp_path / "data").glob("*/train/*.npy")
    whole = block.read_bytes()
    flip(block)
    last = Here(tmp_path, cached=True)
    result = result_of(last)
    assert result["metrics"] == undisturbed[0]["metrics"]
    assert sorted(result["weights"].values()) == sorted(undisturbed[0]["weights"].values())
    assert caplog.text.count("is damaged (its checksum differs) and is rebuilt") == 1
    assert block.read_bytes() == whole
    again = {label: len(epochs) - EPOCHS for label, epochs in epochs_of(process, last).items()}
    assert sum(again.values()) <= 1
    assert not left_behind(tmp_path)
    record("a bit of a block of decoded clips flips", "after SIGKILL in epoch 4 of 6, last task",
           f"that block, {sum(again.values())} epochs", "all bits; the block too")  # fmt: skip
