"""The backend's verbs on a Ray cluster: Ray Train for training, Ray tasks for data, scores and evaluation.

One fit per task and network: nothing of a fit lives between the tasks of a stream, where a search may stop the trial.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray._private import auto_init_hook
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.controller.controller import TrainController
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cavs_model import checkpoint
from cavs_model.checkpoint import About, Checkpoint
from cavs_model.datasets import cache
from cavs_model.datasets.base import Benchmark
from cavs_model.errors import InputError
from cavs_model.evaluate import ConsolidateJob, EvaluateJob, ScoreJob, consolidate, evaluate, measure_samples, score_samples
from cavs_model.train import DivergedError, TaskJob, train_task
from cavs_model.types import ScoreTable
from cavs_model.worker import device_for, synchronise_batch_norm
from orchestrator.experiment import Resources
from orchestrator.node_metrics import Sample, Sampler
from orchestrator.orphans import remove_orphans
from orchestrator.progress import BlockNotes, Event, silent

WORKER_FAILURES = 3  # after which a fit whose workers die or cannot start, by whatever, is given up
WAIT_NOTE_SECONDS = 60.0  # between two notes that a fit waits for nodes
CHUNK_SECONDS = 1.0  # shorter Ray tasks cost more to hand out than to do
NODE_PATIENCE_SECONDS = 60.0  # a node that takes longer to say what it does is left out of a sample
SCORING_SPEEDUP = 3.0  # a pass without gradients against a training pass, roughly
WORKER_ENVIRONMENT = {
    # At the default poll interval of two seconds a fit takes ten seconds more than its work.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # How long a fit waits for room until it looks again which nodes are alive, for the price of a process: a node that was just
    # lost counts as alive for some seconds. That a second network waits for the workers of the first is no failure.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_V2_ENABLED": "1",
    # Each controller would set up its process's logging anew. Two of one process, as a task's two fits have, can then wait for
    # each other for ever: one holds logging's lock and wants a handler's, the other the reverse.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # Large tensors are otherwise mapped from the system and faulted in anew at every step: 7 % of a step on CPU, and more.
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483648",
}

PASSED_ON = ("RAY_AUTH_MODE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Cluster:
    """The cluster a driver is connected to."""

    address: str
    cpus: float
    gpus: float
    dashboard: str
    started_here: bool

    def describe(self) -> str:
        """The cluster in a line."""
        kind = "started a local Ray cluster" if self.started_here else f"joined the Ray cluster at {self.address}"
        dashboard = f", dashboard http://{self.dashboard}" if self.dashboard else ""
        return f"{kind} ({self.cpus:g} CPUs, {self.gpus:g} GPUs{dashboard})"

    @property
    def where(self) -> tuple[str, ...]:
        """Where to look at it."""
        return (f"Ray: http://{self.dashboard}",) if self.dashboard else ()

    def concurrent_jobs(self, resources: Resources) -> int:
        """Training jobs that fit at once. InputError that names the limiting resource where not even one does."""
        needs = {
            "CPU": (resources.workers * resources.cpus_per_worker, self.cpus),
            "GPU": (resources.workers * resources.gpus_per_worker, self.gpus),
        }
        found = {name: how_many_fit(there, wanted) for name, (wanted, there) in needs.items() if wanted}
        for name, count in found.items():
            if not count:
                wanted, there = needs[name]
                raise InputError(
                    f"resources: {resources.workers} workers need {wanted:g} {name}s, the cluster has {there:g}; "
                    "lower resources.workers (or cpus_per_worker, gpus_per_worker) or add nodes"
                )
        return min(found.values())


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive."""

    id: str
    host: str
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """Host and the beginning of the id: several nodes may run on one host."""
        return f"{self.host}/{self.id[:6]}"

    @property
    def size(self) -> str:
        """Its CPUs and GPUs."""
        return f"({self.cpus:g} CPUs, {self.gpus:g} GPUs)"

    def room(self, cpus_per_worker: float, gpus_per_worker: float) -> int:
        """How many workers fit onto it at once."""
        by_cpus = how_many_fit(self.cpus, cpus_per_worker)
        return min(by_cpus, how_many_fit(self.gpus, gpus_per_worker)) if gpus_per_worker else by_cpus


