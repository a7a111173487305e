"""orchestrator.check: what it finds, that it tells everything at once, and the short form before a sweep."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient

from cavs_model.datasets.collage import Collage
from cavs_model.errors import InputError
from orchestrator import check as check_module
from orchestrator import readiness
from orchestrator import sweep as sweep_module
from orchestrator.entries import Entries
from orchestrator.experiment import Resources, override
from orchestrator.local_backend import LocalBackend
from orchestrator.progress import planned_work
from orchestrator.ray_backend import Cluster, Node, connected, in_a_worker, nodes
from orchestrator.readiness import Finding, Look, Speed, Work, in_store, look, measure, on_nodes, work_of
from orchestrator.remote import Remote, UnreachableError
from orchestrator.shared import SharedEntries
from orchestrator.store import StoredBackend
from orchestrator.stream import run_stream
from orchestrator.tracker import Tracker
from search_spaces.tones import BASE

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    # Ray's own threads and sockets are still being closed when pytest looks.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHORT = override(BASE, {"schedule.base_epochs": 1, "schedule.epochs": 1})
ONE, TWO = Node("1" * 40, "first", 4, 1), Node("2" * 40, "second", 4, 1)
CLUSTER = Cluster("10.0.0.1:6379", 8, 2, "", False)


def problems(findings: list[Finding]) -> list[str]:
    return [f"{each.topic}: {each.text}" for each in findings if not each.ok]


# The cluster.


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        (Resources(workers=4, cpus_per_worker=2), ""),
        (Resources(workers=2, cpus_per_worker=1, gpus_per_worker=1), ""),
        (Resources(workers=9), "the cluster has 8"),
        (Resources(workers=1, cpus_per_worker=6), "the nodes have room for 0"),
        (Resources(workers=1, cpus_per_worker=3, gpus_per_worker=0.5), ""),
        (Resources(workers=1, gpus_per_worker=2), "the nodes have room for 0"),
    ],
)
def test_workers_must_fit_into_the_cluster_and_each_onto_a_node(resources: Resources, told: str) -> None:
    found = list(readiness.fitting(CLUSTER, [ONE, TWO], resources))
    assert (told in found[0].text) if told else not found


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, object]]]:
    """The address of a server that answers as a dashboard would, and what it answers."""
    answer: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/authentication_mode" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", answer
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_without_a_token_is_a_problem(
    dashboard: tuple[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, answer = dashboard
    token = tmp_path / "token"
    token.write_text("x")
    token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    cluster = dataclasses.replace(CLUSTER, dashboard=address)
    for mode, told in (("token", []), ("disabled", ["does not ask for a token (disabled)"])):
        answer["authentication_mode"] = mode
        found = problems(readiness.of_cluster(cluster, [ONE], None))
        assert [text in line for text, line in zip(told, found, strict=True)] == [True] * len(told)
    token.chmod(0o644)
    monkeypatch.setattr(readiness, "open_to_others", lambda file: file == token)
    assert f"chmod 600 {token}" in problems(readiness.of_cluster(cluster, [ONE], None))[-1]
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    answer.clear()
    assert "cannot be told" in problems(readiness.of_cluster(cluster, [ONE], None))[0]


def test_a_sweep_does_not_join_a_cluster_known_to_have_no_token(
    dashboard: tuple[str, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, answer = dashboard
    joined = dataclasses.replace(CLUSTER, dashboard=address)
    monkeypatch.setattr(readiness, "nodes", lambda: [ONE])
    for told in ({"authentication_mode": "token"}, {}):  # or it does not say
        answer |= told
        readiness.ready(SHORT, tmp_path, joined)
        answer.clear()
    answer["authentication_mode"] = "disabled"
    with pytest.raises(InputError, match=r"token: the cluster does not ask for a token \(disabled\).*RAY_AUTH_MODE=token"):
        readiness.ready(SHORT, tmp_path, joined)
    readiness.ready(SHORT, tmp_path, dataclasses.replace(joined, started_here=True))  # nobody else reaches it


def test_a_file_is_open_where_its_folders_are() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        file = Path(name) / "token"
        file.write_text("x")
        for folder_mode, mode, told in ((0o755, 0o644, True), (0o700, 0o644, False), (0o755, 0o600, False)):
            Path(name).chmod(folder_mode)
            file.chmod(mode)
            assert readiness.open_to_others(file) is told


# The nodes.


def test_a_node_sees_the_folder_or_tells_why_not(tmp_path: Path) -> None:
    with readiness.shared_probe("store", tmp_path, "word") as probe:
        topic, folder = probe
        seen = look("word", [probe], SHORT, weights=True)
        assert not seen.problems
        [(_, wrote)] = seen.wrote
        assert (topic, wrote.parent, wrote.read_text()) == ("store", folder, "word")
        assert seen.memory_bytes > 1e8
        [other] = look("another word", [probe], None, weights=False).problems
        assert "holds something else" in other.text
        broken = override(SHORT, {"network.visual_weights": "/no/such/file"})
        [other] = look("word", [probe], broken, weights=True).problems
        assert (other.topic, "/no/such/file" in other.text) == ("weights", True)
    assert not list(tmp_path.iterdir())
    # One of a topic is enough: the second lies in the first.
    outputs, store = look("word", [("outputs", folder), ("outputs", folder / "store"), probe], None, weights=False).problems
    absent = "No such file or directory; mount the same folder on every node, and give it as an absolute path by"
    assert (outputs.topic, f"{absent} CAVS_OUTPUTS" in outputs.text) == ("outputs", True)
    assert (store.topic, f"{absent} --store or CAVS_STORE" in store.text) == ("store", True)
    folder.mkdir()
    (folder / "driver").write_text("word")
    [unlocked] = look("word", [probe], None, weights=False).problems  # nobody is kept out by the driver's lock
    assert "locks" in unlocked.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=f"cannot write to {tmp_path / 'file'}: Not a directory"),
        readiness.shared_probe("store", tmp_path / "file", "word"),
    ):
        pass


def _probe_until_killed(folder: Path) -> None:
    with readiness.shared_probe("outputs", folder, "word"):
        (folder / "began").touch()
        time.sleep(600)


def test_what_a_killed_check_left_goes_with_the_next_sweep_and_no_living_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "nodes", lambda: [ONE])
    child = multiprocessing.get_context("spawn").Process(target=_probe_until_killed, args=(tmp_path,))
    child.start()
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "began").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        [left] = tmp_path.glob(".probe-*")
        (tmp_path / ".probe-0").touch()  # as a verb makes it for a moment when it begins
        readiness.ready(SHORT, tmp_path, CLUSTER)
        assert (left / "driver").read_text() == "word"
    finally:
        child.kill()  # SIGKILL
        child.join()
        child.close()
    assert left.is_dir()
    readiness.ready(SHORT, tmp_path, CLUSTER)
    assert {path.name for path in tmp_path.iterdir()} == {"began", ".probe-0"}


def test_who_is_taken_for_dead_before_the_lock_is_held_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir
    made: list[Path] = []

    def cleared(path: Path, *given: object) -> None:
        mkdir(path)
        made.append(path)
        if len(made) == 1:
            readiness.clear_probes(tmp_path)

    monkeypatch.setattr(Path, "mkdir", cleared)
    with readiness.shared_probe("outputs", tmp_path, "word") as (_, folder):
        assert folder == made[1]
        readiness.clear_probes(tmp_path)
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


# Stores.


def seen_from_two(tmp_path: Path, store: Entries, second: Callable[[partial[Look]], Look]) -> list[Finding]:
    """What is found where the second node looks in another way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readiness, "on_every_node", lambda call, seconds: {ONE: call(), TWO: second(call)})
        patch.setattr(readiness, "nodes", lambda: [ONE, TWO])
        (tmp_path / "outputs").mkdir(exist_ok=True)
        store.make()
        found, _ = on_nodes(tmp_path / "outputs", SHORT, weights=False, where=[ONE, TWO], store=store)
        if told := problems(found):
            topics = "|".join(line.partition(":")[0] for line in told)
            with pytest.raises(InputError, match=f"^({topics}): "):
                readiness.ready(SHORT, tmp_path / "outputs", CLUSTER, store)
        else:
            readiness.ready(SHORT, tmp_path / "outputs", CLUSTER, store)
    assert not list(tmp_path.rglob(".probe-*"))
    return found


