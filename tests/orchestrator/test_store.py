"""Nothing is computed twice: addresses, reuse, locks, and what is left behind when something fails."""

import dataclasses
import errno
import fcntl
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cavs_model import checkpoint
from cavs_model.checkpoint import About
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError, OutageError
from cavs_model.evaluate import ConsolidateJob, Data, EvaluateJob, ScoreJob
from cavs_model.methods.cmr import CMR
from cavs_model.methods.ewc import EWC
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.plop import PLOP
from cavs_model.networks.av_segmenter import NetworkConfig
from cavs_model.scenario import Scenario
from cavs_model.train import Schedule, Seeds, TaskJob
from cavs_model.types import AUDIO_VISUAL, IGNORE, VISUAL_ONLY, LabelRule, Paste, Row, ScoreTable
from orchestrator import entries, housekeeping, store
from orchestrator.store import StoredBackend, consolidate_key, evaluate_key, score_key, train_key, write_atomically

TONES = Tones()
BASE_TASK, TASK = Scenario(setting="2-2").tasks(TONES)
DATA = Data(TONES, "cache", TONES.class_names())
JOB = TaskJob(
    AUDIO_VISUAL, TASK, DATA, (Row("train-00001", 1), Row("train-00002", 2)), CMR(), NetworkConfig(visual_weights="none"),
    Schedule(), "fp32", Seeds(0, 0, 0), "networks/abc", output="somewhere", label="trial 1",
    pastes=(Paste("train-00003", "train-00001", 1),), method_state="states/abc",
)  # fmt: skip
BASE_JOB = dataclasses.replace(JOB, task=BASE_TASK, rows=(), pastes=(), start=None, method_state=None, method=Finetune())
SCORE = ScoreJob("after", CMR(), TASK, DATA, 16, "fp32", label="trial 1")
CONSOLIDATE = ConsolidateJob(EWC(), TASK, DATA, "fp32", output="somewhere", label="trial 1")
EVALUATE = EvaluateJob("val", ("val-0", "val-1"), TASK.seen_rule, 5, DATA, 16, "fp32", label="trial 1")
CHECKPOINTS = {AUDIO_VISUAL: "networks/abc", VISUAL_ONLY: "networks/def"}


@dataclasses.dataclass
class FakeBackend:
    """Answers at once and remembers what it was asked. `fail` is raised in the middle of writing the last network."""

    asked: list = dataclasses.field(default_factory=list)
    fail: BaseException | None = None

    def prepare(self, benchmark, splits, audio_weights=None):
        self.asked.append(("prepare", benchmark.name, tuple(splits)))
        return "cache"

    def train(self, jobs):
        self.asked.append(("train", tuple(job.network for job in jobs)))
        for job in jobs:
            about = About(job.network, job.task.num_classes, {}, ({"loss": 1.0},), clips=3, seconds=2.0, world_size=2)
            checkpoint.save(pathlib.Path(job.output), {"weight": torch.ones(2)}, about)
            if self.fail is not None and job is jobs[-1]:
                (pathlib.Path(job.output) / checkpoint.ABOUT).unlink()
                raise self.fail
        return [job.output for job in jobs]

    def score(self, job, checkpoints):
        self.asked.append(("score", job.stage))
        return ScoreTable(("a", "b"), {"delta": (0.1, 1 / 3), "frames": (2.0, float("nan"))})

    def consolidate(self, job, path, previous):
        self.asked.append(("consolidate", previous))
        checkpoint.save_method_state(pathlib.Path(job.output), {"weight": torch.ones(2)})
        if self.fail is not None:
            raise self.fail
        return job.output

    def evaluate(self, job, checkpoint):
        self.asked.append(("evaluate", job.split))
        return np.array([[1, 2], [3, 2**40]], dtype=np.int64)

    def about(self, path):
        return checkpoint.read_about(pathlib.Path(path))


def names(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if "locks" not in path.parts and path.is_file())


# Reuse.


def test_networks_are_trained_once(tmp_path):
    backend = FakeBackend()
    stored = StoredBackend(backend, tmp_path)
    [first] = stored.train([JOB])
    assert stored.train([dataclasses.replace(JOB, label="trial 2", output="")]) == [first]
    assert backend.asked == [("train", (AUDIO_VISUAL,))]
    assert stored.reuse == store.Reuse(1, 0, 4.0, 0.0)  # an outcome counts when it is asked for first
    assert pathlib.Path(first) == tmp_path / "networks" / train_key(JOB)
    assert stored.about(first).network == AUDIO_VISUAL
    other = StoredBackend(FakeBackend(), tmp_path)
    assert other.train([JOB]) == other.train([JOB]) == [first]
    assert other.backend.asked == []
    assert other.reuse == store.Reuse(0, 1, 0.0, 4.0)


