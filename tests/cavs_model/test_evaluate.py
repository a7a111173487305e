"""Passes over data: the same numbers however the work is cut, and counts pixel by pixel."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from test_worker import CPU, TINY

from cavs_model.checkpoint import About, Checkpoint
from cavs_model.datasets.cache import open_split
from cavs_model.datasets.tones import Tones
from cavs_model.evaluate import (
    ConsolidateJob,
    Data,
    EvaluateJob,
    ScoreJob,
    evaluate,
    frozen,
    measure_samples,
    passes,
    score_samples,
)
from cavs_model.methods.cmr import CMR
from cavs_model.methods.eir import EIR
from cavs_model.methods.ewc import EWC
from cavs_model.metrics import frame_sums
from cavs_model.networks.av_segmenter import build
from cavs_model.scenario import Scenario
from cavs_model.types import AUDIO_VISUAL, IGNORE, VISUAL_ONLY, Batch, ScoreTable
from cavs_model.worker import arithmetic

PLAIN = Tones(train_clips=22, val_clips=11, test_clips=11)
AWKWARD = replace(PLAIN, frames=3, short_clips=True, first_frame_only=True)
SCENARIO = Scenario("2-2", order="reversed")
BATCH_SIZE = 4


def data(benchmark):
    return Data(benchmark, "", SCENARIO.learned_order(benchmark))


def random_checkpoint(network, num_classes, seed=0):
    """A network that says all its classes somewhere."""
    torch.manual_seed(seed)
    model = build(TINY, num_classes, network)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.classifier.conv.weight.mul_(50)
        model.classifier.conv.bias.zero_()
    return Checkpoint(About(network, num_classes, asdict(TINY)), save(model.state_dict()), "memory")


def job_of(benchmark, split="val"):
    task = SCENARIO.tasks(benchmark)[1]
    ids = tuple(sample.id for sample in benchmark.samples(split))
    return EvaluateJob(split, ids, task.seen_rule, task.num_classes, data(benchmark), BATCH_SIZE, "fp32")


def shards(ids, batches):
    size = batches * BATCH_SIZE
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@pytest.mark.parametrize("benchmark", [PLAIN, AWKWARD], ids=["plain", "awkward"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("measure", ["pixels", "frames"])
def test_counts_are_the_same_however_they_are_shared(benchmark, batches, measure):
    job, model = replace(job_of(benchmark), measure=measure), random_checkpoint(AUDIO_VISUAL, 5)
    whole = evaluate(job, model, job.sample_ids, CPU)
    parts = [evaluate(job, model, part, CPU) for part in shards(job.sample_ids, batches)]
    assert len(parts) > 1
    assert whole.dtype == np.int64
    assert np.array_equal(sum(parts), whole)
    assert np.array_equal(sum(reversed(parts)), whole)


@pytest.mark.parametrize("benchmark", [PLAIN, AWKWARD], ids=["plain", "awkward"])
@pytest.mark.parametrize("split", ["val", "train"])
def test_counts_against_a_naive_loop_over_pixels(benchmark, split):
    job, model = job_of(benchmark, split), random_checkpoint(AUDIO_VISUAL, 5)
    job = replace(job, sample_ids=job.sample_ids[:6])
    clips = benchmark.render(split, range(6))
    order, names = data(benchmark).learned_order, benchmark.class_names()
    expected = np.zeros((5, 5), np.int64)
    network = model.model()
    for part in (slice(0, 4), slice(4, 6)):
        batch = next(passes(open_split(benchmark, split, ""), job.sample_ids[part], np.arange(256, dtype=np.uint8), 4, CPU))
        said = network(batch).logits.argmax(2).numpy()
        for place, raw in np.ndenumerate(clips.label[part]):
            clip, frame = part.start + place[0], place[1]
            if clips.real_frame[clip, frame] and clips.labelled_frame[clip, frame]:
                true = order.index(names[raw - 1]) + 1 if raw else 0
                expected[true, said[place]] += 1
    counts = evaluate(job, model, job.sample_ids, CPU)
    assert (counts.sum(0) > 0).sum() > 1  # the network says more than one class
    assert np.array_equal(counts, expected)
    frames = clips.labelled_frame.sum()
    assert counts.sum() == frames * 32 * 32
    if benchmark is AWKWARD:
        assert frames == (6 if split == "train" else 3 * 3 + 3 * 2)


@pytest.mark.parametrize("benchmark", [PLAIN, AWKWARD], ids=["plain", "awkward"])
def test_frames_are_measured_one_by_one(benchmark):
    job, model = replace(job_of(benchmark, "train"), measure="frames"), random_checkpoint(AUDIO_VISUAL, 5)
    split, table = open_split(benchmark, "train", ""), data(benchmark).table(job.rule)
    batches = passes(split, job.sample_ids, table, BATCH_SIZE, CPU)
    pairs = [(model.model()(batch).logits.argmax(2), batch.label) for batch in batches]
    sums = evaluate(job, model, job.sample_ids, CPU)
    assert np.array_equal(sums, sum(frame_sums(said, true, 5) for said, true in pairs).numpy())
    assert sums[-1, 2] == benchmark.render("train", range(len(job.sample_ids))).labelled_frame.sum()
    assert evaluate(job, model, (), CPU).tolist() == [[0, 0, 0]] * 6


def test_future_classes_do_not_count():
    task = SCENARIO.tasks(PLAIN)[0]
    job = replace(job_of(PLAIN), rule=task.seen_rule, num_classes=task.num_classes)
    counts = evaluate(job, random_checkpoint(AUDIO_VISUAL, 3), job.sample_ids, CPU)
    label = PLAIN.render("val", range(11)).label
    assert counts.shape == (3, 3)
    assert counts.sum() == np.isin(label, [0, 3, 4]).sum()  # reversed order: the benchmark's last two are learned first


@pytest.mark.parametrize("benchmark", [PLAIN, AWKWARD], ids=["plain", "awkward"])
@pytest.mark.parametrize("stage", ["before", "after"])
def test_scores_are_the_same_however_they_are_shared(benchmark, stage):
    task = SCENARIO.tasks(benchmark)[1]
    job = ScoreJob(stage, CMR(), task, data(benchmark), BATCH_SIZE, "fp32")
    classes = task.num_old if stage == "before" else task.num_classes
    networks = (AUDIO_VISUAL,) if stage == "before" else (AUDIO_VISUAL, VISUAL_ONLY)
    models = {network: random_checkpoint(network, classes, seed) for seed, network in enumerate(networks, 1)}
    whole = score_samples(job, models, job.sample_ids, CPU)
    assert whole.sample_ids == job.sample_ids == tuple(sample.id for sample in task.train)
    assert len(set(zip(*whole.columns.values(), strict=True))) > 3
    for batches in (1, 2):
        parts = [score_samples(job, models, part, CPU) for part in shards(job.sample_ids, batches)]
        assert len(parts) > 1
        assert ScoreTable.concatenate(parts) == whole


def test_scores_of_labels_need_no_network():
    job = ScoreJob("after", EIR(), SCENARIO.tasks(PLAIN)[1], data(PLAIN), BATCH_SIZE, "fp32")
    assert EIR().networks_after == ()
    assert score_samples(job, {}, job.sample_ids, CPU).columns["components_3"]


def test_scores_see_the_labels_of_the_task():
    task = SCENARIO.tasks(AWKWARD)[1]
    seen = []

    class Looks(CMR):
        def score_before(self, models, batch, task):
            seen.append(batch)
            return ScoreTable(batch.sample_id, {})

    job = ScoreJob("before", Looks(), task, data(AWKWARD), BATCH_SIZE, "fp32")
    score_samples(job, {AUDIO_VISUAL: random_checkpoint(AUDIO_VISUAL, 3)}, job.sample_ids, CPU)
    labels = torch.cat([batch.label for batch in seen])
    assert set(labels.unique().tolist()) == {0, 3, 4, IGNORE}
    assert (labels[:, 1:] == IGNORE).all()  # only first frames are annotated
    assert not (labels[:, 0] == IGNORE).any()


def test_passes_go_in_order_in_whole_batches():
    split = open_split(PLAIN, "val", "")
    ids = split.sample_ids[::-1][:10]
    batches = list(passes(split, ids, np.arange(256, dtype=np.uint8), BATCH_SIZE, CPU))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert tuple(sample_id for batch in batches for sample_id in batch.sample_id) == ids
    assert not any(batch.rehearsed.any() for batch in batches)
    assert list(passes(split, (), np.arange(256, dtype=np.uint8), BATCH_SIZE, CPU)) == []


def test_a_frozen_network_reads_only_but_serves_a_loss():
    model = random_checkpoint(AUDIO_VISUAL, 3).model().train().requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split = open_split(PLAIN, "val", "")
    batch = next(passes(split, split.sample_ids, np.arange(256, dtype=np.uint8), 4, CPU))
    prediction = frozen(model, arithmetic("fp32", CPU))(batch)
    assert not model.training
    assert not prediction.logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ours = torch.ones_like(prediction.logits, requires_grad=True)
    (ours * prediction.logits).sum().backward()  # an inference tensor could not be saved for this
    assert torch.equal(ours.grad, prediction.logits)


def test_frozen_networks_and_measures_of_parameters_are_in_fp32_proper():
    seen = []
    model = random_checkpoint(AUDIO_VISUAL, 3).model()
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    split = open_split(PLAIN, "val", "")
    for precision in ("fp32", "bf16"):
        for batch in passes(split, split.sample_ids[:1], np.arange(256, dtype=np.uint8), 1, CPU):
            frozen(model, arithmetic(precision, CPU))(batch)
    assert seen == [False, True]

    class Looks(EWC):
        def measure(self, network, parameters, clip, task):
            seen.append(torch.backends.cudnn.allow_tf32)
            return super().measure(network, parameters, clip, task)

    job = ConsolidateJob(Looks(), SCENARIO.tasks(PLAIN)[0], data(PLAIN), "fp32")
    seen.clear()
    measure_samples(job, random_checkpoint(AUDIO_VISUAL, 3), job.chunks[0][:2], CPU)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32


def test_passes_pin_what_goes_to_a_gpu(monkeypatch):
    pinned = []
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self.is_contiguous()) or self.clone())
    split = open_split(AWKWARD, "val", "")
    for device, times in ((CPU, 0), (torch.device("cuda", 0), 2 * 6)):  # batches, tensors of one
        batches = list(passes(split, split.sample_ids[:5], np.arange(256, dtype=np.uint8), 4, device))
        assert [len(batch) for batch in batches] == [4, 1]
        assert pinned == [True] * times
