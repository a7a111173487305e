"""A store behind a URI: shared by working copies, kept by leases, whole or not there, and never at the price of a run."""

import errno
import multiprocessing
import os
import pathlib
import pickle
import resource
import signal
import threading
import time
import types
import uuid
from contextlib import contextmanager

import numpy as np
import pyarrow.fs
import pytest
from moto.server import ThreadedMotoServer
from test_store import (
    BASE_JOB,
    CONSOLIDATE,
    EVALUATE,
    JOB,
    SCORE,
    FakeBackend,
    SlowBackend,
    _until,
    flip_a_bit,
)

from cavs_model import checkpoint
from cavs_model.errors import InputError, OutageError
from cavs_model.types import AUDIO_VISUAL
from orchestrator import cli, entries, housekeeping, lease, remote
from orchestrator.entries import Entries
from orchestrator.lease import Lease
from orchestrator.redaction import redacted
from orchestrator.remote import Remote, UnreachableError
from orchestrator.shared import SharedEntries
from orchestrator.store import StoredBackend, train_key

KEY, SECRET = "AKIDEXAMPLE", "hush%2Fhush"  # what a loopback server takes
COUNTS = [[1, 2], [3, 2**40]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times of a test's size; what this process knows of other tests' stores is forgotten."""
    hurry()
    for name, value in (("BEAT_SECONDS", 5.0), ("LEASE_SECONDS", 60.0), ("SETTLE_SECONDS", 0.5), ("POLL_SECONDS", 2.0)):
        monkeypatch.setattr(lease, name, getattr(lease, name))
        assert getattr(lease, name) < value
    monkeypatch.delenv("CAVS_STORE", raising=False)


def hurry():
    lease.BEAT_SECONDS, lease.LEASE_SECONDS, lease.SETTLE_SECONDS, lease.POLL_SECONDS = 0.05, 0.6, 0.02, 0.02


@pytest.fixture(scope="module")
def s3():
    """The address of an S3 server on loopback with an empty bucket."""
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    system = pyarrow.fs.S3FileSystem(
        access_key=KEY, secret_key="hush/hush", region="us-east-1", scheme="http", endpoint_override=f"{host}:{port}",
        allow_bucket_creation=True,
    )  # fmt: skip
    system.create_dir("bucket")
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def uri(request, tmp_path):
    """A store's URI: a folder, fsspec's memory, or S3 as it is spoken."""
    if request.param == "s3":
        return s3_uri(request.getfixturevalue("s3"))
    return f"file://{tmp_path}/far" if request.param == "file" else f"memory://{uuid.uuid4().hex}/far"


def s3_uri(address, bucket="bucket"):
    query = f"region=us-east-1&scheme=http&endpoint_override={address}"
    return f"s3://{KEY}:{SECRET}@{bucket}/{uuid.uuid4().hex}?{query}"


def copy_of(uri, tmp_path, name, tell=None):
    """The store's entries with a working copy of this name."""
    return SharedEntries(tmp_path / name, uri, tell or pytest.fail)


def stored(uri, tmp_path, name, backend=None, **fields):
    return StoredBackend(backend or FakeBackend(), SharedEntries(tmp_path / name, uri), **{"on_damage": pytest.fail, **fields})


# Sharing.


@pytest.mark.parametrize("uri", ["memory", "s3"], indirect=True)
def test_what_one_working_copy_made_another_fetches(uri, tmp_path):
    one = stored(uri, tmp_path, "one", user="sweep/cmr")
    [network] = one.train([JOB])
    state = one.consolidate(CONSOLIDATE, network, None)
    table, counts = one.score(SCORE, {AUDIO_VISUAL: network}), one.evaluate(EVALUATE, network)
    two = stored(uri, tmp_path, "two", user="sweep/two")
    for _ in range(2):  # fetched, then found
        [copy] = two.train([JOB])
        assert copy == str(tmp_path / "two" / "networks" / train_key(JOB))
        for path, other in ((network, copy), (state, two.consolidate(CONSOLIDATE, network, None))):
            files = {file.name: file.read_bytes() for file in pathlib.Path(path).iterdir()}
            assert len(files) >= 2
            assert {file.name: file.read_bytes() for file in pathlib.Path(other).iterdir()} == files
        again = two.score(SCORE, {AUDIO_VISUAL: network})
        assert repr(again) == repr(table)  # nan among them
        assert np.array_equal(two.evaluate(EVALUATE, network), counts)
    assert two.backend.asked == []
    assert (two.reuse.computed, two.reuse.reused) == (0, 4)
    far = Remote(uri)
    assert far.files("locks") == {}
    assert len(far.files("uses/sweep/cmr")) == len(far.files("uses/sweep/two")) == 4
    assert list((tmp_path / "two" / "fetched").iterdir()) == []


def test_an_entry_is_there_when_its_manifest_is(tmp_path):
    uri = f"file://{tmp_path}/far"
    stored(uri, tmp_path, "one").train([JOB])
    [manifest] = (tmp_path / "far").glob("networks/*/entry.json")
    manifest.unlink()  # an upload cut off before the end
    two = stored(uri, tmp_path, "two")
    two.train([JOB])
    assert len(two.backend.asked) == 1
    assert stored(uri, tmp_path, "three").train([JOB])


@pytest.mark.parametrize("file", ["entry.json", checkpoint.WEIGHTS])
@pytest.mark.parametrize("damage", [flip_a_bit, lambda path: os.truncate(path, 9), pathlib.Path.unlink])
def test_a_damaged_entry_far_away_is_set_aside_told_of_and_computed_again(tmp_path, file, damage):
    uri, told = f"file://{tmp_path}/far", []
    stored(uri, tmp_path, "one").train([JOB])
    [path] = (tmp_path / "far" / "networks").rglob(file)
    damage(path)
    two = stored(uri, tmp_path, "two", on_damage=told.append)
    two.train([JOB])
    assert len(two.backend.asked) == 1
    if (file, damage) != ("entry.json", pathlib.Path.unlink):  # then it is no entry
        [aside] = (tmp_path / "far" / "damaged").iterdir()
        assert len(told) == 1
        assert f"in {Remote(uri).shown}/networks/{train_key(JOB)}: " in told[0]
        assert f"set aside as {Remote(uri).shown}/damaged/{aside.name}" in told[0]
    three = stored(uri, tmp_path, "three")
    three.train([JOB])
    assert three.backend.asked == []


def test_a_damaged_working_copy_is_replaced_by_the_whole_entry(tmp_path):
    uri, told = f"file://{tmp_path}/far", []
    one = stored(uri, tmp_path, "one", on_damage=told.append)
    [path] = one.train([JOB])
    flip_a_bit(pathlib.Path(path) / checkpoint.WEIGHTS)
    assert one.train([JOB]) == [path]
    assert len(one.backend.asked) == len(told) == len(list((tmp_path / "one" / "damaged").iterdir())) == 1


def test_a_manifest_cannot_lead_out_of_the_working_copy(tmp_path):
    uri, told = f"file://{tmp_path}/far", []
    (tmp_path / "far" / "networks" / train_key(JOB)).mkdir(parents=True)
    body = {"label": "", "made": 0.0, "seconds": 0.0, "files": {"../../../../bad": {"bytes": 1, "sha256": ""}}}
    (tmp_path / "far" / "networks" / train_key(JOB) / "entry.json").write_bytes(entries.sealed(body))
    stored(uri, tmp_path, "one", on_damage=told.append).train([JOB])
    assert "'../../../../bad' lies outside of it" in told[0]


# Trouble on the way.


@contextmanager
def out_of_reach(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_file_system", lambda uri: (_ for _ in ()).throw(UnreachableError("no route")))
        yield


@contextmanager
def no_room(limit_bytes):
    """No file of this process, here or on the other side, can grow beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_without_the_other_side_work_goes_on_and_is_uploaded_later(tmp_path, monkeypatch):
    uri, told = f"file://{tmp_path}/far", []
    one = stored(uri, tmp_path, "one", on_damage=told.append, user="run/one")
    with out_of_reach(monkeypatch):
        [path] = one.train([JOB])
        assert one.evaluate(EVALUATE, path).tolist() == COUNTS
    assert all(f"no route; going on without, in {tmp_path / 'one'}" in line for line in told)
    assert told
    two = stored(uri, tmp_path, "two")
    two.train([BASE_JOB])
    del told[:]
    one.train([JOB])  # used again
    assert told == []
    two.train([JOB])
    assert len(two.backend.asked) == 1
    one.evaluate(EVALUATE, path)
    assert two.evaluate(EVALUATE, path).tolist() == COUNTS
    assert len(two.backend.asked) == 1


def test_a_trial_that_begins_while_the_other_side_is_away_goes_on_and_a_sweep_does_not_begin(tmp_path, monkeypatch):
    uri, told = f"file://{tmp_path}/far", []
    made = SharedEntries(tmp_path / "one", uri)
    made.make()
    handed_on = pickle.loads(pickle.dumps(made))
    with out_of_reach(monkeypatch):
        [path] = StoredBackend(FakeBackend(), handed_on, on_damage=told.append).train([JOB])
        for fresh in (SharedEntries(tmp_path / "one", uri), SharedEntries(tmp_path / "one", f"{uri}/other")):
            with pytest.raises(OutageError, match="no route; check --store"):
                StoredBackend(FakeBackend(), fresh)
    assert path == str(tmp_path / "one" / "networks" / train_key(JOB))
    assert told
    assert Remote(uri).files("") == {}


def test_a_damaged_entry_that_cannot_be_moved_is_passed_over_and_replaced(tmp_path, monkeypatch):
    uri, told = f"file://{tmp_path}/far", []
    stored(uri, tmp_path, "one").train([JOB])
    [weights] = (tmp_path / "far" / "networks").rglob(checkpoint.WEIGHTS)
    flip_a_bit(weights)
    two = stored(uri, tmp_path, "two", on_damage=told.append)
    with monkeypatch.context() as patch:  # it may be read alone, or it went away just then
        patch.setattr(Remote, "move", lambda *_: (_ for _ in ()).throw(UnreachableError("may only be read")))
        patch.setattr(Remote, "upload", lambda *_: (_ for _ in ()).throw(UnreachableError("may only be read")))
        two.train([JOB])
    assert len(two.backend.asked) == 1
    assert told[0] == f"may only be read; going on without, in {tmp_path / 'two'}"
    assert f"in {uri}/networks/{train_key(JOB)}: the checksum of {checkpoint.WEIGHTS} differs" in told[1]
    two.train([JOB])  # used again
    three = stored(uri, tmp_path, "three")
    three.train([JOB])
    assert three.backend.asked == []


def test_a_full_disk_on_the_other_side_is_an_outage_and_here_the_disks_own_error(tmp_path, monkeypatch):
    far = Remote(f"file://{tmp_path}/far")
    far.write("a", b"x" * 100)
    with no_room(10):
        with pytest.raises(UnreachableError, match=r"cannot write file://.*far/b: .*File too large"):
            far.write("b", b"x" * 100)
        with pytest.raises(OSError, match="File too large") as caught:
            far.download("a", tmp_path / "a")
    assert caught.value.errno == errno.EFBIG
    assert list(far.files("")) == ["a"]  # nothing half written


def test_a_store_without_room_on_the_other_side_does_not_end_a_run(tmp_path, monkeypatch):
    uri, told = f"file://{tmp_path}/far", []
    one = stored(uri, tmp_path, "one", on_damage=told.append)
    reached = Remote._reached

    @contextmanager
    def full(self, doing, name, but=()):
        with reached(self, doing, name, but):
            if doing == "write":
                raise OSError(errno.ENOSPC, "No space left on device")
            yield

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "_reached", full)
        one.train([JOB])
    assert all(f"No space left on device; going on without, in {tmp_path / 'one'}" in line for line in told)
    assert told
    one.train([JOB])
    assert stored(uri, tmp_path, "two").train([JOB])


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        (f"nope://{KEY}:{SECRET}@x/y", r"cannot open the store nope://x/y: .*file, s3, gs"),
        ("file://elsewhere/x", r"cannot open the store file://elsewhere/x: .*hostname"),
        (f"s3://{KEY}:{SECRET}@bucket/x?bogus={SECRET}", r"cannot open the store s3://bucket/x: .*bogus"),
        (f"s3://{KEY}:{SECRET}@", "names no bucket or folder|cannot open the store"),
        (f"az://{KEY}:{SECRET}@c/p", r"cannot open the store az://c/p: .*adlfs"),
        ("file:///proc/none", r"cannot write file:///proc/none/locks/.*; check --store, the network, and the credentials"),
    ],
)
def test_what_cannot_be_a_store_is_told_at_once_without_credentials(tmp_path, uri, reason):
    with pytest.raises(InputError, match=reason) as caught:
        stored(uri, tmp_path, "one")
    assert "hush" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert isinstance(caught.value, OutageError) == uri.startswith("file:///proc")  # waiting mends no name


def test_a_name_that_must_be_asked_for_on_the_network_may_pass(tmp_path, monkeypatch):
    """Of a bucket without a region pyarrow asks AWS for it."""

    class Offline:
        @staticmethod
        def from_uri(uri):
            raise OSError("Could not resolve host")

    monkeypatch.setattr(remote, "fs", types.SimpleNamespace(FileSystem=Offline))
    with pytest.raises(UnreachableError, match=r"cannot open the store s3://nobodys/x: Could not resolve host.*; check"):
        stored("s3://nobodys/x", tmp_path, "one")


def test_a_bucket_that_is_not_there_is_told_and_credentials_are_never_shown(s3, tmp_path):
    uri = s3_uri(s3, "absent")
    shown = [repr(SharedEntries(tmp_path, uri)), repr(Remote(uri)), SharedEntries(tmp_path, uri).where("counts", "k")]
    with pytest.raises(InputError, match=r"cannot write s3://absent/.*NO_SUCH_BUCKET.*; check --store") as caught:
        stored(uri, tmp_path, "one")
    for text in (*shown, str(caught.value), redacted(f"--store={uri}")):
        assert "hush" not in text
        assert KEY not in text
    assert pickle.loads(pickle.dumps(SharedEntries(tmp_path, uri))).uri == uri


# Leases.


@pytest.fixture
def far(tmp_path):
    return Remote(f"file://{tmp_path}/far")


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_lease_is_removed_whatever_happens(tmp_path, far, error):
    one, two = copy_of(far.uri, tmp_path, "one"), copy_of(far.uri, tmp_path, "two")
    for each in (one, two):
        each.make()
    if error is None:
        with one.locked("k", pytest.fail), two.locked_now("k") as held:
            assert not held
            assert list(far.files("locks")) == ["locks/k.lease"]
    else:
        with pytest.raises(error), one.locked("k", pytest.fail):
            raise error
    assert far.files("locks") == {}
    with two.locked_now("k") as held:
        assert held
    assert far.files("locks") == {}


def test_clocks_that_jump_change_nothing(tmp_path, far, monkeypatch):
    """For leases and for locks: a living holder keeps both while the clock goes from year to year and back."""
    jumps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 3e7)
    for one, two in (
        (copy_of(far.uri, tmp_path, "one"), copy_of(far.uri, tmp_path, "two")),
        (Entries(tmp_path / "one"), Entries(tmp_path / "one")),
    ):
        order, asked = [], threading.Event()

        def wait_for_it(two=two, order=order, asked=asked):
            with two.locked("k", asked.set):
                order.append("second")

        one.make()
        two.make()
        waiting = threading.Thread(target=wait_for_it)
        with one.locked("k", pytest.fail):
            waiting.start()
            assert asked.wait(10)
            time.sleep(3 * lease.LEASE_SECONDS)
            order.append("first")
        waiting.join(10)
        assert order == ["first", "second"]


def test_what_a_killed_process_of_the_same_working_copy_held_is_free_at_once(tmp_path, far, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3600.0)
    one, two = copy_of(far.uri, tmp_path, "one"), copy_of(far.uri, tmp_path, "two")
    for each in (one, two):
        each.make()
    with one.locked("k", pytest.fail):
        left = far.read("locks/k.lease")
    far.write("locks/k.lease", left)
    with two.locked_now("k") as held:
        assert not held
    with one.locked("k", pytest.fail):
        assert far.read("locks/k.lease") != left
    assert far.files("locks") == {}


def test_a_lease_lives_on_where_the_other_sides_disk_is_full_for_a_while(far):
    mine = Lease(far, "k")
    mine.acquire(pytest.fail)
    with no_room(10):
        time.sleep(4 * lease.BEAT_SECONDS)
        full = far.read("locks/k.lease")
        time.sleep(4 * lease.BEAT_SECONDS)
        assert far.read("locks/k.lease") == full
    _until(lambda: far.read("locks/k.lease") != full)
    mine.release()
    assert far.files("locks") == {}


def test_who_is_displaced_neither_comes_back_nor_removes_the_lease(far, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 3600.0)  # as if it were stopped
    one, two = Lease(far, "k"), Lease(far, "k")
    one.acquire(pytest.fail)
    before = far.read("locks/k.lease")
    started = time.monotonic()
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    two.acquire(lambda: None)
    assert time.monotonic() - started >= lease.LEASE_SECONDS
    one.release()
    assert far.read("locks/k.lease") not in (None, before)
    two.release()
    assert far.files("locks") == {}


def test_of_many_that_want_a_lease_at_once_one_has_it_at_a_time(far):
    inside, most, done = [], [], []

    def work(number):
        mine = Lease(far, "k")
        mine.acquire(lambda: None)
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(number)
        mine.release()
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == [0, 1, 2, 3]
    assert max(most) == 1


def _work_in_another_process(folder):
    hurry()
    slow = StoredBackend(SlowBackend(folder), SharedEntries(folder / "one", f"file://{folder}/far"))
    slow.evaluate(EVALUATE, "x")
    (folder / "go").unlink()
    slow.train([JOB])


def test_processes_with_working_copies_of_their_own_share_the_work_and_take_over_from_a_killed_one(tmp_path, far):
    child = multiprocessing.get_context("spawn").Process(target=_work_in_another_process, args=(tmp_path,))
    child.start()
    try:
        log = tmp_path / "log"
        _until(lambda: log.exists() and log.read_text() == "began\n")

        # It computes, this process waits, and takes what it made.
        two = stored(far.uri, tmp_path, "two", on_wait=lambda _: (tmp_path / "go").touch())
        assert two.evaluate(EVALUATE, "x").tolist() == COUNTS
        assert (two.backend.asked, two.reuse.reused) == ([], 1)

        # It trains and is killed while this process waits, which then trains itself.
        _until(lambda: log.read_text() == "began\nbegan\n")
        killed = []

        def kill(label):
            killed.append(time.monotonic())
            os.kill(child.pid, signal.SIGKILL)

        two = stored(far.uri, tmp_path, "two", on_wait=kill)
        two.train([JOB])
        assert two.backend.asked == [("train", (AUDIO_VISUAL,))]
        assert time.monotonic() - killed[0] < lease.LEASE_SECONDS + 10
        assert far.files("locks") == {}
    finally:
        child.kill()
        child.join()
        child.close()


# Keeping house.


def keep_house(monkeypatch, tmp_path, uri, *arguments):
    monkeypatch.setattr("sys.argv", ["store", *arguments, "--outputs", str(tmp_path / "house"), "--store", uri])
    return housekeeping.housekeeping()


@pytest.mark.parametrize("uri", ["file", "s3"], indirect=True)
def test_house_is_kept_behind_a_uri(uri, tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match="no store at"):
        keep_house(monkeypatch, tmp_path, uri, "list")
    one = stored(uri, tmp_path, "one", user="sweep/one")
    [network] = one.train([JOB])
    one.evaluate(EVALUATE, network)
    stored(uri, tmp_path, "two", user="sweep/two").evaluate(EVALUATE, network)
    far = Remote(uri)
    far.write("locks/dead.lease", b"somebody 3 elsewhere 1\n")
    far.write("networks/dead/0/weights", b"half")
    far.write("damaged/counts-k-1", b"bad")

    assert keep_house(monkeypatch, tmp_path, uri) == 0
    out = capsys.readouterr().out
    assert f"networks  {train_key(JOB)}" in out
    assert "trial 1" in out
    assert "networks: 1 entries" in out
    assert not (tmp_path / "house" / "store").exists()
    assert "locks/dead.lease" in far.files("locks")

    keep_house(monkeypatch, tmp_path, uri, "prune", "--older-than", "0m", "--dry-run")
    assert "2 entries" in capsys.readouterr().out
    assert not (tmp_path / "house" / "store").exists()
    assert set(far.files("locks")) == {"locks/dead.lease"}

    assert keep_house(monkeypatch, tmp_path, uri, "verify") == 0
    out = capsys.readouterr().out
    assert "watching 1 leases" in out
    assert "2 entries" in out
    assert far.files("locks") == {}
    far.write("counts/bad.json", b"{")
    for arguments in ([], ["--repair"]):
        assert keep_house(monkeypatch, tmp_path, uri, "verify", *arguments) == 1
        assert f"damaged: {Remote(uri).shown}/counts/bad.json: " in capsys.readouterr().out
    assert len(far.files("damaged")) == 2
    assert keep_house(monkeypatch, tmp_path, uri, "verify") == 0
    capsys.readouterr()

    before = (far.files("networks"), far.files("counts"), far.files("damaged"))
    keep_house(monkeypatch, tmp_path, uri, "prune", "--older-than", "0m")
    out = capsys.readouterr().out
    assert "2 entries" in out
    for leftover in ("networks/dead", "damaged/counts-k-1"):
        assert f"would delete leftover {Remote(uri).shown}/{leftover}, " in out
    assert (far.files("networks"), far.files("counts"), far.files("damaged")) == before

    keep_house(monkeypatch, tmp_path, uri, "prune", "--sweep", "one", "--yes")
    assert "1 entries are used by others too and stay" in capsys.readouterr().out
    assert far.files(f"networks/{train_key(JOB)}") == {}
    assert len(far.files("counts")) == 1
    keep_house(monkeypatch, tmp_path, uri, "prune", "--older-than", "0m", "--yes")
    left = {name for kind in (*entries.KINDS, "locks", "uses") for name in far.files(kind)}
    assert left == set()


def test_pruning_without_yes_changes_nothing(tmp_path, monkeypatch, capsys):
    uri = f"file://{tmp_path}/far"
    stored(uri, tmp_path, "one", user="sweep/one").train([JOB])
    far = Remote(uri)
    far.write("locks/dead.lease", b"somebody 3 elsewhere 1")
    before = far.files("")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3600.0)
    for chosen in (["--older-than", "0m"], ["--sweep", "one"]):
        keep_house(monkeypatch, tmp_path, uri, "prune", *chosen)
        assert "1 entries" in capsys.readouterr().out
    assert far.files("") == before
    assert not (tmp_path / "house" / "store").exists()


def test_repairing_moves_the_other_sides_entry_and_leaves_the_working_copys_alone(tmp_path, monkeypatch, capsys):
    uri = f"file://{tmp_path}/far"
    one = stored(uri, tmp_path, "house/store")
    [network] = one.train([JOB])
    [weights] = (tmp_path / "far" / "networks").rglob(checkpoint.WEIGHTS)
    flip_a_bit(weights)
    assert keep_house(monkeypatch, tmp_path, uri, "verify", "--repair") == 1
    assert f"set aside as {uri}/damaged/" in capsys.readouterr().out
    assert one.train([JOB]) == [network]  # uploads it again
    assert len(one.backend.asked) == 1
    assert keep_house(monkeypatch, tmp_path, uri, "verify") == 0
    assert "1 entries" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "move", lambda *_: (_ for _ in ()).throw(UnreachableError("may only be read")))
        [weights] = (tmp_path / "far" / "networks").rglob(checkpoint.WEIGHTS)
        flip_a_bit(weights)
        with pytest.raises(UnreachableError, match="may only be read"):
            keep_house(monkeypatch, tmp_path, uri, "verify", "--repair")


# What other machines find.


@pytest.mark.parametrize("uri", ["memory", "s3"], indirect=True)
def test_who_reaches_the_same_store_finds_what_was_left_there(uri, tmp_path):
    one, two = copy_of(uri, tmp_path, "one"), copy_of(uri, tmp_path, "two")
    with one.announced("word"):
        two.find("word")
        with pytest.raises(InputError, match="the same URI must lead every node to the same store"):
            two.find("another")
    with pytest.raises(InputError, match="the same URI must lead every node to the same store"):
        two.find("word")
    assert Remote(uri).files("") == {}


def test_a_store_that_cannot_be_written_or_shows_no_writes_is_told(tmp_path, far, monkeypatch):
    one = copy_of(far.uri, tmp_path, "one")
    with one.announced("word"):
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "write", lambda *_: (_ for _ in ()).throw(UnreachableError("denied")))
            with pytest.raises(OutageError, match="denied; check --store, the network, and the credentials"):
                one.find("word")
        monkeypatch.setattr(Lease, "_is_mine", lambda self: False)
        with pytest.raises(InputError, match="does not hold a lease"):
            one.find("word")


def test_verifying_behind_a_uri_names_what_is_damaged_and_sets_it_aside(tmp_path, monkeypatch, capsys):
    uri = f"file://{tmp_path}/far"
    one = stored(uri, tmp_path, "one")
    [network] = one.train([JOB])
    one.evaluate(EVALUATE, network)
    [weights] = (tmp_path / "far" / "networks").rglob(checkpoint.WEIGHTS)
    flip_a_bit(weights)
    for arguments in ([], ["--repair"]):
        assert keep_house(monkeypatch, tmp_path, uri, "verify", *arguments) == 1
        assert f"damaged: {uri}/networks/{train_key(JOB)}: " in capsys.readouterr().out
    assert keep_house(monkeypatch, tmp_path, uri, "verify") == 0
    assert "1 entries" in capsys.readouterr().out
    assert len(list((tmp_path / "far" / "damaged").iterdir())) == 1


def test_a_store_is_chosen_by_argument_then_variable_then_outputs(tmp_path, monkeypatch):
    assert cli.store_of(None, tmp_path) == Entries(tmp_path / "store")
    monkeypatch.setenv("CAVS_STORE", "s3://bucket/x")
    assert cli.store_of(None, tmp_path) == SharedEntries(tmp_path / "store", "s3://bucket/x")
    assert cli.store_of("~/x", tmp_path) == Entries(pathlib.Path.home() / "x")