def test_of_two_networks_only_the_missing_one_is_trained_and_their_order_stays(tmp_path):
    backend = FakeBackend()
    stored = StoredBackend(backend, tmp_path)
    seen = dataclasses.replace(JOB, network=VISUAL_ONLY)
    [known] = stored.train([seen])
    for jobs in ([JOB, seen], [seen, JOB]):
        paths = stored.train(jobs)
        assert [stored.about(path).network for path in paths] == [job.network for job in jobs]
        assert paths[jobs.index(seen)] == known
    assert backend.asked == [("train", (VISUAL_ONLY,)), ("train", (AUDIO_VISUAL,))]
    assert (stored.reuse.computed, stored.reuse.reused) == (2, 0)


def test_scores_and_counts_are_computed_once_and_come_back_as_they_were(tmp_path):
    backend = FakeBackend()
    stored = StoredBackend(backend, tmp_path)
    for again in (stored, stored, StoredBackend(backend, tmp_path)):
        table = again.score(SCORE, CHECKPOINTS)
        assert table.sample_ids == ("a", "b")
        assert table.columns["delta"] == (0.1, 1 / 3)
        assert np.isnan(table.columns["frames"][1])
        counts = again.evaluate(EVALUATE, "networks/abc")
        assert counts.dtype == np.int64
        assert counts.tolist() == [[1, 2], [3, 2**40]]
    assert backend.asked == [("score", "after"), ("evaluate", "val")]
    assert (stored.reuse.computed, stored.reuse.reused) == (2, 0)
    assert (again.reuse.computed, again.reuse.reused) == (0, 2)
    assert names(tmp_path) == sorted(
        [f"scores/{score_key(SCORE, CHECKPOINTS)}.json", f"counts/{evaluate_key(EVALUATE, 'networks/abc')}.json"]
    )


def test_what_a_method_keeps_of_a_network_is_computed_once(tmp_path):
    backend = FakeBackend()
    stored = StoredBackend(backend, tmp_path)
    first = stored.consolidate(CONSOLIDATE, "networks/abc", None)
    assert stored.consolidate(dataclasses.replace(CONSOLIDATE, label="trial 2"), "elsewhere/abc", None) == first
    second = stored.consolidate(CONSOLIDATE, "networks/abc", first)
    assert backend.asked == [("consolidate", None), ("consolidate", first)]
    assert (stored.reuse.computed, stored.reuse.reused) == (2, 0)
    for path, previous in ((first, None), (second, first)):
        assert pathlib.Path(path) == tmp_path / "states" / consolidate_key(CONSOLIDATE, "networks/abc", previous)
        assert checkpoint.read_method_state(pathlib.Path(path))["weight"].tolist() == [1, 1]


def test_data_are_prepared_under_a_lock_and_always_looked_at(tmp_path):
    backend = FakeBackend()
    stored = StoredBackend(backend, tmp_path)
    assert [stored.prepare(TONES, ("train", "val")) for _ in range(2)] == ["cache", "cache"]
    assert len(backend.asked) == 2


# Failure.


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_of_what_fails_only_what_is_whole_is_kept_and_the_rest_tried_again(tmp_path, error):
    stored = StoredBackend(FakeBackend(fail=error), tmp_path)
    pair = [JOB, dataclasses.replace(JOB, network=VISUAL_ONLY)]
    with pytest.raises(type(error)):
        stored.train(pair)
    with pytest.raises(type(error)):
        stored.consolidate(CONSOLIDATE, "networks/abc", None)
    assert [path.name for path in (tmp_path / "networks").iterdir()] == [train_key(JOB)]
    assert list((tmp_path / "states").iterdir()) == list((tmp_path / "partial").iterdir()) == []
    assert (stored.reuse.computed, stored.reuse.computed_seconds) == (1, 4.0)
    again = StoredBackend(FakeBackend(), tmp_path)
    assert len(again.train(pair)) == 2
    assert again.backend.asked == [("train", (VISUAL_ONLY,))]
    assert {path.name for path in (tmp_path / "networks").iterdir()} == {train_key(job) for job in pair}


def test_leftovers_of_a_killed_process_and_broken_folders_are_replaced(tmp_path):
    stored = StoredBackend(FakeBackend(), tmp_path)
    key = train_key(JOB)
    for name in (f".{key}.0123abcd", key):  # a partial folder, and one whose description somebody deleted
        (tmp_path / "networks" / name).mkdir()
        (tmp_path / "networks" / name / checkpoint.WEIGHTS).write_bytes(b"half")
    other = tmp_path / "networks" / ".other.0123abcd"
    other.mkdir()
    [path] = stored.train([JOB])
    assert stored.about(path).clips == 3
    assert {folder.name for folder in (tmp_path / "networks").iterdir()} == {key, other.name}
    assert len(list((tmp_path / "damaged").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[1]", b"3", b'{"seconds": 1, "value": {}}', b"\xff\x00",
                                     b'{"sha256": "0", "seconds": 1, "value": {"counts": []}}'])  # fmt: skip
