"""What a fault_stream.py on a cluster needs besides: its imports take seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fault_stream import Noting

from orchestrator.progress import Observer, watched
from orchestrator.ray_backend import RayBackend, connected, drain, new_mailbox


class NotingRayBackend(Noting, RayBackend):
    pass


@contextmanager
def cluster(observe: Observer) -> Iterator[Any]:
    """The mailbox on the cluster at RAY_ADDRESS; its events go to the observer."""
    with connected():
        mailbox = new_mailbox()
        with watched(lambda: drain(mailbox), observe, lambda: None):
            yield mailbox
