"""The backend's verbs in this process: for debugging, for laptops without Ray, and as the reference Ray is tested against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets import cache
from cavs_model.datasets.base import Benchmark
from cavs_model.evaluate import ConsolidateJob, EvaluateJob, ScoreJob, consolidate, evaluate, measure_samples, score_samples
from cavs_model.train import TaskJob, train_task
from cavs_model.types import ScoreTable
from cavs_model.worker import LocalWorker, device_for
from orchestrator.experiment import Resources
from orchestrator.progress import BlockNotes, Observer, silent


@dataclass(frozen=True)
class LocalBackend:
    """One process, one worker, with the threads and the device of `resources`. `cache_root` holds the decoded clips."""

    cache_root: Path
    resources: Resources = field(default_factory=Resources)
    observer: Observer = silent

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        notes = BlockNotes(benchmark.name, self.observer)
        cache.build(benchmark, splits, self.cache_root, _pool_map, audio_weights, notes)
        return str(self.cache_root)

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        for job in jobs:
            train_task(job, LocalWorker(self._device(), self.observer))
        return [job.output for job in jobs]

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        models = {network: checkpoint.read(Path(path)) for network, path in checkpoints.items()}
        return score_samples(job, models, job.sample_ids, self._device())

    def consolidate(self, job: ConsolidateJob, checkpoint_path: str, previous: str | None) -> str:
        model, device = checkpoint.read(Path(checkpoint_path)), self._device()
        consolidate(job, (measure_samples(job, model, chunk, device) for chunk in job.chunks), previous)
        return job.output

    def evaluate(self, job: EvaluateJob, checkpoint_path: str) -> np.ndarray:
        return evaluate(job, checkpoint.read(Path(checkpoint_path)), job.sample_ids, self._device())

    def about(self, checkpoint_path: str) -> About:
        return checkpoint.read_about(Path(checkpoint_path))

    def _device(self) -> torch.device:
        torch.set_num_threads(self.resources.cpus_per_worker)
        return device_for(self.resources.gpus_per_worker)


def _pool_map(function: Callable[..., Any], jobs: Iterable[Any]) -> Iterator[Any]:
    """Like map, on all cores. Processes are spawned: a fork would copy the threads' locks of torch."""
    listed = list(jobs)
    if not listed:
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(function, listed)