def test_a_damaged_file_is_set_aside_told_of_and_computed_again(tmp_path, content):
    told, backend = [], FakeBackend()
    stored = StoredBackend(backend, tmp_path, on_damage=told.append)
    path = tmp_path / "counts" / f"{evaluate_key(EVALUATE, 'x/abc')}.json"
    path.write_bytes(content)
    assert stored.evaluate(EVALUATE, "x/abc").shape == stored.evaluate(EVALUATE, "x/abc").shape == (2, 2)
    assert backend.asked == [("evaluate", "val")]
    [aside] = (tmp_path / "damaged").iterdir()
    assert aside.read_bytes() == content
    assert len(told) == 1
    assert f"damaged store entry {path}" in told[0]
    assert str(aside) in told[0]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.ABOUT, entries.MANIFEST])
@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 9), pathlib.Path.unlink])
def test_a_damaged_network_is_set_aside_told_of_and_trained_again(tmp_path, file, damage):
    told, backend = [], FakeBackend()
    stored = StoredBackend(backend, tmp_path, on_damage=told.append)
    [path] = stored.train([JOB])
    damage(pathlib.Path(path) / file)
    assert stored.train([JOB]) == stored.train([JOB]) == [path]
    assert len(backend.asked) == 2
    assert len(told) == len(list((tmp_path / "damaged").iterdir())) == 1
    assert (stored.reuse.computed, stored.reuse.reused) == (1, 0)


def test_a_damaged_state_of_a_method_is_set_aside_told_of_and_computed_again(tmp_path):
    told, backend = [], FakeBackend()
    stored = StoredBackend(backend, tmp_path, on_damage=told.append)
    path = stored.consolidate(CONSOLIDATE, "networks/abc", None)
    flip_a_bit(pathlib.Path(path) / checkpoint.METHOD_STATE)
    assert stored.consolidate(CONSOLIDATE, "networks/abc", None) == path
    assert (len(backend.asked), len(told)) == (2, 1)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x\nNo space left on device")]
)
def test_a_full_disk_is_named_and_nothing_half_written_is_left(tmp_path, error):
    stored = StoredBackend(FakeBackend(fail=error), tmp_path)
    for verb in (lambda: stored.train([JOB]), lambda: stored.consolidate(CONSOLIDATE, "networks/abc", None)):
        with pytest.raises(OutageError, match=f"no space left while writing to {tmp_path}"):
            verb()
    assert names(tmp_path) == []


def test_a_file_too_large_for_the_disk_is_named_and_leaves_nothing(tmp_path):
    stored = StoredBackend(FakeBackend(), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OutageError, match=f"no space left while writing to {tmp_path}"):
            stored.evaluate(EVALUATE, "x/abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []
    assert stored.evaluate(EVALUATE, "x/abc").shape == (2, 2)


def test_a_training_cut_off_finds_its_folder_again_which_goes_when_the_network_is_there(tmp_path):
    found = []

    class Interrupted(FakeBackend):
        def train(self, jobs):
            folder = pathlib.Path(jobs[0].resume)
            found.append((folder, [path.name for path in folder.iterdir()]))
            (folder / "state").touch()
            return super().train(jobs)

    with pytest.raises(RuntimeError):
        StoredBackend(Interrupted(fail=RuntimeError("killed")), tmp_path).train([JOB])
    StoredBackend(Interrupted(), tmp_path).train([JOB])
    folder = tmp_path / "partial" / train_key(JOB)
    assert found == [(folder, []), (folder, ["state"])]
    assert not folder.exists()


def test_a_store_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"cannot write the store {tmp_path / 'file' / 'store'}"):
        StoredBackend(FakeBackend(), tmp_path / "file" / "store")


@pytest.mark.parametrize(
    ("number", "passes"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EROFS, False)]
)
def test_of_what_the_system_refuses_only_the_lack_of_room_may_pass(tmp_path, monkeypatch, number, passes):
    found = entries.Entries(tmp_path)
    found.make()
    write_atomically(found.path("counts", "k"), b"{")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(entries.os, "replace", refuse)
    with pytest.raises(InputError, match=f"cannot move the damaged store entry .*: {os.strerror(number)}") as moved:
        found.set_aside("counts", "k")
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(InputError, match=f"cannot write the store {tmp_path}: {os.strerror(number)}") as made:
        found.make()
    assert [isinstance(caught.value, OutageError) for caught in (moved, made)] == [passes, passes]


