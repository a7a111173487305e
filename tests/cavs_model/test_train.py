"""The training loop: the same on one worker and on two, what it feeds the method, what it keeps, and what it refuses."""

import dataclasses
import math
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_worker import TINY, on_two_workers

from cavs_model import checkpoint
from cavs_model.datasets.tones import Tones
from cavs_model.errors import InputError
from cavs_model.evaluate import Data
from cavs_model.losses import cross_entropy
from cavs_model.methods.cmr import CMR
from cavs_model.methods.finetune import Finetune
from cavs_model.methods.plop import PLOP
from cavs_model.methods.replay import Replay
from cavs_model.networks.av_segmenter import build
from cavs_model.scenario import Scenario
from cavs_model.train import TEACHER_COST, Adam, DivergedError, Schedule, Seeds, TaskJob, global_means, train_task
from cavs_model.types import AUDIO_VISUAL, BACKGROUND, IGNORE, VISUAL_ONLY, Batch, Mean, Row
from cavs_model.worker import LocalWorker, epoch_batches

TONES = Tones(train_clips=26, val_clips=8, test_clips=4, short_clips=True)
SCENARIO = Scenario("2-2", order="reversed")
DATA = Data(TONES, "", SCENARIO.learned_order(TONES))
BASE, LATER = SCENARIO.tasks(TONES)
BATCH_SIZE = 5
SCHEDULE = Schedule(base_epochs=2, epochs=2, batch_size=BATCH_SIZE, learning_rate=1e-3)
# Two samples of the base task alone, one twice, and one that is in the later task too.
ALONE = [sample for sample in BASE.train if sample not in LATER.train][:2]
BOTH = [sample for sample in BASE.train if sample in LATER.train][:1]
ROWS = tuple(Row(sample.id, min(sample.classes)) for sample in (*ALONE, ALONE[0], *BOTH))


def base_job(output, **changes):
    job = TaskJob(AUDIO_VISUAL, BASE, DATA, (), Finetune(), TINY, SCHEDULE, "fp32", Seeds(0, 0, 0), None, str(output))
    return replace(job, **changes)


def later_job(output, start, method=None, **changes):
    method = method or CMR()
    changes = {"rows": ROWS if method.remembers else (), **changes}
    return replace(base_job(output), task=LATER, method=method, start=str(start), **changes)


def trained(job, worker=None):
    """The weights and the description that a job leaves."""
    train_task(job, worker or LocalWorker())
    return left(job.output)


def left(folder):
    read = checkpoint.read(Path(folder))
    return read.model().state_dict(), read.about


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def differences(one, other):
    return torch.cat([(one[name].double() - other[name].double()).flatten() for name in one])


def largest_difference(one, other):
    return float(differences(one, other).abs().max())


def mean_square(one, other):
    return float(differences(one, other).square().mean())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a base task's checkpoint."""
    folder = tmp_path_factory.mktemp("base")
    train_task(base_job(folder), LocalWorker())
    return folder


# Any number of workers.

METHODS = {"finetune": Finetune(), "replay": Replay(), "plop": PLOP(), "cmr": CMR()}


def shared_jobs(folder, start):
    """Tasks of which workers share the batches: after a base task with each method, and a base task that is validated."""
    short = replace(SCHEDULE, epochs=1, base_epochs=1)
    jobs = {name: later_job(folder / name, start, method, schedule=short) for name, method in METHODS.items()}
    jobs["visual_only"] = base_job(folder / "visual_only", network=VISUAL_ONLY, schedule=short)
    jobs["best_val"] = base_job(folder / "best_val", schedule=replace(SCHEDULE, selection="best_val", selection_from=0.0))
    return jobs


def train_part(worker, folder, start):
    for job in shared_jobs(folder, start).values():
        train_task(job, worker)
    # A busy machine makes an epoch long enough to tell of its steps, too.
    assert sum(report["kind"] == "epoch" for report in worker.reports) == 7


@pytest.fixture(scope="module")
def by_two(base, tmp_path_factory):
    """Where two workers left the checkpoints of the shared jobs."""
    folder = tmp_path_factory.mktemp("two")
    on_two_workers(train_part, folder, folder, base)
    return folder


