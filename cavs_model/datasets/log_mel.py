"""Log-mel spectrograms, the form in which every network here hears sound.

The numbers are those of the VGGish front end (Hershey et al., "CNN architectures for large-scale audio classification", 2017),
so that its released weights apply: 16 kHz mono, windows of 25 ms every 10 ms, periodic Hann, FFT of 512, magnitude, 64 HTK mel
bins between 125 and 7500 Hz whose triangles are straight on the mel axis, log(mel + 0.01).

Where the sources disagree, and what is done here:
- AVSBench's code cuts the spectrogram of the whole recording into examples of 0.96 s without a gap, so that example k begins
  0.04 k s before the second of its picture. Here each second is cut for itself and every example begins with its picture's.

All of it in 64 bits: what is kept has 16 or 32, so that the order in which a BLAS sums, which its number of threads changes, is
rounded away. In 32 bits the same clip had other values on two cores than on one.
"""

from __future__ import annotations

from functools import cache

import numpy as np

SAMPLE_RATE_HZ = 16_000
NUM_FRAMES = 96  # spectrogram frames that stand for one second (0.96 s of it)
NUM_BINS = 64

_WINDOW = 400
_HOP = 160
_FFT = 512
_LOW_HZ = 125.0
_HIGH_HZ = 7500.0
_LOG_OFFSET = 0.01


def log_mel_spectrogram(wave: np.ndarray) -> np.ndarray:
    """Waves [... N] at 16 kHz, values in -1..1 -> float32 [... 1 + (N - 400) // 160, 64]. ValueError where N < 400."""
    if wave.shape[-1] < _WINDOW:
        raise ValueError(f"a wave of {wave.shape[-1]} samples is shorter than one window of {_WINDOW}")
    pieces = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64, copy=False), _WINDOW, axis=-1)[..., ::_HOP, :]
    magnitude = np.abs(np.fft.rfft(pieces * _hann(), _FFT))
    return np.log(magnitude @ mel_matrix() + _LOG_OFFSET).astype(np.float32)  # type: ignore[no-any-return]


def log_mel(seconds: np.ndarray) -> np.ndarray:
    """Waves of one second each [... 16000] -> float32 [... 96 64]: the first 96 frames of each second."""
    if seconds.shape[-1] != SAMPLE_RATE_HZ:
        raise ValueError(f"expected seconds of {SAMPLE_RATE_HZ} samples, got shape {seconds.shape}")
    return log_mel_spectrogram(seconds)[..., :NUM_FRAMES, :]


@cache
def mel_matrix() -> np.ndarray:
    """The triangles, float64 [257 64]: how much each FFT bin adds to each mel bin. Read-only."""
    bin_mel = _mel(np.linspace(0.0, SAMPLE_RATE_HZ / 2, _FFT // 2 + 1))
    edges = np.linspace(_mel(np.array(_LOW_HZ)), _mel(np.array(_HIGH_HZ)), NUM_BINS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    rising = (bin_mel[:, None] - lower) / (centre - lower)
    falling = (upper - bin_mel[:, None]) / (upper - centre)
    matrix: np.ndarray = np.maximum(0.0, np.minimum(rising, falling))
    matrix.setflags(write=False)
    return matrix


@cache
def _hann() -> np.ndarray:
    window: np.ndarray = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    window.setflags(write=False)
    return window


def _mel(hertz: np.ndarray) -> np.ndarray:
    mel: np.ndarray = 1127.0 * np.log1p(hertz / 700.0)
    return mel
