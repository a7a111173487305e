"""The one training loop: a task, a network, a method, on any number of workers.

Optimiser and schedule follow the CMR authors' release (Adam 1e-4, constant, batch norm in training mode); every constant is
a field of `Schedule`. The objective is the sum of the method's named means, each over the batch of all workers together.

A task that was interrupted goes on after an epoch that it ended, to the same bits on a CPU. No random state is kept for that:
nothing in the loop draws from a global one, and the batches of an epoch are a function of seed, task and epoch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cavs_model import checkpoint
from cavs_model.datasets.cache import DecodedSplit
from cavs_model.errors import InputError, unknown
from cavs_model.evaluate import Data, count, frozen, passes
from cavs_model.methods.base import Method, acting
from cavs_model.metrics import iou
from cavs_model.networks.av_segmenter import AVSegmenter, NetworkConfig, build
from cavs_model.types import Batch, Mean, Network, Paste, Row, Step, Task
from cavs_model.worker import Arithmetic, Precision, Worker, arithmetic, epoch_batches, my_part, prefetch


@dataclass(frozen=True)
class Schedule:
    """How long and how fast a task is learned, and which of its epochs is kept (`selection`).

    Where validation shows none of a task's current classes, "best_val" has nothing to go by: it keeps the last epoch, and a
    note tells of it.
    """

    epochs: int = 30  # of every task after the base task
    base_epochs: int = 30  # of the base task
    batch_size: int = 16  # clips over all workers
    learning_rate: float = 1e-4  # Adam, without weight decay
    decay: Literal["constant", "cosine"] = "constant"  # of the learning rate over a task, per step
    selection: Literal["last", "best_val"] = "last"  # best_val: mean val IoU of the current classes, as the release
    selection_from: float = 0.5  # the part of the epochs after which best_val starts to look

    def __post_init__(self) -> None:
        for name in ("epochs", "base_epochs", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"schedule.{name} must be positive, not {getattr(self, name)!r}")
        if self.decay not in ("constant", "cosine"):
            raise unknown("schedule.decay", self.decay, ("constant", "cosine"))
        if self.selection not in ("last", "best_val"):
            raise unknown("schedule.selection", self.selection, ("last", "best_val"))
        if not 0 <= self.selection_from < 1:
            raise InputError(f"schedule.selection_from must lie in [0, 1), not {self.selection_from!r}")

    def epochs_of(self, task: Task) -> int:
        return self.base_epochs if task.is_base else self.epochs

    def rate(self, progress: float) -> float:
        """The learning rate when `progress` in [0, 1) of a task's steps are done."""
        return self.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)) if self.decay == "cosine" else 1.0)


@dataclass(frozen=True)
class Seeds:
    """Separate sources of chance, so that one can be varied while the others stay (class order has its own: Scenario)."""

    init: int  # weights of new layers and rows
    data: int  # order of the samples
    memory: int  # draws of selection and resampling


@dataclass(frozen=True)
class TaskJob:
    """All that determines a network after a task, except for the place and the number of workers."""

    network: str
    task: Task
    data: Data
    rows: tuple[Row, ...]  # of the memory, to be learned beside the task's samples
    method: Method
    config: NetworkConfig
    schedule: Schedule
    precision: Precision
    seeds: Seeds
    start: str | None  # the same network's checkpoint after the previous task; None on the base task
    output: str = ""  # directory the checkpoint goes to
    label: str = ""  # for whoever watches; not part of the result
    pastes: tuple[Paste, ...] = ()  # stored instances to be worked into the task's samples
    method_state: str | None = None  # what the method kept of the network `start` (checkpoint.read_method_state)
    # Where an interrupted task finds what it left, a directory that all workers see and its owner removes; "" is nowhere. Not
    # part of the result, as the least time from one such note to the next, at the ends of epochs.
    resume: str = ""
    resume_seconds: float = 60.0

    @property
    def num_samples(self) -> int:
        """Clips of one epoch."""
        return len(self.task.train) + len(self.rows)

    @property
    def cost_per_clip(self) -> float:
        """Cost of a clip's training pass in passes of the base task, which has no teacher."""
        return TEACHER_COST if self.has_teacher else 1.0

    @property
    def has_teacher(self) -> bool:
        """Whether the previous network is run beside the one that learns."""
        return self.start is not None and self.method.needs_teacher


