"""The continual protocol (CMR, sections 3 and 4), task after task. Knows no Ray and no MLflow: the backend does the work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from cavs_model.checkpoint import About
from cavs_model.datasets.base import Benchmark
from cavs_model.datasets.cache import record_type
from cavs_model.evaluate import ConsolidateJob, Data, EvaluateJob, ScoreJob
from cavs_model.methods.finetune import Finetune
from cavs_model.metrics import diagnoses, frame_summary, stream_summary, summary
from cavs_model.networks.av_segmenter import check_weights
from cavs_model.networks.vggish import feature_name
from cavs_model.networks.visual_encoders import check_sides
from cavs_model.train import Seeds, TaskJob
from cavs_model.types import AUDIO_VISUAL, Memory, Rehearsal, ScoreTable, State, Task
from orchestrator.experiment import Experiment


class Backend(Protocol):
    """Who does the work. The same verbs in this process and on a cluster, with the same results."""

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        """Renders or decodes what is missing of the splits; the absolute path of the cache.

        With `audio_weights` also what the frozen sound network says of them (NetworkConfig.frozen_sound).
        """

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        """Trains the networks of one task, side by side where resources allow; their checkpoints' directories."""

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        """Scores the task's samples, in the job's order, with the networks in these directories, which may be none."""

    def consolidate(self, job: ConsolidateJob, checkpoint: str, previous: str | None) -> str:
        """What the method keeps of the network in this directory, after what it kept before; the directory it lies in."""

    def evaluate(self, job: EvaluateJob, checkpoint: str) -> np.ndarray:
        """Confusion counts int64 [C C]; where the job measures frames, metrics.frame_sums int64 [C+1 3]."""

    def about(self, checkpoint: str) -> About:
        """What a checkpoint says of itself."""


@dataclass(frozen=True)
class TaskOutcome:
    """Everything a task left behind. `counts` maps a split to its confusion counts int64 [C C].

    `frames` maps it to its metrics.frame_sums where the experiment asks for means over frames.
    """

    seed: int
    task: Task
    num_tasks: int
    class_names: tuple[str, ...]  # learned order, background first
    num_base: int  # classes of the base task, background included
    state: State
    before: ScoreTable | None
    rehearsal: Rehearsal
    after: ScoreTable | None
    trained: Mapping[str, About]
    counts: Mapping[str, np.ndarray]
    memory_bytes: int
    first_epoch: int  # epochs of the tasks before: losses of all tasks form one curve
    earlier: tuple[Mapping[str, list[list[int]]], ...] = ()  # `counts` of the tasks before, as plain numbers
    frames: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        return self.task.index == self.num_tasks - 1

    def metrics(self) -> dict[str, float]:
        """ "<split>/miou/all" and so on, for every evaluated split."""
        return {
            f"{split}/{name}": value
            for split, counts in self.counts.items()
            for name, value in summary(torch.from_numpy(counts), self.num_base).items()
        }

    def history(self, split: str) -> list[torch.Tensor]:
        """The split's confusion counts after every task so far."""
        return [*(torch.tensor(counts[split]) for counts in self.earlier), torch.from_numpy(self.counts[split])]

    def diagnoses(self) -> dict[str, float]:
        """ "<split>/drift/old", "<split>/stream/forgetting" and so on: what is logged but chooses nothing."""
        found: dict[str, float] = {}
        for split in self.counts:
            history = self.history(split)
            values = diagnoses(history[-1], self.num_base) | stream_summary(history)
            if split in self.frames:
                values |= frame_summary(torch.from_numpy(self.frames[split]))
            found |= {f"{split}/{name}": value for name, value in values.items()}
        return found

    def classes_json(self, benchmark: Benchmark) -> dict[str, object]:
        """What a network of this outcome is to be asked with: classes learned so far, and the shape of its clips."""
        learned = self.class_names[: self.task.num_classes]
        return {"classes": list(learned), "image_size_px": benchmark.image_size_px, "frames": benchmark.frames}

    def headline(self) -> str:
        """The outcome in a line."""
        shown = {name: value for name, value in self.metrics().items() if name.endswith(("/all", "/old", "/new"))}
        numbers = " ".join(f"{name} {value:.4f}" for name, value in shown.items())
        return f"seed {self.seed} task {self.task.index + 1}/{self.num_tasks} learned, {numbers}"


