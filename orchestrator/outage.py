"""Waiting until what is wrong outside is over: room on a full disk, a store that answers again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cavs_model.errors import InputError, OutageError

RETRY_SECONDS = 30.0
DEFAULT_SECONDS = 1800.0
Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long an outage is waited for. Pickles."""

    seconds: float = DEFAULT_SECONDS

    def __post_init__(self) -> None:
        if not self.seconds >= 0:
            raise InputError(f"--wait-out must not be negative, not {self.seconds:g}")

    def through(
        self, attempt: Callable[[], Result], tell: Callable[[str], object], headway: Callable[[], object] = lambda: None
    ) -> Result:
        """What `attempt` returns, which is called again after an outage until one has lasted for too long.

        `headway` tells how far the attempts got: an outage that comes after another one got further is a new one. The last
        outage is raised.
        """
        since, before = None, headway()
        while True:
            try:
                return attempt()
            except OutageError as outage:
                now, reached = time.monotonic(), headway()
                if since is None or reached != before:
                    since, before = now, reached
                    tell(f"{outage}; tried again every {RETRY_SECONDS:g} s, for {self.seconds:g} s")
                if now - since + RETRY_SECONDS > self.seconds:
                    raise
                time.sleep(RETRY_SECONDS)