TEACHER_COST = 1.67  # of a PLOP step against a plain one, 96 px on a CPU: 36.2 against 21.7 ms a clip; for estimates only
PULSE_SECONDS = 5.0  # how often an epoch tells how far it is
RESUME_SHARE = 0.05  # of the time at most goes into keeping what a task could go on from


class DivergedError(RuntimeError):
    """The loss or a weight is no longer a number."""


class Adam(torch.optim.Adam):
    """torch's, without what keeps its methods out of compiled graphs: that imports the compiler, for a second in each process.

    Nothing here compiles an optimiser. The numbers are torch's, to the bit.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)


def planned_samples(method: Method, task: Task) -> int:
    """Clips of one epoch of a task as far as they are known before its stream begins; for estimates of time only."""
    return len(task.train) + (0 if task.is_base else method.rows_expected(task.num_old - 1))


def train_task(job: TaskJob, worker: Worker) -> None:
    """Trains the job's network and writes its checkpoint (rank 0).

    With `job.resume`, goes on from what an interrupted run of the same job left there, on any number of workers.
    Raises InputError for a start checkpoint or a method's state that does not fit the job, DivergedError where a loss term or,
    at the end of an epoch, a weight is not finite.
    """
    started = time.monotonic()
    numbers = arithmetic(job.precision, worker.device)
    with numbers.exact():
        _train(job, worker, numbers, started)


def _train(job: TaskJob, worker: Worker, numbers: Arithmetic, started: float) -> None:
    split = job.data.open("train")
    student = _student(job)
    # Adam's state must be created for parameters that already lie where they are trained.
    numbers.place(student)
    model = worker.wrap(student)
    teacher = frozen(checkpoint.load(Path(job.start)), numbers) if job.start and job.has_teacher else None
    prepared = _prepare(job, worker, teacher, split)
    penalty = _penalty(job, worker, student)
    optimiser = Adam(student.parameters(), lr=job.schedule.learning_rate, fused=True)
    choice = _Choice(job, worker, numbers)
    history: list[Mapping[str, float]] = []
    epochs = job.schedule.epochs_of(job.task)
    resumption = _Resumption(job, worker, numbers, started)
    for epoch in range(resumption.restore(student, optimiser, choice, history), epochs):
        model.train()
        pulse = _Pulse(job, worker, epoch)
        batches = _epoch(job, worker, split, epoch)
        sums: dict[str, Tensor] = {}
        for step, batch in enumerate(batches.loaded):
            for group in optimiser.param_groups:
                group["lr"] = job.schedule.rate((epoch + step / batches.steps) / epochs)
            with numbers.autocast():
                prediction = model(batch)
            known = teacher(batch) if teacher else None
            terms = global_means(job.method.loss(Step(batch, prediction, known, job.task, prepared)) | penalty(), worker)
            optimiser.zero_grad(set_to_none=True)
            # Data-parallel training averages gradients over workers; every term is already this worker's part of the mean.
            (sum(terms.values(), start=torch.zeros((), device=worker.device)) * worker.world_size).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=worker.device)) + value.detach()
            pulse.beat((step + 1) / batches.steps)
        record = _mean_terms(sums, batches.steps, worker)
        history.append(record)
        if not all(math.isfinite(value) for value in record.values()):
            raise DivergedError(f"{job.label or job.network}: loss is not finite in epoch {epoch + 1} of {epochs}: {record}")
        # The loss of a step is that before it: what the epoch's last step did shows in the weights alone.
        if name := _not_finite(student):
            raise DivergedError(f"{job.label or job.network}: {name} is not finite after epoch {epoch + 1} of {epochs}")
        choice.look(student, epoch, epochs)
        resumption.keep(student, optimiser, choice, history)
        pulse.end(record["loss"])
    if worker.rank == 0:
        about = checkpoint.About(
            job.network,
            job.task.num_classes,
            asdict(job.config),
            tuple(history),
            clips=epochs * job.num_samples,
            seconds=resumption.worker_seconds() / worker.world_size,
            world_size=worker.world_size,
            classes=job.data.learned_order,
            image_size_px=job.data.benchmark.image_size_px,
            frames=job.data.benchmark.frames,
        )
        checkpoint.save(Path(job.output), choice.weights or student.state_dict(), about)


def global_means(terms: Mapping[str, Mean], worker: Worker) -> dict[str, Tensor]:
    """This worker's additive parts of the means over all workers: local total / sum of all workers' counts."""
    counts = torch.stack([torch.as_tensor(mean.count, dtype=torch.float32, device=worker.device) for mean in terms.values()])
    # A mean over nothing is zero: its total is an empty sum.
    counts = worker.all_reduce(counts.detach()).clamp(min=1e-12)
    return {name: mean.total / counts[index] for index, (name, mean) in enumerate(terms.items())}


def _student(job: TaskJob) -> AVSegmenter:
    """The network to be trained: new on the base task, else the previous one with rows for the new classes."""
    with torch.random.fork_rng(devices=[]):
        name = f"{job.seeds.init}/{job.network}/{job.task.index}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]))
        if job.start is None:
            return build(job.config, job.task.num_classes, job.network)
        about = checkpoint.read_about(Path(job.start))
        expected = (job.network, job.task.num_old)
        if (about.network, about.num_classes) != expected:
            raise InputError(f"checkpoint {job.start} holds {(about.network, about.num_classes)}, task needs {expected}")
        # The numbers of new rows come after those of a whole new network in the series that the seed begins.
        student = checkpoint.load(Path(job.start), draws=True).requires_grad_(True)
        student.classifier.grow(job.task.num_classes)
    with torch.no_grad():
        job.method.init_new_classes(student.classifier.conv, job.task)
    return student


def _prepare(job: TaskJob, worker: Worker, teacher: Network | None, split: DecodedSplit) -> object:
    if teacher is None:
        return None
    ids = [sample.id for sample in job.task.train][worker.rank :: worker.world_size]
    batches = passes(split, ids, job.data.table(job.task.train_rule), job.schedule.batch_size, worker.device)
    return job.method.prepare(teacher, batches, job.task, worker.all_reduce)


def _penalty(job: TaskJob, worker: Worker, student: nn.Module) -> Callable[[], dict[str, Mean]]:
    """The method's terms of the student's parameters as they are when it is called; none without a method's state.

    InputError where the state is not that of the parameters that are trained.
    """
    if job.start is None or job.method_state is None:
        return dict
    learning = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    first = dict(checkpoint.load(Path(job.start)).named_parameters())
    start = {name: first[name].detach().to(worker.device) for name in learning}
    state = {name: each.to(worker.device) for name, each in checkpoint.read_method_state(Path(job.method_state)).items()}
    for name in sorted({*start, *state}):
        shapes = [tuple(side[name].shape) if name in side else "nothing" for side in (state, start)]
        if shapes[0] != shapes[1]:
            path = Path(job.method_state) / checkpoint.METHOD_STATE
            raise InputError(f"method state {path} has {shapes[0]} for {name}, checkpoint {job.start} {shapes[1]}")
    return lambda: job.method.penalty(learning, start, state)


@dataclass(frozen=True)
class _Epoch:
    loaded: Iterator[Batch]
    steps: int


def _epoch(job: TaskJob, worker: Worker, split: DecodedSplit, epoch: int) -> _Epoch:
    """This worker's part of every batch of an epoch: the task's samples and the memory's rows, shuffled together.

    What is to be pasted into the task's samples is there.
    """
    new, seen = job.data.table(job.task.train_rule), job.data.table(job.task.seen_rule)
    items = [(sample.id, False) for sample in job.task.train] + [(row.sample_id, True) for row in job.rows]
    batches = epoch_batches(items, job.schedule.batch_size, (job.seeds.data, job.task.index, epoch))
    mine = [my_part(batch, worker.rank, worker.world_size) for batch in batches]
    pastes: dict[str, list[Paste]] = {}
    for paste in job.pastes:
        pastes.setdefault(paste.sample_id, []).append(paste)

    def load(part: Sequence[tuple[str, bool]]) -> Batch:
        ids, rehearsed = zip(*part, strict=True)
        batch = split.batch(ids, rehearsed, [seen if again else new for again in rehearsed])
        due = [(place, paste) for place, (each, again) in enumerate(part) if not again for paste in pastes.get(each, ())]
        if due:
            stored = split.batch([paste.instance_id for _, paste in due], [True] * len(due), [seen] * len(due))
            batch = job.method.compose(batch, stored, [(place, paste.class_id) for place, paste in due])
        return batch.trimmed().pinned_for(worker.device)

    return _Epoch((batch.to(worker.device) for batch in prefetch(mine, load)), len(batches))


def _mean_terms(sums: Mapping[str, Tensor], steps: int, worker: Worker) -> dict[str, float]:
    """Mean of each term over the epoch's steps and all workers, and of their sum under the name "loss"."""
    values = (worker.all_reduce(torch.stack(list(sums.values()))) / steps).tolist()
    return {"loss": sum(values), **dict(zip(sums, values, strict=True))}


