"""What a trained network says of a clip that belongs to no data set: any length, any size of picture.

The benchmark's protocol is one frame a second, each with the second of sound that begins with it, T of them in one pass. Here
as many frames a second are answered as are asked for: the k-th of every second together make a clip of that protocol, shifted
by k parts of a second. Pictures are scaled to the square that the network learned from, as those of a test split are; its
logits are scaled back to the picture before the class is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from cavs_model.datasets.log_mel import SAMPLE_RATE_HZ, log_mel
from cavs_model.types import IGNORE, Batch, Network


@dataclass(frozen=True)
class Answer:
    """What a network says of one picture: label [H W] uint8 (learned ids), and how sure it is, [H W] float32 in 0..1."""

    label: np.ndarray
    confidence: np.ndarray


@dataclass
class Shares:
    """How much of some pictures each of C classes covers: pixels [C] int64 and their confidences' sums [C] float64."""

    pixels: np.ndarray
    confidence: np.ndarray
    frames: int = field(default=0)

    @staticmethod
    def none(num_classes: int) -> Shares:
        """Of no picture yet."""
        return Shares(np.zeros(num_classes, np.int64), np.zeros(num_classes, np.float64))

    def add(self, answer: Answer) -> None:
        """One more picture."""
        num_classes, label = len(self.pixels), answer.label.ravel()
        self.pixels += np.bincount(label, minlength=num_classes)
        self.confidence += np.bincount(label, answer.confidence.ravel(), num_classes)
        self.frames += 1

    def share(self, class_id: int) -> float:
        """The part of all pixels that is the class's."""
        return float(self.pixels[class_id] / max(1, self.pixels.sum()))

    def mean_confidence(self, class_id: int) -> float:
        """Over the class's pixels; 0 where it has none."""
        return float(self.confidence[class_id] / max(1, self.pixels[class_id]))


def second_of_sound(wave: np.ndarray, start: float) -> np.ndarray:
    """The second of a wave [n] at 16 kHz that begins `start` seconds in, float32 [16000]; silence where it has ended."""
    first = round(start * SAMPLE_RATE_HZ)
    second = np.zeros(SAMPLE_RATE_HZ, np.float32)
    heard = wave[first : first + SAMPLE_RATE_HZ]
    second[: len(heard)] = heard
    return second


def answers(
    network: Network,
    pictures: Sequence[np.ndarray],
    seconds: np.ndarray,
    image_size_px: int,
    device: torch.device,
) -> Iterator[Answer]:
    """The answers to the frames of one clip, in their order.

    `pictures` are T arrays [H W 3] uint8, one a second; `seconds` [T 16000] is the sound that begins with each. `network` is
    evaluate.frozen's. T is to be what the network was trained with or less.
    """
    size = (image_size_px, image_size_px)
    small = [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)) for picture in pictures]
    image = torch.from_numpy(np.stack(small).transpose(0, 3, 1, 2).copy())
    audio = torch.from_numpy(log_mel(seconds).astype(np.float16).astype(np.float32))  # as the decoded cache keeps it
    every = torch.ones(1, len(pictures), dtype=torch.bool)
    label = torch.full((1, len(pictures), *size), IGNORE, dtype=torch.uint8)
    batch = Batch(("clip",), image[None], audio[None], label, every, every, torch.zeros(1, dtype=torch.bool))
    logits = network(batch.to(device)).logits[0]
    for picture, of_picture in zip(pictures, logits, strict=True):
        scaled = F.interpolate(of_picture[None].float(), picture.shape[:2], mode="bilinear", align_corners=False)[0]
        highest, chosen = scaled.max(dim=0)
        sure = (highest - scaled.logsumexp(dim=0)).exp()
        yield Answer(chosen.to(torch.uint8).cpu().numpy(), sure.cpu().numpy())


def phases(count: int, per_second: int, seconds: int) -> Iterator[list[int]]:
    """Which of `count` frames, `per_second` of them a second, are answered in one pass: lists of at most `seconds` numbers.

    Those of one list are a second apart.
    """
    for first in range(0, count, per_second * seconds):
        end = min(count, first + per_second * seconds)
        for shift in range(first, min(end, first + per_second)):
            yield list(range(shift, end, per_second))