def test_an_entry_that_is_deleted_under_its_reader_is_asked_for_again(tmp_path, monkeypatch):
    stored = StoredBackend(FakeBackend(), tmp_path)
    [path] = stored.train([JOB])
    read = entries.Entries.read

    def pruned(self, kind, key):
        body = read(self, kind, key)
        if body is not None:
            shutil.rmtree(path) if kind == "networks" else self.path(kind, key).unlink()
        return body

    with monkeypatch.context() as patch:
        patch.setattr(entries.Entries, "read", pruned)
        with pytest.raises(OutageError, match=f"the store entry {path} was deleted as soon as it was found"):
            stored.train([JOB])
        patch.setattr(entries.Entries, "read", lambda *_: None)
        with pytest.raises(OutageError, match=r"the store entry .* was deleted as soon as it was written"):
            stored.evaluate(EVALUATE, path)
    assert stored.train([JOB]) == [path]
    assert stored.evaluate(EVALUATE, path).shape == (2, 2)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "entry.json"
    write_atomically(path, b"old")
    monkeypatch.setattr(entries.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["entry.json"]


# Several at once.


def test_threads_that_want_the_same_compute_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "LOCK_POLL_SECONDS", 0.01)
    backend, waiting, results = FakeBackend(), threading.Event(), []
    stored = StoredBackend(backend, tmp_path, on_wait=lambda label: waiting.set())
    slow = dataclasses.replace(stored, backend=backend)
    evaluate = backend.evaluate

    def slowly(job, path):
        assert waiting.wait(10)
        return evaluate(job, path)

    backend.evaluate = slowly
    threads = [threading.Thread(target=lambda: results.append(slow.evaluate(EVALUATE, "x").tolist())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert backend.asked == [("evaluate", "val")]
    assert (stored.reuse.computed, stored.reuse.reused) == (1, 0)


def test_two_that_want_the_same_two_networks_in_opposite_orders_do_not_block_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "LOCK_POLL_SECONDS", 0.01)
    pair = [JOB, dataclasses.replace(JOB, network=VISUAL_ONLY)]
    backend, results = FakeBackend(), []
    train = backend.train
    backend.train = lambda jobs: (time.sleep(0.05), train(jobs))[1]
    threads = [
        threading.Thread(target=lambda jobs=jobs: results.append(StoredBackend(backend, tmp_path).train(jobs)), daemon=True)
        for jobs in (pair, pair[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(results) == 2
    assert sorted(results[0]) == sorted(results[1])
    assert len(backend.asked) == 1


class SlowBackend(FakeBackend):
    """Begins, says so by a file, and ends when another file appears."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def _wait(self, path=None):
        if path is not None:
            path.mkdir(parents=True)
            (path / checkpoint.WEIGHTS).write_bytes(b"half")
        with open(self.folder / "log", "a") as log:
            log.write("began\n")
        while not (self.folder / "go").exists():
            time.sleep(0.01)

    def evaluate(self, job, checkpoint):
        self._wait()
        return super().evaluate(job, checkpoint)

    def train(self, jobs):
        self._wait(pathlib.Path(jobs[0].output))
        return super().train(jobs)


def _evaluate_then_train(folder):
    stored = StoredBackend(SlowBackend(folder), folder / "store")
    stored.evaluate(EVALUATE, "x")
    (folder / "go").unlink()
    stored.train([JOB])


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_share_the_work_and_a_killed_one_gives_its_lock_back(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "LOCK_POLL_SECONDS", 0.01)
    child = multiprocessing.get_context("spawn").Process(target=_evaluate_then_train, args=(tmp_path,))
    child.start()
    try:
        log = tmp_path / "log"
        _until(lambda: log.exists() and log.read_text() == "began\n")

        # It computes, this process waits, and takes what it made.
        waited = []

        def let_go(label):
            waited.append(label)
            (tmp_path / "go").touch()

        backend = FakeBackend()
        stored = StoredBackend(backend, tmp_path / "store", on_wait=let_go)
        assert stored.evaluate(EVALUATE, "x").tolist() == [[1, 2], [3, 2**40]]
        assert (waited, backend.asked, stored.reuse.reused) == ([EVALUATE.label], [], 1)

        # It trains and is killed while this process waits, which then trains itself and clears up.
        _until(lambda: log.read_text() == "began\nbegan\n")
        [partial] = (tmp_path / "store" / "networks").iterdir()
        assert partial.name.startswith(f".{train_key(JOB)}.")
        stored = StoredBackend(backend, tmp_path / "store", on_wait=lambda _: os.kill(child.pid, signal.SIGKILL))
        [path] = stored.train([JOB])
        assert backend.asked == [("train", (AUDIO_VISUAL,))]
        assert [str(folder) for folder in (tmp_path / "store" / "networks").iterdir()] == [path]
    finally:
        child.kill()
        child.join()
        child.close()


def half_written(folder, key=None):
    """What processes that were killed while they wrote leave of a network and of a file of counts."""
    key = key or train_key(JOB)
    network = folder / "networks" / f".{key}.0123abcd"
    network.mkdir(parents=True)
    (network / checkpoint.WEIGHTS).write_bytes(b"half")
    counts = folder / "counts" / f".{key}.json.0123abcd"
    counts.write_bytes(b"half")
    return network, counts


@pytest.mark.parametrize("error", [None, InputError("no"), KeyboardInterrupt()])
def test_a_verb_clears_what_killed_processes_left_before_and_after_it(tmp_path, monkeypatch, error):
    monkeypatch.setattr(entries, "KILLED_SECONDS", 0.0)
    found = entries.Entries(tmp_path)
    found.make()
    [whole] = StoredBackend(FakeBackend(), tmp_path).train([JOB])
    to_go_on_from = tmp_path / "partial" / "abc"
    to_go_on_from.mkdir()
    before = half_written(tmp_path, "abc")
    with pytest.raises(type(error)) if error else nullcontext(), found.tidied():
        assert not any(path.exists() for path in before)
        after = half_written(tmp_path, "def")
        if error:
            raise error
    assert not any(path.exists() for path in after)
    assert to_go_on_from.exists()
    assert StoredBackend(FakeBackend(), tmp_path).train([JOB]) == [whole]


def test_what_somebody_writes_is_left_alone_unless_he_dies_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "LOCK_POLL_SECONDS", 0.01)
    child = multiprocessing.get_context("spawn").Process(target=_evaluate_then_train, args=(tmp_path,))
    child.start()
    try:
        (tmp_path / "go").touch()
        log = tmp_path / "log"
        _until(lambda: log.exists() and log.read_text() == "began\nbegan\n")
        found = entries.Entries(tmp_path / "store")
        [written] = (tmp_path / "store" / "networks").iterdir()
        found.clear_half_written(0.1)
        assert written.exists()
        killing = threading.Timer(0.3, child.kill)
        killing.start()
        found.clear_half_written(60.0)
        assert not written.exists()
        killing.join()
    finally:
        child.kill()
        child.join()
        child.close()


def test_half_written_files_of_a_store_that_cannot_be_written_end_no_verb(tmp_path, monkeypatch):
    found = entries.Entries(tmp_path)
    found.make()
    left = half_written(tmp_path)
    monkeypatch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied")))
    with found.tidied():
        pass
    monkeypatch.undo()
    assert all(path.exists() for path in left)


def test_a_lock_is_free_after_success_and_failure(tmp_path):
    stored = StoredBackend(FakeBackend(), tmp_path)
    stored.train([JOB])
    failing = StoredBackend(FakeBackend(fail=RuntimeError("no")), tmp_path)
    with pytest.raises(RuntimeError):
        failing.train([BASE_JOB])
    locks = list((tmp_path / "locks").iterdir())
    assert {lock.stem for lock in locks} == {train_key(JOB), train_key(BASE_JOB)}
    for lock in locks:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Addresses: what is in them, and what is not.


def changed(job, path, value):
    """The job with a field replaced, by dotted path."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(job, **{name: changed(getattr(job, name), rest, value) if rest else value})


OTHER_TASKS = {
    "index": 2,
    "num_old": 2,
    "num_classes": 7,
    "train": TASK.train[:-1],
    "train_rule": LabelRule(range(3, 5), IGNORE),
}
DATA_CHANGES = [
    ("data.benchmark", Tones(seed=1), True),
    ("data.benchmark", Tones(), False),
    ("data.learned_order", TONES.class_names()[::-1], True),
    ("data.cache", "elsewhere", False),
    ("data.audio_features", "vggish-v1-0", False),  # follow from the network's configuration
    ("label", "trial 9", False),
    ("precision", "bf16", True),
]
TASK_CHANGES = [(f"task.{name}", value, True) for name, value in OTHER_TASKS.items()]


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        *DATA_CHANGES,
        *TASK_CHANGES,
        ("network", VISUAL_ONLY, True),
        ("rows", JOB.rows[::-1], True),
        ("rows", JOB.rows + JOB.rows[:1], True),
        ("rows", (Row("train-00001", 1, {"delta": 0.5}), JOB.rows[1]), False),
        ("method", PLOP(), True),
        ("method.base", Finetune(), True),
        ("method.base.pod_weight", 0.5, True),
        ("method.memory_truth", "overwritten", True),
        ("method.samples_per_class", 9, False),
        ("method.selection", "random", False),
        ("method.resampling_ratio", 0.9, False),
        ("method.delta", "sum_released", False),
        ("config.visual_encoder", "tiny", True),
        ("config.visual_weights", "imagenet", False),  # it starts from a checkpoint
        ("config.audio_encoder", "tiny", True),
        ("config.audio_dim", 32, True),
        ("config.width", 32, True),
        ("config.dilations", (1,), True),
        ("config.modalities", "picture", True),
        ("schedule.epochs", 31, True),
        ("schedule.base_epochs", 31, False),
        ("schedule.batch_size", 8, True),
        ("schedule.learning_rate", 1e-3, True),
        ("schedule.decay", "cosine", True),
        ("schedule.selection", "best_val", True),
        ("schedule.selection_from", 0.25, False),
        ("seeds.init", 1, True),
        ("seeds.data", 1, True),
        ("seeds.memory", 1, False),
        ("start", "networks/xyz", True),
        ("start", "elsewhere/networks/abc", False),
        ("method_state", "states/xyz", True),
        ("method_state", None, True),
        ("method_state", "elsewhere/states/abc", False),
        ("pastes", (), True),
        ("pastes", (Paste("train-00004", "train-00001", 1),), True),
        ("pastes", (Paste("train-00003", "train-00002", 1),), True),
        ("pastes", (Paste("train-00003", "train-00001", 2),), True),
        ("output", "elsewhere", False),
        ("resume", "elsewhere", False),
        ("resume_seconds", 1.0, False),
    ],
)
def test_what_the_address_of_a_network_depends_on(path, value, matters):
    assert (train_key(changed(JOB, path, value)) != train_key(JOB)) == matters


def test_every_field_of_a_job_was_considered():
    for job, test in (
        (JOB, test_what_the_address_of_a_network_depends_on),
        (SCORE, test_what_the_address_of_scores_depends_on),
        (CONSOLIDATE, test_what_the_address_of_a_methods_state_depends_on),
        (EVALUATE, test_what_the_address_of_counts_depends_on),
    ):
        changes = test.pytestmark[0].args[1]
        assert {path.split(".")[0] for path, *_ in changes} == {item.name for item in dataclasses.fields(job)}


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        ("schedule.epochs", 31, False),  # of later tasks
        ("schedule.base_epochs", 31, True),
        ("schedule.batch_size", 8, True),
        ("schedule.selection_from", 0.25, False),
        ("config.visual_weights", "imagenet", True),
        ("config.width", 32, True),
        ("seeds.init", 1, True),
    ],
)
def test_what_the_address_of_a_base_network_depends_on(path, value, matters):
    assert (train_key(changed(BASE_JOB, path, value)) != train_key(BASE_JOB)) == matters


