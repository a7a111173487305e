"""What every benchmark offers: its classes, its splits, an index without pixels, and clips on demand.

A benchmark is a frozen dataclass whose fields are its parameters; it pickles, holds no data, and opens nothing until asked.
Clips are rendered or decoded once into the memory-mapped cache (`cache.py`), keyed by `fingerprint()`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES
from cavs_model.errors import InputError
from cavs_model.types import IGNORE, Sample


@dataclass(frozen=True)
class Clips:
    """Decoded clips, N of them, in benchmark ids.

    image [N T 3 H W] uint8; audio [N T 96 64] float16 log-mel; label [N T H W] uint8,
    IGNORE in frames without annotation; real_frame [N T] bool; labelled_frame [N T] bool (see types.Batch).
    """

    image: np.ndarray
    audio: np.ndarray
    label: np.ndarray
    real_frame: np.ndarray
    labelled_frame: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    @staticmethod
    def blank(count: int, frames: int, size: int) -> Clips:
        """`count` clips to be filled in: no frame is real or labelled yet, pictures are black and sound is zero."""
        return Clips(
            image=np.zeros((count, frames, 3, size, size), np.uint8),
            audio=np.zeros((count, frames, NUM_FRAMES, NUM_BINS), np.float16),
            label=np.full((count, frames, size, size), IGNORE, np.uint8),
            real_frame=np.zeros((count, frames), np.bool_),
            labelled_frame=np.zeros((count, frames), np.bool_),
        )


class Benchmark(ABC):
    """One benchmark. Subclasses are frozen dataclasses; fields that change the clips must enter `fingerprint()`."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for people and folders, such as "collage-s"."""

    @property
    @abstractmethod
    def frames(self) -> int:
        """T, the frames of every clip, one a second (shorter clips are padded). A field of the subclass."""

    @property
    @abstractmethod
    def image_size_px(self) -> int:
        """H = W, the side of every frame. A field of the subclass."""

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Foreground classes; class i of this tuple has benchmark id i + 1."""

    @abstractmethod
    def orders(self) -> Mapping[str, tuple[str, ...]]:
        """Named class orders in which a stream may learn the classes; "alphabetical" is always one."""

    @abstractmethod
    def settings(self) -> tuple[str, ...]:
        """The settings this benchmark is usually run in, such as "16-8" (others are allowed where the counts fit)."""

    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """ "train", "val" and one or more test splits, whose names start with "test"."""

    @abstractmethod
    def samples(self, split: str) -> tuple[Sample, ...]:
        """The index of a split, in a fixed order, classes in benchmark ids. InputError for an unknown split."""

    @abstractmethod
    def render(self, split: str, positions: Sequence[int]) -> Clips:
        """The clips at these positions of the index. The same arrays whoever renders them, and in whatever portions."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hex digest of all that determines samples and clips: parameters, source files, version of the code."""

    @abstractmethod
    def check(self) -> None:
        """Verifies the source files. InputError that names the first missing or damaged one. Takes seconds at most."""

    def waveform(self, split: str, position: int) -> np.ndarray | None:
        """The sound of one clip for a person to listen to, float32 [samples] at 16 kHz; None where there is none to be had."""
        return None

    @property
    def cached(self) -> bool:
        """Whether clips are worth keeping on disk; False renders them in memory at every opening."""
        return True


def digest(facts: Mapping[str, object]) -> str:
    """SHA-256 (hex) over facts that JSON can hold, whatever their order: what `fingerprint` is made of."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def require(benchmark: Benchmark, field: str, least: int, most: int | None = None) -> None:
    """InputError unless a field is a whole number from `least` to `most`; to be called in `__post_init__`."""
    value = getattr(benchmark, field)
    allowed = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise InputError(f"{type(benchmark).__name__}.{field} must be {allowed}, got {value!r}")