def run_stream(
    experiment: Experiment, seed: int, backend: Backend, splits: Sequence[str] = ("val",), label: str = ""
) -> Iterator[TaskOutcome]:
    """Learns the experiment's tasks one after another and yields after each. `splits` are evaluated after every task."""
    benchmark, scenario, method, schedule = experiment.benchmark, experiment.scenario, experiment.method, experiment.schedule
    tasks, seeds = scenario.tasks(benchmark), experiment.seeds_of(seed)
    order = scenario.learned_order(benchmark)
    needed = {"train", *splits, *(["val"] if schedule.selection == "best_val" else [])}
    check_weights(experiment.network)
    check_sides(benchmark.image_size_px, benchmark.image_size_px)
    sound = experiment.network.frozen_sound
    cache = backend.prepare(benchmark, sorted(needed), sound)
    data = Data(benchmark, cache, order, "" if sound is None else feature_name(sound))
    common = (data, schedule.batch_size, experiment.precision)
    state = State()
    earlier: tuple[Mapping[str, list[list[int]]], ...] = ()
    epochs = 0
    for task in tasks:
        name = f"{label}seed {seed} task {task.index + 1}/{len(tasks)}"
        last, known = task is tasks[-1], {AUDIO_VISUAL: state.checkpoints[AUDIO_VISUAL]} if state.checkpoints else {}

        # What to learn again: collisions of the old model with the new data decide (CSR).
        rehearses = method.remembers and not task.is_base
        before = None
        if rehearses and method.scores_before:
            before = backend.score(ScoreJob("before", method, task, *common, f"{name} collisions"), known)
        rehearsal = method.rehearse(before, state.memory, task, chance(seeds, task, 0)) if rehearses else Rehearsal()

        # On a base task every method is plain cross-entropy from the first weights, so all of them share its networks.
        learned = method.training_task(tasks[: task.index + 1])
        learner, start = (Finetune(), State()) if learned.is_base else (method, state)
        networks = (AUDIO_VISUAL,) if last else method.networks
        jobs = [
            TaskJob(network, learned, data, rehearsal.rows, learner, experiment.network, schedule, experiment.precision,
                    seeds, start.checkpoints.get(network), label=f"{name} {network}", pastes=rehearsal.pastes,
                    method_state=start.method_states.get(network), resume_seconds=experiment.resources.note_seconds)
            for network in networks
        ]  # fmt: skip
        checkpoints = dict(zip(networks, backend.train(jobs), strict=True))

        # What each parameter is worth to this task (EWC).
        method_states = {}
        if method.consolidates and not last:
            worth = ConsolidateJob(method, learned, data, experiment.precision, label=f"{name} consolidation")
            for network, path in checkpoints.items():
                method_states[network] = backend.consolidate(worth, path, start.method_states.get(network))

        # What to keep: the samples whose prediction the sound changes least (MSS). Nobody asks after the last task.
        memory, after = state.memory, None
        if method.remembers and not last:
            if method.scores_after:
                read = {network: checkpoints[network] for network in method.networks_after}
                after = backend.score(ScoreJob("after", method, task, *common, f"{name} consistency"), read)
            memory = method.remember(after, memory, task, chance(seeds, task, 1))
        state = State(checkpoints, memory, method_states)

        counts, frames = {}, {}
        for split in splits:
            ids = tuple(sample.id for sample in benchmark.samples(split))
            job = EvaluateJob(split, ids, task.seen_rule, task.num_classes, *common, f"{name} {split}")
            counts[split] = backend.evaluate(job, checkpoints[AUDIO_VISUAL])
            if experiment.per_frame:
                frames[split] = backend.evaluate(replace(job, measure="frames"), checkpoints[AUDIO_VISUAL])
        yield TaskOutcome(
            seed, task, len(tasks), ("background", *order), tasks[0].num_classes, state, before, rehearsal, after,
            {network: backend.about(path) for network, path in checkpoints.items()}, counts,
            memory_bytes(benchmark, memory), epochs, earlier, frames,
        )  # fmt: skip
        epochs += schedule.epochs_of(learned)
        earlier += ({split: found.tolist() for split, found in counts.items()},)


def chance(seeds: Seeds, task: Task, stage: int) -> np.random.Generator:
    """A source of draws for one stage of one task, so that draws of one stage never shift those of another."""
    return np.random.default_rng([seeds.memory, task.index, stage])


def memory_bytes(benchmark: Benchmark, memory: Memory) -> int:
    """Bytes of the distinct clips a memory holds, decoded."""
    return len(memory.sample_ids) * record_type(benchmark).itemsize