def test_every_node_must_write_and_lock_a_store_outside_of_the_outputs(tmp_path: Path) -> None:
    store = Entries(tmp_path / "elsewhere")

    def blind(call: partial[Look]) -> Look:
        word, probes, *others = call.args
        return look(word, [(topic, folder / ("absent" if topic == "store" else "")) for topic, folder in probes], *others)

    def on_a_disk_of_its_own(call: partial[Look]) -> Look:
        return dataclasses.replace(call(), wrote=(("store", store.root / ".probe-0" / "node-0"),))

    found = seen_from_two(tmp_path, store, lambda call: call())
    assert f"{store.root} is read, written and locked from each of 2 nodes" in [each.text for each in found if each.ok]
    for second, told in (
        (blind, "No such file or directory; mount the same folder on every node, and give it as an absolute path by --store"),
        (on_a_disk_of_its_own, "writes to a folder of that name that is not this one"),
    ):
        found = seen_from_two(tmp_path, store, second)
        [line] = problems(found)
        assert line.startswith("store: second/222222")
        assert told in line
        assert "outputs" in {each.topic for each in found if each.ok}
        assert "store" not in {each.topic for each in found if each.ok}


def test_every_node_must_reach_a_store_behind_a_uri(tmp_path: Path) -> None:
    store = SharedEntries(tmp_path / "outputs" / "store", f"file://{tmp_path}/far")

    def without_credentials(call: partial[Look]) -> Look:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Remote, "write", lambda *_: (_ for _ in ()).throw(UnreachableError("denied")))
            return call()

    def to_another(call: partial[Look]) -> Look:
        *others, _ = call.args
        return look(*others, SharedEntries(store.root, f"file://{tmp_path}/another"))

    found = seen_from_two(tmp_path, store, lambda call: call())
    assert f"{store.name} is read, written and locked from each of 2 nodes" in [each.text for each in found if each.ok]
    for second, told in ((without_credentials, "denied; check --store"), (to_another, "lead every node to the same store")):
        [line] = problems(seen_from_two(tmp_path, store, second))
        assert line.startswith("store: second/222222")
        assert told in line
    assert Remote(store.uri).files("") == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Remote, "write", lambda *_: (_ for _ in ()).throw(UnreachableError("denied")))
        found, _ = on_nodes(tmp_path / "outputs", None, weights=False, store=store)  # from here
    assert problems(found) == [line for line in problems(found) if line.startswith("store: denied; check --store")] != []


