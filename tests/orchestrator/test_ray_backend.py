"""The Ray backend's verbs on a real local cluster, against the same verbs in this process."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.util import placement_group_table
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.state import list_actors

from cavs_model import checkpoint
from cavs_model.datasets.cache import cache_folder, missing_blocks
from cavs_model.datasets.collage import Collage
from cavs_model.errors import InputError
from cavs_model.evaluate import ConsolidateJob, Data, EvaluateJob
from cavs_model.methods.cmr import CMR
from cavs_model.methods.ewc import EWC
from cavs_model.train import DivergedError, TaskJob
from orchestrator.experiment import Experiment, Resources, override
from orchestrator.local_backend import LocalBackend
from orchestrator.orphans import remove_orphans
from orchestrator.progress import Event
from orchestrator.ray_backend import (
    SCORING_SPEEDUP,
    Cluster,
    Node,
    RayBackend,
    _Trainer,
    connected,
    drain,
    evenly,
    how_many_fit,
    in_an_actor,
    new_mailbox,
)
from orchestrator.store import StoredBackend
from orchestrator.stream import TaskOutcome, run_stream
from search_spaces.tones import BASE

# Ray's own threads and sockets are still being closed when pytest looks.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SHORT = override(
    BASE,
    {"schedule.base_epochs": 2, "schedule.epochs": 2, "benchmark.short_clips": True, "method.samples_per_class": 2},
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connected() as cluster:
        yield cluster


def ray_backend(root: Path, workers: int = 1) -> RayBackend:
    return RayBackend(root / "data", root / "scratch", Resources(workers=workers), new_mailbox())


def stream(experiment: Experiment, backend: LocalBackend | RayBackend, root: Path) -> list[TaskOutcome]:
    return list(run_stream(experiment, 0, StoredBackend(backend, root / "store")))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[TaskOutcome]:
    root = tmp_path_factory.mktemp("local")
    return stream(SHORT, LocalBackend(root / "data"), root)


@pytest.fixture(scope="module")
def on_ray(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TaskOutcome], RayBackend]:
    root = tmp_path_factory.mktemp("ray")
    backend = ray_backend(root)
    return stream(SHORT, backend, root), backend


def weights(outcome: TaskOutcome, network: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(Path(outcome.state.checkpoints[network])).state_dict()


def test_ray_equals_local_bit_for_bit(local: list[TaskOutcome], on_ray: tuple[list[TaskOutcome], RayBackend]) -> None:
    outcomes, _ = on_ray
    assert len(outcomes) == len(local) == 2
    for ours, theirs in zip(outcomes, local, strict=True):
        assert ours.before == theirs.before
        assert ours.rehearsal == theirs.rehearsal
        assert ours.after == theirs.after
        assert ours.state.memory == theirs.state.memory
        np.testing.assert_array_equal(ours.counts["val"], theirs.counts["val"])
        assert set(ours.trained) == set(theirs.trained)
        for network, about in ours.trained.items():
            assert about.history == theirs.trained[network].history
            for name, tensor in weights(ours, network).items():
                assert torch.equal(tensor, weights(theirs, network)[name]), (network, name)


def test_workers_report_every_epoch_and_leave_no_scratch(on_ray: tuple[list[TaskOutcome], RayBackend]) -> None:
    outcomes, backend = on_ray
    epochs = [event for event in drain(backend.mailbox) if event["kind"] == "epoch"]
    trained = sum(len(outcome.trained) for outcome in outcomes)
    assert len(epochs) == 2 * trained == 6  # two networks on the base task, one on the last
    assert not list(backend.scratch.iterdir())


def test_two_workers_train_like_one(cluster: Cluster, local: list[TaskOutcome], tmp_path: Path) -> None:
    outcomes = stream(SHORT, ray_backend(tmp_path, workers=2), tmp_path)
    for ours, theirs in zip(outcomes, local, strict=True):
        for network, about in ours.trained.items():
            assert about.world_size == 2
            for mine, other in zip(about.history, theirs.trained[network].history, strict=True):
                # Sums over workers are rounded in another order; Adam divides small gradients by their own size.
                assert mine == pytest.approx(other, rel=2e-3)
        assert sum(len(rows) for rows in ours.state.memory.by_class.values()) == len(theirs.state.memory.rows)
    assert outcomes[-1].metrics() == pytest.approx(local[-1].metrics(), abs=0.02)


def test_any_chunk_size_gives_the_same_scores_counts_and_memory(
    cluster: Cluster, on_ray: tuple[list[TaskOutcome], RayBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of a single batch, where the backend by itself would take larger ones."""
    outcomes, backend = on_ray
    base = outcomes[0]
    monkeypatch.setattr(RayBackend, "_chunk_count", lambda self, abouts, clips: clips)
    calls: list[int] = []
    chunks = RayBackend._chunks

    def counted(self: RayBackend, *arguments: object) -> list[object]:
        results = chunks(self, *arguments)  # type: ignore[arg-type]
        calls.append(len(results))
        return results

    monkeypatch.setattr(RayBackend, "_chunks", counted)
    # The same networks, other scores: the store of the first stream gives the checkpoints, nothing else.
    fresh = StoredBackend(backend, tmp_path / "store")
    (tmp_path / "store" / "networks").rmdir()
    (tmp_path / "store" / "networks").symlink_to(Path(base.state.checkpoints["audio_visual"]).parent)
    again = list(run_stream(SHORT, 0, fresh))
    assert max(calls) > 1
    for ours, theirs in zip(again, outcomes, strict=True):
        assert (ours.before, ours.after, ours.state.memory) == (theirs.before, theirs.after, theirs.state.memory)
        np.testing.assert_array_equal(ours.counts["val"], theirs.counts["val"])


