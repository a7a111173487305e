"""Whether an experiment can run here, and what it will take: findings, each of them fine or a problem with what to do.

`check.py` reports all of them; `ready` is the short form that a sweep or a comparison runs before it begins.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shutil
import socket
import stat
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cavs_model.checkpoint import About
from cavs_model.datasets.base import Clips
from cavs_model.datasets.cache import BLOCK_CLIPS, feature_type, missing_blocks, record_type
from cavs_model.datasets.log_mel import NUM_BINS, NUM_FRAMES
from cavs_model.errors import InputError
from cavs_model.networks.av_segmenter import NetworkConfig, build, check_weights
from cavs_model.networks.vggish import AUDIO_DIM, feature_name
from cavs_model.types import AUDIO_VISUAL, Batch
from cavs_model.worker import arithmetic, device_for
from orchestrator.dry_run import Lookup, tasks_done
from orchestrator.entries import Entries
from orchestrator.experiment import Experiment, Resources
from orchestrator.progress import clock, planned_work
from orchestrator.ray_backend import SCORING_SPEEDUP, Cluster, Node, in_a_worker, nodes, on_every_node
from orchestrator.source import code_version
from orchestrator.tracker import Tracker, database_file, tracking_uri

PACKAGES = ("ray", "torch", "mlflow", "optuna")
NODE_SECONDS = 120.0  # for a node to answer: its first process imports torch, from a network disk perhaps
PROBE = ".probe-"  # how the folders begin that nodes are to find
RESUME_COPIES = 3  # weights and Adam's two averages of each network in training
# What to do where nodes see different folders, by topic.
MOUNT = {
    topic: f"mount the same folder on every node, and give it as an absolute path by {names}"
    for topic, names in (("outputs", "CAVS_OUTPUTS"), ("store", "--store or CAVS_STORE"))
}


@dataclass(frozen=True)
class Finding:
    """One line of a report. The text of a problem says what to do about it."""

    topic: str
    text: str
    ok: bool = True

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'problem':8} {self.topic}: {self.text}"


def problem(topic: str, text: object) -> Finding:
    """A finding that is not fine, its text in one line."""
    return Finding(topic, "; ".join(line.strip() for line in str(text).splitlines() if line.strip()), ok=False)


@dataclass(frozen=True)
class Look:
    """What one process on one machine sees. `wrote` are the files that it left in the folders it was to find.

    `auto` is the arithmetic that precision "auto" means there, "" where it means none or was not asked for.
    """

    host: str
    versions: Mapping[str, str]
    memory_bytes: int
    wrote: tuple[tuple[str, Path], ...]  # each with its topic
    problems: tuple[Finding, ...] = ()
    auto: str = ""


def look(
    word: str,
    probes: Sequence[tuple[str, Path]],
    experiment: Experiment | None,
    weights: bool,
    store: Entries | None = None,
) -> Look:
    """Looks around: at what the driver put into folders and a store, and at the experiment's source files and first weights.

    `probes` are the folders, each with the topic of what is found there; `word` is what they hold.
    """
    problems: list[Finding] = []
    wrote: list[tuple[str, Path]] = []
    for topic, folder in probes:
        if any(each.topic == topic for each in problems):
            continue  # it lies in the one that was not found
        try:
            if (folder / "driver").read_text() != word:
                problems.append(problem(topic, f"{folder} holds something else than the driver put there; {MOUNT[topic]}"))
            path = folder / f"node-{uuid.uuid4().hex}"
            path.write_text(word)
            wrote.append((topic, path))
            with open(folder / "lock", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            problems.append(
                problem(topic, f"locks in {folder} hold on one machine only, so that machines would compute the same outcome "
                               "at once; mount it by NFSv4, without nolock and local_lock")
            )  # fmt: skip
        except BlockingIOError:
            pass  # as it should be: the driver holds it
        except OSError as error:
            problems.append(problem(topic, f"{folder}: {error.strerror}; {MOUNT[topic]}"))
    checks: list[tuple[str, Callable[[], None]]] = []
    if store is not None:
        checks.append(("store", partial(store.find, word)))
    if experiment is not None:
        checks.append(("data", experiment.benchmark.check))
        checks += [("weights", partial(check_weights, experiment.network))] if weights else []
    for topic, verify in checks:
        try:
            verify()
        except InputError as error:
            problems.append(problem(topic, error))
    auto = "" if experiment is None else _meaning_of_auto(experiment)
    return Look(socket.gethostname(), versions(), _free_memory(), tuple(wrote), tuple(problems), auto)


def _meaning_of_auto(experiment: Experiment) -> str:
    """The arithmetic of precision "auto" on the device of a job, "" where there is none here or another was asked for."""
    if experiment.precision != "auto":
        return ""
    with suppress(InputError, RuntimeError):  # no GPU, or none that CUDA can use
        return "bf16" if arithmetic("auto", device_for(experiment.resources.gpus_per_worker)).bf16 else "fp32"
    return ""


def _free_memory() -> int:
    """Bytes that this machine, or the container this is, can still give."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free


