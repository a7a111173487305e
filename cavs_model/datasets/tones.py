"""Tones: coloured shapes and pure tones, for tests. A class is a coloured shape and a pitch; a silent shape is background.

Everything is drawn in memory within milliseconds and follows from the seed. Two fields imitate what makes AVSBench awkward:
clips shorter than T frames, and training clips of which only the first frame is annotated.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cavs_model.datasets.base import Benchmark, Clips, digest, require
from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES, SAMPLE_RATE_HZ, log_mel_spectrogram
from cavs_model.errors import unknown
from cavs_model.types import BACKGROUND, Sample

RENDER_VERSION = 1  # to be raised by whoever changes what a clip looks or sounds like

_SPLITS = ("train", "val", "test")
_SHAPES = ("disc", "square", "triangle", "cross")
_LOWEST_HZ, _HIGHEST_HZ = 300.0, 5000.0
_WAVE_SAMPLES = 400  # one spectrogram window: a steady tone looks the same in all of them


@dataclass(frozen=True)
class Tones(Benchmark):
    """The toy benchmark. InputError for numbers out of range.

    `short_clips`: every second clip has only ceil(T / 2) real frames. `first_frame_only`: training clips have labels on their
    first frame alone.
    """

    num_classes: int = 4  # at most 12
    train_clips: int = 32  # of each split at least one of each class
    val_clips: int = 16  # as train_clips
    test_clips: int = 16  # as train_clips
    frames: int = 2
    image_size_px: int = 32
    seed: int = 0  # of all that is drawn
    short_clips: bool = False
    first_frame_only: bool = False

    def __post_init__(self) -> None:
        require(self, "num_classes", 2, 12)
        for name in ("train_clips", "val_clips", "test_clips"):
            require(self, name, self.num_classes, 1_000_000)  # so that every class is in every split
        require(self, "frames", 2 if self.short_clips else 1, 60)
        require(self, "image_size_px", 16, 1024)
        require(self, "seed", 0, 2**63 - 1)

    @property
    def name(self) -> str:
        return "tones"

    @property
    def cached(self) -> bool:
        return False

    def class_names(self) -> tuple[str, ...]:
        return tuple(f"{letter}-{_SHAPES[i % 4]}" for i, letter in enumerate("abcdefghijkl"[: self.num_classes]))

    def orders(self) -> Mapping[str, tuple[str, ...]]:
        names = self.class_names()
        return {"alphabetical": names, "reversed": names[::-1]}

    def settings(self) -> tuple[str, ...]:
        base = self.num_classes // 2
        return tuple(f"{base}-{step}" for step in dict.fromkeys((1, self.num_classes - base)))

    def splits(self) -> tuple[str, ...]:
        return _SPLITS

    def samples(self, split: str) -> tuple[Sample, ...]:
        return tuple(
            Sample(f"{split}-{position:05d}", tuple(sorted(self._cast(split, position)[0])))
            for position in range(self._count(split))
        )

    def render(self, split: str, positions: Sequence[int]) -> Clips:
        count, frames, size = len(positions), self.frames, self.image_size_px
        num_clips = self._count(split)
        clips = Clips.blank(count, frames, size)
        for n, position in enumerate(positions):
            if not 0 <= position < num_clips:
                raise IndexError(f"split {split!r} has {num_clips} clips, asked for position {position}")
            real = (frames + 1) // 2 if self.short_clips and position % 2 else frames
            labelled = 1 if self.first_frame_only and split == "train" else real
            image, label, audio, _ = self._draw(split, position)
            clips.image[n, :real] = image[:real]
            clips.audio[n, :real] = audio[:real]
            clips.label[n, :labelled] = label[:labelled]
            clips.real_frame[n, :real] = True
            clips.labelled_frame[n, :labelled] = True
        return clips

    def waveform(self, split: str, position: int) -> np.ndarray:
        return self._wave(self._draw(split, position)[3], self.frames * SAMPLE_RATE_HZ).astype(np.float32)

    def fingerprint(self) -> str:
        return digest({"benchmark": self.name, "render_version": RENDER_VERSION, **asdict(self)})

    def check(self) -> None:
        """Nothing to verify: there are no source files."""

    def silent_classes(self, split: str, position: int) -> tuple[int, ...]:
        """The classes (benchmark ids) a clip shows without their sound."""
        return self._cast(split, position)[1]

    def pitch_hz(self, class_id: int) -> float:
        """The frequency of a class's tone, evenly spread on a log axis."""
        return float(_LOWEST_HZ * (_HIGHEST_HZ / _LOWEST_HZ) ** ((class_id - 1) / max(self.num_classes - 1, 1)))

    def _count(self, split: str) -> int:
        if split not in _SPLITS:
            raise unknown("split of tones", split, _SPLITS)
        return {"train": self.train_clips, "val": self.val_clips, "test": self.test_clips}[split]

    def _rng(self, split: str, position: int, stage: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_SPLITS.index(split), position, stage)))

    def _cast(self, split: str, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Who sounds and who is only seen. The first sounding class goes round, so that all classes come equally often."""
        first = position % self.num_classes + 1
        rng = self._rng(split, position, 0)
        others = rng.permutation([c for c in range(1, self.num_classes + 1) if c != first]).tolist()
        sounding = (first, *others[: int(rng.random() < 0.4)])
        rest = others[len(sounding) - 1 :]
        return sounding, tuple(rest[: int(rng.random() < 0.5)])

    def _draw(self, split: str, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[float, float, float]]]:
        """All T frames: image uint8 [T 3 H W], label uint8 [T H W], audio float32 [T 96 64]; and the voices of `_wave`."""
        size, frames = self.image_size_px, self.frames
        sounding, silent = self._cast(split, position)
        rng = self._rng(split, position, 1)
        image = rng.integers(0, 60, (frames, 3, size, size), dtype=np.uint8)
        label = np.full((frames, size, size), BACKGROUND, np.uint8)
        half = size // 2
        quarters = rng.permutation(4).tolist()  # at most three shapes, each in a quarter of its own: none hides another
        for class_id, quarter in zip(sounding + silent, quarters, strict=False):
            radius = half * rng.uniform(0.3, 0.42)
            room = half - 2 * radius
            start, step = rng.uniform(0, room, 2), rng.uniform(-1, 1, 2)
            for t in range(frames):
                row, column = np.clip(start + t * step, 0, room) + radius + half * np.array(divmod(quarter, 2))
                mask = _shape(_SHAPES[(class_id - 1) % 4], size, row, column, radius)
                image[t, :, mask] = self._colour(class_id) + rng.integers(-20, 21, 3)
                if class_id in sounding:
                    label[t, mask] = class_id
        voices = [(self.pitch_hz(class_id), rng.uniform(0.2, 0.4), rng.uniform()) for class_id in sounding]
        noise = rng.normal(0, 0.1, (frames, NUM_FRAMES, NUM_BINS))
        audio = (log_mel_spectrogram(self._wave(voices, _WAVE_SAMPLES)) + noise).astype(np.float32)
        return image, label, audio, voices

    @staticmethod
    def _wave(voices: Sequence[tuple[float, float, float]], samples: int) -> np.ndarray:
        """The sum of tones, each a frequency in Hz, an amplitude and a phase in turns, float64 [samples]."""
        seconds = np.arange(samples) / SAMPLE_RATE_HZ
        wave: np.ndarray = sum(
            (level * np.sin(2 * np.pi * (hertz * seconds + phase)) for hertz, level, phase in voices), np.zeros(samples)
        )
        return wave

    def _colour(self, class_id: int) -> np.ndarray:
        red_green_blue = colorsys.hsv_to_rgb((class_id - 1) / self.num_classes, 0.8, 0.85)
        return np.array(red_green_blue) * 255


def _shape(shape: str, size: int, row: float, column: float, radius: float) -> np.ndarray:
    """The pixels of a shape as bool [H W]."""
    down, right = (np.mgrid[:size, :size] + 0.5) - np.array([row, column])[:, None, None]
    if shape == "disc":
        inside = down**2 + right**2 <= radius**2
    elif shape == "square":
        inside = np.maximum(abs(down), abs(right)) <= 0.85 * radius
    elif shape == "triangle":
        inside = (abs(down) <= radius) & (abs(right) <= (down + radius) / 2)
    else:
        inside = (np.minimum(abs(down), abs(right)) <= radius / 3) & (np.maximum(abs(down), abs(right)) <= radius)
    return np.asarray(inside)