def test_what_a_method_keeps_is_the_same_bits_as_local(
    cluster: Cluster, on_ray: tuple[list[TaskOutcome], RayBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks, with a state before."""
    outcomes, backend = on_ray
    monkeypatch.setattr("cavs_model.evaluate.CONSOLIDATE_CLIPS", 5)
    found: list[dict[str, torch.Tensor]] = []
    for name, verbs in (("ray", backend), ("local", LocalBackend(tmp_path / "data"))):
        previous = None
        for outcome in outcomes:
            job = ConsolidateJob(EWC(), outcome.task, _data(), "fp32", str(tmp_path / name / str(outcome.task.index)))
            assert len(job.chunks) > 2
            previous = verbs.consolidate(job, outcome.state.checkpoints["audio_visual"], previous)
        found.append(checkpoint.read_method_state(Path(str(previous))))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(tensor.any() for tensor in ours.values())


def test_clips_are_rendered_by_tasks_and_what_is_there_stays(cluster: Cluster, tmp_path: Path) -> None:
    benchmark = Collage(frames=1, image_size_px=48, train_clips=70, val_clips=48, test_clips=24)
    backend = ray_backend(tmp_path)
    assert len(missing_blocks(benchmark, "train", tmp_path / "data")) == 2
    backend.prepare(benchmark, ("train", "val"))
    assert not missing_blocks(benchmark, "train", tmp_path / "data")
    assert not missing_blocks(benchmark, "val", tmp_path / "data")
    assert "collage: 3 of 3 missing blocks done, about 00:00:00 left" in [event["text"] for event in drain(backend.mailbox)]

    first, second = sorted(cache_folder(benchmark, "train", tmp_path / "data").iterdir())
    written = first.stat().st_mtime_ns
    second.unlink()
    backend.prepare(benchmark, ("train", "val"))
    assert second.exists()
    assert first.stat().st_mtime_ns == written
    backend.prepare(benchmark, ("train", "val"))
    assert [event["text"] for event in drain(backend.mailbox)] == ["collage: 1 of 1 missing blocks done, about 00:00:00 left"]


def test_bad_input_in_a_worker_is_told_as_itself(
    cluster: Cluster, on_ray: tuple[list[TaskOutcome], RayBackend], tmp_path: Path
) -> None:
    outcomes, backend = on_ray
    path = tmp_path / "damaged"
    about = checkpoint.read_about(Path(outcomes[0].state.checkpoints["audio_visual"]))
    checkpoint.save(path, {"not": torch.zeros(1)}, about)
    job = EvaluateJob("val", ("val-00000",), outcomes[0].task.seen_rule, outcomes[0].task.num_classes, _data(), 8, "fp32")
    with pytest.raises(InputError, match="does not fit its description"):
        backend.evaluate(job, str(path))
    measured = ConsolidateJob(EWC(), outcomes[0].task, _data(), "fp32", str(tmp_path / "state"))
    with pytest.raises(InputError, match="does not fit its description"):
        backend.consolidate(measured, str(path), None)
    task = outcomes[1].task
    train = TaskJob(
        "audio_visual", task, _data(), (), CMR(), SHORT.network, SHORT.schedule, "fp32", SHORT.seeds_of(0),
        str(path), str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.raises(InputError, match="does not fit its description"):
        backend.train([train])


def _base_job(root: Path, **changes: object) -> TaskJob:
    """A base task on clips that are rendered."""
    backend = LocalBackend(root / "data")
    data = dataclasses.replace(_data(), cache=backend.prepare(SHORT.benchmark, ("train",)))
    task = SHORT.scenario.tasks(SHORT.benchmark)[0]
    job = TaskJob(
        "audio_visual", task, data, (), CMR(), SHORT.network, SHORT.schedule, "fp32", SHORT.seeds_of(0), None, str(root / "out")
    )
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]


def _workers() -> list[psutil.Process]:
    """The training workers of the cluster that this process started."""
    found = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie is one of these
            if "RayTrainWorker" in " ".join(each.cmdline()):
                found.append(each)
    return found


def test_a_killed_worker_is_replaced_and_the_task_goes_on_to_the_same_bits(cluster: Cluster, tmp_path: Path) -> None:
    backend = ray_backend(tmp_path)
    schedule = dataclasses.replace(SHORT.schedule, base_epochs=20)
    job = _base_job(tmp_path, schedule=schedule, resume=str(tmp_path / "resume"), resume_seconds=0.0)
    events: list[Event] = []
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(backend.train, [job])
        while not any(event.get("epoch") == 3 for event in events):
            assert not fit.done()
            events += drain(backend.mailbox)
            time.sleep(0.02)
        (worker,) = _workers()
        worker.kill()
        fit.result()
    events += drain(backend.mailbox)
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert len(notes) == 2
    assert "a worker failed and is replaced" in notes[0]
    assert "goes on after epoch" in notes[1]
    # One epoch was lost, or none where the worker died between its note and its report.
    epochs = [event["epoch"] for event in events if event["kind"] == "epoch"]
    assert len(epochs) <= 20
    assert sorted(set(epochs)) == epochs
    LocalBackend(tmp_path / "data").train([dataclasses.replace(job, output=str(tmp_path / "local"), resume="")])
    ours, theirs = (checkpoint.load(tmp_path / name).state_dict() for name in ("out", "local"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert checkpoint.read_about(tmp_path / "out").history == checkpoint.read_about(tmp_path / "local").history
    assert not list((tmp_path / "scratch").iterdir())
    assert not _workers()


def test_after_a_killed_worker_a_task_goes_on_with_those_that_still_fit(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node is lost, but that the node is lost on paper alone."""
    backend = ray_backend(tmp_path, workers=2)
    schedule = dataclasses.replace(SHORT.schedule, base_epochs=8)
    job = _base_job(tmp_path, schedule=schedule, resume=str(tmp_path / "resume"), resume_seconds=0.0)
    events: list[Event] = []
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(backend.train, [job])
        while not any(event.get("epoch") == 2 for event in events):
            assert not fit.done()
            events += drain(backend.mailbox)
            time.sleep(0.02)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
        _workers()[0].kill()
        fit.result()
    events += drain(backend.mailbox)
    notes = [event["text"].split(": ", 1)[1] for event in events if event["kind"] == "note"]
    assert "a worker failed and is replaced" in notes[0]
    assert notes[1] == "goes on with 1 of 2 workers, which is what fits the nodes there are"
    assert notes[2].startswith("goes on after epoch")
    assert checkpoint.read_about(tmp_path / "out").world_size == 1
    LocalBackend(tmp_path / "data").train([dataclasses.replace(job, output=str(tmp_path / "local"), resume="")])
    ours, theirs = (checkpoint.read_about(tmp_path / name).history for name in ("out", "local"))
    assert len(ours) == 8
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=2e-2)  # sums over two workers are rounded in another order
    assert not list((tmp_path / "scratch").iterdir())
    assert not _workers()


def test_a_loss_that_diverges_is_told_as_itself_after_one_try(cluster: Cluster, tmp_path: Path) -> None:
    backend = ray_backend(tmp_path)
    with pytest.raises(DivergedError, match="is not finite"):
        backend.train([_base_job(tmp_path, schedule=dataclasses.replace(SHORT.schedule, learning_rate=1e30))])
    assert not [event for event in drain(backend.mailbox) if event["kind"] == "note"]


def _data() -> Data:
    return Data(SHORT.benchmark, "", SHORT.scenario.learned_order(SHORT.benchmark))


def test_what_does_not_fit_the_cluster_is_told_at_once(cluster: Cluster) -> None:
    too_many = int(cluster.cpus) + 1
    with pytest.raises(InputError, match=rf"{too_many} workers need {too_many} CPUs, the cluster has {cluster.cpus:g}"):
        cluster.concurrent_jobs(Resources(workers=too_many))
    with pytest.raises(InputError, match=r"need 512 GPUs"):
        cluster.concurrent_jobs(Resources(workers=1, gpus_per_worker=512))
    assert cluster.concurrent_jobs(Resources()) == int(cluster.cpus)
    half = dataclasses.replace(cluster, gpus=1.0)
    assert half.concurrent_jobs(Resources(gpus_per_worker=0.5)) == min(2, int(cluster.cpus))
    assert dataclasses.replace(half, cpus=64).concurrent_jobs(Resources(gpus_per_worker=0.2)) == 5


@pytest.mark.parametrize(
    ("there", "each", "count"),
    [(1.0, 0.2, 5), (1.0, 0.1, 10), (0.3, 0.1, 3), (1.0, 1 / 3, 3), (1.0, 0.3, 3), (1.0, 0.34, 2), (0.0, 0.5, 0), (7, 2, 3)],
)
def test_rounding_loses_no_room(there: float, each: float, count: int) -> None:
    """The trap: 1.0 // 0.2 is 4.0."""
    assert how_many_fit(there, each) == count
    assert Node("1" * 40, "here", 64, there).room(1, each) == count
    assert Node("1" * 40, "here", 2, there).room(2, each) == min(1, count)
    assert Node("1" * 40, "here", 4, 0).room(1, 0) == 4


def test_gpus_get_about_a_chunk_each_and_cores_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with a GPU ends with its chunk: a second round would start processes anew."""
    monkeypatch.setattr("orchestrator.ray_backend.resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    abouts, chunks = [checkpoint.About("audio_visual", 5, {})], tuple((str(place),) for place in range(10))
    for gpus, places in ((1.0, 4), (0.5, 8), (2.0, 4), (0.0, 16)):
        backend = RayBackend(tmp_path, tmp_path, Resources(gpus_per_worker=gpus))
        assert [backend._chunk_count(abouts, clips) for clips in (1, places, 1600)] == [1, places, places]
        assert backend._chunk_count([], 1600) == 16  # no network, no GPU
        portions = backend._portions(chunks)
        assert sum(portions, ()) == chunks
        assert len(portions) <= places if gpus else [len(portion) for portion in portions] == [1] * 10
        assert backend._portions(()) == []


@pytest.mark.parametrize(("seconds", "count"), [(0.5, 1), (1.5, 1), (3.0, 3), (5.0, 4), (7.9, 4), (8.0, 8), (100.0, 8)])
def test_no_core_gets_a_chunk_more_than_another_and_none_is_shorter_than_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    monkeypatch.setattr("orchestrator.ray_backend.resources", lambda: {"CPU": 4.0})
    about = checkpoint.About("audio_visual", 5, {}, clips=100, seconds=seconds * SCORING_SPEEDUP / 2, world_size=2)
    assert RayBackend(tmp_path, tmp_path, Resources())._chunk_count([about], 100) == count


@pytest.mark.parametrize(("length", "count"), [(0, 4), (1, 4), (4, 4), (53, 4), (54, 4), (7, 3), (10, 1)])
def test_parts_are_in_order_and_differ_by_one_at_most(length: int, count: int) -> None:
    parts = evenly(range(length), count)
    assert [each for part in parts for each in part] == list(range(length))
    sizes = [len(part) for part in parts]
    assert len(sizes) == min(count, length)
    assert sizes == sorted(sizes, reverse=True)
    assert not sizes or max(sizes) - min(sizes) <= 1 <= min(sizes)


def test_a_process_with_a_gpu_ends_with_its_task_and_one_without_stays() -> None:
    """On a cluster that is told of a GPU: what runs does not look for it."""
    code = """if True:
        import os, ray, numpy as np
        from pathlib import Path
        from orchestrator.experiment import Resources
        from orchestrator.ray_backend import RayBackend, _get, in_a_worker

        def whole(job, models, chunk, gpus):
            return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), gpus

        def by_parts(job, models, chunks, gpus):
            for chunk in chunks:
                yield os.getpid(), np.full(200_000, chunk)  # larger than what is sent without the object store

        ray.init("local", num_cpus=1, num_gpus=1, include_dashboard=False, logging_level="ERROR")
        network = {"": None}
        for gpus, models, alive in ((1.0, network, False), (0.5, network, False), (0.5, {}, True), (0.0, network, True)):
            backend = RayBackend(Path(), Path(), Resources(gpus_per_worker=gpus))
            seen = [_get(backend._submit(whole, None, ["x"], models, "")[0]) for _ in range(3)]
            assert {each[1:] for each in seen} == ({(None, 0.0)} if alive else {("0", gpus)}), seen
            assert len({process for process, *_ in seen}) == (1 if alive else 3), seen
            streams = backend._submit(by_parts, None, [(1, 2), (3,)], models, "")
            parts = [_get(reference) for stream in streams for reference in stream]
            assert [values.sum() for _, values in parts] == [200_000, 400_000, 600_000]
            assert parts[0][0] == parts[1][0]
            assert (parts[0][0] == parts[2][0]) == alive
            if models:
                assert (in_a_worker(os.getpid, backend.resources) == in_a_worker(os.getpid, backend.resources)) == alive
        ray.shutdown()
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_fit_takes_the_workers_that_fit_the_nodes_alive_and_waits_for_the_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def node(cpus: float, alive: bool = True) -> dict[str, object]:
        return {"Alive": alive, "Resources": {"CPU": cpus}}

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    backend = RayBackend(tmp_path, tmp_path, Resources(workers=4, cpus_per_worker=2, min_workers=2))
    # Two nodes of 5 CPUs hold two workers each; three CPUs apart on two nodes hold none.
    for nodes, workers in (([node(5), node(5)], 4), ([node(9), node(9)], 4), ([node(5), node(5, alive=False)], 2)):
        monkeypatch.setattr(ray, "nodes", lambda nodes=nodes: nodes)
        assert backend._room(lambda text: None) == workers
    looks = iter(([], [node(3), node(1)], [node(4)]))
    monkeypatch.setattr(ray, "nodes", lambda: next(looks))
    notes: list[str] = []
    assert backend._room(notes.append) == 2
    assert notes == ["waits: 0 workers fit the nodes there are, resources.min_workers is 2"]
    with pytest.raises(InputError, match=r"resources.min_workers must be at least 1, not 0"):
        Resources(min_workers=0)