def test_when_validation_chooses_the_epoch_it_matters_from_when_on():
    job = changed(JOB, "schedule.selection", "best_val")
    assert train_key(changed(job, "schedule.selection_from", 0.25)) != train_key(job)


def test_first_weights_count_by_their_content(tmp_path):
    keys = []
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("b.pt", b"2")):
        (tmp_path / name).write_bytes(content)
        keys.append(train_key(changed(BASE_JOB, "config.visual_weights", str(tmp_path / name))))
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("job", [BASE_JOB, JOB], ids=["base", "later"])
def test_frozen_weights_count_by_their_content_in_every_task(job, tmp_path):
    job = changed(changed(job, "config.audio_encoder", "vggish"), "config.audio_weights", "none")
    keys = [train_key(job)]
    for name, content in (("a.pt", b"1"), ("b.pt", b"1"), ("b.pt", b"22")):
        (tmp_path / name).write_bytes(content)
        keys.append(train_key(changed(job, "config.audio_weights", str(tmp_path / name))))
    assert keys[1] == keys[2]
    assert len(set(keys)) == 3
    with pytest.raises(InputError, match=r"audio_weights: cannot read .*absent"):
        train_key(changed(job, "config.audio_weights", str(tmp_path / "absent.pt")))


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        *DATA_CHANGES,
        *TASK_CHANGES,
        ("stage", "before", True),
        ("batch_size", 8, True),
        ("method", dataclasses.replace(CMR(), delta="sum_released"), True),
        ("method.samples_per_class", 9, False),
        ("method.resampling_ratio", 0.9, False),
        ("method.base.pod_weight", 0.5, False),
    ],
)
def test_what_the_address_of_scores_depends_on(path, value, matters):
    assert (score_key(changed(SCORE, path, value), CHECKPOINTS) != score_key(SCORE, CHECKPOINTS)) == matters


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        *DATA_CHANGES,
        *TASK_CHANGES,
        ("method", CMR(), True),
        ("method.decay", 0.5, True),
        ("method.weight", 1.0, False),
        ("method.normalise", False, False),
        ("output", "elsewhere", False),
    ],
)
def test_what_the_address_of_a_methods_state_depends_on(path, value, matters):
    key = consolidate_key(CONSOLIDATE, "n/abc", "s/abc")
    assert (consolidate_key(changed(CONSOLIDATE, path, value), "n/abc", "s/abc") != key) == matters
    assert consolidate_key(CONSOLIDATE, "elsewhere/abc", "elsewhere/abc") == key
    for others in (("n/def", "s/abc"), ("n/abc", "s/def"), ("n/abc", None)):
        assert consolidate_key(CONSOLIDATE, *others) != key