# Precision.


def test_auto_must_mean_the_same_wherever_a_worker_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, bare = Node("3" * 40, "head", 0, 0), Node("4" * 40, "bare", 8, 0)
    there = [ONE, TWO, head, bare]
    meanings: dict[Node, str] = {}

    def answers(call: partial[Look], seconds: float) -> dict[Node, Look]:
        return {node: dataclasses.replace(call(), auto=meanings[node]) for node in there}

    def told(precision: str, gpus: float, *auto: str) -> list[str]:
        meanings.update(zip(there, auto, strict=True))
        experiment = override(SHORT, {"precision": precision, "resources.gpus_per_worker": gpus})
        found, _ = on_nodes(tmp_path, experiment, weights=False, where=there)
        refused = [line for line in problems(found) if line.startswith("precision")]
        if refused:
            with pytest.raises(InputError, match="precision: auto means"):
                readiness.ready(experiment, tmp_path, CLUSTER)
        else:
            readiness.ready(experiment, tmp_path, CLUSTER)
        return refused or [each.text for each in found if each.topic == "precision"]

    monkeypatch.setattr(readiness, "on_every_node", answers)
    monkeypatch.setattr(readiness, "nodes", lambda: there)
    [line] = told("auto", 0, "bf16", "fp32", "fp32", "bf16")
    assert "auto means bf16 on first/111111, bare/444444 and fp32 on second/222222, and the store" in line
    assert "--set precision=fp32 or --set precision=bf16" in line
    assert told("auto", 0, "bf16", "bf16", "fp32", "bf16") == ["auto means bf16 here"]  # no worker fits onto the head
    assert told("auto", 1, "fp32", "fp32", "", "") == ["auto means fp32 here"]  # nor onto one without GPU
    assert told("auto", 0.5, "fp32", "bf16", "", "bf16")[0].startswith("precision: auto means bf16 on second/222222 and fp32")
    assert told("fp32", 0, "", "", "", "") == []


