"""The log-mel front end against its definition, written out with loops."""

import math

import numpy as np
import pytest
import torchaudio
from threadpoolctl import threadpool_limits

from cavs_model.datasets.log_mel import log_mel, log_mel_spectrogram, mel_matrix


def hertz_of(mel):
    return 700.0 * (math.exp(mel / 1127.0) - 1.0)


def mel_of(hertz):
    return 1127.0 * math.log(1.0 + hertz / 700.0)


def naive_frame(samples):
    """One spectrogram frame of 400 samples: discrete Fourier transform by its sum, triangles bin by bin."""
    windowed = [x * (0.5 - 0.5 * math.cos(2 * math.pi * n / 400)) for n, x in enumerate(samples)]
    times = np.arange(400)
    magnitudes = [abs(np.sum(windowed * np.exp(-2j * math.pi * k * times / 512))) for k in range(257)]
    low, high = mel_of(125.0), mel_of(7500.0)
    edges = [low + (high - low) * i / 65 for i in range(66)]
    frame = []
    for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
        energy = 0.0
        for k, magnitude in enumerate(magnitudes):
            mel = mel_of(k * 8000 / 256)
            if left < mel <= centre:
                energy += magnitude * (mel - left) / (centre - left)
            elif centre < mel < right:
                energy += magnitude * (right - mel) / (right - centre)
        frame.append(math.log(energy + 0.01))
    return frame


def test_frames_match_the_definition():
    wave = np.random.default_rng(0).uniform(-1, 1, 16000)
    spectrum = log_mel(wave)
    assert spectrum.shape == (96, 64)
    assert spectrum.dtype == np.float32
    for n in (0, 1, 95):
        np.testing.assert_allclose(spectrum[n], naive_frame(wave[160 * n : 160 * n + 400]), atol=2e-4)


def test_a_tone_is_loudest_in_its_own_bin():
    for hertz in (200.0, 1000.0, 6000.0):
        wave = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000)
        loudest = log_mel(wave).mean(0).argmax()
        edges = np.linspace(mel_of(125.0), mel_of(7500.0), 66)
        assert hertz_of(edges[loudest]) <= hertz <= hertz_of(edges[loudest + 2])


def test_triangles_are_close_to_those_of_torchaudio():
    """torchaudio's triangles are straight in hertz, ours on the mel axis as VGGish's: alike, not the same."""
    theirs = torchaudio.functional.melscale_fbanks(257, 125.0, 7500.0, 64, 16000, norm=None, mel_scale="htk").numpy()
    assert 0 < np.abs(mel_matrix() - theirs).max() < 0.03


def test_leading_axes_and_silence():
    waves = np.random.default_rng(1).uniform(-1, 1, (2, 3, 16000))
    np.testing.assert_array_equal(log_mel(waves)[1, 2], log_mel(waves[1, 2]))
    np.testing.assert_allclose(log_mel(np.zeros(16000)), math.log(0.01), rtol=1e-6)
    assert log_mel_spectrogram(np.zeros(400 + 160 * 4)).shape == (5, 64)


def test_a_second_has_the_same_bits_whatever_the_threads_and_whatever_is_beside_it():
    # In 32 bits the product with the triangles has others with two threads of BLAS than with one.
    waves = 0.1 * np.random.default_rng(0).standard_normal((64, 16000))
    with threadpool_limits(1, "blas"):
        expected = log_mel(waves)
    for threads in (2, 3):
        with threadpool_limits(threads, "blas"):
            np.testing.assert_array_equal(log_mel(waves), expected)
            np.testing.assert_array_equal(np.stack([log_mel(wave) for wave in waves]), expected)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="16000"):
        log_mel(np.zeros(15999))
    with pytest.raises(ValueError, match="399"):
        log_mel_spectrogram(np.zeros(399))