def test_scores_depend_on_which_network_is_which_checkpoint():
    key = score_key(SCORE, CHECKPOINTS)
    assert score_key(SCORE, dict(reversed(CHECKPOINTS.items()))) == key
    assert score_key(SCORE, {name: f"elsewhere/{path}" for name, path in CHECKPOINTS.items()}) == key
    assert score_key(SCORE, {AUDIO_VISUAL: "networks/def", VISUAL_ONLY: "networks/abc"}) != key
    assert score_key(SCORE, {AUDIO_VISUAL: "networks/abc"}) != key


@pytest.mark.parametrize(
    ("path", "value", "matters"),
    [
        *DATA_CHANGES,
        ("split", "test", True),
        ("sample_ids", ("val-1", "val-0"), True),
        ("rule", TASK.current_rule, True),
        ("num_classes", 6, True),
        ("batch_size", 8, True),
        ("measure", "frames", True),
    ],
)
def test_what_the_address_of_counts_depends_on(path, value, matters):
    assert (evaluate_key(changed(EVALUATE, path, value), "n/abc") != evaluate_key(EVALUATE, "n/abc")) == matters
    assert evaluate_key(EVALUATE, "elsewhere/abc") == evaluate_key(EVALUATE, "n/abc") != evaluate_key(EVALUATE, "n/def")