@pytest.mark.parametrize("name", [*METHODS, "visual_only", "best_val"])
def test_two_workers_learn_what_one_learns(name, base, by_two, tmp_path):
    job = shared_jobs(tmp_path, base)[name]
    weights, about = trained(job)
    shared, told = left(by_two / name)
    assert (told.world_size, about.world_size) == (2, 1)
    assert dataclasses.replace(told, world_size=1, seconds=about.seconds, history=about.history) == about
    for one, two in zip(about.history, told.history, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    # A step moves a weight by up to 1e-3. Sums in another order differ by 1e-7 of themselves; Adam divides a gradient by its
    # own size, so that where it nearly cancels the difference grows, in a few weights up to a part of a step.
    weights, shared = weights, shared
    assert largest_difference(weights, shared) < 3e-4
    assert mean_square(weights, shared) < 1e-5**2
    if job.start:
        start = checkpoint.load(base).state_dict()
        moved = {name: value for name, value in weights.items() if value.shape == start[name].shape}
        assert mean_square(moved, start) > 1e-3**2


def test_the_shared_batches_divide_unevenly():
    for count in (len(BASE.train), len(LATER.train), len(LATER.train) + len(ROWS)):
        lengths = {len(batch) for batch in epoch_batches(range(count), BATCH_SIZE, (0,))}
        assert any(length % 2 for length in lengths)


# What the loop feeds the method.


@dataclass(frozen=True)
class Spy(Finetune):
    """Fine-tuning that keeps what it sees."""

    steps: ClassVar[list] = []
    prepared_ids: ClassVar[list] = []
    needs_teacher = True

    def prepare(self, teacher, batches, task, all_reduce):
        for batch in batches:
            self.prepared_ids.extend(batch.sample_id)
            assert teacher(batch).logits.shape[2] == task.num_old
            assert not batch.rehearsed.any()
            assert torch.equal(batch.label, expected_labels(batch, [False] * len(batch)))
        return "prepared"

    def loss(self, step):
        self.steps.append(step)
        plain = cross_entropy(step.student.logits, step.batch.label, step.batch.real_frame)
        return {"cross_entropy": plain, "half": Mean(plain.total * 0.5, plain.count)}


@pytest.fixture
def seen(base, tmp_path):
    """A later task with rehearsed rows, as the method saw it: its job, its steps, and what it left."""
    Spy.steps.clear()
    Spy.prepared_ids.clear()
    job = later_job(tmp_path / "seen", base, Spy(), rows=ROWS)
    _, about = trained(job)
    return job, list(Spy.steps), about


def expected_labels(batch, rehearsed):
    """Labels of a batch, class by class from the benchmark's own: current classes alone, or for the memory all seen."""
    names, order = TONES.class_names(), DATA.learned_order
    ids = [sample.id for sample in TONES.samples("train")]
    raw = torch.from_numpy(TONES.render("train", [ids.index(sample_id) for sample_id in batch.sample_id]).label)
    label = torch.full_like(raw, IGNORE)
    label[raw == BACKGROUND] = BACKGROUND
    for benchmark_id, name in enumerate(names, start=1):
        learned = order.index(name) + 1
        for clip, again in enumerate(rehearsed):
            hidden = BACKGROUND if not again and learned < LATER.num_old else learned
            label[clip][raw[clip] == benchmark_id] = hidden
    return label


def test_new_clips_have_the_tasks_labels_and_rehearsed_ones_all_seen(seen):
    _, steps, _ = seen
    both, times = BOTH[0].id, Counter()
    for step in steps:
        assert torch.equal(step.batch.label, expected_labels(step.batch, step.batch.rehearsed.tolist()))
        times.update(zip(step.batch.sample_id, step.batch.rehearsed.tolist(), strict=True))
    rows = Counter(row.sample_id for row in ROWS)
    expected = {(sample.id, False): 1 for sample in LATER.train} | {(sample_id, True): n for sample_id, n in rows.items()}
    assert times == {key: 2 * count for key, count in expected.items()}  # two epochs
    assert {(both, False), (both, True)} <= set(times)
    assert rows[ALONE[0].id] == 2


def test_the_method_sees_the_batches_of_the_seed_and_the_frozen_teacher(seen, base):
    job, steps, _ = seen
    items = [(sample.id, False) for sample in LATER.train] + [(row.sample_id, True) for row in ROWS]
    batches = [batch for epoch in range(2) for batch in epoch_batches(items, BATCH_SIZE, (job.seeds.data, 1, epoch))]
    given = [list(zip(step.batch.sample_id, step.batch.rehearsed.tolist(), strict=True)) for step in steps]
    assert given == batches
    assert Spy.prepared_ids == [sample.id for sample in LATER.train]
    teacher = checkpoint.load(base)
    for step in steps:
        assert step.prepared == "prepared"
        assert step.task == LATER
        assert step.student.logits.shape[2] == LATER.num_classes
        assert step.student.logits.requires_grad
        assert not step.teacher.logits.requires_grad
        assert torch.equal(step.teacher.logits, teacher(step.batch).logits)


def test_the_history_is_the_mean_of_the_terms_and_of_their_sum(seen):
    job, steps, about = seen
    assert len(about.history) == 2
    assert about.clips == 2 * (len(LATER.train) + len(ROWS))
    assert job.num_samples * 2 == about.clips
    for epoch, record in enumerate(about.history):
        half = len(steps) // 2
        means = []
        for step in steps[epoch * half : (epoch + 1) * half]:
            log_p = step.student.logits.detach().log_softmax(2).movedim(2, -1)
            counted = step.batch.label != IGNORE
            picked = log_p[counted].gather(1, step.batch.label[counted].long()[:, None])
            means.append(-picked.mean().item())
        assert list(record) == ["loss", "cross_entropy", "half"]
        assert record["cross_entropy"] == pytest.approx(sum(means) / half, rel=1e-5)
        assert record["half"] == pytest.approx(record["cross_entropy"] / 2, rel=1e-6)
        assert record["loss"] == pytest.approx(record["cross_entropy"] + record["half"], rel=1e-6)


def test_a_mean_over_nothing_is_zero():
    terms = {"some": Mean(torch.tensor(3.0), torch.tensor(2)), "none": Mean(torch.tensor(0.0), torch.tensor(0))}
    assert global_means(terms, LocalWorker()) == {"some": 1.5, "none": 0.0}


@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_learning_rate_of_every_step(base, tmp_path, monkeypatch, decay):
    rates = []

    class Watched(Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr("cavs_model.train.Adam", Watched)
    trained(later_job(tmp_path, base, Finetune(), schedule=replace(SCHEDULE, decay=decay)))
    steps = 2 * -(-len(LATER.train) // BATCH_SIZE)
    cosine = [1e-3 * math.cos(math.pi * step / steps / 2) ** 2 for step in range(steps)]
    assert rates == pytest.approx(cosine if decay == "cosine" else [1e-3] * steps)


def test_progress_is_reported_once_an_epoch(tmp_path):
    reports = []
    _, about = trained(base_job(tmp_path, label="a label"), LocalWorker(on_report=reports.append))
    assert [(each["kind"], each["label"], each["epoch"], each["epochs"]) for each in reports] == [
        ("epoch", "a label", 1, 2),
        ("epoch", "a label", 2, 2),
    ]
    assert [each["loss"] for each in reports] == [record["loss"] for record in about.history]
    assert all(each["work"] == len(BASE.train) and each["clips_per_second"] > 0 for each in reports)


def test_a_long_epoch_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("cavs_model.train.PULSE_SECONDS", 0.0)
    reports = []
    trained(base_job(tmp_path), LocalWorker(on_report=reports.append))
    kinds = [each["kind"] for each in reports]
    assert kinds.count("epoch") == 2
    assert kinds.count("steps") > 2
    assert sum(each["work"] for each in reports) == pytest.approx(2 * len(BASE.train))


def test_a_teacher_runs_only_where_the_method_reads_it(base, tmp_path, monkeypatch):
    seen = []

    def watched(method):
        loss = type(method).loss
        monkeypatch.setattr(type(method), "loss", lambda self, step: seen.append(step.teacher is None) or loss(self, step))

    for name, alone in (("finetune", True), ("plop", False)):
        seen.clear()
        job = shared_jobs(tmp_path, base)[name]
        watched(job.method)
        trained(job)
        assert seen
        assert all(each is alone for each in seen)
        assert job.cost_per_clip == (1.0 if alone else TEACHER_COST)


@dataclass(frozen=True)
class Products(Finetune):
    """Fine-tuning that notes, forward and backward, whether cuDNN may round to TF32."""

    allowed: ClassVar[list] = []
    needs_teacher = True

    def loss(self, step):
        step.student.logits.register_hook(lambda gradient: self.allowed.append(torch.backends.cudnn.allow_tf32))
        self.allowed.append(torch.backends.cudnn.allow_tf32)
        return super().loss(step)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fp32_is_not_tf32_in_any_pass_and_the_setting_stays(base, tmp_path, precision):
    Products.allowed.clear()
    assert torch.backends.cudnn.allow_tf32
    trained(later_job(tmp_path, base, Products(), precision=precision))
    steps = 2 * -(-len(LATER.train) // BATCH_SIZE)
    assert Products.allowed == [precision != "fp32"] * 2 * steps
    assert torch.backends.cudnn.allow_tf32


# Chance.


def test_training_depends_on_its_seeds_alone(tmp_path):
    schedule = replace(SCHEDULE, base_epochs=1)
    first, about = trained(base_job(tmp_path, schedule=schedule))
    torch.manual_seed(99)
    np.random.seed(99)
    again, told = trained(base_job(tmp_path, schedule=schedule, seeds=Seeds(0, 0, 5), label="another"))
    assert same(first, again)
    assert about.history == told.history
    for seeds in (Seeds(1, 0, 0), Seeds(0, 1, 0)):
        other, _ = trained(base_job(tmp_path, schedule=schedule, seeds=seeds))
        assert not same(first, other)


def test_a_task_starts_from_the_last_one_with_rows_as_the_method_wants_them(base, tmp_path):
    still = replace(SCHEDULE, epochs=1, learning_rate=1e-12)
    old = checkpoint.load(base).classifier.conv
    found = {}
    for name, method in METHODS.items():
        weights, _ = trained(later_job(tmp_path / name, base, method, schedule=still))
        found[name] = weights["classifier.conv.weight"]
        torch.testing.assert_close(found[name][: LATER.num_old], old.weight.detach(), atol=1e-9, rtol=0)
    for name in ("plop", "cmr"):
        for row in found[name][LATER.num_old :]:
            torch.testing.assert_close(row, old.weight[BACKGROUND].detach(), atol=1e-9, rtol=0)
    torch.testing.assert_close(found["finetune"], found["replay"], atol=1e-9, rtol=0)
    assert (found["finetune"][-1] - found["finetune"][-2]).abs().max() > 1e-3
    other, _ = trained(later_job(tmp_path, base, Finetune(), schedule=still, seeds=Seeds(1, 0, 0)))
    assert (other["classifier.conv.weight"] - found["finetune"])[LATER.num_old :].abs().max() > 1e-3


# Which epoch is kept.


@dataclass(frozen=True)
class Ruined(Finetune):
    """Learns the foreground alone, so that classes show early, and after some steps that all is background: late epochs have
    the best background and the worst classes."""

    calls: ClassVar[list] = []

    def loss(self, step):
        self.calls.append(step)
        label = step.batch.label
        if len(self.calls) <= 18:
            label = label.masked_fill(label == BACKGROUND, IGNORE)
        else:
            label = label.masked_fill(label != IGNORE, BACKGROUND)
        return {"cross_entropy": cross_entropy(step.student.logits, label, step.batch.real_frame)}


@dataclass(frozen=True)
class Keeper(LocalWorker):
    """A worker that keeps the weights of every epoch."""

    models: list = field(default_factory=list)
    epochs: list = field(default_factory=list)

    def wrap(self, model):
        self.models.append(model)
        return model

    def report(self, record):
        if record["kind"] == "epoch":  # a busy machine's epochs are long enough to tell of their steps, too
            self.epochs.append({name: value.clone() for name, value in self.models[0].state_dict().items()})


def val_score(weights):
    """Mean IoU of the base task's classes over the validation split, by loops."""
    model = build(TINY, BASE.num_classes, AUDIO_VISUAL).eval()
    model.load_state_dict(weights)
    split, table = DATA.open("val"), DATA.table(BASE.current_rule)
    with torch.no_grad():
        batch = split.batch(split.sample_ids, [False] * len(split), [table] * len(split))
        said = model(batch).logits.argmax(2)
    ious = []
    for class_id in (1, 2):
        true, found = batch.label == class_id, (said == class_id) & (batch.label != IGNORE)
        ious.append(((true & found).sum() / (true | found).sum()).item())
    return sum(ious) / 2


@pytest.mark.parametrize("looks_from", [0.0, 0.5])
def test_best_val_keeps_the_epoch_with_the_best_iou_of_current_classes(tmp_path, looks_from):
    Ruined.calls.clear()
    schedule = Schedule(
        base_epochs=10, batch_size=BATCH_SIZE, learning_rate=1e-2, selection="best_val", selection_from=looks_from
    )
    keeper = Keeper()
    chosen, about = trained(base_job(tmp_path, method=Ruined(), schedule=schedule), keeper)
    scores = [val_score(weights) for weights in keeper.epochs]
    first = int(looks_from * 10)
    best = first + int(np.argmax(scores[first:]))
    assert len(scores) == len(about.history) == 10
    assert scores[best] > scores[-1]
    assert same(chosen, keeper.epochs[best])


def test_best_val_without_a_current_class_in_validation_keeps_the_last_epoch_and_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr("cavs_model.train.iou", lambda counts: torch.full((len(counts),), math.nan))
    schedule = replace(SCHEDULE, base_epochs=3, selection="best_val", selection_from=0.0)
    reports, keeper = [], Keeper()
    chosen, _ = trained(base_job(tmp_path, schedule=schedule, label="seed 0"), keeper)
    assert same(chosen, keeper.epochs[-1])
    trained(base_job(tmp_path, schedule=schedule, label="seed 0"), LocalWorker(on_report=reports.append))
    notes = [each for each in reports if each["kind"] == "note"]
    assert [each["label"] for each in notes] == ["seed 0"]
    assert "seed 0: schedule.selection = best_val, and validation shows no current class" in notes[0]["text"]


def test_batches_are_pinned_where_the_worker_has_a_gpu(base, tmp_path, monkeypatch):
    """Without a GPU to be had: what is seen is who is asked to pin, in which thread."""
    asked = []

    def pinned_for(batch, device):
        asked.append((device, threading.current_thread().name))
        return batch

    monkeypatch.setattr(Batch, "pinned_for", pinned_for)
    trained(later_job(tmp_path, base, PLOP(), schedule=replace(SCHEDULE, epochs=1)))
    steps = -(-len(LATER.train) // BATCH_SIZE)
    assert asked == [(torch.device("cpu"), "prefetch")] * 2 * steps  # the thresholds' pass, and training


# What is refused.


@dataclass(frozen=True)
class Poisoned(Finetune):
    """Fine-tuning with a second term that is no number after a few steps."""

    calls: ClassVar[list] = []

    def loss(self, step):
        self.calls.append(step)
        bad = math.nan if len(self.calls) > -(-len(BASE.train) // BATCH_SIZE) else 0.0
        return {**super().loss(step), "poison": Mean(step.student.logits.sum() * bad, 1)}


def test_a_loss_that_is_no_number_ends_the_task_by_name(tmp_path):
    Poisoned.calls.clear()
    with pytest.raises(DivergedError, match=r"seed 0: loss is not finite in epoch 2 of 2.*'poison': nan"):
        train_task(base_job(tmp_path / "none", method=Poisoned(), label="seed 0"), LocalWorker())
    assert not (tmp_path / "none").exists()


def test_an_absurd_learning_rate_diverges(tmp_path):
    with pytest.raises(DivergedError, match="audio_visual: loss is not finite"):
        train_task(base_job(tmp_path, schedule=replace(SCHEDULE, learning_rate=1e30)), LocalWorker())


@pytest.mark.parametrize(
    "changes",
    [{"network": VISUAL_ONLY}, {"task": replace(LATER, num_old=2)}, {"start": "nowhere"}],
    ids=["network", "classes", "missing"],
)
def test_a_start_that_does_not_fit_is_named(base, tmp_path, changes):
    job = replace(later_job(tmp_path, base, Finetune()), **changes)
    with pytest.raises(InputError) as caught:
        train_task(job, LocalWorker())
    assert job.start in str(caught.value)


def test_more_workers_than_a_batch_has_samples_are_refused(tmp_path):
    @dataclass(frozen=True)
    class Seventh(LocalWorker):
        rank: int = 6
        world_size: int = 7

    with pytest.raises(InputError, match="cannot feed 7 workers"):
        train_task(base_job(tmp_path), Seventh())


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("epochs", "base_epochs", "batch_size", "learning_rate") for value in (0, -1)]
    + [("learning_rate", math.nan), ("decay", "linear"), ("selection", "best"), ("selection_from", 1.0)]
    + [("selection_from", -0.1)],
)
def test_schedules_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=rf"schedule\.{name}\b") as caught:
        Schedule(**{name: value})
    assert repr(value) in str(caught.value)


def test_the_base_task_has_its_own_epochs():
    schedule = Schedule(epochs=3, base_epochs=7)
    assert (schedule.epochs_of(BASE), schedule.epochs_of(LATER)) == (7, 3)
    cosine = replace(schedule, decay="cosine", learning_rate=2.0)
    assert [cosine.rate(progress) for progress in (0, 1 / 3, 0.5)] == pytest.approx([2.0, 1.5, 1.0])
    assert [schedule.rate(progress) for progress in (0, 0.5, 0.99)] == [1e-4] * 3


def test_bf16_learns_too(base, tmp_path):
    weights, about = trained(later_job(tmp_path, base, precision="bf16", schedule=replace(SCHEDULE, epochs=1)))
    exact, precise = trained(later_job(tmp_path, base, schedule=replace(SCHEDULE, epochs=1)))
    assert all(value.isfinite().all() for value in weights.values())
    assert {value.dtype for value in weights.values()} == {value.dtype for value in exact.values()}
    assert about.history[0]["cross_entropy"] == pytest.approx(precise.history[0]["cross_entropy"], rel=0.05)


# Interrupted, and gone on with.


class CutError(Exception):
    """What ends a run in the middle."""


def stopped_after(epoch):
    """A worker whose run ends with its report on an epoch."""

    def report(record):
        if (record["kind"], record.get("epoch")) == ("epoch", epoch):
            raise CutError

    return LocalWorker(on_report=report)


def interrupted(job, epoch):
    with pytest.raises(CutError):
        train_task(job, stopped_after(epoch))


def resumable(name, folder, start):
    """A job of four epochs that notes each: with a cosine, choosing by validation in bf16, with a teacher and a memory."""
    schedule = replace(SCHEDULE, base_epochs=4, epochs=4, decay="cosine")
    notes = {"resume": str(folder / "resume"), "resume_seconds": 0.0}
    return {
        "cosine": lambda: base_job(folder / "out", schedule=schedule, **notes),
        "best_val": lambda: base_job(
            folder / "out",
            schedule=replace(schedule, selection="best_val", selection_from=0.0, learning_rate=1e-2),
            precision="bf16",
            **notes,
        ),
        "plop": lambda: later_job(folder / "out", start, CMR(), schedule=schedule, **notes),
    }[name]()


@pytest.mark.parametrize("name", ["cosine", "best_val", "plop"])
def test_a_task_interrupted_after_every_epoch_ends_as_the_undisturbed_one(base, tmp_path, name):
    job = resumable(name, tmp_path, base)
    undisturbed, about = trained(replace(job, output=str(tmp_path / "undisturbed"), resume=""))
    for epoch in (1, 2, 3, 4):
        interrupted(job, epoch)  # each run ends one epoch, or there would be more reports before this one
    assert not Path(job.output).exists()
    reports = []
    weights, told = trained(job, LocalWorker(on_report=reports.append))
    assert [each["text"] for each in reports] == ["audio_visual: goes on after epoch 4 of 4"]
    assert same(weights, undisturbed)
    assert told.history == about.history
    assert told.clips == about.clips
    assert told.seconds > 0
    assert len(list((tmp_path / "resume").iterdir())) == 2  # the latest alone


def test_an_epoch_cut_in_the_middle_is_done_again(base, tmp_path, monkeypatch):
    job = resumable("plop", tmp_path, base)
    undisturbed, _ = trained(replace(job, output=str(tmp_path / "undisturbed"), resume=""))
    calls, loss = [], CMR.loss

    def cut(self, step):
        calls.append(step)
        if len(calls) == 10:
            raise CutError
        return loss(self, step)

    monkeypatch.setattr(CMR, "loss", cut)
    with pytest.raises(CutError):
        train_task(job, LocalWorker())
    reports = []
    weights, _ = trained(job, LocalWorker(on_report=reports.append))
    assert "goes on after epoch 1" in reports[0]["text"]
    assert same(weights, undisturbed)


def test_the_place_and_later_tasks_epochs_do_not_make_another_job(base, tmp_path):
    job = resumable("cosine", tmp_path, base)
    interrupted(job, 2)
    moved = replace(
        job, output=str(tmp_path / "moved"), label="x", schedule=replace(job.schedule, epochs=9, selection_from=0.1)
    )
    reports = []
    trained(moved, LocalWorker(on_report=reports.append))
    assert reports[0]["text"] == "x: goes on after epoch 2 of 4"


@pytest.mark.parametrize(
    "changes",
    [{"seeds": Seeds(0, 1, 0)}, {"precision": "bf16"}, {"schedule": replace(SCHEDULE, base_epochs=3)}],
    ids=["seed", "precision", "epochs"],
)
def test_what_another_job_left_is_removed_with_a_note(base, tmp_path, changes):
    job = resumable("cosine", tmp_path, base)
    interrupted(job, 1)
    other = replace(job, resume_seconds=60.0, **changes)
    undisturbed, _ = trained(replace(other, output=str(tmp_path / "undisturbed"), resume=""))
    reports = []
    weights, _ = trained(other, LocalWorker(on_report=reports.append))
    assert "was left by another job: the task starts anew" in reports[0]["text"]
    assert same(weights, undisturbed)
    assert not list((tmp_path / "resume").iterdir())


@pytest.mark.parametrize("pattern", ["*.safetensors", "*.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
def test_a_damaged_note_is_not_gone_on_from(base, tmp_path, pattern, damage):
    job = resumable("cosine", tmp_path, base)
    undisturbed, _ = trained(replace(job, output=str(tmp_path / "undisturbed"), resume=""))
    interrupted(job, 2)
    (path,) = (tmp_path / "resume").glob(pattern)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-20] if damage == "truncated" else content[:-20] + b"\xff" + content[-19:])
    reports = []
    weights, _ = trained(job, LocalWorker(on_report=reports.append))
    notes = [each["text"] for each in reports if each["kind"] == "note"]
    if (pattern, damage) == ("*.json", "gone"):
        assert not notes  # as if nothing had been left
    else:
        assert len(notes) == 1
        assert "damaged interim" in notes[0]
        assert path.name in notes[0]
    assert same(weights, undisturbed)


def test_a_note_that_cannot_be_written_costs_no_more_than_the_note(base, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    job = resumable("cosine", tmp_path, base)
    interrupted(job, 1)
    reports = []
    with monkeypatch.context() as patch:
        patch.setattr("cavs_model.checkpoint.os.fsync", full)
        with pytest.raises(CutError):
            train_task(
                job, replace(stopped_after(3), on_report=lambda each: (reports.append(each), stopped_after(3).report(each)))
            )
    texts = [each["text"] for each in reports if each["kind"] == "note"]
    assert len(texts) == 3
    assert "No space left on device; it goes on without" in texts[1]
    trained(job, LocalWorker(on_report=reports.append))
    assert [each["epoch"] for each in reports if each["kind"] == "epoch"] == [2, 3, 2, 3, 4]


def resume_part(worker, folder, job):
    """Goes on with what is there; then where only the first worker sees anything."""
    train_task(job, worker)
    assert worker.reports[0]["text"] == "audio_visual: goes on after epoch 2 of 4"
    worker.reports.clear()
    elsewhere = replace(job, output=str(folder / "apart"), resume=job.resume if worker.rank == 0 else str(folder / "nowhere"))
    train_task(elsewhere, worker)
    assert "not all workers see the same there" in worker.reports[0]["text"] or worker.rank
    assert [each["epoch"] for each in worker.reports if each["kind"] == "epoch"] == [1, 2, 3, 4]


def test_two_workers_go_on_with_what_one_left_or_start_anew_together(base, tmp_path):
    job = replace(resumable("plop", tmp_path, base), schedule=replace(SCHEDULE, epochs=4))
    alone, about = trained(replace(job, output=str(tmp_path / "alone"), resume=""))
    interrupted(job, 2)
    on_two_workers(resume_part, tmp_path, tmp_path, job)
    for name in ("out", "apart"):
        shared, told = left(tmp_path / name)
        assert [each["loss"] for each in told.history] == pytest.approx([each["loss"] for each in about.history], rel=1e-2)
        assert mean_square(alone, shared) < 1e-4**2
    assert left(tmp_path / "out")[1].history[:2] == about.history[:2]


def test_nothing_is_noted_before_it_is_time(base, tmp_path):
    trained(replace(resumable("cosine", tmp_path, base), resume_seconds=60.0))
    assert not (tmp_path / "resume").exists()


@dataclass(frozen=True)
class Jump(Finetune):
    """Fine-tuning whose last step of the task has a gradient that is no number, of a loss that is one."""

    calls: ClassVar[list] = []

    def loss(self, step):
        self.calls.append(step)
        terms = super().loss(step)
        if len(self.calls) == 2 * -(-len(BASE.train) // BATCH_SIZE):
            zero = (step.student.logits - step.student.logits.detach()).abs().sum()
            terms["edge"] = Mean(zero.sqrt() * 0.0, 1)  # the slope of a root at zero
        return terms


def test_weights_that_are_no_numbers_after_the_last_step_end_the_task(tmp_path):
    Jump.calls.clear()
    with pytest.raises(DivergedError, match=r"seed 0: .* is not finite after epoch 2 of 2"):
        train_task(base_job(tmp_path / "none", method=Jump(), label="seed 0"), LocalWorker())
    assert not (tmp_path / "none").exists()


def test_adam_takes_torchs_steps_to_the_bit_and_leaves_the_compiler_alone():
    """The trap: torch's own imports its compiler when it is made, some 0.9 s of every process that trains."""
    code = """if True:
        import sys, torch
        from cavs_model.train import Adam
        torch.manual_seed(0)
        ours, theirs = ([torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(4))] for _ in range(2))

        def stepped(optimiser, parameters):
            generator = torch.Generator().manual_seed(0)
            for _ in range(3):
                optimiser.zero_grad(set_to_none=True)
                sum((each * torch.randn(each.shape, generator=generator)).sum() for each in parameters).backward()
                optimiser.step()
            return parameters

        made = Adam(ours, lr=1e-2, fused=True)
        stepped(made, ours)
        assert not any(each.requires_grad for state in made.state.values() for each in state.values())
        assert "torch._dynamo" not in sys.modules
        stepped(torch.optim.Adam(theirs, lr=1e-2, fused=True), theirs)
        assert "torch._dynamo" in sys.modules
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
        assert not torch.equal(ours[0], torch.ones(3, 4))
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert issubclass(Adam, torch.optim.Adam)
