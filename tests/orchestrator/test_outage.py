"""Waiting for an outage to end: tried again until it lasted too long, and never for what the user has to mend."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cavs_model.errors import InputError, OutageError
from orchestrator import outage
from orchestrator.outage import RETRY_SECONDS, Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes in sleep alone."""
    now = [1000.0]
    monkeypatch.setattr(outage.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(outage.time, "sleep", sleep)
    return now


def failing(times: int, error: Exception) -> Callable[[], int]:
    """An attempt that fails so many times and then tells how often it was made."""
    calls = [0]

    def attempt() -> int:
        calls[0] += 1
        if calls[0] <= times:
            raise error
        return calls[0]

    return attempt


def test_an_outage_is_told_once_and_waited_for(clock: list[float]) -> None:
    told: list[str] = []
    assert Patience(600).through(failing(3, OutageError("no room")), told.append) == 4
    assert clock[0] == 1000 + 3 * RETRY_SECONDS
    assert told == ["no room; tried again every 30 s, for 600 s"]


@pytest.mark.parametrize(("seconds", "tries"), [(0.0, 1), (RETRY_SECONDS - 1, 1), (RETRY_SECONDS, 2), (10 * RETRY_SECONDS, 11)])
def test_an_outage_that_lasts_is_raised(seconds: float, tries: int, clock: list[float]) -> None:
    made: list[int] = []

    def attempt() -> None:
        made.append(1)
        raise OutageError("no server")

    with pytest.raises(OutageError, match="no server"):
        Patience(seconds).through(attempt, lambda text: None)
    assert len(made) == tries


def test_an_outage_after_headway_is_a_new_one(clock: list[float]) -> None:
    """Each of three tasks meets an outage that takes all patience but a moment."""
    done, told, failures = [0], [], [0]

    def attempt() -> str:
        while done[0] < 3:
            if failures[0] < 4:
                failures[0] += 1
                raise OutageError("no room")
            failures[0] = 0
            done[0] += 1
        return "learned"

    assert Patience(4 * RETRY_SECONDS).through(attempt, told.append, lambda: done[0]) == "learned"
    assert len(told) == 3


@pytest.mark.parametrize("error", [InputError("no such class"), ValueError("a bug")])
def test_nothing_else_is_waited_for(error: Exception, clock: list[float]) -> None:
    with pytest.raises(type(error)):
        Patience().through(failing(1, error), lambda text: None)
    assert clock == [1000.0]


def test_impatience_is_refused() -> None:
    with pytest.raises(InputError, match="--wait-out must not be negative"):
        Patience(-1)