def test_an_entry_is_readable_json_with_its_cost(tmp_path):
    StoredBackend(FakeBackend(), tmp_path).evaluate(EVALUATE, "x")
    [path] = (tmp_path / "counts").iterdir()
    entry = json.loads(path.read_text())
    assert entry["value"] == {"counts": [[1, 2], [3, 2**40]]}
    assert entry["seconds"] >= 0


# Keeping house.


def keep_house(monkeypatch, root, *arguments):
    """The verb's status on a store under `root`/store."""
    monkeypatch.setattr("sys.argv", ["store", *arguments, "--outputs", str(root)])
    return housekeeping.housekeeping()


def test_listing_shows_kind_size_age_last_use_and_label(tmp_path, monkeypatch, capsys):
    stored = StoredBackend(FakeBackend(), tmp_path / "store")
    [path] = stored.train([JOB])
    stored.evaluate(EVALUATE, path)
    os.utime(pathlib.Path(path) / entries.MANIFEST, (time.time() - 5 * 86400,) * 2)
    assert keep_house(monkeypatch, tmp_path, "list") == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(file.stat().st_size for file in pathlib.Path(path).iterdir())
    assert lines[1].split() == ["networks", train_key(JOB), *f"{size} B now 5d trial 1".split()]
    assert lines[2].split()[0] == "counts"
    stored.train([JOB])
    keep_house(monkeypatch, tmp_path, "list")
    assert " 5d " not in capsys.readouterr().out


def test_verifying_names_what_is_damaged_and_sets_it_aside_when_told_to(tmp_path, monkeypatch, capsys):
    stored = StoredBackend(FakeBackend(), tmp_path / "store")
    [path] = stored.train([JOB])
    stored.evaluate(EVALUATE, path)
    stored.consolidate(CONSOLIDATE, path, None)
    assert keep_house(monkeypatch, tmp_path, "verify") == 0
    flip_a_bit(pathlib.Path(path) / checkpoint.WEIGHTS)
    for arguments in ([], ["--repair"]):
        assert keep_house(monkeypatch, tmp_path, "verify", *arguments) == 1
        assert f"damaged: {path}: the checksum of {checkpoint.WEIGHTS} differs" in capsys.readouterr().out
    assert keep_house(monkeypatch, tmp_path, "verify") == 0
    assert "2 entries" in capsys.readouterr().out