@contextmanager
def shared_probe(topic: str, place: Path, word: str) -> Iterator[tuple[str, Path]]:
    """A folder that nodes are to find, with a word in it and a lock that is held; gone afterwards. With its topic.

    InputError where the place cannot be written or locked.
    """
    clear_probes(place)
    with ExitStack() as at_the_end:
        try:
            folder = _locked_folder(topic, place, at_the_end)
            (folder / "driver").write_text(word)
        except OSError as error:
            raise InputError(f"cannot write to {place}: {error.strerror}") from error
        yield topic, folder


def _locked_folder(topic: str, place: Path, at_the_end: ExitStack) -> Path:
    """A new folder whose lock is held."""
    while True:
        folder = place / f"{PROBE}{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        at_the_end.callback(shutil.rmtree, folder, ignore_errors=True)
        with suppress(FileNotFoundError):  # taken for a dead process's before it was locked
            lock = at_the_end.enter_context(open(folder / "lock", "w"))  # noqa: SIM115
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise InputError(
                    f"{place} cannot be locked ({error.strerror}): keep {topic} on NFSv4 or a local disk"
                ) from error
            (folder / "lock").stat()
            return folder


def clear_probes(place: Path) -> None:
    """Deletes the probes that killed processes left in a folder, and leaves alone those of living ones."""
    for folder in place.glob(f"{PROBE}*"):
        with suppress(OSError):  # a file, which is no such probe; one of others; or another process was faster
            with open(folder / "lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                gone = folder.rename(f"{folder}.gone")  # now nobody can wait for its lock and have it
            shutil.rmtree(gone)


def on_nodes(
    outputs: Path, experiment: Experiment | None, weights: bool, where: Sequence[Node] = (), store: Entries | None = None
) -> tuple[list[Finding], int]:
    """What the nodes see, or this process where there are none: versions, the shared folder, the store, data and weights.

    And the bytes of memory that are free on all their machines together. The store must have been made.
    """
    found: list[Finding] = []
    word = uuid.uuid4().hex
    with ExitStack() as stack:
        probes = [stack.enter_context(shared_probe("outputs", outputs, word))]
        if store is not None:
            try:
                topic = "outputs" if store.root.is_relative_to(outputs) else "store"
                probes.append(stack.enter_context(shared_probe(topic, store.root, word)))
                stack.enter_context(store.announced(word))
            except InputError as error:
                found.append(problem("store", error))
                store = None
        call = partial(look, word, probes, experiment, weights, store)
        answers: Mapping[str, Any] = (
            {node.name: answer for node, answer in on_every_node(call, NODE_SECONDS).items()} if where else {"here": call()}
        )
        looks = {name: answer for name, answer in answers.items() if not isinstance(answer, BaseException)}
        for name, answer in answers.items():
            if isinstance(answer, BaseException):
                found.append(
                    problem("nodes", f"{name} did not answer: {_last_line(answer)}; install this project on every node, in the "
                                     "same version, or submit a job with --working-dir")
                )  # fmt: skip
        unseen = [(name, topic) for name, seen in looks.items() for topic, path in seen.wrote if not path.is_file()]
    mine = versions()
    for name, seen in looks.items():
        other = [f"{what} {seen.versions[what]} (here {mine[what]})" for what in mine if seen.versions[what] != mine[what]]
        if other:
            found.append(problem("versions", f"{name} has {', '.join(other)}; install the same versions on every node"))
        found += [replace(each, text=f"{name}: {each.text}") for each in seen.problems]
    for name, topic in unseen:
        found.append(problem(topic, f"{name} writes to a folder of that name that is not this one; {MOUNT[topic]}"))
    if experiment is not None:
        gpus = min(1.0, experiment.resources.gpus_per_worker)
        at_work = [node.name for node in where if node.room(1, gpus)] if where else ["here"]
        found += _of_auto({name: looks[name].auto for name in at_work if name in looks})
    wrong = {each.topic for each in found}
    everywhere = f"from {_each_of(len(where))}" if where else "here"
    if not wrong & {"versions", "nodes"}:
        found.insert(0, Finding("versions", ", ".join(f"{what} {value}" for what, value in mine.items())))
    if not wrong & {"outputs", "nodes"}:
        found.append(Finding("outputs", f"{outputs} is read, written and locked {everywhere}"))
    if store is not None and not wrong & {"outputs", "store", "nodes"}:
        found.append(Finding("store", f"{store.name} is read, written and locked {everywhere}"))
    if experiment is not None and not wrong & {"data", "nodes"}:
        benchmark = experiment.benchmark
        counts = ", ".join(f"{len(benchmark.samples(split))} {split}" for split in benchmark.splits())
        found.append(Finding("data", f"{benchmark.name}: {counts} clips, read {everywhere}"))
    if experiment is not None and weights and not wrong & {"weights", "nodes"}:
        network = experiment.network
        found.append(Finding("weights", f"{network.visual_encoder} and {network.audio_encoder}, read {everywhere}"))
    return found, sum({seen.host: seen.memory_bytes for seen in looks.values()}.values())


def _each_of(count: int) -> str:
    return "the one node" if count == 1 else f"each of {count} nodes"


def _last_line(answer: object) -> str:
    """What an error or its text says in the end, which is the reason where a traceback comes before it."""
    return (str(answer).strip().splitlines() or [type(answer).__name__])[-1][:300]


def _of_auto(meanings: Mapping[str, str]) -> Iterator[Finding]:
    """What precision "auto" means on each of the nodes that have room for a worker, "" for nothing.

    An outcome's address in the store holds that word alone.
    """
    meant: dict[str, list[str]] = {}
    for name, auto in meanings.items():
        if auto:
            meant.setdefault(auto, []).append(name)
    if len(meant) > 1:
        told = " and ".join(f"{auto} on {', '.join(names)}" for auto, names in sorted(meant.items()))
        yield problem("precision", f"auto means {told}, and the store would take their outcomes for the same; spell it out: "
                                   "--set precision=fp32 or --set precision=bf16")  # fmt: skip
    elif meant:
        yield Finding("precision", f"auto means {next(iter(meant))} here")


def versions() -> dict[str, str]:
    """Versions of what must be the same on all nodes; "code" is that of cavs_model."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}, "code": code_version()[:12]}


def of_cluster(cluster: Cluster, there: Sequence[Node], resources: Resources | None) -> list[Finding]:
    """What the cluster has, whether a job's workers fit on its nodes, and whether it asks for a token."""
    found = [Finding("cluster", f"{cluster.describe()}; nodes: {', '.join(f'{each.name} {each.size}' for each in there)}")]
    found += [*fitting(cluster, there, resources)] if resources is not None else []
    if told := of_token(cluster):
        found.append(told)
    elif os.environ.get("RAY_AUTH_MODE") == "token":
        found.append(
            Finding("token", "RAY_AUTH_MODE=token here; the dashboard, which knows the cluster's, is not to be reached")
        )
    else:
        found.append(problem("token", "it cannot be told whether the cluster asks for one; export RAY_AUTH_MODE=token"))
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with suppress(OSError):  # there need not be a file
        if open_to_others(file):  # Ray makes it so, but most home directories are closed
            found.append(problem("token", f"{file} can be read by others on this machine; chmod 600 {file}"))
    return found


def of_token(cluster: Cluster) -> Finding | None:
    """Whether the cluster asks for a token; None where it does not say."""
    mode = authentication(cluster.dashboard)
    if mode in ("", "token"):
        return Finding("token", "the cluster asks for one") if mode else None
    return problem("token", f"the cluster does not ask for a token ({mode}): whoever reaches it runs code on it; restart it "
                            "with RAY_AUTH_MODE=token in the environment of every ray start")  # fmt: skip


def open_to_others(file: Path) -> bool:
    """Whether other users of this machine can read a file, by its own mode and those of the folders it lies in."""
    resolved = file.resolve(strict=True)
    reached = all(folder.stat().st_mode & stat.S_IXOTH for folder in resolved.parents)
    return reached and bool(resolved.stat().st_mode & stat.S_IROTH)


def fitting(cluster: Cluster, there: Sequence[Node], resources: Resources) -> Iterator[Finding]:
    """Problems where the workers of one job do not fit: into the cluster, or each of them onto a node."""
    try:
        cluster.concurrent_jobs(resources)
    except InputError as error:
        yield problem("resources", error)
        return
    room = sum(node.room(resources.cpus_per_worker, resources.gpus_per_worker) for node in there)
    if room < resources.workers:
        yield problem("resources", f"{resources.workers} workers of {resources.cpus_per_worker} CPUs and "
                                   f"{resources.gpus_per_worker:g} GPUs, each on one node, do not fit: the nodes have room for "
                                   f"{room}; lower resources.cpus_per_worker, gpus_per_worker or workers")  # fmt: skip


def authentication(dashboard: str) -> str:
    """The mode that a cluster's dashboard tells to anyone who asks, "token" or "disabled"; "" where it does not answer."""
    if not dashboard:
        return ""
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/authentication_mode", timeout=5) as answer:
            return str(json.loads(answer.read(10_000))["authentication_mode"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def of_mlflow(outputs: Path, where: Sequence[Node] = ()) -> Iterator[Finding]:
    """Whether MLflow takes a run, its metric and its artifact: from here, and from a worker on each of the nodes.

    A node from which it does not is no problem: one process alone writes, the sweep's own.
    """
    try:
        tracker = Tracker(tracking_uri(outputs), outputs / "artifacts")
        with tracker.checked() as run:
            call = partial(_mlflow_from_here, tracker.uri, outputs / "artifacts", run)
            answers = on_every_node(call, NODE_SECONDS) if where else {}
    except InputError as error:
        yield problem("mlflow", error)
        return
    reasons = {node.name: _last_line(answer) for node, answer in answers.items() if answer is not None}
    found = len(answers) - len(reasons)
    there = f" and from a worker on {f'{found} of {len(answers)} nodes' if reasons else _each_of(found)}" if found else ""
    yield Finding("mlflow", f"{tracker.shown}: a run was written and read from here{there}")
    for name, reason in reasons.items():
        yield Finding(
            "mlflow", f"not from {name}: {reason}; only the sweep's own process writes to it, and must not be started there"
        )


def _mlflow_from_here(uri: str, artifacts: Path, run: str) -> str | None:
    """Writes into a run that is there and reads it; why that fails, None where it does not."""
    file = database_file(uri)
    if file is not None and not file.is_file():  # MLflow would make another, on this machine alone
        return f"there is no {file}"
    try:
        Tracker(uri, artifacts).try_run(run, f"node-{uuid.uuid4().hex}")
    except InputError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Work:
    """What an experiment takes over its trials and seeds. A network in the store is not trained again."""

    trials: int
    seeds: int
    tasks: int
    networks: int  # to be trained in all, if the store were empty
    stored: int  # of these, as far as can be told before
    clip_passes: float  # of training that is left, in passes of the base task
    watching: float  # passes of scoring and evaluation, the same way
    data_bytes: int  # decoded clips that are missing
    network_bytes: int  # of one

    @property
    def left(self) -> int:
        """Networks to be trained."""
        return self.networks - self.stored

    def disk_bytes(self, at_once: int) -> int:
        """What the outputs folder is going to take, checkpoints of `at_once` networks in training included."""
        return self.data_bytes + self.network_bytes * (self.left + RESUME_COPIES * at_once)

    def describe(self) -> str:
        """In a line."""
        times = f"{self.trials} trials x {self.seeds} seeds x {self.tasks} tasks"
        return (
            f"{times}: {self.networks} networks, the base tasks' shared by the trials; {self.stored} of them are in the store"
        )


def work_of(experiment: Experiment, trials: int, outputs: Path, stored: Sequence[Sequence[About]], searched: bool) -> Work:
    """The work of a search over `trials` trials. `stored` has per seed the networks found by `in_store`."""
    method, tasks, seeds = experiment.method, experiment.scenario.tasks(experiment.benchmark), len(experiment.seeds)
    networks = [1 if task is tasks[-1] else len(method.networks) for task in tasks]
    base, *later = planned_work(experiment)
    # Trials that differ in a knob share the base task for certain, and later tasks perhaps.
    known = [found[: networks[0]] if searched else found for found in stored]
    done = 0.0
    for found in known:
        ends = np.cumsum(networks)
        done += sum(each for each, end in zip((base, *later), ends, strict=True) if len(found) >= end)
    val = len(experiment.benchmark.samples("val"))
    watched = sum(val + (len(task.train) * (1 + len(method.networks)) if method.remembers else 0) for task in tasks)
    return Work(
        trials,
        seeds,
        len(tasks),
        seeds * (networks[0] + trials * sum(networks[1:])),
        sum(map(len, known)),
        max(0.0, seeds * (base + trials * sum(later)) - done),
        seeds * trials * watched / SCORING_SPEEDUP,
        missing_bytes(experiment, outputs / "data"),
        network_bytes(experiment.network, tasks[-1].num_classes),
    )


def missing_bytes(experiment: Experiment, root: Path) -> int:
    """Bytes of the decoded clips that are not there yet."""
    benchmark, sound = experiment.benchmark, experiment.network.frozen_sound
    if not benchmark.cached:
        return 0
    clip = record_type(benchmark).itemsize
    total = sum(len(missing_blocks(benchmark, split, root)) for split in benchmark.splits()) * BLOCK_CLIPS * clip
    if sound is not None:
        name, vector = feature_name(sound), feature_type(benchmark).itemsize
        total += sum(len(missing_blocks(benchmark, split, root, name)) for split in benchmark.splits()) * BLOCK_CLIPS * vector
    return total


def network_bytes(config: NetworkConfig, num_classes: int) -> int:
    """Bytes of one network's weights."""
    with torch.device("meta"):
        model = build(replace(config, visual_weights="none", audio_weights="none"), num_classes, AUDIO_VISUAL)
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def in_store(experiment: Experiment, store: Entries, told: Callable[[str], None]) -> list[list[About]]:
    """Per seed the networks of the experiment's stream that the store has, in order, up to the first that is missing."""
    found = []
    for seed in experiment.seeds:
        lookup = Lookup(store, told)
        tasks_done(replace(experiment, per_frame=False), seed, (), lookup)
        found.append(lookup.trained)
    return found


@dataclass(frozen=True)
class Speed:
    """What a training step was measured to take on one worker."""

    seconds_per_clip: float
    memory_bytes: int  # of the process, at its peak
    gpu_bytes: int = 0
    gpu_free_bytes: int = 0


def measure(experiment: Experiment) -> Speed:
    """Trains the experiment's network for a step or three on black clips. InputError for a network that cannot be built."""
    resources, size, frames = experiment.resources, experiment.benchmark.image_size_px, experiment.benchmark.frames
    torch.set_num_threads(resources.cpus_per_worker)
    device = device_for(resources.gpus_per_worker)
    numbers = arithmetic(experiment.precision, device)
    count = max(1, -(-experiment.schedule.batch_size // resources.workers))
    clips = Clips.blank(count, frames, size)
    heard = None if experiment.network.frozen_sound is None else torch.zeros(count, frames, AUDIO_DIM)
    batch = Batch(
        ("",) * count, torch.from_numpy(clips.image), torch.zeros(count, frames, NUM_FRAMES, NUM_BINS),
        torch.zeros(count, frames, size, size, dtype=torch.uint8), torch.ones(count, frames, dtype=torch.bool),
        torch.ones(count, frames, dtype=torch.bool), torch.zeros(count, dtype=torch.bool), heard,
    ).to(device)  # fmt: skip
    classes = experiment.scenario.tasks(experiment.benchmark)[0].num_classes
    with torch.random.fork_rng(devices=[]):
        model = numbers.place(build(experiment.network, classes, AUDIO_VISUAL)).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.0)
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < 10:  # the first is slower: memory is got, kernels are chosen
        started = time.perf_counter()
        with numbers.exact():
            with numbers.autocast():
                logits = model(batch).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.label.flatten(0, 1).long())
            loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type != "cuda":
        return Speed(min(taken) / count, peak)
    used, free = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[0]
    return Speed(min(taken) / count, peak, used, free + used)


def plan(experiment: Experiment, work: Work, outputs: Path, at_once: int, free_memory: int, on_ray: bool) -> list[Finding]:
    """The plan: what is to be computed, how much of it at once, how long it takes, and whether disk and memory are enough.

    `at_once` networks are trained at once; `free_memory` bytes are free on all nodes together.
    """
    workers = experiment.resources.workers if on_ray else 1
    found = [Finding("plan", work.describe()), Finding("plan", f"{at_once} networks at a time, {workers} workers each")]
    needed, free = work.disk_bytes(at_once), shutil.disk_usage(outputs).free
    text = f"{gigabytes(needed)} needed (clips {gigabytes(work.data_bytes)}, a network {gigabytes(work.network_bytes)}), "
    text += f"{gigabytes(free)} free in {outputs}"
    if needed <= free:
        found.append(Finding("disk", text))
    else:
        advice = "make room, choose another folder by CAVS_OUTPUTS, or delete old outcomes: python -m orchestrator.store prune"
        found.append(problem("disk", f"{text}; {advice}"))
    try:
        call = partial(measure, experiment)
        speed: Speed = in_a_worker(call, experiment.resources) if on_ray else call()
    except TimeoutError:
        found.append(Finding("time", "no estimate: all workers are busy"))
        return found
    except (InputError, RuntimeError) as error:  # CUDA out of memory is one
        found.append(problem("network", f"a training step failed: {str(error)[:500]}"))
        return found
    seconds = (work.clip_passes + work.watching) * speed.seconds_per_clip / (at_once * workers)
    each = f"{speed.seconds_per_clip * 1000:.1f} ms a clip, measured now"
    found.append(Finding("time", f"about {clock(seconds)} ({each}; rehearsed clips included, without decoding and start-up)"))
    total = speed.memory_bytes * at_once * workers
    text = f"{gigabytes(total)} for {at_once * workers} workers, {gigabytes(free_memory)} free"
    enough = total <= free_memory
    found.append(Finding("memory", text) if enough else problem("memory", f"{text}; lower schedule.batch_size or add nodes"))
    if speed.gpu_bytes > speed.gpu_free_bytes * min(1.0, experiment.resources.gpus_per_worker or 1.0):
        text = f"{gigabytes(speed.gpu_bytes)} a worker of {gigabytes(speed.gpu_free_bytes)} free"
        found.append(problem("gpu memory", f"{text}; raise resources.gpus_per_worker or lower schedule.batch_size"))
    return found


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def ready(experiment: Experiment, outputs: Path, cluster: Cluster, store: Entries | None = None) -> None:
    """The short form: InputError with all problems that would stop a search after it began, or lay the cluster open.

    On one machine a matter of milliseconds; where there are more nodes each of them is asked. The store must have been made.
    """
    clear_probes(outputs)
    there = nodes()
    found = list(fitting(cluster, there, experiment.resources))
    if not cluster.started_here and (told := of_token(cluster)):
        found.append(told)
    if len(there) > 1:
        found += on_nodes(outputs, experiment, weights=False, where=there, store=store)[0]
    size = network_bytes(experiment.network, 1)
    needed = missing_bytes(experiment, outputs / "data") + size * len(experiment.method.networks) * (1 + RESUME_COPIES)
    free = shutil.disk_usage(outputs).free
    if needed > free:
        found.append(
            problem("disk", f"{gigabytes(needed)} are needed to begin with, {gigabytes(free)} are free in {outputs}; make "
                            "room, or choose another folder by CAVS_OUTPUTS")
        )  # fmt: skip
    problems = [f"{each.topic}: {each.text}" for each in found if not each.ok]
    if problems:
        raise InputError("\n".join([*problems, "python -m orchestrator.check reports more"]))
