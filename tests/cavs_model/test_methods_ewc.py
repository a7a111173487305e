"""EWC: its Fisher information clip by clip, its average, its penalty against loops, and training with it."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from test_train import BASE, BATCH_SIZE, DATA, LATER, base_job, later_job, left, trained
from test_worker import CPU, TINY, on_two_workers

from cavs_model import checkpoint
from cavs_model.checkpoint import About, Checkpoint
from cavs_model.errors import InputError
from cavs_model.evaluate import ConsolidateJob, consolidate, measure_samples
from cavs_model.methods.ewc import EWC
from cavs_model.methods.finetune import Finetune
from cavs_model.networks.av_segmenter import build
from cavs_model.train import train_task
from cavs_model.types import AUDIO_VISUAL, IGNORE
from cavs_model.worker import LocalWorker

IDS = tuple(sample.id for sample in BASE.train)
JOB = ConsolidateJob(EWC(), BASE, DATA, "fp32")


def network(num_classes=BASE.num_classes, seed=0):
    torch.manual_seed(seed)
    return build(TINY, num_classes, AUDIO_VISUAL).eval()


def as_checkpoint(model, num_classes=BASE.num_classes):
    return Checkpoint(About(AUDIO_VISUAL, num_classes, asdict(TINY)), save(model.state_dict()), "memory")


def fisher_by_loops(model, ids):
    """Sums of squared gradients, a clip and a pixel at a time."""
    split, table = DATA.open("train"), DATA.table(BASE.train_rule)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in model.named_parameters()}
    for sample_id in ids:
        batch = split.batch([sample_id], [False], [table])
        log_p = model(batch).logits.log_softmax(2)
        pixels = (batch.label != IGNORE).nonzero().tolist()
        picked = [log_p[b, t, int(batch.label[b, t, y, x]), y, x] for b, t, y, x in pixels]
        model.zero_grad()
        (-torch.stack(picked).mean()).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.double() ** 2
    return sums


def test_fisher_is_the_mean_of_squared_gradients_of_single_clips():
    model = network()
    expected = fisher_by_loops(model, IDS[:3])
    found = measure_samples(JOB, as_checkpoint(model), IDS[:3], CPU)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-3, atol=1e-9)
    assert sum(values.sum() for values in found.values()) > 0


def test_a_clip_without_labels_adds_nothing():
    model, split = network(), DATA.open("train")
    batch = split.batch([IDS[0]], [False], [np.full(256, IGNORE, np.uint8)])
    parameters = dict(model.named_parameters())
    assert not any(each.any() for each in EWC().measure(model, parameters, batch, BASE).values())


def test_chunks_have_one_size_and_their_sums_are_joined_and_divided_by_the_clips(tmp_path, monkeypatch):
    monkeypatch.setattr("cavs_model.evaluate.CONSOLIDATE_CLIPS", 5)
    assert [len(chunk) for chunk in JOB.chunks] == [5] * (len(IDS) // 5) + [len(IDS) % 5] * bool(len(IDS) % 5)
    assert sum(JOB.chunks, ()) == IDS
    model = as_checkpoint(network())
    parts = [measure_samples(JOB, model, chunk, CPU) for chunk in JOB.chunks]
    consolidate(replace(JOB, output=str(tmp_path)), iter(parts), None)
    for name, fisher in checkpoint.read_method_state(tmp_path).items():
        mean = sum(part[name] for part in parts) / len(IDS)
        torch.testing.assert_close(fisher, torch.from_numpy(mean).float())


def test_the_running_average_and_the_rows_that_are_new():
    before = {"weight": torch.tensor([4.0, 8.0]), "classifier": torch.tensor([[1.0], [2.0]])}
    means = {"weight": torch.tensor([2.0, 0.0]).double(), "classifier": torch.tensor([[3.0], [4.0], [5.0]]).double()}
    found = EWC(decay=0.75).consolidate(means, before)
    torch.testing.assert_close(found["weight"], torch.tensor([3.5, 6.0]))
    torch.testing.assert_close(found["classifier"], torch.tensor([[1.5], [2.5], [5.0]]))
    first = EWC().consolidate(means, None)
    assert all(torch.equal(first[name], means[name].float()) for name in means)


@pytest.mark.parametrize("normalise", [True, False])
def test_penalty_is_the_weighted_square_of_the_way(normalise):
    draw = torch.Generator().manual_seed(1)
    start = {"a": torch.randn(3, 2, generator=draw), "classifier": torch.randn(2, 2, generator=draw)}
    fisher = {name: 5 * torch.rand(each.shape, generator=draw) for name, each in start.items()}
    now = {"a": torch.randn(3, 2, generator=draw), "classifier": torch.randn(4, 2, generator=draw).requires_grad_()}
    total = 0.0
    for name, values in start.items():
        for place in np.ndindex(*values.shape):
            total += float(fisher[name][place]) * (now[name][place].item() - float(values[place])) ** 2
    greatest = max(float(each.max()) for each in fisher.values())
    term = EWC(weight=7, normalise=normalise).penalty(now, start, fisher)["penalty"]
    assert term.total.item() == pytest.approx(7 * total / (greatest if normalise else 1), rel=1e-5)
    term.total.backward()
    assert now["classifier"].grad[:2].all()
    assert not now["classifier"].grad[2:].any()  # new rows are free


def test_a_network_without_gradients_has_no_penalty():
    given = {"a": torch.ones(2)}, {"a": torch.zeros(2)}, {"a": torch.zeros(2)}
    assert EWC().penalty(*given)["penalty"].total == 0


def test_the_loss_is_cross_entropy_and_weight_zero_asks_for_nothing():
    assert EWC().consolidates
    assert not EWC(weight=0).consolidates
    assert not EWC().needs_teacher


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A base task's checkpoint and what EWC keeps of it."""
    folder = tmp_path_factory.mktemp("ewc")
    train_task(base_job(folder / "base"), LocalWorker())
    chunks = (measure_samples(JOB, checkpoint.read(folder / "base"), chunk, CPU) for chunk in JOB.chunks)
    consolidate(replace(JOB, output=str(folder / "state")), chunks, None)
    return folder