def test_pruning_by_age_shows_first_and_never_deletes_what_is_locked(tmp_path, monkeypatch, capsys):
    root = tmp_path / "store"
    stored = StoredBackend(FakeBackend(), root)
    old, held, young = stored.train([JOB, dataclasses.replace(JOB, network=VISUAL_ONLY), BASE_JOB])
    for path in (old, held):
        os.utime(pathlib.Path(path) / entries.MANIFEST, (time.time() - 5 * 86400,) * 2)
    for leftover in (root / "networks" / ".k.0", root / "damaged" / "counts-k-1", root / "scores" / ".k.json.0"):
        leftover.touch()
        os.utime(leftover, (0, 0))
    before = names(root)
    assert keep_house(monkeypatch, tmp_path, "prune", "--older-than", "4d") == 0
    assert "2 entries" in capsys.readouterr().out
    assert names(root) == before
    monkeypatch.setattr(entries.Entries, "make", pytest.fail)  # not even a folder
    keep_house(monkeypatch, tmp_path, "prune", "--older-than", "4d")
    monkeypatch.undo()
    capsys.readouterr()
    with entries.Entries(root).locked(pathlib.Path(held).name, lambda: None):
        keep_house(monkeypatch, tmp_path, "prune", "--older-than", "4d", "--yes")
    assert f"kept, in use: networks {pathlib.Path(held).name}" in capsys.readouterr().out
    assert {path.split("/")[1] for path in names(root)} == {pathlib.Path(path).name for path in (held, young)}
    with pytest.raises(InputError, match="--older-than '4'"):
        keep_house(monkeypatch, tmp_path, "prune", "--older-than", "4")


def test_pruning_a_sweep_deletes_what_no_other_run_used(tmp_path, monkeypatch, capsys):
    root = tmp_path / "store"
    one = StoredBackend(FakeBackend(), root, user="sweep/../one")
    two = StoredBackend(FakeBackend(), root, user="comparison/two")
    [shared] = one.train([JOB])
    [own] = one.train([BASE_JOB])
    two.train([JOB])
    with pytest.raises(InputError, match=r"no record of sweep/two; it has: comparison/two, sweep/\.\./one"):
        keep_house(monkeypatch, tmp_path, "prune", "--sweep", "two")
    for arguments, left in (([], {shared, own}), (["--yes"], {shared})):
        keep_house(monkeypatch, tmp_path, "prune", "--sweep", "../one", *arguments)
        assert {str(path) for path in (root / "networks").iterdir()} == left
    assert entries.Entries(root).users() == {"comparison/two": {("networks", train_key(JOB))}}
    keep_house(monkeypatch, tmp_path, "prune", "--comparison", "two", "--yes")
    assert names(root) == []


def test_a_dry_run_changes_nothing_and_debug_looks_at_two_entries_of_a_kind(tmp_path, monkeypatch, capsys):
    root = tmp_path / "store"
    stored = StoredBackend(FakeBackend(), root, user="sweep/one")
    paths = stored.train([JOB, dataclasses.replace(JOB, network=VISUAL_ONLY), BASE_JOB])
    stored.evaluate(EVALUATE, paths[0])
    last = max(paths)
    flip_a_bit(pathlib.Path(last) / checkpoint.WEIGHTS)
    before = names(root)
    for verb in ([], ["list"], ["verify", "--repair"], ["prune", "--older-than", "0m"], ["prune", "--sweep", "one"]):
        assert keep_house(monkeypatch, tmp_path, *verb, "--dry-run") == 0
        out = capsys.readouterr().out
        assert ("would read all of" in out, "would list" in out) == (verb[:1] == ["verify"], verb in ([], ["list"]))
        assert "networks: 3 entries" in out or "4 entries" in out
        assert names(root) == before
    assert keep_house(monkeypatch, tmp_path, "verify", "--debug") == 0  # the damaged one is the third
    assert "3 entries" in capsys.readouterr().out
    assert keep_house(monkeypatch, tmp_path, "verify") == 1
    keep_house(monkeypatch, tmp_path, "--debug")
    assert last.rpartition("/")[2] not in capsys.readouterr().out.split("damaged: ")[-1].partition("\n")[2]
    for flag in ("--dry-run", "--debug"):
        with pytest.raises(InputError, match="--yes deletes"):
            keep_house(monkeypatch, tmp_path, "prune", "--older-than", "0m", "--yes", flag)
    assert names(root) == before


def test_reuse_is_told_in_outcomes_and_worker_seconds():
    total = store.Reuse(1, 2, 30.4, 40.0) + store.Reuse(1, 1, 0.0, 10.0)
    assert total.describe() == "2 outcomes computed (30 worker-seconds), 3 reused (50 worker-seconds)"