def how_many_fit(there: float, each: float) -> int:
    """How many times a positive amount is there: 5 times 0.2 in 1.0, which a division alone finds to be a little less."""
    return math.floor(there / each + 1e-9)


def nodes() -> list[Node]:
    """The connected cluster's nodes."""
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [
        Node(node["NodeID"], node["NodeManagerHostname"], each.get("CPU", 0.0), each.get("GPU", 0.0))
        for node in alive
        for each in (node["Resources"],)
    ]


def on_every_node(function: Callable[[], Any], seconds: float) -> dict[Node, Any]:
    """Per node what the function returns there, or the error: its own, Ray's, or TimeoutError after `seconds`.

    Nodes that are at work answer too: the function asks for no CPU.
    """
    call = _task(_call)
    references = {
        node: call.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(function)
        for node in nodes()
    }
    done, _ = ray.wait(list(references.values()), num_returns=len(references), timeout=seconds)
    answers: dict[Node, Any] = {}
    for node, reference in references.items():
        if reference not in done:
            ray.cancel(reference, force=True)
            answers[node] = TimeoutError(f"no answer in {seconds:.0f} s")
            continue
        try:
            answers[node] = ray.get(reference)
        except Exception as error:  # whatever is wrong with the node
            answers[node] = error
    return answers


def in_a_worker(function: Callable[[], Any], resources: Resources, seconds: float = 60.0) -> Any:
    """What the function returns in a process with the resources of one worker. TimeoutError where none begins in time."""
    call = _task(_call, resources.gpus_per_worker)
    options = {"scheduling_strategy": "DEFAULT", "num_cpus": resources.cpus_per_worker, "max_retries": 0}
    reference = call.options(**options).remote(function)
    done, _ = ray.wait([reference], timeout=seconds)
    if not done:
        ray.cancel(reference, force=True)
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return _get(reference)


def in_cluster() -> bool:
    """Whether a cluster is there to be joined: RAY_ADDRESS is set, by the user or by the job this process belongs to."""
    return bool(os.environ.get("RAY_ADDRESS"))


def resources() -> Mapping[str, float]:
    """What the connected cluster has in all, such as {"CPU": 2.0}."""
    return dict(ray.cluster_resources())  # type: ignore[no-untyped-call]