class _Pulse:
    """Tells how far an epoch is: every few seconds a "steps" event, at its end an "epoch" event, for whoever watches.

    "work" is what was done in the "seconds" since the last event, in planned clip passes of the base task.
    """

    def __init__(self, job: TaskJob, worker: Worker, epoch: int) -> None:
        self._job, self._worker, self._epoch = job, worker, epoch
        self._started = self._told = time.monotonic()
        self._done = 0.0

    def beat(self, done: float) -> None:
        """After a step; `done` is the part of the epoch in [0, 1]."""
        if time.monotonic() - self._told >= PULSE_SECONDS:
            self._tell("steps", done)

    def end(self, loss: float) -> None:
        """After the epoch, with its mean loss."""
        self._tell("epoch", 1.0, loss=loss)

    def _tell(self, kind: str, done: float, **more: float) -> None:
        job, now = self._job, time.monotonic()
        self._worker.report(
            {
                "kind": kind,
                "label": job.label,
                "epoch": self._epoch + 1,
                "epochs": job.schedule.epochs_of(job.task),
                "work": (done - self._done) * planned_samples(job.method, job.task) * job.cost_per_clip,
                "seconds": now - self._told,
                "clips_per_second": done * job.num_samples / max(now - self._started, 1e-9),
                **more,
            }
        )
        self._told, self._done = now, done