def test_a_look_says_what_auto_means_on_the_device_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meaning(**changes: object) -> str:
        return look("", [], override(SHORT, changes), weights=False).auto

    native = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert meaning(precision="auto") == ("bf16" if native else "fp32")
    assert [meaning(precision=each) for each in ("fp32", "bf16")] == ["", ""]
    on_gpu = {"precision": "auto", "resources.gpus_per_worker": 1}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert meaning(**on_gpu) == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert meaning(**on_gpu) == ("bf16" if supported else "fp32")
    assert look("", [], None, weights=False).auto == ""


def test_every_nodes_problems_stand_in_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(call: partial[Look], seconds: float) -> dict[Node, object]:
        fine = call()
        stale = {**fine.versions, "torch": "1.0", "code": "0"}
        elsewhere = dataclasses.replace(fine, wrote=(("outputs", tmp_path / "written-elsewhere"),), versions=stale)
        return {ONE: fine, TWO: elsewhere, Node("3" * 40, "third", 1, 0): ModuleNotFoundError("No module named 'orchestrator'")}

    monkeypatch.setattr(readiness, "on_every_node", answers)
    found, memory = on_nodes(tmp_path, SHORT, weights=True, where=[ONE, TWO])
    told = problems(found)
    assert len(told) == 3
    assert "third/333333 did not answer: No module named 'orchestrator'" in told[0]
    assert "second/222222 has torch 1.0 (here" in told[1]
    assert "code 0" in told[1]
    assert "second/222222 writes to a folder of that name that is not this one" in told[2]
    assert not [each for each in found if each.ok and each.topic in ("versions", "outputs")]
    assert memory > 1e8
    monkeypatch.setattr(readiness, "nodes", lambda: [ONE, TWO])
    with pytest.raises(InputError, match=r"(?s)third.*torch 1\.0.*not this one.*orchestrator.check reports more"):
        readiness.ready(SHORT, tmp_path, CLUSTER)


# The plan.


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in whose store the stream of SHORT's first seed lies."""
    folder = tmp_path_factory.mktemp("outputs")
    for _ in run_stream(SHORT, 0, StoredBackend(LocalBackend(folder / "data"), folder / "store")):
        pass
    return folder


def test_the_plan_counts_what_the_store_has(outputs: Path) -> None:
    both = override(SHORT, {"seeds": "0,1"})
    stored = in_store(both, Entries(outputs / "store"), pytest.fail)
    assert [len(found) for found in stored] == [3, 0]  # two networks of the base task, one of the last
    base, later = planned_work(both)
    alone = work_of(both, 1, outputs, stored, searched=False)
    assert (alone.networks, alone.stored, alone.clip_passes) == (6, 3, base + later)
    searched = work_of(both, 5, outputs, stored, searched=True)
    assert (searched.networks, searched.stored, searched.left) == (2 * (2 + 5), 2, 12)
    assert searched.clip_passes == base + 2 * 5 * later
    changed = override(both, {"method.samples_per_class": 1, "method.resampling_ratio": 1.0})
    assert [len(found) for found in in_store(changed, Entries(outputs / "store"), pytest.fail)] == [2, 0]
    sizes = [path.stat().st_size for path in (outputs / "store" / "networks").glob("*/*.safetensors")]
    assert len(sizes) == 3  # the visual-only network is the smallest; room is asked for the largest
    assert 1 <= max(sizes) / searched.network_bytes < 1.2