def test_an_idle_process_stays_warm_while_all_cpus_are_taken(cluster: Cluster) -> None:
    """The trap: by default it ends after a second, and the next short task imports everything again."""

    @ray.remote
    class Taken:
        def ready(self) -> None:
            pass

    @ray.remote(num_cpus=0)
    def process() -> int:
        return os.getpid()

    holder = Taken.options(num_cpus=cluster.cpus).remote()  # type: ignore[attr-defined]
    ray.get(holder.ready.remote())
    first = ray.get(process.remote())
    time.sleep(3)
    assert ray.get(process.remote()) == first
    ray.kill(holder)


def test_the_cluster_asks_for_a_token(cluster: Cluster) -> None:
    assert cluster.started_here
    assert cluster.dashboard.startswith("127.0.0.1:")
    assert ray.get_runtime_context().gcs_address == cluster.address


def test_controllers_leave_the_logging_of_their_process_alone(
    on_ray: tuple[list[TaskOutcome], RayBackend], cluster: Cluster
) -> None:
    """Two in one process have waited for each other for ever: dictConfig takes logging's lock, then those of all handlers."""
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    logs = [path.name for path in (session / "logs" / "train").glob("*")]
    assert any("worker" in name for name in logs)  # fits ran, and this is where their logs lie
    assert not [name for name in logs if "controller" in name]


