"""Clips from files of any kind, for `predict`: a video through PyAV, or a folder of frames with one wav. And a video written.

A clip is pictures at a steady rate and 16 kHz mono sound that begins with the first of them. Pictures are read as they are
asked for, so that a long video needs no more memory than a short one; its sound is held.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image
from scipy.signal import resample_poly

from cavs_model.datasets.clip_files import read_frame
from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ
from cavs_model.errors import InputError
from cavs_model.untrusted import FaultError, reason

PICTURES = (".png", ".jpg", ".jpeg")
LARGEST_SIDE_PX = 1280  # larger pictures are scaled down: logits of every class at full size would not fit into memory
SLACK_SECONDS = 1e-4  # of rounded time stamps
# A playlist names other files or addresses; a clip is one file.
ONE_FILE = {"protocol_whitelist": "file"}


@dataclass(frozen=True)
class Clip:
    """A clip to be answered. `pictures` gives uint8 [H W 3], all of one size with even sides, `per_second` of them a second.

    `wave` is float32 [n] at 16 kHz, None for a clip without sound. `source` is what it was made of, in words.
    """

    pictures: Callable[[], Iterator[np.ndarray]]
    per_second: int
    wave: np.ndarray | None
    source: str


def open_clip(path: Path, per_second: int, frame_rate: float, needs_sound: bool) -> Clip:
    """The clip of a video file or of a folder of frames with one wav, of which `frame_rate` frames are one second.

    No more than `per_second` pictures a second, nor more than there are. InputError that names the file and what is wrong.
    """
    if path.is_dir():
        return _of_folder(path, per_second, frame_rate, needs_sound)
    if not path.is_file():
        raise InputError(f"no video file and no folder of frames at {path}")
    return _of_video(path, per_second, needs_sound)


def _of_folder(folder: Path, per_second: int, frame_rate: float, needs_sound: bool) -> Clip:
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in PICTURES), key=_natural)
    if not files:
        raise InputError(f"{folder} has no frames; it must hold {', '.join(PICTURES)} files in the order of their names")
    sounds = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".wav")
    if len(sounds) > 1:
        raise InputError(f"{folder} has {len(sounds)} wav files, {sounds[0].name} and {sounds[1].name}; it must hold one")
    wave, seconds = None, len(files) / frame_rate
    if sounds:
        wave = _read_wav(sounds[0])
        if abs(seconds - len(wave) / SAMPLE_RATE_HZ) >= 1:
            raise InputError(
                f"{folder}: {len(files)} frames at {frame_rate:g} a second are {seconds:.1f} s, {sounds[0].name} has "
                f"{len(wave) / SAMPLE_RATE_HZ:.1f} s; say by --frame-rate how many frames are one second"
            )
    elif needs_sound:
        raise InputError(f"{folder} has no wav file; --silent answers as if nothing were heard")
    shown = _rate(per_second, frame_rate)

    def timed() -> Iterator[tuple[float, np.ndarray]]:
        for number, file in enumerate(files):
            try:
                yield number / frame_rate, _prepared(np.asarray(read_frame(str(file))))
            except FaultError as fault:
                raise InputError(f"{file} {fault}") from None

    return Clip(lambda: _same_size(_sampled(timed(), shown, seconds), folder), shown, wave,
                f"{len(files)} frames at {frame_rate:g} a second")  # fmt: skip


def _of_video(path: Path, per_second: int, needs_sound: bool) -> Clip:
    av = library()
    with _opened(path) as container:
        if not container.streams.video:
            raise InputError(f"{path} has no video stream")
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        size = f"{stream.codec_context.width} x {stream.codec_context.height} px"
        has_sound = bool(container.streams.audio)
    if needs_sound and not has_sound:
        raise InputError(f"{path} has no sound; --silent answers as if nothing were heard")
    begin = next((time for time, _ in _decoded(path)), None)
    if begin is None:
        raise InputError(f"{path} has no picture in it")
    wave = None
    if has_sound:
        try:
            wave = _sound(path, begin)
        except av.FFmpegError as error:
            raise InputError(f"{path}: its sound cannot be decoded: {error.strerror}") from error
    shown = _rate(per_second, rate)

    def timed() -> Iterator[tuple[float, np.ndarray]]:
        for time, frame in _decoded(path):
            turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
            yield time - begin, _prepared(turned)

    return Clip(lambda: _same_size(_sampled(timed(), shown, None, 1 / rate), path), shown, wave,
                f"{size}, {rate:.4g} frames a second")  # fmt: skip


def _decoded(path: Path) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of a video in the order in which they are shown. InputError for a file that breaks off."""
    with _opened(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        try:
            for number, frame in enumerate(container.decode(stream)):
                yield (number / rate if frame.time is None else frame.time), frame
        except library().FFmpegError as error:
            raise InputError(f"{path}: its pictures cannot be decoded: {error.strerror}") from error


def _sound(path: Path, begin: float) -> np.ndarray:
    """The sound of a video from the time of its first picture on; several channels are averaged.

    ffmpeg itself would mix two equal channels to 1.4 times their level.
    """
    resampler = library().AudioResampler(format="fltp", rate=SAMPLE_RATE_HZ)
    parts: list[np.ndarray] = []
    first: float | None = None
    with _opened(path) as container:
        for frame in container.decode(container.streams.audio[0]):
            if first is None:
                first = frame.time or 0.0
            parts += [part.to_ndarray().mean(0) for part in resampler.resample(frame)]
    parts += [part.to_ndarray().mean(0) for part in resampler.resample(None)]
    wave = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
    late = round(((first or 0.0) - begin) * SAMPLE_RATE_HZ)
    return np.pad(wave, (late, 0)) if late > 0 else wave[-late:]


def _read_wav(path: Path) -> np.ndarray:
    """A wav of any rate and number of channels as mono at 16 kHz."""
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise InputError(f"{path} cannot be decoded: {reason(error)}") from error
    mono: np.ndarray = wave.mean(1)
    if not len(mono) or not np.isfinite(mono).all():
        raise InputError(f"{path} {'has samples that are no finite numbers' if len(mono) else 'has no sound in it'}")
    if rate == SAMPLE_RATE_HZ:
        return mono
    common = gcd(rate, SAMPLE_RATE_HZ)
    return np.asarray(resample_poly(mono, SAMPLE_RATE_HZ // common, rate // common), np.float32)


def _sampled(
    timed: Iterator[tuple[float, np.ndarray]], per_second: int, end: float | None, last: float = 0.0
) -> Iterator[np.ndarray]:
    """The pictures that are on the screen at 0, 1 / per_second, ... until `end`, or `last` seconds after the last one came."""
    shown: np.ndarray | None = None
    number, came = 0, 0.0
    for time, picture in timed:
        while shown is not None and number / per_second < time - SLACK_SECONDS:
            yield shown
            number += 1
        shown, came = picture, time
    until = came + last if end is None else end
    while shown is not None and number / per_second < until - SLACK_SECONDS:
        yield shown
        number += 1


def _same_size(pictures: Iterator[np.ndarray], path: Path) -> Iterator[np.ndarray]:
    shape: tuple[int, ...] | None = None
    for picture in pictures:
        if shape is not None and picture.shape != shape:
            raise InputError(
                f"{path}: frames of different sizes, {shape[1]} x {shape[0]} and {picture.shape[1]} x {picture.shape[0]} px"
            )
        shape = picture.shape
        yield picture


def _prepared(picture: np.ndarray) -> np.ndarray:
    """Scaled down where it is very large, and with even sides, as video encoders want them."""
    height, width = picture.shape[:2]
    scale = min(1.0, LARGEST_SIDE_PX / max(height, width))
    if scale < 1:
        size = (max(2, round(width * scale)), max(2, round(height * scale)))
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    height, width = (side - side % 2 for side in picture.shape[:2])
    if not height or not width:
        raise InputError(f"pictures of {picture.shape[1]} x {picture.shape[0]} px are too small")
    return np.ascontiguousarray(picture[:height, :width])


def _rate(wanted: int, there: float) -> int:
    """Pictures a second, a whole number: no more than there are."""
    return max(1, min(wanted, math.floor(there + SLACK_SECONDS)))


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts x_2 before x_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


class VideoWriter:
    """An mp4 (H.264, AAC) of pictures [H W 3] uint8 at `per_second` with 16 kHz sound, None for none. A context manager."""

    def __init__(self, path: Path, per_second: int, wave: np.ndarray | None) -> None:
        self._path, self._rate, self._wave, self._number = path, per_second, wave, 0
        self._container: Any = None
        self._sound_at = 0

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, picture: np.ndarray) -> None:
        """The next picture, and the sound until the one after it."""
        av = library()
        if self._container is None:
            self._container = av.open(str(self._path), "w", format="mp4")
            self._video = self._container.add_stream("libx264", rate=self._rate, options={"crf": "20"})
            self._video.height, self._video.width = picture.shape[:2]
            self._video.pix_fmt = "yuv420p"  # what every player shows
            if self._wave is not None:
                self._audio = self._container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        self._container.mux(self._video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        self._number += 1
        if self._wave is not None:
            end = round(self._number / self._rate * SAMPLE_RATE_HZ)
            part = self._wave[self._sound_at : end]
            part = np.pad(part, (0, end - self._sound_at - len(part)))  # the sound may end before the pictures do
            frame = av.AudioFrame.from_ndarray(part[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE_HZ, self._sound_at, Fraction(1, SAMPLE_RATE_HZ)
            self._container.mux(self._audio.encode(frame))
            self._sound_at = end

    def __exit__(self, *error: object) -> None:
        if self._container is None:
            return
        if error[0] is None:
            self._container.mux(self._video.encode(None))
            if self._wave is not None:
                self._container.mux(self._audio.encode(None))
        self._container.close()


def _opened(path: Path) -> Any:
    av = library()
    try:
        return av.open(str(path), options=ONE_FILE)
    except (av.FFmpegError, OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} is no video that can be read: {told}") from error


def library() -> types.ModuleType:
    """PyAV. InputError where it is not installed."""
    try:
        import av
        import av.error
    except ImportError as error:
        raise InputError(
            "video files need PyAV: pip install -e '.[video]'; or give a folder of frames, and --as frames"
        ) from error
    return av