def job(folder, start, method=None):
    return later_job(folder, start / "base", method or EWC(), method_state=str(start / "state"))


def moved(weights, start):
    """The squared way of the parameters, weighted by the Fisher information."""
    first, fisher = checkpoint.load(start / "base").state_dict(), checkpoint.read_method_state(start / "state")
    return sum(float((each * (weights[name][: len(each)] - first[name]) ** 2).sum()) for name, each in fisher.items())


def test_training_holds_the_parameters_that_matter(start, tmp_path):
    held, about = trained(job(tmp_path / "held", start))
    free, _ = trained(later_job(tmp_path / "free", start / "base", Finetune()))
    assert list(about.history[0]) == ["loss", "cross_entropy", "penalty"]
    assert about.history[0]["loss"] == pytest.approx(about.history[0]["cross_entropy"] + about.history[0]["penalty"])
    assert 0 < moved(held, start) < 0.9 * moved(free, start)
    tied, _ = trained(job(tmp_path / "tied", start, method=EWC(weight=1e7)))
    assert moved(tied, start) < moved(held, start)


def ewc_part(worker, folder, start):
    train_task(job(folder / "shared", start), worker)


def test_two_workers_learn_what_one_learns(start, tmp_path):
    on_two_workers(ewc_part, tmp_path, tmp_path, start)
    weights, about = trained(job(tmp_path / "alone", start))
    shared, told = left(tmp_path / "shared")
    assert (told.world_size, about.world_size) == (2, 1)
    for one, two in zip(about.history, told.history, strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    difference = torch.cat([(weights[name].double() - shared[name].double()).flatten() for name in weights])
    assert difference.abs().max() < 3e-4
    assert difference.square().mean() < 1e-5**2
    assert len(LATER.train) % BATCH_SIZE  # some batch is uneven


@pytest.mark.parametrize("change", ["absent", "shape", "name", "rubbish"])
def test_a_state_that_does_not_fit_is_named(start, tmp_path, change):
    state = checkpoint.read_method_state(start / "state")
    folder = tmp_path / "state"
    if change == "shape":
        state["classifier.conv.bias"] = torch.zeros(9)
    if change == "name":
        state["another"] = torch.zeros(1)
    if change != "absent":
        checkpoint.save_method_state(folder, state)
    if change == "rubbish":
        (folder / checkpoint.METHOD_STATE).write_bytes(b"rubbish")
    with pytest.raises(InputError) as caught:
        train_task(replace(job(tmp_path / "none", start), method_state=str(folder)), LocalWorker())
    assert str(folder) in str(caught.value)
    names = {"shape": "(9,) for classifier.conv.bias", "name": "(1,) for another", "absent": "missing", "rubbish": "damaged"}
    assert names[change] in str(caught.value)