class _Choice:
    """Keeps the weights of the best late epoch where the schedule asks for it (the CMR release's model selection)."""

    def __init__(self, job: TaskJob, worker: Worker, numbers: Arithmetic) -> None:
        self.weights: dict[str, Tensor] = {}
        self.best = -1.0
        self._told = False
        self._job, self._worker, self._numbers = job, worker, numbers

    def look(self, student: nn.Module, epoch: int, epochs: int) -> None:
        job, worker = self._job, self._worker
        if job.schedule.selection == "last" or epoch + 1 <= job.schedule.selection_from * epochs:
            return
        split = job.data.open("val")
        ids = split.sample_ids[worker.rank :: worker.world_size]
        batches = passes(split, ids, job.data.table(job.task.current_rule), job.schedule.batch_size, worker.device)
        student.eval()
        with torch.no_grad():
            counts = worker.all_reduce(count(_running(student, self._numbers), batches, job.task.num_classes, worker.device))
        score = float(iou(counts.cpu())[job.task.new_classes.start :].nanmean())
        if math.isnan(score) and not self._told:
            _note(job, worker, "schedule.selection = best_val, and validation shows no current class: keeps the last epoch")
            self._told = True
        if score > self.best:
            self.best = score
            self.weights = {name: tensor.detach().clone() for name, tensor in student.state_dict().items()}


