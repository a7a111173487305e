"""A picture of some clips of a benchmark, for the eye: frames, masks with the names of sounding classes, and the sound."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from cavs_model.datasets.base import Benchmark, Clips
from cavs_model.datasets.cache import open_split
from cavs_model.errors import InputError
from cavs_model.types import BACKGROUND, IGNORE

_GAP = 4
_CAPTION = 14
_ROW_HEIGHT = 128  # at least: small frames are enlarged by a whole factor


def contact_sheet(benchmark: Benchmark, split: str, count: int, root: str | Path | None = None) -> Image.Image:
    """`count` clips spread evenly over a split, one a row: each frame beside itself under its mask, then the log-mel.

    Masks are tinted by class, unlabelled frames in grey. Clips come from the cache under `root`, or are rendered where it is
    None. InputError for an unknown split or a count below 1.
    """
    if count < 1:
        raise InputError(f"a contact sheet needs at least one clip, got count {count}")
    samples = benchmark.samples(split)
    positions = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int)).tolist()
    clips = benchmark.render(split, positions) if root is None else open_split(benchmark, split, root).read(positions)
    names = benchmark.class_names()
    rows = []
    for n, position in enumerate(positions):
        sounding = ", ".join(names[class_id - 1] for class_id in samples[position].classes)
        rows.append(_row(clips, n, len(names), f"{samples[position].id}: {sounding}"))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for n, row in enumerate(rows):
        sheet.paste(row, (0, n * row.height))
    return sheet


def _row(clips: Clips, n: int, num_classes: int, caption: str) -> Image.Image:
    frames, size = clips.image.shape[1], clips.image.shape[3]
    factor = max(1, -(-_ROW_HEIGHT // size))
    side = factor * size
    tiles = []
    for t in range(frames):
        picture = clips.image[n, t].transpose(1, 2, 0)
        tiles += [_enlarged(picture, factor), _enlarged(_tinted(picture, clips.label[n, t], num_classes), factor)]
    tiles.append(_log_mel_picture(clips.audio[n], side))
    row = Image.new("RGB", (sum(tile.width + _GAP for tile in tiles), side + _CAPTION + _GAP), "white")
    ImageDraw.Draw(row).text((2, 1), caption, fill="black")
    left = 0
    for tile in tiles:
        row.paste(tile, (left, _CAPTION))
        left += tile.width + _GAP
    return row


def _enlarged(picture: np.ndarray, factor: int) -> Image.Image:
    return Image.fromarray(picture.repeat(factor, 0).repeat(factor, 1))


def _tinted(picture: np.ndarray, label: np.ndarray, num_classes: int) -> np.ndarray:
    """A darkened frame with labelled pixels in their class's colour, uint8 [H W 3]."""
    palette = np.zeros((256, 3))
    for class_id in range(1, num_classes + 1):  # neighbouring ids get distant hues
        palette[class_id] = np.array(colorsys.hsv_to_rgb(class_id * 0.618 % 1, 0.9, 1)) * 255
    palette[IGNORE] = 128
    weight = np.where(label == BACKGROUND, 0.0, 0.65)[..., None]
    tinted: np.ndarray = (1 - weight) * picture * 0.6 + weight * palette[label]
    return tinted.astype(np.uint8)


def _log_mel_picture(audio: np.ndarray, height: int) -> Image.Image:
    """Audio [T 96 64] as a strip, low pitches below, from black (quiet) to white (loud)."""
    levels = audio.reshape(-1, audio.shape[-1]).astype(np.float32).T[::-1]
    low, high = float(levels.min()), float(levels.max())
    grey = ((levels - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    strip = Image.fromarray(grey).convert("RGB")
    return strip.resize((strip.width, height), Image.Resampling.NEAREST)
