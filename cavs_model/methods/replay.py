"""Replay: any base method plus a random, class-balanced memory that is learned again with every task, each row once.

The baseline that chosen rehearsal has to beat: it is CMR (see cmr.py, whose terms it uses) with random selection and without
resampling. No paper of its own; 5 samples per class is CMR's budget, so that the two compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cavs_model.methods.base import Method, RehearsalMethod, knob
from cavs_model.methods.finetune import Finetune
from cavs_model.types import Memory, Row, Sample, ScoreTable, Task


@dataclass(frozen=True)
class Replay(RehearsalMethod):
    """`base` trains; the memory keeps `samples_per_class` random samples of every class."""

    base: Method = knob(Finetune(), acts=("train", "consolidate"))  # the losses
    samples_per_class: int = knob(5, acts="remember", at_least=1)  # k; CMR's budget

    def rows_expected(self, num_classes: int) -> int:
        return num_classes * self.samples_per_class

    def remember(self, scores: ScoreTable | None, memory: Memory, task: Task, rng: np.random.Generator) -> Memory:
        return memory.extended(random_rows(task.train, task.new_classes, self.samples_per_class, rng))


def random_rows(
    samples: Iterable[Sample], classes: Iterable[int], per_class: int, rng: np.random.Generator
) -> dict[int, tuple[Row, ...]]:
    """Per class `per_class` of the samples that contain it (all, if fewer), uniformly and without repeats.

    Depends on the set of samples and on `rng`, not on the samples' order; with the same `rng`, a smaller `per_class` gives a
    prefix of what a larger one gives. A class that no sample contains gets no rows.
    """
    samples = tuple(samples)
    chosen = {}
    for class_id in classes:
        ids = sorted(sample.id for sample in samples if class_id in sample.classes)
        chosen[class_id] = tuple(Row(ids[position], class_id) for position in rng.permutation(len(ids))[:per_class])
    return chosen