@contextmanager
def connected(verbose: bool = False) -> Iterator[Cluster]:
    """Joins the cluster at RAY_ADDRESS, or starts a local one with dashboard and token that ends with the block.

    Workers get WORKER_ENVIRONMENT, what is set here taking precedence, and PASSED_ON where it is set: a driver's variables do
    not reach them by themselves. InputError where there is no cluster to join.
    """
    started_here = not in_cluster()
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # the driver itself may start a fit
    variables = {name: os.environ[name] for name in (*WORKER_ENVIRONMENT, *PASSED_ON) if name in os.environ}
    # A job that sets one of them too would otherwise be refused, even where the values agree.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # A thread that outlives the block would start a cluster of its own. RAY_ENABLE_AUTO_CONNECT is read when ray is imported.
    auto_init_hook.enable_auto_connect = False
    handlers = _handlers()
    try:
        context = ray.init(
            address="local" if started_here else os.environ["RAY_ADDRESS"],
            runtime_env={"env_vars": variables},
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.WARNING,
            include_dashboard=True if started_here else None,
            # Ray ends idle processes when there are more than free CPUs: every count and score would import torch again.
            _system_config={"num_workers_soft_limit": os.cpu_count() or 1} if started_here else None,
        )
    except (ConnectionError, TimeoutError, ValueError, RuntimeError) as error:
        where = "start a local Ray cluster" if started_here else f"join the Ray cluster at {os.environ['RAY_ADDRESS']}"
        raise InputError(f"cannot {where}: {error}") from error
    _restore(handlers)  # Ray's own end the process there and then, and write the C++ stack to stderr
    try:
        there = resources()
        yield Cluster(
            ray.get_runtime_context().gcs_address,
            there.get("CPU", 0.0),
            there.get("GPU", 0.0),
            context.dashboard_url or "",
            started_here,
        )
    finally:
        ray.shutdown()


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@ray.remote(num_cpus=0)
class Mailbox:
    """Where trials and workers leave events for the one process that prints and logs them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._numbers: dict[str, int] = {}

    def post(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        """The events since the last call, in order of arrival."""
        events, self._events = self._events, []
        return events

    def number(self, trial: str) -> int:
        """1, 2, 3, ... in the order in which trials first ask; the same number when a trial asks again."""
        return self._numbers.setdefault(trial, len(self._numbers) + 1)


@dataclass(frozen=True)
class RayWorker:
    """One worker of a Ray Train group."""

    mailbox: Any = None

    @property
    def rank(self) -> int:
        return int(ray.train.get_context().get_world_rank())

    @property
    def world_size(self) -> int:
        return int(ray.train.get_context().get_world_size())

    @property
    def device(self) -> torch.device:
        return ray.train.torch.get_device()

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.world_size == 1:
            return model
        model = synchronise_batch_norm(model, self.device)
        # Batch statistics are the same everywhere already: nothing to broadcast before each step.
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,  # spares a second copy of all gradients
        )

    def all_reduce(self, value: Tensor) -> Tensor:
        if self.world_size == 1:
            return value
        total = value.to(self.device, copy=True)  # NCCL takes no CPU tensors
        torch.distributed.all_reduce(total)
        return total.to(value.device)

    def report(self, record: Event) -> None:
        if self.mailbox is not None and self.rank == 0:
            self.mailbox.post.remote(dict(record))


@dataclass(frozen=True)
class RayBackend:
    """The verbs on the connected cluster. `cache_root` and `scratch` must be readable from every node. Pickles."""

    cache_root: Path
    scratch: Path
    resources: Resources
    mailbox: Any = None

    def prepare(self, benchmark: Benchmark, splits: Sequence[str], audio_weights: str | None = None) -> str:
        notes = BlockNotes(benchmark.name, silent if self.mailbox is None else self.mailbox.post.remote)
        cache.build(benchmark, splits, self.cache_root, self._map_blocks, audio_weights, notes)
        return str(self.cache_root)

    def train(self, jobs: Sequence[TaskJob]) -> list[str]:
        pool = ThreadPoolExecutor(len(jobs), thread_name_prefix="fit")
        try:
            with in_an_actor(len(jobs)) as call:
                fits = [pool.submit(self._fit, job, call) for job in jobs]
                wait(fits)  # a network that can be learned is, whatever becomes of another
            return [fit.result() for fit in fits]
        finally:
            # After an interrupt the fits end with the connection, and not before: waiting for them here would be for ever.
            pool.shutdown(wait=False, cancel_futures=True)

    def score(self, job: ScoreJob, checkpoints: Mapping[str, str]) -> ScoreTable:
        models = {network: checkpoint.read(Path(path)) for network, path in checkpoints.items()}
        chunks = self._chunks(_score, ray.put(job), job.sample_ids, job.batch_size, models, job.label)
        return ScoreTable.concatenate(chunks)

    def consolidate(self, job: ConsolidateJob, checkpoint_path: str, previous: str | None) -> str:
        models = {"": checkpoint.read(Path(checkpoint_path))}
        streams = self._submit(_measure, ray.put(job), self._portions(job.chunks), models, job.label)
        # One at a time, and each is let go of at once: a chunk's sums are as large as the network.
        consolidate(job, (_get(reference) for stream in streams for reference in stream), previous)
        return job.output

    def evaluate(self, job: EvaluateJob, checkpoint_path: str) -> np.ndarray:
        models = {"": checkpoint.read(Path(checkpoint_path))}
        chunks = self._chunks(_evaluate, ray.put(job), job.sample_ids, job.batch_size, models, job.label)
        counts: np.ndarray = np.sum(chunks, axis=0)
        return counts

    def about(self, checkpoint_path: str) -> About:
        return checkpoint.read_about(Path(checkpoint_path))

    def _fit(self, job: TaskJob, call: Callable[[Callable[[], Any]], Any]) -> str:
        mailbox, threads = self.mailbox, self.resources.cpus_per_worker

        def loop() -> None:
            torch.set_num_threads(threads)
            train_task(job, RayWorker(mailbox))

        name, note = Path(job.output).name.strip("."), self._note_of(job)
        # What a process that was killed left of the same outcome, whose lock is ours now.
        for leftover in self.scratch.glob(f"{name.partition('.')[0]}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        failures, begun_with = 0, 0
        # The tries are counted here and not by Ray, which would repeat what fails in the same way every time. A further try
        # goes on from job.resume, on as many workers as there is room for by then.
        while True:
            workers = self._room(note)
            if workers != (begun_with or self.resources.workers):
                note(f"goes on with {workers} of {self.resources.workers} workers, which is what fits the nodes there are")
            begun_with = workers
            try:
                error: TrainingFailedError | None = call(partial(self._try, loop, name, workers))
            finally:
                shutil.rmtree(self.scratch / name, ignore_errors=True)
            if error is None:
                return job.output
            cause = _cause(error)
            if cause is not error:
                raise cause from error
            if isinstance(error, PreemptionError):
                note(f"its workers were preempted ({_line(error)})")
            elif not _found_no_room(error):
                failures += 1
                if failures > WORKER_FAILURES or not _by_a_worker(error):
                    raise error
                note(f"a worker failed and is replaced ({_line(error)})")

    def _room(self, note: Callable[[str], None]) -> int:
        """Workers that fit the nodes that are alive, at most `resources.workers`; waits for `resources.min_workers`.

        Whether others use the room now does not matter: they end, while a node that is lost may never come back.
        """
        told = float("-inf")
        while True:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
            found = sum(
                min(how_many_fit(node.get(kind, 0.0), amount) for kind, amount in self._per_worker.items()) for node in nodes
            )
            if found >= min(self.resources.min_workers, self.resources.workers):
                return min(found, self.resources.workers)
            if time.monotonic() - told > WAIT_NOTE_SECONDS:
                told = time.monotonic()
                note(f"waits: {found} workers fit the nodes there are, resources.min_workers is {self.resources.min_workers}")
            time.sleep(1)

    def _note_of(self, job: TaskJob) -> Callable[[str], None]:
        def note(text: str) -> None:
            if self.mailbox is not None:
                text = f"{job.label or job.network}: {text}"
                self.mailbox.post.remote({"kind": "note", "label": job.label, "text": text})

        return note

    @property
    def _per_worker(self) -> dict[str, float]:
        needs = {"CPU": float(self.resources.cpus_per_worker), "GPU": self.resources.gpus_per_worker}
        return {kind: amount for kind, amount in needs.items() if amount}

    def _try(self, loop: Callable[[], None], name: str, workers: int) -> TrainingFailedError | None:
        """One fit; why it failed, where a worker did or there was no room for a while (`_found_no_room`)."""
        trainer = _Trainer(
            loop,
            torch_config=_OverRaysAddresses(),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=self.resources.gpus_per_worker > 0,
                resources_per_worker=self._per_worker,
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(self.scratch),
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            return error
        return None

    def _map_blocks(self, function: Callable[..., Any], jobs: Iterable[Any]) -> Iterator[Any]:
        """Applies a function to jobs in Ray tasks, in any order of work; results in the order of the jobs."""
        shared = ray.put(function)
        references = [_task(_apply).options(scheduling_strategy="DEFAULT").remote(shared, job) for job in jobs]
        for reference in references:
            yield _get(reference)

    def _chunks(
        self,
        function: Callable[..., Any],
        job: Any,
        sample_ids: Sequence[str],
        batch_size: int,
        models: Mapping[str, Checkpoint],
        label: str,
    ) -> list[Any]:
        """Runs a function on chunks of whole batches; results in order. Weights and job lie in the object store once."""
        batches = [sample_ids[start : start + batch_size] for start in range(0, len(sample_ids), batch_size)]
        count = self._chunk_count([model.about for model in models.values()], len(sample_ids))
        chunks = [tuple(each for batch in part for each in batch) for part in evenly(batches, count)]
        # After an error the other chunks run to their end: cancelling one whose reply is under way aborts the driver.
        return [_get(reference) for reference in self._submit(function, job, chunks, models, label)]

    def _submit(
        self, function: Callable[..., Any], job: Any, chunks: Sequence[Any], models: Mapping[str, Checkpoint], label: str
    ) -> list[Any]:
        """Hands a function out on every chunk; references to the results in order."""
        weights = ray.put(dict(models))
        gpus = self._gpus_per_chunk if models else 0.0
        # "DEFAULT": inside a trial a task would otherwise be captured by the trial's placement group, where it cannot fit.
        task = _task(function, gpus).options(scheduling_strategy="DEFAULT", num_cpus=1, name=label or "chunk")
        return [task.remote(job, weights, chunk, gpus) for chunk in chunks]

    @property
    def _gpus_per_chunk(self) -> float:
        return min(self.resources.gpus_per_worker, 1.0)

    def _gpu_slots(self) -> int:
        """How many chunks the cluster's GPUs take at once; 0 where there is no GPU to a worker."""
        return max(1, how_many_fit(resources().get("GPU", 0.0), self._gpus_per_chunk)) if self._gpus_per_chunk else 0

    def _chunk_count(self, abouts: Sequence[About], clips: int) -> int:
        """How many chunks: as many as GPUs take at once, whose processes end with them, or else two for each core, or one, so
        that none has more to do than another; and no chunk with less than a second of work.
        """
        seconds = clips * sum(about.seconds * about.world_size / max(about.clips, 1) for about in abouts) / SCORING_SPEEDUP
        most = int(seconds / CHUNK_SECONDS) if seconds else clips
        cores = max(1, int(resources().get("CPU", 1)))
        at_once = (self._gpu_slots() if abouts else 0) or (2 * cores if most >= 2 * cores else cores)
        return max(1, min(at_once, most))

    def _portions(self, chunks: Sequence[Sequence[str]]) -> list[Sequence[Sequence[str]]]:
        """A method's chunks in order, in as many portions as GPUs take at once; without GPUs each by itself."""
        return evenly(chunks, self._gpu_slots() or len(chunks))


