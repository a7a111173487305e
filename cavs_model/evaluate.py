"""Passes over data with trained models: pixel counts, and the scores and measures of parameters that methods ask for.

Any shard of whole batches gives the same numbers as the whole pass: what a batch holds depends on the list of samples and
`batch_size` alone, so results from many tasks are joined without a trace of how the work was shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cavs_model.checkpoint import Checkpoint, read_method_state, save_method_state
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.cache import DecodedSplit, open_split, renumbering
from cavs_model.methods.base import Method
from cavs_model.metrics import confusion, frame_sums
from cavs_model.types import Batch, LabelRule, Network, Prediction, ScoreTable, Task
from cavs_model.worker import Arithmetic, Precision, arithmetic, prefetch

CONSOLIDATE_CLIPS = 64  # of a chunk whose measures are summed in one place; fixed, so that every place rounds alike


@dataclass(frozen=True)
class Data:
    """Where labelled clips come from: a benchmark, its decoded cache, and the order in which its classes are learned."""

    benchmark: Benchmark
    cache: str  # absolute path; cache.open_split
    learned_order: tuple[str, ...]
    audio_features: str = ""  # which vectors of sound its batches have; vggish.feature_name, none by default

    def open(self, split: str) -> DecodedSplit:
        """The decoded split. InputError where the cache is not complete."""
        return open_split(self.benchmark, split, self.cache, self.audio_features)

    def table(self, rule: LabelRule) -> np.ndarray:
        """uint8 [256]: the benchmark's label -> the visible learned label."""
        table: np.ndarray = rule.table()[renumbering(self.benchmark.class_names(), self.learned_order)]
        return table


@dataclass(frozen=True)
class ScoreJob:
    """Scores of a task's training samples: collisions by the old model ("before") or consistency of the new ones ("after")."""

    stage: Literal["before", "after"]
    method: Method
    task: Task
    data: Data
    batch_size: int
    precision: Precision
    label: str = ""  # for whoever watches; not part of the result

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.task.train)


@dataclass(frozen=True)
class EvaluateJob:
    """Counts of a split under a rule, classes in learned ids: of all its pixels, or frame by frame."""

    split: str
    sample_ids: tuple[str, ...]
    rule: LabelRule
    num_classes: int
    data: Data
    batch_size: int
    precision: Precision
    label: str = ""
    measure: Literal["pixels", "frames"] = "pixels"


@dataclass(frozen=True)
class ConsolidateJob:
    """What a method keeps of a network's parameters after a task, from one pass over the task's training samples."""

    method: Method
    task: Task
    data: Data
    precision: Precision
    output: str = ""  # directory the state goes to
    label: str = ""

    @property
    def chunks(self) -> tuple[tuple[str, ...], ...]:
        """The samples, cut in the same way wherever they are measured."""
        ids = tuple(sample.id for sample in self.task.train)
        return tuple(ids[start : start + CONSOLIDATE_CLIPS] for start in range(0, len(ids), CONSOLIDATE_CLIPS))


def score_samples(
    job: ScoreJob, checkpoints: Mapping[str, Checkpoint], sample_ids: Sequence[str], device: torch.device
) -> ScoreTable:
    """Scores `sample_ids` (whole batches of the job's list) with all the networks given, in one pass over the data."""
    numbers = arithmetic(job.precision, device)
    networks = {name: frozen(checkpoint.model(), numbers) for name, checkpoint in checkpoints.items()}
    score = job.method.score_before if job.stage == "before" else job.method.score_after
    split = job.data.open("train")
    table = job.data.table(job.task.train_rule)
    return ScoreTable.concatenate(
        [score(networks, batch, job.task) for batch in passes(split, sample_ids, table, job.batch_size, device)]
    )


def evaluate(job: EvaluateJob, checkpoint: Checkpoint, sample_ids: Sequence[str], device: torch.device) -> np.ndarray:
    """Sums over `sample_ids`: confusion counts int64 [C C] (row = truth, column = prediction) of all labelled pixels.

    Where the job measures frames, metrics.frame_sums int64 [C+1 3] instead.
    """
    network = frozen(checkpoint.model(), arithmetic(job.precision, device))
    batches = passes(job.data.open(job.split), sample_ids, job.data.table(job.rule), job.batch_size, device)
    measure = confusion if job.measure == "pixels" else frame_sums
    return count(network, batches, job.num_classes, device, measure).cpu().numpy()


def measure_samples(
    job: ConsolidateJob, checkpoint: Checkpoint, sample_ids: Sequence[str], device: torch.device
) -> dict[str, np.ndarray]:
    """The sums over `sample_ids` (a chunk of the job's) of what the method measures, float64, by parameter.

    One clip at a time, with gradients, in evaluation mode: no clip's measure depends on another.
    """
    numbers = arithmetic(job.precision, device)
    model = numbers.place(checkpoint.model().requires_grad_(True))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def network(batch: Batch) -> Prediction:
        with numbers.autocast():
            return model(batch)  # type: ignore[no-any-return]

    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    clips = passes(job.data.open("train"), sample_ids, job.data.table(job.task.train_rule), 1, device)
    with numbers.exact():
        for clip in clips:
            for name, value in job.method.measure(network, parameters, clip, job.task).items():
                sums[name] += value
    return {name: total.detach().cpu().contiguous().numpy() for name, total in sums.items()}


def consolidate(job: ConsolidateJob, sums: Iterable[Mapping[str, np.ndarray]], previous: str | None) -> None:
    """Writes the method's state after a task from the sums of all chunks, in their order, and the `previous` state's folder.

    InputError where that state is missing or damaged.
    """
    totals: dict[str, np.ndarray] = {}
    for part in sums:
        for name, values in part.items():
            totals[name] = totals[name] + values if name in totals else values
    means = {name: torch.from_numpy(total / len(job.task.train)) for name, total in totals.items()}
    before = read_method_state(Path(previous)) if previous else None
    save_method_state(Path(job.output), job.method.consolidate(means, before))


def count(
    network: Network,
    batches: Iterator[Batch],
    num_classes: int,
    device: torch.device,
    measure: Callable[[Tensor, Tensor, int], Tensor] = confusion,
) -> Tensor:
    """Confusion counts int64 [C C] of a network over batches, or the sums of another measure of (prediction, label, C)."""
    no_frame = torch.zeros(0, 1, 1, dtype=torch.int64, device=device)
    counts = measure(no_frame, no_frame, num_classes)
    for batch in batches:
        counts += measure(network(batch).classes, batch.label, num_classes)
    return counts


def frozen(model: nn.Module, numbers: Arithmetic) -> Network:
    """A network for reading only: on its device, in evaluation mode, without gradients, in the job's arithmetic."""
    model = numbers.place(model.eval().requires_grad_(False))

    def network(batch: Batch) -> Prediction:
        # Not inference_mode: losses save the teacher's maps for the student's backward pass.
        with torch.no_grad(), numbers.exact(), numbers.autocast():
            return model(batch)  # type: ignore[no-any-return]

    return network


def passes(
    split: DecodedSplit, sample_ids: Sequence[str], table: np.ndarray, batch_size: int, device: torch.device
) -> Iterator[Batch]:
    """The samples in order, as batches on the device."""
    shards = [sample_ids[start : start + batch_size] for start in range(0, len(sample_ids), batch_size)]

    def load(ids: Sequence[str]) -> Batch:
        return split.batch(ids, [False] * len(ids), [table] * len(ids)).trimmed().pinned_for(device)

    for batch in prefetch(shards, load):
        yield batch.to(device)