def test_a_fit_starts_no_process_that_nobody_asks(on_ray: tuple[list[TaskOutcome], RayBackend], cluster: Cluster) -> None:
    """By default Ray Train starts four for a fit besides its workers, each of which imports for one or two seconds."""
    started = {each.class_name for each in list_actors(cluster.address, limit=10_000)}
    assert {"RayTrainWorker", "SynchronizationActor"} <= started
    assert not {name for name in started if "Controller" in name or "Cleaner" in name or "Dataset" in name or "Watcher" in name}


@pytest.mark.parametrize(("count", "watched"), [(1, False), (2, True)])
def test_nodes_are_watched_for_their_end_where_there_are_several(
    count: int, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a preempted node is no failure of the fit follows from this watcher alone."""
    made = []

    class Controller:
        def __init__(self, callbacks: list[object]) -> None:
            self._worker_group_callbacks_to_propagate = [*callbacks, PreemptionCallback()]
            made.append(self)

        async def run(self) -> None: ...

        def get_result(self) -> None: ...

    monkeypatch.setattr("orchestrator.ray_backend.TrainController", Controller)
    there = [Node(str(number), "host", 1, 0) for number in range(count)]
    monkeypatch.setattr("orchestrator.ray_backend.nodes", lambda: there)
    trainer = object.__new__(_Trainer)
    kept = object()
    trainer._initialize_and_run_controller(callbacks=[PlacementGroupCleanerCallback(), kept])
    told = made[0]._worker_group_callbacks_to_propagate
    assert told[0] is kept
    assert [type(each) for each in told[1:]] == [PreemptionCallback] * watched


@ray.remote(num_cpus=0)
class Maker:
    """An actor that has a placement group that it got and one that it waits for."""

    def make(self) -> tuple[int, list[str]]:
        groups = [placement_group([{"CPU": cpus}]) for cpus in (0.25, 1000)]
        ray.get(groups[0].ready())
        return os.getpid(), [group.id.hex() for group in groups]


def test_what_a_dead_actor_held_is_given_back_and_nothing_else(cluster: Cluster) -> None:
    """Ray keeps it until the job ends: a sweep whose trial's driver was killed waited for its CPUs for ever."""
    ours = placement_group([{"CPU": 0.25}])
    ray.get(ours.ready())
    living, dead = Maker.remote(), Maker.remote()  # type: ignore[attr-defined]
    pid, lost = ray.get(dead.make.remote())
    another = dead.make.remote()
    psutil.Process(pid).kill()
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get([another, dead.make.remote()])
    [kept] = ray.get(living.make.remote())[1][:1]

    def states() -> dict[str, str]:
        return {name: row["state"] for name, row in placement_group_table().items()}

    assert [states()[name] for name in lost] == ["CREATED", "PENDING"]  # the trap
    assert remove_orphans() >= 2
    assert [states()[name] for name in lost] == ["REMOVED", "REMOVED"]
    assert [states()[name] for name in (ours.id.hex(), kept)] == ["CREATED", "CREATED"]
    assert remove_orphans() == 0
    ray.kill(living)
    deadline = time.monotonic() + 20
    while not remove_orphans() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states()[kept] == "REMOVED"
    assert states()[ours.id.hex()] == "CREATED"
    remove_placement_group(ours)


def test_a_host_that_dies_leaves_no_placement_group(cluster: Cluster) -> None:
    """The actor that `run` and `compare` make for a task's fits, as their driver is none."""

    def fit() -> None:
        group = placement_group([{"CPU": 0.25}])
        ray.get(group.ready())
        os.kill(os.getpid(), signal.SIGKILL)

    before = {name for name, row in placement_group_table().items() if row["state"] != "REMOVED"}
    with pytest.raises(ray.exceptions.ActorDiedError), in_an_actor(1) as call:
        call(fit)
    assert {name for name, row in placement_group_table().items() if row["state"] != "REMOVED"} == before
    assert len(placement_group_table()) > len(before)