def evenly(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """The items in order, in at most `count` parts, the longer ones first, whose lengths differ by one at most."""
    count = min(count, len(items))
    ends = [0, *accumulate((len(items) + place) // count for place in reversed(range(count)))]
    return [items[start:end] for start, end in pairwise(ends)]


class _Trainer(ray.train.torch.TorchTrainer):
    """A trainer whose controller runs in this process, an actor's; what it leaves if it is killed, orphans.py removes.

    Ray starts a process for the controller, one that would clear away after it, one for data sets of Ray's, of which there are
    none, and one that asks whether nodes are about to be taken away. Each imports for one or two seconds, beside the workers
    that do. Where there is one node alone nobody is left to hear that it goes, and nobody asks.
    """

    def _initialize_and_run_controller(self, **wanted: Any) -> Any:
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        callbacks = [each for each in wanted.pop("callbacks") if not isinstance(each, unwanted)]
        controller = TrainController(**wanted, callbacks=callbacks)
        if len(nodes()) == 1:
            told = controller._worker_group_callbacks_to_propagate
            told[:] = [each for each in told if not isinstance(each, PreemptionCallback)]
        asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        return controller.get_result()


@ray.remote(num_cpus=0)
class _Host:
    """An actor for a driver that is none."""

    def call(self, function: Callable[[], Any]) -> Any:
        return function()


@contextmanager
def in_an_actor(at_once: int) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls functions in this process if it is an actor's, as a trial's is, else in one beside it that ends with the block."""
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None:
        yield lambda function: function()
        return
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    host = _Host.options(max_concurrency=at_once, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    try:
        yield lambda function: ray.get(host.call.remote(function))
    finally:
        if ray.is_initialized():  # after an interrupt the actor ends with the connection
            ray.kill(host)
            remove_orphans()  # of a host that had died by itself


class _OverRaysAddresses(ray.train.torch.TorchConfig):
    """A process group whose Gloo connects by the addresses by which Ray's nodes know each other.

    By itself it takes what the host's own name stands for, which is a loopback address on many systems.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _TorchOverRaysAddresses


class _TorchOverRaysAddresses(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_take_rays_interface)
        super().on_start(worker_group, backend_config)


def _take_rays_interface() -> None:
    """Names the network interface of the node's address to Gloo, unless the user has named one."""
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    for name, known in psutil.net_if_addrs().items():
        if any(each.address == address for each in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@lru_cache(maxsize=32)
def _task(function: Callable[..., Any], gpus: float = 0.0) -> Any:
    """The function as a Ray task that asks for so many GPUs; the process of one that asks for any ends with it.

    It would keep the GPU's memory while it lives, and CUDA stays with the GPU that a process saw first, whichever its next task
    is given. Ray by itself forgets to end it where the GPUs are asked for by options(), which refuse max_calls.
    """
    return ray.remote(num_gpus=gpus, max_calls=1 if gpus else 0)(function)


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _apply(function: Callable[[Any], Any], job: Any) -> Any:
    return function(job)


def _score(job: ScoreJob, models: Mapping[str, Checkpoint], sample_ids: Sequence[str], gpus: float) -> ScoreTable:
    torch.set_num_threads(1)
    return score_samples(job, models, sample_ids, device_for(gpus))


def _measure(
    job: ConsolidateJob, models: Mapping[str, Checkpoint], chunks: Sequence[Sequence[str]], gpus: float
) -> Iterator[dict[str, np.ndarray]]:
    torch.set_num_threads(1)
    for chunk in chunks:
        yield measure_samples(job, models[""], chunk, device_for(gpus))


def _evaluate(job: EvaluateJob, models: Mapping[str, Checkpoint], sample_ids: Sequence[str], gpus: float) -> np.ndarray:
    torch.set_num_threads(1)
    return evaluate(job, models[""], sample_ids, device_for(gpus))


def _get(reference: Any) -> Any:
    """The task's result; an InputError in the task is raised as itself."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from error
        raise


def _cause(error: TrainingFailedError) -> BaseException:
    """The worker's own error where another try would end the same way, else the failure as Ray tells it."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            inner = getattr(failure, "cause", None) or failure
            if isinstance(inner, InputError | DivergedError):
                return inner
    return error


def _found_no_room(error: TrainingFailedError) -> bool:
    """Whether a fit ended because its workers did not fit beside others, or not even alone: nothing of it failed."""
    without_room = InsufficientClusterResourcesError | WorkerGroupStartupTimeoutError
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, without_room)


def _by_a_worker(error: TrainingFailedError) -> bool:
    """Whether a fit ended because a worker failed, at its work or while it started."""
    if isinstance(error, ControllerError):
        return isinstance(error.controller_failure, WorkerGroupStartupFailedError)
    return isinstance(error, WorkerGroupError)


def _line(error: TrainingFailedError) -> str:
    """Why the first of the workers failed, in a line."""
    failure: BaseException = error
    if isinstance(error, WorkerGroupError):
        failure = next(iter(error.worker_failures.values()), error)
    elif isinstance(error, ControllerError):
        failure = error.controller_failure
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    # Ray's own words come first; a traceback ends with the error.
    return (lines[-1] if lines and lines[0].startswith("Traceback") else lines[0] if lines else type(failure).__name__)[:200]


def drain(mailbox: Any) -> list[Event]:
    """The events that arrived since the last call."""
    return list(ray.get(mailbox.drain.remote()))


def new_mailbox() -> Any:
    """A mailbox beside the driver: on another node it would be lost with that node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@dataclass
class NodeProbe:
    """The samples of every living node of the connected cluster, by its address. Never waits."""

    _samplers: dict[str, Any] = field(default_factory=dict)  # by Ray's id of the node
    _asked: dict[str, tuple[str, Any]] = field(default_factory=dict)  # id -> address and the answer to come
    _since: float = 0.0

    def __call__(self) -> dict[str, Sample]:
        """What the nodes that were asked answered; nothing while that is awaited. The call after it asks them anew."""
        if not self._asked:
            self._ask()
            return {}
        answers = [answer for _, answer in self._asked.values()]
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=0)
        if len(ready) < len(answers) and time.monotonic() - self._since < NODE_PATIENCE_SECONDS:
            return {}
        found: dict[str, Sample] = {}
        for node, (address, answer) in self._asked.items():
            if answer in ready:
                try:
                    found[address] = ray.get(answer)
                except ray.exceptions.RayError:  # the node or its sampler died; where the node lives it gets another
                    del self._samplers[node]
        self._asked = {}
        return found

    def _ask(self) -> None:
        self._since = time.monotonic()
        living = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
        self._samplers = {node: sampler for node, sampler in self._samplers.items() if node in living}
        for node, address in living.items():
            if node not in self._samplers:
                here = NodeAffinitySchedulingStrategy(node, soft=False)
                self._samplers[node] = ray.remote(Sampler).options(num_cpus=0, scheduling_strategy=here).remote()
            # Two nodes may share a machine, in tests at least.
            name = address if list(living.values()).count(address) == 1 else f"{address}-{node[:6]}"
            self._asked[node] = (name, self._samplers[node].sample.remote())