class _Resumption:
    """What of a task is kept for one that is interrupted, and the way back from it."""

    def __init__(self, job: TaskJob, worker: Worker, numbers: Arithmetic, started: float) -> None:
        self._job, self._worker, self._started = job, worker, started
        self._folder = Path(job.resume)
        self._digest = _digest(job, numbers) if job.resume else ""
        self._spent = 0.0  # worker-seconds of the epochs that were not trained here
        self._due = started + job.resume_seconds

    def worker_seconds(self) -> float:
        """What the task took so far, in all runs, epochs that were lost left out."""
        return self._spent + (time.monotonic() - self._started) * self._worker.world_size

    def restore(
        self, student: nn.Module, optimiser: torch.optim.Optimizer, choice: _Choice, history: list[Mapping[str, float]]
    ) -> int:
        """Puts everything as an interrupted run of this job left it; the epochs it ended, 0 where nothing was restored.

        What another job left or is damaged is removed, with a note. Nobody writes before the first epoch ends, which no worker
        does alone, so that all read the same; workers that do not, on nodes without a common folder, start anew together.
        """
        if not self._job.resume:
            return 0
        found, why = self._read(student)
        mine = found.epochs if found else 0
        one, square = self._worker.all_reduce(torch.tensor([mine, mine * mine])).tolist()
        if self._worker.world_size * square != one * one:
            found, why = None, "not all workers see the same there"
        if why:
            self._note(f"{why}: the task starts anew")
            if self._worker.rank == 0:
                checkpoint.remove_interim(self._folder)
        if found is None:
            return 0
        student.load_state_dict(_under("student", found.tensors))
        for name, parameter in student.named_parameters():
            state = _under(f"optimiser/{name}", found.tensors)
            if state:
                # In the layout that Adam gives them itself; another one may round otherwise.
                optimiser.state[parameter] = {
                    key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                    for key, value in state.items()
                }
        choice.best, choice.weights = found.best, _under("best", found.tensors)
        history.extend(found.history)
        self._spent = found.worker_seconds
        self._note(f"goes on after epoch {found.epochs} of {self._job.schedule.epochs_of(self._job.task)}")
        return found.epochs

    def keep(
        self, student: nn.Module, optimiser: torch.optim.Optimizer, choice: _Choice, history: Sequence[Mapping[str, float]]
    ) -> None:
        """At the end of an epoch, where it is time: notes all that the next one depends on. Rank 0 alone."""
        begun = time.monotonic()
        if not self._job.resume or self._worker.rank or begun < self._due:
            return
        tensors = {f"student/{name}": value for name, value in student.state_dict().items()}
        for name, parameter in student.named_parameters():
            tensors |= {f"optimiser/{name}/{key}": value for key, value in optimiser.state.get(parameter, {}).items()}
        tensors |= {f"best/{name}": value for name, value in choice.weights.items()}
        spent = self.worker_seconds()
        interim = checkpoint.Interim(self._digest, len(history), tuple(history), spent, choice.best, tensors)
        try:
            checkpoint.save_interim(self._folder, interim)
        except OSError as error:
            self._note(f"cannot keep in {self._folder} what the task could go on from: {error.strerror}; it goes on without")
        took = time.monotonic() - begun
        self._due = begun + took + max(self._job.resume_seconds, took / RESUME_SHARE if self._job.resume_seconds else 0.0)

    def _read(self, student: nn.Module) -> tuple[checkpoint.Interim | None, str]:
        """What this job left, or why what is there cannot be used ("" where nothing is there)."""
        try:
            found = checkpoint.read_interim(self._folder)
        except InputError as error:
            return None, str(error)
        if found is None:
            return None, ""
        if found.job != self._digest:
            return None, f"{self._folder} was left by another job"
        left = {name: value.shape for name, value in _under("student", found.tensors).items()}
        if left != {name: value.shape for name, value in student.state_dict().items()} or found.epochs != len(found.history):
            return None, f"what {self._folder} holds does not fit the job"
        return found, ""

    def _note(self, text: str) -> None:
        _note(self._job, self._worker, text)


def _note(job: TaskJob, worker: Worker, text: str) -> None:
    worker.report({"kind": "note", "label": job.label, "text": f"{job.label or job.network}: {text}"})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}/")}


def _digest(job: TaskJob, numbers: Arithmetic) -> str:
    """Of all that the epochs of a job depend on, files by their content; the number of workers is not part of it."""
    schedule = asdict(job.schedule)
    for name in ("base_epochs", *(("selection_from",) if job.schedule.selection == "last" else ())):
        del schedule[name]
    parts = {
        "network": job.network,
        "task": asdict(job.task),
        "data": [job.data.benchmark.fingerprint(), job.data.learned_order, job.data.audio_features],
        "rows": [(row.sample_id, row.class_id) for row in job.rows],
        "pastes": [asdict(paste) for paste in job.pastes],
        "method": acting(job.method, "train"),
        "config": asdict(job.config),
        "schedule": schedule | {"epochs": job.schedule.epochs_of(job.task)},
        "bf16": numbers.bf16,
        "seeds": [job.seeds.init, job.seeds.data],
        "start": job.start and hashlib.sha256(checkpoint.read(Path(job.start)).weights).hexdigest(),
        "method_state": job.method_state
        and hashlib.sha256((Path(job.method_state) / checkpoint.METHOD_STATE).read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _not_finite(model: nn.Module) -> str:
    """The name of a parameter or buffer with a value that is not finite, "" where there is none."""
    values = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    fine = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    return next((name for name, good in zip(values, fine, strict=True) if not good), "")


def _running(model: nn.Module, numbers: Arithmetic) -> Network:
    """A network that is still being trained, read in the job's arithmetic."""

    def network(batch: Batch) -> object:
        with numbers.autocast():
            return model(batch)

    return network  # type: ignore[return-value]
