"""Small tasks, batches and predictions for the tests of losses and methods."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cavs_model.types import BACKGROUND, IGNORE, Batch, LabelRule, Prediction, Sample, Step, Task

OLD, CLASSES = 4, 6  # background and classes 1..3 are old, 4 and 5 are new
SIZE = 9


def task(samples: tuple[Sample, ...] = ()) -> Task:
    return Task(1, OLD, CLASSES, samples, LabelRule(range(OLD, CLASSES), BACKGROUND))


def base_task(samples: tuple[Sample, ...] = ()) -> Task:
    return Task(0, 0, OLD, samples, LabelRule(range(1, OLD), BACKGROUND))


def batch(clips: int = 4, frames: int = 3, classes: range = range(OLD, CLASSES), seed: int = 0) -> Batch:
    """Random labels among `classes`, background and IGNORE; the second clip has padding, the third an unannotated frame."""
    draw = torch.Generator().manual_seed(seed)
    choices = torch.tensor([BACKGROUND, BACKGROUND, IGNORE, *classes], dtype=torch.uint8)
    label = choices[torch.randint(len(choices), (clips, frames, SIZE, SIZE), generator=draw)]
    real = torch.ones(clips, frames, dtype=torch.bool)
    labelled = torch.ones(clips, frames, dtype=torch.bool)
    if clips > 2 and frames > 1:
        real[1, -1] = labelled[1, -1] = labelled[2, 0] = False
    label[~labelled] = IGNORE
    return Batch(
        tuple(f"clip-{index}" for index in range(clips)),
        torch.zeros(clips, frames, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(clips, frames, 96, 64),
        label,
        real,
        labelled,
        torch.zeros(clips, dtype=torch.bool),
    )


def prediction(clips: int, frames: int, classes: int, seed: int, grad: bool = False) -> Prediction:
    """Random logits and maps of several sizes; never zero at padding, so that whoever reads it is found out."""
    draw = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(clips, frames, *shape, generator=draw).requires_grad_(grad)

    features = (tensor(5, 8, 8), tensor(4, 4, 6), tensor(3, 2, 2), tensor(2, 1, 1), tensor(3, 7, 5))
    logits = tensor(classes, SIZE, SIZE)
    return Prediction(logits, features, tuple(tensor(*feature.shape[2:]) for feature in features[:4]))


def step(clips: int = 4, frames: int = 3, base: bool = False, seed: int = 0) -> Step:
    given = batch(clips, frames, range(1, OLD) if base else range(OLD, CLASSES), seed)
    if base:
        return Step(given, prediction(clips, frames, OLD, seed + 1, grad=True), None, base_task())
    given = replace(given, rehearsed=torch.tensor([index == 3 for index in range(clips)]))
    if clips > 3:
        given.label[3][given.label[3] == CLASSES - 1] = 2  # a rehearsed sample shows old classes
    teacher = prediction(clips, frames, OLD, seed + 2)
    student = prediction(clips, frames, CLASSES, seed + 1, grad=True)
    return Step(given, student, replace(teacher, logits=3 * teacher.logits), task())


def each_tensor(given: Prediction, change: Callable[[Tensor], Tensor]) -> Prediction:
    """The prediction with every tensor changed."""
    return Prediction(change(given.logits), tuple(map(change, given.features)), tuple(map(change, given.encoder)))


def real_pixels(given: Step) -> Iterator[tuple[np.ndarray, np.ndarray, int, bool]]:
    """Student's logits [C], teacher's logits [O], label, and whether rehearsed, of every pixel of every real frame."""
    assert given.teacher is not None
    student, teacher = (each.logits.detach().double().movedim(2, -1).numpy() for each in (given.student, given.teacher))
    for b, t in given.batch.real_frame.nonzero().tolist():
        for y, x in np.ndindex(SIZE, SIZE):
            yield student[b, t, y, x], teacher[b, t, y, x], int(given.batch.label[b, t, y, x]), bool(given.batch.rehearsed[b])


def softmax(logits: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(logits)
    return powers / powers.sum()


def part(whole: Step, clips: slice) -> Step:
    """The step that a worker sees which got only these clips."""

    def cut(given: Prediction | None) -> Prediction | None:
        return given and each_tensor(given, lambda tensor: tensor[clips])

    tensors = {
        name: getattr(whole.batch, name)[clips]
        for name in ("sample_id", "image", "audio", "label", "real_frame", "labelled_frame", "rehearsed")
    }
    return replace(whole, batch=Batch(**tensors), student=cut(whole.student), teacher=cut(whole.teacher))