def test_an_outcome_that_another_process_computes_is_not_waited_for(outputs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(outputs / "store", store)
    for kind in ("networks", "counts", "scores"):
        shutil.rmtree(store / kind)
    held = [open(path) for path in (store / "locks").iterdir()]  # noqa: SIM115
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        assert in_store(SHORT, Entries(store), pytest.fail) == [[]]
    finally:
        for file in held:
            file.close()


def test_a_damaged_entry_is_told_and_planned_again(outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs / "store", tmp_path / "store")
    for file in (tmp_path / "store" / "networks").glob("*/*.safetensors"):
        file.write_bytes(b"x" + file.read_bytes()[1:])
    told: list[str] = []
    assert in_store(SHORT, Entries(tmp_path / "store"), told.append) == [[]]
    assert "damaged" in told[0]


def test_clips_that_are_missing_are_counted(tmp_path: Path) -> None:
    collage = override(SHORT, {"benchmark": "collage", "benchmark.train_clips": 100, "benchmark.frames": 1})
    assert isinstance(collage.benchmark, Collage)
    size = collage.benchmark.image_size_px
    clips = sum(-(-len(collage.benchmark.samples(split)) // 64) * 64 for split in collage.benchmark.splits())
    assert readiness.missing_bytes(collage, tmp_path) == clips * (4 * size * size + 2 * 96 * 64 + 2)


def test_too_little_disk_and_memory_are_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(2, 1, 2, 4, 0, 1000.0, 200.0, 5_000, 1_000)
    monkeypatch.setattr(readiness, "measure", lambda experiment: Speed(0.5, 2_000_000_000, 9, 8))
    enough = work.disk_bytes(at_once=2)
    assert enough == 5_000 + 1_000 * (4 + 3 * 2)
    for free, memory, told in ((enough, 2e9, []), (enough - 1, 2e9 - 1, ["disk", "memory"])):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        found = readiness.plan(SHORT, work, tmp_path, 1 if free == enough else 2, int(memory), on_ray=False)
        assert [each.topic for each in found if not each.ok and each.topic != "gpu memory"] == told
        assert "gpu memory" in {each.topic for each in found if not each.ok}
    [time] = [each.text for each in readiness.plan(SHORT, work, tmp_path, 1, 10**10, on_ray=False) if each.topic == "time"]
    assert "about 00:10:00 (500.0 ms a clip, measured now; rehearsed clips included" in time
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    monkeypatch.setattr(readiness, "nodes", lambda: [ONE])
    with pytest.raises(InputError, match=r"disk: .* are needed to begin with"):
        readiness.ready(SHORT, tmp_path, CLUSTER)


# MLflow.


def test_mlflow_is_tried_from_every_node_and_a_node_without_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes' tries by the real function; one of them sees no database, as where outputs are not shared."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    outputs, elsewhere = tmp_path / "outputs", tmp_path / "elsewhere"

    def tried(call: partial[str | None], seconds: float) -> dict[Node, object]:
        uri, artifacts, run = call.args
        other = call.func(uri.replace(str(outputs), str(elsewhere)), artifacts, run)
        return {ONE: call(), TWO: other}

    monkeypatch.setattr(readiness, "on_every_node", tried)
    found = [*readiness.of_mlflow(outputs, [ONE, TWO])]
    assert all(each.ok for each in found)  # the sweep's process alone writes
    assert found[0].text.endswith("mlflow.db: a run was written and read from here and from a worker on 1 of 2 nodes")
    assert f"not from {TWO.name}: there is no {elsewhere}/mlflow.db; only the sweep's own process" in found[1].text
    assert not elsewhere.exists()
    client = MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")
    assert client.search_runs([each.experiment_id for each in client.search_experiments()]) == []

    monkeypatch.setattr(readiness, "on_every_node", lambda call, seconds: {ONE: TimeoutError("no answer in 120 s")})
    assert "not from first/111111: no answer in 120 s" in [*readiness.of_mlflow(outputs, [ONE])][1].text


def test_a_node_with_another_database_or_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("here", "other"):
        with Tracker(f"sqlite:///{tmp_path}/{name}.db", tmp_path / f"{name}-artifacts").checked() as run:
            pass
    with Tracker(f"sqlite:///{tmp_path}/here.db", tmp_path / "here-artifacts").checked() as run:
        told = readiness._mlflow_from_here(f"sqlite:///{tmp_path}/other.db", tmp_path / "other-artifacts", run)
        assert told is not None
        assert "does not take a run" in told
        assert readiness._mlflow_from_here(f"sqlite:///{tmp_path}/here.db", tmp_path / "here-artifacts", run) is None
        told = readiness._mlflow_from_here("http://somebody:secret@127.0.0.1:9", tmp_path, run)
        assert told is not None
        assert "MLflow cannot be reached at http://127.0.0.1:9" in told
        assert "secret" not in told


# The verb.


def verb(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    return check_module.check()


def test_all_problems_stand_in_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    arguments = ["--set", "network.visual_weights=/no/such/file"]
    assert verb(monkeypatch, "tones", "--local", "--outputs", tmp_path, *arguments, "--name", "weekend") == 2
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("problem")] == ["weights:", "mlflow:"]
    assert "/no/such/file" in told
    assert "MLflow cannot be reached at http://127.0.0.1:9" in told
    assert "secret" not in told
    assert any("not looked at, they are the sweep's own: --name weekend" in line for line in lines)
    assert lines[-1] == "2 problems"
    (tmp_path / "file").touch()
    arguments = ["--set", "method.no_such=1", "--store", f"{tmp_path}/file/store"]
    assert verb(monkeypatch, "tones", "--local", "--outputs", tmp_path, *arguments) == 2
    told = capsys.readouterr().out
    assert "experiment: unknown field 'method.no_such'" in told
    assert f"problem  store: cannot write the store {tmp_path}/file/store" in told
    assert "ok       outputs:" in told


def test_a_space_that_can_run_here(outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    short = [part for each in ("base_epochs=1", "epochs=1") for part in ("--set", f"schedule.{each}")]
    assert verb(monkeypatch, "tones", "--local", "--outputs", outputs, "--trials", 3, *short) == 0
    told = capsys.readouterr().out
    assert "3 trials x 1 seeds x 2 tasks: 5 networks, the base tasks' shared by the trials; 2 of them are in the store" in told
    assert "sqlite:///" in told
    assert told.splitlines()[-1] == "no problems"
    assert {line.split()[1] for line in told.splitlines()[:-1]} == {
        "experiment:", "versions:", "outputs:", "data:", "weights:", "store:", "mlflow:", "plan:", "disk:", "time:", "memory:"
    }  # fmt: skip


def test_a_sweep_that_could_not_run_stops_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sweep_module, "connected", lambda verbose: nullcontext(CLUSTER))
    monkeypatch.setattr(readiness, "nodes", lambda: [ONE])
    arguments = ("tones", "--name", "x", "--outputs", str(tmp_path), "--set", "resources.cpus_per_worker=6")
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    with pytest.raises(InputError, match=r"resources: 1 workers of 6 CPUs .* have room for 0"):
        sweep_module.sweep()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert client.search_runs([each.experiment_id for each in client.search_experiments()]) == []


def test_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with connected() as cluster:
        there = nodes()
        assert not problems(readiness.of_cluster(cluster, there, Resources()))
        for store in (Entries(tmp_path / "folder"), SharedEntries(tmp_path / "store", f"file://{tmp_path}/far")):
            store.make()
            found, _ = on_nodes(tmp_path, SHORT, weights=True, where=there, store=store)
            assert problems(found) == []
            assert f"{store.name} is read, written and locked from the one node" in [each.text for each in found]
        [mlflow] = readiness.of_mlflow(tmp_path, there)
        assert mlflow.text.endswith("a run was written and read from here and from a worker on the one node")
        speed = in_a_worker(partial(measure, SHORT), Resources())
        assert 0 < speed.seconds_per_clip < 60
        assert speed.memory_bytes > 1e8
        with pytest.raises(TimeoutError):
            in_a_worker(partial(measure, SHORT), Resources(cpus_per_worker=10_000), seconds=0.5)
        readiness.ready(SHORT, tmp_path, cluster)
        assert not list(tmp_path.rglob(".probe-*"))
